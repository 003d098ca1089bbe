"""One picture and two tables for a choice of mask: what is seen, what the cache holds, what it saves; with sliders.

Knows masks and the ring's slots, and no weights: what is timed here is attention over random numbers. Used by the mask
notebook.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lingbot_nb.model import masks
from lingbot_nb.model.kv_cache import Ring
from lingbot_nb.presets import ModelSize, StreamSettings
from lingbot_nb.report import bench, figures
from lingbot_nb.report.architecture import markdown_table


def _full(lengths, window, sink) -> masks.FrameMask:
    return masks.full(sum(lengths))


KINDS: Mapping[str, Callable[..., masks.FrameMask]] = MappingProxyType(
    {
        "full": _full,
        "block-causal": masks.block_causal,
        "teacher forcing": masks.teacher_forcing,
        "diffusion forcing": masks.diffusion_forcing,
    }
)
"""Name on the slider panel -> factory(lengths, window, sink)."""


@dataclass(frozen=True)
class Choice:
    """What the sliders say: frames, tokens a frame, stream settings, and the factory of the mask.

    Raises ValueError where the settings contradict each other (a window that cannot hold sink and chunk).
    """

    frames: int
    tokens: int
    settings: StreamSettings
    kind: str = "block-causal"

    @property
    def lengths(self) -> list[int]:
        return self.settings.chunk_lengths(self.frames)

    @property
    def halves(self) -> bool:
        """True for [clean | noisy], twice as many frames in the sequence as in the clip."""
        return self.mask().frames[0] == 2 * self.frames

    def mask(self) -> masks.FrameMask:
        return KINDS[self.kind](self.lengths, self.settings.window, self.settings.sink)


_DRAWN_TOKENS = 8
"""Tokens a frame that a picture shows: all tokens of a frame see the same, and 1560 of them would fill a wall."""


def slots_over_time(settings: StreamSettings, lengths: list[int]) -> np.ndarray:
    """Frame held by every slot of the cache after each chunk, int [chunks, capacity], -1 where empty."""
    frames = sum(lengths)
    ring = Ring(settings.window or frames, settings.sink, endless=settings.window is not None)
    slots = np.full((len(lengths), ring.capacity), -1)
    for row, end in zip(slots, np.cumsum(lengths).tolist(), strict=True):
        for frame in ring.visible(end):
            row[ring.slot(frame)] = frame
    return slots


@figures.styled
def draw(choice: Choice, query: int | None = None) -> Figure:
    """Mask on the left; on the right what one query frame sees (default: the last) and the cache over time."""
    mask = choice.mask()
    query = choice.frames - 1 if query is None else min(query, choice.frames - 1)
    figure = plt.figure(figsize=(10, 4.7))
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.2))
    tokens = min(choice.tokens, _DRAWN_TOKENS)
    figures.mask_picture(
        mask.dense(tokens),
        tokens_per_frame=tokens,
        lengths=choice.lengths,
        halves=choice.halves,
        query=query + (choice.frames if choice.halves else 0),
        title=choice.kind,
        ax=left.subplots(),
    )
    top, bottom = right.subplots(2, 1, height_ratios=(1, 3.2))
    _draw_query(choice, mask, query, top)
    slots = slots_over_time(choice.settings, choice.lengths)
    if choice.kind == "full":
        bottom.set_axis_off()
        bottom.text(0.5, 0.5, "no cache: the whole clip is denoised at once", ha="center", color=figures.INK)
    else:
        figures.cache_occupancy(slots, sink=choice.settings.sink, current=choice.lengths, ax=bottom)
    return figure


def _draw_query(choice: Choice, mask: masks.FrameMask, query: int, ax) -> None:
    keep = mask.keep
    if choice.halves:
        # A noisy query sees the clean past and its own noisy chunk: folded onto one row of frames they never overlap.
        noisy = keep[choice.frames :]
        keep = noisy[:, : choice.frames] | noisy[:, choice.frames :]
    lengths = [choice.frames] if choice.kind == "full" else choice.lengths
    sink = 0 if choice.settings.window is None or choice.kind == "full" else choice.settings.sink
    figures.query_picture(keep, query, lengths=lengths, sink=sink, ax=ax)


def attention_pairs(choice: Choice) -> tuple[int, int]:
    """Token pairs that the mask keeps, and all pairs of the same sequence."""
    keep = choice.mask().keep
    return int(keep.sum()) * choice.tokens**2, keep.numel() * choice.tokens**2


def numbers(choice: Choice, size: ModelSize, value_bytes: int = 2) -> str:
    """Markdown table: pairs, attention FLOPs of one pass over the sequence, bytes of keys and values; full and kept."""
    kept, every = attention_pairs(choice)
    pair_flops = 4 * size.layers * size.dim
    frame_bytes = 2 * size.layers * choice.tokens * size.dim * value_bytes
    held = min(choice.settings.window or choice.frames, choice.frames)
    flops = [_with_unit(pairs * pair_flops, "FLOP") for pairs in (every, kept)]
    rows = [
        ("attention pairs", f"{every:,}", f"{kept:,}", f"{1 - kept / every:.0%}"),
        ("attention of one pass", *flops, f"{1 - kept / every:.0%}"),
    ]
    if choice.kind != "full":
        sizes = [_with_unit(count * frame_bytes, "B") for count in (choice.frames, held)]
        rows.append(("cache at the end (bf16)", *sizes, f"{1 - held / choice.frames:.0%}"))
    return markdown_table(("", "everything", "this choice", "saved"), rows)


TIMED_TOKENS = 4096
"""The longest sequence that `clock` takes: on two CPU cores the tiny preset's attention over it takes a second."""


