"""Walks past the teacher's horizon: what is judged is the walk's own end, told as a clip that begins there."""

from dataclasses import replace

import pytest
import torch
from micro_world import SHAPE, SIZE, gradients, random_batch, random_dit, rng
from test_train import SHIFT, STREAM, assert_same, fails_at, kill_and_resume, make_cache, run

from lingbot_nb.distill import train
from lingbot_nb.distill.flow import few_steps
from lingbot_nb.distill.long import LongRollout, clips_for, joined, last_picture, long_batches
from lingbot_nb.distill.train import Stream, TrainState
from lingbot_nb.model.kv_cache import GradCache
from lingbot_nb.model.vae import MICRO_VAE, TinyVAE
from lingbot_nb.presets import MASK_CHANNELS, MICRO, StreamSettings
from lingbot_nb.report.bench_training import random_clips

STEPS = few_steps((1, 0.5), SHIFT)
LONG = 9


def picture(latents):
    """Stands for decoding and encoding: tells what it was shown."""
    return 0.5 * latents[:, :, -1] + latents.shape[2]


def long_rollout(student, frames=4, walks=(LONG,), settings=STREAM, **options):
    clips = train.OwnRollout(student, settings, STEPS, make_cache, **options)
    return LongRollout(clips, frames, walks, picture)


def endless_long(start=0):
    while True:
        yield random_batch(start, frames=LONG)
        start += 1


def test_the_clip_is_the_walks_end_behind_a_picture_of_its_own():
    student, batch = random_dit(), random_batch(frames=LONG)
    long = long_rollout(student)
    own, clip = long(batch, rng(3), 1)
    _, walk = long.clips(batch, rng(3), 1)
    assert clip.shape[2] == own.latents.shape[2] == 4 and torch.equal(clip[:, :, 1:], walk[:, :, 6:])
    torch.testing.assert_close(clip[:, :, 0], picture(walk[:, :, :6]))
    # The clip's batch says: an image and no motion before the first frame, then what the walk was told.
    assert torch.equal(own.condition[:, MASK_CHANNELS:, 0], clip[:, :, 0].detach())
    assert torch.equal(own.condition[:, :MASK_CHANNELS], batch.condition[:, :MASK_CHANNELS, :4])
    assert torch.equal(own.condition[:, MASK_CHANNELS:, 1:], batch.condition[:, MASK_CHANNELS:, 1:4])
    assert torch.equal(own.control[:, :, 0], batch.control[:, :, 0])
    assert torch.equal(own.control[:, :, 1:], batch.control[:, :, 6:]) and own.context is batch.context
    assert torch.equal(own.latents[:, :, 1:], batch.latents[:, :, 6:])


def test_only_the_clips_own_frames_have_a_gradient():
    student, batch = random_dit(), random_batch(frames=LONG)
    long = long_rollout(student)
    _, clip = long(batch, rng(3), 0)
    clip.square().mean().backward()
    found = gradients(student)
    student.zero_grad()
    clips = replace(long.clips, grad_from=6)
    _, walk = clips(batch, rng(3), 0)
    (walk[:, :, 6:].square().sum() / clip.numel()).backward()
    assert found.keys() == gradients(student).keys()
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_lengths_and_exits_are_drawn_together_and_a_plain_clip_is_one_of_them():
    long = long_rollout(random_dit(), walks=(4, 6, LONG))
    generator = rng(1)
    drawn = {long.draw(generator) for _ in range(100)}
    assert drawn == set(range(6))
    batch = random_batch(frames=LONG)
    with torch.no_grad():
        own, clip = long(batch, rng(3), 3)
        _, plain = long.clips(batch.frames(4), rng(3), 1)
    assert torch.equal(clip, plain) and torch.equal(own.latents, batch.latents[:, :, :4])


def make_long(fail_at):
    student, critic, teacher = random_dit(0), random_dit(1), random_dit(2)
    stream = Stream(endless_long())
    models = {"student": student, "critic": critic}
    rates = {"student": 1e-3, "critic": 1e-3}
    state = TrainState.of(models, rates, betas=(0.0, 0.999), average={"student": 0.9}, streams={"batches": stream})
    make_clip = long_rollout(student, walks=(4, LONG))
    step = train.dmd_step(make_clip, critic, teacher, stream, STREAM, shift=SHIFT, ratio=2, reuse=False, known=1)
    return fails_at(step, fail_at), state


