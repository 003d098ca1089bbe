"""The training benchmark runs every stage and counts what it did."""

from dataclasses import replace

import pytest
import torch

from lingbot_nb.presets import MICRO
from lingbot_nb.report import bench_training


def test_every_stage_is_measured_on_a_small_network():
    preset = replace(MICRO, shape=MICRO.shape.with_frames(3))
    rates = list(bench_training.training_steps(preset, batch=1, steps=4, warmup=1, log_every=2, clips=2))
    assert [rate.stage for rate in rates] == ["teacher", "causal", "consistency", "student"]
    for rate in rates:
        assert rate.steps_per_second == pytest.approx(1000 / rate.milliseconds)
        assert rate.spread[0] <= rate.milliseconds <= rate.spread[1] and rate.first_seconds > 0
        assert rate.batch == 1 and rate.peak_gib == 0
    table = bench_training.rate_table(rates).splitlines()
    assert len(table) == 6 and "steps / s" in table[0] and "student" in table[-1]


def test_the_compile_hook_reaches_the_stage():
    hooked = []

    def hook(function):
        hooked.append(function)
        return function

    preset = replace(MICRO, shape=MICRO.shape.with_frames(3))
    options = dict(batch=1, steps=1, warmup=0, log_every=1, clips=1, compile=hook)
    list(bench_training.training_steps(preset, stages=[bench_training.student], **options))
    assert len(hooked) >= 3


def test_random_clips_have_the_presets_shape():
    clips = bench_training.random_clips(MICRO, 2, torch.device("cpu"))
    batch = next(clips.batches(2, torch.Generator().manual_seed(0)))
    shape = MICRO.shape
    assert batch.latents.shape == (2, 16, shape.frames, shape.latent_height, shape.latent_width)
    assert batch.control.shape[1] == 64 * MICRO.model.control_channels and batch.control.isfinite().all()
