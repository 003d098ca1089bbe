"""Flow matching: noise schedules, conversions between what a network may predict, and samplers of the teacher.

x_sigma = (1 - sigma) x0 + sigma eps and v = eps - x0 = dx/dsigma. The network is told t = 1000 sigma.

A *velocity* here is any function `velocity(x, t) -> v` with x of any shape, t a Python float in 0..1000, v shaped as x.
A sigma may be a number, or a tensor that is scalar, [B] (one per clip), [B, F] (one per frame of B C F H W latents), or
already shaped to broadcast. Conversions are computed in float64 and returned in x's dtype: near sigma = 0 and 1 the
factors cancel, and public few-step samplers do the same.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TRAIN_STEPS = 1000
"""t = TRAIN_STEPS * sigma."""
BOUNDARY = 0.947
"""Sigma from which LingBot's high-noise expert takes over."""

Velocity = Callable[[Tensor, float], Tensor]
Sigma = float | Tensor


# ---- schedules -----------------------------------------------------------------------------------


def shift(u, k: float):
    """Shifted noise level sigma = k u / (1 + (k - 1) u) of u in [0, 1]: numbers, arrays or tensors; k > 0."""
    return k * u / (1 + (_positive(k) - 1) * u)


_shifted = shift  # parameters called shift hide the function


def unshift(sigma, k: float):
    """Inverse of `shift`: u = sigma / (k - (k - 1) sigma)."""
    return sigma / (_positive(k) - (k - 1) * sigma)


def sigma_grid(steps: int, shift: float) -> Tensor:
    """The `steps` + 1 sigmas from exactly 1 to exactly 0, even before the shift; float32 [steps + 1]."""
    u = torch.linspace(1, 0, _steps(steps) + 1, dtype=torch.float64)
    return _shifted(u, shift).float()


def unipc_grid(steps: int, shift: float) -> tuple[Tensor, Tensor]:
    """The released teacher's schedule: timesteps int64 [steps] and sigmas float32 [steps + 1], the last one 0.

    Upstream spaces u evenly from 0.999 (not 1) towards 0, shifts, and cuts 1000 sigma to whole numbers, so that on a
    fine grid many rows share one t.
    """
    sigmas = _shifted(_released_labels(steps), shift)
    timesteps = torch.from_numpy((TRAIN_STEPS * sigmas).astype(np.int64))
    return timesteps, torch.from_numpy(np.append(sigmas, 0.0).astype(np.float32))


@dataclass(frozen=True)
class FewStep:
    """One step of a few-step sampler: t for the network, sigma in x0 = x - sigma v, and the sigma that x was noised to.

    The two sigmas differ only in the released sampler with its ties (`released_few_steps`). A chunk starts from pure
    noise, so the first step's `sigma_noise` is not used.
    """

    t: float
    sigma: float
    sigma_noise: float


def few_steps(labels: Sequence[float], shift: float) -> list[FewStep]:
    """The student's steps at shifted `labels`, which fall from at most 1 to above 0.

    Labels (1, .75, .5, .25) at shift 5 give sigma 1, .9375, .8333, .625 (CausVid and Self-Forcing's list).
    """
    falling = [float(label) for label in labels]
    if not falling or any(not 0 < u <= 1 for u in falling) or sorted(set(falling), reverse=True) != falling:
        raise ValueError(
            f"student labels {falling} must fall strictly from at most 1 to above 0, e.g. (1, 0.75, 0.5, 0.25)"
        )
    return [FewStep(TRAIN_STEPS * sigma, sigma, sigma) for sigma in (_shifted(u, shift) for u in falling)]


def released_few_steps(indices: Sequence[int], shift: float, ties: bool = True) -> list[FewStep]:
    """The released fast sampler's steps: rows `indices` of the 1000-row `unipc_grid` (v1: [0, 179, 358, 679] at 10).

    With `ties` (bit parity with upstream) t is a whole number shared by several rows; x0 is then read off the first of
    them and x was noised to the second. Without, t and both sigmas are those of the row itself.
    """
    rows = [int(index) for index in indices]
    if any(not 0 <= row < TRAIN_STEPS for row in rows) or sorted(set(rows)) != rows or not rows:
        raise ValueError(
            f"few-step indices {rows} must rise strictly within 0..{TRAIN_STEPS - 1}, e.g. [0, 179, 358, 679]"
        )
    timesteps, sigmas = unipc_grid(TRAIN_STEPS, shift)
    return [_tied_step(timesteps, sigmas, row) if ties else _plain_step(sigmas, row) for row in rows]


