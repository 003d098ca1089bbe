"""Other divergences than DMD's: the same score difference, weighted by the density ratio.

With r = p / q the ratio of the teacher's density to the student's at x_sigma and D_f = E_q f(r),

    dD_f / dtheta = -E_q h(r) · (s_real - s_fake) · dx / dtheta,      h(r) = f''(r) · r²

(Xu et al. 2025, f-distill, arXiv 2502.15681).
h = 1 is the reverse KL, DMD itself, which seeks modes; an h that grows with r pushes clips towards what the teacher
finds likely and the student neglects. log r is a discriminator's logit (`gan`).
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lingbot_nb.distill import flow
from lingbot_nb.distill.dmd import SIGMA_RANGE, dmd_gradient, dmd_loss, guided_x0, score_sigma
from lingbot_nb.distill.forcing import Info, Velocity, gaussian, guided, loss_frames

Divergence = Callable[[Tensor], Tensor]
"""log r -> h(r)."""


def reverse_kl(log_ratio: Tensor) -> Tensor:
    """f = -log r, h = 1."""
    return torch.ones_like(log_ratio)


def forward_kl(log_ratio: Tensor) -> Tensor:
    """f = r log r, h = r: covers modes."""
    return log_ratio.exp()


def jensen_shannon(log_ratio: Tensor) -> Tensor:
    """f = r log r - (1 + r) log((1 + r) / 2), h = r / (1 + r): bounded, the calm middle."""
    return log_ratio.sigmoid()


def hellinger(log_ratio: Tensor) -> Tensor:
    """f = (1 - sqrt r)², h = sqrt(r) / 2."""
    return (log_ratio / 2).exp() / 2


def clip_weight(log_ratio: Tensor, h: Divergence, limit: float = 10.0) -> Tensor:
    """h(r) per clip with r clipped to [1 / limit, limit], divided by the batch's mean; fp64 [B].

    `log_ratio` is B or, from a discriminator with many logits, B …: their mean counts. Without the mean every
    divergence would also change the learning rate.
    """
    if limit <= 1:
        raise ValueError(f"limit {limit} on the density ratio is not above 1: use e.g. 10")
    bound = torch.tensor(limit, dtype=torch.float64).log().item()
    weight = h(log_ratio.detach().double().reshape(len(log_ratio), -1).mean(1).clamp(-bound, bound))
    return weight / weight.mean()


def f_distribution_matching(
    x_BCFHW: Tensor,
    real: Velocity,
    fake: Velocity,
    log_ratio: Callable[[Tensor, Tensor], Tensor],
    h: Divergence,
    *,
    shift: float,
    generator: torch.Generator,
    known: int = 0,
    bounds: tuple[float, float] = SIGMA_RANGE,
    unconditional: Velocity | None = None,
    guidance: float = 1.0,
    limit: float = 10.0,
) -> tuple[Tensor, Info]:
    """`dmd.distribution_matching` with each clip's gradient times `clip_weight` of log_ratio(x_sigma, t), B …."""
    loss_frames(x_BCFHW.shape[2], known)
    real = guided(real, unconditional, guidance)
    with torch.no_grad():
        sigma = score_sigma(len(x_BCFHW), shift, generator, bounds).to(x_BCFHW.device).expand(-1, x_BCFHW.shape[2])
        noisy = flow.add_noise(x_BCFHW, gaussian(x_BCFHW, generator), sigma)
        clean_real, clean_fake = (guided_x0(noisy, sigma, velocity)[:, :, known:] for velocity in (real, fake))
        weight = clip_weight(log_ratio(noisy, 1000 * sigma), h, limit)
        gradient = dmd_gradient(x_BCFHW[:, :, known:], clean_real, clean_fake) * weight[:, None, None, None, None]
    loss = dmd_loss(x_BCFHW[:, :, known:], gradient)
    return loss, {"g": gradient.abs().mean(), "weight_max": weight.max(), "sigma": sigma.mean()}
