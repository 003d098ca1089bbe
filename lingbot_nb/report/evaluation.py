"""Generated clips beside the simulator's, under the same start frame and the same control."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lingbot_nb.distill import flow
from lingbot_nb.distill.flow import FewStep
from lingbot_nb.distill.forcing import gaussian
from lingbot_nb.distill.rollout import Conditions, next_chunk, rollout, start_chunk
from lingbot_nb.distill.train import bind, known_frames
from lingbot_nb.model.dit import DiT
from lingbot_nb.model.kv_cache import KVCache
from lingbot_nb.model.vae import from_uint8, to_uint8
from lingbot_nb.presets import LATENT_CHANNELS, TIME_STRIDE, Preset, StreamSettings
from lingbot_nb.report.metrics import horizon_frames, horizon_table, sharpness
from lingbot_nb.stream.engine import StreamingDiT
from lingbot_nb.stream.session import live_path
from lingbot_nb.world.latents import Batch

HORIZONS = (0.25, 1, 2, 4)
"""Seconds after the start image at which generated clips are compared."""


def horizon_spans(pixel_frames: int) -> dict[str, slice]:
    """The pixel frames of every horizon within a film of so many, by what tables call it: "0.25", "1", …"""
    spans = {f"{at:g}": horizon_frames(at) for at in HORIZONS}
    return {at: span for at, span in spans.items() if span.stop <= pixel_frames}


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


class Walker(Protocol):
    """Whoever holds the keys of one film."""

    def keys(self, pictures_NHW3: np.ndarray, count: int) -> np.ndarray:
        """The next `count` rows of keys, bool [count, 8], after the last chunk's pictures u8 [N, H, W, 3]."""


class Script:
    """A walker whose keys [N, 8] were chosen before, whatever the pictures show."""

    def __init__(self, keys_N8: np.ndarray):
        self.rows = iter(keys_N8)

    def keys(self, pictures_NHW3: np.ndarray, count: int) -> np.ndarray:
        return np.array([*islice(self.rows, count)])


def play(
    dit,
    vae,
    context: Tensor,
    preset: Preset,
    starts: np.ndarray,
    keys: np.ndarray,
    *,
    steps: Sequence[FewStep],
    seed: int = 0,
    size: int = 8,
) -> np.ndarray:
    """Films u8 [B, N, H, W, 3] that a student makes of keys: what `Session` plays, many films side by side.

    starts u8 [B, H, W, 3], the first pictures; keys bool [B, N, 8], N = 4n + 1, row 0 of no effect; context [L, D] of
    the prompt. Every film has noise of its own, drawn on the CPU from `seed` and its number. Memory does not grow with
    N but for the films. `size` films go at a time. Raises ValueError for other lengths or numbers of films.
    """
    if len(starts) != len(keys) or keys.shape[1] % TIME_STRIDE != 1:
        raise ValueError(f"{len(starts)} start pictures, keys {keys.shape}: give keys [{len(starts)}, 4n + 1, 8]")
    walkers = [*map(Script, keys)]
    given = dit, vae, context, preset, starts, walkers, keys.shape[1]
    return play_by_sight(*given, steps=steps, seed=seed, size=size)[0]


@torch.no_grad()
def play_by_sight(
    dit,
    vae,
    context: Tensor,
    preset: Preset,
    starts: np.ndarray,
    walkers: Sequence[Walker],
    pixel_frames: int,
    *,
    steps: Sequence[FewStep],
    seed: int = 0,
    size: int = 8,
) -> tuple[np.ndarray, np.ndarray]:
    """`play` by one walker a film, who is shown it chunk by chunk. Returns the films of 4n + 1 `pixel_frames` and the
    keys that were held, bool [B, N, 8]. Raises ValueError for other lengths or numbers of walkers."""
    if len(starts) != len(walkers) or pixel_frames % TIME_STRIDE != 1:
        raise ValueError(
            f"{len(starts)} start pictures, {len(walkers)} walkers, {pixel_frames} pixel frames: give a walker for "
            "each picture and 4n + 1 frames"
        )
    cpu = next(dit.parameters()).device.type == "cpu"
    net = StreamingDiT(dit) if cpu and isinstance(dit, DiT) else dit
    groups = [slice(i, i + size) for i in range(0, len(starts), size)]
    draws = [[torch.Generator().manual_seed(1_000_003 * seed + i) for i in range(len(starts))[g]] for g in groups]
    frames = (pixel_frames - 1) // TIME_STRIDE + 1
    films, keys = [], []
    for g, draw in zip(groups, draws, strict=True):
        chunks = _played(dit, net, vae, context, preset, starts[g], walkers[g], frames, steps, draw)
        shown, rows = zip(*chunks, strict=True)
        films.append(np.concatenate(shown, 1))
        keys.append(np.concatenate(rows, 1))
    return np.concatenate(films), np.concatenate(keys)


def _played(
    dit, net, vae, context, preset: Preset, starts, walkers: Sequence[Walker], frames: int, steps, draws
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The pixel frames of a group of films of so many latent frames, and the keys into them, chunk after chunk."""
    first, settings, shape = next(dit.parameters()), preset.stream, preset.shape
    device, count = first.device, len(starts)
    picture = from_uint8(torch.from_numpy(np.ascontiguousarray(starts))[:, None].to(device))
    condition, image = vae.image_condition(picture[:, :, 0], shape.frames), vae.encode(picture)
    text = net.text(context.to(first)[None].expand(count, -1, -1))
    cache = KVCache(preset.model, settings, shape, batch=count, device=device, dtype=first.dtype, capacity=frames)
    paths, decoder, begin, shown = [live_path(preset, device) for _ in draws], vae.decoder_stream(), 0, starts[:, None]

    def noise(length: int) -> Tensor:
        cells = (LATENT_CHANNELS, length, shape.latent_height, shape.latent_width)
        return torch.stack([torch.randn(cells, generator=draw) for draw in draws]).to(device)

    for length in settings.chunk_lengths(frames):
        asked = TIME_STRIDE * length - (TIME_STRIDE - 1 if begin == 0 else 0)
        rows = np.stack([walker.keys(film, asked) for walker, film in zip(walkers, shown, strict=True)])
        control = torch.stack([path.push(row) for path, row in zip(paths, rows, strict=True)]).to(device)
        at = [min(i, condition.shape[2] - 1) for i in range(begin, begin + length)]
        told = Conditions(text, control if preset.model.control_channels else None, condition[:, :, at])
        if begin == 0 and settings.image_first:
            x0 = start_chunk(net, image, conditions=told, cache=cache)
        else:
            renoise = lambda like: noise(like.shape[2])  # noqa: E731
            write = begin + length < frames
            x0 = next_chunk(net, noise(length), steps, conditions=told, cache=cache, renoise=renoise, write=write)
        shown = to_uint8(decoder.decode(x0)).cpu().numpy()
        yield shown, rows
        begin += length


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
