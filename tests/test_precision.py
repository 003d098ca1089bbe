"""What a number format costs: nothing where nothing is rounded, and more the coarser the format."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from micro_world import SHAPE, SIZE, random_batch, random_dit

from lingbot_nb.model.vae import MICRO_VAE, TinyVAE
from lingbot_nb.presets import MICRO
from lingbot_nb.report import precision
from lingbot_nb.report.evaluation import student_clips
from lingbot_nb.report.precision import PLAIN, costs, walked
from lingbot_nb.stream.engine import Plain, Speed

PRESET = replace(MICRO, model=SIZE, shape=SHAPE)


def one_clip(seed: int):
    return random_batch(seed, batch=1)


def test_a_walk_is_the_rollouts(monkeypatch):
    """With the rollout's own noise the walk is the one that evaluation makes."""
    from lingbot_nb.distill.flow import few_steps

    dit, batch = random_dit().eval(), one_clip(3)
    schedule = few_steps(PRESET.flow.labels(2), PRESET.flow.shift)
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: torch.full(shape[0] if len(shape) == 1 else shape, 0.5))
    made = walked(Plain(dit, PRESET.stream, PRESET.shape, schedule), batch, PRESET, 2)
    expected = student_clips(dit, batch, PRESET, steps=schedule, generator=torch.Generator())
    torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


def test_coarser_formats_cost_more_and_the_same_format_costs_nothing():
    dit, vae = random_dit().eval(), TinyVAE(MICRO_VAE).eval()
    batches = [one_clip(seed) for seed in range(3)]
    real = np.random.default_rng(0).integers(0, 256, (3, SHAPE.pixel_frames, SHAPE.height, SHAPE.width, 3), np.uint8)
    rows = [*costs(dit, vae, batches, real, PRESET, steps=2, seconds=(0.25, 1))]
    assert [(row.name, row.seconds) for row in rows] == [(f, s) for f in precision.FORMATS for s in (0.25, 1)]
    bf16, _, products, _, attention, _ = (row.latents.mean for row in rows)
    assert bf16 > products + 6 and attention < products + 1 and products > 10
    assert "fp8 products" in precision.table(rows)
    plain = dict(formats={"fp32": PLAIN}, seconds=(1,), dtype=torch.float32)
    same = next(costs(dit, vae, batches, real, PRESET, steps=2, **plain))
    assert same.latents.mean > 100 and same.frames.mean > 60 and same.gained.mean == pytest.approx(0, abs=1e-3)


def test_formats_change_numbers_only():
    for speed in precision.FORMATS.values():
        assert replace(speed, fp8=False, fp8_attention=False) == Speed(compile=False, graph=False)
