"""Score identity distillation: the score difference itself is driven to zero, through both networks."""

import torch
from torch import Tensor

from lingbot_nb.distill import flow
from lingbot_nb.distill.dmd import SIGMA_RANGE, guided_x0, score_sigma
from lingbot_nb.distill.forcing import Info, Velocity, gaussian, guided, loss_frames


def sid_loss(x: Tensor, real: Tensor, fake: Tensor, alpha: float = 1.0) -> Tensor:
    """mean (r - f) · [(r - x) - alpha (r - f)] / sg mean|x - r|, the normaliser per clip; fp64.

    Zhou et al. 2024 (SiD, arXiv 2404.04057), in x0. If f is the true E[x | x_sigma], E (r - f)(f - x) = 0 and
    the unnormalised value is (1 - alpha) E (r - f)²: with alpha = 1 the value is no progress, only its gradient is.
    """
    x, real, fake = (tensor.double() for tensor in (x, real, fake))
    normaliser = (x - real).detach().abs().mean(tuple(range(1, x.dim())), keepdim=True)
    return ((real - fake) * ((real - x) - alpha * (real - fake)) / normaliser).mean()


def score_identity(
    x_BCFHW: Tensor,
    real: Velocity,
    fake: Velocity,
    *,
    shift: float,
    generator: torch.Generator,
    known: int = 0,
    bounds: tuple[float, float] = SIGMA_RANGE,
    unconditional: Velocity | None = None,
    guidance: float = 1.0,
    alpha: float = 1.0,
) -> tuple[Tensor, Info]:
    """The generator's loss on its own clip, like `dmd.distribution_matching`.

    The gradient also flows through what teacher and critic say about x_sigma (twice the memory of DMD or more); freeze
    their weights meanwhile. The critic learns by `dmd.critic_loss`.
    """
    loss_frames(x_BCFHW.shape[2], known)
    real = guided(real, unconditional, guidance)
    sigma = score_sigma(len(x_BCFHW), shift, generator, bounds).to(x_BCFHW.device).expand(-1, x_BCFHW.shape[2])
    noisy = flow.add_noise(x_BCFHW, gaussian(x_BCFHW, generator), sigma)
    r, f = (guided_x0(noisy, sigma, velocity)[:, :, known:] for velocity in (real, fake))
    loss = sid_loss(x_BCFHW[:, :, known:], r, f, alpha)
    return loss, {"score_gap": (r - f).detach().abs().mean(), "sigma": sigma.mean()}
