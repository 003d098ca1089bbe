"""What a stream needs on a GPU, known before anything is loaded, and what would fit where it does not."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import product

from lingbot_nb.presets import LINGBOT_1B, TIME_STRIDE, ModelSize, Preset, VideoShape
from lingbot_nb.report import architecture
from lingbot_nb.stream.engine import Speed

GIB = 2**30
PLAIN_NUMBERS = Speed()
"""Everything that makes a stream fast and leaves its numbers as they are."""
_CONTEXT = 1.5 * GIB
"""What CUDA, its libraries and memory lost between allocations take."""
_TAEHV_MAPS = 12
"""Feature maps of 64 channels at full size that a TAEHV holds at once while it decodes, its convolutions' scratch
included."""
_WAN_MAPS = 52
"""The same of the Wan VAE, of 96 channels: half of them what its convolutions keep of the last frames."""
_SMALLER = ((720, 1280), (480, 832), (352, 640), (256, 448))


def taehv_maps(shape: VideoShape, value_bytes: int = 2) -> float:
    """Bytes that a TAEHV of numbers of `value_bytes` holds while it streams pictures of this size."""
    return _TAEHV_MAPS * value_bytes * 64 * TIME_STRIDE * shape.height * shape.width


def wan_maps(shape: VideoShape, value_bytes: int = 2) -> float:
    """Bytes that the Wan VAE's decoder of numbers of `value_bytes` holds while it streams pictures of this size."""
    return _WAN_MAPS * value_bytes * 96 * shape.height * shape.width


Decoder = Callable[[VideoShape, int], float]
"""Picture size and bytes of a number -> bytes that decoding takes."""


@dataclass(frozen=True)
class Need:
    """Bytes on each GPU, by what they are for."""

    weights: float
    cache: float = 0
    camera: float = 0
    work: float = 0
    """The largest tensors of a pass."""
    decoder: float = 0
    rest: float = _CONTEXT

    @property
    def tensors(self) -> float:
        """What PyTorch counts as allocated: not the decoder, for tensors inside a recording count only as reserved."""
        return self.weights + self.cache + self.camera + self.work

    @property
    def total(self) -> float:
        return self.tensors + self.decoder + self.rest

    def __add__(self, other: "Need") -> "Need":
        """Both at once, in one process."""
        parts = (getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "rest")
        return Need(*parts)

    def __str__(self) -> str:
        work = self.work + self.decoder + self.rest
        parts = {"weights": self.weights, "cache": self.cache, "camera": self.camera, "work": work}
        return f"{self.total / GIB:.0f} GiB (" + ", ".join(f"{k} {v / GIB:.1f}" for k, v in parts.items()) + ")"


def needed(
    preset: Preset,
    speed: Speed = PLAIN_NUMBERS,
    *,
    ranks: int = 1,
    value_bytes: int = 2,
    beside: bool = False,
    decoder: Decoder = taehv_maps,
) -> Need:
    """What the engine needs for `preset` on each of `ranks` GPUs, with all that `speed` asks for, in a type of
    `value_bytes`; `beside` a plain network that stays on the GPU, whose tensors it uses where it does not rebuild them.

    Counted: all weights, the window's keys and values with the sink's second copy, a chunk's films, the largest
    tensors of a pass and of the decoder. Raises ValueError for a stream without a window, which has no end.
    """
    size, chunks = preset.model, 1 + speed.merge
    whole, products = _values(size)
    rebuilt = products if speed.fp8 else value_bytes * 3 * size.layers * size.dim**2 if speed.join else 0
    weights = value_bytes * (whole - products) + products if speed.fp8 else value_bytes * whole
    return Need(
        weights=value_bytes * whole + rebuilt if beside else weights,
        cache=_cache(preset, 1 if speed.fp8_attention else value_bytes, value_bytes) / ranks,
        camera=chunks * _films(preset, value_bytes) / ranks,
        work=chunks * _work(preset, value_bytes) / ranks,
        decoder=decoder(preset.shape, value_bytes),
    )


