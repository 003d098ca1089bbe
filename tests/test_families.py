"""The other families of distillation losses against closed forms: 1-D Gaussians, whose scores and flows are known."""

import math
from functools import partial

import pytest
import torch
from micro_world import SHAPE, endless, random_batch, random_dit
from test_losses import SHIFT, as_sigma, clips, gaussian_end, gaussian_velocity, rng
from test_train import STREAM, make_cache

from lingbot_nb.distill import dmd, f_distill, flow, forcing, gan, meanflow, scm, sid, train
from lingbot_nb.distill.derivative import by_difference, by_jvp

GRID = torch.linspace(-12, 12, 240_001, dtype=torch.float64)


def log_normal(x, mean, std):
    return -0.5 * ((x - mean) / std) ** 2 - math.log(std * math.sqrt(2 * math.pi))


def integral(values):
    return torch.trapezoid(values, GRID).item()


# ---- adversarial ----------------------------------------------------------------------------------------------------


def discriminator_value(offset=0.0, slope=0.0):
    """The discriminator's expected loss for p = N(0.5, 1), q = N(-0.3, 0.7²) when D is log p / q bent a little."""
    log_p, log_q = log_normal(GRID, 0.5, 1.0), log_normal(GRID, -0.3, 0.7)
    logits = log_p - log_q + offset + slope * GRID
    softplus = torch.nn.functional.softplus
    return integral(log_q.exp() * softplus(logits) + log_p.exp() * softplus(-logits))


def test_the_log_density_ratio_is_the_best_discriminator_and_its_loss_the_jensen_shannon_distance():
    p, q = log_normal(GRID, 0.5, 1.0).exp(), log_normal(GRID, -0.3, 0.7).exp()
    middle = (p + q) / 2
    distance = integral(p * (p / middle).log() + q * (q / middle).log()) / 2
    assert discriminator_value() == pytest.approx(2 * math.log(2) - 2 * distance, rel=1e-6)
    bent = [discriminator_value(0.1), discriminator_value(-0.1), discriminator_value(0, 0.1)]
    assert min(bent) > discriminator_value()

    samples = torch.randn(2, 200_000, generator=rng(), dtype=torch.float64)
    real, fake = 0.5 + samples[0], -0.3 + 0.7 * samples[1]
    logits = [log_normal(x, 0.5, 1.0) - log_normal(x, -0.3, 0.7) for x in (real, fake)]
    assert gan.softplus_discriminator(*logits).item() == pytest.approx(discriminator_value(), rel=0.01)


def test_the_generator_is_pulled_up_the_logit():
    x = clips(seed=4).requires_grad_()
    direction = clips(seed=5)
    logits = (x * direction).sum((1, 2, 3, 4))
    gan.softplus_generator(logits).backward()
    pull = -torch.sigmoid(-logits.detach()) / len(x)
    torch.testing.assert_close(x.grad, pull[:, None, None, None, None] * direction)


def test_the_discriminator_sees_both_at_one_noise_and_gives_the_clip_no_gradient():
    seen = []

    def discriminate(noisy, t):
        seen.append((noisy, t))
        return noisy.sum((1, 2, 3, 4))

    x, real = clips(seed=1).requires_grad_(), clips(seed=2)
    loss, info = gan.discriminator_loss(discriminate, x, real, shift=SHIFT, generator=rng())
    assert not loss.requires_grad
    (fake_noisy, t), (real_noisy, t_real) = seen
    assert torch.equal(t, t_real) and (t == t[:, :1]).all() and 20 <= t.min() and t.max() <= 980
    torch.testing.assert_close(fake_noisy - real_noisy, (1 - as_sigma(t, x)).float() * (x - real).detach())
    assert 0 <= info["accuracy"] <= 1


def test_finite_r1_is_the_squared_gradient_of_a_linear_discriminator():
    weight, x = clips(batch=1, seed=3)[0], clips(batch=20_000, channels=1, frames=1)
    weight = weight[:1, :1]

    def discriminate(noisy, t):
        return 2.0 + (noisy * weight).sum((1, 2, 3, 4))

    noise = torch.randn(x.shape, generator=rng(8))
    found = gan.finite_r1(discriminate, x, None, discriminate(x, None), noise, 0.1)
    assert found.item() == pytest.approx(weight.square().sum().item(), rel=0.05)


