"""A training on two real processes: its curve, its stop, and its death."""

import launch_target
import pytest

from lingbot_nb.distill import train
from lingbot_nb.distill.launch import launch


def losses(rows):
    return [row["student_loss"] for row in rows]


def test_two_processes_give_one_processes_curve_stop_and_resume_on_one(tmp_path):
    alone = list(launch_target.curve(8))
    seen = []
    for row in launch(
        launch_target.curve,
        {"steps": 1000, "checkpoint": str(tmp_path / "c")},
        processes=2,
        folder=tmp_path,
    ):
        seen.append(row)
        if row["step"] == 4:
            break
    assert [row["step"] for row in seen] == [1, 2, 3, 4]
    for name in ("student_loss", "student_grad", "student_sigma"):
        assert [row[name] for row in seen] == pytest.approx([row[name] for row in alone[:4]], rel=1e-5)
    stopped = int(train.checkpoints(tmp_path / "c")[-1].stem.removeprefix("step-"))
    assert 4 <= stopped < 500
    goal = stopped + 2
    rest = list(launch_target.curve(goal, checkpoint=str(tmp_path / "c")))
    assert [row["step"] for row in rest] == [stopped + 1, goal]
    whole = list(launch_target.curve(goal))
    assert losses(rest) == pytest.approx(losses(whole[stopped:]), rel=1e-4)


@pytest.mark.parametrize(
    ("how", "message"), [("killed", "killed by SIGKILL"), ("raises", "rank 1 failed first(.|\n)*rank one cannot count")]
)
def test_a_lost_rank_ends_the_run_and_says_why(how, message, tmp_path):
    rows, lines = [], []
    with pytest.raises(RuntimeError, match=message):
        for row in launch(launch_target.failing, {"how": how}, processes=2, folder=tmp_path, say=lines.append):
            rows.append(row)
    assert [row["step"] for row in rows[:2]] == [0, 1] and len(rows) <= 3
    assert rows[0]["loss"] != rows[0]["loss"]
    assert "hello from 0" in lines and "hello from 1" in (tmp_path / "output.log").read_text()


@pytest.mark.parametrize(
    ("target", "arguments", "processes", "message"),
    [
        ("launch_target:absent", {}, 2, "cannot be imported"),
        ("no_such_module:f", {}, 2, "cannot be imported"),
        (lambda: None, {}, 2, "other processes cannot find it"),
        ("launch_target:curve", {"steps": {1, 2}}, 2, "not plain JSON"),
        ("launch_target:curve", {"steps": 1}, 0, "0 processes"),
    ],
)
def test_bad_orders_are_one_sentence(target, arguments, processes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        next(launch(target, arguments, processes=processes, folder=tmp_path))
