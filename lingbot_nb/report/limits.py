"""What limits the teacher: the same training with more steps, with more walks, with more parameters.

    python -m lingbot_nb.report.limits --data clips --vae data/weights/vae.safetensors --out limits

Each point trains a bidirectional teacher from nothing and follows held-out walks by their poses in 50 steps. Only one
of the three things changes at a time, so a curve that still climbs says where more would help. A point that is there is
not made again.
"""

import argparse
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lingbot_nb import presets
from lingbot_nb.distill import recipe
from lingbot_nb.distill.recipe import Bench, Recipe
from lingbot_nb.model import checkpoint
from lingbot_nb.model.graph import compile_often
from lingbot_nb.presets import ModelSize
from lingbot_nb.report import figures
from lingbot_nb.report.architecture import markdown_table
from lingbot_nb.runs import write_json

CALLED = "50 steps, poses"
"""What `recipe.evaluate` calls the numbers looked at."""


@dataclass(frozen=True)
class Point:
    """One training: optimiser steps of the recipe's batch, walks to learn from, the network."""

    steps: int
    clips: int
    model: ModelSize

    @property
    def name(self) -> str:
        return f"{self.steps}-steps-{self.clips}-walks-{self.model.dim}-wide"


def _wide(dim: int) -> ModelSize:
    model = presets.TINY.model
    return replace(model, dim=dim, ffn_dim=4 * dim, heads=dim // model.head_dim)


BASE = Point(1200, 1600, presets.TINY.model)


def around(
    base: Point = BASE,
    steps: Sequence[int] = (300, 600, 2400),
    clips: Sequence[int] = (100, 400),
    models: Sequence[ModelSize] = (_wide(128), _wide(384)),
) -> list[Point]:
    """The base point and those that differ from it in one thing, the base first."""
    return [
        base,
        *(replace(base, steps=n) for n in steps),
        *(replace(base, clips=n) for n in clips),
        *(replace(base, model=m) for m in models),
    ]


def measure(point: Point, whole: Bench, folder: Path, held_out: int = 64) -> dict:
    """Trains a point's teacher in `folder` and returns its row: the point, parameters, seconds and `CALLED`'s numbers.

    `whole` holds the walks, encoded by the tokenizer that lies in its folder. Raises ValueError for too few walks.
    """
    if len(whole.train) < point.clips:
        raise ValueError(f"{len(whole.train)} walks to learn from, {point.clips} wanted: collect more")
    order = replace(
        whole.recipe,
        preset=replace(whole.preset, model=point.model),
        teacher=replace(whole.recipe.teacher, steps=point.steps),
    )
    bench = Bench(order, whole.data, folder, whole.seed)
    for file in ("vae.safetensors", "vae.json"):
        shutil.copy(whole.out / file, folder / file)
    bench.train = bench.train[: point.clips]
    bench.train_clips = point.clips
    some = {name: getattr(whole.latents, name)[: point.clips] for name in ("latents", "images", "poses", "keys")}
    bench.latents = replace(whole.latents, preset=order.preset, **some)
    began = time.monotonic()
    list(recipe.run(bench, "teacher.safetensors"))
    seconds = time.monotonic() - began
    recipe.evaluate(bench, held_out)
    card = checkpoint.read_card(folder / "teacher.safetensors")
    told = dict(parameters=card["parameters"], machine=card["machine"], seconds=round(seconds, 1))
    found = card["held_out"][CALLED]
    told |= {"held_out": found["clips"], "psnr": found["psnr"], "sharpness": found["sharpness"]}
    return {"steps": point.steps, "clips": point.clips, **told}


def sweep(points: Iterable[Point], whole: Bench, folder: Path, held_out: int = 64) -> Iterator[tuple[Point, dict]]:
    """Every point with its row, from its file where that is there."""
    for point in points:
        file = folder / f"{point.name}.json"
        if not file.exists():
            write_json(file, measure(point, whole, folder / point.name, held_out))
        yield point, json.loads(file.read_text())


# ---- what it looks like ----------------------------------------------------------------------------------------------

AXES = {"steps": "optimiser steps", "clips": "walks to learn from", "parameters": "parameters"}
MORE = {"steps": "steps", "clips": "walks", "parameters": "parameters"}


def along(rows: Sequence[Mapping], name: str) -> list[Mapping]:
    """The first row (the base) and those that differ from it in `name` alone, in its order."""
    others = [key for key in AXES if key != name]
    return sorted((r for r in rows if all(r[key] == rows[0][key] for key in others)), key=lambda row: row[name])


def table(rows: Sequence[Mapping]) -> str:
    """A row a training, in Markdown: PSNR with 95 % intervals over walks, sharpness relative to the simulator's."""
    horizons = list(rows[0]["psnr"])
    heads = ("steps", "walks", "parameters", *(f"PSNR, {at} s (dB)" for at in horizons), "sharpness")
    lines = [
        (
            f"{row['steps']:,}", f"{row['clips']:,}", f"{row['parameters'] / 1e6:.1f} M",
            *("{:.1f} [{:.1f}, {:.1f}]".format(*row["psnr"][at]) for at in horizons), f"{row['sharpness']:.2f}",
        )
        for row in rows
    ]  # fmt: skip
    return markdown_table(heads, lines)


@figures.styled
def figure(rows: Sequence[Mapping]) -> Figure:
    """PSNR over steps, walks and parameters, each alone; filled: the training that all three share."""
    drawn, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True)
    for letter, ax, (name, label) in zip("abc", axes, AXES.items(), strict=True):
        # The scale first: it takes the place of ticks that are there.
        ax.set(xscale="log", xlabel=label, title=f"{letter}  More {MORE[name]}")
        _curve(ax, along(rows, name), rows[0], name)
    axes[0].set_ylabel("PSNR by poses (dB)")
    axes[0].legend(title="after")
    return drawn