# ---- conversions ---------------------------------------------------------------------------------


def add_noise(x0: Tensor, eps: Tensor, sigma: Sigma) -> Tensor:
    """x_sigma = (1 - sigma) x0 + sigma eps, in x0's dtype (as upstream's re-noising)."""
    s = spread(sigma, x0)
    s = s.to(x0.dtype) if isinstance(s, Tensor) else s
    return (1 - s) * x0 + s * eps.to(x0.dtype)


def velocity_target(x0: Tensor, eps: Tensor) -> Tensor:
    """v = eps - x0, what the network learns."""
    return eps - x0


def x0_from_v(x: Tensor, v: Tensor, sigma: Sigma) -> Tensor:
    """x0 = x - sigma v: no pole, so right at sigma = 1 too."""
    return _in_double(lambda x, v, s: x - s * v, x, v, sigma)


def eps_from_v(x: Tensor, v: Tensor, sigma: Sigma) -> Tensor:
    """eps = x + (1 - sigma) v: no pole."""
    return _in_double(lambda x, v, s: x + (1 - s) * v, x, v, sigma)


def score_from_v(x: Tensor, v: Tensor, sigma: Sigma) -> Tensor:
    """grad log p_sigma(x) = -(x + (1 - sigma) v) / sigma; sigma > 0."""
    return _in_double(lambda x, v, s: -(x + (1 - s) * v) / s, x, v, sigma)


def v_from_x0(x: Tensor, x0: Tensor, sigma: Sigma) -> Tensor:
    """v = (x - x0) / sigma; sigma > 0."""
    return _in_double(lambda x, x0, s: (x - x0) / s, x, x0, sigma)


def eps_from_x0(x: Tensor, x0: Tensor, sigma: Sigma) -> Tensor:
    """eps = (x - (1 - sigma) x0) / sigma; sigma > 0."""
    return _in_double(lambda x, x0, s: (x - (1 - s) * x0) / s, x, x0, sigma)


def score_from_x0(x: Tensor, x0: Tensor, sigma: Sigma) -> Tensor:
    """grad log p_sigma(x) = ((1 - sigma) x0 - x) / sigma^2; sigma > 0."""
    return _in_double(lambda x, x0, s: ((1 - s) * x0 - x) / s**2, x, x0, sigma)


def x0_from_eps(x: Tensor, eps: Tensor, sigma: Sigma) -> Tensor:
    """x0 = (x - sigma eps) / (1 - sigma); sigma < 1."""
    return _in_double(lambda x, e, s: (x - s * e) / (1 - s), x, eps, sigma)


def v_from_eps(x: Tensor, eps: Tensor, sigma: Sigma) -> Tensor:
    """v = (eps - x) / (1 - sigma); sigma < 1."""
    return _in_double(lambda x, e, s: (e - x) / (1 - s), x, eps, sigma)


def score_from_eps(x: Tensor, eps: Tensor, sigma: Sigma) -> Tensor:
    """grad log p_sigma(x) = -eps / sigma; sigma > 0."""
    return _in_double(lambda x, e, s: -e / s, x, eps, sigma)


def x0_from_score(x: Tensor, score: Tensor, sigma: Sigma) -> Tensor:
    """x0 = (x + sigma^2 score) / (1 - sigma), Tweedie's formula; sigma < 1."""
    return _in_double(lambda x, g, s: (x + s**2 * g) / (1 - s), x, score, sigma)


def v_from_score(x: Tensor, score: Tensor, sigma: Sigma) -> Tensor:
    """v = -(sigma score + x) / (1 - sigma); sigma < 1."""
    return _in_double(lambda x, g, s: -(s * g + x) / (1 - s), x, score, sigma)


def eps_from_score(x: Tensor, score: Tensor, sigma: Sigma) -> Tensor:
    """eps = -sigma score."""
    return _in_double(lambda x, g, s: -s * g, x, score, sigma)


