"""A network and batches of the micro preset, filled with seeded noise, for tests that need no trained weights."""

from dataclasses import replace

import torch

from lingbot_nb.model.dit import DiT
from lingbot_nb.presets import LATENT_CHANNELS, MASK_CHANNELS, MICRO, SPACE_STRIDE, ModelSize
from lingbot_nb.world.latents import Batch

SIZE = replace(MICRO.model, dim=32, ffn_dim=48, control_channels=1)
"""Smaller still than micro: one control channel a pixel keeps the camera embedding short."""
SHAPE = MICRO.shape.with_frames(5)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_dit(seed: int = 0, size: ModelSize = SIZE) -> DiT:
    """A DiT whose head is not zero, so that every parameter matters from the start."""
    torch.manual_seed(seed)
    dit = DiT(size)
    torch.nn.init.normal_(dit.head.head.weight, std=0.05)
    return dit


def random_batch(seed: int = 0, batch: int = 2, frames: int = SHAPE.frames) -> Batch:
    generator = rng(seed)

    def draw(channels: int) -> torch.Tensor:
        return torch.randn(batch, channels, frames, SHAPE.latent_height, SHAPE.latent_width, generator=generator)

    control = draw(SIZE.control_channels * SPACE_STRIDE**2)
    context = torch.randn(batch, 3, SIZE.text_dim, generator=generator)
    return Batch(draw(LATENT_CHANNELS), draw(MASK_CHANNELS + LATENT_CHANNELS), control, context)


def endless(batch: int = 2, frames: int = SHAPE.frames, start: int = 0):
    """Batches 0, 1, 2, … without end, each seeded by its number."""
    while True:
        yield random_batch(start, batch, frames)
        start += 1


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
