"""The command line: exit codes, one sentence per mistake, nothing made when the command is wrong."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

from lingbot_nb import cli, runs
from lingbot_nb.runs import Run


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(runs.ROOT, str(tmp_path / "runs"))
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    return tmp_path / "runs"


@pytest.fixture
def source(tmp_path) -> Path:
    (tmp_path / "notebooks").mkdir()
    for name in ("00_first", "01_second"):
        cell = nbformat.v4.new_code_cell(
            "preset = 'tiny'\nseed = 0\nrate = 0.5\nrun_folder = ''", metadata={"tags": ["parameters"]}
        )
        metadata = {"kernelspec": {"name": "python3", "display_name": "P"}, "language_info": {"name": "python"}}
        nbformat.write(
            nbformat.v4.new_notebook(cells=[cell], metadata=metadata), tmp_path / "notebooks" / f"{name}.ipynb"
        )
    return tmp_path / "notebooks"


@pytest.fixture
def command(source, monkeypatch):
    """Run the command with notebooks that need no kernel; `failing` names one that fails."""

    def call(*arguments: str, failing: str = "") -> int:
        def execute_notebook(path, output, parameters, **_):
            Path(output).write_text("{}")
            if path.stem == failing:
                raise RuntimeError("broken\nbadly")
            student = {"steps": 4, "fps": 20.5, "latency_ms": 190.0, "psnr": 17.72}
            Run(parameters["run_folder"], parameters["preset"]).record(path.stem, student=student)

        monkeypatch.setattr(papermill, "execute_notebook", execute_notebook)
        return cli.main([*arguments, "--source", str(source)])

    return call


def test_run_ends_with_table_and_folder(command, root, capsys):
    assert command("run", "--name", "x", "-p", "seed", "3", "-p", "rate", "0.25") == 0
    out = capsys.readouterr().out
    assert re.search(r"^run x: 2 notebooks, preset tiny", out)
    assert re.search(r"^00_first +\d\.\d min  OK$", out, re.MULTILINE)
    assert re.search(r"^student +4 +– +20.5 +190 +17.72 +–$", out, re.MULTILINE)
    assert re.search(r"^run folder: .*runs/x$", out, re.MULTILINE) and (root / "x" / "index.html").exists()
    taken = runs.read_card(root / "x")["notebooks"]["00_first"]["parameters"]
    assert (taken["seed"], taken["rate"]) == (3, 0.25)


def test_run_again_skips(command, capsys):
    command("run", "--name", "x")
    capsys.readouterr()
    assert command("run", "--name", "x") == 0
    assert capsys.readouterr().out.count("OK, finished earlier") == 2


def test_failure_is_one_line_and_exit_1(command, root, capsys):
    assert command("run", "--name", "x", "--notebooks", "00,01", failing="00_first") == 1
    out = capsys.readouterr().out
    assert "00_first failed: RuntimeError: broken\n" in out and "01_second" not in out
    assert str(root / "x" / "00_first.ipynb") in out
    assert re.search(r"continue with: .* run --name x --preset tiny --notebooks 00,01", out)
    assert (root / "x" / "index.html").exists()


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["--preset", "huge"], "unknown preset 'huge': use one of tiny"),
        (["--notebooks", "00,77"], "unknown notebook '77'"),
        (["-p", "steps", "3"], "no chosen notebook has a parameter 'steps'"),
        (["-p", "seed", "many"], "parameter 'seed' is a number such as 0, not 'many'"),
        (["--name", "a/b"], "run name 'a/b' is no folder name"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_2(command, root, capsys, arguments, sentence):
    assert command("run", *arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and sentence in err and err.count("\n") == 1
    assert not root.exists()


def test_run_folder_of_another_preset_and_damaged_card(command, root, capsys):
    command("run", "--name", "x", "--preset", "micro")
    assert command("run", "--name", "x") == 2
    assert "holds a run of preset 'micro', not 'tiny'" in capsys.readouterr().err
    (root / "x" / "run.json").write_text("{")
    assert command("run", "--name", "x", "--preset", "micro") == 2
    assert "run.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["run", "--timeout", "0"], ["run", "--timeout", "soon"], [], ["walk"]])
def test_usage_errors(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2


def test_collect_hands_its_options_on(monkeypatch, tmp_path, capsys):
    vizdoom = pytest.importorskip("lingbot_nb.world.vizdoom")
    seen = {}

    def collect(folder, **options):
        seen.update(folder=folder, **options)
        options["progress"](done := vizdoom.Collection(clips=3, tried=3, kept=2))
        return done

    monkeypatch.setattr(vizdoom, "collect", collect)
    words = ["collect", "--out", str(tmp_path), "--clips", "3", "--processes", "1", "--seed", "9", "--map", "map01"]
    assert cli.main(words) == 0
    assert (seen["folder"], seen["clips"], seen["processes"], seen["seed"]) == (tmp_path, 3, 1, 9)
    assert seen["settings"].map == "map01" and "3 of 3 clips" in capsys.readouterr().out


def test_too_old_python_is_one_sentence():
    code = "import sys, runpy; sys.version_info = (3, 9, 18)\nrunpy.run_module('lingbot_nb', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.strip() == "error: this is Python 3.9, and lingbot_nb needs Python 3.11 to 3.13"
