"""Every picture type draws what it was given: pixels, colours, labels and numbers are read back from the axes."""

import base64
import io
import re

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from PIL import Image

from lingbot_nb.presets import MICRO, TINY
from lingbot_nb.report import figures

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def _film(frames: int, value: int | None = None) -> np.ndarray:
    if value is not None:
        return np.full((frames, 12, 20, 3), value, np.uint8)
    return RNG.integers(0, 256, size=(frames, 12, 20, 3), dtype=np.uint8)


def _pixels(ax) -> np.ndarray:
    return np.asarray(ax.images[0].get_array())


def _near(cells: np.ndarray, tint: str) -> np.ndarray:
    return (np.abs(cells[..., :3] - to_rgb(tint)) < 0.01).all(-1)


def test_filmstrip_places_the_chosen_frames_and_their_times():
    real, short = _film(17), _film(5)
    ax = figures.filmstrip({"simulator": real, "student": short}, at=(0, 8, 16))
    sheet = _pixels(ax)
    np.testing.assert_array_equal(sheet[:12, :20], real[0])
    np.testing.assert_array_equal(sheet[:12, -20:], real[16])
    np.testing.assert_array_equal(sheet[-12:, :20], short[0])
    assert (sheet[-12:, -20:] == 255).all()
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0.00 s", "0.50 s", "1.00 s"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["simulator", "student"]


def test_filmstrip_takes_floats_and_names_bad_shapes():
    ax = figures.filmstrip({"a": torch.full((2, 12, 20, 3), -1.0)}, count=2)
    assert (_pixels(ax)[:, :20] == 0).all()
    with pytest.raises(ValueError, match="frames, height, width, 3"):
        figures.filmstrip({"a": np.zeros((2, 3, 12, 20))})
    with pytest.raises(ValueError, match="at least one row"):
        figures.filmstrip({})


def test_mask_picture_colours_seen_pairs_and_counts_them():
    keep = np.tril(np.ones((4, 4), bool))
    ax = figures.mask_picture(keep, title="causal")
    np.testing.assert_array_equal(_near(_pixels(ax), figures.STUDENT), keep)
    np.testing.assert_array_equal(_near(_pixels(ax), figures.HIDDEN), ~keep)
    assert "62% of pairs seen" in ax.get_title(loc="left")


def test_mask_picture_of_two_halves_colours_clean_and_noisy_keys():
    keep = torch.ones(4, 4, dtype=torch.bool)
    ax = figures.mask_picture(keep, halves=True)
    cells = _pixels(ax)
    assert _near(cells[:, :2], figures.CLEAN).all() and _near(cells[:, 2:], figures.NOISY).all()
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0", "1", "0", "1"]


def test_mask_picture_labels_frames_at_their_middle():
    ax = figures.mask_picture(np.ones((12, 12), bool), tokens_per_frame=4)
    assert list(ax.get_xticks()) == [1.5, 5.5, 9.5]
    with pytest.raises(ValueError, match="queries, keys"):
        figures.mask_picture(np.ones(4, bool))


def test_query_picture_says_what_is_seen():
    keep = np.zeros((6, 6), bool)
    keep[4, [0, 2, 3, 4]] = True
    ax = figures.query_picture(keep, 4, sink=1)
    assert ax.get_title(loc="left") == "a query in frame 4 sees 4 of 6 frames"
    faces = [patch.get_facecolor()[:3] for patch in ax.patches[:6]]
    want = [figures.SINK, figures.HIDDEN, figures.CLEAN, figures.CLEAN, figures.NOISY, figures.HIDDEN]
    np.testing.assert_allclose(faces, [to_rgb(tint) for tint in want], atol=0.01)


def test_mask_picture_outlines_a_whole_query_frame():
    ax = figures.mask_picture(np.ones((12, 12), bool), tokens_per_frame=4, query=2)
    box = ax.patches[0]
    assert (box.get_y(), box.get_height(), box.get_width()) == (7.5, 4, 12)


def test_influence_picture_tells_nothing_from_little():
    ax = figures.influence_picture(np.array([[1.0, 0.0], [1e-9, 1.0]]), mark=np.eye(2, dtype=bool))
    cells = _pixels(ax)
    np.testing.assert_array_equal(_near(cells, figures.HIDDEN), [[False, True], [False, False]])
    assert "75% of pairs react" in ax.get_title(loc="left")


