"""Runs: what a run folder keeps, what counts as finished, and how a stopped run goes on."""

import base64
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
import torch

from lingbot_nb import cli, execution, presets, runs
from lingbot_nb.report import page
from lingbot_nb.runs import Run

PARAMETERS = "preset = 'tiny'\nseed = 0\ngpus = 0\nrun_folder = ''\n"
# Importing torch only to write one line of conditions would double each kernel's time.
BEGIN = (
    "from lingbot_nb.runs import Run\nRun.conditions = lambda self: 'test'\n"
    "run = Run(run_folder, preset, dict(seed=seed, steps=steps))\n"
)
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="  # 1x1 PNG


def write_notebook(folder: Path, name: str, body: str, steps: int = 3) -> Path:
    cells = [
        nbformat.v4.new_code_cell(PARAMETERS + f"steps = {steps}", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_markdown_cell("# What a walk looks like\nwords"),
        nbformat.v4.new_code_cell(BEGIN + body),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "P"}})
    notebook.metadata["language_info"] = {"name": "python"}
    folder.mkdir(exist_ok=True)
    nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def record(name: str) -> str:
    return f"run.record('{name}', student={{'steps': steps, 'fps': 20.0}}, folder=run.name)"


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(runs.ROOT, str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture
def source(tmp_path) -> Path:
    write_notebook(tmp_path / "notebooks", "00_first", record("00_first"))
    write_notebook(tmp_path / "notebooks", "01_second", record("01_second"))
    return tmp_path / "notebooks"


@pytest.fixture
def order(root, source):
    def make(**changes) -> execution.Order:
        return execution.Order(**{"name": "r", "source": source, "root": root, **changes})

    return make


@pytest.fixture
def fake_papermill(monkeypatch):
    """papermill without kernels: each 'notebook' records itself, unless told what to do by its name."""
    behaviour = {}

    def execute_notebook(path, output, parameters, **_):
        Path(output).write_text("{}")
        behaviour.get(path.stem, finish)(path.stem, parameters)

    monkeypatch.setattr(papermill, "execute_notebook", execute_notebook)
    return behaviour


def finish(name: str, parameters: dict) -> None:
    taken = {key: parameters[key] for key in parameters if key in ("steps", "seed")}
    Run(parameters["run_folder"], parameters["preset"], taken).record(name, steps=parameters.get("steps"))


def outcomes(order: execution.Order) -> list[tuple[str, str]]:
    return [(o.notebook, o.status) for o in execution.execute(order) if o.status != "running"]


# ------------------------------------------------------------------------------------------------- inside a notebook


def test_a_run_is_a_folder_with_a_card(root):
    run = Run("mine", "micro")
    assert run.folder == root / "mine" and run.preset is presets.MICRO
    assert json.loads((root / "mine" / "run.json").read_text())["preset"] == "micro"
    assert Run(run.folder, presets.MICRO).folder == run.folder
    assert run.figures == run.folder / "figures" and run.figures.is_dir()


def test_notebooks_by_hand_share_a_scratch_run(root):
    assert Run("", "tiny").folder == root / "by-hand"


def test_a_path_is_taken_as_it_is(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Run("some/where", "micro").folder == tmp_path / "some" / "where"
    assert Run(tmp_path / "there", "micro").folder == tmp_path / "there"


def test_unknown_preset(root):
    with pytest.raises(ValueError, match="unknown preset 'small'.*tiny"):
        Run("x", "small")
    assert not root.exists()


def test_run_folder_of_another_preset(root):
    Run("x", "micro").log(loss=1.0)
    with pytest.raises(ValueError, match="holds a run of preset 'micro', not 'tiny'.*another run folder"):
        Run("x", "tiny")
    assert Run("x", "micro").metrics()[0]["loss"] == 1.0


@pytest.mark.parametrize("text", ["{", "", "[]", '{"preset": 3}', '{"name": "x"}', "\x00\xff"])
def test_corrupt_run_json(root, text):
    (root / "x").mkdir(parents=True)
    (root / "x" / "run.json").write_text(text)
    with pytest.raises(ValueError, match="run.json is damaged.*delete it"):
        Run("x", "micro")
    assert (root / "x" / "run.json").read_text() == text


def test_no_disk_space(root, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**9, 10**9 - 5_000_000, 5_000_000))
    with pytest.raises(RuntimeError, match="5 MB of free disk space where 7 MB are needed.*another disk"):
        Run("x", "micro", need_bytes=7_000_000)
    assert not root.exists()
    Run("x", "micro", need_bytes=5_000_000)


def test_path_stays_inside(root):
    run = Run("x", "micro")
    assert run.path("a/b.txt") == run.folder / "a" / "b.txt" and (run.folder / "a").is_dir()
    for outside in ("../y", "/tmp/y", "a/../../y"):
        with pytest.raises(ValueError, match="outside the run folder"):
            run.path(outside)


def test_find_looks_in_the_run_then_among_shipped_weights(root, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "WEIGHTS", tmp_path / "weights")
    run = Run("x", "micro")
    with pytest.raises(FileNotFoundError, match="'teacher.safetensors' is neither in .*: run notebook 00_tiny_world"):
        run.find("teacher.safetensors")
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "teacher.safetensors").touch()
    assert run.find("teacher.safetensors") == tmp_path / "weights" / "teacher.safetensors"
    run.path("teacher.safetensors").touch()
    assert run.find("teacher.safetensors") == run.folder / "teacher.safetensors"


