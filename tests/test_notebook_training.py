"""The trainings in the notebooks' cells, on two processes: `-p gpus 2` without the notebook around it."""

import json
import shutil

import pytest

from lingbot_nb import parts
from lingbot_nb.distill.launch import launch, spread
from lingbot_nb.distill.trajectories import PairStore, Schedule
from lingbot_nb.presets import TINY
from lingbot_nb.runs import NOTEBOOKS, Run

ORDER = dict(preset="tiny", seed=0, train_clips=2, frames=3)


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """The functions of cells that others can import, as `launch` writes them."""
    folder = tmp_path_factory.mktemp("cells")
    for notebook, name in (("03_ode_pairs", "solve_pairs"), ("05_dmd", "train_student")):
        found = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text())["cells"]
        (source,) = (text for cell in found if f"def {name}(" in (text := "".join(cell["source"])))
        function = source[source.index(f"def {name}(") :].split("\n\n\n")[0]
        (folder / f"of_{name}.py").write_text(function + "\n")
    return folder


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """A run with its walks, which the notebooks take before they train: two processes must not both collect them."""
    run = Run(tmp_path_factory.mktemp("walked") / "run", "tiny")
    for held_out, count in ((False, 2), (True, 1)):
        parts.walks(run, count, seed=0, held_out=held_out)
    return run.folder


def test_two_processes_match_distributions_as_one_does(cells, walked, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(cells)
    for name in ("run", "alone"):
        shutil.copytree(walked, tmp_path / name)
    order = ORDER | dict(steps=2, walk=0, ratio=1, lr=2e-6, guidance=1.0, batch=2, clips_a_gpu=8, looks=[2])
    order |= dict(start_from="student.safetensors", folder=str(tmp_path / "run"))
    target = "of_train_student:train_student"
    both = list(launch(target, order, processes=2, folder=tmp_path / "launch"))
    made = {file.name for file in (tmp_path / "run").glob("*.safetensors")}
    assert made == {"student.safetensors", "critic.safetensors"}
    assert [file.name for file in (tmp_path / "run" / "looks").iterdir()] == ["dmd-000002.npy"]
    alone = list(spread(target, order | {"folder": str(tmp_path / "alone")}, processes=1, folder=tmp_path))
    # The first update of AdamW goes by signs, which rounding turns where a gradient is nearly zero: later rows are only
    # close.
    for at, near in enumerate((2e-3, 0.1)):
        for name in ("student_g", "critic_loss", "critic_grad"):
            assert both[at][name] == pytest.approx(alone[at][name], rel=near, abs=1e-7), name


def test_two_processes_share_the_pairs_out(cells, walked, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(cells)
    shutil.copytree(walked, tmp_path / "run")
    order = ORDER | dict(folder=str(tmp_path / "run"), solver_steps=4, pairs=3)
    rows = list(launch("of_solve_pairs:solve_pairs", order, processes=2, folder=tmp_path / "launch"))
    assert [row["shard"] for row in rows] == [0, 2]
    schedule = Schedule(4, TINY.flow.shift, TINY.flow.student_labels)
    store = PairStore(tmp_path / "run" / "pairs", "tiny", schedule, seed=0, frames=3)
    assert store.shards == [0, 1, 2] and store.read(1)["states"].shape[:2] == (1, 5)
