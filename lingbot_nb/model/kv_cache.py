"""What a stream remembers of its past: keys and values of the frames in sight, for play and for training."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lingbot_nb.model.rope import RopeTable, apply_rope, fresh_rope_table
from lingbot_nb.presets import ModelSize, StreamSettings, VideoShape


@dataclass(frozen=True)
class Occupancy:
    """Frames held, frames that fit, and the bytes they take (for KVCache constant for the cache's life)."""

    frames: int
    capacity: int
    bytes: int


@dataclass(frozen=True)
class Ring:
    """Where frames live: the first `sink` frames keep their slots, later ones go round the rest of `capacity`."""

    capacity: int
    sink: int
    endless: bool

    def slot(self, frame: int) -> int:
        return frame if frame < self.capacity else self.sink + (frame - self.sink) % (self.capacity - self.sink)

    def visible(self, end: int) -> list[int]:
        """Frames in sight of a chunk that ends before frame `end`, oldest first."""
        newest = range(max(self.sink, end - (self.capacity - self.sink)), end)
        return [*range(min(self.sink, end)), *newest]

    def check(self, start: int, end: int) -> None:
        """Raise if the chunk [start, end) is empty, does not fit beside the sink, or overflows an endless past."""
        if end <= start:
            raise ValueError(f"a chunk of {end - start} frames: use at least 1")
        if not self.endless and end > self.capacity:
            raise RuntimeError(
                f"frame {end - 1} does not fit a cache of {self.capacity} frames without a window: "
                "pass a larger capacity, or give StreamSettings a window"
            )
        if end - max(start, self.sink) > self.capacity - self.sink:
            raise ValueError(
                f"a chunk of {end - start} frames does not fit window {self.capacity} with sink {self.sink}: "
                "widen the window or shorten the chunk"
            )


def stream_ring(settings: StreamSettings, shape: VideoShape, capacity: int | None = None) -> Ring:
    """The slots of a stream: its window, or without one `capacity` frames (the clip's length unless given)."""
    if settings.window is None:
        return Ring(capacity or shape.frames, sink=0, endless=False)
    return Ring(settings.window, settings.sink, endless=True)


def _runs(slots: list[int]) -> list[tuple[int, int, int]]:
    """Consecutive slots as (first slot, first frame of the chunk, frames): one run, two where the ring wraps."""
    starts = [i for i in range(len(slots)) if i == 0 or slots[i] != slots[i - 1] + 1]
    return [(slots[i], i, j - i) for i, j in zip(starts, [*starts[1:], len(slots)], strict=True)]


class Place(NamedTuple):
    """One layer's buffers of keys and values [B, tokens that fit, N, D] (8-bit ones as bytes: a compiler that had to
    look at a buffer as bytes would copy all of it), the rows of them that are a chunk's, int64 [L], and its angles."""

    keys: Tensor
    values: Tensor
    slots: Tensor
    table: RopeTable


def put(place: Place, turned_k: Tensor, v: Tensor) -> None:
    """Write a chunk's turned keys and its values [B, L, N, D] where they belong: for a cache of 8 bits, 8-bit ones."""
    for buffer, x in ((place.keys, turned_k), (place.values, v)):
        buffer.index_copy_(1, place.slots, _as_kept(x, buffer))


def _as_kept(x: Tensor, buffer: Tensor) -> Tensor:
    return bits(x) if buffer.dtype == torch.uint8 else x.to(buffer.dtype)


_WORD = torch.int64
"""What a GPU scatters as fast as it does single bytes."""


def put_words(place: Place, turned_k: Tensor, v: Tensor) -> None:
    """`put`, eight bytes at a time where a head's numbers fill them: for 8-bit numbers an eighth of the work. Not for a
    compiler, which would copy a buffer to see words in it."""
    parts = [(buffer, _as_kept(x, buffer)) for buffer, x in ((place.keys, turned_k), (place.values, v))]
    if place.keys.shape[-1] * place.keys.itemsize % _WORD.itemsize == 0:
        parts = [tuple(part.view(_WORD) for part in pair) for pair in parts]
    for buffer, x in parts:
        buffer.index_copy_(1, place.slots, x)


def bits(x: Tensor) -> Tensor:
    """8-bit floating point numbers as the bytes they are, which can be moved about everywhere; others as they are."""
    return x.view(torch.uint8) if x.dtype.itemsize == 1 else x


def _refill(place: RopeTable, table: RopeTable) -> None:
    for old, new in zip(place, table, strict=True):
        old.copy_(new)


@dataclass(frozen=True, eq=False)
class Sight:
    """What one chunk, frames `start` to `start` + `frames`, sees of a cache, and where its own part of it is.

    It holds while the chunk runs; `held` outlasts it. `tokens`: those in sight. `new_sink`: frames of the chunk that
    become a sink which will move. `leaves_sink`: whether the sink's keys are to be moved for it.
    """

    cache: "KVCache"
    start: int
    frames: int
    tokens: int
    new_sink: int
    leaves_sink: bool
    table: RopeTable
    slots: Tensor

    @property
    def phase(self) -> tuple[int, ...]:
        """Chunks of equal phase run the same kernels on the same addresses: one CUDA graph is good for all of them."""
        return self.frames, self.tokens, self.start if self.new_sink else -1, int(self.leaves_sink)

    @property
    def fills_sink(self) -> bool:
        """Whether every pass over the chunk is to `keep_sink`."""
        return self.new_sink > 0

    def place(self, layer: int) -> Place:
        """Where the chunk's keys and values of a layer belong: for callers that `put` them there themselves."""
        return Place(*map(bits, self.cache.buffers(layer)), self.slots, self.table)

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values of all frames in sight: see `KVCache.update`."""
        return tuple(buffer[:, : self.tokens] for buffer in self.cache.buffers(layer))

    def keep_sink(self, layer: int, unturned_k: Tensor) -> None:
        """Keep a layer's unturned keys [B, L, N, D] of the frames that become the sink."""
        self.cache.keep_sink(layer, self.start, unturned_k[:, : self.new_sink * unturned_k.shape[1] // self.frames])

    def move_sink(self, layer: int, turn: Callable[[Tensor, RopeTable], Tensor] = apply_rope) -> None:
        """Stand a layer's sink keys right before the chunk's window; nothing to do until they are left behind."""
        if self.leaves_sink:
            self.cache.move_sink(layer, turn)

    def held(self, before: "Sight | None" = None) -> "Sight":
        """The same, when the next chunk has begun; in the memory of `before`, a held one of as many frames."""
        before = before or replace(self, table=RopeTable(*map(torch.empty_like, self.table)),
                                   slots=torch.empty_like(self.slots))  # fmt: skip
        _refill(before.table, self.table)
        before.slots.copy_(self.slots)
        return replace(self, table=before.table, slots=before.slots)


class KVCache:
    """Keys and values of a stream, for inference: static buffers in ring order, positions as Python ints.

    Use: `begin(frames)` (DiT.forward calls it), any number of passes over the same chunk (each overwrites the chunk's
    entries), then `commit()` after the clean pass. Nothing is shifted, grown or read back from the device.

    settings.relative False: keys turn at their frame number, as upstream's do. True: positions are counted inside the
    window (sink 0..s-1, then the window in order, the current chunk last). Rotary attention sees only differences of
    positions, so for window and chunk both countings are the same; what the second one moves is the sink. Sink keys
    are therefore kept unturned and turned once a chunk to stand right before the window, and no other key is touched.

    batch: clips streamed side by side. capacity: frames that fit when settings.window is None (default: the clip's).
    """

    def __init__(
        self,
        size: ModelSize,
        settings: StreamSettings,
        shape: VideoShape,
        *,
        batch: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        capacity: int | None = None,
    ):
        self.ring = stream_ring(settings, shape, capacity)
        self.batch = batch
        self.device = torch.device(device or "cpu")
        self._grid_hw = shape.grid[1:]
        self._tokens = shape.tokens_per_frame
        self._head_dim = size.head_dim
        self._moves_sink = settings.relative and self.ring.sink > 0
        self._tables: dict[int, RopeTable] = {}
        self._slots: dict[int, Tensor] = {}
        self._sink_table = self._empty_table(self.ring.sink)

        def buffers(frames: int, dtype: torch.dtype) -> list[Tensor]:
            shape_BLND = (batch, frames * self._tokens, size.heads, size.head_dim)
            # An inference tensor could not be written to by a stream that runs under no_grad.
            with torch.inference_mode(False):
                return [torch.zeros(shape_BLND, device=device, dtype=dtype) for _ in range(size.layers)]

        self._k, self._v = buffers(self.ring.capacity, dtype), buffers(self.ring.capacity, dtype)
        # Keys that are turned anew with every chunk must not be rounded to 8 bits before.
        unturned = torch.bfloat16 if dtype.itemsize == 1 else dtype
        self._sink_k = buffers(self.ring.sink, unturned) if self._moves_sink else []
        self.reset()

    def reset(self) -> None:
        """Forget everything; the buffers stay where they are."""
        self.frames_seen = 0
        self.sight: Sight | None = None

    @property
    def _running(self) -> int:
        return self.sight.frames if self.sight else 0

    def begin(self, frames: int, *, move_sink: bool = True) -> "KVCache":
        """Open the next chunk of `frames` frames; a second call for the running chunk does nothing.

        Without `move_sink` every layer's is the caller's, before it reads the layer (see `Sight.move_sink`).
        Raises RuntimeError when another length is asked of a running chunk, or a cache without a window is full;
        ValueError when the chunk cannot fit the window.
        """
        if self._running:
            if frames != self._running:
                raise RuntimeError(
                    f"a chunk of {self._running} frames is running, not {frames}: commit() or reset() the cache first"
                )
            return self
        start, end = self.frames_seen, self.frames_seen + frames
        self.ring.check(start, end)
        self.sight = Sight(
            self,
            start,
            frames,
            tokens=min(end, self.ring.capacity) * self._tokens,
            new_sink=max(min(end, self.ring.sink) - start, 0) if self._moves_sink else 0,
            leaves_sink=self._moves_sink and end > self.ring.capacity,
            **self._placed(range(start, end)),
        )
        if self.sight.leaves_sink:
            distance = end - self.ring.capacity
            _refill(self._sink_table, self._turns(range(distance, distance + self.ring.sink)))
            for layer in range(len(self._k) if move_sink else 0):
                self.sight.move_sink(layer)
        return self

    def _turns(self, positions: range) -> RopeTable:
        return fresh_rope_table(positions, self._grid_hw, self._head_dim, self.device)

    def _empty_table(self, frames: int) -> RopeTable:
        with torch.inference_mode(False):
            return RopeTable(*torch.empty(2, frames * self._tokens, self._head_dim // 2, device=self.device))

    def _placed(self, chunk: range) -> dict:
        """Put the chunk's angles and slots where they always are: a captured CUDA graph reads the same addresses, and
        once the window is full the same graph serves every chunk."""
        if len(chunk) not in self._tables:
            self._tables[len(chunk)] = self._empty_table(len(chunk))
            with torch.inference_mode(False):
                slots = torch.empty(len(chunk) * self._tokens, dtype=torch.long, device=self.device)
            self._slots[len(chunk)] = slots
        table, slots = self._tables[len(chunk)], self._slots[len(chunk)]
        _refill(table, self._turns(chunk))
        for slot, at, count in _runs([self.ring.slot(frame) for frame in chunk]):
            first, last = slot * self._tokens, (slot + count) * self._tokens
            slots[at * self._tokens : (at + count) * self._tokens] = torch.arange(first, last, device=self.device)
        return dict(table=table, slots=slots)

    def buffers(self, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values of all frames that fit [B, tokens, N, D], in slot order."""
        return self._k[layer], self._v[layer]

    def keep_sink(self, layer: int, start: int, unturned_k: Tensor) -> None:
        """Keep unturned keys [B, L, N, D] of the sink's frames from frame `start` on."""
        to = start * self._tokens
        self._sink_k[layer][:, to : to + unturned_k.shape[1]] = unturned_k

    def move_sink(self, layer: int, turn: Callable[[Tensor, RopeTable], Tensor]) -> None:
        """Stand a layer's sink keys right before the running chunk's window."""
        self._k[layer][:, : self.ring.sink * self._tokens] = turn(self._sink_k[layer], self._sink_table)

    @torch.compiler.disable
    def update(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Write one layer's unturned k and v [B, L, N, D] of the running chunk, and turn q.

        Returns q turned, and keys and values of all frames in sight [B, tokens in sight, N, D] in slot order
        (attention does not mind the order). They are views: the next update overwrites them.
        """
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise RuntimeError("KVCache writes in place and has no gradient: use GradCache, or torch.no_grad()")
        if not self._running:
            raise RuntimeError("no chunk is running: call begin(frames) before update")
        if k.shape[0] != self.batch:
            raise ValueError(f"batch {k.shape[0]} does not match the cache's {self.batch}: build the cache with batch=")
        sight = self.sight
        put(sight.place(layer), apply_rope(k, sight.table), v)
        if sight.fills_sink:
            sight.keep_sink(layer, k)
        return apply_rope(q, sight.table), *sight.keys_values(layer)

    def commit(self) -> None:
        """Close the running chunk: what its last pass wrote is now the past. Call it after the clean pass."""
        if not self._running:
            raise RuntimeError("no chunk is running: nothing to commit")
        self.frames_seen += self._running
        self.sight = None

    def abandon(self) -> None:
        """Close the running chunk without a trace: the next one begins where it began."""
        self.sight = None

    def state_dict(self) -> dict[str, Tensor]:
        """All buffers and the number of committed frames, as copies on the CPU; RuntimeError while a chunk runs."""
        if self._running:
            raise RuntimeError(f"a chunk of {self._running} frames is running: commit() or reset() before the state")
        buffers = {name: buffer.cpu().clone() for name, buffer in self._named_buffers().items()}
        return {**buffers, "frames_seen": torch.tensor(self.frames_seen)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from where `state_dict` was taken; ValueError, and nothing changed, for a cache of another size."""
        buffers = self._named_buffers()
        for name, buffer in buffers.items():
            if name not in state or state[name].shape != buffer.shape:
                found = tuple(state[name].shape) if name in state else "nothing"
                raise ValueError(
                    f"the saved cache has {found} for {name}, this one needs {tuple(buffer.shape)}: it is of another "
                    "model, window or batch"
                )
        for name, buffer in buffers.items():
            buffer.copy_(state[name])
        self.frames_seen, self.sight = int(state["frames_seen"]), None

    def _named_buffers(self) -> dict[str, Tensor]:
        groups = {"k": self._k, "v": self._v, "sink_k": self._sink_k}
        return {f"{name}.{layer}": part for name, parts in groups.items() for layer, part in enumerate(parts)}

    def visible(self) -> list[int]:
        """Numbers of the frames held, oldest first, the running chunk included."""
        return self.ring.visible(self.frames_seen + self._running)

    def ordered(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys (turned, as attention uses them) and values of one layer, oldest frame first, sink in front: copies."""
        frames = [slice(s * self._tokens, (s + 1) * self._tokens) for s in map(self.ring.slot, self.visible())]
        return tuple(torch.cat([x[:, at] for at in frames], dim=1) for x in (self._k[layer], self._v[layer]))

    def occupancy(self) -> Occupancy:
        """Frames held now, frames that fit, and bytes of all buffers."""
        buffers = [*self._k, *self._v, *self._sink_k]
        return Occupancy(len(self.visible()), self.ring.capacity, sum(x.nbytes for x in buffers))


class _Past:
    """Detached past of one running chunk, shared by its passes; keys are turned at most once a layer."""

    def __init__(self, kv: list[tuple[Tensor, Tensor]], past: RopeTable | None, current: RopeTable):
        self.kv = kv
        self.current = current
        self._table = past
        self._turned: dict[int, Tensor] = {}

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        k, v = self.kv[layer]
        if layer not in self._turned:
            with torch.no_grad():
                self._turned[layer] = apply_rope(k, self._table)
        return self._turned[layer], v


class _Pass:
    """One forward over the running chunk. Recomputing it in backward reads and writes only this object, so neither a
    later pass nor a later chunk can change what it saw, and it cannot change what they see."""

    def __init__(self, past: _Past):
        self._past = past
        self._latest = True
        self.written: dict[int, tuple[Tensor, Tensor]] = {}

    def close(self) -> None:
        """Nobody will commit this pass: its graph may live on, but not the keys and values beside it."""
        self._latest = False
        self.written.clear()

    @torch.compiler.disable
    def update(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self._latest:
            self.written[layer] = (k.detach(), v.detach())
        q, turned = apply_rope(q, self._past.current), apply_rope(k, self._past.current)
        if not self._past.kv:
            return q, turned, v
        past_k, past_v = self._past.keys_values(layer)
        if len(past_k) != len(k):
            raise ValueError(f"batch {len(k)} does not match the cache's past of {len(past_k)}: reset() it first")
        return q, torch.cat([past_k.to(turned.dtype), turned], 1), torch.cat([past_v.to(v.dtype), v], 1)


class GradCache:
    """KVCache's interface for rollouts that need gradients: purely functional, right under activation checkpointing.

    Attention runs over [detached past | the chunk's own keys and values], so gradients reach the running chunk and
    nothing before it. `begin` opens a new pass each time; `commit` keeps what the latest pass wrote. Takes KVCache's
    arguments; batch, device and dtype follow the tensors it is given.
    """

    def __init__(
        self,
        size: ModelSize,
        settings: StreamSettings,
        shape: VideoShape,
        *,
        batch: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        capacity: int | None = None,
    ):
        self.ring = stream_ring(settings, shape, capacity)
        self.device = torch.device(device or "cpu")
        self._layers = size.layers
        self._grid_hw = shape.grid[1:]
        self._tokens = shape.tokens_per_frame
        self._head_dim = size.head_dim
        self._relative = settings.relative
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.frames_seen = 0
        self._running = 0
        self._frames: list[int] = []
        self._kv: list[tuple[Tensor, Tensor]] = []
        self._past: _Past | None = None
        self._pass: _Pass | None = None

    def begin(self, frames: int) -> _Pass:
        """Open a pass over the next chunk of `frames` frames or, again, over the running one. Errors: KVCache's."""
        if self._running and frames != self._running:
            raise RuntimeError(
                f"a chunk of {self._running} frames is running, not {frames}: commit() or reset() the cache first"
            )
        if not self._running:
            self.ring.check(self.frames_seen, self.frames_seen + frames)
            self._evict(self.ring.visible(self.frames_seen + frames))
            self._past = self._open(frames)
            self._running = frames
        if self._pass is not None:
            self._pass.close()
        self._pass = _Pass(self._past)
        return self._pass

    def _evict(self, visible: list[int]) -> None:
        keep = [i for i, frame in enumerate(self._frames) if frame in set(visible)]
        if len(keep) == len(self._frames):
            return
        spans = [slice(i * self._tokens, (i + 1) * self._tokens) for i in keep]
        self._kv = [tuple(torch.cat([x[:, at] for at in spans], 1) for x in kv) for kv in self._kv if keep]
        self._frames = [self._frames[i] for i in keep]

    def _open(self, frames: int) -> _Past:
        past, new = len(self._frames), range(self.frames_seen, self.frames_seen + frames)
        places = range(past + frames) if self._relative else [*self._frames, *new]
        device = self._kv[0][0].device if self._kv else self.device
        turn = [
            fresh_rope_table(part, self._grid_hw, self._head_dim, device) if part else None
            for part in (places[:past], places[past:])
        ]
        return _Past(self._kv if past else [], *turn)

    def update(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """KVCache.update for the latest pass; q, k, v keep their gradients."""
        if self._pass is None:
            raise RuntimeError("no chunk is running: call begin(frames) before update")
        return self._pass.update(layer, q, k, v)

    def commit(self) -> None:
        """Close the running chunk: detached keys and values of its latest pass join the past."""
        if not self._running:
            raise RuntimeError("no chunk is running: nothing to commit")
        if len(self._pass.written) != self._layers:
            raise RuntimeError(
                f"the latest pass wrote {len(self._pass.written)} of {self._layers} layers: run it whole"
            )
        new = [self._pass.written[layer] for layer in range(self._layers)]
        old = self._kv if self._frames else [(k[:, :0], v[:, :0]) for k, v in new]
        self._kv = [
            tuple(torch.cat([past.to(x.dtype), x], 1) for past, x in zip(kv, written, strict=True))
            for kv, written in zip(old, new, strict=True)
        ]
        self._frames = [*self._frames, *range(self.frames_seen, self.frames_seen + self._running)]
        self.frames_seen += self._running
        self._running, self._past, self._pass = 0, None, None

    def abandon(self) -> None:
        """Close the running chunk without a trace: the next one begins where it began. Its graphs stay whole."""
        if self._pass is not None:
            self._pass.close()
        self._running, self._past, self._pass = 0, None, None

    def visible(self) -> list[int]:
        """Numbers of the frames in sight, oldest first, the running chunk included."""
        return self.ring.visible(self.frames_seen + self._running)

    def occupancy(self) -> Occupancy:
        """Frames in sight now, frames that fit, and bytes of the past."""
        total = sum(x.nbytes for kv in self._kv for x in kv)
        return Occupancy(len(self.visible()), self.ring.capacity, total)