def test_a_presets_own_shipped_weights_go_before_those_it_shares(root, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "WEIGHTS", tmp_path)
    for file in (
        tmp_path / "vae.safetensors",
        tmp_path / "student.safetensors",
        tmp_path / "micro/student.safetensors",
    ):
        file.parent.mkdir(exist_ok=True)
        file.touch()
    run = Run("x", "micro")
    assert run.find("student.safetensors") == tmp_path / "micro" / "student.safetensors"
    assert run.find("vae.safetensors") == tmp_path / "vae.safetensors"
    assert Run("y", "tiny").find("student.safetensors") == tmp_path / "student.safetensors"


@pytest.mark.parametrize(
    "name, notebook", [("student.safetensors", "05"), ("pairs/a.safetensors", "03"), ("x", "makes it")]
)
def test_find_names_the_notebook(root, name, notebook, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "WEIGHTS", tmp_path / "weights")
    with pytest.raises(FileNotFoundError, match=notebook):
        Run("x", "micro").find(name)


def test_recorded_results_come_back(root):
    run = Run("x", "micro", {"steps": 3})
    values = dict(a=torch.tensor(0.5), b=np.float32(2), c=np.arange(3), d=float("nan"), e=Path("p"), f=(1, None, True))
    path = run.record("03_ode_pairs", **values)
    assert path == run.folder / "results" / "03_ode_pairs.json"
    assert run.results("03_ode_pairs") == dict(a=0.5, b=2.0, c=[0, 1, 2], d=None, e="p", f=[1, None, True])
    assert json.loads(path.read_text())["parameters"] == {"steps": 3}
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    with pytest.raises(FileNotFoundError, match="04_pretrain has recorded nothing"):
        run.results("04_pretrain")


def test_an_interrupted_write_keeps_the_old_file(root, monkeypatch):
    run = Run("x", "micro")
    run.record("00_a", value=1)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        run.record("00_a", value=2)
    assert run.results("00_a") == {"value": 1}


def test_metrics_are_lines(root):
    run = Run("x", "micro")
    for step in range(3):
        run.log(step=step, loss=torch.tensor(1.0 / (step + 1)))
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # killed while writing
    assert [(m["step"], round(m["loss"], 3)) for m in run.metrics()] == [(0, 1.0), (1, 0.5), (2, 0.333)]


def test_conditions_are_one_line(root):
    line = Run("x", "micro").conditions(device="cpu", dtype=torch.bfloat16)
    assert "\n" not in line
    for part in ("CPU", f"torch {torch.__version__}", f"{torch.get_num_threads()} threads", "bfloat16", "preset micro"):
        assert part in line


# ------------------------------------------------------------------------------------------- orders, before any work


