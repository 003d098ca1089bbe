"""Clips on disk: shards of safetensors, a manifest with their hashes, and a store that reads them.

A shard holds raw pictures (fast: mapped into memory, nothing is copied until used) or lossless WebP (small: one long
picture per clip, so that repeated frames cost nothing). Both give the same bytes back.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

MANIFEST = "manifest.jsonl"
HELD_OUT_SEED = 1_000_000_000
"""Clips with this seed or a larger one are held out: they are never trained on."""
MAX_WEBP = 16383
_DTYPES = {"U8": np.uint8, "BOOL": np.bool_, "F32": np.float32, "I64": np.int64}


def split_of(seed: int) -> str:
    """'train' or 'held-out', which the seed alone decides."""
    return "held-out" if seed >= HELD_OUT_SEED else "train"


@dataclass(frozen=True, eq=False)
class Clip:
    """One walk.

    `frames` u8 [N, H, W, 3] RGB; `poses` f32 [N, 4, 4] camera-to-world, OpenCV axes (x right, y down, z forward),
    translation in map units; `keys` bool [N, 8] held on the way into each pixel frame (row 0: none), columns as in
    `control.keys.KEYS`; `intrinsics` f32 [4] fx, fy, cx, cy in pixels; `seed` places the start; `map` names the world.
    Raises ValueError when the parts do not belong together.
    """

    frames: np.ndarray
    poses: np.ndarray
    keys: np.ndarray
    intrinsics: np.ndarray
    seed: int
    map: str
    id: str

    def __post_init__(self):
        count = len(self.frames)
        parts = (
            ("frames", np.uint8, (count, *self.frames.shape[1:3], 3)),
            ("poses", np.float32, (count, 4, 4)),
            ("keys", np.bool_, (count, 8)),
            ("intrinsics", np.float32, (4,)),
        )
        for name, dtype, shape in parts:
            part = getattr(self, name)
            if part.dtype != dtype or part.shape != shape:
                raise ValueError(
                    f"clip '{self.id}': {name} are {part.dtype} {list(part.shape)}: "
                    f"give {np.dtype(dtype)} {list(shape)}"
                )

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def split(self) -> str:
        return split_of(self.seed)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_shard(path: Path | str, clips: Sequence[Clip], *, compress: bool = False) -> str:
    """Writes clips of one size to a temporary name, renames it to `path` and returns its sha256.

    `compress` stores lossless WebP: a third of raw for ViZDoom, a second of work per clip.
    Raises ValueError for clips of several sizes.
    """
    path = Path(path)
    if len({clip.frames.shape for clip in clips}) > 1:
        raise ValueError(f"shard '{path.name}' would mix clips of several sizes: write one shard for each size")
    tensors = {name: np.stack([getattr(c, name) for c in clips]) for name in ("poses", "keys", "intrinsics") if clips}
    if clips:
        tensors |= _compressed(clips) if compress else {"frames": np.stack([clip.frames for clip in clips])}
    rows = [{"id": clip.id, "seed": clip.seed, "map": clip.map} for clip in clips]
    partial = path.with_name(path.name + ".partial")
    save_file(tensors, partial, metadata={"clips": json.dumps(rows)})
    with open(partial, "rb+") as file:
        os.fsync(file.fileno())
    os.chmod(partial, 0o644)  # safetensors makes files that nobody else can read
    digest = sha256(partial)
    os.replace(partial, path)
    return digest


def read_shard(path: Path | str) -> list[Clip]:
    """The clips of one shard; raw pictures stay mapped from the file (read-only) until they are used.

    Raises FileNotFoundError without the file, RuntimeError when it is not a whole shard.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"clip shard '{path}' is not there: {_fix(path)}")
    try:
        metadata, tensors = _map_tensors(path)
        return [_clip(tensors, index, row) for index, row in enumerate(json.loads(metadata["clips"]))]
    except (KeyError, ValueError, OSError, EOFError) as error:
        raise RuntimeError(f"clip shard '{path}' cannot be read ({error}): {_fix(path)}") from error


def read_manifest(folder: Path | str) -> list[dict]:
    """The manifest's lines, one per shard; empty without a manifest."""
    path = Path(folder) / MANIFEST
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_manifest(folder: Path | str, lines: Sequence[dict]):
    """Replaces the manifest as a whole, so that a kill leaves the old or the new one."""
    path = Path(folder) / MANIFEST
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.replace(partial, path)


