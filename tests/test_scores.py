"""Trials and scores: rules against hand-made readings and films, and the whole exam on a micro world."""

import json
from dataclasses import replace
from functools import partial

import cv2
import numpy as np
import pytest
import torch

from lingbot_nb.control.keys import held
from lingbot_nb.distill.flow import few_steps
from lingbot_nb.model.dit import DiT
from lingbot_nb.model.text import TinyText
from lingbot_nb.model.vae import MICRO_VAE, TinyVAE
from lingbot_nb.presets import MICRO
from lingbot_nb.report import evaluation, features, metrics, score_view, scores, stroll, trials
from lingbot_nb.report.judge import Judge, Reading
from lingbot_nb.runs import PROJECT
from lingbot_nb.stream.session import Session
from lingbot_nb.world.clips import HELD_OUT_SEED, Clip

SIZE = MICRO.shape.height, MICRO.shape.width


def micro_clip(seed: int, frames: int = 21) -> Clip:
    rng = np.random.default_rng(seed)
    poses = np.tile(np.eye(4, dtype=np.float32), (frames, 1, 1))
    poses[:, 2, 3] = 8 * np.arange(frames)
    keys = np.zeros((frames, 8), bool)
    keys[1:, 0] = True
    pictures = rng.integers(0, 256, (frames, *SIZE, 3), np.uint8)
    camera = np.array([20, 24, 24, 16], np.float32)
    return Clip(pictures, poses, keys, camera, HELD_OUT_SEED + seed, "micro", f"micro-{seed}")


@pytest.fixture(scope="module")
def exam() -> trials.Exam:
    torch.manual_seed(0)
    student, teacher = (DiT(MICRO.model).eval().requires_grad_(False) for _ in range(2))
    for dit in (student, teacher):
        torch.nn.init.normal_(dit.head.head.weight, std=0.05)
    vae, judge = TinyVAE(MICRO_VAE).eval(), Judge().eval().requires_grad_(False)
    context = TinyText(MICRO.model.text_dim, MICRO.model.text_len).encode("a walk")
    clips = [micro_clip(seed) for seed in range(3)]
    return trials.Exam(MICRO, vae, student, judge, context, clips, teacher, teacher_steps=2, student_steps=(2, 1),
                       size=2, say=lambda line: None)  # fmt: skip


# ---- films -----------------------------------------------------------------------------------------------------------


def test_films_side_by_side_are_those_of_a_session(exam):
    """The second film of a group, on its own noise, equals what a session plays from the same seed."""
    keys = trials.script("w-4,j-4,none-4")
    made = exam.play(exam.starts, np.repeat(keys[None], 3, 0), seed=0)
    assert made.shape == (3, 13, *SIZE, 3)

    class Words:
        def encode(self, prompt):
            return exam.context

    for number in (0, 1, 2):
        parts = MICRO, exam.student, exam.vae, Words()
        live = Session(*parts, start_image=exam.starts[number], prompt="", steps=2, seed=number)
        film = [live.first_frame[None], *(live.step(rows) for rows in keys[1:].reshape(3, 4, 8))]
        difference = np.abs(np.concatenate(film).astype(int) - made[number])
        assert difference.max() <= 1


class Seer:
    """A walker that turns by what it is shown, and remembers that."""

    def __init__(self):
        self.shown: list[np.ndarray] = []

    def keys(self, pictures, count):
        self.shown.append(pictures)
        return np.repeat(held("jl"[int(pictures[-1].mean()) % 2])[None], count, 0)


def test_walkers_by_sight_see_their_own_film_and_their_keys_make_it_again(exam):
    walkers = [Seer() for _ in range(3)]
    films, keys = exam.play_by_sight(exam.starts, walkers, 13)
    assert films.shape == (3, 13, *SIZE, 3) and keys.shape == (3, 13, 8)
    assert (films == exam.play(exam.starts, keys)).all()
    for walker, film, start in zip(walkers, films, exam.starts, strict=True):
        first, *later = walker.shown
        assert (first == start[None]).all() and len(later) == 3
        assert (later[0] == film[:1]).all() and (np.concatenate(later[1:]) == film[1:9]).all()