def test_plan_injects_only_what_a_notebook_declares(order, root, monkeypatch):
    monkeypatch.setattr(execution, "FULL_RUN", {"tiny": {"steps": 50, "elsewhere": 1}})
    first, second = execution.plan(order(gpus=2, given={"seed": 7}))
    assert first.injected == {"steps": 50, "seed": 7, "preset": "tiny", "gpus": 2, "run_folder": str(root / "r")}
    assert (first.notebook, second.notebook) == ("00_first", "01_second")
    assert execution.plan(order(preset="micro"))[0].parameters["steps"] == 3


@pytest.mark.parametrize("choice", ["01", "second", "01_second", "01_second.ipynb"])
def test_notebooks_by_number_or_name(order, choice):
    assert [step.notebook for step in execution.plan(order(notebooks=(choice,)))] == ["01_second"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"preset": "huge"}, "unknown preset 'huge'"),
        ({"notebooks": ("09",)}, "unknown notebook '09'.*00_first, 01_second"),
        ({"given": {"stepz": 3}}, "no chosen notebook has a parameter 'stepz'.*seed, steps"),
        ({"given": {"steps": "many"}}, "parameter 'steps' is a number such as 3, not 'many'"),
        ({"given": {"preset": "micro"}}, "set by --preset"),
        ({"given": {"run_folder": "/x"}}, "set by --name"),
        ({"name": "../x"}, "run name '../x' is no folder name"),
        ({"name": "-x"}, "no folder name"),
        ({"gpus": -1}, "-1 GPUs"),
        ({"source": Path("/nowhere")}, "holds no notebooks"),
    ],
)
def test_mistakes_in_an_order(order, root, changes, message):
    with pytest.raises(ValueError, match=message):
        list(execution.execute(order(**changes)))
    assert not root.exists()


def test_damaged_notebook(order, source, root):
    (source / "00_first.ipynb").write_text("{")
    with pytest.raises(ValueError, match="00_first.ipynb is no notebook"):
        execution.plan(order())


def test_shipped_full_run_names_are_declared():
    declared = [execution._declared(path) for path in sorted(runs.NOTEBOOKS.glob("[0-9]*.ipynb"))]
    if len(declared) < 8:
        pytest.skip("not all notebooks are there")
    unknown = set(runs.FULL_RUN["tiny"]) - {name for parameters in declared for name in parameters}
    assert not unknown


@pytest.mark.parametrize(
    "text, value",
    [("3", 3), ("1e-4", 1e-4), ("True", True), ("None", None), ("a b", "a b"), ("1,2", "1,2"), ("(", "(")],
)
def test_parameter_values(text, value):
    assert execution.literal(text) == value and type(execution.literal(text)) is type(value)


# ------------------------------------------------------------------------------------------ orders, without kernels


def test_finished_notebooks_are_skipped(order, fake_papermill):
    assert outcomes(order()) == [("00_first", "finished"), ("01_second", "finished")]
    assert outcomes(order()) == [("00_first", "skipped"), ("01_second", "skipped")]
    assert execution.status(order().folder) == "finished 2"


def test_other_parameters_execute_again_and_outdate_what_follows(order, fake_papermill):
    outcomes(order())
    assert outcomes(order(notebooks=("00",), given={"steps": 9})) == [("00_first", "finished")]
    assert execution.status(order().folder) == "finished 1, 1 outdated"
    assert outcomes(order(given={"steps": 9})) == [("00_first", "skipped"), ("01_second", "finished")]


def test_gpus_do_not_undo_a_run(order, fake_papermill):
    outcomes(order())
    assert outcomes(order(gpus=0)) == [("00_first", "skipped"), ("01_second", "skipped")]


def test_no_marker_is_a_failure_whatever_papermill_says(order, fake_papermill):
    fake_papermill["00_first"] = lambda name, parameters: None
    *_, last = execution.execute(order())
    assert last.status == "failed" and "without recording its results" in last.error
    assert execution.status(order().folder) == "failed in 00_first"
    del fake_papermill["00_first"]
    assert outcomes(order()) == [("00_first", "finished"), ("01_second", "finished")]


def test_a_marker_of_an_earlier_execution_does_not_count(order, fake_papermill):
    outcomes(order())
    fake_papermill["00_first"] = lambda name, parameters: None
    assert outcomes(order(given={"steps": 4})) == [("00_first", "failed")]


