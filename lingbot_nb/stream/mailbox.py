"""Large arrays from one process to another through memory that both map: a pipe takes ten times as long.

The sender `put`s an array and sends what it gets over a pipe; the receiver `take`s a copy. Arrays lie one behind the
other until the sender calls `empty`, which it may do once the receiver has taken what it wants.
"""

import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SMALL = 1 << 16
"""Bytes up to which a pipe is as quick."""
ALIGNED = 64
"""Bytes whose multiples arrays begin at."""
IN_MEMORY = Path("/dev/shm")
"""Where files never reach a disk, on Linux."""


@dataclass(frozen=True)
class Letter:
    """What the receiver has to know of an array that waits in the mailbox."""

    shape: tuple[int, ...]
    dtype: str
    start: int = 0
    """Where in the mailbox it begins, in bytes."""

    @property
    def end(self) -> int:
        return self.start + int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


class Mailbox:
    """A file of arrays; both sides open it with the same `path`, in a folder that exists."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._map: mmap.mmap | None = None
        self._full = 0

    def empty(self) -> None:
        """Begin at the front again: what lies here has been taken, or is not wanted."""
        self._full = 0

    def put(self, value):
        """A `Letter` for a large array that now lies here. Anything else, and an array for which there is no room,
        comes back as it is."""
        if not isinstance(value, np.ndarray) or value.nbytes <= SMALL:
            return value
        letter = Letter(value.shape, value.dtype.str, start=self._full)
        if not self._reserve(letter.end):
            return value
        self._view(letter)[...] = value
        self._full = -(-letter.end // ALIGNED) * ALIGNED
        return letter

    def take(self, value):
        """The array that a `Letter` stands for, as a copy; anything else as it is."""
        if not isinstance(value, Letter):
            return value
        if not self._maps(value.end):
            self._open()
        return self._view(value).copy()

    def _view(self, letter: Letter) -> np.ndarray:
        count = int(np.prod(letter.shape))
        return np.frombuffer(self._map, letter.dtype, count, offset=letter.start).reshape(letter.shape)

    def _reserve(self, size: int) -> bool:
        """Whether the file has `size` bytes of its own: writing to memory that is not there would end the process."""
        if self._maps(size):
            return True
        try:
            with open(self.path, "ab") as file:
                os.posix_fallocate(file.fileno(), 0, size)
        except (OSError, AttributeError):  # full, or a system without the call
            return False
        self._open()
        return True

    def _maps(self, size: int) -> bool:
        return self._map is not None and len(self._map) >= size

    def _open(self) -> None:
        with open(self.path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)


def folder_in_memory() -> str | None:
    """The folder whose files live in memory, where there is one to write to; for `tempfile`."""
    return str(IN_MEMORY) if os.access(IN_MEMORY, os.W_OK) else None
