"""MeanFlow: the student learns the average velocity between two noise levels, so that one step spans them.

    u(x_t, t, r) = 1/(t - r) ∫_r^t v dτ,      x_r = x_t - (t - r) · u,      u = v - (t - r) · du/dt

(Geng et al. 2025, arXiv 2505.13447), t and r being sigmas here, du/dt the total derivative along v.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from lingbot_nb.distill import flow
from lingbot_nb.distill.derivative import PathDerivative, by_difference
from lingbot_nb.distill.forcing import Info, Velocity, draw_sigma, frame_mean, gaussian, loss_frames

Average = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t B C F H W, t B F, r B F), both times in 0…1000 -> average velocity between them, B C F H W."""


def interval_time(dit, t_BF: Tensor, r_BF: Tensor):
    """A DiT's time embedding for an average velocity: time(t) + time(t - r) - time(0), to be passed as its t.

    No new weights, and at r = t the network is what it was: a flow-matching model is a MeanFlow model to start from.
    """
    at, span, none = dit.time(t_BF), dit.time(t_BF - r_BF), dit.time(torch.zeros_like(t_BF))
    return type(at)(*(a + s - n for a, s, n in zip(at, span, none, strict=True)))


def average_target(v: Tensor, du: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """v - (t - r) · du/dt with sigmas t, r shaped B F."""
    return v - flow.spread(t - r, v) * du


def mean_flow(
    average: Average,
    x0_BCFHW: Tensor,
    *,
    shift: float,
    generator: torch.Generator,
    known: int = 0,
    teacher: Velocity | None = None,
    apart: float = 0.5,
    derivative: PathDerivative | None = None,
    power: float = 1.0,
    c: float = 1e-3,
) -> tuple[Tensor, Info]:
    """L = mean w · || u_theta(x_t, t, r) - sg(v - (t - r) · du_theta/dt) ||².

    v is the clip's own eps - x0, or, distilling, the teacher's (guided beforehand). t and r are two shifted uniform
    sigmas a clip, r the smaller; a share 1 - `apart` of the clips has r = t, plain flow matching, which anchors the
    rest. w = 1 / (error + c)^power per clip, power 0 for none. The first `known` frames stay clean, carry no loss.
    """
    batch, _, frames = x0_BCFHW.shape[:3]
    weight = loss_frames(frames, known, x0_BCFHW.device)
    two = draw_sigma((batch, 2), shift, generator).to(x0_BCFHW.device)
    together = draw_sigma((batch, 1), 1.0, generator).to(two) >= apart
    high, low = two.amax(1, keepdim=True), two.amin(1, keepdim=True)
    t, r = high * weight, torch.where(together, high, low) * weight
    eps = gaussian(x0_BCFHW, generator)
    x = flow.add_noise(x0_BCFHW, eps, t)
    with torch.no_grad():
        moving = flow.spread(weight.expand_as(t), x)
        v = (eps - x0_BCFHW if teacher is None else teacher(x, 1000 * t)) * moving
        path = (v, weight.expand_as(t), torch.zeros_like(r))

        def network(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            return average(x, 1000 * t, 1000 * r)

        _, du = (derivative or by_difference())(network, (x, t, r), path)
        target = average_target(v, du, t, r)
    error = (average(x, 1000 * t, 1000 * r) - target).square() * moving
    per_clip = torch.stack([frame_mean(clip[None], weight) for clip in error])
    loss = (per_clip / (per_clip.detach() + c) ** power).mean()
    return loss, {"span": (high - low).mean(), "error": per_clip.detach().mean()}


def average_steps(average: Average, noise_BCFHW: Tensor, sigmas: Sequence[float]) -> Iterator[tuple[float, Tensor]]:
    """Walks x_r = x_t - (t - r) · u through falling `sigmas`, (1, 0) for one step; yields (sigma, x) after each."""
    x, shape = noise_BCFHW, (len(noise_BCFHW), noise_BCFHW.shape[2])
    for t, r in zip(sigmas, sigmas[1:], strict=False):
        times = (torch.full(shape, 1000 * float(s), device=x.device) for s in (t, r))
        x = x - (t - r) * average(x, *times)
        yield r, x
