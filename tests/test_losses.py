"""Losses against closed forms: Gaussian data, for which score, velocity, trajectory and KL gradient are known."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lingbot_nb.distill import consistency, dmd, flow, forcing, trajectories

SHIFT = 3.0


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clips(batch=3, channels=2, frames=4, seed=0, mean=0.0, std=1.0):
    return mean + std * torch.randn(batch, channels, frames, 2, 3, generator=rng(seed))


def as_sigma(t, like):
    return flow.spread(torch.as_tensor(t, dtype=torch.float64) / 1000, like)


def gaussian_velocity(mean: float, std: float):
    """The exact velocity when every element of x0 is N(mean, std²): E[eps - x0 | x_sigma] by Gaussian conditioning."""

    def velocity(x, t):
        sigma = as_sigma(forcing.frame_t(t, len(x), x.shape[2]), x)
        variance = (1 - sigma) ** 2 * std**2 + sigma**2
        centred = x.double() - (1 - sigma) * mean
        x0 = mean + (1 - sigma) * std**2 / variance * centred
        eps = sigma / variance * centred
        return (eps - x0).float()

    return velocity


def gaussian_end(x, sigma, mean, std):
    """Where the probability-flow ODE takes x_sigma for Gaussian data: the quantile is kept."""
    return mean + std * (x - (1 - sigma) * mean) / math.sqrt((1 - sigma) ** 2 * std**2 + sigma**2)


# ---- flow matching, teacher forcing, diffusion forcing --------------------------------------------------------------


def test_flow_matching_tells_one_t_a_clip_and_asks_for_eps_minus_x0():
    seen = {}
    x0 = clips()

    def velocity(x, t):
        seen.update(x=x, t=t)
        return torch.zeros_like(x)

    loss, info = forcing.flow_matching(velocity, x0, shift=SHIFT, generator=rng(1))
    assert seen["t"].shape == (3, 4)
    assert (seen["t"] == seen["t"][:, :1]).all() and seen["t"][:, 0].unique().numel() == 3
    sigma = as_sigma(seen["t"], x0)
    eps = (seen["x"] - (1 - sigma) * x0) / sigma
    torch.testing.assert_close(loss.double(), (eps - x0).square().mean(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(info["velocity_loss"], loss)


def test_the_exact_velocity_reaches_the_irreducible_error_and_any_other_is_worse():
    x0 = clips(batch=4000, mean=0.7, std=0.4)
    losses = {
        shift: forcing.flow_matching(gaussian_velocity(0.7 + shift, 0.4), x0, shift=1.0, generator=rng(2))[0].item()
        for shift in (0.0, 0.2, -0.2)
    }
    # E Var(eps - x0 | x_sigma) = std² / ((1 - s)² std² + s²), integrated over s ~ U[0, 1].
    s = torch.linspace(0, 1, 20001, dtype=torch.float64)
    expected = torch.trapezoid(0.16 / ((1 - s) ** 2 * 0.16 + s**2), s).item()
    assert losses[0.0] == pytest.approx(expected, rel=0.02)
    assert min(losses[0.2], losses[-0.2]) > losses[0.0]


def test_sigma_draws_follow_the_shifted_density():
    sigma = forcing.draw_sigma((200_000,), 5.0, rng())
    assert sigma.min() >= 0 and sigma.max() <= 1
    # distillation facts: 21.9 % of shift-5 draws lie above 0.947.
    assert (sigma >= 0.947).float().mean().item() == pytest.approx(0.219, abs=0.004)
    assert flow.unshift(sigma, 5.0).mean().item() == pytest.approx(0.5, abs=0.003)


@pytest.mark.parametrize("lengths", [[1, 1, 1, 1], [1, 2, 1], [2, 2]])
def test_forcing_draws_one_sigma_a_chunk(lengths):
    seen = {}

    def velocity(x, t):
        seen["t"] = t
        return torch.zeros_like(x)

    forcing.diffusion_forcing(velocity, clips(), lengths, shift=SHIFT, generator=rng())
    start = 0
    for length in lengths:
        chunk = seen["t"][:, start : start + length]
        assert (chunk == chunk[:, :1]).all()
        start += length
    assert seen["t"].unique().numel() == 3 * len(lengths)


def test_teacher_forcing_passes_clean_then_noisy_and_drops_the_clean_output():
    x0, seen = clips(), {}

    def velocity(x, t):
        seen.update(x=x, t=t)
        return torch.cat([torch.full_like(x0, torch.nan), torch.zeros_like(x0)], 2)

    loss, _ = forcing.teacher_forcing(velocity, x0, [1, 1, 2], shift=SHIFT, generator=rng(), known=1)
    assert loss.isfinite()
    assert torch.equal(seen["x"][:, :, :4], x0) and (seen["t"][:, :4] == 0).all()
    assert torch.equal(seen["x"][:, :, 4], x0[:, :, 0]) and (seen["t"][:, 4] == 0).all()
    assert (seen["t"][:, 5:] > 0).all() and not torch.allclose(seen["x"][:, :, 5:], x0[:, :, 1:])


def test_context_noise_is_told_and_spares_the_known_frame():
    x0, seen = clips(), {}

    def velocity(x, t):
        seen.update(x=x, t=t)
        return torch.zeros_like(x)

    forcing.teacher_forcing(velocity, x0, [1] * 4, shift=SHIFT, generator=rng(), known=1, context_noise=0.2)
    context_t = seen["t"][:, :4]
    assert (context_t[:, 0] == 0).all() and (context_t[:, 1:] > 0).all() and (context_t <= 200).all()
    assert torch.equal(seen["x"][:, :, 0], x0[:, :, 0])
    sigma = as_sigma(context_t[:, 1:], x0[:, :, 1:])
    eps = (seen["x"][:, :, 1:4] - (1 - sigma) * x0[:, :, 1:]) / sigma
    assert eps.std().item() == pytest.approx(1, abs=0.15)
    with pytest.raises(ValueError, match="context noise 1.5"):
        forcing.noisy_context(x0, 1.5, rng())


def test_a_network_is_held_to_what_it_was_and_to_nothing_else():
    """Both read the same input: nothing to lose while nothing has changed, then the square of the change, wherever the
    data's own velocity lies; what it was gets no gradient."""
    x0, offset = clips(), torch.full((), 0.3, requires_grad=True)
    was = torch.full((), 0.1, requires_grad=True)
    noise = forcing.forced_noise(x0, [1, 1, 2], shift=SHIFT, generator=rng(), known=1, context_noise=0.2)

    def moved_by(shift):
        return lambda x, t: shift + torch.sin(x) * as_sigma(forcing.frame_t(t, len(x), x.shape[2]), x).float()

    same, _ = forcing.kept_loss(moved_by(was), moved_by(was), x0, noise)
    assert same.item() == 0
    loss, _ = forcing.kept_loss(moved_by(offset), moved_by(was), x0, noise)
    assert loss.item() == pytest.approx(0.2**2, rel=1e-5)
    loss.backward()
    assert offset.grad.item() == pytest.approx(2 * 0.2, rel=1e-5) and was.grad is None


