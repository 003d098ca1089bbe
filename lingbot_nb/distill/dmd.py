"""Distribution matching: the student's clips are moved along the difference of two scores.

At a noise level sigma the reverse KL between the student's distribution and the teacher's has the gradient

    dL/dx = E_eps [ w · (s_fake(x_sigma) - s_real(x_sigma)) ],     s_fake - s_real = (1 - sigma)·(fake - real)/sigma²

(Yin et al. 2024, DMD, eq. 7; DMD2 for the regression-free form), with `real` and `fake` the clean clips that teacher
and critic predict from the same noisy clip. All scalars go into one normaliser per clip: only fake - real remains.

Guidance is u + w·(c - u) everywhere; see `forcing.guided`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lingbot_nb.distill import flow
from lingbot_nb.distill.forcing import (
    Info,
    Noise,
    Velocity,
    check_lengths,
    draw_sigma,
    gaussian,
    guided,
    loss_frames,
    on_device,
    per_chunk,
    random_index,
    velocity_loss,
)

SIGMA_RANGE = (0.02, 0.98)
"""Noise levels at which the scores are compared: below, 1/sigma² explodes; above, nothing of the clip is left."""


def dmd_gradient(x: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """g = (fake - real) / mean|x - real|, the mean per clip over all other dimensions; fp64, nan and inf become 0.

    `x` is the student's clip, `real` and `fake` the x0 predictions (real guided already); all B ….
    """
    x, real, fake = (tensor.detach().double() for tensor in (x, real, fake))
    normaliser = (x - real).abs().mean(tuple(range(1, x.dim())), keepdim=True)
    return torch.nan_to_num((fake - real) / normaliser, nan=0.0, posinf=0.0, neginf=0.0)


def dmd_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """½ · mean (x - sg(x - g))² in fp64, so that dL/dx = g / numel(x); its value is mean g² / 2, not a progress."""
    x = x.double()
    return 0.5 * (x - (x - gradient).detach()).square().mean()


def score_sigma(batch: int, shift: float, generator: torch.Generator, bounds: tuple[float, float] = SIGMA_RANGE):
    """One sigma a clip, B 1: uniform, shifted, clamped. Never one a chunk: teacher and critic are bidirectional."""
    return draw_sigma((batch, 1), shift, generator, low=bounds[0], high=bounds[1])


def guided_x0(x_sigma: Tensor, sigma_BF: Tensor, velocity: Velocity) -> Tensor:
    """The clean clip x_sigma - sigma·v that a velocity predicts at `sigma`, in fp64."""
    v = velocity(x_sigma, 1000 * sigma_BF)
    return flow.x0_from_v(x_sigma.double(), v.double(), sigma_BF.double())


def distribution_matching(
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
) -> tuple[Tensor, Info]:
    """The generator's loss on its own clip: noise it once, ask teacher and critic, return `dmd_loss`.

    `real` is the teacher, guided to u + w·(c - u) with w = `guidance`; `fake` the critic, never guided. No gradient
    goes through either. The first `known` frames are seen by both but carry no gradient and stay out of the
    normaliser. Info: |g| (mean), the normaliser and sigma: watch |g| and pictures, not the loss.
    """
    loss_frames(x_BCFHW.shape[2], known)
    real = guided(real, unconditional, guidance)
    with torch.no_grad():
        sigma = score_sigma(len(x_BCFHW), shift, generator, bounds).to(x_BCFHW.device).expand(-1, x_BCFHW.shape[2])
        noisy = flow.add_noise(x_BCFHW, gaussian(x_BCFHW, generator), sigma)
        clean_real, clean_fake = (guided_x0(noisy, sigma, velocity)[:, :, known:] for velocity in (real, fake))
        gradient = dmd_gradient(x_BCFHW[:, :, known:], clean_real, clean_fake)
    loss = dmd_loss(x_BCFHW[:, :, known:], gradient)
    info = {
        "g": gradient.abs().mean(),
        "normaliser": (x_BCFHW[:, :, known:].detach() - clean_real).abs().mean(),
        "sigma": sigma.mean(),
    }
    return loss, info


def critic_loss(
    critic: Velocity,
    x_BCFHW: Tensor,
    *,
    shift: float,
    generator: torch.Generator,
    known: int = 0,
    bounds: tuple[float, float] = SIGMA_RANGE,
) -> tuple[Tensor, Info]:
    """Flow matching on the student's clips: mean (v_critic(x_sigma) - (eps - x))², no gradient into x.

    Unweighted, one sigma a clip from the same draw as the generator's; the first `known` frames carry no loss.
    """
    x = x_BCFHW.detach()
    return velocity_loss(critic, x, *critic_noise(x, shift=shift, generator=generator, known=known, bounds=bounds))


def critic_noise(
    x_BCFHW: Tensor,
    *,
    shift: float,
    generator: torch.Generator,
    known: int = 0,
    bounds: tuple[float, float] = SIGMA_RANGE,
) -> Noise:
    """The draws of `critic_loss`."""
    sigma = score_sigma(len(x_BCFHW), shift, generator, bounds).to(x_BCFHW.device).expand(-1, x_BCFHW.shape[2])
    return Noise(gaussian(x_BCFHW, generator), sigma, loss_frames(x_BCFHW.shape[2], known, x_BCFHW.device))


@torch.no_grad()
def vital_signs(x_BCFHW: Tensor, real_BCFHW: Tensor) -> Info:
    """How the student's clips compare with real ones: `spread`, the ratio of standard deviations (above 1 colours and
    contrasts saturate), and `motion`, the ratio of mean |frame - frame before| (below 1 the picture freezes)."""

    def motion(clip: Tensor) -> Tensor:
        return (clip[:, :, 1:] - clip[:, :, :-1]).abs().mean()

    return {"spread": x_BCFHW.std() / real_BCFHW.std(), "motion": motion(x_BCFHW) / motion(real_BCFHW)}


def noisy_history_clip(
    velocity: Velocity,
    x0_BCFHW: Tensor,
    sigmas: Sequence[float],
    lengths: Sequence[int],
    *,
    generator: torch.Generator,
    known: int = 0,
) -> Tensor:
    """CausVid's student clip in one pass: real latents, each chunk noised to a random level of the step list.

    x0^b = x_sigma_b - sigma_b · v(x^b_{sigma_b} | x^{<b}_{sigma_<b}), sigma_b uniform over `sigmas`; `velocity` runs
    under a block-causal mask. The history is noisy real data, never the student's own: that gap is what a rollout
    closes. The first `known` frames stay as they are.
    """
    batch, _, frames = x0_BCFHW.shape[:3]
    check_lengths(lengths, frames)
    drawn = random_index(len(sigmas), (batch, len(lengths)), generator)
    levels = on_device(sigmas, torch.float32, drawn.device)[drawn]
    sigma = per_chunk(levels.to(x0_BCFHW.device), lengths) * loss_frames(frames, known, x0_BCFHW.device)
    noisy = flow.add_noise(x0_BCFHW, gaussian(x0_BCFHW, generator), sigma)
    return flow.x0_from_v(noisy, velocity(noisy, 1000 * sigma), sigma)
