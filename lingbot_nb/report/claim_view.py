"""What a sweep over the method's claims found, as tables and one figure (`report.claims` makes the sweep)."""

from collections.abc import Mapping, Sequence

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lingbot_nb.report import claims, figures
from lingbot_nb.report.architecture import markdown_table

LENGTHS = ("causal model", *(f"causal model, DMD{text}" for text in (*claims.SHORTER, "", *claims.LONGER)))
"""The causal model and what longer and longer distribution matching makes of it."""
STARTS = {"bidirectional ODE": "#dd8452", "causal ODE": "#55a868", "consistency": "#8172b3"}
CAUSAL = "#4c72b0"


def paired(summary: Mapping[str, Mapping], mark: str = "poses, 4", horizons: Sequence[str] = ("1", "4")) -> str:
    """Every arm against `claims.REFERENCE`, walk by walk: differences in dB with 95 % intervals, as Markdown."""
    rows = []
    for name in claims.known(summary):
        cells = [summary[name][mark][at].get("to_reference") for at in horizons]
        rows.append((name, *(claims.told(cell, 2) if cell else "" for cell in cells)))
    heads = [f"dB at {at} s, less {claims.REFERENCE!r}" for at in horizons]
    return markdown_table(("arm", *heads), rows)


def by_seed(summary: Mapping[str, Mapping], mark: str = "poses, 4", horizons: Sequence[str] = ("1", "4")) -> str:
    """How far an arm's seeds lie apart: their own means in dB, as Markdown, of arms that have several."""
    several = {name: summary[name] for name in claims.known(summary) if len(summary[name]["seeds"]) > 1}
    rows = [
        (name, *(", ".join(f"{mean:.1f}" for mean in row[mark][at]["by_seed"]) for at in horizons))
        for name, row in several.items()
    ]
    return markdown_table(("arm", *(f"dB at {at} s, seed by seed" for at in horizons)), rows)


def windows(summary: Mapping[str, Mapping], horizons: Sequence[str] = ("1", "4")) -> str:
    """The reference arm under other windows than its own, as Markdown; sharpness and saturation are those of the last
    five seconds of a walk of twenty, relative to its first second."""
    row = summary[claims.REFERENCE]
    marks = {"window 7, sink 1": ("keys, 4", "long walk")}
    marks |= {name: (name, f"{name}, long walk") for name in row if name.startswith("window") and "walk" not in name}
    rows = [
        (
            name,
            *(claims.told(row[short][at]["db"]) for at in horizons),
            *(claims.told(row[long][kept], 2) for kept in ("sharpness kept", "saturation kept")),
        )
        for name, (short, long) in marks.items()
    ]
    return markdown_table(
        ("cache, frames", *(f"keys, dB at {at} s" for at in horizons), "sharpness kept", "saturation kept"), rows
    )


@figures.styled
def figure(summary: Mapping[str, Mapping], horizon: str = "4") -> Figure:
    """PSNR after `horizon` seconds against sharpness: what distribution matching does to every start, and what fewer
    steps do to every student. Bars are 95 % intervals over walks."""
    drawn, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), sharey=True)
    path = [name for name in LENGTHS if name in summary]
    _line(left, horizon, [summary[name] for name in path], CAUSAL, "causal model, DMD for longer and longer")
    for name, tint in STARTS.items():
        pair = [arm for arm in (name, f"{name}, DMD") if arm in summary]
        _line(left, horizon, [summary[arm] for arm in pair], tint, f"{name}, then DMD")
    for name, marker in (("consistency, DMD on real history", "s"), ("causal model, DMD, guided by 2", "^")):
        if name in summary:
            _line(left, horizon, [summary[name]], "#937860", name, marker=marker)
    for name, tint in (*zip(path, ("#1b2a49", "#33588f", CAUSAL, "#88a6d3", "#b9cbe6"), strict=False),):
        counts = [mark for mark in summary[name] if mark.startswith("poses")]
        _line(right, horizon, [summary[name]] * len(counts), tint, name, marks=counts)
    left.set(
        title="a  Distribution matching, 4 steps", xlabel="sharpness, simulator = 1", ylabel=f"PSNR at {horizon} s (dB)"
    )
    right.set(title="b  4, 2 and 1 steps of each student (filled: 4)", xlabel="sharpness, simulator = 1")
    for ax in (left, right):
        ax.legend(fontsize=8, loc="lower left")
    return drawn


def _line(
    ax: Axes, horizon: str, rows: Sequence[Mapping], tint: str, label: str, marker: str = "o", marks: Sequence[str] = ()
):
    """One arm after the other, or one arm's marks; the first filled."""
    marks = marks or ("poses, 4",) * len(rows)
    at = [(row[mark]["sharpness"], row[mark][horizon]["db"]) for row, mark in zip(rows, marks, strict=True)]
    x, y = [point[0][0] for point in at], [point[1][0] for point in at]
    ax.plot(x, y, color=tint, lw=1.3, zorder=2)
    spread = [
        [v - lo for v, (_, (_, lo, _)) in zip(y, at, strict=True)],
        [hi - v for v, (_, (_, _, hi)) in zip(y, at, strict=True)],
    ]
    ax.errorbar(x, y, yerr=spread, fmt="none", ecolor=tint, alpha=0.3, lw=1)
    ax.plot(x, y, marker, mfc="white", mec=tint, ms=6, zorder=3)
    ax.plot(x[:1], y[:1], marker, color=tint, ms=6, zorder=4, label=label)
