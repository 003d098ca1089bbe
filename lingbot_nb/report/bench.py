"""Time on a clock: medians with their spread, after a warm-up, with the device's queue emptied.

Every number here belongs to a machine: print `figures.conditions` beside it.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from lingbot_nb.model.attention import attend
from lingbot_nb.model.kv_cache import KVCache
from lingbot_nb.model.masks import FrameMask
from lingbot_nb.presets import FPS, LATENT_CHANNELS, MASK_CHANNELS, TIME_STRIDE, ModelSize, Preset
from lingbot_nb.report.architecture import markdown_table

T_CLEAN, T_NOISY = 0.0, 999.0


@dataclass(frozen=True)
class Timing:
    """Milliseconds of `n` runs: median, 10th and 90th percentile."""

    median: float
    p10: float
    p90: float
    n: int

    def __str__(self) -> str:
        return f"{self.median:.3g} ms [{self.p10:.3g}, {self.p90:.3g}], n={self.n}"


def synchroniser(device: torch.device | str) -> Callable[[], None]:
    """What waits until `device` has finished its work: nothing to wait for on a CPU."""
    device = torch.device(device)
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


def measure(
    run: Callable[[], object],
    *,
    warmup: int = 2,
    repeats: int = 10,
    sync: Callable[[], None] | None = None,
    seconds: float = float("inf"),
) -> Timing:
    """Times `run()`: `repeats` runs after `warmup` untimed ones; `sync` is called before every reading of the clock.

    Stops before the run that would begin after `seconds` (a slow machine gives fewer runs, and `n` says so).
    """
    if repeats < 1:
        raise ValueError(f"{repeats} repeats: measure at least once")
    sync = sync or (lambda: None)
    for _ in range(warmup):
        run()
    times: list[float] = []
    while len(times) < repeats and sum(times) < 1000 * seconds:
        sync()
        began = time.perf_counter()
        run()
        sync()
        times.append((time.perf_counter() - began) * 1000)
    low, median, high = np.percentile(times, [10, 50, 90])
    return Timing(float(median), float(low), float(high), len(times))


@torch.no_grad()
def student_stages(
    preset: Preset,
    dit: nn.Module,
    vae: nn.Module | None,
    *,
    warmup: int = 2,
    repeats: int = 10,
    seconds: float = float("inf"),
) -> dict[str, Timing]:
    """Times the stages of one chunk in a stream that has filled its window: camera, forward, clean pass, decode.

    Inputs are random: time does not depend on them. Device and dtype are the DiT's. `vae=None` leaves decode out;
    `seconds` bounds each stage (see `measure`).
    Raises ValueError for settings without a window, whose stages have no steady state.
    """
    if preset.stream.window is None:
        raise ValueError("a stream without a window gets slower with every chunk: give StreamSettings a window")
    weight = next(dit.parameters())
    chunk = RandomStream(preset, dit)
    for _ in range(-(-preset.stream.window // preset.stream.chunk)):
        chunk.clean()
    timed = dict(warmup=warmup, repeats=repeats, sync=synchroniser(weight.device), seconds=seconds)
    stages = {
        "camera": measure(chunk.camera, **timed),
        "forward": measure(chunk.forward, **timed),
        "clean pass": measure(chunk.clean, **timed),
    }
    if vae is not None:
        stream = vae.decoder_stream()
        latent = chunk.latent.to(next(vae.parameters()).dtype)
        stages["decode"] = measure(lambda: stream.decode(latent), **timed)
    return stages


class RandomStream:
    """A stream of random inputs; each method is a stage of its running chunk, `clean` ends the chunk."""

    def __init__(self, preset: Preset, dit: nn.Module):
        weight = next(dit.parameters())
        device, dtype = weight.device, weight.dtype
        size, shape, frames = preset.model, preset.shape, preset.stream.chunk
        make = torch.Generator(device=device).manual_seed(0)

        def noise(*extents: int) -> torch.Tensor:
            return torch.randn(*extents, generator=make, device=device)

        cells = (frames, shape.latent_height, shape.latent_width)
        self.dit = dit
        self.latent = noise(1, LATENT_CHANNELS, *cells)
        self.condition = torch.zeros(1, MASK_CHANNELS + LATENT_CHANNELS, *cells, device=device)
        self.text = dit.text(noise(1, size.text_len, size.text_dim))
        self.control = noise(1, size.control_channels * 64, *cells) if size.control_channels else None
        self.films = self.camera()
        self.cache = KVCache(size, preset.stream, shape, device=device, dtype=dtype)

    @torch.no_grad()
    def camera(self):
        return None if self.control is None else self.dit.film(self.control)

    @torch.no_grad()
    def forward(self, t: float = T_NOISY) -> torch.Tensor:
        t = torch.tensor(t, device=self.latent.device)
        inputs = dict(condition_BCFHW=self.condition, text=self.text, camera=self.films, cache=self.cache)
        return self.dit(self.latent, t, **inputs)

    def clean(self) -> None:
        self.forward(T_CLEAN)
        self.cache.commit()


def chunk_ms(stages: Mapping[str, Timing], steps: int, clean_pass: bool = True) -> float:
    """Milliseconds of a chunk from its stages' medians: camera + steps forwards + clean pass + decode."""
    once = sum(stages[name].median for name in ("camera", "decode") if name in stages)
    return once + steps * stages["forward"].median + (stages["clean pass"].median if clean_pass else 0.0)


