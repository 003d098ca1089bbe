"""A discriminator on the frozen teacher's features: the student's noisy clips should look real to it.

    L_G = E softplus(-D(x_sigma)),      L_D = E softplus(D(x_sigma)) + E softplus(-D(y_sigma)) + gamma · R1

with x the student's clip, y a real one, both noised alike, and D small heads on the teacher's hidden tokens (LADD,
Sauer et al. 2024, arXiv 2403.12015; DMD2, Yin et al. 2024). At its optimum D is the log density ratio
log p_real / p_student at that sigma, which is what `f_distill` asks for.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingbot_nb.distill import flow
from lingbot_nb.distill.dmd import SIGMA_RANGE, score_sigma
from lingbot_nb.distill.forcing import Info, Velocity, gaussian

Discriminate = Callable[[Tensor, Tensor], Tensor]
"""(noisy clip B C F H W, t B F) -> logits B …, high for real."""


def softplus_generator(fake: Tensor) -> Tensor:
    """mean softplus(-D) of the student's logits: the non-saturating loss."""
    return F.softplus(-fake.float()).mean()


def softplus_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """mean softplus(D(fake)) + mean softplus(-D(real)); 2 log 2 where both look the same."""
    return F.softplus(fake.float()).mean() + F.softplus(-real.float()).mean()


def finite_r1(discriminate: Discriminate, noisy: Tensor, t: Tensor, logits: Tensor, noise: Tensor, size: float):
    """mean (D(x + size · noise) - D(x))² / size², about |grad D|², without a second derivative (APT, Lin et al. 2025,
    arXiv 2501.08316)."""
    return ((discriminate(noisy + size * noise, t) - logits) / size).float().square().mean()


def adversarial(
    discriminate: Discriminate,
    x_BCFHW: Tensor,
    *,
    shift: float,
    generator: torch.Generator,
    bounds: tuple[float, float] = SIGMA_RANGE,
) -> tuple[Tensor, Info]:
    """The generator's loss on its own clip, noised once; the gradient reaches x through the discriminator."""
    sigma = score_sigma(len(x_BCFHW), shift, generator, bounds).to(x_BCFHW.device).expand(-1, x_BCFHW.shape[2])
    logits = discriminate(flow.add_noise(x_BCFHW, gaussian(x_BCFHW, generator), sigma), 1000 * sigma)
    return softplus_generator(logits), {"fake_logit": logits.detach().mean(), "sigma": sigma.mean()}


def discriminator_loss(
    discriminate: Discriminate,
    x_BCFHW: Tensor,
    real_BCFHW: Tensor,
    *,
    shift: float,
    generator: torch.Generator,
    bounds: tuple[float, float] = SIGMA_RANGE,
    r1: float = 0.0,
    r1_size: float = 0.01,
) -> tuple[Tensor, Info]:
    """The discriminator's loss: student clips x against real ones at the same sigma and noise; no gradient into x.

    `r1` weighs `finite_r1` on the real clips.
    """
    x = x_BCFHW.detach()
    sigma = score_sigma(len(x), shift, generator, bounds).to(x.device).expand(-1, x.shape[2])
    eps, t = gaussian(x, generator), 1000 * sigma
    noisy = flow.add_noise(real_BCFHW, eps, sigma)
    fake, real = discriminate(flow.add_noise(x, eps, sigma), t), discriminate(noisy, t)
    loss = softplus_discriminator(real, fake)
    if r1:
        loss = loss + r1 * finite_r1(discriminate, noisy, t, real, gaussian(x, generator), r1_size)
    info = {"real_logit": real.detach().mean(), "fake_logit": fake.detach().mean()}
    return loss, info | {"accuracy": ((real > 0).float().mean() + (fake < 0).float().mean()).detach() / 2}


# ---- the heads ------------------------------------------------------------------------------------------------------


class Heads(nn.Module):
    """One small head for each of the teacher's layers it reads: a logit per token, B (layers · L)."""

    def __init__(self, dim: int, count: int, hidden: int = 64):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.LayerNorm(hidden), nn.SiLU(), nn.Linear(hidden, 1)
            )
            for _ in range(count)
        )
        for head in self.heads:
            nn.init.zeros_(head[-1].weight)
            nn.init.zeros_(head[-1].bias)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return torch.cat([head(f.float())[..., 0] for head, f in zip(self.heads, features, strict=True)], 1)


@contextmanager
def listening(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Collects what these layers put out while the context is open, in the order they run."""
    heard: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, __, out: heard.append(out)) for layer in layers]
    try:
        yield heard
    finally:
        for hook in hooks:
            hook.remove()


def on_features(heads: Heads, velocity: Velocity, layers: Sequence[nn.Module]) -> Discriminate:
    """Heads on the tokens that `layers` of the network behind `velocity` (the frozen teacher, bound) put out."""

    def discriminate(noisy_BCFHW: Tensor, t_BF: Tensor) -> Tensor:
        with listening(layers) as heard:
            velocity(noisy_BCFHW, t_BF)
        return heads(heard)

    return discriminate


def with_adversary(match: Callable, heads: Heads, layers: Sequence[nn.Module], weight: float) -> Callable:
    """L + weight · `adversarial`: a loss on the student's clips, `dmd.distribution_matching` or one that takes its
    arguments, with the heads on the teacher's `layers` beside it (DMD2's loss, Yin et al. 2024; weights that were used
    are 0.001 to 0.03). The heads learn by `discriminator_loss`.
    """

    def both(x_BCFHW: Tensor, real: Velocity, fake: Velocity, **options) -> tuple[Tensor, Info]:
        loss, info = match(x_BCFHW, real, fake, **options)
        extra, seen = alone(heads, layers)(x_BCFHW, real, fake, **options)
        return loss + weight * extra, info | {"fake_logit": seen["fake_logit"]}

    return both


def alone(heads: Heads, layers: Sequence[nn.Module]) -> Callable:
    """`adversarial` as such a loss: LADD, which asks for no scores."""

    def fooling(x_BCFHW: Tensor, real: Velocity, fake: Velocity, **options) -> tuple[Tensor, Info]:
        noise = dict(shift=options["shift"], generator=options["generator"])
        return adversarial(on_features(heads, real, layers), x_BCFHW, **noise)

    return fooling
