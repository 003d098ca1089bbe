"""A free walk by sight: someone who chooses keys from the pictures that they are shown, and from nothing else.

Recorded keys fit the rooms in which they were recorded. A student's rooms are soon others, and whoever walks on by keys
of elsewhere ends at walls. A person at the keyboard turns away from walls: so does this one, by the same rule in the
simulator and in a student's world.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from lingbot_nb.control.keys import KEYS, MOVES, held
from lingbot_nb.presets import FPS, TIME_STRIDE
from lingbot_nb.report.judge import SHOWS
from lingbot_nb.report.metrics import laplacian_variance
from lingbot_nb.report.trials import Exam, Outcome, drift, long_strip, should_move
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


def simulated(clips: Sequence[Clip], walkers: Sequence[Stroller], pixel_frames: int) -> tuple[np.ndarray, ...]:
    """Where `walkers` go in ViZDoom from the starts of `clips`: films u8 [B, N, H, W, 3], keys bool [B, N, 8], their
    first row of no effect, and poses [B, N, 4, 4]."""
    from lingbot_nb.world.vizdoom import Simulator, SimulatorSettings

    walks = []
    with Simulator(SimulatorSettings(map=clips[0].map)) as game:
        for clip, walker in zip(clips, walkers, strict=True):
            frame, pose = game.reset(clip.seed)
            frames, poses, keys = [frame], [pose], [*walker.keys(frame[None], 1)]
            while len(frames) < pixel_frames:
                rows = walker.keys(np.stack(frames[-TIME_STRIDE:]), TIME_STRIDE)
                for frame, pose in map(game.step, rows):
                    frames.append(frame)
                    poses.append(pose)
                keys += [*rows]
            walks.append((np.stack(frames), np.stack(keys), np.stack(poses)))
    films, keys, poses = map(np.stack, zip(*walks, strict=True))
    return films, keys, poses


def stroll(exam: Exam, seconds: int = 60, walks: int = 8) -> Outcome:
    """Walks of `seconds` by sight from the first `walks` starts, in the simulator (where there is one) and by the
    student: the same numbers as `trials.free_walk`, where the keys are recorded ones.

    A student's freezing counts where it is told to turn: whether a step was in vain only a simulator knows.
    """
    if seconds < 2:
        raise ValueError(f"a stroll of {seconds} s is compared with its own first second: use 2 or more")
    scores, kept = {}, {}
    for label, films, moving in strolled(exam, exam.clips[:walks], FPS * seconds + 1):
        scores[label], kept[label] = drift(exam, films, moving), films
    mine = scores[exam.name]
    exam.say(f"  sharpness {mine['sharpness_last'][0]:.2f}, saturation {mine['saturation_last'][0]:.2f} of the first s")
    return Outcome(scores, long_strip(kept, exam.name, f"{seconds} s by sight"))


def strolled(exam: Exam, clips: Sequence[Clip], pixel_frames: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Label, films and the steps in which their pictures should move, bool [B, N - 1], of everyone who walks."""
    if exam.simulate:
        films, keys, poses = simulated(clips, strollers(exam.seed, len(clips)), pixel_frames)
        yield "simulator", films, should_move(keys, poses)
    starts = np.stack([clip.frames[0] for clip in clips])
    films, keys = exam.play_by_sight(starts, strollers(exam.seed, len(clips)), pixel_frames)
    yield exam.name, films, keys[:, 1:, KEYS.index("j")] ^ keys[:, 1:, KEYS.index("l")]