def needed_plainly(preset: Preset, *, value_bytes: int = 2, decoder: Decoder = taehv_maps) -> Need:
    """What the plain path needs, on every GPU all of it: it makes a chunk's films beside those before."""
    return Need(
        weights=value_bytes * _values(preset.model)[0],
        cache=_cache(preset, value_bytes, value_bytes),
        camera=2 * _films(preset, value_bytes),
        work=_work(preset, value_bytes),
        decoder=decoder(preset.shape, value_bytes),
    )


@cache
def _values(size: ModelSize) -> tuple[int, int]:
    """Numbers in all weights, and in those that fp8 stores in one byte each."""
    camera = 4 if size.control_channels else 0
    products = size.layers * ((6 + camera) * size.dim**2 + 2 * size.dim * size.ffn_dim)
    return architecture.total(architecture.tensor_shapes(size)).parameters, products


def _cache(preset: Preset, cached_bytes: int, value_bytes: int) -> float:
    stream = preset.stream
    if stream.window is None:
        raise ValueError("a stream without a window needs more memory with every chunk: give StreamSettings a window")
    frame = architecture.kv_bytes(preset.model, preset.shape, 1, 1)
    # A sink that moves is kept a second time, keys only, and never in 8 bits.
    return frame * (cached_bytes * stream.window + (value_bytes * stream.sink / 2 if stream.relative else 0))


def _tokens(preset: Preset) -> int:
    return preset.stream.chunk * preset.shape.tokens_per_frame


def _films(preset: Preset, value_bytes: int) -> float:
    size = preset.model
    return 2 * size.layers * _tokens(preset) * size.dim * value_bytes if size.control_channels else 0


def _work(preset: Preset, value_bytes: int) -> float:
    size = preset.model
    return _tokens(preset) * (8 * size.dim + value_bytes * (5 * size.dim + 2 * size.ffn_dim))


def check_memory(preset: Preset, available: float, speed: Speed = PLAIN_NUMBERS, **how) -> Need:
    """What `preset` needs, if `available` bytes a GPU hold it; RuntimeError that says what would fit otherwise. `how`
    are `needed`'s."""
    need = needed(preset, speed, **how)
    if need.total <= available:
        return need
    fitting = list(_alternatives(preset, available, speed, how))
    raise RuntimeError(
        f"{_name(preset)} needs {need} on each GPU, and {available / GIB:.0f} GiB are free: "
        + (f"what would fit is {'; '.join(fitting)}" if fitting else "use the tiny preset, which runs on a CPU")
    )


def _name(preset: Preset) -> str:
    shape, stream = preset.shape, preset.stream
    return f"{preset.name} at {shape.height}x{shape.width} with window {stream.window}"


def _alternatives(preset: Preset, available: float, speed: Speed, how: Mapping) -> Iterator[str]:
    """The least that has to be given up of each kind: number format, window, picture size, model size."""
    narrow = replace(preset, stream=replace(preset.stream, window=preset.stream.sink + preset.stream.chunk))
    small = replace(preset, name=LINGBOT_1B.name, model=LINGBOT_1B.model)
    small_numbers = replace(speed, fp8=True, fp8_attention=True)
    for way in ([preset], [narrow], [*_lower(preset)], [*_lower(narrow)], [small, *_lower(small)]):
        for other, kind in product(way, dict.fromkeys((speed, small_numbers))):
            need = needed(other, kind, **how)
            if need.total <= available:
                yield f"{_name(other)}{' in fp8' if kind != speed else ''}: {need.total / GIB:.0f} GiB"
                break


def _lower(preset: Preset) -> Iterator[Preset]:
    for height, width in _SMALLER:
        if height * width < preset.shape.height * preset.shape.width:
            yield replace(preset, shape=replace(preset.shape, height=height, width=width))
