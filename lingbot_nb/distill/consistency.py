"""Causal consistency distillation: neighbours on the teacher's trajectory must predict the same clean chunk.

Three networks start from the same teacher-forced causal model: the student theta, the frozen teacher phi, and theta⁻,
an exponential moving average of the student. No trajectory is stored: one teacher step per update.
"""

import torch
from torch import Tensor

from lingbot_nb.distill import flow
from lingbot_nb.distill.forcing import Info, Velocity, frame_mean, gaussian, loss_frames, on_device, random_index


def consistency(
    student: Velocity,
    target: Velocity,
    teacher: Velocity,
    x0_BCFHW: Tensor,
    sigmas: Tensor,
    *,
    generator: torch.Generator,
    known: int = 0,
) -> tuple[Tensor, Info]:
    """One consistency step on real clips, past clean (Causal-Forcing++, arXiv 2605.15141; Song et al. 2023, eq. 10).

    i ~ U{0 … N-1}, the same for all frames;  x_i = (1 - sigma_i)·x0 + sigma_i·eps;
    x_{i+1} = x_i + (sigma_{i+1} - sigma_i)·v_phi(x_i);
    L = mean || (x_i - sigma_i·v_theta(x_i)) - sg(x_{i+1} - sigma_{i+1}·v_theta⁻(x_{i+1})) ||².

    `sigmas` holds N + 1 falling values ending in 0. At i = N-1 the target is the teacher's own clean end, whatever
    theta⁻ says: that anchors the rest (the released code stops one short and leans on sigma_{N-1} being small). The
    teacher is guided beforehand (`forcing.guided`). The first `known` frames stay clean at t = 0 and carry no loss.
    """
    check_grid(sigmas)
    batch, _, frames = x0_BCFHW.shape[:3]
    device = x0_BCFHW.device
    index = random_index(len(sigmas) - 1, (batch, 1), generator).to(device)
    weight = loss_frames(frames, known, device)
    table = on_device(sigmas.tolist(), torch.float32, device)
    sigma, lower = table[index] * weight, table[index + 1] * weight
    noisy = flow.add_noise(x0_BCFHW, gaussian(x0_BCFHW, generator), sigma)
    with torch.no_grad():
        step = (lower - sigma)[:, None, :, None, None]
        nearer = noisy + step * teacher(noisy, 1000 * sigma)
        wanted = flow.x0_from_v(nearer, target(nearer, 1000 * lower), lower)
    clean = flow.x0_from_v(noisy, student(noisy, 1000 * sigma), sigma)
    loss = frame_mean((clean - wanted).square(), weight)
    return loss, {"sigma": sigma.mean(), "consistency_loss": loss.detach()}


def check_grid(sigmas: Tensor) -> None:
    values = torch.as_tensor(sigmas)
    if len(values) < 2 or values[-1] != 0 or not bool((values[1:] < values[:-1]).all()):
        raise ValueError(f"sigmas {[round(float(s), 4) for s in values]} do not fall to 0: use flow.sigma_grid")
