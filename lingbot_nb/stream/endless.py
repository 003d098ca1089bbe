"""Play without end: does the picture hold, and do time and memory per chunk stay what they were."""

import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lingbot_nb.control.keys import KEYS, held
from lingbot_nb.presets import FPS
from lingbot_nb.report.metrics import frame_difference, laplacian_variance, saturation

FROZEN = 0.25
"""Mean change (of 255) between two pixel frames below which the picture stands still."""
MOVES = ("w", "w", "w", "wl", "wj", "l", "j", "s")
"""What the scripted walk holds, each equally often."""


@dataclass(frozen=True)
class Stretch:
    """Some seconds of play. `sharpness` is the Laplacian variance over that of the start frame, `saturation` in [0, 1],
    `frozen` the share of steps without change while keys were held, `chunk_ms` the median of its chunks, `memory` the
    process's resident bytes at its end."""

    second: float
    sharpness: float
    saturation: float
    frozen: float
    chunk_ms: float
    memory: int


def wander(seed: int = 0) -> Iterator[np.ndarray]:
    """Rows of keys bool [8] without end: moves of 8 to 40 pixel frames, drawn at random."""
    draw = np.random.default_rng(seed)
    while True:
        row = held(draw.choice(MOVES))
        yield from [row] * int(draw.integers(8, 41))


def play_on(session, keys: Iterable[np.ndarray], pixel_frames: int, *, every: int = 160) -> Iterator[Stretch]:
    """Play `pixel_frames` pixel frames under `keys`, a stretch for each `every` of them.

    Raises RuntimeError where the pictures have become flat black, white or grey: what nan decodes to.
    """
    keys, start = iter(keys), np.asarray(session.last_frame)
    reference = max(float(laplacian_variance(start)), 1e-6)
    before, done = start, 0
    while done < pixel_frames:
        frames, rows, times = [before], [], []
        while len(rows) < every:
            chunk = np.array([next(keys) for _ in range(session.next_frames)])
            began = time.perf_counter()
            frames.extend(session.step(chunk))
            times.append(time.perf_counter() - began)
            rows.extend(chunk)
        done += len(rows)
        yield _stretch(np.stack(frames), np.array(rows), times, done, reference)
        before = frames[-1]


def _stretch(frames: np.ndarray, rows: np.ndarray, times: list[float], done: int, reference: float) -> Stretch:
    new = frames[1:]
    if np.ptp(new[-1]) == 0:
        raise RuntimeError(f"the picture is flat after {done} pixel frames: the latents are nan or have run away")
    pressed = rows.reshape(-1, len(KEYS)).any(axis=1)
    still = frame_difference(frames) < FROZEN
    return Stretch(
        second=done / FPS,
        sharpness=float(laplacian_variance(new).mean()) / reference,
        saturation=float(saturation(new).mean()),
        frozen=float(still[pressed].mean()) if pressed.any() else 0.0,
        chunk_ms=1000 * float(np.median(times)),
        memory=memory(),
    )


def memory() -> int:
    """Resident bytes of this process (Linux); 0 elsewhere."""
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if file.exists() else 0


def draw(stretches: list[Stretch], path: Path, *, title: str = "") -> Path:
    """Sharpness, saturation, freeze rate, time per chunk and memory over the seconds of play, as a PNG at `path`."""
    from matplotlib import pyplot as plt

    from lingbot_nb.report import figures

    rows = (
        ("sharpness ÷ start", [s.sharpness for s in stretches]),
        ("saturation", [s.saturation for s in stretches]),
        ("freeze rate", [s.frozen for s in stretches]),
        ("ms a chunk", [s.chunk_ms for s in stretches]),
        ("memory, MB", [s.memory / 1e6 for s in stretches]),
    )
    seconds = [s.second for s in stretches]
    with plt.rc_context(figures.STYLE):
        figure, axes = plt.subplots(len(rows), 1, figsize=(7.5, 1.35 * len(rows)), sharex=True)
        for ax, (label, values) in zip(axes, rows, strict=True):
            ax.plot(seconds, values, color=figures.STUDENT, lw=1.3)
            ax.set_ylim(0, 1.15 * max(*values, 1e-3))
            ax.set_ylabel(label)
            ax.grid(axis="y")
        axes[0].set_title(title)
        axes[-1].set_xlabel("seconds of play")
        figure.savefig(path)
        plt.close(figure)
    return path


def summary(stretches: list[Stretch]) -> list[tuple[str, str, str, str]]:
    """A table of the first, middle and last tenth: name, first, middle, last."""
    tenth = max(1, len(stretches) // 10)
    middle = len(stretches) // 2
    parts = stretches[:tenth], stretches[middle : middle + tenth], stretches[-tenth:]
    columns = (
        ("sharpness ÷ start", lambda s: s.sharpness, "{:.2f}"),
        ("saturation", lambda s: s.saturation, "{:.2f}"),
        ("freeze rate", lambda s: s.frozen, "{:.2f}"),
        ("ms a chunk", lambda s: s.chunk_ms, "{:.1f}"),
        ("memory, MB", lambda s: s.memory / 1e6, "{:.0f}"),
    )
    lines = [(name, *(form.format(np.mean([read(s) for s in part])) for part in parts)) for name, read, form in columns]
    return [("", "first tenth", "middle", "last tenth"), *lines]