def test_a_marker_with_other_parameters_does_not_count(order, fake_papermill):
    fake_papermill["00_first"] = lambda name, parameters: finish(name, {**parameters, "steps": 99})
    *_, last = execution.execute(order(given={"steps": 4}))
    assert last.status == "failed" and "under other parameters (steps)" in last.error


def test_a_damaged_marker_does_not_count(order, fake_papermill):
    def damage(name, parameters):
        finish(name, parameters)
        (Path(parameters["run_folder"]) / "results" / f"{name}.json").write_text("{")

    fake_papermill["00_first"] = damage
    *_, last = execution.execute(order())
    assert last.status == "failed" and "00_first.json is damaged" in last.error


def test_any_exception_fails_the_notebook_in_one_line(order, fake_papermill):
    def fail(name, parameters):
        finish(name, parameters)
        raise OSError("first line\nsecond line")

    fake_papermill["00_first"] = fail
    *_, last = execution.execute(order())
    assert (last.status, last.error) == ("failed", "OSError: first line")


def test_run_folder_of_another_preset_stops_an_order(order, fake_papermill):
    outcomes(order(preset="micro"))
    with pytest.raises(ValueError, match="holds a run of preset 'micro'"):
        list(execution.execute(order()))
    assert execution.status(order().folder) == "finished 2"


def test_one_process_at_a_time(order, fake_papermill):
    def try_again(name, parameters):
        assert execution.status(order().folder) == "running"
        with pytest.raises(RuntimeError, match="being executed by another process"):
            list(execution.execute(order()))
        finish(name, parameters)

    fake_papermill["00_first"] = try_again
    assert outcomes(order()) == [("00_first", "finished"), ("01_second", "finished")]


def test_a_run_that_was_killed_is_interrupted(order, fake_papermill):
    def kill(name, parameters):
        raise KeyboardInterrupt

    fake_papermill["01_second"] = kill
    with pytest.raises(KeyboardInterrupt):
        list(execution.execute(order()))
    assert execution.status(order().folder) == "interrupted, 1 of 2 done"
    del fake_papermill["01_second"]
    assert outcomes(order()) == [("00_first", "skipped"), ("01_second", "finished")]


def test_default_names_do_not_collide(root):
    first = execution.default_name("micro", root)
    Run(root / first, "micro")
    assert re.fullmatch(r"\d{8}-\d{6}-micro", first) and execution.default_name("micro", root) != first


# ----------------------------------------------------------------------------------------------------- real kernels


def test_a_run_from_end_to_end(order, source, root):
    picture = f"import base64\nfrom IPython.display import Image\ndisplay(Image(base64.b64decode('{PIXEL}')))\n"
    write_notebook(source, "00_first", picture + "assert steps == 5\n" + record("00_first"))
    write_notebook(source, "01_second", "one = 1\none / 0")
    *_, last = execution.execute(order(given={"steps": 5}))
    assert (last.notebook, last.status, last.error) == (
        "01_second",
        "failed",
        "cell [3]: ZeroDivisionError: division by zero",
    )
    assert "ZeroDivisionError" in last.path.read_text()

    card = json.loads((root / "r" / "run.json").read_text())
    assert card["notebooks"]["00_first"]["parameters"]["steps"] == 5
    assert card["metrics"] == {"00_first": {"student": {"steps": 5, "fps": 20.0}, "folder": "r"}}
    assert (
        card["versions"]["torch"] == torch.__version__.split("+")[0] or card["versions"]["torch"] == torch.__version__
    )
    executed = nbformat.read(root / "r" / "00_first.ipynb", 4)
    assert "injected-parameters" in executed.cells[1].metadata.tags

    text = page.write(root / "r").read_text()
    assert (root / "r" / "pictures" / "00_first-00.png").read_bytes() == base64.b64decode(PIXEL)
    for part in (
        'src="pictures/00_first-00.png"',
        "What a walk looks like",
        "ZeroDivisionError",
        "results/00_first.json",
    ):
        assert part in text