def test_heads_read_the_teachers_layers_and_pass_the_gradient_to_the_clip():
    teacher, batch = random_dit().requires_grad_(False), random_batch()
    heads = gan.Heads(teacher.size.dim, 2)
    discriminate = gan.on_features(heads, train.bind(teacher, batch), teacher.blocks)
    fair, _ = gan.discriminator_loss(discriminate, batch.latents, batch.latents, shift=SHIFT, generator=rng(), r1=1.0)
    assert fair.item() == pytest.approx(2 * math.log(2), rel=1e-6)

    x, other = batch.latents.clone().requires_grad_(), 0.5 * random_batch(7).latents
    optimizer, losses = torch.optim.Adam(heads.parameters(), 1e-2), []
    for seed in range(30):
        loss, _ = gan.discriminator_loss(discriminate, x, other, shift=SHIFT, generator=rng(seed), bounds=(0.02, 0.1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5]) and x.grad is None

    loss, _ = gan.adversarial(discriminate, x, shift=SHIFT, generator=rng())
    loss.backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in teacher.parameters())
    noisy, t = torch.zeros_like(x), torch.full((2, SHAPE.frames), 500.0)
    assert discriminate(noisy, t).shape == (2, 2 * SHAPE.tokens)
    assert not any(layer._forward_hooks for layer in teacher.blocks)


# ---- f-divergences --------------------------------------------------------------------------------------------------

DIVERGENCES = [
    (f_distill.reverse_kl, lambda r: -r.log()),
    (f_distill.forward_kl, lambda r: r * r.log()),
    (f_distill.jensen_shannon, lambda r: r * r.log() - (1 + r) * ((1 + r) / 2).log()),
    (f_distill.hellinger, lambda r: (1 - r.sqrt()) ** 2),
]


@pytest.mark.parametrize(("h", "f"), DIVERGENCES)
def test_the_weighted_score_difference_is_the_divergences_gradient(h, f):
    """d/dmu of D_f(N(0.4, 1) || N(mu, 0.9²)) two ways: differences of the integral, and the weighted scores."""
    log_p, std, mu, step = log_normal(GRID, 0.4, 1.0), 0.9, -0.2, 1e-4

    def divergence(mean):
        log_q = log_normal(GRID, mean, std)
        inside = (GRID - mean).abs() < 8
        return integral(torch.where(inside, log_q.exp() * f((log_p - log_q).exp()), 0))

    by_hand = (divergence(mu + step) - divergence(mu - step)) / (2 * step)
    log_q = log_normal(GRID, mu, std)
    scores = -(GRID - 0.4) - -(GRID - mu) / std**2
    inside = (GRID - mu).abs() < 8
    found = integral(torch.where(inside, -log_q.exp() * h(log_p - log_q) * scores, 0))
    assert found == pytest.approx(by_hand, rel=1e-4)


def test_weights_have_mean_one_and_a_limit():
    ratio = torch.tensor([-50.0, 0.0, math.log(2), 50.0])
    weight = f_distill.clip_weight(ratio, f_distill.forward_kl, limit=10)
    raw = torch.tensor([0.1, 1, 2, 10], dtype=torch.float64)
    torch.testing.assert_close(weight, raw / raw.mean())
    many = ratio[:, None] + torch.tensor([-1.0, 1.0])
    torch.testing.assert_close(
        f_distill.clip_weight(many, f_distill.forward_kl), f_distill.clip_weight(ratio, f_distill.forward_kl)
    )
    assert (f_distill.clip_weight(ratio, f_distill.reverse_kl) == 1).all()
    with pytest.raises(ValueError, match="limit 1"):
        f_distill.clip_weight(ratio, f_distill.hellinger, limit=1)


def test_with_the_reverse_kl_it_is_dmd_and_otherwise_clips_are_weighted():
    real, fake = gaussian_velocity(0.5, 1.0), gaussian_velocity(0.0, 1.0)
    shared = dict(shift=SHIFT, known=1)
    gradients, ratio = [], torch.tensor([0.0, 1.0, -1.0])
    for h in (None, f_distill.reverse_kl, f_distill.forward_kl):
        x = clips().requires_grad_()
        if h is None:
            loss, _ = dmd.distribution_matching(x, real, fake, generator=rng(3), **shared)
        else:
            loss, _ = f_distill.f_distribution_matching(
                x, real, fake, lambda noisy, t: ratio, h, generator=rng(3), **shared
            )
        loss.backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0], gradients[1])
    weight = f_distill.clip_weight(ratio, f_distill.forward_kl).float()
    torch.testing.assert_close(gradients[2], gradients[0] * weight[:, None, None, None, None])
    assert (gradients[2][:, :, 0] == 0).all()


