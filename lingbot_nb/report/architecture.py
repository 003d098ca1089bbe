"""What the network is made of and what it costs, from names and shapes alone; only `changes` reads weights.

FLOP formulas count one multiply-add as 2; softmax, norms, element-wise work, patch embedding, time and text MLPs and
the head are left out (under 1 % at 14B). This module knows nothing of time on a clock: see `bench`.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from lingbot_nb.model import released, shards
from lingbot_nb.model.dit import DiT
from lingbot_nb.presets import ModelSize, StreamSettings, VideoShape

PARTS = (
    "self-attention",
    "cross-attention",
    "feed-forward",
    "modulation",
    "time",
    "text",
    "patch and head",
    "camera",
)
_RULES = (
    ("camera", re.compile(r"cam_|wancamctrl|c2ws_")),
    ("self-attention", re.compile(r"\.self_attn\.")),
    ("cross-attention", re.compile(r"\.cross_attn\.|\.norm3\.")),
    ("feed-forward", re.compile(r"\.ffn\.")),
    ("modulation", re.compile(r"modulation$")),
    ("time", re.compile(r"^time_")),
    ("text", re.compile(r"^text_embedding\.")),
    ("patch and head", re.compile(r"^patch_embedding\.|^head\.head\.")),
)


@dataclass(frozen=True)
class Count:
    """Tensors and the numbers in them."""

    tensors: int
    parameters: int


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one forward, by kind; `camera` is paid once a chunk when its films are kept."""

    linear: int
    camera: int
    attention: int

    @property
    def total(self) -> int:
        return self.linear + self.camera + self.attention


@dataclass(frozen=True)
class Diff:
    """How two state dicts differ by name and shape; `reshaped` holds (name, first shape, second shape)."""

    same: tuple[str, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    reshaped: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]


@dataclass(frozen=True)
class Change:
    """Numbers compared, and how far they moved together: |second - first| / |first| (infinite where all were zero)."""

    parameters: int
    relative: float


def part_of(name: str) -> str:
    """The part of the network (one of PARTS) that a parameter belongs to; ValueError for an unknown name."""
    for part, pattern in _RULES:
        if pattern.search(name):
            return part
    raise ValueError(f"parameter '{name}' belongs to no known part of the DiT: is this a LingBot or Wan state dict?")


def tensor_shapes(size: ModelSize) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of DiT(size), built on the meta device: 18.5 B cost no memory."""
    return {name: tuple(tensor.shape) for name, tensor in DiT(size, device="meta").named_parameters()}


def without_camera(size: ModelSize) -> ModelSize:
    """The same network before LingBot's additions: Wan2.2's image-to-video DiT."""
    return replace(size, control_channels=0)


def count_parts(shapes: Mapping[str, Sequence[int]]) -> dict[str, Count]:
    """Tensors and parameters by part, in the order of PARTS; parts without tensors are left out."""
    found: dict[str, list[int]] = {}
    for name, shape in shapes.items():
        found.setdefault(part_of(name), []).append(_numel(shape))
    return {part: Count(len(found[part]), sum(found[part])) for part in PARTS if part in found}


def total(shapes: Mapping[str, Sequence[int]]) -> Count:
    return Count(len(shapes), sum(_numel(shape) for shape in shapes.values()))


def read_shapes(path: Path | str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a DiT's weight file or folder, under the release's names, from the headers alone.

    Raises FileNotFoundError when there is none, ValueError when a header is damaged, two shards share a name, or the
    folder holds two experts (name one of their folders).
    """
    return released.find_one(Path(path).expanduser()).shapes


def diff(first: Mapping[str, Sequence[int]], second: Mapping[str, Sequence[int]]) -> Diff:
    """What two networks share and where they part, by name and shape (see `tensor_shapes` and `read_shapes`)."""
    shared = sorted(first.keys() & second.keys())
    return Diff(
        tuple(name for name in shared if tuple(first[name]) == tuple(second[name])),
        tuple(sorted(first.keys() - second.keys())),
        tuple(sorted(second.keys() - first.keys())),
        tuple((n, tuple(first[n]), tuple(second[n])) for n in shared if tuple(first[n]) != tuple(second[n])),
    )


def changes(first: Path | str, second: Path | str) -> dict[str, Change]:
    """By part, how far the tensors that two checkpoints share (same name, same shape) moved from first to second.

    Reads both from end to end, one tensor of each at a time. Errors: those of `read_shapes`, and ValueError for
    quantised tensors.
    """
    one, other = (released.find_one(Path(path).expanduser()) for path in (first, second))
    shared = {name for name, shape in one.shapes.items() if other.shapes.get(name) == shape}
    sums = {part: [0, 0.0, 0.0] for part in PARTS}
    for file in one.files:
        names = {theirs: ours for theirs, ours in one.of_file(file).items() if ours in shared}
        for name, before in shards.tensors(file, names):
            place = other.places[names[name]]
            ((_, after),) = shards.tensors(place.file, [place.name])
            row = sums[part_of(names[name])]
            row[0] += before.numel()
            row[1] += (after.float() - before.float()).norm().item() ** 2
            row[2] += before.float().norm().item() ** 2
    return {
        part: Change(n, math.sqrt(moved / size) if size else math.inf) for part, (n, moved, size) in sums.items() if n
    }


def fold_layers(names: Iterable[str]) -> dict[str, int]:
    """Names with the layer's number replaced by i, and how many layers carry each: 326 names become 14 lines."""
    folded: dict[str, int] = {}
    for name in names:
        short = re.sub(r"(?<=blocks\.)\d+(?=\.)", "i", name)
        folded[short] = folded.get(short, 0) + 1
    return folded


def forward_flops(size: ModelSize, shape: VideoShape, frames: int, visible: int) -> Flops:
    """One forward over `frames` query frames that see `visible` frames (their own included); text K and V are kept.

    linear: L n (8 d^2 self q,k,v,o + 4 d^2 cross q,o + 4 d ffn); camera: L n 8 d^2; attention: 4 L d n (keys + text).
    """
    queries, keys = frames * shape.tokens_per_frame, visible * shape.tokens_per_frame
    d = size.dim
    return Flops(
        linear=size.layers * queries * (12 * d * d + 4 * d * size.ffn_dim),
        camera=size.layers * queries * 8 * d * d if size.control_channels else 0,
        attention=4 * size.layers * d * queries * (keys + size.text_len),
    )


def chunk_flops(size: ModelSize, shape: VideoShape, frames: int, visible: int, forwards: int) -> int:
    """One streamed chunk: `forwards` passes (steps + clean pass) with the camera's films made once."""
    one = forward_flops(size, shape, frames, visible)
    return forwards * (one.linear + one.attention) + one.camera


def kv_bytes(size: ModelSize, shape: VideoShape, frames: int = 1, value_bytes: int = 2) -> int:
    """Bytes of the keys and values of `frames` frames over all layers (2 bytes a value: bf16)."""
    return 2 * size.layers * frames * shape.tokens_per_frame * size.dim * value_bytes


def visible_frames(settings: StreamSettings, lengths: Sequence[int]) -> list[int]:
    """Frames that each chunk of a stream sees, itself included."""
    ends = [sum(lengths[: index + 1]) for index in range(len(lengths))]
    return [end if settings.window is None else min(end, settings.window) for end in ends]


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; the first column is text, the others are numbers and stand to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _numel(shape: Sequence[int]) -> int:
    product = 1
    for extent in shape:
        product *= extent
    return product
