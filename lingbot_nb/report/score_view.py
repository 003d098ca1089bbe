"""What a file of scores looks like: one table, one figure, and strips of the best, the median and the worst film."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lingbot_nb.presets import FPS
from lingbot_nb.report import figures
from lingbot_nb.report.architecture import markdown_table
from lingbot_nb.report.trials import STRAY

ASKED = {"direction": 98, "still": 26, "drift": 15, "tokenizer": 33, "sharpness": 0.5}
"""What the project asks of the shipped student: percent, dB, percent either way."""


@dataclass(frozen=True)
class Row:
    """A line of the table: its title, the part and the keys of its numbers, their factor and digits."""

    title: str
    part: str
    keys: tuple[str, ...]
    factor: float = 1
    digits: int = 1


def _rows() -> list[Row]:
    horizons = ("0.25", "1", "2", "4")
    return [
        *(Row(f"PSNR, {at} s (dB)", "follow", ("psnr", at)) for at in horizons),
        *(Row(f"SSIM, {at} s", "follow", ("ssim", at), digits=3) for at in horizons),
        *(Row(f"MS-SSIM, {at} s", "follow", ("ms_ssim", at), digits=3) for at in horizons),
        *(Row(f"learned distance, {at} s", "follow", ("perceptual", at), digits=3) for at in horizons),
        *(Row(f"LPIPS (AlexNet), {at} s", "follow", ("LPIPS (AlexNet)", at), digits=3) for at in horizons),
        Row("sharpness / simulator", "follow", ("sharpness",), digits=2),
        *(Row(f"PSNR, {at} s, mean of draws of noise (dB)", "draws", ("psnr", at), digits=2) for at in horizons),
        Row("sharpness / simulator, mean of draws", "draws", ("sharpness",), digits=3),
        Row("FID-like distance of frames", "follow", ("frame_frechet",), digits=3),
        Row("FVD-like distance of seconds", "follow", ("second_frechet",), digits=3),
        Row("rotation error a frame (degrees)", "follow", ("rotation",), digits=2),
        Row("translation error a frame (world scales)", "follow", ("translation",), digits=3),
        Row("turn told right (%)", "follow", ("turn",), 100),
        Row("walking key told right (%)", "follow", ("direction",), 100),
        Row("J L held: turns the right way (%)", "control", ("turn",), 100),
        Row("J L held: image shift to the right side (%)", "control", ("shift_right",), 100),
        Row("J L held: image shift / pinhole", "control", ("shift_ratio",), digits=2),
        Row("J L held: chunks that show motion (%)", "control", ("turn_shows",), 100),
        Row("J L held: first follows in chunk", "control", ("turn_reaction",), digits=2),
        Row("J L changed: first follows in chunk", "control", ("turn_reaction_to_change",), digits=2),
        Row("W A S D held: steps the right way (%)", "control", ("walk",), 100),
        Row("W A S D right where the simulator moved as asked (%)", "control", ("walk_moved",), 100),
        Row("W A S D held: chunks that show motion (%)", "control", ("walk_shows",), 100),
        Row("W A S D held: first follows in chunk", "control", ("walk_reaction",), digits=2),
        Row("W A S D changed: first follows in chunk", "control", ("walk_reaction_to_change",), digits=2),
        Row("turned away for 1 s: PSNR to the first view (dB)", "control", ("turn_away",)),
        Row("turned back: PSNR to the first view (dB)", "control", ("turn_back",)),
        Row("walked away for 1 s: PSNR to the first view (dB)", "go_and_return", ("away",)),
        Row("walked back: PSNR to the first view (dB)", "go_and_return", ("back",)),
        Row("no key: PSNR to its own first second, at the end (dB)", "stand", ("still", "-1")),
        *_lasting("free walk", "free_walk"),
        Row("free walk: jump at chunk borders", "free_walk", ("jump",), digits=2),
        *_lasting("by sight", "stroll"),
        Row("diversity between seeds, learned distance", "variety", ("diversity",), digits=3),
        Row("distance to the truth of the same films", "variety", ("to_truth",), digits=3),
        Row("pixel frames a second", "speed", ("fps",)),
    ]


def _lasting(title: str, part: str) -> list[Row]:
    return [
        Row(f"{title}: sharpness, at the end / first second", part, ("sharpness_last",), digits=2),
        Row(f"{title}: sharpness / real views alike, after the first second", part, ("alike_later",), digits=2),
        Row(f"{title}: sharpness / real views alike, at the end / first second", part, ("alike_kept",), digits=2),
        Row(f"{title}: saturation, at the end / first second", part, ("saturation_last",), digits=2),
        Row(f"{title}: freezes where it should move (%)", part, ("freeze",), 100),
        Row(f"{title}: distance to the corpus at the end", part, ("corpus_last",), digits=2),
    ]


ORDER = ("simulator", "first frame held", "tokenizer", "teacher, poses", "student, poses")


def labels(found: Mapping) -> list[str]:
    """Everyone in a file of scores, in the order of the table's columns."""
    names = dict.fromkeys(label for part in found["parts"].values() for label in part)
    return [*(name for name in ORDER if name in names), *(name for name in names if name not in ORDER)]