def test_cache_occupancy_tells_sink_past_new_and_empty_apart():
    slots = np.array([[0, -1, -1], [0, 1, -1], [0, 1, 2], [0, 3, 2]])
    ax = figures.cache_occupancy(slots, sink=1)
    cells = _pixels(ax)
    assert cells.shape[:2] == (3, 4)
    np.testing.assert_array_equal(_near(cells, figures.SINK), [[1, 1, 1, 1], [0] * 4, [0] * 4])
    np.testing.assert_array_equal(_near(cells, figures.NOISY), [[0] * 4, [0, 1, 0, 1], [0, 0, 1, 0]])
    np.testing.assert_array_equal(_near(cells, figures.CLEAN), [[0] * 4, [0, 0, 1, 0], [0, 0, 0, 1]])
    assert [text.get_text() for text in ax.texts] == ["0", "0", "1", "0", "1", "2", "0", "3", "2"]


def test_latency_waterfall_stacks_stages_and_counts_late_chunks():
    chunks = [{"step 1": 100, "clean pass": 50, "decode": 20}, {"step 1": 200, "clean pass": 60}]
    ax = figures.latency_waterfall(chunks, budget_ms=250, title="student")
    assert ax.get_title(loc="left") == "student: 1 of 2 chunks late"
    assert [(bar.get_x(), bar.get_width()) for bar in ax.patches[:4]] == [(0, 100), (0, 200), (100, 50), (200, 60)]
    assert " 170 ms" in [text.get_text() for text in ax.texts]


def test_speed_ladder_says_each_gain_and_marks_each_floor():
    rows = [dict(name="plain", fps=5.0, period=100.0, floor=50.0), dict(name="+ x", fps=8.0, period=62.5, floor=50.0)]
    ax = figures.speed_ladder(rows, title="one GPU")
    assert [bar.get_width() for bar in ax.patches] == [5.0, 8.0]
    assert [text.get_text().split() for text in ax.texts[:2]] == [["5.0"], ["1.60x", "8.0"]]
    assert [line[0, 0] for line in ax.collections[0].get_segments()] == [10.0, 10.0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["plain", "+ x"]


def test_speed_waterfall_stacks_stages_and_puts_the_decoder_beside_the_last():
    rows = [
        dict(
            name="plain", period=170.0, floor=90.0, stages={"camera": 20, "steps": 100, "clean pass": 50, "decode": 30}
        ),
        dict(name="+ x", period=120.0, floor=90.0, stages={"camera": 10, "steps": 70, "clean pass": 40, "decode": 35}),
    ]
    ax = figures.speed_waterfall(rows, title="one GPU")
    bars = [(bar.get_x(), bar.get_width()) for bar in ax.patches]
    assert bars == [(0, 20), (0, 10), (20, 100), (10, 70), (120, 50), (80, 40), (120, 30), (80, 35)]
    assert [text.get_text().strip() for text in ax.texts] == ["arithmetic floor", "170", "120"]
    assert [line[0, 0] for line in ax.collections[0].get_segments()] == [90.0, 90.0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["plain", "+ x"]


def test_every_stage_of_a_waterfall_has_its_own_colour():
    names = ("keys", "camera", "steps", "hand over", "clean pass", "decode")
    row = dict(name="engine", period=60.0, floor=30.0, stages=dict.fromkeys(names, 10))
    ax = figures.speed_waterfall([row])
    assert len({bar.get_facecolor() for bar in ax.patches}) == len(names)
    ax = figures.latency_waterfall([row["stages"]], budget_ms=250)
    assert len({bar.get_facecolor() for bar in ax.patches}) == len(names)


def test_loss_curves_smooth_without_starting_at_zero():
    ax = figures.loss_curves({"student": (range(5), [2.0] * 5)}, smooth=0.9)
    np.testing.assert_allclose(ax.lines[-1].get_ydata(), [2] * 5)
    mean = figures._running_mean(np.array([0.0, 1.0]), 0.5)
    np.testing.assert_allclose(mean, [0, 1 / 1.5])


def test_over_time_draws_means_and_leaves_the_given_frame_out():
    values = np.array([[100, 20, 18], [100, 24, 20]])
    ax = figures.over_time({"student, 4 steps": values})
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [22, 19])
    np.testing.assert_allclose(ax.lines[0].get_xdata(), [1 / 16, 2 / 16])
    assert ax.lines[0].get_color() == figures.STUDENT


def test_parameter_bars_are_shares_of_each_model():
    ax = figures.parameter_bars({"a": {"time": 1, "camera": 3}, "b": {"time": 5}})
    widths = [bar.get_width() for bar in ax.patches]
    assert widths == [25, 100, 75, 0]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a\n4", "b\n5"]


def test_trajectories_and_lines_put_points_where_they_are():
    poses = np.tile(np.eye(4), (9, 1, 1))
    poses[:, 0, 3], poses[:, 2, 3] = range(9), 7
    ax = figures.trajectories({"simulator": poses})
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[x, 7] for x in range(9)])
    ax = figures.lines({"a": ([1, 2], [3, 4])}, xlabel="x", ylabel="y (ms)")
    assert ax.get_ylim()[0] == 0 and ax.get_ylabel() == "y (ms)"


