"""Clips encoded in part: their first frames, and start images for the first of those."""

import numpy as np
import pytest
import torch

from lingbot_nb.control.camera import poses_from_keys
from lingbot_nb.model.vae import MICRO_VAE, TinyVAE
from lingbot_nb.presets import MICRO
from lingbot_nb.world.latents import encode_clips

CLIPS, FRAMES = 2, 5


@pytest.fixture(scope="module")
def encoded():
    """`encode_clips` of two random clips, given the options."""
    torch.manual_seed(0)
    vae, make = TinyVAE(MICRO_VAE), np.random.default_rng(0)
    count, shape = 4 * (FRAMES - 1) + 1, MICRO.shape
    frames = make.integers(0, 256, (CLIPS, count, shape.height, shape.width, 3), np.uint8)
    keys = make.random((CLIPS, count, 8)) < 0.4
    poses = [poses_from_keys(rows[1:], move=9.0, turn=4.0) for rows in keys]
    context = torch.zeros(3, MICRO.model.text_dim)
    parts = vae, frames, poses, keys, np.array([80.0, 80.0, 80.0, 48.0], np.float32), context, MICRO
    return lambda **options: encode_clips(*parts, **options)


def test_part_of_a_clip_is_that_of_the_whole(encoded):
    whole, part = encoded(), encoded(frames=3, starts=2)
    assert whole.images.shape[1] == FRAMES and part.latents.shape[1] == 3 and part.images.shape[1] == 2
    for name, stop in (("latents", 3), ("images", 2), ("poses", 3), ("keys", 3), ("steps", 3)):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name)[:, :stop], msg=name)
    torch.testing.assert_close(part.tail, whole.tail)


def test_batches_begin_where_there_are_start_images(encoded):
    clips = encoded(starts=2)
    batches = clips.batches(8, torch.Generator().manual_seed(0), frames=3)
    seen = torch.cat([next(batches).latents[:, :, 0] for _ in range(4)])
    images = clips.images.flatten(0, 1)
    assert {int((images - one).abs().amax((1, 2, 3)).argmin()) for one in seen} == set(range(2 * CLIPS))


def test_as_many_starts_as_needed_draw_the_batches_of_all(encoded):
    some, every = (
        next(encoded(starts=starts).batches(4, torch.Generator().manual_seed(3), frames=3)) for starts in (3, None)
    )
    torch.testing.assert_close(some.tensors, every.tensors)
