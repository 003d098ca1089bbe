"""A session without a model for the player's tests: a moving pattern with its keys and its number painted in.

The top row of 8x8 blocks is white where a key of "wasdijkl" was held; the row below is the pixel frame's number in
binary, lowest bit first, 16 blocks. `read_keys` and `read_number` read them back, also from a lossy copy.
"""

import json
import time
import uuid
from pathlib import Path

import numpy as np

from lingbot_nb.control.keys import KEYS, held
from lingbot_nb.presets import FPS, VideoShape

BLOCK = 8
BITS = 16


class FakeSession:
    """Paints instead of denoising; a chunk pretends to take `seconds`; the keys received go to the file `log`."""

    shape = VideoShape(96, 160, 81)
    fps = FPS
    keys = "wasdjl"
    longest_chunk = 3

    def __init__(self, seconds: float = 0.0, chunk: int = 1, log: str | None = None):
        self.seconds, self.chunk, self.log = seconds, chunk, log
        self.prompt, self.steps, self.seed = "a painted corridor", 4, 0
        self.prompts = ("a painted corridor", "the same corridor at night")
        self.start_image = None
        self.last_timings = {"control": 0.1, "denoise": 1000 * seconds, "decode": 0.2, "clean pass": 0.1}
        self.calls: list[np.ndarray] = []
        self.name = uuid.uuid4().hex
        self.reset()

    @property
    def about(self) -> str:
        return f"painted · 160 × 96 · {self.chunk} a chunk"

    @property
    def next_frames(self) -> int:
        return 4 * self.chunk

    @property
    def first_frame(self) -> np.ndarray:
        return self._paint(0, np.zeros(len(KEYS), bool), 0.0, 0.0)

    def reset(self, seed: int | None = None) -> None:
        self.seed = self.seed if seed is None else seed
        self.number, self.walked, self.turned = 0, 0.0, 0.0
        self.last_frame = self.first_frame

    def generate(self, keys) -> np.ndarray:
        rows = np.asarray(keys, bool) if isinstance(keys, np.ndarray) else held(keys)
        rows = np.broadcast_to(rows, (self.next_frames, len(KEYS)))
        self._tell(rows)
        if self.seconds:
            time.sleep(self.seconds)
        frames = np.stack([self._next(row) for row in rows])
        self.last_frame = frames[-1]
        return frames

    def finish(self) -> None:
        pass

    def step(self, keys) -> np.ndarray:
        frames = self.generate(keys)
        self.finish()
        return frames

    def _tell(self, rows: np.ndarray) -> None:
        self.calls.append(rows[0].copy())
        if self.log:
            names = "".join(name for name, down in zip(KEYS, rows[0], strict=True) if down)
            with Path(self.log).open("a") as file:
                file.write(json.dumps({"keys": names, "number": self.number, "session": self.name}) + "\n")

    def _next(self, row: np.ndarray) -> np.ndarray:
        w, a, s, d, _, j, _, el = row.astype(float)
        self.number += 1
        self.walked += w - s
        self.turned += (el - j) + 0.5 * (d - a)
        return self._paint(self.number, row, self.walked, self.turned)

    def _paint(self, number: int, row: np.ndarray, walked: float, turned: float) -> np.ndarray:
        """A chequered floor and a sky that move as one walks and turns, under the two marker rows."""
        height, width = self.shape.height, self.shape.width
        y, x = np.mgrid[0:height, 0:width].astype(np.float32)
        side = (x - width / 2) / width
        depth = 6.0 / np.maximum(y / height - 0.45, 0.01)
        floor = (np.floor(depth * 0.25 + walked * 0.12) + np.floor(side * depth * 0.5 + turned * 0.12)) % 2
        fog = np.clip(depth / 90, 0, 1)[..., None]
        ground = np.where(floor[..., None] > 0, [184, 150, 110], [92, 74, 62]) * (1 - fog) + fog * np.array(
            [168, 186, 204]
        )
        glow = np.exp(-((x - width * 0.5 + turned * 5) ** 2 + (y - 30) ** 2) / 160)[..., None]
        sky = np.array([96, 138, 188]) + (y / height)[..., None] * np.array([150, 106, 36]) + 80 * glow
        picture = np.where((y / height > 0.47)[..., None], ground, sky).clip(0, 255).astype(np.uint8)
        if self.seed or self.start_image is not None:
            picture = np.roll(picture, 1 + self.seed % 3, axis=2)
        _mark(picture, 0, row)
        _mark(picture, BLOCK, [(number >> bit) & 1 for bit in range(BITS)])
        return picture


def _mark(picture: np.ndarray, top: int, bits) -> None:
    for index, bit in enumerate(bits):
        picture[top : top + BLOCK, index * BLOCK : (index + 1) * BLOCK] = 255 if bit else 0


def _bits(picture: np.ndarray, top: int, count: int) -> list[bool]:
    centre = picture[top + BLOCK // 2]
    return [bool(centre[index * BLOCK + BLOCK // 2].mean() > 127) for index in range(count)]


def read_keys(picture: np.ndarray) -> str:
    """The keys painted into a pixel frame u8 [96, 160, 3]."""
    return "".join(name for name, bit in zip(KEYS, _bits(picture, 0, len(KEYS)), strict=True) if bit)


def read_number(picture: np.ndarray) -> int:
    """The number painted into a pixel frame u8 [96, 160, 3]."""
    return sum(bit << index for index, bit in enumerate(_bits(picture, BLOCK, BITS)))
