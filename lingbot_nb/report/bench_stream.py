"""Live streaming, timed end to end: keys in, uint8 pixel frames on the host out, decoder included.

    python -m lingbot_nb bench stream --preset lingbot --steps 4,2
    python -m lingbot_nb bench stream --preset lingbot --fp8 --ladder --out ladder.json       (option by option)
    python -m lingbot_nb bench stream --preset lingbot --each-clean-pass         (its clean pass merged, and left out)
    python -m lingbot_nb bench stream --preset lingbot --layers 1 --decoder wan              (the Wan VAE's decoder)
    torchrun --nproc-per-node 2 -m lingbot_nb bench stream --preset lingbot --steps 4,2      (one stream on two GPUs)

Weights are random: time depends on shapes alone. Every row is printed when it is known. The floor is what the matrix
products and attentions of a chunk take on this machine when each runs alone, measured in the same run.
"""

import argparse
import copy
import gc
import json
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lingbot_nb import presets, runs
from lingbot_nb.control.keys import KEYS
from lingbot_nb.distill import parallel
from lingbot_nb.distill.flow import few_steps
from lingbot_nb.model.attention import backend
from lingbot_nb.model.dit import DiT
from lingbot_nb.model.fp8 import E4M3, product_for, scaled_product
from lingbot_nb.model.fused import USUAL, Format, FusedDiT, as_it_is
from lingbot_nb.model.graph import Recorder
from lingbot_nb.model.kv_cache import KVCache
from lingbot_nb.model.taehv import TAEHV
from lingbot_nb.model.vae import MICRO_VAE, TinyVAE
from lingbot_nb.model.wan_vae import WanVAE
from lingbot_nb.presets import (
    FPS,
    LATENT_CHANNELS,
    MASK_CHANNELS,
    SPACE_STRIDE,
    TIME_STRIDE,
    ModelSize,
    Preset,
    VideoShape,
)
from lingbot_nb.report.architecture import markdown_table
from lingbot_nb.report.bench import synchroniser
from lingbot_nb.stream.engine import SMALL, Engine, Plain, Speed, fast
from lingbot_nb.stream.engine_decoder import PictureStream, PlainPictures, picture_stream
from lingbot_nb.stream.engine_memory import GIB, Need, check_memory, needed, needed_plainly, taehv_maps, wan_maps
from lingbot_nb.stream.engine_parallel import HeadShare
from lingbot_nb.stream.session import TINY, choose_dtype, live_path

Say = Callable[[str], None]