def table(found: Mapping) -> str:
    """The one table, in Markdown: means with 95 % bootstrap intervals over walks; lines without any number left out."""
    names, lines = labels(found), []
    for row in _rows():
        cells = [cell(value(found, row, name), row) for name in names]
        if any(cell != "–" for cell in cells):
            lines.append((row.title, *cells))
    return markdown_table(("", *names), lines)


def value(found: Mapping, row: Row, label: str):
    """What a part found for a label under the row's keys; None if nothing."""
    at = found["parts"].get(row.part, {}).get(label)
    for key in row.keys:
        if at is None:
            return None
        at = (at[int(key)] if at else None) if isinstance(at, list) else at.get(key)
    return at


def cell(found, row: Row) -> str:
    """A number, or a mean with its interval, as the table writes it."""
    if found is None:
        return "–"
    numbers = found[:3] if isinstance(found, list) else [found]
    mean, *bounds = (f"{number * row.factor:.{row.digits}f}" for number in numbers)
    return f"{mean} [{', '.join(bounds)}]" if bounds else mean


def cards(folder: Path) -> str:
    """What the cards of all weights in a folder and below hold of held-out walks, in Markdown: PSNR with 95 % intervals
    over walks, and sharpness relative to the simulator's. Weights that those were made from follow them, each once."""
    found = [json.loads(file.read_text()) for file in sorted(folder.rglob("*.json"))]
    here = [(_told(card), card) for card in found]
    known = {_floating(card) for card in found}
    others = {_floating(card): card for card in _made_from(found) if _floating(card) not in known}
    before = [(f"{_told(card)} (not here)", card) for card in others.values()]
    rows = [(name, held, card, row) for name, card in here + before for held, row in card.get("held_out", {}).items()]
    heads = ("weights", "walked in", "M parameters", "walks", *(f"dB at {at} s" for at in ("0.25", "1", "2", "4")))
    return markdown_table(
        (*heads, "sharpness"),
        [
            (
                *(name, held, f"{card['parameters'] / 1e6:.1f}", row["clips"]),
                *("{:.1f} [{:.1f}, {:.1f}]".format(*row["psnr"][at]) for at in ("0.25", "1", "2", "4")),
                f"{row['sharpness']:.2f}",
            )
            for name, held, card, row in rows
            if "psnr" in row
        ],
    )


def _floating(card: Mapping) -> str:
    """The sha256 of the weights before they were packed: the same network, packed or not."""
    return card.get("packed_from", card["sha256"])


def _told(card: Mapping) -> str:
    return f"{card['preset']}, {card['kind']}"


