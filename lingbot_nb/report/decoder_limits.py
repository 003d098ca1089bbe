"""What limits the tokenizer: decoders for the same latents, each pushed otherwise by its discriminator.

    python -m lingbot_nb.report.decoder_limits decoders/0 decoders/0.3 decoders/0.8 --summary decoder-limits.json

Each folder is one run of `distill.decoder --go-on --texture …`. The push trades PSNR for fine detail; a run without it
shows the most PSNR that these latents give a decoder of this size, so what is missing there no push can bring. Runs
with `--whole`, whose encoder learnt on under another KL, show whether it is the latents' fault, and runs with
`--decibel` whether it is the loss's. A folder of `distill.recipe` shows what a tokenizer comes to from nothing.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lingbot_nb.model import checkpoint
from lingbot_nb.report import figures
from lingbot_nb.report.architecture import markdown_table
from lingbot_nb.report.score_view import ASKED, asked_line
from lingbot_nb.runs import write_json


def row(folder: Path) -> dict:
    """One decoder: its card's push, steps, seconds, machine and held-out numbers, `kl` (None where the encoder rested),
    `decibel` (the worth of a dB in its loss), `decoder_of` (the sha256 of the tokenizer that it began with; None from
    nothing) and `course`, what its log tells of [step, PSNR in dB, sharpness] on other held-out windows.
    FileNotFoundError for a folder that is no such run."""
    file = folder / "vae.safetensors"
    card = checkpoint.read_card(file)
    if "texture" not in card or not (folder / "log.jsonl").exists():
        raise FileNotFoundError(f"{folder} holds no run of distill.decoder with its log: name the folder of its --out")
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    told = [line for line in lines if line["stage"] == "tokenizer" and "psnr" in line]
    course = [[line["step"], line["psnr"], line["sharpness"]] for line in told]
    named = ("texture", "steps", "seconds", "batch", "machine")
    of = card.get("decoder_of") or card.get("made_from", {}).get("sha256")
    told = {name: card[name] for name in named}
    told |= {"decoder_of": of, "kl": card.get("kl"), "decibel": card.get("decibel", 0.0)}
    return told | card["metrics"] | {"course": course}


def table(rows: Sequence[Mapping]) -> str:
    """A row a decoder, in Markdown."""
    heads = ("push of the discriminator", "what learnt on", "steps", "PSNR (dB)", "sharpness")
    lines = [
        (f"{r['texture']:g}", _learnt(r), f"{r['steps']:,}", f"{r['psnr']:.1f}", f"{r['sharpness']:.2f}") for r in rows
    ]
    return markdown_table(heads, lines)


def _learnt(row: Mapping) -> str:
    learnt = "decoder" if row["kl"] is None else f"all, KL {row['kl']:g}"
    learnt += f", a dB worth {row['decibel']:g}" if row["decibel"] else ""
    return learnt if row["decoder_of"] else f"{learnt}, from nothing"


def _kind(row: Mapping) -> str:
    """By what its points are joined and its course is named."""
    begun = "decoder alone" if row["kl"] is None else "encoder, too"
    return ("from nothing" if row["decoder_of"] is None else begun) + (", dB in the loss" if row["decibel"] else "")


TINTS = (figures.STUDENT, figures.NOISY, figures.CLEAN, figures.TEACHER, "#8a5fb5")
COURSE = 2.5
"""dB below what was asked down to which a course is drawn: a run from nothing comes from far below."""


@figures.styled
def figure(rows: Sequence[Mapping]) -> Figure:
    """a: PSNR against sharpness, a point a run, with what was asked, runs of one kind joined; b: PSNR over the steps of
    each kind's run with the least push."""
    drawn, (trade, course) = plt.subplots(1, 2, figsize=(10, 3.8))
    by_push = sorted(rows, key=lambda r: r["texture"])
    kinds = {kind: [r for r in by_push if _kind(r) == kind] for kind in sorted({*map(_kind, rows)})}
    for (kind, some), colour in zip(kinds.items(), TINTS[: len(kinds)], strict=True):
        _trade(trade, some, colour)
        steps, psnr, _ = zip(*some[0]["course"], strict=True)
        course.plot(steps, psnr, color=colour, label=f"{kind}, push {some[0]['texture']:g}")
    _asked(trade)
    asked_line(course, ASKED["tokenizer"], f"asked: {ASKED['tokenizer']} dB")
    course.set(xlabel="optimiser steps", ylabel="PSNR of 16 windows (dB)", title="b  The runs with the least push")
    course.set_ylim(bottom=ASKED["tokenizer"] - COURSE)
    course.legend(loc="lower right")
    return drawn


def _trade(ax: Axes, rows: Sequence[Mapping], colour: str) -> None:
    ax.plot([r["sharpness"] for r in rows], [r["psnr"] for r in rows], "o-", color=colour, mfc="white", ms=6)
    for number, r in enumerate(rows):
        words = f"push {r['texture']:g}" + ("" if r["kl"] is None else f", KL {r['kl']:g}")
        first = number == 0 and len(rows) > 1  # to the left: the line leaves its point to the right
        aside = dict(xytext=(-6 if first else 6, 6), ha="right" if first else "left")
        ax.annotate(words, (r["sharpness"], r["psnr"]), textcoords="offset points", fontsize=9, **aside)


def _asked(ax: Axes) -> None:
    words = f"asked: {ASKED['tokenizer']} dB, sharpness {ASKED['sharpness']}"
    asked_line(ax, ASKED["tokenizer"], words, end="left")
    ax.axvline(ASKED["sharpness"], color=figures.LIMIT, ls="--", lw=1)
    ax.margins(x=0.4, y=0.2)
    ax.set(xlabel="sharpness (real frames: 1)", ylabel="PSNR (dB)", title="a  Where each run ended")


def main() -> None:
    parser = argparse.ArgumentParser(prog="lingbot_nb.report.decoder_limits", description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="folders of distill.decoder")
    parser.add_argument("--summary", type=Path, help="JSON of all rows; its figure goes beside it")
    args = parser.parse_args()
    rows = [row(folder) for folder in args.runs]
    if args.summary:
        write_json(args.summary, {"rows": rows})
        figure(rows).savefig(args.summary.with_suffix(".png"))
    print(table(rows))


if __name__ == "__main__":
    main()
