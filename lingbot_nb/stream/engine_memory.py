"""What a stream needs on a GPU, known before anything is loaded, and what would fit where it does not."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from lingbot_nb.presets import LINGBOT_1B, TIME_STRIDE, ModelSize, Preset, VideoShape
from lingbot_nb.report import architecture

GIB = 2**30
_CONTEXT = 1.5 * GIB
"""What CUDA, its libraries and memory lost between allocations take."""
_DECODER_MAPS = 12
"""Feature maps of 64 channels at full size that a TAEHV holds at once while it decodes, its convolutions' scratch
included."""
_SMALLER = ((720, 1280), (480, 832), (352, 640), (256, 448))


@dataclass(frozen=True)
class Need:
    """Bytes on each GPU, by what they are for."""

    weights: float
    cache: float
    camera: float
    work: float
    rest: float = _CONTEXT

    @property
    def total(self) -> float:
        return self.weights + self.cache + self.camera + self.work + self.rest

    def __str__(self) -> str:
        parts = {"weights": self.weights, "cache": self.cache, "camera": self.camera, "work": self.work + self.rest}
        return f"{self.total / GIB:.0f} GiB (" + ", ".join(f"{k} {v / GIB:.1f}" for k, v in parts.items()) + ")"


def needed(preset: Preset, *, fp8: bool = False, ranks: int = 1, value_bytes: int = 2) -> Need:
    """What the engine needs for `preset` on each of `ranks` GPUs, in a type of `value_bytes`, products in fp8 or not.

    Counted: all weights, the window's keys and values with the sink's second copy, a chunk's films, the largest
    tensors of a pass and of a TAEHV. Raises ValueError for a stream without a window, which has no end.
    """
    size, shape, stream = preset.model, preset.shape, preset.stream
    if stream.window is None:
        raise ValueError("a stream without a window needs more memory with every chunk: give StreamSettings a window")
    tokens = stream.chunk * shape.tokens_per_frame
    frames = stream.window + (stream.sink / 2 if stream.relative else 0)
    return Need(
        weights=_weights(size, fp8, value_bytes),
        cache=architecture.kv_bytes(size, shape, 1, value_bytes) * frames / ranks,
        camera=2 * size.layers * tokens * size.dim * value_bytes / ranks if size.control_channels else 0,
        work=tokens * (8 * size.dim + value_bytes * (5 * size.dim + 2 * size.ffn_dim)) / ranks + _decoder(shape),
    )


def _weights(size: ModelSize, fp8: bool, value_bytes: int) -> float:
    whole = architecture.total(architecture.tensor_shapes(size)).parameters
    d = size.dim
    camera = 4 if size.control_channels else 0
    products = size.layers * ((6 + camera) * d * d + 2 * d * size.ffn_dim) if fp8 else 0
    return value_bytes * (whole - products) + products


def _decoder(shape: VideoShape) -> float:
    return _DECODER_MAPS * 2 * 64 * TIME_STRIDE * shape.height * shape.width


def check_memory(preset: Preset, available: float, *, fp8: bool = False, ranks: int = 1, value_bytes: int = 2) -> Need:
    """What `preset` needs, if `available` bytes a GPU hold it; RuntimeError that says what would fit otherwise."""
    need = needed(preset, fp8=fp8, ranks=ranks, value_bytes=value_bytes)
    if need.total <= available:
        return need
    fitting = list(_alternatives(preset, available, fp8, ranks, value_bytes))
    raise RuntimeError(
        f"{_name(preset)} needs {need} on each GPU, and {available / GIB:.0f} GiB are free: "
        + (f"what would fit is {'; '.join(fitting)}" if fitting else "use the tiny preset, which runs on a CPU")
    )


def _name(preset: Preset) -> str:
    shape, stream = preset.shape, preset.stream
    return f"{preset.name} at {shape.height}x{shape.width} with window {stream.window}"


def _alternatives(preset: Preset, available: float, fp8: bool, ranks: int, value_bytes: int) -> Iterator[str]:
    """The least that has to be given up of each kind: number format, window, picture size, model size."""
    narrow = replace(preset, stream=replace(preset.stream, window=preset.stream.sink + preset.stream.chunk))
    small = replace(preset, name=LINGBOT_1B.name, model=LINGBOT_1B.model)
    for way in ([preset], [narrow], [*_lower(preset)], [*_lower(narrow)], [small, *_lower(small)]):
        for other, kind in product(way, dict.fromkeys((fp8, True))):
            need = needed(other, fp8=kind, ranks=ranks, value_bytes=value_bytes)
            if need.total <= available:
                yield f"{_name(other)}{' in fp8' if kind and not fp8 else ''}: {need.total / GIB:.0f} GiB"
                break


def _lower(preset: Preset) -> Iterator[Preset]:
    for height, width in _SMALLER:
        if height * width < preset.shape.height * preset.shape.width:
            yield replace(preset, shape=replace(preset.shape, height=height, width=width))
