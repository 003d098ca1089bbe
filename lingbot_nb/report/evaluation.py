"""Generated clips beside the simulator's, under the same start frame and the same control."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lingbot_nb.distill import flow
from lingbot_nb.distill.flow import FewStep
from lingbot_nb.distill.forcing import gaussian
from lingbot_nb.distill.rollout import Conditions, rollout
from lingbot_nb.distill.train import bind, known_frames
from lingbot_nb.model.kv_cache import KVCache
from lingbot_nb.model.vae import to_uint8
from lingbot_nb.presets import Preset, StreamSettings
from lingbot_nb.report.metrics import horizon_table, sharpness
from lingbot_nb.world.latents import Batch

HORIZONS = (0.25, 1, 2, 4)
"""Seconds after the start image at which generated clips are compared."""


@torch.no_grad()
def teacher_clips(dit, batch: Batch, *, steps: int, shift: float, generator: torch.Generator) -> Tensor:
    """Latents B 16 F h w of the bidirectional teacher's `steps` Euler steps."""
    states = flow.euler(bind(dit, batch), gaussian(batch.latents, generator), flow.sigma_grid(steps, shift))
    for _, x in states:
        last = x
    return last


@torch.no_grad()
def student_clips(
    dit, batch: Batch, preset: Preset, *, steps: Sequence[FewStep], generator: torch.Generator, settings=None
) -> Tensor:
    """Latents B 16 F h w of the student, chunk by chunk through its cache; `settings` default to the preset's."""
    settings: StreamSettings = settings or preset.stream
    known, count = known_frames(settings), len(batch)
    device, frames = batch.latents.device, batch.latents.shape[2]
    dtype = next(dit.parameters()).dtype
    cache = KVCache(
        preset.model, settings, preset.shape, batch=count, device=device, dtype=dtype, capacity=max(frames, 1)
    )
    chunks = rollout(
        dit,
        gaussian(batch.latents, generator),
        steps,
        conditions=Conditions(dit.text(batch.context), batch.control, batch.condition),
        cache=cache,
        settings=settings,
        generator=generator,
        start=batch.latents[:, :, :known] if known else None,
        write_last=False,
    )
    return torch.cat(list(chunks), 2)


def decode_clips(vae, latents_BCFHW: Tensor, size: int = 8) -> np.ndarray:
    """uint8 pixel frames B N H W 3, `size` clips through the decoder at a time."""
    return np.concatenate([to_uint8(vae.decode(part)).cpu().numpy() for part in latents_BCFHW.split(size)])


def summary(real: np.ndarray, generated: np.ndarray, seconds: Sequence[float] = HORIZONS) -> dict:
    """One JSON-able row for clips B N H W 3: PSNR as [mean, low, high] (95 %) and sharpness per horizon, and in all."""
    rows = horizon_table(real, generated, seconds)
    return {
        "clips": len(real),
        "psnr": {f"{row.seconds:g}": [row.psnr.mean, row.psnr.low, row.psnr.high] for row in rows},
        "sharpness_at": {f"{row.seconds:g}": row.sharpness.mean for row in rows},
        "sharpness": sharpness(generated, real),
    }