@pytest.mark.parametrize("loss", [forcing.teacher_forcing, forcing.diffusion_forcing])
def test_known_frames_carry_no_loss(loss):
    x0 = clips()
    offset = torch.zeros(1, 1, 4, 1, 1, requires_grad=True)

    def velocity(x, t):
        # The last F frames are the noisy half in either form.
        return torch.cat([x[:, :, :-4], x[:, :, -4:] + offset], 2)

    loss(velocity, x0, [1] * 4, shift=SHIFT, generator=rng(), known=1)[0].backward()
    per_frame = offset.grad.flatten()
    assert per_frame[0] == 0 and (per_frame[1:] != 0).all()


def test_wrong_chunks_and_known_frames_are_named():
    with pytest.raises(ValueError, match="add up to 3, not to the clip's 4 frames"):
        forcing.diffusion_forcing(lambda x, t: x, clips(), [1, 2], shift=SHIFT, generator=rng())
    with pytest.raises(ValueError, match="4 known frames of 4"):
        forcing.diffusion_forcing(lambda x, t: x, clips(), [4], shift=SHIFT, generator=rng(), known=4)


def test_held_start_stays_and_is_told_clean():
    start, seen = clips(frames=1, seed=5), {}

    def velocity(x, t):
        seen.update(x=x, t=t)
        return torch.ones_like(x)

    v = forcing.hold_start(velocity, start)(clips(), 500.0)
    assert torch.equal(seen["x"][:, :, :1], start) and seen["t"].tolist() == [[0, 500, 500, 500]] * 3
    assert (v[:, :, 0] == 0).all() and (v[:, :, 1:] == 1).all()


@given(st.floats(-3, 3), st.floats(-3, 3), st.floats(0, 8))
def test_guidance_is_u_plus_w_times_c_minus_u(c, u, w):
    x = clips()
    guided = forcing.guided(lambda x, t: torch.full_like(x, c), lambda x, t: torch.full_like(x, u), w)
    torch.testing.assert_close(guided(x, 0.0), torch.full_like(x, u + w * (c - u)), rtol=1e-4, atol=1e-4)