@pytest.mark.parametrize(("walkers", "frames"), [(2, 13), (3, 12)])
def test_walkers_by_sight_that_do_not_fit_are_named(exam, walkers, frames):
    words = f"3 start pictures, {walkers} walkers, {frames} pixel frames: give a walker for each picture and 4n"
    with pytest.raises(ValueError, match=words):
        exam.play_by_sight(exam.starts, [Seer() for _ in range(walkers)], frames)


def test_films_of_wrong_keys_are_named(exam):
    with pytest.raises(ValueError, match="start pictures"):
        exam.play(exam.starts, np.zeros((2, 5, 8), bool))
    with pytest.raises(ValueError, match="4n \\+ 1"):
        exam.play(exam.starts, np.zeros((3, 6, 8), bool))


# ---- rules -----------------------------------------------------------------------------------------------------------


def test_a_ratio_is_of_sums_and_empty_ones_are_none():
    got = trials.ratio([1, 9], [1, 19])
    assert got[0] == pytest.approx(0.5) and got[1] <= 0.5 <= got[2] and got[3] == 20
    assert trials.ratio([0.0], [0.0]) is None and trials.interval([]) is None
    right, counts = np.array([[True, True], [False, True]]), np.array([[True, False], [True, True]])
    assert trials.counted(right, counts)[0] == pytest.approx(2 / 3)


def test_films_are_chosen_by_rank():
    assert trials.ranked([3.0, 9.0, float("nan"), 5.0, 1.0]) == {"best": 1, "median": 0, "worst": 2}
    assert trials.ranked([4.0, 5.0]) == {"best": 1, "worst": 0}
    assert trials.ranked([4.0]) == {"best": 0}
    films = {"student": np.arange(3)[:, None]}
    rows = trials.shown(films, [1.0, 3.0, 2.0], "{:.0f}")
    assert {name.split()[0]: film[0] for name, film in rows.items()} == {"best": 1, "median": 2, "worst": 0}


def asked(pair: str, right, shows) -> trials.Asked:
    right, shows = np.array(right, bool), np.array(shows, bool)
    some = np.full(len(right), 20.0)
    return trials.Asked(pair, right, shows, np.where(right, 4.0, -4.0) if pair == "jl" else right * np.nan, *[some] * 3)


def test_momentum_excuses_one_chunk_of_a_walk_and_none_of_a_turn():
    right = [[1, 1, 0, 1]]
    walk, turn = asked("ws", right, [[1] * 4]), asked("jl", right, [[1] * 4])
    assert walk.counts.tolist() == [[True, True, False, True]]
    found = trials.control_scores([walk, turn], focal=66.67)
    assert found["walk"][0] == 1 and found["walk"][3] == 3
    assert found["turn"][0] == 0.75 and found["turn_shows"] == 1
    assert found["keys"]["w"][0] == 1 and found["keys"]["l"][0] == 0.5
    assert found["shift_right"][0] == 0.75
    assert found["shift_ratio"][0] == pytest.approx((4 * 3 - 4) / (4 * metrics.pinhole_shift(4.0, 66.67)))


def test_reaction_counts_from_one_and_leaves_out_what_never_moves():
    part = asked("ws", [[0, 1, 0, 0], [1, 1, 0, 1], [1, 1, 1, 1]], [[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]])
    assert trials.reactions(part, 0).tolist() == [2, 1]
    assert trials.reactions(part, 2).tolist() == [3, 2]
    assert trials.first_chunk(part)[1].tolist() == [True, True, False]


def path(*steps: tuple[float, float]) -> np.ndarray:
    """Poses [4n + 1, 4, 4] of a level camera that goes `steps` to the right and forward, map units a chunk."""
    poses = np.tile(np.eye(4, dtype=np.float32), (4 * len(steps) + 1, 1, 1))
    poses[1:, [0, 2], 3] = np.cumsum(np.repeat(steps, 4, 0) / 4, 0)
    return poses


class Reader:
    """A judge that reads a key a chunk off each film, whatever it shows."""

    scale = torch.tensor(32.0)

    def __init__(self, *reads: str):
        self.walk = np.eye(4)[[["wasd".index(key) for key in film] for film in reads]]

    def read(self, films: np.ndarray) -> Reading:
        some = np.zeros((len(films), self.walk.shape[1], 3))
        return Reading(self.walk, some, some[..., 0], some, some[..., 0] + 9, some, some)