# ---- score identity -------------------------------------------------------------------------------------------------


def gaussian_x0(x_sigma, sigma, mean, std):
    slope = (1 - sigma) * std**2 / ((1 - sigma) ** 2 * std**2 + sigma**2)
    return mean + slope * (x_sigma - (1 - sigma) * mean)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_has_its_closed_value_and_pulls_the_student_to_the_teacher(alpha):
    """Teacher N(1, 0.8²), student N(mu, 0.8²) with the exact critic of mu = 0.2, at sigma 0.6."""
    sigma, std, mu = 0.6, 0.8, torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    z, eps = torch.randn(2, 1, 400_000, generator=rng(1), dtype=torch.float64)
    x = mu + std * z
    noisy = (1 - sigma) * x + sigma * eps
    real, fake = gaussian_x0(noisy, sigma, 1.0, std), gaussian_x0(noisy, sigma, 0.2, std)
    loss = sid.sid_loss(x, real, fake, alpha) * (x - real).detach().abs().mean()
    slope = (1 - sigma) ** 2 * std**2 / ((1 - sigma) ** 2 * std**2 + sigma**2)
    gap = (1 - slope) * 0.8
    assert loss.item() == pytest.approx((1 - alpha) * gap**2, abs=0.003)
    loss.backward()
    # r - f is the constant gap, so L(mu) = gap · (E[r - x] - alpha gap) and only E[r - x] moves, by slope - 1.
    assert mu.grad.item() == pytest.approx(-gap * (1 - slope), rel=1e-6)


def test_sid_of_agreeing_networks_is_zero_with_zero_gradient_and_known_frames_stay_out():
    x = clips().requires_grad_()
    same = gaussian_velocity(0.3, 0.9)
    loss, info = sid.score_identity(x, same, same, shift=SHIFT, generator=rng())
    loss.backward()
    assert loss == 0 and x.grad.abs().max() < 1e-8 and info["score_gap"] == 0
    x = clips().requires_grad_()
    loss, _ = sid.score_identity(x, gaussian_velocity(1.0, 0.9), same, shift=SHIFT, generator=rng(), known=1)
    loss.backward()
    assert (x.grad[:, :, 0] == 0).all() and (x.grad[:, :, 1:].mean((0, 1, 3, 4)) < 0).all()


# ---- continuous consistency -----------------------------------------------------------------------------------------

MEAN, STD = 0.7, 0.4


def end_map(x, sigma):
    """`gaussian_end` for tensor sigmas."""
    return MEAN + STD * (x - (1 - sigma) * MEAN) / ((1 - sigma) ** 2 * STD**2 + sigma**2).sqrt()


def exact_student(offset=0.0):
    """The velocity whose x - sigma v is where the teacher's ODE ends, plus an offset."""

    def velocity(x, t):
        sigma = flow.spread(t.double() / 1000, x)
        return ((x.double() - end_map(x.double(), sigma)) / sigma.clamp_min(1e-9) + offset).float()

    return velocity


@pytest.mark.parametrize("derivative", [by_jvp, by_difference(1e-3)])
@pytest.mark.parametrize("known", [0, 1])
def test_the_exact_flow_map_has_no_tangent(derivative, known):
    x0 = clips(batch=6, mean=MEAN, std=STD)
    loss, info = scm.continuous_consistency(
        exact_student(),
        gaussian_velocity(MEAN, STD),
        x0,
        shift=SHIFT,
        generator=rng(),
        derivative=derivative,
        known=known,
        bounds=(0.05, 0.98),
    )
    assert info["tangent"] < 2e-3 and loss < 1e-5