def test_guidance_one_never_runs_the_unconditional_and_others_demand_it():
    assert forcing.guided(lambda x, t: x, None, 1.0)(1, 0) == 1
    with pytest.raises(ValueError, match="guidance w = 4"):
        forcing.guided(lambda x, t: x, None, 4.0)


# ---- distribution matching ------------------------------------------------------------------------------------------


def test_dmd_gradient_is_the_normalised_difference():
    x, real, fake = clips(seed=1), clips(seed=2), clips(seed=3)
    g = dmd.dmd_gradient(x, real, fake)
    for i in range(3):
        expected = (fake[i] - real[i]).double() / (x[i] - real[i]).double().abs().mean()
        torch.testing.assert_close(g[i], expected)


def test_a_perfect_student_divides_nothing_by_zero():
    x = clips()
    assert (dmd.dmd_gradient(x, x, x) == 0).all()
    assert (dmd.dmd_gradient(x, x, x + 1) == 0).all()


def test_dmd_loss_has_gradient_g_over_numel():
    x, g = clips().requires_grad_(), clips(seed=7).double()
    dmd.dmd_loss(x, g).backward()
    torch.testing.assert_close(x.grad.double(), g / x.numel(), rtol=1e-5, atol=1e-9)


def test_gradient_between_gaussians_is_the_closed_form_of_the_kl():
    """Student N(m, s²), teacher N(m', s²): s_fake - s_real = (1 - sigma)(m - m') / var, the same for every x."""
    student, teacher, std = 1.5, 0.5, 0.8
    x = clips(batch=64, mean=student, std=std).requires_grad_()
    bounds = (0.5, 0.5)
    loss, info = dmd.distribution_matching(
        x,
        gaussian_velocity(teacher, std),
        gaussian_velocity(student, std),
        shift=SHIFT,
        generator=rng(3),
        bounds=bounds,
    )
    loss.backward()
    sigma = 0.5
    variance = (1 - sigma) ** 2 * std**2 + sigma**2
    score_difference = (1 - sigma) * (student - teacher) / variance
    x0_difference = sigma**2 / (1 - sigma) * score_difference
    # Per clip the gradient is one positive constant, x0_difference / normaliser: descent moves to the teacher's mean.
    per_clip = x.grad.flatten(1) * x.numel()
    torch.testing.assert_close(per_clip, per_clip[:, :1].expand_as(per_clip), rtol=1e-3, atol=1e-4)
    assert (per_clip > 0).all()
    eps = torch.randn(x.shape, generator=_after_sigma_draw(64, 3))
    noisy = (1 - sigma) * x.detach() + sigma * eps
    real = (noisy + sigma**2 * -(noisy - (1 - sigma) * teacher) / variance) / (1 - sigma)
    normaliser = (x.detach() - real).abs().flatten(1).mean(1)
    torch.testing.assert_close(per_clip[:, 0], x0_difference / normaliser, rtol=1e-3, atol=1e-4)
    assert info["sigma"].item() == 0.5
    assert info["g"].item() == pytest.approx(per_clip.abs().mean().item(), rel=1e-4)


def _after_sigma_draw(batch: int, seed: int) -> torch.Generator:
    generator = rng(seed)
    torch.rand(batch, 1, generator=generator)
    return generator


def test_equal_scores_and_no_guidance_give_no_gradient():
    x = clips().requires_grad_()
    score = gaussian_velocity(0.3, 0.9)
    loss, info = dmd.distribution_matching(x, score, score, shift=SHIFT, generator=rng())
    loss.backward()
    assert (x.grad == 0).all() and loss == 0 and info["g"] == 0
    guided = dict(unconditional=gaussian_velocity(-0.3, 0.9), guidance=4.0)
    assert dmd.distribution_matching(x, score, score, shift=SHIFT, generator=rng(), **guided)[1]["g"] > 0


