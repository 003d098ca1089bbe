"""Weight files, one tensor at a time: headers without the data, data without the file, never a pickled object.

Safetensors files are read and written in place, tensor by tensor, so that memory holds one tensor and not a file; a
pickle is opened with weights-only loading or not at all.
"""

import hashlib
import json
import math
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from lingbot_nb.model import packing

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Floating types that weights come in, by their names in a safetensors header."""
PICKLES = (".pth", ".pt", ".bin", ".ckpt")
SAFETENSORS = ".safetensors"

_OTHER_BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2}
_LONGEST_HEADER = 100_000_000
_METADATA = "__metadata__"


@dataclass(frozen=True)
class Entry:
    """A tensor of a weight file: its shape, its type by name (F32, BF16, …) and the bytes it takes."""

    shape: tuple[int, ...]
    dtype: str
    start: int = 0

    @property
    def bytes(self) -> int:
        each = DTYPES[self.dtype].itemsize if self.dtype in DTYPES else _OTHER_BYTES.get(self.dtype, 1)
        return each * math.prod(self.shape)


def header(path: Path | str) -> dict[str, Entry]:
    """Names of a weight file's tensors with shapes and types; no data is read. The scales of what the workbook packed
    (`packing`) are part of their tensors, not tensors of their own.

    Raises FileNotFoundError, or ValueError for a file that is cut short, damaged, or a pickle of more than tensors.
    """
    path = Path(path)
    if path.suffix in PICKLES:
        state = load_pickle(path, device="meta")
        return {name: Entry(tuple(value.shape), _dtype_name(value.dtype)) for name, value in state.items()}
    return {name: entry for name, entry in _entries(path)[0].items() if not name.endswith(packing.SCALE)}


def metadata(path: Path | str) -> dict[str, str]:
    """The free text that a safetensors file carries beside its tensors."""
    return _entries(Path(path))[1]


def tensors(path: Path | str, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Yields `names` of a weight file with their data on the CPU, in the type they are stored in, one at a time; those
    that the workbook packed (`packing`) in fp32."""
    path = Path(path)
    if path.suffix in PICKLES:
        state = load_pickle(path)
        yield from ((name, state[name]) for name in names)
        return
    entries = _entries(path)[0]
    with open(path, "rb", buffering=0) as file:
        for name in sorted(names, key=lambda name: entries[name].start):
            packed = name + packing.SCALE in entries
            yield name, _unpacked(path, name) if packed else _read(file, path, name, entries[name])


def _unpacked(path: Path, name: str) -> Tensor:
    with safe_open(path, "pt") as file:
        return packing.unpacked({part: file.get_tensor(part) for part in (name, name + packing.SCALE)})[name]


def write(path: Path | str, entries: Mapping[str, Entry], data: Iterable[tuple[str, Tensor]], **metadata: str) -> str:
    """Writes a safetensors file as `data` arrives and returns its sha256.

    `data` yields every name of `entries` once, in that order, with a tensor of that shape and type. The file appears
    under its name when it is whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        digest = hashlib.sha256()
        for piece in _pieces(entries, data, metadata):
            file.write(piece)
            digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    return digest.hexdigest()


def sha256(path: Path | str) -> str:
    """sha256 of a file of any size."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_pickle(path: Path | str, *, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a pickled state dict, opened so that it can hold nothing but tensors.

    A dict inside a dict ("state_dict", "model", …) is unwrapped. `device` "meta" gives shapes without data. Raises
    FileNotFoundError, or ValueError for a pickle of anything else.
    """
    path = _existing(Path(path))
    try:
        state = _load_pickle(path, device)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} is a pickle that holds more than tensors, and opening it could run its code: "
            "ask for a safetensors file"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as weights ({_first_line(error)}): download it again") from error
    if isinstance(state, dict) and len(state) == 1 and isinstance(next(iter(state.values())), dict):
        state = next(iter(state.values()))
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} is no dict of tensors: it is not a model's weights")
    return state


def _load_pickle(path: Path, device: str):
    try:
        return torch.load(path, map_location=device, weights_only=True, mmap=device == "cpu")
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location=device, weights_only=True)


def _entries(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    table, data_start = _table(path)
    size = path.stat().st_size
    free_text = table.pop(_METADATA, {})
    try:
        entries = {name: _entry(at, data_start) for name, at in table.items()}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} has a damaged header ({_first_line(error)}): download it again") from error
    end = max((entry.start + entry.bytes for entry in entries.values()), default=data_start)
    if end > size:
        raise ValueError(f"{path} ends {end - size} bytes early: finish its download or fetch it again")
    return entries, free_text


def _table(path: Path) -> tuple[dict, int]:
    with open(_existing(path), "rb") as file:
        first = file.read(8)
        if first == b"version ":
            raise ValueError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder")
        length = int.from_bytes(first, "little")
        size = path.stat().st_size
        if len(first) < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"{path} has no whole safetensors header in {size} bytes: download it again")
        try:
            table = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} has a damaged safetensors header: download it again") from error
    if not isinstance(table, dict):
        raise ValueError(f"{path} has a safetensors header that is no table: download it again")
    return table, 8 + length


def _entry(at: dict, data_start: int) -> Entry:
    start, end = at["data_offsets"]
    entry = Entry(tuple(map(int, at["shape"])), at["dtype"], data_start + start)
    known = entry.dtype in DTYPES or entry.dtype in _OTHER_BYTES
    if start < 0 or end < start or (known and end - start != entry.bytes):
        raise ValueError(f"{end - start} bytes for {entry.dtype} {list(entry.shape)}")
    return entry


def _read(file, path: Path, name: str, entry: Entry) -> Tensor:
    if entry.dtype not in DTYPES:
        raise ValueError(
            f"tensor {name} in {path} is {entry.dtype}, a quantised or integer type: use {' or '.join(DTYPES)} weights"
        )
    raw = torch.empty(entry.bytes, dtype=torch.uint8)
    view, at = memoryview(raw.numpy()), 0
    file.seek(entry.start)
    # One read call returns 2 GiB at most.
    while at < entry.bytes and (count := file.readinto(view[at:])):
        at += count
    if at < entry.bytes:
        raise ValueError(f"{path} ended in the middle of {name}: download it again")
    return raw.view(DTYPES[entry.dtype]).view(entry.shape)


def _pieces(entries: Mapping[str, Entry], data: Iterable[tuple[str, Tensor]], free_text: dict) -> Iterator:
    table, at = {_METADATA: free_text}, 0
    for name, entry in entries.items():
        offsets = [at, at + entry.bytes]
        table[name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": offsets}
        at = offsets[1]
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for (name, tensor), (expected, entry) in zip(data, entries.items(), strict=True):
        if (name, tuple(tensor.shape), _dtype_name(tensor.dtype)) != (expected, entry.shape, entry.dtype):
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)} where {expected} {entry} was announced")
        yield memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _dtype_name(dtype: torch.dtype) -> str:
    names = {value: name for name, value in DTYPES.items()}
    return names.get(dtype, str(dtype).removeprefix("torch."))


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"weight file {path} does not exist: check the path, or download it")
    return path


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