# -- what is measured -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One stream: `latency` and `p99` from keys to frames on the host, `period` from chunk to chunk, all in ms; `first`
    is a fresh stream's first chunk; `cold` seconds of a first stream that compiles everything, `recorded` of a second
    one that records it; `stages` the median ms of each stage; `peak_gib` of device memory; `host`, on a CPU, ms of a
    chunk without its decoder that are no arithmetic (see `host_ms`)."""

    name: str
    steps: int
    chunk: int
    fps: float
    period: float
    latency: float
    p99: float
    peak_gib: float
    chunks: int
    stages: dict[str, float]
    floor: float = 0.0
    first: float = 0.0
    cold: float = 0.0
    recorded: float = 0.0
    clean_pass: bool = True
    host: float = 0.0

    def __str__(self) -> str:
        stages = ", ".join(f"{name} {ms:.1f}" for name, ms in self.stages.items())
        parts = [
            f"{self.name}, {self.steps}+{int(self.clean_pass)} forwards: {self.fps:.2f} FPS, "
            f"{self.period:.1f} ms a chunk of "
            f"{TIME_STRIDE * self.chunk} pixel frames",
            f"floor {self.floor:.1f} ms: {self.floor / self.period:.0%}" if self.floor else "",
            f"Python and calls {self.host:.1f} ms: {self.host / self.period:.0%}" if self.host else "",
            f"keys to host {self.latency:.1f} ms, p99 {self.p99:.1f}",
            f"first chunk {self.first:.0f} ms, cold {self.cold:.1f} s, recording {self.recorded:.1f} s"
            if self.cold
            else "",
            f"{self.peak_gib:.1f} GiB",
            f"n={self.chunks}",
            stages,
        ]
        return " | ".join(part for part in parts if part)


class Clock:
    """Times of named points on a device, read only when asked for: events on a GPU, the clock on a CPU."""

    def __init__(self, device: torch.device):
        self._gpu = device.type == "cuda"
        self.clear()

    def clear(self) -> None:
        self._points: list[tuple[str, object]] = []

    def __call__(self, name: str) -> None:
        if not self._gpu:
            self._points.append((name, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._points.append((name, event))

    def stages(self, start: str) -> dict[str, list[float]]:
        """Milliseconds from each point to the one before it, by name; `start` is no stage, but begins a round."""
        if self._gpu:
            torch.cuda.synchronize()
        spans: dict[str, list[float]] = {}
        for (_, before), (name, after) in zip(self._points, self._points[1:], strict=False):
            if name != start:
                ms = before.elapsed_time(after) if self._gpu else 1000 * (after - before)
                spans.setdefault(name, []).append(ms)
        return spans


class Screen:
    """Latents to uint8 pixel frames on the host; on a GPU beside the main stream, so that it overlaps what follows."""

    def __init__(self, pictures: PictureStream | PlainPictures, device: torch.device):
        self._shown = parallel.place()[0] == 0
        self._pictures = pictures
        self._gpu = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if self._gpu else None
        self.clock = Clock(device)

    def reset(self) -> None:
        self._pictures.reset()
        self.clock.clear()

    def show(self, x0: Tensor) -> Callable[[], np.ndarray]:
        """Begin to decode x0 [1, 16, f, h, w]; what is returned waits for the pixel frames u8 [n, H, W, 3]. Of several
        processes only the first one decodes."""
        if not self._shown:
            return lambda: None
        if not self._gpu:
            frames = self._decoded(x0).numpy().copy()
            return lambda: frames
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            frames = self._decoded(x0)
            x0.record_stream(self._side)
            host = torch.empty(frames.shape, dtype=torch.uint8, pin_memory=True)
            host.copy_(frames, non_blocking=True)
            there = torch.cuda.Event()
            there.record()

        def wait() -> np.ndarray:
            there.synchronize()
            return host.numpy()

        return wait

    @torch.no_grad()
    def _decoded(self, x0: Tensor) -> Tensor:
        self.clock("begin")
        frames = self._pictures(x0)
        self.clock("decode")
        return frames


class Loop:
    """Plays with made-up keys: each step is a chunk's way from keys to frames on the host, and then its clean pass.

    While a clean pass runs, the host has time to take the frames and begin the next chunk. Where none follows the last
    step, the device would stand still meanwhile: with `ahead`, a chunk is begun before the one before it is taken.
    """

    def __init__(self, engine: Engine | Plain, screen: Screen, preset: Preset, steps: int, *, ahead: bool = False):
        self._ahead = int(ahead)
        self._due: deque[tuple[float, Callable[[], np.ndarray]]] = deque()
        self.engine, self.screen, self.steps, self.frames = engine, screen, steps, preset.stream.chunk
        self._preset = preset
        self._path = live_path(preset, engine.device)
        self._aside = torch.cuda.Stream(engine.device) if engine.device.type == "cuda" else None
        self._noise = torch.Generator(device=engine.device)
        self.clock = engine.mark = Clock(engine.device)
        size = preset.model
        self._condition = self._draw(MASK_CHANNELS + LATENT_CHANNELS)
        engine.prompt(torch.randn(1, size.text_len, size.text_dim, generator=self._noise, device=engine.device))
        self.reset()

    def reset(self) -> None:
        self._due.clear()
        self._noise.manual_seed(0)
        self._keys = np.random.default_rng(0)
        self.engine.reset()
        self.screen.reset()
        self.clock.clear()
        self._path.reset()

    def _draw(self, *sizes: int) -> Tensor:
        preset = self._preset
        cells = (self.frames, preset.shape.latent_height, preset.shape.latent_width)
        return torch.randn(1, *sizes, *cells, generator=self._noise, device=self.engine.device)

    def _rows(self) -> np.ndarray:
        count = TIME_STRIDE * self.frames - (0 if self._path.frames else TIME_STRIDE - 1)
        return np.repeat(self._keys.random((1, len(KEYS))) < 0.3, count, axis=0)

    def _control(self, rows: np.ndarray) -> Tensor | None:
        if not self._preset.model.control_channels:
            return None
        if not self._aside:
            return self._path.push(rows)[None]
        # Poses come from the host, and copying them waits for the stream they are copied on: not for the last pass.
        with torch.cuda.stream(self._aside):
            control = self._path.push(rows)[None]
        torch.cuda.current_stream().wait_stream(self._aside)
        control.record_stream(torch.cuda.current_stream())
        return control

    def step(self) -> tuple[float, np.ndarray] | None:
        """One chunk: seconds from keys to frames, and the frames. Its clean pass may still be running then. With
        `ahead` it is the chunk before this one, and at first nothing."""
        rows = self._rows()
        began = time.perf_counter()
        self.clock("begin")
        control = self._control(rows)
        noise, fresh = self._draw(LATENT_CHANNELS), self._draw(self.steps - 1, LATENT_CHANNELS)
        self.clock("keys")
        x0 = self.engine.denoise(noise, fresh.transpose(0, 1), control, self._condition)
        self._due.append((began, self.screen.show(x0)))
        self.clock("hand over")
        self.engine.finish()
        return self.take() if len(self._due) > self._ahead else None

    def take(self) -> tuple[float, np.ndarray]:
        """What `step` returns, for the oldest chunk that has not been taken."""
        began, wait = self._due.popleft()
        frames = wait()
        return time.perf_counter() - began, frames

    def fills(self) -> int:
        """Chunks until the window is full and the sink left behind: from then on all are alike."""
        return -(-self._preset.stream.window // self.frames) + 1

    def skip_past(self) -> None:
        """Pretend that the window is full: what is cached does not matter to the clock."""
        self.engine.cache.frames_seen = self.fills() * self.frames


def time_stream(loop: Loop, name: str, chunks: int, floor: float = 0.0) -> Row:
    """A stream from its first chunk on: once to compile everything, once to record it, then `chunks` chunks of the
    steady state after those that fill the window."""
    sync = synchroniser(loop.engine.device)
    cold, recorded = (_seconds(lambda: _play_start(loop), sync) for _ in range(2))
    loop.reset()
    sync()
    first = (loop.step() or loop.take())[0]
    for _ in range(loop.fills()):
        loop.step()
    return replace(time_steady(loop, name, chunks, floor), first=1000 * first, cold=cold, recorded=recorded)


def time_steady(loop: Loop, name: str, chunks: int, floor: float = 0.0) -> Row:
    """`chunks` chunks of a stream as it stands."""
    device, sync = loop.engine.device, synchroniser(loop.engine.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    loop.step()
    sync()
    loop.clock.clear()
    loop.screen.clock.clear()
    began, latencies, ends = time.perf_counter(), [], []
    for _ in range(chunks):
        latencies.append(1000 * loop.step()[0])
        ends.append(1000 * (time.perf_counter() - began))
    sync()
    ends[-1] = 1000 * (time.perf_counter() - began)
    stages = {**loop.clock.stages("begin"), **loop.screen.clock.stages("begin")}
    return Row(
        name=name,
        steps=loop.steps,
        chunk=loop.frames,
        fps=1000 * TIME_STRIDE * loop.frames * chunks / ends[-1],
        period=float(np.median(np.diff(ends, prepend=0.0))),
        latency=float(np.median(latencies)),
        p99=float(np.percentile(latencies, 99)),
        peak_gib=torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0,
        chunks=chunks,
        stages={stage: float(np.median(times)) for stage, times in stages.items()},
        floor=floor,
    )


def _play_start(loop: Loop) -> None:
    loop.reset()
    for _ in range(loop.fills() + 1):
        loop.step()


def _seconds(run: Callable[[], object], sync: Callable[[], None]) -> float:
    sync()
    began = time.perf_counter()
    run()
    sync()
    return time.perf_counter() - began


# -- the floor --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rate:
    """One kind of work alone on this machine: `calls` a layer and forward (`once`: a chunk), ms of one, TFLOP/s."""

    name: str
    calls: int
    ms: float
    tflops: float
    once: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {self.ms:.3f} ms, {self.tflops:.1f} TFLOP/s"


def _product(rows: int, inside: int, columns: int, device, dtype) -> Callable[[], Tensor]:
    x = torch.randn(rows, inside, device=device).to(dtype)
    weight, bias = torch.randn(columns, inside, device=device).to(dtype), torch.randn(columns, device=device).to(dtype)
    return lambda: F.linear(x, weight, bias)


def _product_fp8(rows: int, inside: int, columns: int, device, dtype) -> Callable[[], Tensor]:
    x, weight = (torch.randn(n, inside, device=device).to(E4M3) for n in (rows, columns))
    scales, weight_scales = torch.ones(rows, 1, device=device), torch.ones(1, columns, device=device)
    bias = torch.zeros(columns, device=device, dtype=dtype)
    return lambda: scaled_product(x, scales, weight, weight_scales, bias)


def _attention(queries: int, keys: int, size: ModelSize, device, dtype, format: Format) -> Callable[[], Tensor]:
    q, k, v = (torch.randn(1, n, size.heads, size.head_dim, device=device).to(dtype) for n in (queries, keys, keys))
    q, k, v = format.lower_qk(q), format.lower_qk(k), format.lower_v(v)
    return lambda: format.attend(q, k, v)


def linear_rates(preset: Preset, device, dtype, product=_product, label: str = "") -> Iterator[Rate]:
    """The matrix products of a layer at the preset's shapes."""
    d, ffn = preset.model.dim, preset.model.ffn_dim
    rows = preset.stream.chunk * preset.shape.tokens_per_frame
    shapes = {"q k v": (1, d, 3 * d), "d x d": (3, d, d), "ffn up": (1, d, ffn), "ffn down": (1, ffn, d)}
    for name, (calls, inside, columns) in shapes.items():
        ms = _alone(product(rows, inside, columns, device, dtype), device)
        yield Rate(f"{label}{name} {rows}x{inside}x{columns}", calls, ms, 2e-9 * rows * inside * columns / ms)
        if name == "d x d" and preset.model.control_channels:
            yield Rate(f"{label}camera", 4, ms, 2e-9 * rows * inside * columns / ms, once=True)


