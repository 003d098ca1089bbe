"""A training on two real processes: its curve, its stop, and its death."""

import socket
from concurrent.futures import ThreadPoolExecutor
from types import FunctionType

import launch_target
import pytest
import torch

from lingbot_nb.distill import train
from lingbot_nb.distill.launch import launch, spread

pytestmark = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="two processes need two GPUs, or none")
NEAR, LATER = (1e-3, 1e-2) if torch.cuda.is_available() else (1e-5, 1e-4)
"""How near two curves must be: on a GPU sums have no fixed order."""


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
        assert [row[name] for row in seen] == pytest.approx([row[name] for row in alone[:4]], rel=NEAR)
    stopped = int(train.checkpoints(tmp_path / "c")[-1].stem.removeprefix("step-"))
    assert 4 <= stopped < 500
    goal = stopped + 2
    rest = list(launch_target.curve(goal, checkpoint=str(tmp_path / "c")))
    assert [row["step"] for row in rest] == [stopped + 1, goal]
    whole = list(launch_target.curve(goal))
    assert losses(rest) == pytest.approx(losses(whole[stopped:]), rel=LATER)


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
        (lambda: None, {}, 2, "make it a function with a name"),
        ("launch_target:curve", {"steps": {1, 2}}, 2, "not plain JSON"),
        ("launch_target:curve", {"steps": 1}, 0, "0 processes"),
    ],
)
def test_bad_orders_are_one_sentence(target, arguments, processes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        next(launch(target, arguments, processes=processes, folder=tmp_path))


def in_a_notebook(function, **known):
    """The function as if a cell had defined it beside `known`."""
    cell = FunctionType(function.__code__, {"__builtins__": __builtins__, **known}, function.__name__)
    cell.__module__ = "__main__"
    return cell


def of_a_cell(count):
    from lingbot_nb.distill import parallel

    rank, ranks = parallel.place()
    # Rank 1 has more to do than rank 0, whose rows are those that are seen.
    for step in range(count * (1 + 2 * rank)):
        yield {"step": step, "ranks": ranks, "parts": [one for one in (rank, step)][0]}


factor = 3


def careless(count):
    yield {"loss": [count * factor for _ in range(count)]}


def test_a_function_of_a_cell_travels_and_ranks_may_have_more_rows_than_others(tmp_path):
    rows = list(launch(in_a_notebook(of_a_cell, rank=0, step=1), {"count": 2}, processes=2, folder=tmp_path))
    assert rows == [{"step": step, "ranks": 2, "parts": 0} for step in range(2)]
    with pytest.raises(ValueError, match="careless uses factor of this notebook"):
        next(launch(in_a_notebook(careless, factor=factor), {"count": 1}, processes=1, folder=tmp_path))


def test_ranks_with_other_walks_draw_halts_with_the_same_history(tmp_path):
    """One rank that drew a length which the other does not have would leave it waiting for an exchange that never
    comes."""
    rows = list(launch(launch_target.histories, {"count": 12}, processes=2, folder=tmp_path))
    assert all(row["least"] == row["most"] and row["fits"] for row in rows) and len(rows) == 12
    assert {row["least"] for row in rows} == {1, 2}, "what both ranks have"
    assert {row["least"] for row in launch_target.histories(40)} == {1, 2, 3, 4, 5, 6}


@pytest.mark.skipif(torch.cuda.is_available(), reason="both would take the first GPU, which NCCL refuses")
def test_two_machines_are_further_arguments_of_torchrun(tmp_path):
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    meet = ("--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "two")

    def machine(name):
        order = dict(processes=1, folder=tmp_path / name, torchrun=(*meet, "--local-addr", "localhost"))
        return list(launch(launch_target.curve, {"steps": 3}, **order))

    with ThreadPoolExecutor(2) as both:
        one, two = both.map(machine, ("one", "two"))
    # Rank 0's machine has the rows; they are those of one process alone.
    assert sorted(map(len, (one, two))) == [0, 3]
    assert losses(one or two) == pytest.approx(losses(launch_target.curve(3)), rel=1e-5)


def test_one_process_is_this_one(tmp_path):
    assert losses(spread(launch_target.curve, {"steps": 2}, processes=0, folder=tmp_path)) == losses(
        spread("launch_target:curve", {"steps": 2}, processes=1, folder=tmp_path)
    )
    rows = list(spread(launch_target.curve, {"steps": 9}, processes=1, folder=tmp_path, here={"log_every": 3}))
    assert len(rows) == 9 and not list(tmp_path.iterdir())
