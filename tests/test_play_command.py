"""`play` and `bench` on the command line, with a painted session in place of a student."""

import contextlib
import json
from pathlib import Path

import pytest
from fake_session import FakeSession, read_keys, read_number

from lingbot_nb import cli, runs
from lingbot_nb.presets import MICRO, TINY_LARGE
from lingbot_nb.runs import Run
from lingbot_nb.stream import commands
from lingbot_nb.stream.movie import read_movie


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv(runs.ROOT, str(tmp_path / "runs"))
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)
    return tmp_path / "runs"


def test_play_writes_a_movie_of_the_keys(monkeypatch, tmp_path, capsys):
    pytest.importorskip("av")
    asked = {}

    def session(run, file, **options):
        asked.update(run=run.name, file=file, **options)
        return FakeSession()

    monkeypatch.setattr(commands.parts, "session", session)
    out = tmp_path / "walk.mp4"
    words = [
        "play",
        "--keys",
        "w-8,l-4",
        "--out",
        str(out),
        "--student",
        "mine.safetensors",
        "--steps",
        "2",
        "--seed",
        "7",
    ]
    assert cli.main(words) == 0
    assert asked == dict(run=commands.SHIPPED, file="mine.safetensors", start_image=None, steps=2, seed=7)
    frames = read_movie(out)[:, 1::3, 1::3]
    assert [read_number(frame) for frame in frames] == list(range(13))
    assert [read_keys(frame) for frame in frames] == [""] + ["w"] * 8 + ["l"] * 4
    assert "13 pixel frames, 0.8 s" in capsys.readouterr().out


def test_play_of_released_weights_goes_to_their_own_session(monkeypatch, tmp_path, capsys):
    pytest.importorskip("av")
    asked = {}

    def play_on(gpus, folder, **options):
        asked.update(gpus=gpus, folder=folder, **options)
        return FakeSession()

    monkeypatch.setattr(commands.lingbot, "play_on", play_on)
    words = ["play", "--keys", "w-4", "--out", str(tmp_path / "walk.mp4"), "--weights", "student", "--gpus", "2"]
    words += ["--image", str(tmp_path / "street.png"), "--size", "720x1280", "--prompt", "a street", "--steps", "2"]
    assert cli.main(words) == 0
    told = dict(start_image=tmp_path / "street.png", prompt="a street", part=None, decoder=None, steps=2, seed=0)
    assert asked == dict(gpus=2, folder=Path("student"), height=720, width=1280, **told)
    with pytest.raises(SystemExit):
        cli.main([*words, "--size", "720p"])
    assert "'720p' is no picture size" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--keys", "w-4", "--weights", "student"], "name one with --image"),
        (["--keys", "q-4"], "unknown key 'q'"),
        (["--keys", "w-4", "--run", "none"], "there is no run 'none'"),
        (["--keys", "w-4", "--student", "none.safetensors"], "'none.safetensors' is neither in"),
        (["--keys", "w-4", "--image", "none.png"], "none.png"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_no_file(words, sentence, tmp_path, capsys):
    assert cli.main(["play", "--out", str(tmp_path / "x.mp4"), *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and sentence in err and err.count("\n") == 1
    assert not list(tmp_path.glob("*.mp4"))


def test_a_named_run_keeps_its_preset(root):
    Run("mine", MICRO)
    assert commands.open_run("mine").preset == MICRO


def test_the_large_student_plays_by_its_presets_name(root, tmp_path, capsys):
    assert commands.open_run("tiny-large").preset == TINY_LARGE
    words = ["play", "--run", "tiny-large", "--keys", "w-4", "--steps", "1", "--out", str(tmp_path / "walk.mp4")]
    assert cli.main(words) == 0
    assert "tiny-large" in capsys.readouterr().out and (tmp_path / "walk.mp4").stat().st_size > 1000


@pytest.mark.parametrize("words", [["play"], ["bench"], ["bench", "play", "--chunk", "1,x"], ["play", "--steps", "0"]])
def test_usage_errors(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2


def test_bench_endless_keeps_curve_and_numbers(monkeypatch, root, capsys):
    class Painted(FakeSession):
        preset, device, dtype = MICRO, "cpu", "torch.float32"
        threads, on_threads = 1, contextlib.nullcontext

        def tune(self):
            pass

    monkeypatch.setattr(commands, "live_session", lambda *_, **__: Painted())
    assert cli.main(["bench", "endless", "--minutes", "0.3"]) == 0
    out = capsys.readouterr().out
    assert "sharpness" in out and "steps 4 · chunk 1" in out
    kept = json.loads((root / commands.SHIPPED / "endless.json").read_text())
    assert [stretch["second"] for stretch in kept["stretches"]] == [10.0, 20.0]
    assert (root / commands.SHIPPED / "figures" / "endless.png").exists()


def test_bench_play_without_a_browser_says_so(monkeypatch, capsys):
    monkeypatch.setattr(commands.lab, "CHROMIUM", None)
    assert cli.main(["bench", "play"]) == 2
    assert "no Chromium here" in capsys.readouterr().err
