"""Chunk by chunk through time: the one rollout that training, evaluation and play share.

A chunk costs one forward per step, each predicting x0 and adding fresh noise to the next level (the consistency
sampler), plus one clean forward that writes its keys and values to the cache. Training differs in two ways only: the
steps stop at a random exit, and the exit forward alone keeps its graph (Self-Forcing, Huang et al. 2025, alg. 1).

Random numbers are drawn in this order, which makes a seed a film: `noise` for the whole clip by the caller, then per
chunk one draw for every step but the last.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lingbot_nb.distill import flow, parallel
from lingbot_nb.distill.flow import FewStep
from lingbot_nb.distill.forcing import gaussian
from lingbot_nb.presets import StreamSettings

Renoise = Callable[[Tensor], Tensor]
"""x0 of a chunk -> fresh standard normal noise of its shape."""


@dataclass(frozen=True)
class Conditions:
    """What a clip or a chunk is told: `text` from `DiT.text` (once a prompt), `control` B C F h w (None without
    control), `condition` B 20 F h w (mask and image latent)."""

    text: Any
    control_BCFHW: Tensor | None
    condition_BCFHW: Tensor

    def frames(self, start: int, stop: int) -> "Conditions":
        """The part for frames `start` to `stop`."""
        control = None if self.control_BCFHW is None else self.control_BCFHW[:, :, start:stop]
        return Conditions(self.text, control, self.condition_BCFHW[:, :, start:stop])


def denoise_chunk(
    model,
    noise: Tensor,
    steps: Sequence[FewStep],
    *,
    condition: Tensor,
    text,
    camera,
    cache,
    renoise: Renoise,
    exit_step: int | None = None,
    grad: bool = False,
    checkpoint: bool = False,
) -> Tensor:
    """The x0 that step `exit_step` (default: the last) predicts for one chunk of noise B C f h w; fp32.

    Steps before the exit run without gradient; the exit forward keeps its graph when `grad`. x0 = x - sigma·v, then
    x = (1 - sigma_noise)·x0 + sigma_noise·eps with fresh eps for the next step. The cache is read, and its running
    slot overwritten, but nothing is committed.
    """
    last = exit_step_or_last(exit_step, steps)
    cache.begin(noise.shape[2])
    x = noise
    for k, step in enumerate(steps[: last + 1]):
        with torch.set_grad_enabled(grad and k == last):
            t = torch.full(noise.shape[:1], float(step.t), device=noise.device)
            inputs = dict(condition_BCFHW=condition, text=text, camera=camera, cache=cache)
            v = model(x, t, **inputs, checkpoint=checkpoint and grad and k == last)
            x0 = flow.x0_from_v(x, v, step.sigma)
            if k < last:
                x = flow.add_noise(x0, renoise(x0), steps[k + 1].sigma_noise)
    return x0


def exit_step_or_last(exit_step: int | None, steps: Sequence[FewStep]) -> int:
    if not steps:
        raise ValueError("no denoising steps: give at least one FewStep")
    last = len(steps) - 1 if exit_step is None else exit_step
    if not 0 <= last < len(steps):
        raise ValueError(f"exit step {exit_step} is outside the {len(steps)} steps: use 0 to {len(steps) - 1}")
    return last


def draw_exit(steps: Sequence[FewStep], generator: torch.Generator) -> int:
    """One exit step, uniform over the list, to be shared by all chunks of a rollout (and by all ranks)."""
    drawn = torch.randint(len(steps), (), generator=generator, device=generator.device)
    return int(parallel.agree(drawn.item(), generator.device))


@torch.no_grad()
def pass_clean(model, x0: Tensor, *, condition: Tensor, text, camera, cache) -> None:
    """The clean forward alone: runs x0 at t = 0 so that the cache holds clean keys and values, and commits nothing. A
    model that can end there has a `write` for it, with forward's arguments."""
    x0 = x0.detach()
    cache.begin(x0.shape[2])
    t = torch.zeros(x0.shape[0], device=x0.device)
    write = getattr(model, "write", model)
    write(x0, t, condition_BCFHW=condition, text=text, camera=camera, cache=cache)


def write_clean(model, x0: Tensor, **told) -> None:
    """`pass_clean`, after which the chunk belongs to the cache."""
    pass_clean(model, x0, **told)
    told["cache"].commit()


