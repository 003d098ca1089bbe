"""What decoders of several pushes tell of a tokenizer's limit: rows from their folders, a table, a figure."""

import json
from dataclasses import asdict

import pytest
import torch

from lingbot_nb.model import checkpoint
from lingbot_nb.model.vae import MICRO_VAE, TinyVAE
from lingbot_nb.report import decoder_limits
from lingbot_nb.runs import PROJECT


def run_folder(folder, texture: float, psnr: float, sharpness: float, **made):
    torch.manual_seed(0)
    told = dict(texture=texture, steps=400, seconds=1.0, batch=2, machine="CPU", kind="tokenizer")
    told |= made or dict(decoder_of="abc")
    found = {"psnr": psnr, "sharpness": sharpness}
    checkpoint.save(folder / "vae.safetensors", TinyVAE(MICRO_VAE), size=asdict(MICRO_VAE), metrics=found, **told)
    lines = [{"stage": "data", "clips": 3}]
    lines += [{"stage": "tokenizer", "step": n, "psnr": psnr - 1 / n, "sharpness": sharpness} for n in (200, 400)]
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_a_row_is_what_a_run_left(tmp_path):
    (tmp_path / "a").mkdir()
    row = decoder_limits.row(run_folder(tmp_path / "a", 0.3, 32.0, 0.5))
    assert (row["texture"], row["psnr"], row["sharpness"], row["steps"]) == (0.3, 32.0, 0.5, 400)
    assert row["course"] == [[200, 32.0 - 1 / 200, 0.5], [400, 32.0 - 1 / 400, 0.5]]
    assert decoder_limits.table([row]).splitlines()[2] == "| 0.3 | decoder | 400 | 32.0 | 0.50 |"


def test_a_run_whose_encoder_learnt_on_tells_its_kl_and_gets_a_line_of_its_own(tmp_path):
    rows = []
    for number, made in enumerate((dict(decoder_of="abc"), dict(made_from={"sha256": "abc"}, kl=5e-6))):
        folder = tmp_path / str(number)
        folder.mkdir()
        rows.append(decoder_limits.row(run_folder(folder, 0.0, 32.0 + number, 0.4, **made)))
    assert [row["kl"] for row in rows] == [None, 5e-6] and {row["decoder_of"] for row in rows} == {"abc"}
    assert decoder_limits.table(rows).splitlines()[3].startswith("| 0 | all, KL 5e-06 | 400 | 33.0")
    trade, course = decoder_limits.figure(rows).axes
    assert [line.get_ydata().tolist() for line in trade.lines[:2]] == [[32.0], [33.0]]
    assert [text.get_text() for text in course.get_legend().get_texts()] == [
        "decoder alone, push 0", "encoder, too, push 0"
    ]  # fmt: skip


def test_runs_that_learnt_by_decibels_are_joined_by_themselves(tmp_path):
    rows = []
    for number, made in enumerate((dict(kl=5e-6), dict(kl=3e-4, decibel=0.05))):
        folder = tmp_path / str(number)
        folder.mkdir()
        rows.append(decoder_limits.row(run_folder(folder, 0.3, 32.0, 0.4, made_from={"sha256": "abc"}, **made)))
    assert [row["decibel"] for row in rows] == [0.0, 0.05]
    assert decoder_limits.table(rows).splitlines()[3].startswith("| 0.3 | all, KL 0.0003, a dB worth 0.05 | 400 |")
    legend = decoder_limits.figure(rows).axes[1].get_legend()
    told = [text.get_text() for text in legend.get_texts()]
    assert told == ["encoder, too, push 0.3", "encoder, too, dB in the loss, push 0.3"]


def test_a_folder_without_a_log_is_named(tmp_path):
    folder = run_folder(tmp_path, 0.3, 32.0, 0.5)
    (folder / "log.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="holds no run of distill.decoder with its log"):
        decoder_limits.row(folder)


def test_from_the_command_line_rows_and_a_figure_are_kept(tmp_path, monkeypatch):
    folders = []
    for push, psnr in ((0.8, 31.5), (0.0, 32.5)):
        folder = tmp_path / str(push)
        folder.mkdir()
        folders.append(str(run_folder(folder, push, psnr, 0.4 + push / 4)))
    summary = tmp_path / "found.json"
    monkeypatch.setattr("sys.argv", ["decoder_limits", *folders, "--summary", str(summary)])
    decoder_limits.main()
    rows = json.loads(summary.read_text())["rows"]
    assert [row["texture"] for row in rows] == [0.8, 0.0] and summary.with_suffix(".png").stat().st_size > 10_000
    trade, course = decoder_limits.figure(rows).axes
    assert trade.lines[0].get_ydata().tolist() == [32.5, 31.5], "by their push, least first"
    assert course.lines[0].get_xdata().tolist() == [200, 400]
    assert course.get_legend().get_texts()[0].get_text() == "decoder alone, push 0"


def test_a_run_from_nothing_began_with_no_tokenizer_and_has_a_colour_of_its_own(tmp_path):
    kinds = (
        dict(decoder_of="abc"),
        dict(decoder_of="abc", decibel=0.05),
        dict(made_from={"sha256": "abc"}, kl=5e-6),
        dict(made_from={"sha256": "abc"}, kl=3e-4, decibel=0.05),
        dict(kl=3e-4, decibel=0.05),
    )
    rows = []
    for number, made in enumerate(kinds):
        folder = tmp_path / str(number)
        folder.mkdir()
        rows.append(decoder_limits.row(run_folder(folder, 0.3, 32.0, 0.4, **made)))
    assert [row["decoder_of"] for row in rows] == ["abc"] * 4 + [None]
    assert (
        decoder_limits.table(rows).splitlines()[6].startswith("| 0.3 | all, KL 0.0003, a dB worth 0.05, from nothing |")
    )
    course = decoder_limits.figure(rows).axes[1]
    told = [text.get_text() for text in course.get_legend().get_texts()]
    assert told[-1] == "from nothing, dB in the loss, push 0.3" and len(told) == 5
    assert len({line.get_color() for line in course.lines[:5]}) == 5
    assert course.get_ylim()[0] == 30.5, "where a run from nothing has come within 2.5 dB of what was asked"


def test_the_kept_runs_tell_which_tokenizer_each_began_with():
    """Decoders alone without decibels began with the first one, three whole ones with the second, whose latents are the
    same; the decoders after them with the one before each, and the last run with nothing."""
    rows = json.loads((PROJECT / "papermill_runs" / "decoder-limits.json").read_text())["rows"]
    begun = [row["decoder_of"] for row in rows]
    alone = [row["kl"] is None for row in rows]
    assert alone == [True] * 3 + [False] * 3 + [True] * 2 + [False]
    assert len({*begun[:3]}) == len({*begun[3:6]}) == 1 and begun[-1] is None
    shipped = json.loads((PROJECT / "data" / "weights" / "vae.json").read_text())
    before = shipped["made_from"]
    assert begun[-2] == shipped["decoder_of"] == before["sha256"]
    assert begun[-3] == before["decoder_of"] == before["made_from"]["sha256"]
    assert begun[3] == before["made_from"]["made_from"]["sha256"]
    assert min(row["texture"] for row in rows) == 0
    assert all(20 < row["psnr"] < 50 and 0 < row["sharpness"] < 2 and len(row["course"]) > 10 for row in rows)
