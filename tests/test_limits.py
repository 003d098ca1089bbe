"""A sweep over steps, walks and size changes one thing at a time, keeps what it has, and draws it."""

import json
from dataclasses import replace

import pytest

from lingbot_nb import presets
from lingbot_nb.distill import recipe
from lingbot_nb.distill.recipe import Bench, Budget, Recipe
from lingbot_nb.model.vae import MICRO_VAE
from lingbot_nb.report import limits
from lingbot_nb.report.limits import Point
from lingbot_nb.runs import PROJECT
from lingbot_nb.world.clips import ClipStore, write_manifest, write_shard

MODEL = presets.MICRO.model
WIDER = replace(MODEL, dim=64, ffn_dim=128)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Bench:
    """Two walks to learn from and one held out, and a tokenizer that has seen them once."""
    place = tmp_path_factory.mktemp("limits")
    clips = ClipStore(PROJECT / "data" / "clips")
    lines = []
    (place / "clips").mkdir()
    for split, some in (("train", [replace(clips[0], seed=7), replace(clips[2], seed=8)]), ("held-out", [clips[1]])):
        digest = write_shard(place / "clips" / f"{split}.safetensors", some)
        seeds = [clip.seed for clip in some]
        lines.append({"shard": f"{split}.safetensors", "split": split, "sha256": digest, "seeds": seeds})
    write_manifest(place / "clips", lines)
    blink = Budget(1e-3, 1, 1e-3)
    order = Recipe(replace(presets.TINY, model=MODEL), MICRO_VAE, tokenizer=blink, teacher=blink, compile=False)
    bench = Bench(order, place / "clips", place / "out", seed=0)
    list(recipe.run(bench, "vae.safetensors"))
    return bench


@pytest.fixture(scope="module")
def points() -> list[Point]:
    return limits.around(Point(2, 2, MODEL), steps=(4,), clips=(1,), models=(WIDER,))


@pytest.fixture(scope="module")
def rows(whole, points) -> list[dict]:
    return [row for _, row in limits.sweep(points, whole, whole.out, held_out=1)]


def test_points_differ_from_the_base_in_one_thing(points):
    base, *others = points
    for point in others:
        changed = [name for name in ("steps", "clips", "model") if getattr(point, name) != getattr(base, name)]
        assert len(changed) == 1
    assert len({point.name for point in limits.around()}) == len(limits.around()) == 8


def test_a_point_gets_its_own_steps_walks_and_size(rows, points, whole):
    asked = [(point.steps, point.clips) for point in points]
    assert [(row["steps"], row["clips"]) for row in rows] == asked
    for point, row in zip(points, rows, strict=True):
        card = json.loads((whole.out / point.name / "teacher.json").read_text())
        assert (card["steps"], card["train_clips"], card["parameters"]) == (*asked.pop(0), row["parameters"])
        assert row["psnr"] == card["held_out"]["50 steps, poses"]["psnr"]
    assert rows[0]["parameters"] < rows[-1]["parameters"]
    made = {json.loads((whole.out / point.name / "teacher.json").read_text())["sha256"] for point in points}
    assert len(made) == len(points)


def test_what_is_there_is_not_made_again(rows, points, whole, monkeypatch):
    monkeypatch.setattr(limits, "measure", lambda *_: pytest.fail("made again"))
    assert [row for _, row in limits.sweep(points, whole, whole.out, held_out=1)] == rows


def test_too_few_walks_are_told_before_any_training(whole, tmp_path):
    with pytest.raises(ValueError, match="2 walks to learn from, 3 wanted"):
        limits.measure(Point(1, 3, MODEL), whole, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_table_and_figure_show_each_direction_alone(rows):
    assert [row["steps"] for row in limits.along(rows, "steps")] == [2, 4]
    assert [row["clips"] for row in limits.along(rows, "clips")] == [1, 2]
    lines = limits.table(rows).splitlines()
    assert len(lines) == 2 + len(rows) and "{:.1f}".format(rows[0]["psnr"]["1"][0]) in lines[2]
    drawn = limits.figure(rows)
    assert [len(ax.lines[0].get_xdata()) for ax in drawn.axes] == [2, 2, 2]
    limits.plt.close(drawn)