def camera_of(model, control_BCFHW: Tensor | None, *, grad: bool = False):
    """What the layers take from the camera: modulation per layer, computed once a chunk, or, where a gradient is
    wanted, the tokens it is made from (so that activation checkpointing can recompute each layer's share)."""
    if control_BCFHW is None:
        return None
    with torch.set_grad_enabled(grad):
        return model.camera_tokens(control_BCFHW) if grad else model.film(control_BCFHW)


def next_chunk(
    model,
    noise: Tensor,
    steps: Sequence[FewStep],
    *,
    conditions: Conditions,
    cache,
    renoise: Renoise,
    exit_step: int | None = None,
    grad: bool = False,
    checkpoint: bool = False,
    write: bool = True,
) -> Tensor:
    """Denoises one chunk under its own `conditions`, writes it clean to the cache if `write`, and returns x0."""
    camera = camera_of(model, conditions.control_BCFHW, grad=grad)
    shared = dict(condition=conditions.condition_BCFHW, text=conditions.text, cache=cache)
    options = dict(renoise=renoise, exit_step=exit_step, grad=grad, checkpoint=checkpoint)
    x0 = denoise_chunk(model, noise, steps, camera=camera, **shared, **options)
    if write:
        write_clean(model, x0, camera=camera, **shared)
    else:
        cache.abandon()
    return x0


def start_chunk(model, start: Tensor, *, conditions: Conditions, cache) -> Tensor:
    """Writes known clean latents to the cache as a chunk of their own and returns them."""
    camera = camera_of(model, conditions.control_BCFHW)
    write_clean(model, start, condition=conditions.condition_BCFHW, text=conditions.text, camera=camera, cache=cache)
    return start


def rollout(
    model,
    noise: Tensor,
    steps: Sequence[FewStep],
    *,
    conditions: Conditions,
    cache,
    settings: StreamSettings,
    generator: torch.Generator,
    start: Tensor | None = None,
    exit_step: int | None = None,
    grad_from: int = 0,
    checkpoint: bool = False,
    write_last: bool = True,
) -> Iterator[Tensor]:
    """Yields the clean chunks of a clip, B C f h w each, in order; concatenated along frames they are the clip.

    `noise` B C F h w for the whole clip (its first frames are not read where `start` gives them); `conditions` for
    the same F frames; `start` known clean latents that fill whole leading chunks (the image latent when
    `settings.image_first`): written to the cache and yielded as they are. `exit_step` is shared by all chunks. Gradient
    flows where the caller has it enabled, from the chunk at frame `grad_from` on; the cache holds detached entries, so
    that no chunk's gradient reaches an earlier one. Without `write_last` the last chunk is not written to the cache:
    where the walk ends there, that saves a forward and a clip's keys and values.

    Raises ValueError when conditions, start and noise do not fit together.
    """
    exit_step_or_last(exit_step, steps)
    lengths = settings.chunk_lengths(noise.shape[2])
    known = _check_rollout(noise, conditions, lengths, start)
    first = 0
    for length in lengths:
        part = conditions.frames(first, first + length)
        if first < known:
            x0 = start_chunk(model, start[:, :, first : first + length], conditions=part, cache=cache)
        else:
            x0 = next_chunk(
                model,
                noise[:, :, first : first + length],
                steps,
                conditions=part,
                cache=cache,
                renoise=lambda like: gaussian(like, generator),
                exit_step=exit_step,
                grad=torch.is_grad_enabled() and first >= grad_from,
                checkpoint=checkpoint,
                write=write_last or first + length < noise.shape[2],
            )
        yield x0
        first += length


def _check_rollout(noise: Tensor, conditions: Conditions, lengths: Sequence[int], start: Tensor | None) -> int:
    frames = noise.shape[2]
    for name in ("control_BCFHW", "condition_BCFHW"):
        tensor = getattr(conditions, name)
        if tensor is not None and tensor.shape[2] != frames:
            raise ValueError(f"{name} has {tensor.shape[2]} frames, the noise {frames}: give both for the whole clip")
    known = 0 if start is None else start.shape[2]
    borders = {sum(lengths[:i]) for i in range(len(lengths) + 1)}
    if known not in borders:
        raise ValueError(f"start has {known} frames, which fill no whole chunks of {lengths}: use one of {borders}")
    return known