@pytest.fixture
def played(exam, monkeypatch) -> trials.Exam:
    """With a simulator that shows the start pictures. Asked for w, then s, its first camera slides to the right, hardly
    moves, and is carried on; the second obeys; the third hardly moves at all."""
    w, s, d, still = (1, 30), (-1, -30), (30, 12), (0, 3)
    poses = np.stack([path(w, w, d, still, w, s, s, s), path(w, w, w, w, s, s, s, s), path(*[still] * 8)])
    shown = np.repeat(exam.starts[:, None], poses.shape[1], 1)
    monkeypatch.setattr(trials, "simulated", lambda seeds, keys, world: (shown, poses))
    return replace(exam, judge=Reader("wwdwwsss", "wwwdwsss", "dddddddd"), simulate=True)


def test_only_chunks_in_which_the_simulator_moved_as_asked_count(played):
    found = trials.control(played, pairs=("ws",)).scores
    assert list(found) == ["simulator", "tokenizer", "student, 2 steps"]
    for row in found.values():
        # 5 chunks of the first, all read right; 7 of the second (the one after the change is excused), of which the
        # fourth is read wrong; none of the third.
        assert row["walk_moved"][0] == pytest.approx(11 / 12) and row["walk_moved"][3] == 12
        assert row["walk"][0] == pytest.approx(12 / 21)
    alone = trials.control(replace(played, simulate=False), pairs=("ws",)).scores
    assert list(alone) == ["student, 2 steps"] and "walk_moved" not in alone["student, 2 steps"]
    assert alone["student, 2 steps"]["walk"] == found["student, 2 steps"]["walk"]


def test_turns_say_nothing_of_walks(played):
    assert all("walk_moved" not in row for row in trials.control(played, pairs=("jl",)).scores.values())


def test_the_simulator_gives_the_poses_of_its_films():
    pytest.importorskip("vizdoom")
    from lingbot_nb.world.vizdoom import Simulator, record

    with Simulator() as game:
        walks = [record(game, seed, 9) for seed in (HELD_OUT_SEED, HELD_OUT_SEED + 1)]
    films, poses = trials.simulated([w.seed for w in walks], np.stack([w.keys for w in walks]), walks[0].map)
    assert (films == np.stack([w.frames for w in walks])).all() and (poses == np.stack([w.poses for w in walks])).all()


def panning(pixels: int, frames: int = 33) -> np.ndarray:
    """A film whose picture moves right by `pixels` a pixel frame: a view that turns left."""
    noise = cv2.GaussianBlur(np.random.default_rng(3).random((96, 600, 3)).astype(np.float32), (0, 0), 2.0)
    wide = ((noise - noise.min()) / np.ptp(noise) * 255).astype(np.uint8)
    return np.stack([np.roll(wide, pixels * n, 1)[:, 200:360] for n in range(frames)])


def test_scores_of_films_alone_read_turns_from_the_image():
    keys = np.zeros((2, 33, 8), bool)
    keys[0, 1:], keys[1, 1:] = held("j"), held("l")
    films = np.stack([panning(5), panning(-5)])
    focal = 5 / np.tan(np.deg2rad(4.0))
    found = scores.film_scores(films, keys, focal=focal)
    assert found["shift_right"][0] == 1 and found["shift_ratio"][0] == pytest.approx(1, abs=0.1)
    assert found["sharpness"][0][0] == 1 and found["freeze"][0] == 0
    wrong = scores.film_scores(films[::-1], keys, focal=focal)
    assert wrong["shift_right"][0] == 0
    frozen = scores.film_scores(np.repeat(films[:, :1], 33, 1), keys)
    assert frozen["freeze"][0] == 1 and "shift_right" not in frozen
    with pytest.raises(ValueError, match="one row of keys"):
        scores.film_scores(films, keys[:, :5])