def _made_from(cards: Iterable[Mapping]) -> Iterator[Mapping]:
    for card in cards:
        while card := card.get("made_from"):
            yield card


def conditions(found: Mapping) -> str:
    """One line a machine: which trials it held, on how many walks."""
    held: dict[str, list[str]] = {}
    for part, machine in found["where"].items():
        held.setdefault(machine, []).append(part)
    walks = f"{found['about']['clips']} held-out walks"
    return "\n".join(f"{', '.join(parts)}: {walks} · {machine}" for machine, parts in held.items())


# ---- the figure ------------------------------------------------------------------------------------------------------


@figures.styled
def figure(found: Mapping) -> Figure:
    """Up to eight panels of a file of scores, one for each of these that was measured: two distances to the truth over
    time, direction by key, standing still, the drift of sharpness and saturation by recorded keys, that of sharpness by
    sight, and the same over real views alike. Bands and bars are 95 % bootstrap intervals over walks."""
    parts = found["parts"]
    panels = [(part, draw) for part, key, draw in PANELS if any(key in row for row in parts.get(part, {}).values())]
    columns = max(1, min(4 if len(panels) > 6 else 3, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    size = (max(11.5, 3.6 * columns), 0.4 + 2.9 * rows)
    drawn, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    axes = axes.flat[: len(panels)]
    for letter, ax, (part, draw) in zip("abcdefgh", axes, panels, strict=False):
        draw(ax, parts[part])
        ax.set_title(f"{letter}  {ax.get_title('left')}", loc="left")
    handles = {}
    for ax in axes:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    names = [name for name in labels(found) if name in handles]
    drawn.legend([handles[n] for n in names], names, ncols=min(7, len(names)), loc="outside lower center")
    return drawn


def look(label: str) -> dict:
    """Colour and line of a label: students share a colour, and poses are dashed."""
    tints = {"tokenizer": "#b58900", "first frame held": "#c44e52"}
    style = {"student, poses": "--", STRAY: "--", "first frame held": ":"}.get(label, "-")
    return {"color": tints.get(label, figures.colour(label)), "ls": style, "label": label}


def _band(ax: Axes, seconds: Sequence[float], values: Sequence, style: Mapping) -> None:
    kept = [(at, value) for at, value in zip(seconds, values, strict=True) if value is not None]
    if kept:
        at, rows = [at for at, _ in kept], np.array([value[:3] for _, value in kept])
        ax.plot(at, rows[:, 0], lw=1.7, **style)
        ax.fill_between(at, rows[:, 1], rows[:, 2], color=style["color"], alpha=0.12, lw=0)


def _curves(ax: Axes, part: Mapping, name: str, ylabel: str, title: str) -> None:
    for label, row in part.items():
        if "curves" in row and not label.startswith(("student, 2", "student, 1")):
            _band(ax, row["seconds"], row["curves"][name], look(label))
    ax.set_yscale("log" if name == "perceptual" else "linear")
    ax.set(xlabel="seconds since the start picture", ylabel=ylabel)
    ax.set_title(title)
    ax.grid(axis="y")


def _keys(ax: Axes, part: Mapping) -> None:
    width = 0.8 / max(len(part), 1)
    for index, (label, row) in enumerate(part.items()):
        keys = [key for key in "wasdjl" if row["keys"].get(key)]
        share = np.array([row["keys"][key][:3] for key in keys]).reshape(-1, 3) * 100
        at = np.array(["wasdjl".index(key) for key in keys]) + (index - (len(part) - 1) / 2) * width
        style = look(label)
        reach = np.abs(share[:, 1:] - share[:, :1]).T
        ax.bar(at, share[:, 0], width * 0.92, color=style["color"], label=label)
        ax.errorbar(at, share[:, 0], reach, fmt="none", ecolor="#888888", lw=1)
    asked_line(ax, ASKED["direction"], f"asked: {ASKED['direction']} %", 102)
    ax.set_xticks(range(6), list("WASDJL"))
    ax.set(ylim=(0, 112), xlabel="key held for a second", ylabel="chunks in the right direction (%)")
    ax.set_title("Control, where the scene moves")


def _still(ax: Axes, part: Mapping) -> None:
    for label, row in part.items():
        if label.startswith("student"):
            _band(ax, row["seconds"], row["still"], look(label))
    asked_line(ax, ASKED["still"], f"asked: {ASKED['still']} dB")
    ax.set(xlabel="seconds without a key", ylabel="PSNR to the first second's end (dB)")
    ax.set_title("Standing still")
    ax.grid(axis="y")


def _drift(ax: Axes, part: Mapping, name: str, title: str) -> None:
    away = ASKED["drift"] / 100
    ax.axhspan(1 - away, 1 + away, color="#000000", alpha=0.06, lw=0)
    words = f"grey: ± {ASKED['drift']} %, as asked"
    ax.text(0.99, 0.03, words, fontsize=8, color="#666666", ha="right", transform=ax.transAxes)
    for label, row in part.items():
        _band(ax, row["seconds"], row[name], look(label))
    ax.set_ylim(bottom=0)
    ax.set(xlabel="seconds of play", ylabel="over the first second's")
    ax.set_title(title)


def asked_line(ax: Axes, at: float, words: str, words_at: float | None = None, end: str = "right") -> None:
    """What was asked for, at a height, with its words at an `end`, "left" or "right"."""
    ax.axhline(at, color=figures.LIMIT, lw=1, ls="--")
    place = dict(ha=end, va="bottom", transform=ax.get_yaxis_transform())
    across = {"left": 0.01, "right": 0.99}[end]
    ax.text(across, at if words_at is None else words_at, words, color=figures.LIMIT, fontsize=8, **place)


def _alike(ax: Axes, part: Mapping) -> None:
    for label, row in part.items():
        _band(ax, row["seconds"], row["alike"], look(label))
    ax.set_ylim(bottom=0)
    ax.set(xlabel="seconds of play", ylabel="over real views alike")
    ax.set_title("Sharpness by sight, wherever it leads")
    ax.grid(axis="y")


PANELS: tuple[tuple[str, str, Callable[[Axes, Mapping], None]], ...] = (
    ("follow", "curves", lambda ax, part: _curves(ax, part, "psnr", "PSNR (dB)", "Distance to the simulator")),
    ("follow", "curves", lambda ax, part: _curves(ax, part, "perceptual", "learned distance", "The same in features")),
    ("control", "keys", _keys),
    ("stand", "still", _still),
    ("free_walk", "sharpness", lambda ax, part: _drift(ax, part, "sharpness", "Sharpness by recorded keys")),
    ("free_walk", "saturation", lambda ax, part: _drift(ax, part, "saturation", "Saturation by recorded keys")),
    ("stroll", "sharpness", lambda ax, part: _drift(ax, part, "sharpness", "Sharpness by sight")),
    ("stroll", "alike", _alike),
)
"""The part of a file of scores and what its rows have to hold for each panel of `figure`, and what draws it."""


# ---- strips ----------------------------------------------------------------------------------------------------------


def strip(rows: Mapping[str, np.ndarray], title: str, count: int = 9) -> Axes:
    """Films as a filmstrip of `count` pictures from the first to the last; `rows` as in `Outcome.strips`."""
    longest = max(len(film) for film in rows.values())
    return figures.filmstrip(rows, at=np.linspace(0, longest - 1, count).round().astype(int), fps=FPS, title=title)


def save(drawn: Figure | Axes, path: Path) -> Path:
    """Writes a figure, or the one that axes belong to, under a temporary name, renames it, and closes it."""
    drawn = drawn if isinstance(drawn, Figure) else drawn.figure
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    drawn.savefig(partial, dpi=140)
    plt.close(drawn)
    os.replace(partial, path)
    return path