def test_gradient_descent_on_dmd_finds_the_teachers_mean():
    mean = torch.tensor(2.0, requires_grad=True)
    generator, base = rng(5), clips(batch=64, std=0.5, seed=9)
    optimizer = torch.optim.SGD([mean], lr=0.1)
    for _ in range(60):
        x = base + mean
        fake = gaussian_velocity(mean.item(), 0.5)
        loss, _ = dmd.distribution_matching(x, gaussian_velocity(-1, 0.5), fake, shift=SHIFT, generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert mean.item() == pytest.approx(-1, abs=0.1)


def test_scores_see_one_clamped_sigma_a_clip_and_get_no_gradient():
    seen, weight = [], torch.ones((), requires_grad=True)

    def velocity(x, t):
        assert not torch.is_grad_enabled() or weight is None
        seen.append(t)
        return x * weight

    for seed in range(30):
        x = clips(seed=seed).requires_grad_()
        loss, _ = dmd.distribution_matching(x, velocity, gaussian_velocity(0, 1), shift=8.0, generator=rng(seed))
        loss.backward()
    assert weight.grad is None
    t = torch.cat(seen)
    assert (t == t[:, :1]).all() and t.min() >= 20 - 1e-3 and t.max() <= 980 + 1e-3
    assert (t[:, 0] >= 980 - 1e-3).any(), "shift 8 must reach the clamp"


def test_known_frames_get_no_dmd_gradient_and_stay_out_of_the_normaliser():
    x = clips().requires_grad_()

    def run(first_frame: float):
        def real(noisy, t):
            v = gaussian_velocity(1.0, 1.0)(noisy, t)
            v[:, :, 0] = first_frame
            return v

        loss, _ = dmd.distribution_matching(x, real, gaussian_velocity(0, 1), shift=SHIFT, generator=rng(), known=1)
        return torch.autograd.grad(loss, x)[0]

    wild, tame = run(1e3), run(0.0)
    assert (wild[:, :, 0] == 0).all() and (wild[:, :, 1:] != 0).all()
    assert torch.equal(wild, tame)


def test_critic_learns_the_students_clips_and_leaves_the_student_alone():
    x = clips(batch=2000, mean=0.7, std=0.4).requires_grad_()
    weight = torch.ones((), requires_grad=True)
    exact = gaussian_velocity(0.7, 0.4)
    loss, _ = dmd.critic_loss(lambda x, t: exact(x, t) * weight, x, shift=1.0, generator=rng())
    loss.backward()
    assert x.grad is None
    # At the optimum the loss is flat in any rescaling.
    assert abs(weight.grad.item()) < 0.02
    worse, _ = dmd.critic_loss(gaussian_velocity(0.2, 0.4), x, shift=1.0, generator=rng())
    assert worse > loss


def test_noisy_history_clip_draws_list_levels_per_chunk_and_keeps_the_start():
    x0, seen = clips(batch=40), {}

    def velocity(x, t):
        seen["t"] = t
        return torch.zeros_like(x)

    clip = dmd.noisy_history_clip(velocity, x0, [1.0, 0.9, 0.5], [1, 2, 1], generator=rng(), known=1)
    assert torch.equal(clip[:, :, 0], x0[:, :, 0])
    told = sorted({round(value, 3) for value in seen["t"][:, 1:].flatten().tolist()})
    assert told == [500, 900, 1000] and (seen["t"][:, 1] == seen["t"][:, 2]).all()


# ---- consistency ----------------------------------------------------------------------------------------------------


def consistent_velocity(mean: float, std: float):
    """The velocity whose x0 is the exact flow map: x - sigma·v = end of the trajectory through x."""

    def velocity(x, t):
        sigma = as_sigma(forcing.frame_t(t, len(x), x.shape[2]), x)
        spread = ((1 - sigma) ** 2 * std**2 + sigma**2).sqrt()
        end = mean + std * (x.double() - (1 - sigma) * mean) / spread
        return torch.where(sigma > 0, (x.double() - end) / sigma.clamp(min=1e-9), 0.0).float()

    return velocity


def test_the_exact_flow_map_is_consistent_and_the_denoiser_is_not():
    x0, sigmas = clips(batch=64, mean=0.4, std=0.7), flow.sigma_grid(192, SHIFT)
    exact, teacher = consistent_velocity(0.4, 0.7), gaussian_velocity(0.4, 0.7)
    right, _ = consistency.consistency(exact, exact, teacher, x0, sigmas, generator=rng())
    wrong, _ = consistency.consistency(gaussian_velocity(0.4, 0.7), exact, teacher, x0, sigmas, generator=rng())
    # What is left is Euler's error of one step, which falls with the square of its length.
    assert right < 2e-5 and wrong > 100 * right
    coarse, _ = consistency.consistency(exact, exact, teacher, x0, flow.sigma_grid(12, SHIFT), generator=rng())
    assert coarse > 10 * right


def test_consistency_uses_neighbouring_levels_one_a_clip_and_reaches_the_end():
    seen, x0 = {"student": [], "target": []}, clips(batch=64)

    def spy(name):
        def velocity(x, t):
            seen[name].append(t)
            return torch.zeros_like(x)

        return velocity

    sigmas = flow.sigma_grid(4, SHIFT)
    consistency.consistency(
        spy("student"), spy("target"), gaussian_velocity(0, 1), x0, sigmas, generator=rng(), known=1
    )
    (high,), (low,) = seen["student"], seen["target"]
    assert (high[:, 0] == 0).all() and (high[:, 1:] == high[:, 1:2]).all()
    grid = (1000 * sigmas).tolist()
    levels = {(grid.index(a), grid.index(b)) for a, b in zip(high[:, 1].tolist(), low[:, 1].tolist(), strict=True)}
    assert levels == {(0, 1), (1, 2), (2, 3), (3, 4)}


def test_only_the_student_gets_a_gradient_from_consistency():
    scales = {name: torch.ones((), requires_grad=True) for name in ("student", "target", "teacher")}
    bound = {n: (lambda x, t, s=s: gaussian_velocity(0, 1)(x, t) * s) for n, s in scales.items()}
    loss, _ = consistency.consistency(
        bound["student"], bound["target"], bound["teacher"], clips(), flow.sigma_grid(8, SHIFT), generator=rng()
    )
    loss.backward()
    assert scales["student"].grad is not None
    assert scales["target"].grad is None and scales["teacher"].grad is None
    with pytest.raises(ValueError, match="do not fall to 0"):
        consistency.check_grid(torch.tensor([1.0, 0.5]))


# ---- ODE regression -------------------------------------------------------------------------------------------------


def exact_states(mean=0.4, std=0.7, sigmas=(1.0, 0.9, 0.75, 0.5, 0.0)):
    noise = clips(batch=16, seed=4).double()
    end = gaussian_end(noise, 1.0, mean, std)
    states = []
    for sigma in sigmas:
        spread = math.sqrt((1 - sigma) ** 2 * std**2 + sigma**2)
        states.append((1 - sigma) * mean + spread / std * (end - mean))
    states = torch.stack(states, 1)
    return states.float(), torch.tensor(sigmas)


def test_regression_vanishes_on_the_exact_flow_map():
    states, sigmas = exact_states()
    exact = consistent_velocity(0.4, 0.7)
    lengths = [1, 2, 1]
    causal, _ = trajectories.block_causal_regression(exact, states, sigmas, lengths, generator=rng())
    assert causal < 1e-10

    def second_half(x, t):
        half = x.shape[2] // 2
        return torch.cat([torch.zeros_like(x[:, :, :half]), exact(x[:, :, half:], t[:, half:])], 2)

    clean = clips(batch=16)
    forced, _ = trajectories.clean_context_regression(second_half, states, clean, sigmas, lengths, generator=rng())
    assert forced < 1e-10
    denoiser, _ = trajectories.block_causal_regression(
        gaussian_velocity(0.4, 0.7), states, sigmas, lengths, generator=rng()
    )
    assert denoiser > 1e-3


def test_block_causal_regression_draws_a_level_a_chunk_clean_ones_without_loss():
    states, sigmas = exact_states()
    offset, seen = torch.zeros(16, 1, 4, 1, 1, requires_grad=True), {}

    def velocity(x, t):
        seen["t"] = t
        return consistent_velocity(0.4, 0.7)(x, t) + offset + 0.1

    loss, _ = trajectories.block_causal_regression(velocity, states, sigmas, [1, 2, 1], generator=rng())
    loss.backward()
    t, touched = seen["t"], offset.grad[:, 0, :, 0, 0] != 0
    assert torch.equal(touched, t > 0) and (t == 0).any() and (t[:, 1] == t[:, 2]).all()
    assert {round(v) for v in t.flatten().tolist()} == {0, 500, 750, 900, 1000}


def test_clean_context_regression_never_gives_the_clean_level_and_holds_the_start():
    states, sigmas = exact_states()
    clean, seen = clips(batch=16, seed=8), {}

    def velocity(x, t):
        seen.update(x=x, t=t)
        return torch.zeros_like(x)

    start = clean[:, :, :1]
    trajectories.clean_context_regression(velocity, states, clean, sigmas, [1] * 4, generator=rng(), start=start)
    assert torch.equal(seen["x"][:, :, :4], clean) and torch.equal(seen["x"][:, :, 4:5], start)
    assert (seen["t"][:, :5] == 0).all() and (seen["t"][:, 5:] > 0).all()


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(2, 5), st.integers(1, 4), st.integers(0, 100))
def test_pick_states_takes_each_frame_from_its_own_level(batch, levels, frames, seed):
    states = torch.randn(batch, levels, 2, frames, 2, 2, generator=rng(seed))
    index = torch.randint(levels, (batch, frames), generator=rng(seed))
    picked = trajectories.pick_states(states, index)
    for b in range(batch):
        for f in range(frames):
            assert torch.equal(picked[b, :, f], states[b, index[b, f], :, f])
