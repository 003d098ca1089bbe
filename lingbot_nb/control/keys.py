"""Held keys: action strings in LingBot's grammar, and boolean rows, one for each pixel frame.

Row n of a clip's keys is what is held on the way *into* pixel frame n, so row 0 moves nothing and the keys of a frame
are known when its picture is made.
"""

from collections.abc import Iterable
from itertools import groupby

import numpy as np

from lingbot_nb.presets import TIME_STRIDE

KEYS = "wasdijkl"
"""Column order: w a s d move, i k pitch up and down, j l turn left and right."""
MOVES = slice(0, 4)
"""Columns of w a s d, in LingBot's own order."""
LOOKS = slice(4, 8)
"""Columns of i j k l, in LingBot's own order."""

_NONE = "none"
_GRAMMAR = "write segments such as 'w-40,jl-20,none-4': letters of w a s d i j k l (or none), a hyphen, pixel frames"


def parse_keys(text: str) -> np.ndarray:
    """Read an action string such as "w-40,jl-20,none-4" into held keys.

    Segments are divided by ASCII or full-width commas; white space and case don't matter; a segment is cut at its last
    hyphen. Returns bool [n, 8], columns as in `KEYS`, n the sum of the segments' pixel frames. Raises ValueError that
    names the segment at fault.
    """
    if not isinstance(text, str):
        raise ValueError(f"action string is a {type(text).__name__}, not text: {_GRAMMAR}")
    segments = "".join(text.split()).lower().replace("，", ",").split(",")
    return np.concatenate([_segment(segment) for segment in segments])


def format_keys(keys_N8: np.ndarray) -> str:
    """Write held keys as the shortest action string that `parse_keys` reads back to the same rows.

    keys: [n, 8] with n >= 1. Raises ValueError for no rows, which the grammar cannot say.
    """
    rows = check_keys(keys_N8)
    if not len(rows):
        raise ValueError("0 rows of keys have no action string: give at least one pixel frame")
    return ",".join(f"{_name(row)}-{len(list(group))}" for row, group in groupby(map(tuple, rows)))


def held(names: Iterable[str]) -> np.ndarray:
    """One row of keys, bool [8], from the letters held down ("wl", ["w", "l"], an empty set: none)."""
    letters = [str(name).lower() for name in names]
    for letter in letters:
        if len(letter) != 1 or letter not in KEYS:
            raise ValueError(f"key '{letter}' is not one of {', '.join(KEYS)}: drop it or map it to one of them")
    return np.array([key in letters for key in KEYS])


def pad_to_clip(keys_N8: np.ndarray) -> np.ndarray:
    """Append rows without keys until the clip has 4n + 1 pixel frames; bool [4n + 1, 8]."""
    rows = check_keys(keys_N8)
    missing = (1 - len(rows)) % TIME_STRIDE
    return np.concatenate([rows, np.zeros((missing, len(KEYS)), dtype=bool)])


def check_keys(keys_N8: np.ndarray, what: str = "keys") -> np.ndarray:
    """The keys as bool [n, 8]; ValueError unless they are n rows of eight values in [0, 1] (pressed above 0.5)."""
    rows = check_pressed(keys_N8, what)
    if rows.shape[1] != len(KEYS):
        raise ValueError(f"{what} have shape {list(rows.shape)}: use [pixel frames, 8] in the order {' '.join(KEYS)}")
    return rows


def check_pressed(values: np.ndarray, what: str) -> np.ndarray:
    """A table of key values as bool [n, columns]; ValueError unless it is a matrix of numbers in [0, 1]."""
    table = np.asarray(values)
    if table.ndim != 2:
        raise ValueError(f"{what} have shape {list(table.shape)}: use one row for each pixel frame, one column a key")
    if table.dtype.kind not in "biuf":
        raise ValueError(f"{what} are of type {table.dtype}: use booleans or numbers from 0 to 1")
    inside = (table >= 0) & (table <= 1)  # NaN fails both comparisons
    if not inside.all():
        row, column = np.argwhere(~inside)[0]
        raise ValueError(f"{what} hold {table[row, column]} at row {row}, column {column}: use values from 0 to 1")
    return table > 0.5


def _segment(segment: str) -> np.ndarray:
    letters, hyphen, count = segment.rpartition("-")
    if not (hyphen and letters and count):
        raise ValueError(f"action segment '{segment}' is not KEYS-FRAMES: {_GRAMMAR}")
    if not (count.isascii() and count.isdigit() and int(count) > 0):
        raise ValueError(f"action segment '{segment}' lasts '{count}' pixel frames: use a whole number from 1 up")
    if letters != _NONE and (wrong := [letter for letter in letters if letter not in KEYS]):
        raise ValueError(f"action segment '{segment}' holds the unknown key '{wrong[0]}': {_GRAMMAR}")
    row = held("" if letters == _NONE else letters)
    return np.repeat(row[None], int(count), axis=0)


def _name(row: Iterable[bool]) -> str:
    return "".join(key for key, down in zip(KEYS, row, strict=True) if down) or _NONE
