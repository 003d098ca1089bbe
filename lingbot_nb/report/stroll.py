"""A free walk by sight: someone who chooses keys from the pictures that they are shown, and from nothing else.

Recorded keys fit the rooms in which they were recorded. A student's rooms are soon others, and whoever walks on by keys
of elsewhere ends at walls. A person at the keyboard turns away from walls: so does this one, by the same rule in the
simulator and in a student's world.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from lingbot_nb.control.keys import MOVES, held
from lingbot_nb.presets import FPS
from lingbot_nb.report.judge import SHOWS
from lingbot_nb.report.metrics import laplacian_variance
from lingbot_nb.report.trials import Exam, Outcome, lasting, should_move, simulated_by_sight, turning
from lingbot_nb.world.clips import Clip

WANTED = ("w", "w", "w", "w", "wj", "wl", "a", "d", "")
"""What is held when nothing is in the way, each equally often."""
FRAMES, TURN = (8, 40), (8, 64)
"""Pixel frames, least and most: that a move takes, and that a turn to a view worth walking to takes."""
POOR = 0.5
"""Share of the fine detail that its walker usually sees below which a picture is mostly wall."""


@dataclass
class Stroller:
    """Someone who walks until the picture stops moving or is mostly wall, and then turns until there is more to see."""

    rng: np.random.Generator
    row: np.ndarray = field(default_factory=lambda: held(""))
    done: int = 0
    """Pixel frames for which `row` has been held."""
    length: int = 0
    """Pixel frames for which it is held, at most."""
    last: np.ndarray | None = None
    """The last picture of the chunk before."""
    details: list[float] = field(default_factory=list)
    """Fine detail of every chunk's last picture so far."""

    def keys(self, shown_NHW3: np.ndarray, count: int) -> np.ndarray:
        """The next `count` rows of keys, bool [count, 8], after the pictures u8 [N, H, W, 3] of the last chunk."""
        picture = shown_NHW3[-1]
        self.details.append(float(laplacian_variance(picture[None])[0]))
        rich = self.details[-1] / max(float(np.median(self.details)), 1e-9)
        if self.turning:
            self.done = self.length if self.done >= TURN[0] and rich >= 1 else self.done
        elif rich < POOR or self.stuck(picture):
            self.hold(str(self.rng.choice(["j", "l"])), TURN[1])
        self.last = picture
        return np.array([self.next_row() for _ in range(count)])

    @property
    def turning(self) -> bool:
        """Whether only turning keys are held."""
        return bool(self.row.any() and not self.row[MOVES].any())

    def stuck(self, picture_HW3: np.ndarray) -> bool:
        """Whether walking keys are held, and the picture did not move with them."""
        if self.last is None or not self.row[MOVES].any():
            return False
        return bool(np.abs(picture_HW3.astype(np.int16) - self.last).mean() < SHOWS)

    def next_row(self) -> np.ndarray:
        if self.done >= self.length:
            self.hold(str(self.rng.choice(WANTED)), int(self.rng.integers(FRAMES[0], FRAMES[1] + 1)))
        self.done += 1
        return self.row

    def hold(self, names: str, frames: int) -> None:
        self.row, self.done, self.length = held(names), 0, frames


def strollers(seed: int, count: int) -> list[Stroller]:
    """`count` of them, each with draws of their own; the same seed gives the same ones again."""
    return [Stroller(np.random.default_rng([seed, number])) for number in range(count)]


def stroll(exam: Exam, seconds: int = 60, walks: int = 8) -> Outcome:
    """Walks of `seconds` by sight from the first `walks` starts, in the simulator (where there is one) and by the
    student: the same numbers as `trials.free_walk`, where the keys are recorded ones.

    A student's freezing counts where it is told to turn: whether a step was in vain only a simulator knows.
    """
    return lasting(exam, strolled(exam, exam.clips[:walks], FPS * seconds + 1), seconds, f"{seconds} s by sight")


def strolled(exam: Exam, clips: Sequence[Clip], pixel_frames: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Label, films and the steps in which their pictures should move, bool [B, N - 1], of everyone who walks."""
    if exam.simulate:
        seeds, walkers = [clip.seed for clip in clips], strollers(exam.seed, len(clips))
        films, keys, poses = simulated_by_sight(seeds, walkers, pixel_frames, clips[0].map)
        yield "simulator", films, should_move(keys, poses)
    starts = np.stack([clip.frames[0] for clip in clips])
    films, keys = exam.play_by_sight(starts, strollers(exam.seed, len(clips)), pixel_frames)
    yield exam.name, films, turning(keys)
