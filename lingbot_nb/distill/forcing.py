"""Pretraining losses on the velocity: bidirectional flow matching, teacher forcing, diffusion forcing.

With x_sigma = (1 - sigma)·x0 + sigma·eps and t = 1000·sigma, every loss here is

    L = E w · || v_theta(x_sigma, t | context) - (eps - x0) ||²                    (Lipman et al. 2023, eq. 23)

and they differ only in how many sigmas a clip has and in what a chunk may look at. A model reaches a loss as a
`Velocity`: a function of (latent_BCFHW, t) with mask, text, camera and condition already bound.

Every loss here is its draws (`Noise`, `ForcedNoise`) followed by arithmetic on them: a compiler, which cannot trace
random numbers from a generator, takes the second part whole.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from lingbot_nb.distill import flow, parallel

Velocity = Callable[[Tensor, Tensor | float], Tensor]
"""(latent B C F H W, t in 0…1000) -> velocity eps - x0, B C F H W; t is a number (as `flow`'s solvers give) or B F."""
Info = dict[str, Tensor]
"""Detached scalars to log beside a loss."""


def gaussian(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of `like`'s shape, dtype and device, drawn on the generator's device."""

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, device=generator.device, dtype=like.dtype)

    return parallel.draw(normal, like.shape, generator).to(like.device)


def random_index(high: int, shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Whole numbers below `high`, int64 of `shape`, on the generator's device."""

    def whole(shape: tuple[int, ...]) -> Tensor:
        return torch.randint(high, shape, generator=generator, device=generator.device)

    return parallel.draw(whole, shape, generator)


def draw_sigma(
    shape: Sequence[int], shift: float, generator: torch.Generator, *, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """Noise levels k·u / (1 + (k - 1)·u) of uniform u with shift k, clamped to [low, high]; fp32 of `shape`."""

    def uniform(shape: tuple[int, ...]) -> Tensor:
        return torch.rand(shape, generator=generator, device=generator.device)

    return flow.shift(parallel.draw(uniform, shape, generator), shift).clamp(low, high)


def frame_t(t: Tensor | float, batch: int, frames: int, device: torch.device | str | None = None) -> Tensor:
    """t of a clip as fp32 B F, whether it was a number, one a clip (B or B 1) or one a frame."""
    t = torch.as_tensor(t, dtype=torch.float32, device=device)
    return (t[:, None] if t.dim() == 1 else t).expand(batch, frames)


def per_chunk(draws_BK: Tensor, lengths: Sequence[int]) -> Tensor:
    """One value a chunk, B K, to one value a frame, B F: the frames of chunk k share column k."""
    chunks = [k for k, length in enumerate(lengths) for _ in range(length)]
    return draws_BK[:, on_device(chunks, torch.int64, draws_BK.device)]


def on_device(numbers: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor that is remembered: copying them over anew would make the host wait for the device."""
    return _on_device(tuple(numbers), dtype, device)


@lru_cache(maxsize=64)
def _on_device(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept for later calls, which may need gradients
        return torch.tensor(numbers, dtype=dtype, device=device)


def loss_frames(frames: int, known: int, device: torch.device | str | None = None) -> Tensor:
    """Which frames carry loss, float F: 0 for the first `known` (given clean), 1 after them."""
    if not 0 <= known < frames:
        raise ValueError(f"{known} known frames of {frames} leave nothing to learn: use 0 to {frames - 1}")
    weight = torch.ones(frames, device=device)
    weight[:known] = 0
    return weight


def frame_mean(values_BCFHW: Tensor, weight: Tensor) -> Tensor:
    """Mean of `values` weighted per frame; `weight` F or B F, not all zero."""
    per_frame = values_BCFHW.float().mean((1, 3, 4))
    weight = weight.expand_as(per_frame)
    return (per_frame * weight).sum() / weight.sum()


def velocity_loss(
    velocity: Velocity, x0_BCFHW: Tensor, eps_BCFHW: Tensor, sigma_BF: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Info]:
    """mean w · (v(x_sigma, 1000·sigma) - (eps - x0))² at the given noise; the core of the losses below.

    `weight` is F or B F, normalised by its sum; None counts every frame alike.
    """
    noisy = flow.add_noise(x0_BCFHW, eps_BCFHW, sigma_BF)
    error = (velocity(noisy, 1000 * sigma_BF).float() - flow.velocity_target(x0_BCFHW, eps_BCFHW)).square()
    weight = torch.ones(x0_BCFHW.shape[2], device=x0_BCFHW.device) if weight is None else weight
    loss = frame_mean(error, weight)
    return loss, {"sigma": sigma_BF.mean().detach(), "velocity_loss": loss.detach()}


class Noise(NamedTuple):
    """What a loss on noisy clips draws: eps B C F H W, sigma B F, and the frames' weight F or B F."""

    eps: Tensor
    sigma: Tensor
    weight: Tensor


class ForcedNoise(NamedTuple):
    """`Noise`, and the clean half of teacher forcing with its t B F."""

    eps: Tensor
    sigma: Tensor
    weight: Tensor
    clean: Tensor
    t_clean: Tensor


def flow_matching(
    velocity: Velocity, x0_BCFHW: Tensor, *, shift: float, generator: torch.Generator
) -> tuple[Tensor, Info]:
    """Bidirectional flow matching: one sigma a clip, all frames noised and denoised together.

    L = E_{x0, eps, sigma} || v(x_sigma, 1000·sigma) - (eps - x0) ||², sigma = shifted uniform.
    """
    return velocity_loss(velocity, x0_BCFHW, *clip_noise(x0_BCFHW, shift=shift, generator=generator))


def clip_noise(x0_BCFHW: Tensor, *, shift: float, generator: torch.Generator) -> Noise:
    """One shifted uniform sigma a clip; every frame counts."""
    frames = x0_BCFHW.shape[2]
    sigma = draw_sigma((len(x0_BCFHW), 1), shift, generator).to(x0_BCFHW.device).expand(-1, frames)
    return Noise(gaussian(x0_BCFHW, generator), sigma, loss_frames(frames, 0, x0_BCFHW.device))


def diffusion_forcing(
    velocity: Velocity,
    x0_BCFHW: Tensor,
    lengths: Sequence[int],
    *,
    shift: float,
    generator: torch.Generator,
    known: int = 0,
) -> tuple[Tensor, Info]:
    """Diffusion forcing: each chunk at its own sigma; under a block-causal mask the history is noisy too.

    L = E Σ_b || v(x^b_{sigma_b}, 1000·sigma_b | x^{<b}_{sigma_<b}) - (eps^b - x0^b) ||²    (Chen et al. 2024, eq. 3).
    `lengths` are the chunks' frames; the first `known` frames are given clean (t = 0) and carry no loss.
    """
    noise = chunk_noise(x0_BCFHW, lengths, shift=shift, generator=generator, known=known)
    return velocity_loss(velocity, x0_BCFHW, *noise)


def chunk_noise(
    x0_BCFHW: Tensor, lengths: Sequence[int], *, shift: float, generator: torch.Generator, known: int = 0
) -> Noise:
    """One shifted uniform sigma a chunk; the first `known` frames at sigma 0 and without weight."""
    sigma = chunk_sigma(x0_BCFHW, lengths, shift, generator, known)
    weight = loss_frames(x0_BCFHW.shape[2], known, x0_BCFHW.device)
    return Noise(gaussian(x0_BCFHW, generator), sigma, weight)


def teacher_forcing(
    velocity: Velocity,
    x0_BCFHW: Tensor,
    lengths: Sequence[int],
    *,
    shift: float,
    generator: torch.Generator,
    known: int = 0,
    context_noise: float = 0.0,
) -> tuple[Tensor, Info]:
    """Teacher forcing in one pass over [clean | noisy]: each chunk at its own sigma, its history clean.

    L = E Σ_b || v(x^b_{sigma_b}, 1000·sigma_b | x0^{<b}) - (eps^b - x0^b) ||².
    `velocity` reads 2F frames under the teacher-forcing mask. With `context_noise` c > 0 the clean half is noised to
    sigma_c ~ U[0, c], one a clip, and told so: the student then forgives its own small errors.
    """
    options = dict(shift=shift, generator=generator, known=known, context_noise=context_noise)
    return forced_loss(velocity, x0_BCFHW, forced_noise(x0_BCFHW, lengths, **options))


def forced_noise(
    x0_BCFHW: Tensor,
    lengths: Sequence[int],
    *,
    shift: float,
    generator: torch.Generator,
    known: int = 0,
    context_noise: float = 0.0,
) -> ForcedNoise:
    """`chunk_noise`, and the clean half with a little noise of its own if wanted."""
    noise = chunk_noise(x0_BCFHW, lengths, shift=shift, generator=generator, known=known)
    return ForcedNoise(*noise, *noisy_context(x0_BCFHW, context_noise, generator, known))


def forced_loss(velocity: Velocity, x0_BCFHW: Tensor, noise: ForcedNoise) -> tuple[Tensor, Info]:
    """Teacher forcing at given noise; `velocity` reads [clean | noisy]."""
    eps, sigma, weight, clean, t_clean = noise
    return velocity_loss(given_clean(velocity, clean, t_clean), x0_BCFHW, eps, sigma, weight)


def kept_loss(velocity: Velocity, before: Velocity, x0_BCFHW: Tensor, noise: ForcedNoise) -> tuple[Tensor, Info]:
    """How far a network has moved from what it was `before`, where teacher forcing would teach it: both read the same
    [clean | noisy]. The data's own velocity would pull a few-step student back to the mean of all futures, which is a
    blur; its former self does not.

    L = E Σ_b w || v(x^b_{sigma_b}, 1000·sigma_b | x0^{<b}) - v_before(the same) ||² (Li and Hoiem 2016, Learning
    without Forgetting, for velocities).
    """
    eps, sigma, weight, clean, t_clean = noise
    noisy, t = flow.add_noise(x0_BCFHW, eps, sigma), 1000 * sigma
    with torch.no_grad():
        target = given_clean(before, clean, t_clean)(noisy, t).float()
    error = (given_clean(velocity, clean, t_clean)(noisy, t).float() - target).square()
    return frame_mean(error, weight), {}


def chunk_sigma(
    x0_BCFHW: Tensor, lengths: Sequence[int], shift: float, generator: torch.Generator, known: int
) -> Tensor:
    """One shifted uniform sigma per chunk as B F, 0 for the first `known` frames.

    Raises ValueError when the chunk lengths do not add up to the clip.
    """
    batch, _, frames = x0_BCFHW.shape[:3]
    check_lengths(lengths, frames)
    sigma = per_chunk(draw_sigma((batch, len(lengths)), shift, generator).to(x0_BCFHW.device), lengths)
    return sigma * loss_frames(frames, known, x0_BCFHW.device)


def check_lengths(lengths: Sequence[int], frames: int) -> None:
    if sum(lengths) != frames:
        raise ValueError(
            f"chunk lengths {list(lengths)} add up to {sum(lengths)}, not to the clip's {frames} frames: "
            f"use StreamSettings.chunk_lengths({frames})"
        )


def noisy_context(
    x0_BCFHW: Tensor, context_noise: float, generator: torch.Generator, known: int = 0
) -> tuple[Tensor, Tensor]:
    """The clean half and its t B F: x0 at t = 0, or x0 noised to sigma ~ U[0, context_noise], one a clip."""
    if not 0 <= context_noise < 1:
        raise ValueError(f"context noise {context_noise} is not a sigma below 1: use e.g. 0 or 0.1")
    batch, _, frames = x0_BCFHW.shape[:3]
    if context_noise == 0:
        return x0_BCFHW, torch.zeros(batch, frames, device=x0_BCFHW.device)
    sigma = context_noise * draw_sigma((batch, 1), 1.0, generator).to(x0_BCFHW.device)
    sigma = sigma * loss_frames(frames, known, x0_BCFHW.device)
    return flow.add_noise(x0_BCFHW, gaussian(x0_BCFHW, generator), sigma), 1000 * sigma


def given_clean(velocity: Velocity, clean_BCFHW: Tensor, t_clean_BF: Tensor | None = None) -> Velocity:
    """A velocity over [clean | noisy] as a velocity of the noisy half alone, its past clean.

    The clean half's output is dropped. `t_clean_BF` defaults to 0.
    """
    batch, _, frames = clean_BCFHW.shape[:3]
    t_clean = torch.zeros(batch, frames, device=clean_BCFHW.device) if t_clean_BF is None else t_clean_BF

    def noisy_half(noisy_BCFHW: Tensor, t: Tensor | float) -> Tensor:
        t_noisy = frame_t(t, batch, frames, noisy_BCFHW.device)
        both = velocity(torch.cat([clean_BCFHW, noisy_BCFHW], 2), torch.cat([t_clean, t_noisy], 1))
        return both[:, :, frames:]

    return noisy_half


def hold_start(velocity: Velocity, start_BCKHW: Tensor) -> Velocity:
    """A velocity in which the first K frames stay at a known clean start: given at t = 0, velocity 0.

    An ODE started with these frames in place therefore never moves them.
    """
    known = start_BCKHW.shape[2]
    if not known:
        return velocity

    def held(noisy_BCFHW: Tensor, t: Tensor | float) -> Tensor:
        t_BF = frame_t(t, len(noisy_BCFHW), noisy_BCFHW.shape[2], noisy_BCFHW.device).clone()
        t_BF[:, :known] = 0
        v = velocity(torch.cat([start_BCKHW, noisy_BCFHW[:, :, known:]], 2), t_BF)
        return torch.cat([torch.zeros_like(v[:, :, :known]), v[:, :, known:]], 2)

    return held


def guided(conditional: Velocity, unconditional: Velocity | None, w: float) -> Velocity:
    """Classifier-free guidance u + w·(c - u): w = 1 is the conditional alone (one forward), w = 0 the unconditional.

    This is the only convention here; "guidance s" of CausVid and Self-Forcing, c + s·(c - u), is w = s + 1.
    """
    if w == 1:
        return conditional
    if unconditional is None:
        raise ValueError(f"guidance w = {w} needs an unconditional velocity: give one, or use w = 1")
    return flow.with_guidance(conditional, unconditional, w)