def test_a_timeout_is_a_failure(order, source):
    write_notebook(source, "00_first", record("00_first") + "\nimport threading\nthreading.Event().wait()")
    *_, last = execution.execute(order(notebooks=("00",), cell_seconds=2))
    assert last.status == "failed" and "2 s that --timeout allows" in last.error
    statuses = {cell.metadata.papermill.status for cell in nbformat.read(last.path, 4).cells}
    assert statuses == {"completed"}  # why papermill's own word is not enough


def test_ctrl_c_leaves_a_run_that_continues(source, root, tmp_path):
    body = (
        f"import pathlib, threading\nflag = pathlib.Path({str(tmp_path / 'flag')!r})\n"
        "if not flag.exists():\n    flag.touch()\n    threading.Event().wait()\n"
    )
    write_notebook(source, "01_second", body + record("01_second"))
    command = [sys.executable, "-m", "lingbot_nb", "run", "--source", str(source), "--name", "r", "-p", "steps", "4"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "flag").exists():
        assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in out + err
    again = shlex.split(re.search(r"continue with: (.*)", err)[1])
    done = subprocess.run(again, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert re.search(r"00_first +\d+\.\d min  OK, finished earlier", done.stdout)
    assert re.search(r"01_second +\d+\.\d min  OK\n", done.stdout)
    assert "student  4      –               20.0" in done.stdout
    assert str(root / "r") in done.stdout and (root / "r" / "index.html").exists()


def test_a_stop_that_something_swallowed_is_repeated(monkeypatch, capsys):
    swallowed = []

    def deaf(options):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            swallowed.append(True)
        threading.Event().wait(30)

    monkeypatch.setattr(cli, "AGAIN_S", 1)
    monkeypatch.setattr(cli, "list_runs", deaf)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    try:
        assert cli.main(["list"]) == 130
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert swallowed and capsys.readouterr().err == "stopped\n"
    assert signal.alarm(0) == 0  # nothing is left that could go off later


# ------------------------------------------------------------------------------------------------------------- pages


def test_table_of_models():
    results = {
        "00": {"loss": 1.0, "teacher": {"steps": 2, "psnr": 1.0}},
        "06": {
            "teacher": {"steps": 50, "seconds_per_clip": 31.26, "psnr": 18.444, "psnr_after_s": 2},
            "student": {"steps": 4, "fps": 21.04, "latency_ms": 190.4, "psnr": None},
            "first_frame_held": {"psnr": 15.8},
        },
    }
    assert page.model_rows(results) == [
        ("", "steps", "seconds a clip", "FPS", "latency ms", "PSNR dB", "after s"),
        ("teacher", "50", "31.3", "–", "–", "18.44", "2.00"),
        ("student", "4", "–", "21.0", "190", "–", "–"),
        ("first frame held", "–", "–", "–", "–", "15.80", "–"),
    ]
    assert page.model_rows({})[1] == ("teacher", "–", "–", "–", "–", "–", "–")


def test_page_of_an_unfinished_run_escapes_what_it_shows(root):
    run = Run("x", "micro")
    entry = {"status": "failed", "seconds": 60.0, "error": "cell [1]: <script>"}
    runs.write_json(run.card_path, {"preset": "micro", "notebooks": {"00_a": entry}})
    (run.figures / "a walk #1.png").write_bytes(base64.b64decode(PIXEL))
    run.path("walk.mp4").write_bytes(b"")
    text = page.write(run.folder).read_text()
    assert "<script>" not in text and "&lt;script&gt;" in text
    assert 'src="figures/a%20walk%20%231.png"' in text and '<video src="walk.mp4"' in text


def test_show_and_list(root, capsys, fake_papermill, order):
    outcomes(order())
    Run("hand", "micro")
    (root / "broken").mkdir()
    (root / "broken" / "run.json").write_text("{")
    assert cli.main(["list"]) == 0
    listed = capsys.readouterr().out
    for line in (r"broken +\? +\? +run.json is damaged", r"hand +micro +0.0 +by hand", r"r +tiny +0.0 +finished 2"):
        assert re.search(line, listed)
    assert cli.main(["show", "r"]) == 0
    assert "teacher" in (shown := capsys.readouterr().out) and "00_first" in shown
    assert cli.main(["show", "none"]) == 2 and "there is no run 'none'" in capsys.readouterr().err