def chunk_fps(stages: Mapping[str, Timing], steps: int, chunk: int, clean_pass: bool = True) -> float:
    """Pixel frames a second of a stream of `chunk`-frame chunks."""
    return 1000 * TIME_STRIDE * chunk / chunk_ms(stages, steps, clean_pass)


def stage_table(stages: Mapping[str, Timing]) -> str:
    """The stages as a Markdown table."""
    rows = [(name, f"{t.median:.1f}", f"{t.p10:.1f} – {t.p90:.1f}", t.n) for name, t in stages.items()]
    return markdown_table(("stage", "median ms", "p10 – p90", "runs"), rows)


def speed_table(stages: Mapping[str, Timing], chunk: int, steps: Sequence[int] = (4, 2, 1)) -> str:
    """Speed for each number of steps (plus the clean pass) as a Markdown table, with the share of real time."""
    rows = []
    for count in steps:
        fps = chunk_fps(stages, count, chunk)
        rows.append((f"{count}+1", f"{chunk_ms(stages, count):.0f}", f"{fps:.1f}", f"{fps / FPS:.2f}×"))
    return markdown_table(("forwards", "ms a chunk", "FPS", f"of {FPS} FPS"), rows)


@torch.no_grad()
def attention_times(
    size: ModelSize, mask: FrameMask, tokens_per_frame: int, *, warmup: int = 1, repeats: int = 5, device="cpu"
) -> dict[str, Timing]:
    """One layer's attention under `mask`, three ways: no mask, the dense mask, and unmasked calls over its ranges.

    Random q, k, v in float32 for the whole sequence; the ranges compute only what the mask keeps.
    """
    length = mask.keep.shape[0] * tokens_per_frame
    make = torch.Generator(device=device).manual_seed(0)
    q, k, v = torch.randn(3, 1, length, size.heads, size.head_dim, generator=make, device=device)
    dense = mask.dense(tokens_per_frame, device)
    timed = dict(warmup=warmup, repeats=repeats, sync=synchroniser(device))
    return {
        "no mask": measure(lambda: attend(q, k, v), **timed),
        "dense mask": measure(lambda: attend(q, k, v, dense), **timed),
        "ranges": measure(lambda: attend_ranges(q, k, v, mask, tokens_per_frame), **timed),
    }


def attend_ranges(
    q_BLND: torch.Tensor, k_BLND: torch.Tensor, v_BLND: torch.Tensor, mask: FrameMask, tokens_per_frame: int
) -> torch.Tensor:
    """Attention under `mask` without a mask: one unmasked call for every group of queries that see the same keys."""
    out = []
    for (first, last), spans in mask.ranges():
        keys, values = (
            torch.cat([x[:, a * tokens_per_frame : b * tokens_per_frame] for a, b in spans], dim=1)
            for x in (k_BLND, v_BLND)
        )
        out.append(attend(q_BLND[:, first * tokens_per_frame : last * tokens_per_frame], keys, values))
    return torch.cat(out, dim=1)
