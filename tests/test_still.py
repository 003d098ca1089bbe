"""Halts: what a world in which nothing moves must look like, and a student that learns it from its own rollout."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from micro_world import SHAPE, SIZE, random_batch, random_dit, rng
from test_train import SHIFT, STREAM, make_cache, run

from lingbot_nb.distill.flow import few_steps
from lingbot_nb.distill.still import Halts, halts_of, still_step
from lingbot_nb.distill.train import TrainState
from lingbot_nb.model.vae import MICRO_VAE, TinyVAE, from_uint8
from lingbot_nb.presets import MASK_CHANNELS, MICRO, TIME_STRIDE, StreamSettings
from lingbot_nb.world.clips import Clip
from lingbot_nb.world.latents import encode_walks

REST = 3
"""The frame from which on the first walk below stands; the second never does."""


def walk(rests: bool, frames: int = 6) -> Clip:
    shape = MICRO.shape
    count, seen = (
        TIME_STRIDE * (frames - 1) + 1,
        np.random.default_rng(rests).integers(0, 255, (99, 32, 48, 3), np.uint8),
    )
    moved = np.minimum(np.arange(count), TIME_STRIDE * REST) if rests else np.arange(count)
    poses = np.tile(np.eye(4, dtype=np.float32), (count, 1, 1))
    poses[:, 2, 3] = moved
    keys = np.zeros((count, 8), bool)
    keys[1:, 0] = moved[1:] > moved[:-1]
    camera = np.array([40, 40, shape.width / 2, shape.height / 2], np.float32)
    return Clip(seen[moved], poses, keys, camera, seed=int(rests), map="here", id=f"walk-{rests}")


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return TinyVAE(MICRO_VAE).eval()


@pytest.fixture(scope="module")
def halts(vae) -> Halts:
    clips = [walk(True), walk(False)]
    return halts_of(vae, encode_walks(vae, clips, torch.randn(3, MICRO.model.text_dim), MICRO), clips, size=2)


def test_one_halts_at_a_first_frame_and_where_the_pose_stays(halts):
    assert halts.places.tolist() == [[0, 0], [1, 0], [0, REST], [0, REST + 1]]


def test_a_halt_is_encoded_as_a_film_of_it_would_be(halts, vae):
    """After its history a batch has the latents, the control and the condition of the walk that really stood there."""
    batch = halts.batch(torch.tensor([2]), REST + 1, 6, torch.tensor([False]))
    whole = halts.clips.batch(torch.tensor([0]), torch.tensor([0]), 6, torch.tensor([False]))
    for mine, true in zip(batch.tensors, whole.tensors, strict=True):
        torch.testing.assert_close(mine, true, atol=1e-5, rtol=1e-5)
    picture = torch.from_numpy(walk(True).frames[TIME_STRIDE * REST])
    film = vae.encode(from_uint8(picture.expand(1, 21, -1, -1, -1))).detach()
    torch.testing.assert_close(batch.latents[:, :, -2:], film[:, :, -2:], atol=1e-5, rtol=1e-5)


def test_a_halt_can_last_longer_than_any_walk_and_tells_no_motion(halts):
    batch = halts.batch(torch.tensor([3, 2]), 2, 30, torch.tensor([True, False]))
    assert batch.latents.shape[2] == batch.condition.shape[2] == batch.control.shape[2] == 30
    assert torch.equal(batch.latents[:, :, 2:], batch.latents[:, :, -1:].expand(-1, -1, 28, -1, -1))
    assert not batch.condition[:, :MASK_CHANNELS, 1:].any()
    assert torch.equal(batch.control[:, :, 2:], batch.control[:, :, :1].expand(-1, -1, 28, -1, -1))
    assert not torch.equal(batch.control[1, :, 1], batch.control[1, :, 0])  # the key that led to the halt


def test_random_halts_have_the_walk_before_them_that_the_batch_says(halts):
    drawn = halts.batches(3, rng(1), 8, StreamSettings(chunk=1, image_first=True), latest=5)
    found = {}
    for _ in range(60):
        batch, history = next(drawn)
        still = batch.latents[:, :, history:]
        assert len(batch) == 3 and torch.equal(still, still[:, :, :1].expand_as(still))
        found[history] = found.get(history, 0) + 1
    assert sorted(found) == [1, 2, 3, 4, 5] and 20 < found[1] < 40


def test_histories_are_whole_chunks(halts):
    drawn = halts.batches(1, rng(1), 8, StreamSettings(chunk=3, image_first=True), latest=5)
    assert {next(drawn)[1] for _ in range(20)} == {1, 4}
    with pytest.raises(ValueError, match="no halt among 4 has a chunk of 9"):
        next(halts.batches(1, rng(1), 20, StreamSettings(chunk=9, window=12, image_first=False)))


def standing(history: int = 1):
    """The same pictures for ever, standing after `history` frames."""
    batch = random_batch(3)
    latents = batch.latents.clone()
    latents[:, :, history:] = latents[:, :, history : history + 1]
    while True:
        yield replace(batch, latents=latents), history


@pytest.mark.parametrize("history", [1, 2])
def test_a_student_learns_to_stand(history):
    dit, steps = random_dit(), few_steps((1, 0.5), SHIFT)
    state = TrainState.of({"student": dit}, {"student": 3e-3})
    rows = run(still_step(dit, standing(history), STREAM, steps, make_cache), state, 60)
    losses = [row["student_loss"] for row in rows]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert {"student_end", "student_grad"} <= rows[0].keys()


def test_the_loss_is_that_of_the_frames_after_the_history():
    """Recomputed by hand from the student's own rollout at the same draws."""
    from lingbot_nb.distill.train import OwnRollout

    dit, steps = random_dit(), few_steps((1,), SHIFT)
    state = TrainState.of({"student": dit}, {"student": 1e-3}, seed=4)
    twin = TrainState.of({"student": random_dit()}, {"student": 1e-3}, seed=4)
    batch, _ = next(standing())
    settings = replace(STREAM, image_first=True)
    row = still_step(dit, standing(), settings, steps, make_cache)(state)
    with torch.no_grad():
        _, clip = OwnRollout(twin.models["student"], settings, steps, make_cache)(batch, twin.generator)
    error = (clip - batch.latents)[:, :, 1:].square()
    torch.testing.assert_close(row["student_loss"], error.mean())
    torch.testing.assert_close(row["student_end"], error[:, :, -1].mean())
    assert SHAPE.frames == clip.shape[2] and SIZE.dim == 32
