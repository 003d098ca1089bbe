"""Where a training is going wrong, from its metrics rows: medians of a window of rows against earlier ones.

    for finding in check(rows): print(finding)

Rows are what `fit` yields or its metrics file holds. The loss of distribution matching says nothing about progress;
these signs do: the critic's loss, |g|, and how the student's clips compare with real ones (`dmd.vital_signs`).
"""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

Row = Mapping[str, float | None]


@dataclass(frozen=True)
class Limits:
    """From where on a sign is a warning; ratios are of the last window's median to the best window before it.

    `window` is the least number of values compared, of a long run a fifth is taken if that is more, up to `longest`.
    """

    window: int = 8
    longest: int = 100
    critic: float = 1.2
    pull: float = 2.0
    spread: tuple[float, float] = (0.7, 1.2)
    motion: float = 0.6
    motion_drop: float = 0.75
    spike: float = 10.0
    clipped: float = 0.5


@dataclass(frozen=True)
class Finding:
    """One warning: its name, the step it was seen at, what is the matter and what helps."""

    name: str
    step: int
    words: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.name}: {self.words}"


def values(rows: Iterable[Row], name: str) -> list[float]:
    """The finite values that rows have under a name; rows without it (the critic's alone) are passed over."""
    found = (row.get(name) for row in rows)
    return [value for value in found if value is not None and math.isfinite(value)]


def windows(found: Sequence[float], limits: Limits) -> list[float]:
    """Medians of successive windows, the last one ending at the newest value; fewer than two windows give []."""
    size = min(max(limits.window, len(found) // 5), limits.longest)
    count = len(found) // size
    if count < 2:
        return []
    first = len(found) - count * size
    return [statistics.median(found[i : i + size]) for i in range(first, len(found), size)]


# ---- the signs ------------------------------------------------------------------------------------------------------


def not_finite(rows: Sequence[Row], limits: Limits) -> Finding | None:
    """A loss or gradient norm that is nan or inf (null in a metrics file)."""
    for row in rows:
        for name, value in row.items():
            if name.endswith(("loss", "_grad")) and (value is None or not math.isfinite(value)):
                words = f"{name} is {value}: go back to the last checkpoint with a lower learning rate"
                return Finding("not finite", int(row["step"]), words)
    return None


def critic_lag(rows: Sequence[Row], limits: Limits) -> Finding | None:
    """The critic's loss rises above where it has been: it no longer knows the student's distribution."""
    medians = windows(values(rows, "critic_loss"), limits)
    if not medians or medians[-1] <= limits.critic * min(medians[:-1]):
        return None
    words = (
        f"its loss is {medians[-1]:.3g}, {medians[-1] / min(medians[:-1]):.2f} times its best: more critic updates to "
        "one of the student (ratio), a higher critic or a lower student learning rate"
    )
    return Finding("the critic lags", _last(rows), words)


def growing_pull(rows: Sequence[Row], limits: Limits) -> Finding | None:
    """|g| grows: student and teacher drift apart, or the critic misleads."""
    medians = windows(values(rows, "student_g"), limits)
    if not medians or medians[-1] <= limits.pull * min(medians[:-1]):
        return None
    ratio = medians[-1] / min(medians[:-1])
    words = f"|g| is {ratio:.2f} times its lowest: stop and take an earlier checkpoint, or a larger batch"
    return Finding("the pull grows", _last(rows), words)


def saturation(rows: Sequence[Row], limits: Limits) -> Finding | None:
    """The student's clips spread wider than real ones."""
    medians = windows(values(rows, "student_spread"), limits)
    if not medians or medians[-1] <= limits.spread[1]:
        return None
    words = f"clips spread {medians[-1]:.2f} times as wide as real ones: less guidance, or stop earlier"
    return Finding("saturation", _last(rows), words)


def washed_out(rows: Sequence[Row], limits: Limits) -> Finding | None:
    """The student's clips spread less than real ones."""
    medians = windows(values(rows, "student_spread"), limits)
    if not medians or medians[-1] >= limits.spread[0]:
        return None
    words = f"clips spread {medians[-1]:.2f} times as wide as real ones: train the critic longer before the student"
    return Finding("washed out", _last(rows), words)


def motion_loss(rows: Sequence[Row], limits: Limits) -> Finding | None:
    """The student's clips move less than real ones, or less than they used to."""
    medians = windows(values(rows, "student_motion"), limits)
    if not medians:
        return None
    best = max(medians[:-1])
    if medians[-1] >= limits.motion and medians[-1] >= limits.motion_drop * best:
        return None
    words = (
        f"clips move {medians[-1]:.2f} times as much as real ones, {medians[-1] / best:.2f} times the most so far: "
        "stop earlier, or start from a better causal student"
    )
    return Finding("motion is lost", _last(rows), words)


def spiking(role: str) -> Callable[[Sequence[Row], Limits], Finding | None]:
    """A role's gradient norm jumps far above its median."""

    def check(rows: Sequence[Row], limits: Limits) -> Finding | None:
        name = f"{role}_grad"
        found = values(rows, name)
        if len(found) < 2 * limits.window:
            return None
        usual = statistics.median(found)
        for row in reversed(rows[-2 * limits.window :]):
            norm = row.get(name)
            if norm is not None and norm > limits.spike * usual > 0:
                words = f"its norm is {norm:.3g}, {norm / usual:.0f} times the usual: look at the batch, clip lower"
                return Finding(f"the {role}'s gradient spikes", int(row["step"]), words)
        return None

    return check


CHECKS: tuple[Callable[[Sequence[Row], Limits], Finding | None], ...] = (
    not_finite,
    critic_lag,
    growing_pull,
    saturation,
    washed_out,
    motion_loss,
    *(spiking(role) for role in ("teacher", "student", "critic")),
)


def _last(rows: Sequence[Row]) -> int:
    return int(rows[-1]["step"])


def check(rows: Iterable[Row], limits: Limits | None = None, checks: Sequence[Callable] = CHECKS) -> list[Finding]:
    """All warnings that the rows so far give rise to, most urgent first; [] for a healthy or a short run."""
    rows = list(rows)
    return [finding for sign in checks if rows and (finding := sign(rows, limits or Limits())) is not None]