@pytest.mark.parametrize("sign", [1, -1])
def test_the_tangent_pushes_an_offset_back(sign):
    """f = f* - sigma a has df/dsigma = -a along the ODE: the gradient in a is then of a's sign."""
    offset = torch.tensor(0.3 * sign, requires_grad=True)
    teacher, exact = gaussian_velocity(MEAN, STD), exact_student()

    def student(x, t):
        return exact(x, t) + offset

    x0 = clips(batch=6, mean=MEAN, std=STD)
    loss, info = scm.continuous_consistency(student, teacher, x0, shift=SHIFT, generator=rng(), bounds=(0.05, 0.95))
    loss.backward()
    assert info["tangent"].item() == pytest.approx(0.3, rel=0.02)
    assert offset.grad * sign > 0


def test_differences_and_jvp_agree_on_a_network():
    dit, batch = random_dit(), random_batch()
    velocity = train.bind(dit, batch)
    t = torch.full((2, SHAPE.frames), 0.4)
    point, path = (batch.latents, t), (torch.randn(batch.latents.shape, generator=rng()), torch.ones_like(t))

    def network(x, sigma):
        return velocity(x, 1000 * sigma)

    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        value, exact = by_jvp(network, point, path)
        again, near = by_difference(2e-4)(network, point, path)
    assert torch.equal(value, again)
    assert (near - exact).norm() < 0.02 * exact.norm()


# ---- mean flow ------------------------------------------------------------------------------------------------------


def exact_average(x, t, r):
    """(x_t - x_r) / (t - r) along the Gaussian's own ODE; at r = t, nearly, its velocity."""
    t, r = (flow.spread(time.double() / 1000, x) for time in (t, r))
    r = torch.where(t - r < 1e-4, t - 1e-4, r)
    x = x.double()

    def spread_at(sigma):
        return ((1 - sigma) ** 2 * STD**2 + sigma**2).sqrt()

    moved = (1 - r) * MEAN + spread_at(r) / spread_at(t) * (x - (1 - t) * MEAN)
    return ((x - moved) / (t - r)).float()


@pytest.mark.parametrize("known", [0, 1])
def test_the_exact_average_velocity_meets_its_own_target(known):
    x0 = clips(batch=8, mean=MEAN, std=STD)
    options = dict(shift=SHIFT, teacher=gaussian_velocity(MEAN, STD), known=known, power=0.0, apart=1.0)

    def error(average):
        return meanflow.mean_flow(average, x0, generator=rng(2), **options)[0].item()

    assert error(exact_average) < 1e-4
    assert error(lambda x, t, r: exact_average(x, t, r) + 0.1) == pytest.approx(0.01, rel=0.05)
    assert error(lambda x, t, r: exact_average(x, t, t)) > 5e-3


def test_one_step_of_the_average_velocity_ends_where_the_ode_does():
    noise = clips(batch=2, seed=9)
    ((sigma, x),) = meanflow.average_steps(exact_average, noise, (1.0, 0.0))
    assert sigma == 0
    torch.testing.assert_close(x, gaussian_end(noise, 1.0, MEAN, STD), rtol=1e-4, atol=1e-4)
    *_, (_, walked) = meanflow.average_steps(exact_average, noise, (1.0, 0.7, 0.2, 0.0))
    torch.testing.assert_close(walked, x, rtol=1e-4, atol=1e-4)


def test_without_spans_mean_flow_is_flow_matching():
    seen = []

    def average(x, t, r):
        seen.append((t, r))
        return torch.zeros_like(x)

    x0 = clips()
    loss, info = meanflow.mean_flow(average, x0, shift=SHIFT, generator=rng(), apart=0.0, power=0.0)
    assert all(torch.equal(t, r) for t, r in seen[-1:])
    assert 1.0 < loss < 3.0  # E (eps - x0)² = 2
    adaptive, _ = meanflow.mean_flow(average, x0, shift=SHIFT, generator=rng(), apart=0.0)
    assert adaptive.item() == pytest.approx(1, rel=1e-2)


def test_a_dit_told_two_equal_times_is_the_dit_it_was_and_a_span_changes_it():
    dit, batch = random_dit(), random_batch()
    velocity = train.bind(dit, batch)
    t = torch.full((2, SHAPE.frames), 600.0)
    plain = velocity(batch.latents, t)
    torch.testing.assert_close(velocity(batch.latents, meanflow.interval_time(dit, t, t)), plain, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(velocity(batch.latents, meanflow.interval_time(dit, t, 0.5 * t)), plain, atol=1e-3)

    def average(x, t, r):
        return velocity(x, meanflow.interval_time(dit, t, r))

    loss, _ = meanflow.mean_flow(average, batch.latents, shift=SHIFT, generator=rng(), known=1)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in dit.time_embedding.parameters())