def _curve(ax: Axes, rows: Sequence[Mapping], base: Mapping, name: str) -> None:
    at = [row[name] for row in rows]
    for tint, horizon in zip(("#1b2a49", "#2f6fb7", "#88a6d3", "#b9cbe6"), base["psnr"], strict=False):
        mean, low, high = zip(*(row["psnr"][horizon] for row in rows), strict=True)
        ax.fill_between(at, low, high, color=tint, alpha=0.12, lw=0)
        ax.plot(at, mean, "o-", color=tint, mfc="white", ms=5, label=f"{horizon} s")
        ax.plot(base[name], base["psnr"][horizon][0], "o", color=tint, ms=5)
    ax.set_xticks(at, [f"{value / 1e6:.1f} M" if value > 1e5 else f"{value:,}" for value in at])
    ax.minorticks_off()


def main() -> None:
    parser = argparse.ArgumentParser(prog="lingbot_nb.report.limits", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of collected clips, both splits")
    parser.add_argument("--vae", type=Path, required=True, help="the tokenizer, with its card beside it")
    parser.add_argument("--out", type=Path, required=True, help="folder of results and weights")
    parser.add_argument("--summary", type=Path, help="JSON of all rows; its figure goes beside it")
    args = parser.parse_args()
    compile_often()
    whole = Bench(Recipe(), args.data, args.out, seed=0)
    for file in (args.vae, checkpoint.card_path(args.vae)):
        shutil.copy(file, args.out / f"vae{file.suffix}")
    rows = []
    for point, row in sweep(around(), whole, args.out):
        rows.append(row)
        print(point.name, row["psnr"], f"sharpness {row['sharpness']:.2f}", f"{row['seconds']} s", flush=True)
        if args.summary:
            write_json(args.summary, {"conditions": f"{row['machine']} · torch {torch.__version__}", "rows": rows})
    if args.summary:
        figure(rows).savefig(args.summary.with_suffix(".png"))
    print(table(rows))


if __name__ == "__main__":
    main()
