"""One helper per picture type; the same thing has the same colour through the whole book.

Every helper draws into `ax` or makes its own figure, and returns the axes (end the cell with `;`). Axes carry units.
Frames are uint8 [N, H, W, 3] or floating point in [-1, 1].
"""

import base64
import io
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from functools import wraps

import matplotlib
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from lingbot_nb.presets import FPS, Preset
from lingbot_nb.report.metrics import bootstrap_mean

TEACHER, STUDENT, CLEAN, NOISY = "#7f7f7f", "#2f6fb7", "#3f9b57", "#f0883e"
"""Teacher grey, student blue, clean context green, noisy orange."""
LIMIT = "#c1121f"
"""What was asked for, what cannot be passed, what a picture points at."""
SINK, REAL, HIDDEN, INK = "#1d6b3a", "#222222", "#f3f3f1", "#333333"
COLOURS = {
    "teacher": TEACHER,
    "student": STUDENT,
    "clean": CLEAN,
    "noisy": NOISY,
    "simulator": REAL,
    "real": REAL,
    "critic": "#9a5fb4",
}
"""Colour by the first word of a label; other labels take what `_EXTRA` offers."""
_EXTRA = ("#9a5fb4", "#c44e52", "#17a2b0", "#b58900", "#8c6d4f", "#5b7f95")
STYLE = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": False,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
}
CLIP_LIMIT = 1_000_000
"""Bytes that an embedded clip may take."""


def colour(label: str, index: int = 0) -> str:
    """The book's colour of a label such as "student, 4 steps" (by its first word), else the index-th spare colour."""
    first = label.lower().replace(",", " ").split()[:1]
    return COLOURS.get(first[0] if first else "", _EXTRA[index % len(_EXTRA)])


def conditions(preset: Preset, device="cpu", dtype=torch.float32, **extra) -> str:
    """The line under every figure and number: preset, shape, dtype, device with threads, versions, and `extra`.

    Example: "tiny · 96x160, 21 frames of 60 tokens · float32 · cpu (2 threads, x86_64) · torch 2.13.0 · steps 4".
    """
    shape = preset.shape
    parts = [
        preset.name,
        f"{shape.height}x{shape.width}, {shape.frames} frames of {shape.tokens_per_frame} tokens",
        str(dtype).removeprefix("torch."),
        _device_name(torch.device(device)),
        f"torch {torch.__version__}, Python {platform.python_version()}",
        *(f"{name} {value}" for name, value in extra.items()),
    ]
    return " · ".join(parts)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads, {platform.machine()})"


def styled(draw):
    """Decorator: draw with the book's style without changing matplotlib's global settings."""

    @wraps(draw)
    def inner(*args, **kwargs):
        with plt.rc_context(STYLE):
            drawn = draw(*args, **kwargs)
            interactive = plt.isinteractive()
        # The first figure of a kernel loads the notebook's backend, which turns interactive mode on: leaving the
        # context would turn it off again, and no later figure would show.
        matplotlib.interactive(interactive)
        return drawn

    return inner


def _axes(ax: Axes | None, width: float, height: float) -> Axes:
    return plt.subplots(figsize=(width, height))[1] if ax is None else ax


@styled
def panels(columns: int, *, rows: int = 1, width: float = 10, height: float = 3.9) -> list[Axes]:
    """Axes side by side (row after row) in the book's style, for helpers that take an `ax`. Sizes in inches."""
    return list(plt.subplots(rows, columns, figsize=(width, height), squeeze=False)[1].flat)


