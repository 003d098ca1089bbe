"""The released teacher as one velocity and one clip: two experts, guidance with a negative prompt, UniPC.

high, low = released.load_experts("lingbot-world-base", device="cuda")
clip = teacher_clip(high, low, batch, negative, presets.LINGBOT.flow, generator=generator)
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from lingbot_nb.distill import flow
from lingbot_nb.distill.forcing import Velocity, gaussian, guided
from lingbot_nb.distill.train import bind
from lingbot_nb.presets import FlowSettings
from lingbot_nb.world.latents import Batch

Solver = Callable[[Velocity, Tensor, int, float], Iterator[tuple[float, Tensor]]]
"""(velocity, noise, steps, shift) -> states, as `flow.unipc`."""


def expert_velocity(dit, batch: Batch, negative: Tensor | None, guidance: float) -> Velocity:
    """One expert's velocity u + w·(c - u) with w = `guidance`: c under the batch's prompt, u under the negative one.

    `negative`: text states B L text_dim (or 1 L text_dim), not read at guidance 1; u keeps camera and condition. The
    expert computes on its own device: two experts may live on two GPUs.
    """
    device = next(dit.parameters()).device
    batch = Batch(*(tensor.to(device) for tensor in batch.tensors))
    plain = None
    if guidance != 1 and negative is not None:
        plain = bind(dit, replace(batch, context=negative.to(device).expand(len(batch), -1, -1)))
    velocity = guided(bind(dit, batch), plain, guidance)
    return lambda x, t: velocity(x.to(device), t).to(x.device)


def teacher_velocity(
    high,
    low,
    batch: Batch,
    negative: Tensor | None = None,
    *,
    guidance: tuple[float, float] = (5.0, 5.0),
    boundary: float = flow.BOUNDARY,
) -> Velocity:
    """The teacher's velocity: `high` where t >= 1000·boundary, else `low` (None: a release of one DiT, `high` alone).

    `guidance` is (high's, low's). Raises ValueError for a guidance other than 1 without `negative`.
    """
    of_high = expert_velocity(high, batch, negative, guidance[0])
    if low is None:
        return of_high
    return flow.two_experts(of_high, expert_velocity(low, batch, negative, guidance[1]), boundary)


@torch.no_grad()
def teacher_clip(
    high,
    low,
    batch: Batch,
    negative: Tensor | None,
    settings: FlowSettings,
    *,
    generator: torch.Generator,
    guidance: tuple[float, float] | None = None,
    boundary: float = flow.BOUNDARY,
    steps: int | None = None,
    solver: Solver = flow.unipc,
) -> Tensor:
    """Latents B 16 F h w of the teacher for a batch's start image, prompt and camera path.

    Steps, shift and guidance are the preset's (`LINGBOT.flow`: 70, 10 and 5 for both experts) unless given.
    """
    scales = guidance or (settings.guidance, settings.guidance)
    velocity = teacher_velocity(high, low, batch, negative, guidance=scales, boundary=boundary)
    states = solver(velocity, gaussian(batch.latents, generator), steps or settings.teacher_steps, settings.shift)
    for _, x in states:
        last = x
    return last
