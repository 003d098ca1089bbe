"""The mask page's numbers by hand, its slots against the cache itself, and its sliders without a browser."""

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
from matplotlib import pyplot as plt

from lingbot_nb.model.kv_cache import KVCache
from lingbot_nb.presets import LINGBOT, MICRO, TINY, StreamSettings
from lingbot_nb.report import mask_view
from lingbot_nb.report.mask_view import Choice


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.mark.parametrize(("chunk", "window", "sink"), [(1, 4, 1), (2, 5, 1), (3, None, 0), (2, 4, 2)])
def test_slots_hold_what_the_cache_says(chunk, window, sink):
    settings = StreamSettings(chunk, window, sink, image_first=False)
    lengths = settings.chunk_lengths(12)
    slots = mask_view.slots_over_time(settings, lengths)
    cache = KVCache(MICRO.model, settings, MICRO.shape.with_frames(12))
    for row, length in zip(slots, lengths, strict=True):
        cache.begin(length)
        cache.commit()
        assert sorted(row[row >= 0]) == cache.visible()


def test_pairs_and_table_by_hand():
    choice = Choice(4, 3, StreamSettings(1, None, 0))
    assert mask_view.attention_pairs(choice) == (10 * 9, 16 * 9)
    windowed = Choice(6, 3, StreamSettings(1, 3, 1))
    # 1 + 2 + 3 + 3 + 3 + 3 frame pairs of 36.
    assert mask_view.attention_pairs(windowed) == (15 * 9, 36 * 9)
    table = mask_view.numbers(windowed, TINY.model)
    assert "| attention pairs | 324 | 135 | 58% |" in table
    assert "| cache at the end (bf16) | 147 kB | 73.7 kB | 50% |" in table
    # 4 * 8 layers * 256 for each pair.
    assert "| attention of one pass | 2.65 MFLOP | 1.11 MFLOP | 58% |" in table
    assert "cache" not in mask_view.numbers(Choice(4, 3, StreamSettings(), "full"), TINY.model)


@pytest.mark.parametrize("kind", list(mask_view.KINDS))
def test_every_kind_draws(kind):
    choice = Choice(6, 2, StreamSettings(2, 5, 1), kind)
    figure = mask_view.draw(choice, query=3)
    panels = [panel for part in figure.subfigs for panel in part.axes]
    side = (12 if kind == "teacher forcing" else 6) * 2
    assert np.asarray(panels[0].images[0].get_array()).shape[:2] == (side, side)
    seen = {"full": 6}.get(kind, 5)
    assert panels[1].get_title(loc="left") == f"a query in frame 3 sees {seen} of 6 frames"


def test_the_clock_times_the_choice_and_refuses_long_ones():
    lines = mask_view.clock(Choice(4, 3, StreamSettings(1, 3, 1), "teacher forcing"), MICRO.model).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["no mask", "dense mask", "ranges"]
    assert lines[-1].startswith("One layer, 24 tokens, width 48, fp32, cpu")
    sentence = mask_view.clock(Choice(21, 1560, StreamSettings(3, 9, 3)), LINGBOT.model)
    assert sentence.startswith("32,760 tokens take too long")


def test_a_ticked_box_times_every_choice(monkeypatch):
    asked = []
    monkeypatch.setattr(mask_view, "clock", lambda choice, size, device: asked.append(choice.frames) or "")
    widget = mask_view.explorer(Choice(6, 2, StreamSettings(1, 4, 1)), TINY.model)
    controls = {child.description: child for child in widget.children[0].children}
    controls["frames"].value = 7
    controls["time it here"].value = True
    controls["frames"].value = 8
    assert asked == [7, 8]


def test_sliders_say_what_contradicts(capsys):
    widget = mask_view.explorer(Choice(6, 2, StreamSettings(1, 4, 1)), TINY.model)
    sliders = {child.description: child for child in widget.children[0].children}
    sliders["chunk"].value = 6
    assert "cannot hold" in capsys.readouterr().out
