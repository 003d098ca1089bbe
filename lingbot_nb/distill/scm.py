"""Continuous consistency: the student's clean prediction must not change along the teacher's trajectory."""

import torch
from torch import Tensor

from lingbot_nb.distill import flow
from lingbot_nb.distill.derivative import PathDerivative, by_difference
from lingbot_nb.distill.forcing import Info, Velocity, draw_sigma, frame_mean, gaussian, loss_frames

SIGMA_RANGE = (0.01, 0.99)


def tangent(x: Tensor, v_student: Tensor, dv: Tensor, v_teacher: Tensor, sigma: Tensor, warm: float = 1.0) -> Tensor:
    """d/dsigma of f = x - sigma · v_theta along dx/dsigma = v_phi: v_phi - v_theta - warm · sigma · dv_theta/dsigma.

    `warm` in [0, 1] lets in the last term, which is unstable at first, by and by (Lu and Song 2024, sCM, arXiv
    2410.11081, there in TrigFlow).
    """
    return v_teacher - v_student - warm * flow.spread(sigma, x) * dv


def normalised(g_BCFHW: Tensor, c: float = 0.1) -> Tensor:
    """g / (|g| + c), |g| the root mean square per clip: the tangent's length varies by orders of magnitude."""
    length = g_BCFHW.square().mean(tuple(range(1, g_BCFHW.dim())), keepdim=True).sqrt()
    return g_BCFHW / (length + c)


def continuous_consistency(
    student: Velocity,
    teacher: Velocity,
    x0_BCFHW: Tensor,
    *,
    shift: float,
    generator: torch.Generator,
    known: int = 0,
    bounds: tuple[float, float] = SIGMA_RANGE,
    derivative: PathDerivative | None = None,
    warm: float = 1.0,
    c: float = 0.1,
) -> tuple[Tensor, Info]:
    """sCM in flow-matching coordinates, the limit of `consistency` for infinitely many levels.

    g = d/dsigma f_theta⁻(x_sigma) along the teacher's ODE (`tangent`), normalised;
    L = mean || v_theta(x_sigma) - sg(v_theta(x_sigma) + sigma · g) ||², whose gradient is that of f_theta · sg(g).
    One sigma a clip. The first `known` frames stay clean at t = 0, do not move and carry no loss. The teacher is guided
    beforehand; `derivative` defaults to central differences.
    """
    weight = loss_frames(x0_BCFHW.shape[2], known, x0_BCFHW.device)
    low, high = bounds
    drawn = draw_sigma((len(x0_BCFHW), 1), shift, generator, low=low, high=high).to(x0_BCFHW.device)
    sigma = drawn * weight
    x = flow.add_noise(x0_BCFHW, gaussian(x0_BCFHW, generator), sigma)
    with torch.no_grad():
        v_teacher = teacher(x, 1000 * sigma)
        moving = flow.spread(weight.expand_as(sigma), x)
        path = (v_teacher * moving, weight.expand_as(sigma))
        v, dv = (derivative or by_difference())(lambda x, s: student(x, 1000 * s), (x, sigma), path)
        g = tangent(x, v, dv, v_teacher, sigma, warm) * moving
        target = v + flow.spread(sigma, x) * normalised(g, c)
    loss = frame_mean((student(x, 1000 * sigma) - target).square(), weight)
    return loss, {"sigma": drawn.mean(), "tangent": g.abs().mean()}