def spread(sigma: Sigma, like: Tensor) -> Sigma:
    """Sigma so that it broadcasts over `like`: a number as it is, tensors [B] or [B, F] (B C F H W) with axes added.

    Raises ValueError when a [B] or [B, F] sigma does not fit; a [B] is never taken for a [W].
    """
    if not isinstance(sigma, Tensor):
        return float(sigma)  # no tensor made of it: that would be a copy to the device in every step
    s = sigma.to(like.device)
    if s.ndim in (0, like.ndim):
        return s
    axes = (0, 2)[: s.ndim] if like.ndim == 5 else (0,)
    if s.ndim != len(axes) or any(s.shape[i] != like.shape[axis] for i, axis in enumerate(axes)):
        raise ValueError(
            f"sigma of shape {list(s.shape)} does not fit x of shape {list(like.shape)}: use [B] or [B, F]"
        )
    return s.reshape([like.shape[axis] if axis in axes else 1 for axis in range(like.ndim)])


# ---- guidance and experts ------------------------------------------------------------------------


def guided(cond: Tensor, uncond: Tensor, w: float) -> Tensor:
    """Classifier-free guidance u + w (c - u); w = 1 is the conditional one (Ho and Salimans 2022, their w + 1)."""
    return uncond + w * (cond - uncond)


def with_guidance(cond: Velocity, uncond: Velocity, w: float) -> Velocity:
    """A velocity guided by `w`; `uncond` has the negative prompt and keeps the camera, and is not run when w is 1."""
    if w == 1:
        return cond
    return lambda x, t: guided(cond(x, t), uncond(x, t), w)


def two_experts(high: Velocity, low: Velocity, boundary: float = BOUNDARY) -> Velocity:
    """The teacher's velocity: the high-noise expert where t >= 1000 `boundary`, else the low-noise one.

    Guidance per expert: pass experts that went through `with_guidance`.
    """
    return lambda x, t: (high if t >= boundary * TRAIN_STEPS else low)(x, t)


# ---- teacher samplers ----------------------------------------------------------------------------


def euler(velocity: Velocity, x: Tensor, sigmas: Iterable[float] | Tensor) -> Iterator[tuple[float, Tensor]]:
    """Solve dx/dsigma = v by Euler steps through falling `sigmas`; yields every state (sigma, x), start included."""
    levels = [float(sigma) for sigma in sigmas]
    yield levels[0], x
    for here, there in zip(levels, levels[1:], strict=False):
        x = x + (there - here) * velocity(x, TRAIN_STEPS * here)
        yield there, x


def unipc(velocity: Velocity, x: Tensor, steps: int, shift: float) -> Iterator[tuple[float, Tensor]]:
    """The released teacher's sampler, UniPC of order 2 (bh2) on `unipc_grid`; yields states as `euler` does.

    The solver is diffusers' `UniPCMultistepScheduler`. Its own flow grid starts at u = 1 and ends at u = 1/1000 (at 40
    steps up to 0.007 from the released one), so the released labels are handed to it. x needs two axes or more.
    UniPC: arXiv 2302.04867.
    """
    from diffusers import UniPCMultistepScheduler

    solver = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=_positive(shift)
    )
    solver.set_timesteps(sigmas=_released_labels(steps))
    # Without this, diffusers looks the start up by timestep and skips a row when the first two share one.
    solver.set_begin_index(0)
    levels = solver.sigmas.tolist()
    yield levels[0], x
    for t, sigma in zip(solver.timesteps, levels[1:], strict=True):
        x = solver.step(velocity(x, float(t)), t, x, return_dict=False)[0]
        yield sigma, x


# ---- details -------------------------------------------------------------------------------------


def _released_labels(steps: int) -> np.ndarray:
    # The start has passed through float32 upstream.
    start = float(np.float32(1 - 1 / TRAIN_STEPS))
    return np.linspace(start, 0.0, _steps(steps) + 1)[:-1]


def _plain_step(sigmas: Tensor, row: int) -> FewStep:
    sigma = sigmas[row].item()
    return FewStep(TRAIN_STEPS * sigma, sigma, sigma)


def _tied_step(timesteps: Tensor, sigmas: Tensor, row: int) -> FewStep:
    tied = (timesteps == timesteps[row]).nonzero().flatten().tolist()
    return FewStep(float(timesteps[row]), sigmas[tied[0]].item(), sigmas[tied[:2][-1]].item())


def _in_double(formula: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, y: Tensor, sigma: Sigma) -> Tensor:
    s = spread(sigma, x)
    s = s.double() if isinstance(s, Tensor) else s
    return formula(x.double(), y.double(), s).to(x.dtype)


def _positive(k: float) -> float:
    if not k > 0:
        raise ValueError(f"shift {k} is not positive: use 1 for none, 3 to 10 for video")
    return k


def _steps(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"{steps} sampler steps: use 1 or more")
    return steps
