"""A world that is being played: keys in, pixel frames out. Knows nothing of widgets, threads or notebooks.

A chunk costs one denoising pass per step and a clean pass that writes the cache. `generate` returns the pixel frames
before the clean pass, `finish` does it: the player shows the one while the other runs; `step` is both. On a CPU with
a core to spare the clean pass runs beside the decoder, and `finish` waits for what is left of it.
"""

import copy
import json
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lingbot_nb.control import camera
from lingbot_nb.control.keys import KEYS, check_keys, held
from lingbot_nb.distill.flow import FewStep, few_steps
from lingbot_nb.model.dit import DiT
from lingbot_nb.model.fused import ALONE, Alone
from lingbot_nb.model.kv_cache import KVCache
from lingbot_nb.model.vae import from_uint8
from lingbot_nb.presets import FPS, LATENT_CHANNELS, TIME_STRIDE, Preset, StreamSettings, VideoShape
from lingbot_nb.stream.engine import Engine, Plain, Speed, StreamingDiT, fast
from lingbot_nb.stream.engine_decoder import picture_stream

TINY_INTRINSICS = (66.67, 80.0, 80.0, 48.0)
"""fx, fy, cx, cy of the tiny world's pictures, at `TINY_SIZE`."""
TINY_SIZE = (96, 160)
LINGBOT_INTRINSICS = (502.91, 503.11, 415.778, 239.778)
"""fx, fy, cx, cy of most released examples, at `camera.SOURCE_SIZE`."""

ACT, CAM, TINY = 7, 6, 10

LONGEST_WINDOW, LONGEST_SINK = 21, 3
"""Latent frames that a session remembers, so that window and sink can be changed in mid-stream."""
LONGEST_CHUNK = 3
"""Latent frames that a player offers to denoise together."""

Newer = Callable[[], "Iterable[str] | np.ndarray | None"]
"""Keys that a chunk which has just begun should rather be made under; None for those it was given."""

SPARE = 0.95
"""Part of a chunk's playing time that may be spent on making it: the rest forgives a hiccup."""
ROOM = 0.6
"""The same with a page that draws the pictures on the same cores, which slows the model by a third."""


@dataclass(frozen=True)
class Recording:
    """All that a stretch of play needs to be played again: what it started from, every key, every change on the way.

    start u8 [m, H, W, 3], a picture (m = 1) or a clip; keys bool [n, 8], one row per pixel frame after the first, the
    clip's own included; poses float64 [n + 1, 4, 4], which the keys walk (without walls: those are the model's
    business); changes: (pixel frame, {setting: value}).
    """

    preset: str
    start: np.ndarray
    prompt: str
    seed: int
    steps: int
    keys: np.ndarray
    poses: np.ndarray
    changes: tuple[tuple[int, dict], ...] = ()
    window: int | None = None
    sink: int = 0
    chunk: int | None = None
    """Latent frames a chunk at the start; None for the session's own."""

    def save(self, path: str | Path) -> Path:
        """Write everything to one safetensors file, under a temporary name first."""
        names = ("preset", "prompt", "seed", "steps", "changes", "window", "sink", "chunk")
        card = {name: getattr(self, name) for name in names}
        tensors = {
            "start": torch.from_numpy(self.start.copy()),
            "keys": torch.from_numpy(self.keys.astype(np.uint8)),
            "poses": torch.from_numpy(self.poses.copy()),
        }
        return _save(path, tensors, card)

    @classmethod
    def load(cls, path: str | Path) -> "Recording":
        """Read what `save` wrote; FileNotFoundError or ValueError otherwise."""
        tensors, card = _load(path)
        changes = tuple((at, change) for at, change in card.pop("changes"))
        keys = tensors["keys"].numpy().astype(bool)
        return cls(
            **card,
            changes=changes,
            keys=keys,
            start=tensors["start"].numpy(),
            poses=tensors["poses"].numpy(),
        )


@dataclass(frozen=True)
class _Written:
    """A chunk that the cache was given: x0 [1, 16, f, h, w] and its control [1, C, f, h, w] (None without control)."""

    x0: Tensor
    control: Tensor | None

    @property
    def frames(self) -> int:
        return self.x0.shape[2]

    def pieces(self, longest: int) -> "list[_Written]":
        """The same frames as chunks of at most `longest`."""
        controls = [None] * self.frames if self.control is None else self.control.split(longest, dim=2)
        return [_Written(*pair) for pair in zip(self.x0.split(longest, dim=2), controls, strict=False)]


class _Rekeyed(Exception):
    """Other keys came while a chunk was being denoised."""

    def __init__(self, keys):
        super().__init__()
        self.keys = keys


