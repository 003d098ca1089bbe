"""Warnings from metrics rows: each sick run gives its own, a healthy one none."""

import json
import math

import numpy as np
import pytest
import torch
from test_train import make_dmd, run

from lingbot_nb.distill import dmd
from lingbot_nb.report import health
from lingbot_nb.report.health import Limits, check


def healthy(count=200, seed=0):
    """A run like a good one: noisy, falling, the student in every fifth row."""
    make = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        fall = math.exp(-i / 80)
        row = {
            "step": i + 1,
            "seconds": 0.1 * i,
            "critic_loss": (0.5 + 0.5 * fall) * make.lognormal(0, 0.15),
            "critic_grad": make.lognormal(0, 0.3),
        }
        if i % 5 == 0:
            row["student_loss"] = make.lognormal(0, 0.3)
            row["student_grad"] = make.lognormal(0, 0.3)
            row["student_g"] = (0.2 + 0.3 * fall) * make.lognormal(0, 0.2)
            row["student_spread"] = 0.97 * make.lognormal(0, 0.02)
            row["student_motion"] = (0.95 - 0.1 * fall) * make.lognormal(0, 0.05)
        rows.append(row)
    return rows


def changed(name, factor, start=100, seed=0):
    rows = healthy(seed=seed)
    for i, row in enumerate(rows):
        if name in row and i >= start:
            row[name] *= factor(i - start)
    return rows


@pytest.mark.parametrize("seed", range(20))
def test_a_healthy_run_has_no_findings_at_any_length(seed):
    rows = healthy(seed=seed)
    assert not any(check(rows[:count]) for count in (0, 1, 5, 16, 40, 77, 140, 200))


@pytest.mark.parametrize(
    ("name", "field", "factor"),
    [
        ("the critic lags", "critic_loss", lambda i: 1 + 0.01 * i),
        ("the pull grows", "student_g", lambda i: 1 + 0.04 * i),
        ("saturation", "student_spread", lambda i: 1 + 0.006 * i),
        ("washed out", "student_spread", lambda i: 1 / (1 + 0.01 * i)),
        ("motion is lost", "student_motion", lambda i: 1 / (1 + 0.01 * i)),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_each_sickness_is_named_and_alone(name, field, factor, seed):
    found = check(changed(field, factor, seed=seed))
    assert [finding.name for finding in found] == [name] and found[0].step == 200


def test_a_student_that_never_moved_is_told_too():
    assert [finding.name for finding in check(changed("student_motion", lambda i: 0.5, start=0))] == ["motion is lost"]


def test_nan_comes_first_with_its_step_also_from_a_file():
    rows = healthy()
    rows[150]["critic_loss"] = math.nan
    for read in (rows, [json.loads(json.dumps(row).replace("NaN", "null")) for row in rows]):
        found = check(read)
        assert found[0].name == "not finite" and found[0].step == 151 and "critic_loss" in found[0].words
    rows[150]["critic_loss"], rows[3]["anything"] = 0.5, math.nan
    assert check(rows) == []


def test_a_spike_is_seen_while_it_is_fresh():
    rows = healthy()
    rows[-4]["critic_grad"] = 50.0
    (found,) = check(rows)
    assert found.name == "the critic's gradient spikes" and found.step == 197
    rows[-4]["critic_grad"], rows[20]["critic_grad"] = 1.0, 50.0
    assert check(rows) == []


def test_windows_end_at_the_newest_value_and_need_two():
    assert health.windows(list(range(15)), Limits(window=8)) == []
    assert health.windows(list(range(17)), Limits(window=8)) == [4.5, 12.5]
    assert len(health.windows(list(range(1000)), Limits(window=8, longest=100))) == 10


def test_vital_signs_of_clips():
    make = torch.Generator().manual_seed(0)
    real = torch.randn(2, 4, 6, 5, 5, generator=make)
    signs = dmd.vital_signs(1.5 * real, real)
    assert signs["spread"].item() == pytest.approx(1.5) and signs["motion"].item() == pytest.approx(1.5)
    frozen = real[:, :, :1].expand_as(real)
    assert dmd.vital_signs(frozen, real)["motion"] == 0
    assert dmd.vital_signs(real, real)["spread"] == 1


def test_a_real_run_carries_the_signs():
    step, state = make_dmd(None)
    rows = run(step, state, 3)
    assert {"student_spread", "student_motion", "student_g"} <= rows[1].keys()
    assert check(rows) == []