def clock(choice: Choice, size: ModelSize, device: torch.device | str = "cpu") -> str:
    """Markdown: what one layer's attention under the choice takes on this machine, and the same without the mask.

    Sequences above TIMED_TOKENS get a sentence instead: nobody waits for a slider.
    """
    length = choice.mask().frames[0] * choice.tokens
    if length > TIMED_TOKENS:
        return f"{length:,} tokens take too long to time here: choose frames and tokens for {TIMED_TOKENS:,} at most."
    times = bench.attention_times(size, choice.mask(), choice.tokens, repeats=5, device=device)
    where = f"{torch.device(device).type}, {torch.get_num_threads()} threads"
    return f"{bench.stage_table(times)}\n\nOne layer, {length:,} tokens, width {size.dim}, fp32, {where}."


def _with_unit(value: float, unit: str) -> str:
    """Three digits and a decimal prefix: 645.9e12 FLOP -> "646 TFLOP"."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def show(
    choice: Choice, size: ModelSize, query: int | None = None, *, device: torch.device | str | None = None
) -> None:
    """Display the picture, then the table; with a `device` also what its clock says."""
    from IPython.display import Markdown, display

    figure = draw(choice, query)
    display(figure, Markdown(numbers(choice, size)))
    plt.close(figure)
    if device is not None:
        display(Markdown(clock(choice, size, device)))


def explorer(choice: Choice, size: ModelSize, device: torch.device | str = "cpu"):
    """Sliders over `draw`, `numbers` and, where ticked, `clock`, from `choice` on; needs ipywidgets and a front end.

    Returns the widget: display it. A contradiction between sliders is said in a sentence in place of the picture.
    """
    import ipywidgets as widgets

    def slider(name: str, value: int, low: int, high: int) -> widgets.IntSlider:
        return widgets.IntSlider(value, low, high, description=name, continuous_update=False)

    settings = choice.settings
    controls = {
        "kind": widgets.Dropdown(options=list(KINDS), value=choice.kind, description="kind"),
        "frames": slider("frames", choice.frames, 2, 32),
        "tokens": slider("tokens", choice.tokens, 1, max(64, choice.tokens)),
        "chunk": slider("chunk", settings.chunk, 1, 8),
        "window": slider("window (0 = all)", settings.window or 0, 0, 32),
        "sink": slider("sink", settings.sink, 0, 8),
        "image_first": widgets.Checkbox(settings.image_first, description="image first"),
        "query": slider("query frame", choice.frames - 1, 0, 31),
        "timed": widgets.Checkbox(False, description="time it here"),
    }

    def redraw(kind, frames, tokens, chunk, window, sink, image_first, query, timed):
        try:
            chosen = StreamSettings(chunk, window or None, sink, settings.relative, image_first)
            show(Choice(frames, tokens, chosen, kind), size, query, device=device if timed else None)
        except ValueError as contradiction:
            print(contradiction)

    panel = widgets.GridBox(list(controls.values()), layout=widgets.Layout(grid_template_columns="repeat(3, 320px)"))
    return widgets.VBox([panel, widgets.interactive_output(redraw, controls)])