@styled
def filmstrip(
    rows: Mapping[str, np.ndarray],
    *,
    count: int = 8,
    at: Sequence[int] | None = None,
    fps: float = FPS,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Films as strips: a row for each label, `count` pixel frames from first to last (or the indices `at`), with times.

    rows: label -> frames [N, H, W, 3]. A row that is shorter than an index leaves that place empty.
    """
    films = {label: _uint8(frames) for label, frames in rows.items()}
    if not films:
        raise ValueError("a filmstrip needs at least one row of frames")
    longest = max(len(film) for film in films.values())
    picks = list(at) if at is not None else np.linspace(0, longest - 1, min(count, longest)).round().astype(int)
    height, width = next(iter(films.values())).shape[1:3]
    gap = max(2, width // 40)
    sheet = np.full((len(films) * (height + gap) - gap, len(picks) * (width + gap) - gap, 3), 255, dtype=np.uint8)
    for row, film in enumerate(films.values()):
        for column, index in enumerate(picks):
            if index < len(film):
                top, left = row * (height + gap), column * (width + gap)
                sheet[top : top + height, left : left + width] = film[index]
    ax = _axes(ax, 9.5, 9.5 * sheet.shape[0] / sheet.shape[1] + 0.45)
    ax.imshow(sheet, interpolation="nearest" if width >= 120 else "none")
    ax.set_xticks(np.arange(len(picks)) * (width + gap) + width / 2, [f"{index / fps:.2f} s" for index in picks])
    ax.set_yticks(np.arange(len(films)) * (height + gap) + height / 2, list(films))
    _bare(ax)
    ax.set_title(title)
    return ax


@styled
def mask_picture(
    keep: np.ndarray | torch.Tensor,
    *,
    tokens_per_frame: int = 1,
    lengths: Sequence[int] = (),
    halves: bool = False,
    query: int | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Which key (column) every query (row) sees, with frame and chunk boundaries and the share that is seen.

    keep: bool [Lq, Lk] over tokens, or over frames with tokens_per_frame=1. lengths: frames of each chunk (thick
    lines). halves: the sequence is [clean | noisy], keys coloured green and orange. query: a query frame to outline.
    """
    keep = _bool(keep)
    frames_q, frames_k = keep.shape[0] // tokens_per_frame, keep.shape[1] // tokens_per_frame
    ax = _axes(ax, 4.4, 4.4 * keep.shape[0] / keep.shape[1] + 0.3)
    ax.imshow(_mask_colours(keep, halves), interpolation="nearest", aspect="equal")
    _boundaries(ax, frames_q, frames_k, tokens_per_frame, lengths, halves)
    _frame_ticks(ax.xaxis, frames_k, tokens_per_frame, halves)
    _frame_ticks(ax.yaxis, frames_q, tokens_per_frame, halves)
    ax.set_xlabel("key frame (clean | noisy)" if halves else "key frame (what is seen)")
    ax.set_ylabel("query frame (clean | noisy)" if halves else "query frame (who looks)")
    if query is not None:
        corner = (-0.5, query * tokens_per_frame - 0.5)
        ax.add_patch(Rectangle(corner, keep.shape[1], tokens_per_frame, fill=False, lw=1.8, ec=LIMIT, zorder=5))
    if halves:
        handles = [Patch(color=CLEAN, label="clean key"), Patch(color=NOISY, label="noisy key")]
        # The upper right quarter is empty: no clean frame sees a noisy one.
        ax.legend(
            handles=handles,
            loc="upper right",
            handlelength=1,
            frameon=True,
            facecolor=HIDDEN,
            edgecolor="none",
            framealpha=1,
        )
    _bare(ax)
    ax.set_title(f"{title}\n{keep.mean():.0%} of pairs seen".strip())
    return ax


def _mask_colours(keep: np.ndarray, halves: bool) -> np.ndarray:
    """0 hidden, 1 seen, 2 seen in the noisy half -> an RGB picture (one palette per picture, no colour bar needed)."""
    kinds = keep.astype(int)
    if halves:
        kinds[:, keep.shape[1] // 2 :] *= 2
    palette = ListedColormap([HIDDEN, CLEAN if halves else STUDENT, NOISY])
    return palette(kinds)


def _boundaries(ax: Axes, frames_q: int, frames_k: int, tokens: int, lengths: Sequence[int], halves: bool) -> None:
    many = max(frames_q, frames_k) > 48
    for count, line in ((frames_q, ax.axhline), (frames_k, ax.axvline)):
        for token in range(1, count * tokens if tokens > 1 and count * tokens <= 64 else 0):
            line(token - 0.5, color="white", lw=0.3)
        for frame in range(1, count if not many else 0):
            line(frame * tokens - 0.5, color="white", lw=1.2 if tokens > 1 else 0.8)
        for edge in _chunk_edges(lengths, count, halves):
            line(edge * tokens - 0.5, color=INK, lw=1.0)
        if halves:
            line(count // 2 * tokens - 0.5, color=INK, lw=2.2)


def _chunk_edges(lengths: Sequence[int], frames: int, halves: bool) -> list[int]:
    edges = np.cumsum(lengths)[:-1].tolist() if len(lengths) and max(lengths) > 1 else []
    return edges + [frames // 2 + edge for edge in edges] if halves else edges


def _frame_ticks(axis, frames: int, tokens: int, halves: bool) -> None:
    half = frames // 2 if halves else frames
    step = max(1, -(-frames // 14))
    marks = [frame for frame in range(frames) if frame % half % step == 0]
    axis.set_ticks([frame * tokens + (tokens - 1) / 2 for frame in marks], [str(frame % half) for frame in marks])


@styled
def query_picture(
    keep_frames: np.ndarray | torch.Tensor,
    query: int,
    *,
    lengths: Sequence[int] = (),
    sink: int = 0,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """What one query frame sees: a row of frames, green seen past, dark green sink, orange its own chunk, grey unseen.

    keep_frames: bool [F, F] over frames; query: the frame that looks.
    """
    seen = _bool(keep_frames)[query]
    ends = np.cumsum(lengths) if len(lengths) else np.arange(1, len(seen) + 1)
    chunk = int(np.searchsorted(ends, query, side="right"))
    own = range(int(ends[chunk - 1]) if chunk else 0, int(ends[chunk]))
    ax = _axes(ax, 9.5, 1.15)
    for frame, visible in enumerate(seen):
        face = NOISY if frame in own else SINK if frame < sink else CLEAN
        ax.add_patch(Rectangle((frame + 0.05, 0), 0.9, 1, fc=face if visible else HIDDEN, ec="#999999", lw=0.6))
        ax.text(frame + 0.5, 0.5, frame, ha="center", va="center", color="white" if visible else "#999999", fontsize=8)
    ax.add_patch(Rectangle((query + 0.02, -0.05), 0.96, 1.1, fill=False, ec=LIMIT, lw=2))
    ax.set(xlim=(-0.1, len(seen) + 0.1), ylim=(-0.15, 1.15), yticks=[], xticks=[])
    _bare(ax)
    handles = [Patch(color=SINK, label="sink"), Patch(color=CLEAN, label="past"), Patch(color=NOISY, label="own chunk")]
    ax.legend(handles=handles[0 if sink else 1 :], ncols=3, loc="upper left", bbox_to_anchor=(0, 0.02))
    ax.set_title(title or f"a query in frame {query} sees {int(seen.sum())} of {len(seen)} frames")
    return ax


@styled
def influence_picture(
    influence: np.ndarray | torch.Tensor,
    *,
    lengths: Sequence[int] = (),
    mark: np.ndarray | torch.Tensor | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Which frame (row) reacts when one frame (column) is changed: the darker the more, light grey exactly nothing.

    influence: [F, F], mean absolute change of the output. mark: bool [F, F], the mask itself, as dots.
    """
    influence = np.asarray(influence, dtype=float)
    frames = len(influence)
    ax = _axes(ax, 3.4, 3.6)
    strength = np.sqrt(influence / max(influence.max(), 1e-30))
    cells = plt.get_cmap("Blues")(0.25 + 0.75 * strength)
    cells[influence == 0] = to_rgba(HIDDEN)
    ax.imshow(cells, interpolation="nearest")
    _boundaries(ax, frames, frames, 1, lengths, halves=False)
    if mark is not None:
        rows, columns = np.nonzero(_bool(mark))
        ax.plot(columns, rows, "o", mfc=INK, mec="white", mew=0.8, ms=4.5)
    _frame_ticks(ax.xaxis, frames, 1, halves=False)
    _frame_ticks(ax.yaxis, frames, 1, halves=False)
    ax.set_xlabel("frame that is changed")
    ax.set_ylabel("frame that reacts")
    _bare(ax)
    ax.set_title(f"{title}\n{(influence > 0).mean():.0%} of pairs react".strip())
    return ax


@styled
def cache_occupancy(
    slots: np.ndarray, *, sink: int = 0, current: Sequence[int] = (), title: str = "", ax: Axes | None = None
) -> Axes:
    """Which frame every cache slot holds after each chunk.

    slots: int [chunks, capacity], -1 where empty. current: frames of each chunk, to colour what it has just written
    (orange), the sink dark green, the kept past green. Frame numbers are written in while they fit.
    """
    slots = np.asarray(slots)
    chunks, capacity = slots.shape
    lengths = list(current) or [1] * chunks
    starts = np.cumsum([0, *lengths])[:-1]
    kinds = np.where(slots < 0, 0, np.where(slots < sink, 1, np.where(slots >= starts[:, None], 3, 2)))
    ax = _axes(ax, min(9.5, 1.6 + 0.3 * chunks), 1.0 + 0.24 * capacity)
    palette = ListedColormap([HIDDEN, SINK, CLEAN, NOISY])
    ax.imshow(palette(kinds.T), aspect="auto", interpolation="nearest")
    if chunks <= 40:
        for (chunk, slot), frame in np.ndenumerate(slots):
            if frame >= 0:
                ax.text(chunk, slot, frame, ha="center", va="center", fontsize=7, color="white")
    _cell_grid(ax, chunks, capacity)
    ax.set_xlabel("chunk")
    ax.set_ylabel("slot (frames)")
    ax.set_xticks(range(0, chunks, max(1, chunks // 20)))
    ax.set_yticks(range(0, capacity, max(1, capacity // 10)))
    names = [("sink", SINK), ("kept past", CLEAN), ("written now", NOISY), ("empty", HIDDEN)]
    handles = [Patch(fc=c, ec="#999999", lw=0.5, label=n) for n, c in names if sink or n != "sink"]
    ax.legend(handles=handles, ncols=4, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)
    _bare(ax)
    ax.set_title(title)
    return ax


def _cell_grid(ax: Axes, columns: int, rows: int) -> None:
    if columns <= 80:
        ax.vlines(np.arange(columns - 1) + 0.5, -0.5, rows - 0.5, color="white", lw=0.8)
    ax.hlines(np.arange(rows - 1) + 0.5, -0.5, columns - 0.5, color="white", lw=0.8)


@styled
def latency_waterfall(
    chunks: Sequence[Mapping[str, float]], *, budget_ms: float, title: str = "", ax: Axes | None = None
) -> Axes:
    """Where the milliseconds of each chunk go, stage after stage, against the real-time line.

    chunks: for each chunk stage name -> ms, in order; budget_ms: what a chunk's pixel frames last on screen.
    """
    stages = list(dict.fromkeys(name for chunk in chunks for name in chunk))
    ax = _axes(ax, 8.5, 1.4 + 0.28 * len(chunks))
    start = np.zeros(len(chunks))
    for index, stage in enumerate(stages):
        span = np.array([chunk.get(stage, 0.0) for chunk in chunks])
        ax.barh(range(len(chunks)), span, left=start, height=0.72, color=_stage_colour(stage, index), label=stage)
        start = start + span
    for row, total in enumerate(start):
        ax.text(total, row, f" {total:.0f} ms", va="center", fontsize=8, color=INK)
    ax.axvline(budget_ms, color=LIMIT, lw=1.5, ls="--")
    ax.set(xlim=(0, 1.15 * max(start.max(), budget_ms)), ylim=(len(chunks) - 0.4, -0.6), yticks=range(len(chunks)))
    late = int((start > budget_ms).sum())
    ax.text(budget_ms, -0.62, f"real time, {budget_ms:.0f} ms ", color=LIMIT, fontsize=8, ha="right", va="bottom")
    ax.set_xlabel("ms since the chunk began")
    ax.set_ylabel("chunk")
    ax.figure.legend(*ax.get_legend_handles_labels(), ncols=len(stages), loc="outside lower center")
    verdict = f"{late} of {len(chunks)} chunks late" if late else "every chunk in time"
    ax.set_title(f"{title}: {verdict}" if title else verdict, pad=14)
    return ax


@styled
def speed_ladder(rows: Sequence[Mapping], *, title: str = "", ax: Axes | None = None) -> Axes:
    """Frames a second of each rung, with what each one gains over the one before, next to the arithmetic floor.

    rows: as `bench_stream` saves them, in order: name, fps, floor and period in ms.
    """
    ax = _axes(ax, 8.5, 1.3 + 0.34 * len(rows))
    fps, best = [row["fps"] for row in rows], [row["fps"] * row["period"] / row["floor"] for row in rows]
    places = range(len(rows))
    ax.barh(places, fps, height=0.66, color=[TEACHER, *[STUDENT] * (len(rows) - 1)])
    ax.vlines(best, [y - 0.38 for y in places], [y + 0.38 for y in places], color=LIMIT, lw=1.5)
    for y in places:
        gain = "" if y == 0 else f"{fps[y] / fps[y - 1]:.2f}x   "
        # Inside the bar, where no floor can cross it.
        ax.text(fps[y], y, f"{gain}{fps[y]:.1f}  ", va="center", ha="right", fontsize=8, color="white")
    ax.text(best[0], -0.45, "arithmetic floor ", color=LIMIT, fontsize=8, ha="right", va="bottom")
    ax.set_yticks(places, [row["name"] for row in rows])
    ax.set(xlim=(0, 1.12 * max(*best, *fps)), ylim=(len(rows) - 0.4, -0.9), xlabel="pixel frames a second")
    ax.set_title(title, pad=8)
    return ax


@styled
def speed_waterfall(
    rows: Sequence[Mapping], *, beside: str = "decode", title: str = "", ax: Axes | None = None
) -> Axes:
    """Where the milliseconds of a steady chunk go on each rung: stage after stage, and below them, thin, the one that
    runs `beside` the last stage, its own length long. A red mark is the rung's arithmetic floor.

    rows: as `bench_stream` saves them, in order: name, stages in ms, floor and period in ms.
    """
    ax = _axes(ax, 8.5, 1.3 + 0.34 * len(rows))
    stages = [name for name in dict.fromkeys(name for row in rows for name in row["stages"]) if name != beside]
    places, start = np.arange(len(rows)), np.zeros(len(rows))
    for index, stage in enumerate(stages):
        begun, span = start, np.array([row["stages"].get(stage, 0.0) for row in rows])
        ax.barh(places, span, left=begun, height=0.5, color=_stage_colour(stage, index), label=stage)
        start = begun + span
    others = [row["stages"].get(beside, 0.0) for row in rows]
    ax.barh(places + 0.36, others, left=begun, height=0.16, color=_stage_colour(beside, 0), label=f"{beside}, beside")
    floors = [row["floor"] for row in rows]
    ax.vlines(floors, places - 0.32, places + 0.44, color=LIMIT, lw=1.5)
    ax.text(floors[0], -0.4, "arithmetic floor ", color=LIMIT, fontsize=8, ha="right", va="bottom")
    for place, row, end in zip(places, rows, start, strict=True):
        ax.text(end, place, f" {row['period']:.0f}", va="center", fontsize=8, color=INK)
    ax.set_yticks(places, [row["name"] for row in rows])
    ax.set(xlim=(0, 1.1 * max(*start, *floors)), ylim=(len(rows) - 0.4, -0.8), xlabel="ms since the chunk began")
    ax.legend(ncols=3, fontsize=7, loc="upper center", bbox_to_anchor=(0.45, -0.16 - 0.4 / len(rows)))
    ax.set_title(title, pad=8)
    return ax


def _stage_colour(stage: str, index: int) -> str:
    if "clean" in stage or "cache" in stage:
        return CLEAN
    if stage.startswith(("step", "forward", "denoise", "student")):
        digits = "".join(c for c in stage if c.isdigit())
        shades = ("#2f6fb7", "#5d91cb", "#8ab1dc", "#b7d0ec")
        return shades[(int(digits) - 1) % len(shades) if digits else 0]
    taken = {"decode": "#8a8a8a", "camera": _EXTRA[0], "film": _EXTRA[0]}
    # Whatever else there is begins after the camera's colour.
    return taken.get(stage, _EXTRA[1 + index % (len(_EXTRA) - 1)])


@styled
def loss_curves(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    smooth: float = 0.0,
    log: bool = False,
    xlabel: str = "training step",
    ylabel: str = "loss",
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Losses over training steps: label -> (steps, values); `smooth` in [0, 1) adds a running mean to a faint line."""
    ax = _axes(ax, 7.5, 3.0)
    for index, (label, (steps, values)) in enumerate(series.items()):
        tint = colour(label, index)
        values = np.asarray(values, dtype=float)
        ax.plot(steps, values, color=tint, lw=0.8 if smooth else 1.6, alpha=0.3 if smooth else 1)
        ax.plot(steps, _running_mean(values, smooth), color=tint, lw=1.6, label=label)
    ax.set_yscale("log" if log else "linear")
    ax.set_xlabel(xlabel)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_ylabel(ylabel)
    ax.grid(axis="y")
    if series:
        ax.legend()
    ax.set_title(title)
    return ax


def _running_mean(values: np.ndarray, smooth: float) -> np.ndarray:
    """Exponential mean, divided by the weight seen so far so that it does not start at 0."""
    mean, weight, out = 0.0, 0.0, []
    for value in values:
        mean, weight = smooth * mean + (1 - smooth) * value, smooth * weight + (1 - smooth)
        out.append(mean / weight)
    return np.asarray(out)


def interactive() -> bool:
    """True when a person looks at this kernel: a front end's session, and LINGBOT_NB_PLAIN unset.

    papermill and nbclient start kernels without a session name; a notebook that starts papermill sets
    LINGBOT_NB_PLAIN=1 for it, because its own session name is inherited.
    """
    shell = sys.modules.get("IPython") and sys.modules["IPython"].get_ipython()
    front_end = os.environ.get("JPY_SESSION_NAME") or os.environ.get("VSCODE_PID")
    return bool(shell and hasattr(shell, "kernel") and front_end and not os.environ.get("LINGBOT_NB_PLAIN"))


class LiveCurve:
    """A loss curve that grows while training runs: redrawn in a notebook, a plain line every `every` steps elsewhere.

    `add(step, loss=0.53, …)` for every step, `close()` at the end (draws the final curve once), or use `with`.
    `total` lets lines say how far it is; `live=None` asks `interactive()`. Redraws at most every `seconds`.
    """

    def __init__(
        self,
        title: str = "",
        *,
        total: int | None = None,
        every: int = 100,
        seconds: float = 1.0,
        smooth: float = 0.9,
        log: bool = False,
        xlabel: str = "training step",
        ylabel: str = "loss",
        live: bool | None = None,
        write=print,
    ):
        self.title, self.total, self.every, self.seconds = title, total, every, seconds
        self.smooth, self.write = smooth, write
        self.drawn_as = dict(smooth=smooth, log=log, xlabel=xlabel, ylabel=ylabel, title=title)
        self.live = interactive() if live is None else live
        self.series: dict[str, tuple[list[float], list[float]]] = {}
        self._began = time.perf_counter()
        self._drawn = -float("inf")
        self._first = self._last = None
        self._handle = None

    def __enter__(self) -> "LiveCurve":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def add(self, step: int, **values: float) -> None:
        """Note the values of one step; draws or prints when it is time to."""
        for name, value in values.items():
            steps, seen = self.series.setdefault(name, ([], []))
            steps.append(step)
            seen.append(float(value))
        self._first = step if self._first is None else self._first
        self._last = step
        if self.live and time.perf_counter() - self._drawn >= self.seconds:
            self._draw()
        elif not self.live and (step % self.every == 0 or step == self.total):
            self.write(self.line())

    def line(self) -> str:
        """The newest state as text: "step 200/3000  loss 0.531 (mean 0.544)  12.1 steps/s"."""
        head = f"{self.title}  step {self._last}" + (f"/{self.total}" if self.total else "")
        cells = [
            f"{name} {values[-1]:.4g} (mean {_running_mean(np.array(values[-200:]), self.smooth)[-1]:.4g})"
            for name, (_, values) in self.series.items()
        ]
        done = self._last - self._first + 1
        return "  ".join([head.strip(), *cells, f"{done / max(time.perf_counter() - self._began, 1e-9):.3g} steps/s"])

    def close(self) -> None:
        """Draw the final curve (nothing outside a notebook, nothing when no step was noted)."""
        if self.series and ("IPython" in sys.modules and sys.modules["IPython"].get_ipython()):
            self._draw()

    def _draw(self) -> None:
        from IPython.display import Image, display

        picture = Image(data=_png(self.figure()))
        if self._handle is None:
            self._handle = display(picture, display_id=True)
        else:
            self._handle.update(picture)
        self._drawn = time.perf_counter()

    def figure(self) -> Figure:
        """The curve as a figure of its own, unknown to pyplot (so that no cell shows it twice)."""
        with plt.rc_context(STYLE):
            figure = Figure(figsize=(7.5, 3.0))
            loss_curves(self.series, **self.drawn_as, ax=figure.subplots())
        return figure


def _png(figure: Figure) -> bytes:
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=STYLE["figure.dpi"])
        return file.getvalue()


@styled
def over_time(
    rows: Mapping[str, np.ndarray],
    *,
    ylabel: str = "PSNR (dB)",
    fps: float = FPS,
    first: int = 1,
    reference: float | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """A metric over the seconds since the start, the mean over clips with its 95 % bootstrap band.

    rows: label -> values [clips, N] for every pixel frame; the frames before `first` (the given one) are left out.
    """
    ax = _axes(ax, 7.5, 3.2)
    for index, (label, values) in enumerate(rows.items()):
        values = np.atleast_2d(values)[:, first:]
        bands = [bootstrap_mean(column, resamples=500) for column in values.T]
        seconds = (np.arange(values.shape[1]) + first) / fps
        tint = colour(label, index)
        ax.plot(seconds, [band.mean for band in bands], color=tint, lw=1.7, label=label)
        ax.fill_between(seconds, [b.low for b in bands], [b.high for b in bands], color=tint, alpha=0.15, lw=0)
    if reference is not None:
        ax.axhline(reference, color="#999999", lw=0.8, ls=":")
    ax.set_xlabel("seconds since the start frame")
    ax.set_ylabel(ylabel)
    ax.grid(axis="y")
    ax.legend()
    ax.set_title(title)
    return ax


@styled
def parameter_bars(parts: Mapping[str, Mapping[str, int]], *, title: str = "", ax: Axes | None = None) -> Axes:
    """Parameters by part as bars, one stack per model: model -> part -> count; each stack's total is written on it."""
    ax = _axes(ax, 9.0, 1.4 + 0.5 * len(parts))
    names = list(dict.fromkeys(name for model in parts.values() for name in model))
    start = np.zeros(len(parts))
    for index, name in enumerate(names):
        share = np.array([100 * model.get(name, 0) / sum(model.values()) for model in parts.values()])
        tint = _PART_COLOURS.get(name, _EXTRA[index % len(_EXTRA)])
        ax.barh(range(len(parts)), share, left=start, color=tint, height=0.62, label=name, ec="white", lw=0.6)
        for row, width in enumerate(share):
            if width >= 5:
                ax.text(
                    start[row] + width / 2, row, f"{width:.0f} %", ha="center", va="center", fontsize=8, color="white"
                )
        start = start + share
    labels = [f"{model}\n{_count(sum(part.values()))}" for model, part in parts.items()]
    ax.set_yticks(range(len(parts)), labels)
    ax.set(xlim=(0, 100), ylim=(len(parts) - 0.45, -0.55))
    ax.set_xlabel("share of the parameters (%)")
    ax.figure.legend(*ax.get_legend_handles_labels(), ncols=4, loc="outside lower center")
    ax.set_title(title)
    return ax


_PART_COLOURS = {
    "self-attention": "#2f6fb7",
    "cross-attention": "#7fa8d6",
    "feed-forward": "#5b6770",
    "modulation": "#b58900",
    "time": "#d8b44a",
    "patch and head": "#8c6d4f",
    "text": "#9fb3a5",
    "camera": "#c44e52",
}


def _count(number: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.0f}"


@styled
def trajectories(
    paths: Mapping[str, np.ndarray], *, unit: str = "map units", every: int = 8, title: str = "", ax: Axes | None = None
) -> Axes:
    """Walks seen from above: label -> camera-to-world poses [N, 4, 4] (OpenCV axes: x right, z forward).

    A ring marks the start, a tick every `every` frames shows where the camera looks.
    """
    ax = _axes(ax, 5.0, 4.4)
    ticks = 0.04 * max(np.ptp(np.asarray(p)[:, (0, 2), 3], axis=0).max() for p in paths.values()) or 0.1
    for index, (label, poses) in enumerate(paths.items()):
        poses = np.asarray(poses)
        x, z = poses[:, 0, 3], poses[:, 2, 3]
        tint = colour(label, index)
        ax.plot(x, z, color=tint, lw=1.5, label=label)
        ax.plot(x[0], z[0], "o", mfc="white", mec=tint, ms=7)
        look = poses[::every, :3, 2]
        for px, pz, (dx, _, dz) in zip(x[::every], z[::every], look, strict=True):
            ax.plot([px, px + ticks * dx], [pz, pz + ticks * dz], color=tint, lw=1)
    ax.set_aspect("equal", adjustable="datalim")
    ax.grid()
    ax.set_xlabel(f"x, right ({unit})")
    ax.set_ylabel(f"z, forward ({unit})")
    ax.legend()
    ax.set_title(title)
    return ax


@styled
def lines(
    rows: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    log: bool = False,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Plain lines with markers: label -> (x, y); for costs over a setting."""
    ax = _axes(ax, 6.5, 3.2)
    for index, (label, (x, y)) in enumerate(rows.items()):
        ax.plot(x, y, "o-" if len(x) <= 30 else "-", ms=3.5, lw=1.6, color=colour(label, index), label=label)
    ax.set_yscale("log" if log else "linear")
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.set_ylim(bottom=None if log else 0)
    if all(float(value).is_integer() for x, _ in rows.values() for value in x):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(axis="y")
    ax.legend()
    ax.set_title(title)
    return ax


def clip_html(
    films: np.ndarray | Mapping[str, np.ndarray], fps: float = FPS, *, scale: int = 1, limit: int = CLIP_LIMIT
):
    """A small looping clip, embedded in the notebook: frames [N, H, W, 3], or label -> frames to show side by side.

    Animated WebP; the quality falls until all films together fit `limit` bytes, else ValueError. Returns IPython HTML.
    """
    from IPython.display import HTML

    films = films if isinstance(films, Mapping) else {"": films}
    share = limit // len(films)
    cells = []
    for label, frames in films.items():
        frames = _uint8(frames)
        source = base64.b64encode(_webp(frames, fps, int(share * 3 / 4) - 200)).decode()
        width = frames.shape[2] * scale
        cells.append(
            f'<figure style="display:inline-block;margin:0 8px 0 0"><img width="{width}" alt="{label or "clip"}" '
            f'src="data:image/webp;base64,{source}"><figcaption>{label}</figcaption></figure>'
        )
    return HTML("".join(cells))


def _webp(frames: np.ndarray, fps: float, limit: int) -> bytes:
    from PIL import Image

    pictures = [Image.fromarray(frame) for frame in frames]
    for quality in (85, 70, 50, 30):
        with io.BytesIO() as file:
            pictures[0].save(
                file,
                format="WEBP",
                save_all=True,
                append_images=pictures[1:],
                duration=round(1000 / fps),
                loop=0,
                quality=quality,
                method=2,
            )
            if file.tell() <= limit:
                return file.getvalue()
    raise ValueError(
        f"a clip of {len(frames)} frames of {frames.shape[1]}x{frames.shape[2]} does not fit {limit} bytes: "
        "show fewer or smaller frames"
    )


def _uint8(frames) -> np.ndarray:
    frames = frames.detach().cpu().numpy() if isinstance(frames, torch.Tensor) else np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"a film has shape {frames.shape}: expected [frames, height, width, 3]")
    if frames.dtype == np.uint8:
        return frames
    return ((np.clip(frames, -1, 1) + 1) * 127.5).round().astype(np.uint8)


def _bool(keep) -> np.ndarray:
    keep = keep.detach().cpu().numpy() if isinstance(keep, torch.Tensor) else np.asarray(keep)
    if keep.ndim != 2:
        raise ValueError(f"a mask has shape {keep.shape}: expected [queries, keys]")
    return keep.astype(bool)


def _bare(ax: Axes) -> None:
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.tick_params(length=0)