def attention_rates(preset: Preset, device, dtype, format: Format = USUAL) -> Iterator[Rate]:
    """Self-attention over a full window and cross-attention over the text, at the preset's shapes. In 8 bits the
    second is of no use but to compare."""
    size, tokens = preset.model, preset.shape.tokens_per_frame
    queries = preset.stream.chunk * tokens
    for name, keys in (("self-attention", preset.stream.window * tokens), ("text attention", size.text_len)):
        ms = _alone(_attention(queries, keys, size, device, dtype, format), device)
        kernel = "fp8" if format.dtype else backend(device, dtype, size.head_dim)
        yield Rate(f"{name} {queries} over {keys} ({kernel})", 1, ms, 4e-9 * queries * keys * size.dim / ms)


IN_A_ROW = 20
"""Calls that a GPU is timed over."""


def _alone(run: Callable[[], object], device: torch.device, calls: int | None = None) -> float:
    """Milliseconds of one call. A GPU makes many in a row, recorded: launched one by one, calls of 0.1 ms would be
    timed as slow as the host is."""
    calls = calls or (IN_A_ROW if device.type == "cuda" else 1)

    def row() -> None:
        for _ in range(calls):
            run()

    again = partial(Recorder().repeated(row), None) if device.type == "cuda" else row
    return _median_ms(again, device) / calls