def test_a_judge_adds_what_it_reads(exam):
    films = np.random.default_rng(0).integers(0, 256, (2, 17, *SIZE, 3), np.uint8)
    keys = np.zeros((2, 17, 8), bool)
    keys[:, 1:9], keys[:, 9:] = held("w"), held("l")
    found = scores.film_scores(films, keys, judge=exam.judge)
    assert found["turn"][3] == 4 and found["direction"][3] == 4
    assert found["corpus"][0] > 0 and found["corpus_frechet"] > 0


def test_detail_beside_real_views_alike_is_told_by_second_later_and_at_the_end():
    due = np.random.default_rng(0).uniform(50, 500, (3, 16))  # four seconds
    detail = due * np.repeat([0.5, 0.4, 0.3, 0.25], 4)
    found = trials.alike(detail, due, slice(-1, None))
    assert [row[0] for row in found["alike"]] == pytest.approx([0.5, 0.4, 0.3, 0.25])
    assert found["alike_kept"] == pytest.approx([0.5, 0.5, 0.5, 3])
    later = detail[:, 4:].sum() / due[:, 4:].sum()
    assert found["alike_later"][0] == pytest.approx(later) and found["alike_later"][1] <= later


def test_few_real_pictures_are_compared_with_nothing(exam):
    film = np.random.default_rng(0).integers(0, 256, (2, 33, *SIZE, 3), np.uint8)
    moving = np.ones((2, 32), bool)
    assert exam.views is None and "alike" not in trials.drift(exam, film, moving)
    many = replace(exam, clips=[micro_clip(seed) for seed in range(43)])
    assert len(many.views) == 43 * 6 >= features.FEWEST
    found = trials.drift(many, film, moving)
    assert len(found["alike"]) == 2 and found["alike_kept"][3] == 2


