"""Scores of recorded play, at any size and without a simulator: what Record or `play --out` left behind.

    python -m lingbot_nb.report.recordings recordings/ --out recordings.json

A recording is an mp4 and, beside it under the same name, a json with the keys of every pixel frame. There is no truth
to compare with: what can be asked is whether the picture turns when told to, moves while a key is held, and lasts.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lingbot_nb.control.keys import parse_keys
from lingbot_nb.presets import TIME_STRIDE
from lingbot_nb.report import figures
from lingbot_nb.report.architecture import markdown_table
from lingbot_nb.report.score_view import Row, cell, value
from lingbot_nb.report.scores import film_scores
from lingbot_nb.runs import write_json
from lingbot_nb.stream.movie import read_movie

ROWS = (
    Row("seconds", "recording", ("length",)),
    Row("J L alone: image shift to the right side (%)", "recording", ("shift_right",), 100),
    Row("J L alone: image shift / pinhole", "recording", ("shift_ratio",), digits=2),
    Row("freezes while a key is held (%)", "recording", ("freeze",), 100),
    Row("sharpness, last / first second", "recording", ("sharpness", "-1"), digits=2),
    Row("saturation, last / first second", "recording", ("saturation", "-1"), digits=2),
    Row("jump at chunk borders", "recording", ("jump",), digits=2),
)


@dataclass(frozen=True, eq=False)
class Take:
    """A film u8 [4n + 1, H, W, 3], its keys bool [4n + 1, 8] (row i: held on the way into pixel frame i), and what the
    recorder wrote beside them: "fps", "focal" (pixels), "turn" (degrees a pixel frame), "about", …"""

    film: np.ndarray
    keys: np.ndarray
    card: Mapping


def read_take(movie: Path | str) -> Take:
    """A recording at the size the world was drawn in, from the first picture that ends a frame.

    Raises FileNotFoundError without the json, ValueError where movie and keys differ in length or nothing is left.
    """
    movie = Path(movie)
    told = movie.with_suffix(".json")
    if not told.exists():
        raise FileNotFoundError(f"{movie} has no {told.name} with its keys beside it: record with the player or `play`")
    card = json.loads(told.read_text())
    film, keys = read_movie(movie), parse_keys(card["keys"])
    if len(film) != len(keys):
        raise ValueError(f"{movie} has {len(film)} pixel frames and keys for {len(keys)}: record it again")
    scale = card.get("scale", 1)
    film = film[:, scale // 2 :: scale, scale // 2 :: scale]
    # Pixel frame 0 of a world is its start image; every frame after it is four.
    first = -card.get("first_pixel_frame", 0) % TIME_STRIDE
    frames = (len(film) - first - 1) // TIME_STRIDE
    if frames < 1:
        raise ValueError(f"{movie} has {len(film)} pixel frames, less than one frame: record a second or more")
    some = slice(first, first + TIME_STRIDE * frames + 1)
    return Take(film[some], keys[some], card)


def find(places: Iterable[Path | str]) -> list[Path]:
    """The mp4s that are named, and those in folders that are named. FileNotFoundError where there is none."""
    found = []
    for place in map(Path, places):
        some = sorted(place.glob("*.mp4")) if place.is_dir() else [place]
        if not some or not some[0].exists():
            raise FileNotFoundError(f"no recording at {place}: name an mp4, or a folder that holds some")
        found += some
    return found


def examine(takes: Mapping[str, Take]) -> dict:
    """{"parts": {"recording": {label: scores}}} as `scores.film_scores` makes them, one film each."""
    return {"parts": {"recording": {label: _scores(take) for label, take in takes.items()}}}


def _scores(take: Take) -> dict:
    lens = {name: take.card[name] for name in ("focal", "turn") if name in take.card}
    # One film has no spread over walks: its means stand alone.
    single = {name: _means(found) for name, found in film_scores(take.film[None], take.keys[None], **lens).items()}
    return single | {"length": len(take.film) / take.card["fps"], "about": take.card.get("about", "")}


def _means(found):
    """An interval's mean, or those of a list of intervals; a film of less than a second has an empty one."""
    if not isinstance(found, list):
        return found
    return found[0] if found and isinstance(found[0], float) else [_means(one) for one in found]


def table(found: Mapping) -> str:
    """Recordings side by side, in Markdown; "–" where a film has nothing to count."""
    names = list(found["parts"]["recording"])
    lines = [(row.title, *(cell(value(found, row, name), row) for name in names)) for row in ROWS]
    return markdown_table(("", *names), lines)


@figures.styled
def figure(found: Mapping) -> Figure:
    """Sharpness and saturation second by second, relative to the first."""
    drawn, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharex=True)
    for ax, name in zip(axes, ("sharpness", "saturation"), strict=True):
        for label, row in found["parts"]["recording"].items():
            ax.plot(range(1, len(row[name]) + 1), row[name], marker=".", label=label)
        ax.axhline(1, color="0.6", lw=1)
        ax.set(title=f"{name}, first second = 1", xlabel="seconds", ylim=(0, None))
    axes[0].legend()
    return drawn


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="lingbot_nb.report.recordings", description=__doc__.splitlines()[0])
    parser.add_argument("recordings", nargs="+", type=Path, help="mp4s, or folders of them")
    parser.add_argument("--out", type=Path, help="JSON of all numbers; its figure goes beside it")
    args = parser.parse_args(words)
    found = examine({file.stem: read_take(file) for file in find(args.recordings)})
    if args.out:
        write_json(args.out, found)
        figure(found).savefig(args.out.with_suffix(".png"))
    print(table(found))


if __name__ == "__main__":
    main()