@torch.no_grad()
def _median_ms(run: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    for _ in range(3):
        run()
    clock = Clock(device)
    for _ in range(repeats):
        clock("begin")
        run()
        clock("run")
    return float(np.median(clock.stages("begin")["run"]))


def floor_ms(rates: Sequence[Rate], layers: int, forwards: int) -> float:
    """Milliseconds of a chunk's matrix products and attentions on one device, each at its own best rate."""
    return layers * sum(rate.calls * rate.ms * (1 if rate.once else forwards) for rate in rates)


# -- the whole bench --------------------------------------------------------------------------------------------------


Decoder = Callable[[Preset, torch.device, torch.dtype], nn.Module]
"""Makes a decoder of fresh weights for a preset."""


@dataclass(frozen=True)
class Order:
    """What to measure: see the command's help. `decoder` None: `usual_decoder`."""

    preset: Preset
    steps: tuple[int, ...] = (4,)
    speed: Speed = Speed()
    chunks: int = 20
    plain_chunks: int = 2
    check: int = 0
    profile: bool = False
    clean_pass: bool = True
    ladder: bool = False
    each_clean_pass: bool = False
    decoder: Decoder | None = None

    @property
    def whole(self) -> bool:
        """Whether anything needs the network as it is, beside what the engine makes of it."""
        return bool(self.plain_chunks or self.check or self.ladder)


RUNGS = {
    "graph": "a chunk's passes as CUDA graphs",
    "compile": "compiled pieces",
    "join": "q, k, v as one product",
    "kernel": "one kernel from q, k, v to attention",
    "fp8": "fp8 products",
    "fp8_attention": "fp8 attention",
    "merge": "clean pass merged",
    "first": "passes before the decoder",
}
"""What each of Speed's options adds, in the order in which a ladder adds them."""


def rungs(speed: Speed, device: torch.device) -> Iterator[tuple[str, Speed]]:
    """From the engine with all its options off to `speed`, one option more at a time: (what is new, options)."""
    climbed = Speed(**dict.fromkeys(RUNGS, False))
    yield "work that no step changes, once", climbed
    for option, name in RUNGS.items():
        if getattr(speed, option) and (option not in ("graph", "kernel", "first") or device.type == "cuda"):
            climbed = replace(climbed, **{option: True})
            yield name, climbed


def check_fits(order: Order, available: float, *, ranks: int = 1, value_bytes: int = 2) -> None:
    """RuntimeError where `available` bytes a GPU do not hold what `order` builds: it says what would fit, or which flag
    asks for too much."""
    decoder = _maps(order)
    check_memory(order.preset, available, order.speed, ranks=ranks, value_bytes=value_bytes, decoder=decoder)
    for flag, need in beyond_the_engine(order, ranks=ranks, value_bytes=value_bytes):
        if need.total > available:
            raise RuntimeError(
                f"{flag} needs {need} on each GPU, and {available / GIB:.0f} GiB are free: the engine alone would fit, "
                "so leave that out (--plain-chunks 0 for the plain path)"
            )


def _maps(order: Order) -> Callable[[VideoShape, int], float]:
    return wan_maps if order.decoder in (wan_decoder, plain_wan_decoder) else taehv_maps


def beyond_the_engine(order: Order, *, ranks: int = 1, value_bytes: int = 2) -> Iterator[tuple[str, Need]]:
    """What the bench builds besides the engine alone: the flag that asks for it, and what that needs on each GPU."""
    preset, speed = order.preset, order.speed
    shared = dict(value_bytes=value_bytes, decoder=_maps(order))
    plainly = needed_plainly(preset, **shared)
    both = needed(preset, speed, ranks=ranks, beside=True, **shared)
    if order.plain_chunks:
        yield "the plain path", plainly
    if order.whole:
        yield "building the engine beside the network as it is", Need(both.weights)
    for _, climbed in rungs(speed, torch.device("cuda")) if order.ladder else ():
        yield "--ladder", needed(preset, climbed, ranks=ranks, beside=True, **shared)
    if order.each_clean_pass:
        merged = replace(speed, merge=True)
        yield "--each-clean-pass", needed(preset, merged, ranks=ranks, beside=bool(order.check), **shared)
    if order.check:
        yield "--check", both + replace(plainly, weights=0, decoder=0)


def random_dit(size: ModelSize, device: torch.device, dtype: torch.dtype) -> DiT:
    """A network of fresh weights made where it is used; its head is not zero, so that every layer counts."""
    torch.manual_seed(0)
    dit = DiT(size, device=device, dtype=dtype).eval().requires_grad_(False)
    nn.init.normal_(dit.head.head.weight, std=size.dim**-0.5)
    return dit


def made_up(device: torch.device, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Fills a network of the meta device layer by layer (see `FusedDiT`): seeded noise of a fresh network's size."""
    make = torch.Generator(device=device).manual_seed(0)

    def to(tensor: Tensor) -> Tensor:
        drawn = torch.randn(tensor.shape, generator=make, device=device, dtype=dtype)
        return drawn * max(tensor.shape[-1], 1) ** -0.5

    return to


def usual_decoder(preset: Preset, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The tiny world's own decoder, or for all others a TAEHV."""
    torch.manual_seed(0)
    tiny = preset.model.control_channels == TINY
    decoder = (TinyVAE() if tiny else TAEHV()).eval().requires_grad_(False).to(device, dtype)
    return decoder.to(memory_format=torch.channels_last)


def wan_decoder(preset: Preset, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The Wan VAE, laid out channels-last."""
    return plain_wan_decoder(preset, device, dtype).channels_last()


def plain_wan_decoder(preset: Preset, device: torch.device, dtype: torch.dtype) -> WanVAE:
    """The Wan VAE in torch's usual layout: what `wan_decoder` is measured against."""
    torch.manual_seed(0)
    return WanVAE.build(device=device).to(dtype)


def run(
    order: Order,
    device: torch.device,
    dtype: torch.dtype,
    say: Say = print,
    save: Callable[[dict], object] = lambda found: None,
) -> dict:
    """Measures everything that `order` asks for; `save` is given all that is known, again with every row."""
    preset = order.preset
    began = time.perf_counter()
    if device.type == "cuda":
        check_fits(order, torch.cuda.mem_get_info(device)[0], ranks=parallel.place()[1], value_bytes=dtype.itemsize)
    # The plain path needs the network as it is. Without it no more is ever held than what the engine runs on.
    whole = order.whole or device.type == "cpu"
    dit = random_dit(preset.model, device, dtype) if whole else DiT(preset.model, device="meta")
    decoder = (order.decoder or usual_decoder)(preset, device, dtype)
    screen = Screen(picture_stream(decoder, graph=order.speed.graph), device)
    weights = sum(p.numel() for p in dit.parameters())
    said = _conditions(preset, device, dtype, **({"decoder": type(decoder).__name__} if order.decoder else {}))
    say(f"{said}\n{weights / 1e9:.2f} B parameters after {time.perf_counter() - began:.1f} s")
    found = {"conditions": said, "rates": [], "rows": [], "decoder_ms": decoder_ms(decoder, order, device)}
    say(f"a chunk's pictures, decoded with nothing beside: {found['decoder_ms']:.2f} ms")
    _release()

    def measured(rates: Iterator[Rate]) -> list[Rate]:
        known = []
        for rate in rates:
            say(str(rate))
            found["rates"].append(asdict(rate))
            known.append(rate)
        _release()
        return known

    plain = measured(linear_rates(preset, device, dtype))
    has_fp8 = product_for(device) is scaled_product
    fp8 = measured(linear_rates(preset, device, dtype, _product_fp8, "fp8 ")) if has_fp8 else plain
    attentions = measured(attention_rates(preset, device, dtype))

    def keep(row: Row, way: Order | None = None) -> None:
        host = host_ms(way, row.steps, dtype) if way and device.type == "cpu" else 0.0
        row = replace(row, clean_pass=not way or way.clean_pass, host=host)
        say(str(row))
        found["rows"].append(asdict(row))
        save(found)

    def floor(linears: list[Rate], steps: int, way: Order = order) -> float:
        return floor_ms([*linears, *attentions], preset.model.layers, steps + way.clean_pass) / parallel.place()[1]

    if order.plain_chunks:
        keep(
            _plain_row(
                dit,
                Screen(PlainPictures(decoder), device),
                order,
                order.steps[0],
                floor(plain, order.steps[0]) * parallel.place()[1],
            )
        )
        _release()
    climbing = [*rungs(order.speed, device)] if order.ladder else []
    for added, speed in climbing[:-1]:
        linears, way = fp8 if speed.fp8 else plain, replace(order, speed=speed)
        keep(_rung(dit, f"+ {added}", way, screen, floor(linears, order.steps[0])), way)
        _release()
    to = as_it_is if whole else made_up(device, dtype)
    net = fast(dit, order.speed, share=HeadShare.here(), to=to)
    if not order.check:
        del dit
        _release()
    if net.share.format.dtype:
        measured(attention_rates(preset, device, dtype, net.share.format))
    linears = fp8 if order.speed.fp8 else plain
    for way in clean_passes(order):
        name = f"+ {climbing[-1][0]}" if climbing and way is order else _name(net, way)
        for count in order.steps:
            loop = _loop(net, way, count, screen)
            bound = floor(linears, count, way)
            if way is order and count == order.steps[0]:
                keep(time_stream(loop, name, order.chunks, bound), way)
                if order.profile:
                    found["kernels"] = kernel_times(loop, say)
            else:
                _warm(loop)
                keep(time_steady(loop, name, order.chunks, bound), way)
            del loop
            _release()
    if order.check:
        found["layers"] = layer_errors(dit, net, order, say)
        found["check"] = compare(dit, net, order, say)
        save(found)
    return found


def clean_passes(order: Order) -> Iterator[Order]:
    """The order itself, and if it asks for each way with the clean pass, those that it does not use already."""
    yield order
    if order.each_clean_pass:
        merged = replace(order, speed=replace(order.speed, merge=True), clean_pass=True)
        apart = replace(merged, speed=replace(order.speed, merge=False))
        yield from (way for way in (apart, merged, replace(apart, clean_pass=False)) if way != order)


def _name(net: FusedDiT, order: Order) -> str:
    # Asked for is not always had: without a kernel for it, attention stays as it was.
    name = "engine fp8" if order.speed.fp8 else "engine"
    name += " + fp8 attention" if net.share.format.dtype else ""
    name += " first" if order.speed.first else ""
    return name + (" merged" if order.speed.merge else "")


def decoder_ms(decoder: nn.Module, order: Order, device: torch.device) -> float:
    """Milliseconds that a chunk's latents take to become pictures in memory of the device, as a stream decodes them."""
    shape, frames = order.preset.shape, order.preset.stream.chunk
    latents = torch.randn(1, LATENT_CHANNELS, frames, shape.latent_height, shape.latent_width, device=device)
    pictures = picture_stream(decoder, graph=order.speed.graph)
    return _median_ms(lambda: pictures(latents), device, repeats=5)


def host_ms(order: Order, steps: int, dtype: torch.dtype) -> float:
    """Milliseconds of a chunk on a CPU that are no arithmetic of the network: what the same calls take where there is
    next to nothing to compute, as many layers of 16 channels over one token a frame. The decoder is not counted.

    It is an upper bound: the little that is computed counts, and so does torch's own way into each operator.
    """
    preset = order.preset
    small = replace(preset.model, dim=16, heads=1, ffn_dim=16)
    preset = replace(preset, model=small, shape=VideoShape(16, 16, preset.shape.pixel_frames))
    cpu = torch.device("cpu")
    net = fast(random_dit(small, cpu, dtype), order.speed)
    screen = Screen(PlainPictures(TinyVAE(MICRO_VAE).eval()), cpu)
    loop = _loop(net, replace(order, preset=preset), steps, screen)
    _warm(loop)
    stages = time_steady(loop, "host", max(order.chunks, 5)).stages
    return sum(ms for stage, ms in stages.items() if stage != "decode")


def _loop(net: FusedDiT, order: Order, steps: int, screen: Screen) -> Loop:
    # What no pass after the last step gives the host time for must be begun before.
    ahead = order.speed.merge or not order.clean_pass
    return Loop(_engine(net, order, steps), screen, order.preset, steps, ahead=ahead)


def _release() -> None:
    # An engine and its recordings hold each other; their memory is the next one's.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _engine(net, order: "Order", steps: int) -> Engine:
    preset, speed = order.preset, order.speed
    options = dict(graph=speed.graph, merge=speed.merge, first=speed.first, clean_pass=order.clean_pass)
    return Engine(net, preset.stream, preset.shape, _schedule(preset, steps), **options)


def _schedule(preset: Preset, steps: int):
    return few_steps(preset.flow.labels(steps), preset.flow.shift)


def _plain_row(dit: DiT, screen: Screen, order: Order, steps: int, floor: float) -> Row:
    preset = order.preset
    loop = Loop(Plain(dit, preset.stream, preset.shape, _schedule(preset, steps)), screen, preset, steps)
    _warm(loop, 1)
    return time_steady(loop, "plain", order.plain_chunks, floor)


def _rung(dit: DiT, name: str, order: Order, screen: Screen, floor: float) -> Row:
    steps = order.steps[0]
    loop = _loop(fast(dit, order.speed, share=HeadShare.here()), order, steps, screen)
    _warm(loop)
    return time_steady(loop, name, order.chunks, floor)


def _warm(loop: Loop, chunks: int = 3) -> None:
    """Only what the steady state needs: a first chunk, and then as if the window had filled."""
    loop.step()
    loop.skip_past()
    for _ in range(chunks):
        loop.step()


# -- what eats the time, and whether it is right ----------------------------------------------------------------------


def kernel_times(loop: Loop, say: Say, most: int = 25) -> list[tuple[str, int, float]]:
    """Kernels of one steady chunk by the time they take: (name, calls, ms), the longest first; GPU only."""
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            loop.step()
            torch.cuda.synchronize()
    except RuntimeError as error:
        say(f"no list of kernels: {error}")
        return []
    kernels = [(e.key, e.count, e.self_device_time_total / 1000) for e in seen.key_averages()]
    kernels.sort(key=lambda kernel: -kernel[2])
    for name, calls, ms in kernels[:most]:
        say(f"{ms:9.2f} ms {calls:6d} x {name[:110]}")
    return kernels


@torch.no_grad()
def layer_errors(dit: DiT, net: FusedDiT, order: Order, say: Say) -> list[float]:
    """Relative error of what each layer of the engine adds to a random residual stream in a stream's second chunk, by
    the engine's own pieces and kernels, each path on its own cache."""
    preset, device = order.preset, net.device
    make = torch.Generator(device=device).manual_seed(2)
    words, (noise, _, control, _) = next(_inputs(preset, 1, 1, make))
    frames, dtype = noise.shape[2], net.share.format.dtype or net.dtype
    size = 1, frames * preset.shape.tokens_per_frame, preset.model.dim
    time, moment = dit.time(torch.tensor(500.0, device=device)), net.moment(500.0)
    text, own_text = dit.text(words), net.text(words)
    camera, films = (None, None) if control is None else (dit.camera_tokens(control), net.film(control))
    past = KVCache(dit.size, preset.stream, preset.shape, device=device, dtype=net.dtype)
    own_past = KVCache(net.share.size(net.size), preset.stream, preset.shape, device=device, dtype=dtype)
    for _ in range(2):
        errors = []
        past.begin(frames)
        net.move_sinks(own_past.begin(frames, move_sink=False).sight)
        for index, layer in enumerate(dit.blocks):
            x = torch.randn(size, generator=make, device=device)
            plain = layer(x, time.layers, None, text.layers[index], camera, None, (past, index)) - x
            other = net.one_layer(index, net.share.part(x), moment, own_text, films, own_past.sight)
            errors.append(((net.share.whole(other) - x - plain).norm() / plain.norm()).item())
        past.commit()
        own_past.commit()
    say(f"what a layer adds differs by {np.median(errors):.2e} of its size, most {max(errors):.2e} "
        f"in layer {int(np.argmax(errors))}")  # fmt: skip
    return errors


def compare(dit: DiT, net, order: Order, say: Say) -> dict[str, list[float]]:
    """Relative error of the engine's x0 over `order.check` chunks, each path on its own past. On a GPU the yardstick is
    the plain path in fp32, whose distance to plain bf16 is shown beside it, where memory allows."""
    preset, count = order.preset, order.steps[0]
    settings = preset.stream, preset.shape, _schedule(preset, count)
    paths = {"plain": Plain(dit, *settings), "engine": _engine(net, order, count)}
    if dit.patch_embedding.weight.dtype != torch.float32 and _fits_fp32(dit, preset):
        paths = {"plain fp32": Yardstick(copy.deepcopy(dit).float(), *settings), **paths}
    errors: dict[str, list[float]] = {name: [] for name in list(paths)[1:]}
    make = torch.Generator(device=net.device).manual_seed(1)
    began = time.perf_counter()
    for number, inputs in enumerate(_inputs(preset, count, order.check, make), start=1):
        given, *others = (_one_chunk(path, *inputs) for path in paths.values())
        for name, x0 in zip(errors, others, strict=True):
            errors[name].append(((x0 - given).norm() / given.norm()).item())
        if number % _TOLD_EVERY == 1:
            apart = ", ".join(f"{name} {found[-1]:.2e}" for name, found in errors.items())
            say(f"compared {number} of {order.check} chunks after {time.perf_counter() - began:.0f} s: {apart}")
    for name, found in errors.items():
        say(f"{name} against {next(iter(paths))}: x0 differs by {np.median(found):.2e}, most {max(found):.2e}, "
            f"last {found[-1]:.2e} of its size over {order.check} chunks")  # fmt: skip
    return errors


_TOLD_EVERY = 5
"""Chunks after which a comparison says how far it is."""


class Yardstick(Plain):
    """The plain path in fp32, quick enough for forty chunks: on a GPU its products are rounded to 11 bits, eight times
    finer than bf16's 8, and attention is written out, for only so do its products run at that rate."""

    def denoise(self, *given: Any) -> Tensor:
        with _eleven_bits():
            return super().denoise(*given)

    def finish(self) -> None:
        with _eleven_bits():
            super().finish()


@contextmanager
def _eleven_bits() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _fits_fp32(dit: DiT, preset: Preset) -> bool:
    weight, tokens = dit.patch_embedding.weight, preset.shape.tokens_per_frame
    free = torch.cuda.mem_get_info(weight.device)[0] if weight.is_cuda else 2**34
    scores = dit.size.heads * preset.stream.chunk * preset.stream.window * tokens**2
    return 4 * (sum(p.numel() for p in dit.parameters()) + 3 * scores) < 0.7 * free


def _inputs(preset: Preset, steps: int, chunks: int, make: torch.Generator) -> Iterator[tuple]:
    size, frames = preset.model, preset.stream.chunk
    cells = (frames, preset.shape.latent_height, preset.shape.latent_width)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=make, device=make.device)

    words, condition = draw(1, size.text_len, size.text_dim), draw(1, MASK_CHANNELS + LATENT_CHANNELS, *cells)
    for _ in range(chunks):
        control = draw(1, size.control_channels * SPACE_STRIDE**2, *cells) if size.control_channels else None
        noise, fresh = draw(1, LATENT_CHANNELS, *cells), draw(steps - 1, 1, LATENT_CHANNELS, *cells)
        yield words, (noise, fresh, control, condition)


def _one_chunk(path: Engine | Plain, words: Tensor, given: tuple) -> Tensor:
    if not path.cache.frames_seen:
        path.prompt(words)
    x0 = path.denoise(*given)
    path.finish()
    return x0


def _conditions(preset: Preset, device: torch.device, dtype: torch.dtype, **more: str) -> str:
    from lingbot_nb.report.figures import conditions

    stream = preset.stream
    return conditions(
        preset,
        device,
        dtype,
        chunk=stream.chunk,
        window=stream.window,
        sink=stream.sink,
        layers=preset.model.layers,
        attention=backend(device, dtype, preset.model.head_dim),
        processes=parallel.place()[1],
        **more,
    )


# -- the command ------------------------------------------------------------------------------------------------------


def order_of(options: argparse.Namespace) -> Order:
    """What the flags ask for."""
    return Order(
        preset=_preset(options),
        steps=options.steps,
        speed=Speed(
            compile=not options.no_compile,
            graph=not options.no_graph,
            join=not options.no_join,
            fp8=options.fp8,
            merge=options.merge,
            fp8_attention=options.fp8_attention,
            kernel=not options.no_kernel,
            first=options.first,
        ),
        chunks=options.chunks,
        plain_chunks=options.plain_chunks,
        check=options.check,
        profile=options.profile,
        clean_pass=not options.no_clean_pass,
        ladder=options.ladder,
        each_clean_pass=options.each_clean_pass,
        decoder=DECODERS[options.decoder] if options.decoder else None,
    )


DECODERS: Mapping[str, Decoder] = {"taehv": usual_decoder, "wan": wan_decoder, "wan-plain": plain_wan_decoder}
"""By what the command calls them."""


def _preset(options: argparse.Namespace) -> Preset:
    preset = presets.by_name(options.preset)
    height, width = options.height or preset.shape.height, options.width or preset.shape.width
    given = {name: getattr(options, name) for name in ("chunk", "window", "sink")}
    stream = {name: value for name, value in given.items() if value is not None}
    return steady(
        replace(
            preset,
            shape=VideoShape(height, width, preset.shape.pixel_frames),
            model=replace(preset.model, layers=options.layers or preset.model.layers),
            stream=replace(preset.stream, **stream),
        )
    )


def steady(preset: Preset) -> Preset:
    """A preset whose first chunk is like all others: another length would be one more shape to compile, and no more to
    learn."""
    return replace(preset, stream=replace(preset.stream, image_first=False))


def command(options: argparse.Namespace) -> int:
    """`python -m lingbot_nb bench stream`."""
    rank, _, device = parallel.start()
    order, first = order_of(options), rank == 0
    dtype = _KINDS[options.dtype] if options.dtype else _fastest_dtype(order, device)
    found = run(
        order,
        device,
        dtype,
        say=(lambda text: print(text, flush=True)) if first else _silent,
        save=partial(runs.write_json, options.out) if first and options.out else _silent,
    )
    if options.out and first:
        print(f"{options.out}, {draw(found, options.out.with_suffix('.png'))}")
    return 0


_KINDS = {"bf16": torch.bfloat16, "fp32": torch.float32}


def _silent(what: object) -> None:
    pass


def _fastest_dtype(order: Order, device: torch.device) -> torch.dtype:
    """bf16 on a GPU. On a CPU what a probe of a few seconds finds, and with it the number of threads to use."""
    if device.type == "cuda":
        return torch.bfloat16

    def make(dtype: torch.dtype) -> Callable[[], object]:
        net = fast(random_dit(order.preset.model, device, dtype), SMALL)
        screen = Screen(PlainPictures(usual_decoder(order.preset, device, dtype)), device)
        return Loop(_engine(net, order, 1), screen, order.preset, 1).step

    choice = choose_dtype(make, seconds=2.0)
    torch.set_num_threads(choice.threads)
    tried = ", ".join(f"{kind} with {threads}: {ms:.0f}" for (kind, threads), ms in choice.milliseconds.items())
    print(f"ms a chunk of one step, by dtype and threads: {tried}".replace("torch.", ""), flush=True)
    return choice.dtype


def table(files: Iterable[Path]) -> str:
    """Saved benches as Markdown: what each stream reached with all its options, the largest pictures last."""
    heads = (
        "picture",
        "GPUs",
        "window, sink",
        "forwards",
        "FPS",
        "of the floor",
        "ms a chunk",
        "GiB a GPU",
        "Python, ms",
    )
    found = [json.loads(path.read_text()) for path in files]
    return markdown_table(heads, sorted((line for each in found for line in _lines(each)), key=_area))


def _lines(found: Mapping) -> Iterator[tuple[str, ...]]:
    name, picture, _, gpu, *rest = found["conditions"].split(" · ")
    told = dict(part.split(" ", 1) for part in rest)
    rungs = [row["name"] for row in found["rows"] if row["name"].startswith("+ ")]
    for row in found["rows"]:
        # The plain path and a ladder's lower rungs are another table's.
        if row["name"] != "plain" and row["name"] not in set(rungs) - set(rungs[-1:]):
            yield (
                f"{picture.split(',')[0]}, {name}",
                f"{told['processes']} x {gpu}",
                f"{told['window']}, {told['sink']}",
                f"{row['steps']} + {int(row['clean_pass'])}{', merged' * row['name'].endswith('merged')}",
                f"{row['fps']:.1f}",
                f"{row['floor'] / row['period']:.0%}",
                f"{row['period']:.0f}",
                f"{row['peak_gib']:.0f}",
                f"{row['host']:.1f}" if row.get("host") else "–",
            )


def _area(line: Sequence[str]) -> int:
    height, width = line[0].split(",")[0].split("x")
    return int(height) * int(width)


def draw(found: dict, path: Path) -> Path:
    """The stages of every row as bars over time, against the milliseconds that a chunk lasts on screen."""
    from lingbot_nb.report import figures

    rows = found["rows"]
    budget = 1000 * TIME_STRIDE * rows[0]["chunk"] / FPS
    names = ", ".join(f"{row['name']} {row['steps']}+{int(row['clean_pass'])}" for row in rows)
    ax = figures.latency_waterfall([row["stages"] for row in rows], budget_ms=budget, title=names)
    ax.figure.savefig(path, dpi=110, bbox_inches="tight")
    return path
