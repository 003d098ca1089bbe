"""Recorded play is judged from its mp4 and its keys alone."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("av")
from lingbot_nb import cli, presets
from lingbot_nb.control.keys import format_keys, held, parse_keys
from lingbot_nb.report import recordings
from lingbot_nb.stream.player import Recorder, record
from lingbot_nb.stream.session import lens

FOCAL = 5 / np.tan(np.deg2rad(4.0))


def panorama(shifts: np.ndarray) -> np.ndarray:
    """Views of one wide picture, each moved right by its number of pixels: u8 [n, 96, 160, 3]."""
    wide = np.repeat(np.repeat(np.random.default_rng(0).integers(0, 256, (24, 320, 3), np.uint8), 4, 0), 4, 1)
    return np.stack([np.roll(wide, int(shift), 1)[:96, :160] for shift in shifts])


def recorded(path, text: str, pixels: int = 5, scale: int = 3, **facts):
    """A recording in which l turns to the right by `pixels` a pixel frame and j to the left."""
    keys = np.pad(parse_keys(text), ((1, 0), (0, 0)))
    turn = keys[:, 5].astype(int) - keys[:, 7]
    recorder = Recorder(path, 16, scale=scale, **facts)
    for frame, row in zip(panorama(pixels * np.cumsum(turn)), keys, strict=True):
        recorder.append(frame, row)
    return recorder.close()


def test_turns_are_read_from_the_picture_at_the_size_it_was_drawn_in(tmp_path):
    path = recorded(tmp_path / "walk.mp4", "l-16,j-16,none-4", focal=FOCAL, turn=4.0, about="a panorama")
    take = recordings.read_take(path)
    assert take.film.shape == (37, 96, 160, 3) and (take.keys[1] == held("l")).all()
    row = recordings.examine({"walk": take})["parts"]["recording"]["walk"]
    assert row["shift_right"] == 1 and row["shift_ratio"] == pytest.approx(1, abs=0.1)
    assert row["freeze"] == 0 and row["about"] == "a panorama" and len(row["sharpness"]) == 2
    backwards = recorded(tmp_path / "wrong.mp4", "l-16,j-16", pixels=-5, focal=FOCAL, turn=4.0)
    row = recordings.examine({"wrong": recordings.read_take(backwards)})["parts"]["recording"]["wrong"]
    assert row["shift_right"] == 0
    still = recorded(tmp_path / "still.mp4", "l-32", pixels=0, focal=FOCAL, turn=4.0)
    row = recordings.examine({"still": recordings.read_take(still)})["parts"]["recording"]["still"]
    assert row["freeze"] == 1 and row["shift_right"] is None


def test_a_recording_begun_in_the_middle_starts_at_a_frame(tmp_path):
    path = recorded(tmp_path / "walk.mp4", "l-20", scale=1, first_pixel_frame=6)
    take = recordings.read_take(path)
    assert len(take.film) == 17  # pixel frames 8 to 24 of the world: frame 2's last, then four whole frames
    row = recordings.examine({"walk": take})["parts"]["recording"]["walk"]
    assert row["length"] == 17 / 16 and "shift_right" not in row


def test_less_than_a_second_has_no_drift(tmp_path):
    take = recordings.read_take(recorded(tmp_path / "short.mp4", "l-12", focal=FOCAL, turn=4.0))
    found = recordings.examine({"short": take})
    row = found["parts"]["recording"]["short"]
    assert row["sharpness"] == [] and row["shift_right"] == 1
    assert "| sharpness, last / first second | – |" in recordings.table(found)
    recordings.plt.close(recordings.figure(found))


def test_a_recording_that_fails_leaves_nothing(tmp_path):
    session = SimpleNamespace(prompt="", seed=0, steps=1, fps=16, shape=presets.TINY.shape)
    frames = [np.zeros((96, 160, 3), np.uint8), np.zeros((48, 80, 3), np.uint8)]
    with pytest.raises(ValueError, match="all frames share one size"):
        record(session, frames, parse_keys("w-1"), tmp_path / "walk.mp4")
    assert not list(tmp_path.iterdir())


def test_the_command_makes_one_table_and_one_figure_of_a_folder(tmp_path, capsys):
    for name in ("first", "second"):
        recorded(tmp_path / f"{name}.mp4", "l-16,j-16", focal=FOCAL, turn=4.0)
    recordings.main([str(tmp_path), "--out", str(tmp_path / "found.json")])
    said = capsys.readouterr().out
    assert (
        said.startswith("|  | first | second |") and "| J L alone: image shift to the right side (%) | 100.0 |" in said
    )
    assert set(json.loads((tmp_path / "found.json").read_text())["parts"]["recording"]) == {"first", "second"}
    assert (tmp_path / "found.png").stat().st_size > 5_000


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no recording at"):
        recordings.find([tmp_path])
    path = recorded(tmp_path / "short.mp4", "l-2")
    with pytest.raises(ValueError, match="less than one frame"):
        recordings.read_take(path)
    card = json.loads(path.with_suffix(".json").read_text())
    path.with_suffix(".json").write_text(json.dumps(card | {"keys": format_keys(np.zeros((9, 8), bool))}))
    with pytest.raises(ValueError, match="3 pixel frames and keys for 9"):
        recordings.read_take(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(FileNotFoundError, match="short.json with its keys"):
        recordings.read_take(path)


def test_play_leaves_keys_and_lens_beside_its_film(tmp_path):
    assert cli.main(["play", "--keys", "l-8,w-3", "--steps", "1", "--out", str(tmp_path / "walk.mp4")]) == 0
    take = recordings.read_take(tmp_path / "walk.mp4")
    assert len(take.film) == 13 and format_keys(take.keys) == "none-1,l-8,w-3,none-1"
    assert take.film.shape[1:3] == (96, 160) and take.card["turn"] == 4.0
    assert take.card["focal"] == pytest.approx(lens(presets.TINY)[0][0])