class _Memory:
    """The chunks that any window or sink up to the longest could still see: the first ones and the latest."""

    def __init__(self):
        self.first: list[_Written] = []
        self.latest: list[_Written] = []

    def add(self, chunk: _Written) -> None:
        if sum(old.frames for old in self.first) < LONGEST_SINK:
            self.first.append(chunk)
        else:
            self.latest.append(chunk)
        while sum(old.frames for old in self.latest[1:]) >= LONGEST_WINDOW:
            del self.latest[0]

    def seen_by(self, window: int, sink: int) -> list[_Written]:
        """Chunks that hold the sink and, after it, the latest `window` - `sink` frames, oldest first."""
        chunks, front, back = [*self.first, *self.latest], 0, len(self.first) + len(self.latest)
        while front < len(chunks) and sum(chunk.frames for chunk in chunks[:front]) < sink:
            front += 1
        while back > front and sum(chunk.frames for chunk in chunks[back:]) < window - sink:
            back -= 1
        return chunks[:front] + chunks[back:]

    def state_dict(self) -> dict[str, Tensor]:
        """Every chunk's x0 and control on the CPU, numbered from the oldest."""
        chunks = [*self.first, *self.latest]
        controls = {f"control.{i}": chunk.control.cpu() for i, chunk in enumerate(chunks) if chunk.control is not None}
        return {**{f"x0.{i}": chunk.x0.cpu() for i, chunk in enumerate(chunks)}, **controls}

    def load_state_dict(self, state: dict[str, Tensor], device: torch.device) -> None:
        """The chunks that `state_dict` gave."""
        self.first, self.latest = [], []
        for i in range(sum(name.startswith("x0.") for name in state)):
            control = state.get(f"control.{i}")
            self.add(_Written(state[f"x0.{i}"].to(device), None if control is None else control.to(device)))