def test_it_trains_like_any_other_source_of_clips_and_resumes_exactly(tmp_path):
    (whole, state), (rows, resumed) = kill_and_resume(make_long, 6, 5, tmp_path, 2)
    assert whole == rows
    assert_same(state, resumed)
    assert all(row["student_grad"] > 0 for row in rows if "student_grad" in row)


def test_scores_see_clips_of_the_teachers_length_that_begin_with_a_given_frame():
    student, seen = random_dit(0), []

    class Teacher:
        text, camera_tokens, film = student.text, student.camera_tokens, student.film

        def __call__(self, x, t, **inputs):
            seen.append((x.shape[2], inputs["condition_BCFHW"].shape[2]))
            return torch.zeros_like(x)

    settings = StreamSettings(chunk=2, window=4, sink=1, image_first=False)
    clips = train.OwnRollout(student, settings, STEPS, lambda batch: GradCache(SIZE, settings, SHAPE, batch=len(batch)))
    critic = random_dit(1)
    state = TrainState.of({"student": student, "critic": critic}, {"student": 1e-3, "critic": 1e-3})
    make_clip = LongRollout(clips, 5, (8,), picture)
    step = train.dmd_step(make_clip, critic, Teacher(), endless_long(), settings, shift=SHIFT, ratio=1, known=1)
    assert run(step, state, 1)[0]["student_grad"] > 0
    assert seen == [(5, 5)]


@pytest.mark.parametrize(
    ("settings", "frames", "walk", "fits"),
    [
        (StreamSettings(chunk=3, window=9, sink=3, image_first=False), 9, 12, "10, 7, 4"),
        (StreamSettings(chunk=3, window=9, sink=3, image_first=False), 9, 9, "7, 4"),
        (STREAM, 6, 5, "5, 4, 3, 2"),
    ],
)
def test_clips_that_are_not_whole_chunks_are_refused(settings, frames, walk, fits):
    with pytest.raises(ValueError, match=f"use clips of {fits}"):
        long_rollout(None, frames, (walk,), settings)


def test_a_batch_that_ends_before_the_walk_is_refused():
    with pytest.raises(ValueError, match="a walk of 9 frames needs control for as many, not 5"):
        long_rollout(random_dit())(random_batch(), rng())


def test_the_picture_is_the_last_pixel_frame_alone():
    torch.manual_seed(0)
    vae = TinyVAE(MICRO_VAE).eval()
    latents = torch.randn(2, 16, 5, 4, 6, generator=rng())
    wanted = vae.encode(vae.decode(latents)[:, :, -1:])[:, :, 0]
    torch.testing.assert_close(last_picture(vae)(latents), wanted)
    torch.testing.assert_close(last_picture(vae, vae.size.memory + 1)(latents), wanted, rtol=1e-4, atol=1e-5)
    assert wanted.shape == (2, 16, 4, 6) and not torch.allclose(wanted, latents[:, :, -1], atol=1e-2)


def test_joined_clips_keep_all_motion_but_that_of_the_seam():
    one, two = random_batch(1), random_batch(2)
    both = joined([one, two])
    assert both.latents.shape[2] == both.control.shape[2] == both.condition.shape[2] == 9
    assert torch.equal(both.control, torch.cat([one.control, two.control[:, :, 1:]], 2))
    assert torch.equal(both.condition[:, :, :5], one.condition) and both.context is one.context


@pytest.mark.parametrize(("walk", "clips"), [(5, 1), (6, 2), (9, 2), (10, 3)])
def test_joined_clips_are_no_shorter_than_the_walk(walk, clips):
    assert clips_for(walk, 5) == clips
    parts = [random_batch(frames=5)] * clips
    assert walk <= joined(parts).latents.shape[2] < walk + 4


def test_long_batches_have_one_control_mode_a_row():
    clips = random_clips(replace(MICRO, shape=SHAPE), 3, torch.device("cpu"))
    batch = next(long_batches(clips, 16, rng(), 2))
    assert batch.latents.shape[:3] == (16, 16, 2 * SHAPE.frames - 1)
    assert torch.equal(batch.condition[:, :MASK_CHANNELS, 0], torch.ones_like(batch.condition[:, :MASK_CHANNELS, 0]))
    assert not batch.condition[:, :MASK_CHANNELS, 1:].any()
    # Random walks move all the time; a row told by keys has no origins of rays at all.
    origins = batch.control.unflatten(1, (MICRO.model.control_channels, -1))[:, :3, :, 1:].abs().sum((1, 2, 4, 5))
    moving = origins > 0
    assert (moving.all(1) | ~moving.any(1)).all() and moving.any() and not moving.all()
