"""Every family trains from the same start on a micro world and is judged the same way."""

from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch

from lingbot_nb.distill import train
from lingbot_nb.model import checkpoint
from lingbot_nb.model.dit import DiT
from lingbot_nb.parts import SHIPPED_CLIPS, shipped_clips
from lingbot_nb.presets import MICRO, TINY
from lingbot_nb.report import bench_families as bench
from lingbot_nb.report.bench_training import random_clips
from lingbot_nb.runs import PROJECT

PRESET = replace(MICRO, shape=MICRO.shape.with_frames(3))


class Decoder:
    """Latents to pixel frames of the right number and size."""

    def decode(self, latents):
        count = 4 * (latents.shape[2] - 1) + 1
        return latents[:, :3].mean((2, 3, 4))[:, :, None, None, None].expand(-1, -1, count, 32, 48)


@pytest.fixture(scope="module")
def world():
    torch.manual_seed(0)
    start, teacher = (DiT(PRESET.model).requires_grad_(False) for _ in range(2))
    for dit in (start, teacher):
        torch.nn.init.normal_(dit.head.head.weight, std=0.05)
    clips = random_clips(PRESET, 4, torch.device("cpu"))
    batch = next(clips.batches(2, torch.Generator().manual_seed(0)))
    frames = np.random.default_rng(0).integers(0, 255, (2, 9, 32, 48, 3), dtype=np.uint8)
    return bench.Place(PRESET, start, teacher, clips, batch=2, lr=1e-3), bench.Exam(batch, frames, Decoder(), (2, 1))


def test_every_family_is_judged_beside_its_start(world):
    place, exam = world
    before = {name: tensor.clone() for name, tensor in place.start.state_dict().items()}
    rows = list(bench.families(place, exam, seconds=0.01))
    assert [row.family for row in rows] == ["start", *(family.__name__ for family in bench.FAMILIES)]
    for row in rows[1:]:
        assert row.steps >= 1 and row.seconds > 0 and not row.ended
        assert list(row.psnr) == list(row.sharpness) == [2, 1] and all(np.isfinite(list(row.psnr.values())))
    assert all(torch.equal(tensor, before[name]) for name, tensor in place.start.state_dict().items())
    shown = bench.table(rows).splitlines()
    assert len(shown) == 2 + len(rows) and "dB, 1 steps" in shown[0] and "score_identity" in shown[4]


@pytest.mark.parametrize("family", bench.FAMILIES)
def test_the_gradient_reaches_the_student_and_not_the_teacher(world, family):
    place, _ = world
    step, state = family(place)
    # At first the critic is the teacher, and their scores agree: the sixth step is the student's second.
    *_, row = train.fit(step, state, steps=6)
    assert row["student_grad"] > 0
    assert all(p.grad is None for p in (*place.teacher.parameters(), *place.start.parameters()))
    before, after = place.start.parameters(), state.models["student"].parameters()
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_command_line_makes_a_place_whose_clips_do_not_judge():
    """From the shipped clips, which are of one split, and the shipped weights; any of them can be the start."""
    weights = PROJECT / "data" / "weights"
    shared = dict(data=SHIPPED_CLIPS, weights=weights, start=weights / "student.safetensors", batch=3, frames=5)
    place, exam = bench.prepared(Namespace(**shared, held_out=1, train=1))
    judged, learnt = shipped_clips(2)
    assert np.array_equal(exam.frames, [judged.frames]) and exam.batch.latents.shape[2] == TINY.shape.frames
    assert place.clips.poses[0].cpu().numpy() == pytest.approx(learnt.poses[::4], abs=1e-6)
    assert not torch.equal(place.clips.latents, exam.batch.latents) and (place.batch, place.frames) == (3, 5)
    for file, dit in (("student", place.start), ("teacher", place.teacher)):
        wanted = DiT(TINY.model)
        checkpoint.load_into(weights / f"{file}.safetensors", wanted)
        pairs = zip(dit.parameters(), wanted.parameters(), strict=True)
        assert all(torch.equal(mine.cpu(), other) and not mine.requires_grad for mine, other in pairs)
    with pytest.raises(ValueError, match="no clips left to learn from"):
        bench.prepared(Namespace(**shared, held_out=100, train=1))


def test_a_family_that_diverges_is_a_row(world):
    place, exam = world

    def broken(place):
        _, state = bench.matching(place)

        def step(state):
            raise train.Diverged("the student's loss is nan")

        return step, state

    row = list(bench.families(place, exam, 0.01, [broken]))[-1]
    assert "nan" in row.ended and row.steps == 0
    assert "broken (diverged)" in bench.table([row])


def test_a_mean_flow_student_jumps_to_clean_by_its_average_velocity(world):
    place, exam = world
    dit, batch = place.teacher, exam.batch
    student = bench.ToClean(dit)
    t = torch.full((2, 3), 600.0)
    velocity = train.bind(dit, batch)
    wanted = velocity(batch.latents, bench.meanflow.interval_time(dit, t, torch.zeros_like(t)))
    assert torch.equal(train.bind(student, batch)(batch.latents, t), wanted)
    assert not torch.allclose(wanted, velocity(batch.latents, t))
    # Where nothing is left to jump over it is the network itself: the clean pass that writes the cache.
    torch.testing.assert_close(
        train.bind(student, batch)(batch.latents, 0 * t), velocity(batch.latents, 0 * t), rtol=1e-5, atol=1e-6
    )


def test_a_start_is_the_teacher_under_the_causal_mask(world):
    place, _ = world
    made = bench.causal_start(replace(place, start=place.teacher), 0.05)
    assert made.teacher is place.teacher and not any(p.requires_grad for p in made.start.parameters())
    assert not torch.equal(made.start.head.head.weight, place.teacher.head.head.weight)