def stream_step(match, heads_step=None, **roles):
    """One distribution-matching step on the micro network with another loss for the student."""
    student, critic, teacher = random_dit(0), random_dit(1), random_dit(2).requires_grad_(False)
    models = {"student": student, "critic": critic, **roles}
    state = train.TrainState.of(models, {role: 1e-3 for role in models})
    clips_of = train.OwnRollout(student, STREAM, flow.few_steps((1, 0.5), SHIFT), make_cache)
    step = train.dmd_step(clips_of, critic, teacher, endless(), STREAM, shift=SHIFT, match=match(teacher))
    return (train.together(heads_step(clips_of, teacher), step) if heads_step else step)(state)


def test_score_identity_takes_distribution_matchings_place():
    row = stream_step(lambda teacher: sid.score_identity)
    assert row["student_grad"] > 0 and row["student_score_gap"] > 0 and row["critic_loss"].isfinite()


def test_f_distill_takes_it_too_with_a_discriminator_learning_beside():
    heads = gan.Heads(random_dit().size.dim, 2)

    def discriminate(teacher, batch):
        return gan.on_features(heads, train.bind(teacher, batch), teacher.blocks)

    def heads_step(clips_of, teacher):
        return train.heads_step(heads, clips_of, teacher, endless(), shift=SHIFT, r1=0.1)

    def match(teacher):
        ratio = discriminate(teacher, random_batch())
        return partial(f_distill.f_distribution_matching, log_ratio=ratio, h=f_distill.jensen_shannon)

    row = stream_step(match, heads_step, heads=heads)
    assert row["heads_grad"] > 0 and row["student_grad"] > 0 and row["student_weight_max"] >= 1


def test_an_adversary_adds_its_weighted_pull_and_alone_it_is_the_whole_loss():
    teacher, batch = random_dit(1).requires_grad_(False), random_batch()
    heads = gan.Heads(teacher.size.dim, 2)
    torch.nn.init.normal_(heads.heads[0][-1].weight)
    real, fake = train.bind(teacher, batch), train.bind(random_dit(2).requires_grad_(False), batch)

    def gradient(match):
        x = batch.latents.clone().requires_grad_()
        loss, info = match(x, real, fake, shift=SHIFT, generator=rng(4), known=1)
        loss.backward()
        return x.grad, info

    plain, _ = gradient(dmd.distribution_matching)
    nothing, _ = gradient(gan.with_adversary(dmd.distribution_matching, heads, teacher.blocks, 0.0))
    one, info = gradient(gan.with_adversary(dmd.distribution_matching, heads, teacher.blocks, 1.0))
    two, _ = gradient(gan.with_adversary(dmd.distribution_matching, heads, teacher.blocks, 2.0))
    assert torch.equal(plain, nothing) and {"g", "fake_logit"} <= info.keys()
    torch.testing.assert_close(two - plain, 2 * (one - plain), rtol=1e-4, atol=1e-9)
    alone, info = gradient(gan.alone(heads, teacher.blocks))
    assert alone.abs().sum() > 0 and "g" not in info


def test_every_family_takes_a_network_like_the_rest():
    """One call each on the micro network: a finite loss whose gradient reaches the student."""
    teacher, batch = random_dit(1).requires_grad_(False), random_batch()
    for make in (
        lambda v: scm.continuous_consistency(
            v, train.bind(teacher, batch), batch.latents, shift=SHIFT, generator=rng(), known=1
        ),
        lambda v: meanflow.mean_flow(lambda x, t, r: v(x, t), batch.latents, shift=SHIFT, generator=rng()),
        lambda v: forcing.flow_matching(v, batch.latents, shift=SHIFT, generator=rng()),
    ):
        student = random_dit(2)
        loss, info = make(train.bind(student, batch))
        loss.backward()
        assert loss.isfinite() and all(value.isfinite() for value in info.values())
        assert all(p.grad is not None for p in student.parameters())