class Session:
    """Plays one world: a start image, a prompt and a seed, then keys.

    `dit` and `vae` are used as they are; where another `device` or `dtype` is asked for, as copies. `text` encodes
    prompts (`text.encode(prompt) -> [L, text_dim]`). `start_image` is u8 [H, W, 3] or a picture file; another size is
    cropped to the middle and resized, with a warning. `path` turns keys into camera control; by default the preset's
    (intrinsics of the tiny world, or of LingBot's examples). Noise is drawn on the CPU: a seed means the same noise on
    any device. Raises ValueError for a picture, a prompt or steps that do not fit.

    With `speed` the world runs on the engine (`engine.Engine`), which large networks on a GPU need to be played: the
    first chunks compile and record, and a chunk that has begun is no longer given up for newer keys half-way. `share`
    is this process's part where several play one world (`engine_parallel.HeadShare`); all must be given the same keys.
    """

    fps = FPS
    longest_window, longest_sink, longest_chunk = LONGEST_WINDOW, LONGEST_SINK, LONGEST_CHUNK

    def __init__(self, preset: Preset, dit, vae, text, *, start_image, prompt: str, steps: int = 4, seed: int = 0,
                 device=None, dtype: torch.dtype | None = None, path: camera.LivePath | None = None,
                 speed: Speed | None = None, share: Alone = ALONE):  # fmt: skip
        self.preset, self.text, self.speed, self._share = preset, text, speed, share
        first = next(dit.parameters())
        self.device = torch.device(device) if device else first.device
        self.dtype = dtype or first.dtype
        self._set_dit(dit)
        self.vae = _placed(vae, self.device, None).eval()
        self.path = path or live_path(preset, self.device)
        self.threads: int | None = None
        self.shrinks = self.shrunk = False
        """Whether to go on with the shortest window when the device is full, instead of raising RuntimeError; and
        whether the present window came about so."""
        self.last_timings: dict[str, float] = {}
        self._pictures = picture_stream(self.vae, graph=speed is not None and speed.graph)
        self._generator = torch.Generator()
        self._memory = _Memory()
        self._log = bytearray()  # rows of keys: 8 bytes a pixel frame, so that an endless stream may keep them all
        self._changes: list[tuple[int, dict]] = []
        self._pending: Callable[[], None] | None = None
        self._ahead: Future[float] | None = None
        self._helper: ThreadPoolExecutor | None = None
        self.seed = seed
        self._steps, self._schedule = steps, self._levels(steps)
        self._prompt, self._states = prompt, self._read(prompt)
        self._stream = self._new_stream()
        self.start_image = start_image

    # -- what it is -----------------------------------------------------------------------------------------------

    @property
    def shape(self) -> VideoShape:
        return self.preset.shape

    @property
    def keys(self) -> str:
        """Letters that this world understands."""
        return "wasdjl" if self.preset.model.control_channels == TINY else KEYS

    @property
    def about(self) -> str:
        """One line for the player's head."""
        chunk = self.preset.stream.chunk
        frames = "1 frame" if chunk == 1 else f"{chunk} frames"
        kind = str(self.dtype).removeprefix("torch.").replace("bfloat16", "bf16").replace("float32", "fp32")
        size = f"{self.shape.width} × {self.shape.height}"
        threads = {None: "", 1: ", 1 thread"}.get(self.threads, f", {self.threads} threads")
        return f"{self.preset.name} · {size} · {frames} a chunk · {kind} on {self.device}{threads}"

    @property
    def next_frames(self) -> int:
        """Pixel frames that the next step returns."""
        return TIME_STRIDE * self.preset.stream.chunk - (0 if self._begun else TIME_STRIDE - 1)

    @property
    def _begun(self) -> bool:
        return self._cache.frames_seen > 0 or self._pending is not None

    @property
    def pixel_frames(self) -> int:
        """Pixel frames made since the last reset, the first one included."""
        return 1 + len(self._log) // len(KEYS)

    # -- settings -------------------------------------------------------------------------------------------------

    @property
    def prompt(self) -> str:
        """What the world is like. A new one counts from the next chunk, and the chunks in sight are read again under it
        (one clean pass for each): what is cached was computed under the old one and would pull the picture back."""
        return self._prompt

    @prompt.setter
    def prompt(self, prompt: str) -> None:
        self.finish()
        self._set_prompt(prompt)
        self._rebuild()
        self._changes.append((self.pixel_frames, {"prompt": prompt}))

    @property
    def steps(self) -> int:
        """Denoising steps a chunk, from the next chunk on."""
        return self._steps

    @steps.setter
    def steps(self, steps: int) -> None:
        self._set_steps(steps)
        self._changes.append((self.pixel_frames, {"steps": steps}))

    @property
    def window(self) -> int | None:
        """Latent frames in sight, sink and current chunk included; None for all. A new one counts from the next chunk:
        the cache is built anew from the chunks remembered, at the price of one clean pass for each of them."""
        return self.preset.stream.window

    @window.setter
    def window(self, window: int) -> None:
        self._set_stream(window=window)

    @property
    def sink(self) -> int:
        """First latent frames that stay in sight for ever. A new one rebuilds the cache, as a new `window` does."""
        return self.preset.stream.sink

    @sink.setter
    def sink(self, sink: int) -> None:
        self._set_stream(sink=sink)

    @property
    def chunk(self) -> int:
        """Latent frames denoised together. A new number counts from the next chunk; the window is widened if it could
        not hold it."""
        return self.preset.stream.chunk

    @chunk.setter
    def chunk(self, chunk: int) -> None:
        self._set_stream(chunk=chunk, window=with_chunk(self.preset, chunk).stream.window)

    def _set_stream(self, **wished: int | None) -> None:
        old, stream = self.preset.stream, replace(self.preset.stream, **wished)
        changes = {name: value for name, value in wished.items() if value != getattr(old, name)}
        in_sight = bool(changes.keys() & {"window", "sink"})
        if in_sight and (stream.window is None or stream.window > LONGEST_WINDOW or stream.sink > LONGEST_SINK):
            raise ValueError(
                f"window {stream.window} and sink {stream.sink} cannot be set in mid-stream: use at most "
                f"{LONGEST_WINDOW} and {LONGEST_SINK} frames"
            )
        if not changes:
            return
        self.finish()
        self.preset = replace(self.preset, stream=stream)
        given_up = self._cache.sight
        if in_sight:
            self.shrunk = False
            self._rebuild()
        elif given_up is not None and given_up.frames > stream.chunk:
            self._rebuild()  # it has written where frames were that a shorter chunk still sees
        else:
            self._cache.abandon()  # a chunk which failed half-way has the old length
        self._changes.append((self.pixel_frames, changes))

    @torch.inference_mode()
    def _rebuild(self) -> None:
        """A cache of the present window and sink, filled by clean passes over the chunks it can see.

        They are numbered anew: the sink's frames, then the latest ones right behind them. A chunk that was made under a
        wider window than there is now is written in pieces.
        """
        self._stream = None  # the old cache and the new one may not fit beside each other
        self._stream = self._new_stream()
        room = LONGEST_WINDOW if self.window is None else self.window - self.sink
        for chunk in self._memory.seen_by(self.window, self.sink):
            for piece in chunk.pieces(room):
                self._stream.write(piece.x0, piece.control, self._conditions(piece.frames))

    def _new_stream(self, cache: KVCache | None = None) -> Engine | Plain:
        """What makes chunks, of the present network, window, steps and prompt; with an empty cache unless given one."""
        arguments = self._net, self.preset.stream, self.preset.shape, self._schedule
        if self.speed is None:
            stream = Plain(*arguments, cache=cache)
        else:
            stream = Engine(
                *arguments, graph=self.speed.graph, merge=self.speed.merge, first=self.speed.first, cache=cache
            )
        stream.prompt(self._states)
        return stream

    @property
    def _cache(self) -> KVCache:
        return self._stream.cache

    @property
    def start_image(self) -> np.ndarray:
        """The picture it all starts from, u8 [H, W, 3]. Setting it starts anew."""
        return self._start[0]

    @start_image.setter
    def start_image(self, image) -> None:
        self._set_start(fit_image(image, self.shape)[None], np.zeros((1, len(KEYS)), bool))

    def start_clip(self, frames: np.ndarray, keys: np.ndarray | None = None) -> None:
        """Start anew after a clip: its frames are written to the cache as if they had been played.

        frames u8 [4n + 1, H, W, 3] of the world's size; keys bool [4n + 1, 8], held on the way into each pixel frame
        (row 0 has no effect; default: none). `reset` comes back to the clip's end. Raises ValueError for other sizes.
        """
        frames = np.asarray(frames)
        keys = np.zeros((len(frames), len(KEYS)), bool) if keys is None else check_keys(keys)
        size = (self.shape.height, self.shape.width, 3)
        if frames.dtype != np.uint8 or frames.shape[1:] != size or len(frames) % TIME_STRIDE != 1:
            raise ValueError(f"clip is {frames.dtype} {frames.shape}: give uint8 [4n + 1, {', '.join(map(str, size))}]")
        if len(keys) != len(frames):
            raise ValueError(
                f"{len(keys)} rows of keys for a clip of {len(frames)} pixel frames: give one row for each"
            )
        self._set_start(frames.copy(), keys.copy())

    def _set_start(self, frames: np.ndarray, keys: np.ndarray) -> None:
        video = from_uint8(torch.from_numpy(frames)[None].to(self.device))
        with torch.no_grad():
            condition, latents = self.vae.image_condition(video[:, :, 0], self.shape.frames), self.vae.encode(video)
        self._start, self._start_keys = frames, keys
        self._condition, self._start_latents = condition, latents
        self.reset()

    def use(self, dit) -> None:
        """Go on with another student of the same size: a new checkpoint, say. The cache stays. A recording does not
        keep students: what two of them have played does not play again to the same frames."""
        self.finish()
        self._stream.settle()
        self._set_dit(dit)
        self._stream = self._new_stream(self._cache)

    def _set_dit(self, dit) -> None:
        if self.speed is not None:
            # Layer by layer: a GPU then never holds a large network twice, in its own numbers and in 8-bit ones.
            self.dit = dit.eval()
            self._net = fast(self.dit, self.speed, share=self._share, to=self._brought)
            return
        self.dit = _placed(dit, self.device, self.dtype).eval()
        on_cpu = self.device.type == "cpu" and isinstance(self.dit, DiT)
        self._net = StreamingDiT(self.dit) if on_cpu else self.dit

    def _brought(self, x: Tensor) -> Tensor:
        return x.to(self.device, self.dtype if x.is_floating_point() else None)

    def _read(self, prompt: str) -> Tensor:
        """Text states [1, L, text_dim] of a prompt."""
        with torch.no_grad():
            return self.text.encode(prompt).to(self.device, self.dtype)[None]

    def _set_prompt(self, prompt: str) -> None:
        self._states = self._read(prompt)
        self._stream.prompt(self._states)
        self._prompt = prompt

    def _levels(self, steps: int) -> list[FewStep]:
        return few_steps(self.preset.flow.labels(steps), self.preset.flow.shift)

    def _set_steps(self, steps: int) -> None:
        self._schedule = self._levels(steps)
        self._stream.steps = self._schedule
        self._steps = steps

    # -- dtype and threads ----------------------------------------------------------------------------------------

    def tune(self, seconds: float = 1.0, fewest_steps: int | None = None) -> "Choice | None":
        """Choose dtype and `threads` by trying them for about `seconds`; the world goes on from where it stands.

        On a CPU the fewest threads that play in real time win, for the page that shows the pictures wants a core too.
        With `fewest_steps` the steps are lowered as well, at most to that, until a chunk leaves the page its time.
        Elsewhere nothing is tried and None returned.
        """
        if self.device.type != "cpu" or self.speed is not None:
            return None
        about = dict(start_image=self.start_image, prompt=self.prompt, seed=self.seed)

        def trial(dtype: torch.dtype, steps: int) -> Callable[[], object]:
            world = Session(self.preset, self.dit, self.vae, self.text, dtype=dtype, steps=steps, **about)

            def step() -> None:
                world.threads = torch.get_num_threads()  # known, so that it overlaps what it will overlap
                world.step("w")

            return step

        real_time = TIME_STRIDE * self.preset.stream.chunk / self.fps
        choice = choose_dtype(partial(trial, steps=self.steps), seconds=seconds, enough=SPARE * real_time)
        self._set_dtype(choice.dtype)
        self.threads = choice.threads
        if fewest_steps is not None and self.steps > fewest_steps:
            one = partial(trial, steps=1)
            short = choose_dtype(one, seconds=seconds / 4, dtypes=[choice.dtype], threads=[choice.threads])
            times = [made.milliseconds[choice.dtype, choice.threads] / 1000 for made in (short, choice)]
            steps = steps_within(ROOM * real_time, *times, self.steps)
            if steps < self.steps:
                self.steps = max(steps, fewest_steps)
        return choice

    def _set_dtype(self, dtype: torch.dtype) -> None:
        if dtype != self.dtype:
            state, self.dtype = self.state_dict(), dtype
            self._set_dit(self.dit)
            self._states = self._states.to(dtype)
            self.load_state_dict(state)

    @contextmanager
    def on_threads(self) -> Iterator[None]:
        """Compute on `threads` threads, and leave torch as it was: other cells of the notebook may want all of them."""
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    # -- play -----------------------------------------------------------------------------------------------------

    def reset(self, seed: int | None = None) -> None:
        """Back to the start image, with the present prompt and steps; `seed` replaces the seed."""
        self._joined()
        self.seed = self.seed if seed is None else seed
        self._generator.manual_seed(self.seed)
        self._stream.reset()
        self._pictures.reset()
        self.path.reset()
        self._log, self._changes, self._pending, self._memory = bytearray(), [], None, _Memory()
        settings = ("prompt", "steps", "window", "sink", "chunk")
        self._origin = {name: getattr(self, name) for name in settings}
        self.first_frame = self._prime() if self._starts_known else self._start[0]
        self.last_frame = self.first_frame

    @property
    def _starts_known(self) -> bool:
        """Whether the start is written to the cache: a clip always, a picture where it is a chunk of its own."""
        return self.preset.stream.image_first or len(self._start) > 1

    @torch.inference_mode()
    def _prime(self) -> np.ndarray:
        """Write the start to the cache, chunk by chunk; returns its last pixel frame as the decoder sees it."""
        control = self._control(self._start_keys)
        at = 0
        for length in self.preset.stream.chunk_lengths(self._start_latents.shape[2]):
            part = slice(at, at + length)
            x0 = self._start_latents[:, :, part]
            chunk = _Written(x0, None if control is None else control[:, :, part])
            self._stream.write(chunk.x0, chunk.control, self._conditions(length))
            self._memory.add(chunk)
            frames = self._pictures(x0)
            at += length
        self._log.extend(self._start_keys[1:].tobytes())
        return frames[-1].cpu().numpy().copy()

    def _clean_pass(self, chunk: _Written) -> None:
        self._stream.finish()
        self._memory.add(chunk)

    def step(self, keys: Iterable[str] | np.ndarray) -> np.ndarray:
        """One chunk: the pixel frames u8 [n, H, W, 3] that follow under `keys`, n = `next_frames`.

        keys: letters held all along ("wl", {"w", "l"}), bool [8], or bool [n, 8], a row for each pixel frame.
        """
        frames = self.generate(keys)
        self.finish()
        return frames

    def generate(self, keys: Iterable[str] | np.ndarray) -> np.ndarray:
        """`step` without the clean pass, which `finish` (or the next `generate`) does."""
        return np.concatenate(list(self.stream(keys)))

    @torch.inference_mode()
    def stream(self, keys: Iterable[str] | np.ndarray, newer: Newer | None = None) -> Iterator[np.ndarray]:
        """`generate`, handing out pixel frames as soon as they are decoded: on a CPU those of each latent frame.

        `newer()` is asked after each denoising step and may give other keys: then the chunk begins again, from the same
        noise, and is what it would have been under them. A chunk counts as made when its last pixel frames have been
        taken: given up before, it leaves no trace in the cache, even where its clean pass was begun ahead.
        """
        self.finish()
        timings: dict[str, float] = {}
        rows, chunk, frames = self._begin_chunk(self._rows(keys), timings, newer)
        yield frames
        for part in self._parts(chunk.x0)[1:]:
            frames = self._decode(part, timings)
            yield frames
        self._pending = partial(self._clean_pass, chunk)
        self._log.extend(rows.tobytes())
        self.last_frame, self.last_timings = frames[-1], timings

    def _begin_chunk(self, rows: np.ndarray, timings: dict[str, float], newer: Newer | None):
        """The keys that count, and `_denoised` under them: begun again when the keys have changed meanwhile and, once
        room has been made, where the device is full."""
        path, noise = (self.path.frames, self.path.pitch), self._generator.get_state()
        while True:
            try:
                return rows, *self._denoised(rows, timings, newer)
            except _Rekeyed as change:
                keys, full = change.keys, None
            except torch.OutOfMemoryError as error:
                keys, full = rows, error.with_traceback(None)  # which would keep the failed chunk's tensors alive
            self.path.frames, self.path.pitch = path
            self._generator.set_state(noise)
            if full is not None:
                self._make_room(full)
            rows = self._rows(keys)

    def _denoised(self, rows: np.ndarray, timings: dict[str, float], newer: Newer | None):
        """The chunk under these keys, and its first pixel frames."""

        def ask() -> None:
            if newer is not None and (keys := newer()) is not None:
                raise _Rekeyed(keys)

        def fresh() -> Iterator[Tensor]:
            for _ in self._schedule[1:]:
                ask()
                yield self._noise()

        with self.on_threads():
            with self._timed(timings, "control"):
                control = self._control(rows)
            with self._timed(timings, "denoise"):
                x0 = self._stream.denoise(self._noise(), fresh(), control, self._conditions(self.chunk))
            ask()
            if self._cleans_ahead:
                self._clean_ahead()
        return _Written(x0, control), self._decode(self._parts(x0)[0], timings)

    def _parts(self, x0: Tensor) -> tuple[Tensor, ...]:
        """What is decoded together: on a CPU one latent frame, to show it early; on a GPU the engine's whole chunk,
        which takes little longer than its first frame."""
        return x0.split(1 if self.speed is None or self.device.type == "cpu" else x0.shape[2], dim=2)

    def _decode(self, latents: Tensor, timings: dict[str, float]) -> np.ndarray:
        before = timings.get("decode", 0.0)
        with self.on_threads(), self._timed(timings, "decode"):
            frames = self._pictures(latents).cpu().numpy().copy()  # the next call may write to the same memory
        timings["decode"] += before
        return frames

    def _make_room(self, full: torch.OutOfMemoryError) -> None:
        """Shorten the window as far as it goes, or raise RuntimeError that says what would fit."""
        shortest = self.preset.stream.sink + self.preset.stream.chunk
        if self.window is None or self.window <= shortest:
            raise RuntimeError(
                f"{self.device} is full, and the window cannot be shorter than {self.window} frames: "
                "use a smaller picture or model, or end what else runs there"
            ) from full
        freed = self._cache.occupancy().bytes * (1 - shortest / self.window) / 2**20
        if not self.shrinks:
            raise RuntimeError(
                f"{self.device} is full: a window of {shortest} instead of {self.window} frames frees {freed:.0f} MiB, "
                "set it with `session.window` or have it done with `session.shrinks = True`"
            ) from full
        self._set_stream(window=shortest)
        self.shrunk = True

    @torch.inference_mode()
    def finish(self) -> None:
        """The clean pass of the last chunk, if it is still to be done: what is left of it where it was begun ahead.

        What a pass begun ahead raises is raised here; the next call then does the pass again.
        """
        ahead = self._joined()
        if self._pending is not None:
            spent = 0.0 if ahead is None else ahead.result()
            timings = dict(self.last_timings)
            with self._timed(timings, "clean pass"), self.on_threads():
                self._pending()
            timings["clean pass"] += spent
            self._pending, self.last_timings = None, timings

    @property
    def _cleans_ahead(self) -> bool:
        """Whether the clean pass runs beside the decoder: on a CPU where each has cores of its own for `threads`, and a
        page that shows the pictures one more.

        On two cores beside a browser it made the first pictures later and no frame more (`LOG.md`). With fewer threads
        for one of them its sums could be taken in another order."""
        plain = self.device.type == "cpu" and self.speed is None
        return plain and self.threads is not None and 2 * self.threads < usable_cores()

    def _clean_ahead(self) -> None:
        """Begin the running chunk's clean pass in a thread of its own. It is not committed before `finish`, so that a
        chunk whose pictures nobody takes leaves no trace."""
        if self._helper is None:
            self._helper = ThreadPoolExecutor(1, "clean-pass")  # its thread ends with the session
        # Waited for: torch keeps the number that was set last, which must be that of `on_threads` when it is left.
        self._helper.submit(_compute_on, self.threads).result()
        self._ahead = self._helper.submit(_milliseconds_of, self._stream.clean)

    def _joined(self) -> "Future[float] | None":
        """The clean pass that was begun ahead, when it has ended: nothing else may touch the stream before."""
        if self._ahead is not None:
            wait([self._ahead])  # interrupted here, it is still to be waited for
        ahead, self._ahead = self._ahead, None
        return ahead

    def _rows(self, keys) -> np.ndarray:
        count = self.next_frames
        rows = np.asarray(keys) if isinstance(keys, np.ndarray) else held(keys)
        if rows.ndim == 1:
            rows = np.repeat(rows[None], count, axis=0)
        if len(rows) != count:
            raise ValueError(f"{len(rows)} rows of keys for a chunk of {count} pixel frames: give one row for each")
        rows = check_keys(rows).copy()
        if not self._begun:
            rows[0] = False  # without image_first this row is the way into the start image, which is denoised too
        return rows

    def _control(self, rows: np.ndarray) -> Tensor | None:
        if self.preset.model.control_channels == 0:
            return None
        return self.path.push(rows)[None].to(self.device)

    def _conditions(self, count: int) -> Tensor:
        """Mask and image of the next `count` frames; after a clip's length, those of its last frame for ever."""
        start, last = self._cache.frames_seen, self._condition.shape[2] - 1
        return self._condition[:, :, [min(start + i, last) for i in range(count)]]

    def _noise(self) -> Tensor:
        """Standard normal numbers for a chunk; drawn for its start, then once for every later step."""
        shape = self.shape
        size = (1, LATENT_CHANNELS, self.preset.stream.chunk, shape.latent_height, shape.latent_width)
        return torch.randn(size, generator=self._generator).to(self.device)

    @contextmanager
    def _timed(self, timings: dict[str, float], name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        timings[name] = 1000 * (time.perf_counter() - started)

    # -- keeping and repeating ------------------------------------------------------------------------------------

    @property
    def poses(self) -> np.ndarray:
        """Camera poses float64 [n, 4, 4] that the keys since the last reset walk, one for each pixel frame."""
        return self._walk(self._held_rows())

    def _held_rows(self) -> np.ndarray:
        return np.frombuffer(bytes(self._log), bool).reshape(-1, len(KEYS))

    def _walk(self, rows: np.ndarray) -> np.ndarray:
        if self.preset.model.control_channels == TINY:
            return camera.poses_from_keys(rows, move=0.0, turn=camera.TINY_TURN)
        return camera.poses_from_keys(rows)

    def recording(self) -> Recording:
        """What was played since the last reset."""
        rows = self._held_rows()
        return Recording(
            self.preset.name,
            self._start,
            self._origin["prompt"],
            self.seed,
            self._origin["steps"],
            rows,
            self._walk(rows),
            tuple(self._changes),
            self._origin["window"],
            self._origin["sink"],
            self._origin.get("chunk"),  # a state that was saved before chunks could change has none
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that the next chunk depends on besides the weights, as tensors on the CPU."""
        self.finish()
        self._stream.settle()
        return {
            **_prefixed("cache", self._cache.state_dict()),
            **_prefixed("decoder", self._pictures.state_dict()),
            **_prefixed("memory", self._memory.state_dict()),
            "generator": self._generator.get_state(),
            "start": torch.from_numpy(self._start.copy()),
            "start_keys": torch.from_numpy(self._start_keys.astype(np.uint8)),
            "first_frame": torch.from_numpy(self.first_frame.copy()),
            "last_frame": torch.from_numpy(self.last_frame.copy()),
            "keys": torch.from_numpy(self._held_rows().astype(np.uint8)),
            "card": torch.tensor(list(json.dumps(self._card()).encode()), dtype=torch.uint8),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from where `state_dict` was taken: the same keys then give the same frames.

        Raises ValueError for a state of another preset or stream; nothing has changed then.
        """
        card = json.loads(bytes(state["card"].tolist()))
        self._check_card(card)
        self.preset = replace(self.preset, stream=StreamSettings(**card["stream"]))
        self._steps, self._schedule = card["steps"], self._levels(card["steps"])
        self._prompt, self._states = card["prompt"], self._read(card["prompt"])
        self._stream = self._new_stream()
        self._set_start(state["start"].numpy(), state["start_keys"].numpy().astype(bool))
        self._cache.load_state_dict(_stripped("cache", state))
        self._pictures.load_state_dict(_stripped("decoder", state))
        self._memory.load_state_dict(_stripped("memory", state), self.device)
        self.path.frames, self.path.pitch = card["path_frames"], card["pitch"]
        self._generator.set_state(state["generator"])
        self.seed, self._origin = card["seed"], card["origin"]
        self._changes = [(at, change) for at, change in card["changes"]]
        self._log = bytearray(state["keys"].numpy().astype(bool).tobytes())
        self.first_frame, self.last_frame = state["first_frame"].numpy(), state["last_frame"].numpy()

    def save(self, path: str | Path) -> Path:
        """Write the whole state to a safetensors file."""
        return _save(path, self.state_dict(), {"kind": "session", "preset": self.preset.name})

    def load(self, path: str | Path) -> None:
        """Go on from a file that `save` wrote."""
        self.load_state_dict(_load(path)[0])

    def _card(self) -> dict:
        return {
            "preset": self.preset.name,
            "stream": asdict(self.preset.stream),
            "model": str(self.preset.model),
            "shape": str(self.shape),
            "prompt": self._prompt,
            "steps": self._steps,
            "seed": self.seed,
            "path_frames": self.path.frames,
            "pitch": self.path.pitch,
            "origin": self._origin,
            "changes": self._changes,
        }

    def _check_card(self, card: dict) -> None:
        mine, theirs = self._card(), dict(card)
        # Chunk, window and sink are settings that the state brings along; the rest of the stream is the model's.
        for entry in (mine, theirs):
            stream = entry.get("stream") or {}
            entry["stream"] = {name: value for name, value in stream.items() if name not in ("chunk", "window", "sink")}
        for name in ("preset", "stream", "model", "shape"):
            if theirs.get(name) != mine[name]:
                raise ValueError(
                    f"the saved state has {name} {theirs.get(name)}, this session {mine[name]}: open it with the same"
                )


def _prefixed(group: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{group}.{name}": tensor for name, tensor in state.items()}


def _stripped(group: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{group}."): part for name, part in state.items() if name.startswith(f"{group}.")}


def replay(session: Session, recording: Recording) -> Iterator[np.ndarray]:
    """Play a recording again in `session`: yields its first frame [1, H, W, 3], then chunk by chunk u8 [n, H, W, 3].

    On the same device, with the same weights, the frames are the same. Raises ValueError for another preset.
    """
    if recording.preset != session.preset.name:
        raise ValueError(f"the recording is of preset '{recording.preset}', the session of '{session.preset.name}'")
    session._set_prompt(recording.prompt)
    session._set_steps(recording.steps)
    session._set_stream(chunk=recording.chunk or session.chunk, window=recording.window, sink=recording.sink)
    session.seed = recording.seed
    begun = len(recording.start)
    session.start_clip(recording.start, np.pad(recording.keys[: begun - 1], ((1, 0), (0, 0))))
    changes = list(recording.changes)
    yield session.first_frame[None]
    at = begun
    while at <= len(recording.keys):
        while changes and changes[0][0] <= at:
            for name, value in changes.pop(0)[1].items():
                setattr(session, name, value)
        rows = recording.keys[at - 1 : at - 1 + session.next_frames]
        yield session.step(rows)
        at += len(rows)


def lens(preset: Preset) -> tuple[np.ndarray, float]:
    """Intrinsics [4] at the preset's picture size, and the degrees that j or l turns in a pixel frame."""
    shape = preset.shape
    if preset.model.control_channels == TINY:
        return camera.scale_intrinsics(TINY_INTRINSICS, shape.height, shape.width, source=TINY_SIZE), camera.TINY_TURN
    return camera.scale_intrinsics(LINGBOT_INTRINSICS, shape.height, shape.width), camera.TURN


def live_path(preset: Preset, device=None) -> camera.LivePath:
    """The path of keys to camera control that the preset's model was trained with."""
    intrinsics, turn = lens(preset)
    channels, walk = preset.model.control_channels, dict(turn_degrees=turn, device=device)
    if channels == TINY:
        return camera.LivePath.tiny(intrinsics, preset.shape, **walk)
    if channels == ACT:
        return camera.LivePath.act(intrinsics, preset.shape, **walk)
    return camera.LivePath.cam(intrinsics, preset.shape, preset.world_scale, **walk)


def fit_image(image: np.ndarray | str | Path, shape: VideoShape) -> np.ndarray:
    """A start image as u8 [H, W, 3] of the world's size: cropped to the middle and resized, with a warning, if need be.

    image: u8 [h, w, 3] or a picture file. Raises FileNotFoundError, or ValueError for what is no picture.
    """
    from PIL import Image

    if image is None or not isinstance(image, np.ndarray) and not str(image):
        raise ValueError("there is no start image: name a png or jpeg file, or give uint8 [height, width, 3]")

    picture = Image.fromarray(_checked_picture(image)) if isinstance(image, np.ndarray) else _open(image)
    size = shape.width, shape.height
    if picture.size == size:
        return np.array(picture)
    wide, high = picture.size
    scale = max(size[0] / wide, size[1] / high)
    cut_wide, cut_high = size[0] / scale, size[1] / scale
    left, top = (wide - cut_wide) / 2, (high - cut_high) / 2
    lost = 1 - cut_wide * cut_high / (wide * high)
    told = f"start image of {wide}x{high} resized to {size[0]}x{size[1]}"
    warnings.warn(told + (f", {lost:.0%} of it cut off at the edges" if lost > 0.005 else ""), stacklevel=3)
    box = (left, top, left + cut_wide, top + cut_high)
    return np.array(picture.resize(size, Image.Resampling.LANCZOS, box=box))


def _checked_picture(image: np.ndarray) -> np.ndarray:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"start image is {image.dtype} {image.shape}: give uint8 [height, width, 3]")
    return image


def _open(path: str | Path):
    from PIL import Image

    try:
        return Image.open(path).convert("RGB")
    except (OSError, SyntaxError) as error:  # cut off in the middle it is one or the other, by the kind of picture
        if getattr(error, "errno", None) is not None:  # missing, a folder, not allowed: it says so, and names the file
            raise
        raise ValueError(f"{path} is not a picture that can be read: give a png or jpeg") from error


def _placed(module, device: torch.device, dtype: torch.dtype | None):
    """The module itself where it already is what is asked for, else a copy: the caller's weights are never changed."""
    first = next(module.parameters())
    dtype = dtype or first.dtype
    if first.device == device and first.dtype == dtype:
        return module
    return copy.deepcopy(module).to(device, dtype)


# -- dtype and threads ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """A dtype and a thread count, and the least milliseconds of everything tried, (dtype, threads) -> ms."""

    dtype: torch.dtype
    threads: int
    milliseconds: dict[tuple[torch.dtype, int], float] = field(default_factory=dict)


def choose_dtype(
    make: Callable[[torch.dtype], Callable[[], object]],
    *,
    seconds: float = 1.0,
    enough: float = 0.0,
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    threads: Sequence[int] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Choice:
    """Try every dtype and thread count for about `seconds` in all and choose the fastest.

    `make(dtype)` returns the thing to time, for example `lambda dtype: partial(Session(…, dtype=dtype).step, "w")`; its
    first call is not counted, and of the others the quickest counts: what else the machine does only makes a call
    longer. By default one thread and as many as torch uses now are tried. fp32 wins unless another is a fifth quicker.
    Where calls of at most `enough` seconds do, the fewest threads that keep to it are chosen, and no more are tried.
    """
    now = torch.get_num_threads()
    counts = sorted(set(threads or (1, now)))
    each = seconds / (len(dtypes) * len(counts))
    runs = {dtype: make(dtype) for dtype in dtypes}
    tried: dict[tuple[torch.dtype, int], float] = {}
    keeping: list[int] = []
    try:
        for count in counts:
            torch.set_num_threads(count)
            for dtype, run in runs.items():
                tried[dtype, count] = 1000 * _least_seconds(run, each, clock)
            keeping = [count for (_, count), milliseconds in tried.items() if milliseconds <= 1000 * enough]
            if keeping:  # more threads would wait for cores that others have, for seconds a call
                break
    finally:
        torch.set_num_threads(now)
    allowed = [pair for pair in tried if not keeping or pair[1] == min(keeping)]
    handicap = {torch.float32: 1.0}
    best = min(allowed, key=lambda pair: tried[pair] * handicap.get(pair[0], 1.25))
    return Choice(*best, milliseconds=tried)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _compute_on(threads: int) -> None:
    """Have the calling thread compute on so many threads."""
    torch.get_num_threads()  # a new thread takes the number that another one has set, unless it has asked before
    torch.set_num_threads(threads)


@torch.inference_mode()
def _milliseconds_of(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)


def steps_within(budget: float, one: float, all_steps: float, steps: int) -> int:
    """The most denoising steps, from 1 to `steps`, of a chunk that takes `one` seconds with one step and `all_steps`
    with `steps`, so that it takes at most `budget` seconds; 1 where none does."""
    each = (all_steps - one) / max(steps - 1, 1)
    return max((count for count in range(1, steps + 1) if one + (count - 1) * each <= budget), default=1)


def _least_seconds(run: Callable[[], object], budget: float, clock: Callable[[], float]) -> float:
    run()
    began, times = clock(), []
    while not times or clock() - began < budget:
        started = clock()
        run()
        times.append(clock() - started)
    return min(times)


# -- files ------------------------------------------------------------------------------------------------------------


def _save(path: str | Path, tensors: dict[str, Tensor], card: dict) -> Path:
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, str(temporary), metadata={"card": json.dumps(card)})
    os.replace(temporary, path)
    return path


def _load(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    from safetensors import SafetensorError, safe_open

    if not Path(path).exists():
        raise FileNotFoundError(f"{path} is missing")
    try:
        with safe_open(str(path), "pt") as file:
            card = json.loads((file.metadata() or {}).get("card", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, card
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error}): it may still be written") from error


def with_chunk(preset: Preset, chunk: int) -> Preset:
    """The preset with another chunk length, its window widened if it could not hold it."""
    stream = preset.stream
    window = stream.window and max(stream.window, stream.sink + chunk)
    return replace(preset, stream=replace(stream, chunk=chunk, window=window))
