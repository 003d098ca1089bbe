"""Schedules, conversions and samplers against released numbers and a world whose velocity field is known exactly."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lingbot_nb.distill import flow
from lingbot_nb.distill.flow import (
    FewStep,
    add_noise,
    euler,
    few_steps,
    guided,
    released_few_steps,
    shift,
    sigma_grid,
    two_experts,
    unipc,
    unipc_grid,
    unshift,
    with_guidance,
)

FIXTURE = np.load(Path(__file__).parent / "fixtures" / "sampler.npz")
SHIFTS = (3.0, 5.0, 10.0)
V1_ROWS, V2_ROWS = [0, 179, 358, 679], [0, 250, 500, 750]


# ---- released numbers ----------------------------------------------------------------------------


@pytest.mark.parametrize("k", SHIFTS)
def test_teacher_grid_is_the_released_one(k):
    timesteps, sigmas = unipc_grid(40, k)
    np.testing.assert_array_equal(timesteps, FIXTURE[f"teacher40/shift{k}/timesteps"])
    np.testing.assert_array_equal(sigmas, FIXTURE[f"teacher40/shift{k}/sigmas"])


@pytest.mark.parametrize("k", SHIFTS)
def test_few_steps_are_the_released_ones(k):
    np.testing.assert_array_equal(
        [step.t for step in released_few_steps(V1_ROWS, k)], FIXTURE[f"fast/shift{k}/timesteps"]
    )
    plain = released_few_steps(V1_ROWS, k, ties=False)
    np.testing.assert_array_equal([step.sigma for step in plain], FIXTURE[f"fast/shift{k}/sigmas"])
    assert all(step.sigma_noise == step.sigma and step.t == 1000 * step.sigma for step in plain)


@pytest.mark.parametrize(
    ("rows", "k", "expected"),
    [
        (V1_ROWS, 10, [(978, 0.97897, 0.97883), (947, 0.94791, 0.94769), (825, 0.82585, 0.82519)]),
        (V2_ROWS, 10, [(967, 0.96795, 0.96778), (908, 0.90893, 0.90859), (768, 0.76899, 0.76804)]),
        (V2_ROWS, 5, [(937, 0.93789, 0.93758), (833, 0.83361, 0.83306), (624, 0.62469, 0.62469)]),
    ],
)
def test_tied_timesteps_shift_both_sigmas(rows, k, expected):
    steps = released_few_steps(rows, k)
    assert steps[0].t == 999 and steps[0].sigma == unipc_grid(1000, k)[1][0].item()
    for step, (t, sigma, sigma_noise) in zip(steps[1:], expected, strict=True):
        assert step.t == t
        np.testing.assert_allclose((step.sigma, step.sigma_noise), (sigma, sigma_noise), atol=6e-6)


def toy_velocity(x, t):
    return 0.3 * x + 0.1 * torch.sin(x)  # the velocity behind the released trajectory


def test_unipc_follows_the_released_trajectory():
    pytest.importorskip("diffusers")
    expected = torch.from_numpy(FIXTURE["toy_trajectory/unipc10_shift5.0"])
    states = list(unipc(toy_velocity, expected[0], 10, 5.0))
    torch.testing.assert_close(torch.stack([x for _, x in states]), expected, atol=1e-6, rtol=0)
    np.testing.assert_array_equal([sigma for sigma, _ in states], unipc_grid(10, 5.0)[1])


@pytest.mark.parametrize("k", SHIFTS)
@pytest.mark.parametrize("steps", [1, 2, 40, 50, 70, 300])
def test_unipc_asks_at_the_released_timesteps(k, steps):
    pytest.importorskip("diffusers")
    asked = []
    for _ in unipc(lambda x, t: asked.append(t) or x * 0, torch.zeros(1, 1), steps, k):
        pass
    np.testing.assert_array_equal(asked, unipc_grid(steps, k)[0])


def test_high_noise_expert_runs_26_18_and_8_times_at_shift_10():
    pytest.importorskip("diffusers")
    for steps, high in ((70, 26), (50, 18), (20, 8)):
        asked = {"high": 0, "low": 0}

        def expert(name, asked=asked):
            def velocity(x, t):
                asked[name] += 1
                return x * 0

            return velocity

        for _ in unipc(two_experts(expert("high"), expert("low")), torch.zeros(1, 1), steps, 10.0):
            pass
        assert asked == {"high": high, "low": steps - high}


# ---- schedules -----------------------------------------------------------------------------------


def test_few_steps_at_shift_5():
    steps = few_steps(labels=(1, 0.75, 0.5, 0.25), shift=5)
    np.testing.assert_allclose([step.sigma for step in steps], [1, 0.9375, 5 / 6, 0.625])
    np.testing.assert_allclose([step.t for step in steps], [1000, 937.5, 2500 / 3, 625])
    assert steps[0] == FewStep(1000.0, 1.0, 1.0)


@given(st.floats(0, 1), st.floats(0.1, 20))
def test_unshift_inverts_shift(u, k):
    assert unshift(shift(u, k), k) == pytest.approx(u, abs=1e-12)


def test_sigma_grid_falls_from_one_to_zero_and_hits_the_student_labels():
    grid = sigma_grid(48, 5.0)
    assert grid.shape == (49,) and grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all()
    np.testing.assert_allclose(grid[[0, 12, 24, 36]], [1, 0.9375, 5 / 6, 0.625], rtol=1e-6)
    np.testing.assert_allclose(sigma_grid(4, 1.0), [1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: few_steps((1, 0.5, 0.5), 5), "must fall strictly"),
        (lambda: few_steps((), 5), "must fall strictly"),
        (lambda: few_steps((1, 0), 5), "must fall strictly"),
        (lambda: released_few_steps([0, 1000], 5), r"within 0..999"),
        (lambda: released_few_steps([179, 0], 5), "must rise"),
        (lambda: sigma_grid(0, 5), "0 sampler steps"),
        (lambda: sigma_grid(4, 0), "shift 0 is not positive"),
        (lambda: add_noise(torch.zeros(2, 3, 4, 5, 6), torch.zeros(2, 3, 4, 5, 6), torch.zeros(6)), "sigma of shape"),
        (lambda: add_noise(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(3)), "sigma of shape"),
    ],
)
def test_bad_schedules_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- conversions ---------------------------------------------------------------------------------

KINDS = ("x0", "v", "eps", "score")


@pytest.mark.parametrize("have", KINDS)
@pytest.mark.parametrize("want", KINDS)
@pytest.mark.parametrize("sigma", [0.02, 0.3, 0.625, 0.947, 0.98])
def test_every_conversion_agrees_with_the_definitions(have, want, sigma):
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 2, 3, 4, 5, 6, generator=generator, dtype=torch.float64)
    x = add_noise(x0, eps, sigma)
    truth = {"x0": x0, "v": eps - x0, "eps": eps, "score": -eps / sigma}
    if have != want:
        convert = getattr(flow, f"{want}_from_{have}")
        torch.testing.assert_close(convert(x, truth[have], sigma), truth[want], rtol=1e-9, atol=1e-9)


def test_sigma_per_clip_and_per_frame():
    x0, eps = torch.randn(2, 3, 4, 5, 6), torch.randn(2, 3, 4, 5, 6)
    sigma_BF = torch.rand(2, 4)
    x = add_noise(x0, eps, sigma_BF)
    for clip in range(2):
        for frame in range(4):
            s = sigma_BF[clip, frame].item()
            expected = (1 - s) * x0[clip, :, frame] + s * eps[clip, :, frame]
            torch.testing.assert_close(x[clip, :, frame], expected)
    torch.testing.assert_close(flow.x0_from_v(x, eps - x0, sigma_BF), x0, atol=1e-6, rtol=0)
    sigma_B = torch.tensor([0.1, 0.9])
    torch.testing.assert_close(add_noise(x0, eps, sigma_B)[1], 0.1 * x0[1] + 0.9 * eps[1])
    torch.testing.assert_close(flow.eps_from_v(x, eps - x0, sigma_BF[:, None, :, None, None]), eps, atol=1e-6, rtol=0)


def test_conversions_keep_dtype_and_gradients_and_bear_pure_noise():
    x = torch.randn(2, 3, dtype=torch.bfloat16)
    v = torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)
    x0 = flow.x0_from_v(x, v, 0.5)
    assert x0.dtype == torch.bfloat16
    x0.sum().backward()
    torch.testing.assert_close(v.grad, torch.full_like(v, -0.5))
    assert torch.isfinite(flow.x0_from_v(x, v, 1.0)).all() and torch.isfinite(flow.eps_from_v(x, v, 1.0)).all()


# ---- a world whose flow is known -----------------------------------------------------------------

MU, STD = 1.5, 0.4


def gaussian_velocity(x, t):
    """E[eps - x0 | x] for x0 ~ N(MU, STD^2): linear regression of eps - x0 on x."""
    sigma = t / 1000
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    slope = (sigma - (1 - sigma) * STD**2) / variance
    return -MU + slope * (x - (1 - sigma) * MU)


def gaussian_map(eps):
    """The exact flow carries quantiles: N(0, 1) at sigma 1 to N(MU, STD^2) at sigma 0."""
    return MU + STD * eps


def errors(sampler, counts):
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[None]
    return [(list(sampler(noise, steps))[-1][1] - gaussian_map(noise)).abs().max().item() for steps in counts]


def test_euler_converges_to_the_exact_flow_at_first_order():
    coarse, fine, finest = errors(lambda x, n: euler(gaussian_velocity, x, sigma_grid(n, 3.0)), (50, 100, 800))
    assert finest < 4e-3
    assert coarse / fine == pytest.approx(2, abs=0.2)


def test_unipc_beats_euler_on_the_same_number_of_steps():
    pytest.importorskip("diffusers")
    (first_order,) = errors(lambda x, n: euler(gaussian_velocity, x, sigma_grid(n, 3.0)), (40,))
    (second_order,) = errors(lambda x, n: unipc(gaussian_velocity, x, n, 3.0), (40,))
    assert second_order < first_order / 5


def test_euler_yields_every_state_and_tells_t():
    asked = []
    states = list(euler(lambda x, t: asked.append(t) or torch.ones_like(x), torch.zeros(2), [1.0, 0.5, 0.0]))
    assert [sigma for sigma, _ in states] == [1.0, 0.5, 0.0] and asked == [1000.0, 500.0]
    torch.testing.assert_close(torch.stack([x for _, x in states]), torch.tensor([[0.0, 0], [-0.5, -0.5], [-1, -1]]))


def test_exact_score_of_the_gaussian_world():
    x, sigma = torch.linspace(-1, 3, 7, dtype=torch.float64), 0.6
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    score = flow.score_from_v(x, gaussian_velocity(x, 1000 * sigma), sigma)
    torch.testing.assert_close(score, -(x - (1 - sigma) * MU) / variance)


# ---- guidance and experts ------------------------------------------------------------------------


@settings(max_examples=20)
@given(st.floats(-2, 8))
def test_guidance_commutes_with_conversion_to_x0(w):
    x, cond, uncond = torch.randn(3, 4, 5, dtype=torch.float64)
    in_v = flow.x0_from_v(x, guided(cond, uncond, w), 0.7)
    in_x0 = guided(flow.x0_from_v(x, cond, 0.7), flow.x0_from_v(x, uncond, 0.7), w)
    torch.testing.assert_close(in_v, in_x0)


def test_guidance_of_one_spends_no_second_forward():
    def never(x, t):
        raise AssertionError("the unconditional forward ran")

    assert with_guidance(toy_velocity, never, 1.0) is toy_velocity
    x = torch.ones(2)
    doubled = with_guidance(lambda x, t: 3 * x, lambda x, t: x, 5.0)
    torch.testing.assert_close(doubled(x, 10.0), torch.full((2,), 11.0))


def test_experts_meet_at_the_boundary():
    high, low = (
        with_guidance(lambda x, t: x, lambda x, t: 0 * x, 5.0),
        with_guidance(lambda x, t: -x, lambda x, t: x, 1),
    )
    velocity = two_experts(high, low)
    x = torch.ones(1)
    assert [velocity(x, t).item() for t in (999, 947, 946.9, 946, 0)] == [5, 5, -1, -1, -1]
    assert two_experts(high, low, boundary=0.9)(x, 900).item() == 5


def test_core_needs_no_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert len(released_few_steps(V1_ROWS, 10)) == len(list(euler(toy_velocity, torch.zeros(1), sigma_grid(3, 1)))) == 4
    with pytest.raises(ImportError):
        next(unipc(toy_velocity, torch.zeros(1), 4, 5.0))