def test_helpers_draw_into_a_given_ax():
    _, ax = plt.subplots()
    assert figures.mask_picture(np.eye(3, dtype=bool), ax=ax) is ax


def test_style_does_not_leak():
    before = plt.rcParams["font.size"]
    figures.lines({"a": ([1], [1])}, xlabel="x", ylabel="y")
    assert plt.rcParams["font.size"] == before


def test_a_backend_that_turns_interactive_on_stays_on():
    was = plt.isinteractive()
    try:
        plt.ioff()
        figures.styled(plt.ion)()
        assert plt.isinteractive()
    finally:
        matplotlib.interactive(was)


def _decode(html: str) -> list[Image.Image]:
    sources = re.findall(r"data:image/webp;base64,([^\"]+)", html)
    return [Image.open(io.BytesIO(base64.b64decode(source))) for source in sources]


def test_clip_html_embeds_every_frame_and_stays_small():
    # Every frame another grey: WebP merges frames that are equal.
    film = np.concatenate([_film(1, 30 * n) for n in range(9)])
    html = figures.clip_html({"simulator": film, "student": film}, fps=16).data
    clips = _decode(html)
    assert [clip.n_frames for clip in clips] == [9, 9] and clips[0].size == (20, 12)
    assert "simulator" in html and len(html) < figures.CLIP_LIMIT
    noise = RNG.integers(0, 256, size=(8, 96, 160, 3), dtype=np.uint8)
    assert len(figures.clip_html(noise, limit=120_000).data) <= 120_000
    with pytest.raises(ValueError, match="fewer or smaller"):
        figures.clip_html(noise, limit=10_000)


def test_live_curve_prints_plain_lines_when_nobody_looks():
    said: list[str] = []
    with figures.LiveCurve("teacher", total=6, every=3, live=False, write=said.append) as curve:
        for step in range(1, 7):
            curve.add(step, loss=2.0)
    assert len(said) == 2
    assert said[0].startswith("teacher  step 3/6  loss 2 (mean 2)") and said[1].startswith("teacher  step 6/6")
    assert curve.figure().axes[0].lines[-1].get_xdata().tolist() == [1, 2, 3, 4, 5, 6]


def test_live_curve_redraws_at_most_once_in_its_interval(monkeypatch):
    drawn = []
    curve = figures.LiveCurve(live=True, seconds=1000)
    monkeypatch.setattr(
        curve, "_draw", lambda: (drawn.append(1), setattr(curve, "_drawn", figures.time.perf_counter()))
    )
    for step in range(50):
        curve.add(step, loss=1.0)
    assert len(drawn) == 1


def test_nobody_looks_in_a_test(monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "book.ipynb")
    assert not figures.interactive()


def test_conditions_name_what_a_number_depends_on():
    line = figures.conditions(TINY, dtype=torch.bfloat16, steps=4)
    for part in ("tiny", "96x160", "21 frames of 60 tokens", "bfloat16", "threads", torch.__version__, "steps 4"):
        assert part in line
    assert "5 frames" not in line and "6 frames of 6 tokens" in figures.conditions(MICRO)