def verify(folder: Path | str, lines: Sequence[dict]):
    """Hashes every shard named in the manifest's `lines`.

    Raises FileNotFoundError or RuntimeError, naming the shard and the fix, when one is missing or changed.
    """
    folder = Path(folder)
    missing = [line["shard"] for line in lines if not (folder / line["shard"]).exists()]
    if missing:
        raise FileNotFoundError(f"clip shard '{folder / missing[0]}' is not there: {_fix(folder / missing[0])}")
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda line: sha256(folder / line["shard"]), lines)
        for line, digest in zip(lines, found, strict=True):
            if digest != line["sha256"]:
                path = folder / line["shard"]
                raise RuntimeError(f"clip shard '{path}' is damaged (its sha256 is not the manifest's): {_fix(path)}")


class ClipStore(Sequence[Clip]):
    """The clips of a folder, in order of their seeds; `store[i]` costs no copy for raw shards.

    `split` keeps 'train' or 'held-out' clips only; `check` hashes all shards first.
    Raises FileNotFoundError without a manifest or shard, RuntimeError for a damaged shard.
    """

    def __init__(self, folder: Path | str, *, split: str | None = None, check: bool = True):
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).exists():
            raise FileNotFoundError(f"no clips in '{folder}' (no {MANIFEST}): collect some there first")
        if split not in (None, "train", "held-out"):
            raise ValueError(f"unknown split '{split}': use 'train' or 'held-out', or None for both")
        lines = read_manifest(folder)
        self.lines = [line for line in lines if split is None or line["split"] == split]
        if check:
            verify(folder, self.lines)
        self._where = sorted(
            (seed, line["shard"], row) for line in self.lines for row, seed in enumerate(line["seeds"])
        )
        self._shard = lru_cache(4 if self.compressed else None)(lambda name: read_shard(self.folder / name))

    @cached_property
    def compressed(self) -> bool:
        return any(line.get("compress") for line in self.lines)

    @property
    def seeds(self) -> list[int]:
        return [seed for seed, _, _ in self._where]

    def __len__(self) -> int:
        return len(self._where)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        _, shard, row = self._where[index]
        return self._shard(shard)[row]

    def __iter__(self) -> Iterator[Clip]:
        return (self[index] for index in range(len(self)))


def _fix(path: Path) -> str:
    return f"delete it and collect the clips of '{path.parent}' again, which makes only what is missing"


def _map_tensors(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """Metadata and tensors of a safetensors file, mapped instead of read."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > path.stat().st_size:
            raise ValueError("it is cut short")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    data = np.memmap(path, np.uint8, "r", offset=8 + length) if header else np.empty(0, np.uint8)
    tensors = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        tensors[name] = data[start:stop].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return metadata, tensors


def _clip(tensors: dict[str, np.ndarray], index: int, row: dict) -> Clip:
    poses, keys, intrinsics = (np.array(tensors[name][index]) for name in ("poses", "keys", "intrinsics"))
    frames = _pictures(tensors, index, len(poses)) if "webp" in tensors else tensors["frames"][index]
    return Clip(frames, poses, keys, intrinsics, **row)


def _compressed(clips: Sequence[Clip]) -> dict[str, np.ndarray]:
    from PIL import Image

    if (rows := clips[0].frames.shape[0] * clips[0].frames.shape[1]) > MAX_WEBP:
        raise ValueError(f"a clip {rows} pixels tall does not fit into one WebP picture: use at most {MAX_WEBP}")
    blobs = []
    for clip in clips:
        file = io.BytesIO()
        strip = Image.fromarray(np.ascontiguousarray(clip.frames).reshape(-1, *clip.frames.shape[2:]))
        strip.save(file, "WEBP", lossless=True, quality=75, method=6)
        blobs.append(np.frombuffer(file.getvalue(), np.uint8))
    ends = np.cumsum([0] + [len(blob) for blob in blobs])
    return {"webp": np.concatenate(blobs), "webp_ends": ends.astype(np.int64)}


def _pictures(tensors: dict[str, np.ndarray], index: int, count: int) -> np.ndarray:
    from PIL import Image

    start, stop = tensors["webp_ends"][index : index + 2]
    strip = np.array(Image.open(io.BytesIO(tensors["webp"][start:stop].tobytes())).convert("RGB"))
    return strip.reshape(count, -1, *strip.shape[1:])