def test_sharpness_drift_is_relative_to_the_first_second(exam):
    film = np.repeat(panning(3, 17)[None], 2, 0)
    film = np.concatenate([film, film[:, 1:] // 2], 1)
    found = trials.drift(exam, film, np.ones((2, 32), bool))
    assert found["sharpness"][0][0] == 1 and found["sharpness"][1][0] == pytest.approx(0.25, abs=0.02)
    assert found["sharpness_last"] == found["sharpness"][1]
    assert len(found["corpus"]) == 2 and found["freeze"][0] == 0


def test_a_picture_should_move_when_one_turns_or_the_camera_went():
    keys = np.stack([held(""), held("w"), held("w"), held("j"), held("jl"), held("")])[None]
    poses = np.tile(np.eye(4, dtype=np.float32), (1, 6, 1, 1))
    poses[0, 2:, 2, 3] = 8  # from the second picture with w on: the first one pressed against a wall
    poses[0, 5, 0, 3] = 8  # and what moves without a key is not asked for
    assert trials.should_move(keys, poses).tolist() == [[False, True, True, False, False]]


def test_the_simulator_also_walks_by_the_keys_of_the_next_start(exam):
    """What a walker's keys are worth in rooms that the walker did not see."""
    pytest.importorskip("vizdoom")
    from lingbot_nb.world.vizdoom import Simulator, SimulatorSettings, record

    with Simulator(SimulatorSettings(map="my_way_home")) as game:
        clips = [record(game, HELD_OUT_SEED + number, 17) for number in range(2)]
    keys, films, moving = trials.roamed(clips, 17)
    everyone = trials.walked(replace(exam, simulate=True, reconstructs=False), clips, 17)
    (first, real, _), (second, stray, _) = next(everyone), next(everyone)  # the third would be the micro student
    assert (first, second) == ("simulator", trials.STRAY) and moving.shape == (2, 16)
    for number, clip in enumerate(clips):
        assert (real[number] == clip.frames).all() and (keys[number] == clip.keys).all()
        (film,), _ = trials.simulated([clip.seed], clips[1 - number].keys[None], clip.map)
        assert (stray[number] == film).all()
    assert (stray != real).any() and (real == films).all()


# ---- the whole -------------------------------------------------------------------------------------------------------

QUICK = {
    "follow": partial(trials.follow, frames=5),
    "draws": partial(trials.redraw, draws=2),
    "control": partial(trials.control, pairs=("ws", "jl")),
    "stand": partial(trials.stand, seconds=2),
    "go_and_return": trials.go_and_return,
    "free_walk": partial(trials.free_walk, seconds=2, walks=2),
    "stroll": partial(stroll.stroll, seconds=2, walks=2),
    "variety": partial(trials.variety, seeds=2, starts=2, frames=3),
    "speed": partial(trials.speed, seconds=0.01),
}


@pytest.fixture(scope="module")
def examined(exam, tmp_path_factory) -> tuple[dict, object]:
    file = tmp_path_factory.mktemp("scores") / "scores.json"
    return scores.examine(exam, QUICK, file=file, about={"clips": 3}), file


def test_a_whole_exam_needs_no_simulator(examined):
    found, file = examined
    assert json.loads(file.read_text())["parts"] == json.loads(json.dumps(found["parts"]))
    assert set(found["parts"]["follow"]) == {
        "simulator", "first frame held", "tokenizer", "teacher, poses", "student, poses", "student, 2 steps",
        "student, 1 step",
    }  # fmt: skip
    row = found["parts"]["follow"]["student, 2 steps"]
    assert len(row["psnr"]["1"]) == 4 and row["psnr"]["1"][3] == 3
    assert row["frame_frechet"] > 0 and len(row["curves"]["psnr"]) == len(row["seconds"]) == 4
    assert list(found["parts"]["control"]) == ["student, 2 steps"]
    assert not list(file.parent.glob("*partial*"))
    names = ("follow-1", "follow-2", "control-1", "stand-1", "go-and-return-1", "free-walk-1", "stroll-1")
    assert {p.name for p in (file.parent / "scores").iterdir()} == {f"{name}.jpg" for name in names}


def test_one_draw_of_noise_is_what_follow_measures_and_more_are_averaged(exam):
    once, followed = trials.redraw(exam, draws=1).scores, trials.follow(exam).scores
    assert list(once) == ["student, poses", "student, 2 steps", "student, 1 step"]
    for label, row in once.items():
        assert row["psnr"] == followed[label]["psnr"] and row["sharpness"] == followed[label]["sharpness"]
    other = trials.redraw(replace(exam, seed=1), draws=1).scores["student, poses"]
    both = trials.redraw(exam, draws=2).scores["student, poses"]
    first = once["student, poses"]
    assert both["psnr_by_draw"]["1"] == [first["psnr"]["1"][0], other["psnr"]["1"][0]]
    assert both["psnr_by_draw"]["1"][0] != both["psnr_by_draw"]["1"][1]
    assert both["psnr"]["1"][0] == pytest.approx(np.mean(both["psnr_by_draw"]["1"]))
    assert both["psnr"]["1"][3] == len(exam.clips)
    assert both["sharpness"][0] == pytest.approx(np.mean([first["sharpness"][0], other["sharpness"][0]]))


def test_a_finished_exam_is_not_made_again(exam, examined):
    found, file = examined

    def never(exam):
        raise AssertionError("made again")

    assert scores.examine(exam, dict.fromkeys(QUICK, never), file=file, about={"clips": 3}) == json.loads(
        file.read_text()
    )
    with pytest.raises(ValueError, match="another file or delete"):
        scores.examine(exam, QUICK, file=file, about={"clips": 4})


def test_another_machine_goes_on_and_is_told_of(exam, tmp_path):
    one = {"stand": QUICK["stand"]}
    for machine, parts in (("a GPU", one), ("a CPU", one | {"speed": QUICK["speed"]})):
        found = scores.examine(exam, parts, file=tmp_path / "scores.json", about={"clips": 3, "conditions": machine})
    assert score_view.conditions(found).splitlines() == [
        "stand: 3 held-out walks · a GPU", "speed: 3 held-out walks · a CPU"
    ]  # fmt: skip


def test_table_and_figure_show_what_was_found(examined, tmp_path):
    found, _ = examined
    lines = score_view.table(found).splitlines()
    assert lines[0].startswith("|  | simulator | first frame held | tokenizer | teacher, poses | student, poses")
    at_one = next(line for line in lines if line.startswith("| PSNR, 1 s"))
    mean, low, high, _ = found["parts"]["follow"]["student, 2 steps"]["psnr"]["1"]
    assert f"{mean:.1f} [{low:.1f}, {high:.1f}]" in at_one
    assert not any("4 s" in line for line in lines) and any("pixel frames a second" in line for line in lines)
    drawn = score_view.figure(found)
    assert len(drawn.axes) == 7 and all(ax.lines or ax.patches for ax in drawn.axes)
    assert score_view.save(drawn, tmp_path / "figure.png").stat().st_size > 10_000


def test_scores_from_before_a_row_was_added_still_make_a_table():
    found = json.loads((PROJECT / "data" / "scores.json").read_text())
    control = found["parts"]["control"]
    for row in control.values():
        row.pop("walk_moved", None)
    title = "W A S D right where the simulator moved as asked (%)"
    before = score_view.table(found)
    assert title not in before and "W A S D held: steps the right way (%)" in before
    score_view.plt.close(score_view.figure(found))
    control["student, 4 steps"]["walk_moved"] = [0.97, 0.96, 0.98, 2800.0]
    (added,) = set(score_view.table(found).splitlines()) - set(before.splitlines())
    assert added.startswith(f"| {title} | – |") and "| 97.0 [96.0, 98.0] |" in added


def test_a_figure_of_some_parts_only_can_be_drawn():
    stand = {"student, 4 steps": {"seconds": [2, 3], "still": [[30, 29, 31, 4], None]}}
    found = {"about": {}, "parts": {"stand": stand}}
    drawn = score_view.figure(found)
    (panel,) = drawn.axes  # none for what was not measured
    assert panel.lines and panel.get_title("left") == "a  Standing still"
    score_view.plt.close(drawn)
    assert "| no key: PSNR" not in score_view.table(found)


def test_play_is_seeded(exam):
    keys = np.repeat(trials.script("w-8")[None], 3, 0)
    assert (exam.play(exam.starts, keys, 1) == exam.play(exam.starts, keys, 1)).all()
    steps = few_steps(MICRO.flow.labels(2), MICRO.flow.shift)
    given = exam.student, exam.vae, exam.context, MICRO, exam.starts[:1], keys[:1]
    assert (evaluation.play(*given, steps=steps, seed=1) != evaluation.play(*given, steps=steps, seed=2)).any()


@pytest.mark.parametrize("trial", [trials.stand, trials.free_walk, stroll.stroll])
def test_a_second_has_no_later_ones_to_compare(exam, trial):
    with pytest.raises(ValueError, match="1 s is compared with its own first second: use 2 or more"):
        trial(exam, seconds=1)


def test_cards_tell_what_shipped_weights_and_their_ancestors_reached(tmp_path):
    def card(kind, sha, psnr=None, **more):
        row = {"clips": 7, "psnr": {at: [psnr, psnr - 1, psnr + 1] for at in ("0.25", "1", "2", "4")}, "sharpness": 0.5}
        held = {"held_out": {"4 steps": row, "standing": {"clips": 7}}} if psnr else {}
        return {"preset": "tiny", "kind": kind, "parameters": 12_000_000, "sha256": sha} | held | more

    teacher = card("teacher", "t", 22)
    (tmp_path / "deep").mkdir()
    (tmp_path / "teacher.json").write_text(json.dumps({**teacher, "sha256": "p", "packed_from": "t"}))
    grown = card("causal teacher", "c", 24, made_from=teacher)
    (tmp_path / "deep" / "student.json").write_text(json.dumps(card("student", "s", 26, made_from=grown)))
    packed = {**grown, "sha256": "q", "packed_from": "c"}
    (tmp_path / "second.json").write_text(json.dumps(card("student", "s2", 25, made_from=packed)))
    rows = [line.split(" | ") for line in score_view.cards(tmp_path).splitlines()[2:]]
    # Two students were made from one causal model, once packed and once not.
    # The teacher is shipped, packed: it is not named again as what the student was made from.
    names = ["tiny, student", "tiny, student", "tiny, teacher", "tiny, causal teacher (not here)"]
    assert [row[0].strip("| ") for row in rows] == names
    assert [row[5] for row in rows] == [f"{at}.0 [{at - 1}.0, {at + 1}.0]" for at in (26, 25, 22, 24)]
    assert rows[0][1:4] == ["4 steps", "12.0", "7"] and rows[0][8].strip(" |") == "0.50"
