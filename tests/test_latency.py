"""What is measured between a key and a pixel: markers, the two logs put together, gaps and drift."""

import io
import json

import numpy as np
import pytest
from fake_session import FakeSession
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from lingbot_nb.control.keys import KEYS, held
from lingbot_nb.stream import latency, look
from lingbot_nb.stream.playback import HeldKeys


@given(st.integers(0, 2**16 - 1), st.sets(st.sampled_from(KEYS)), st.integers(0, 255))
def test_markers_survive_jpeg(number, names, grey):
    noise = np.random.default_rng(number).integers(0, 256, (96, 160, 3), dtype=np.uint8)
    frame = noise // 2 + np.uint8(grey // 2)
    latency.burn(frame, number, held(names))
    seen = np.asarray(Image.open(io.BytesIO(look.jpeg(frame))))
    assert latency.read(seen) == (number, "".join(name for name in KEYS if name in names))


def test_a_marked_session_counts_and_tells_when_chunks_begin():
    told = []
    session = latency.mark(FakeSession(chunk=3), lambda *event: told.append(event))
    frames = np.concatenate([session.step("w"), session.step({"j", "w"})])
    assert [latency.read(frame) for frame in frames] == [(i, "w" if i <= 12 else "wj") for i in range(1, 25)]
    assert told == [("chunk", "w"), ("chunk", "wj")]


def test_a_chunk_that_begins_again_is_marked_with_its_last_keys():
    told, session = [], FakeSession()
    session.stream = lambda keys, newer: [session_generate(newer())]
    session_generate = session.generate
    latency.mark(session, lambda *event: told.append(event))
    (frames,) = session.stream(held("w"), lambda: held("l"))
    assert [latency.read(frame) for frame in frames] == [(i, "l") for i in range(1, 5)]
    assert told == [("chunk", "w"), ("chunk", "l")]


def test_keys_are_told_once(tmp_path):
    keys = HeldKeys()
    latency.log_keys(keys, latency.Log(tmp_path / "events.jsonl"))
    keys.press("KeyW", "w")
    keys.press("KeyW", "w", repeat=True)
    assert keys.names() == {"w"}
    keys.release("KeyW")
    assert keys.names() == set()
    assert [line[1:] for line in latency.read_log(tmp_path / "events.jsonl")] == [("down", "w"), ("up", "w")]
    (tmp_path / "events.jsonl").write_text(json.dumps([1.5, "chunk", "wl"]) + "\n")
    assert latency.read_log(tmp_path / "events.jsonl") == [(1.5, "chunk", "wl")]


def test_a_change_is_followed_from_page_to_pixel():
    page = {
        "keys": [(10.0, "w", True), (11.0, "w", False), (12.0, "l", True)],
        "pictures": [(9.0, 1, ""), (10.30, 5, ""), (10.34, 6, "w"), (11.5, 9, "w"), (11.6, 10, ""), (12.9, 20, "")],
    }
    kernel = [(9.9, "chunk", ""), (10.01, "down", "w"), (10.2, "chunk", "w"), (11.02, "up", "w"), (11.3, "chunk", ""),
              (12.01, "down", "l"), (12.2, "chunk", "l")]  # fmt: skip
    press, release = latency.changes(page, kernel)  # l never came to the screen
    assert (press.letter, press.down, release.down) == ("w", True, False)
    assert (press.kernel, press.chunk, press.pixel) == pytest.approx((0.01, 0.2, 0.34))
    assert (release.kernel, release.chunk, release.pixel) == pytest.approx((0.02, 0.3, 0.6))


def test_delivery_counts_pictures_stalls_and_drift():
    pictures = [(i / 16, i, "") for i in range(33)]
    even = latency.delivery(pictures, fps=16)
    assert (even.pictures, even.stalls, even.drift) == (32, 0, pytest.approx(0)) and even.fps == pytest.approx(16)
    twice = sorted([*pictures, *((at + 0.01, number, keys) for at, number, keys in pictures)])
    assert latency.delivery(twice, fps=16) == even
    late = [(at + (0.5 if number > 20 else 0), number % 16, keys) for at, number, keys in pictures]
    stalled = latency.delivery([(at, number + 2**16 - 20, keys) for at, number, keys in late][:5], fps=16)
    assert stalled.drift == pytest.approx(0)
    late = latency.delivery([(at + (0.5 if number > 20 else 0), number, "") for at, number, _ in pictures], fps=16)
    assert (late.stalls, late.drift) == (1, pytest.approx(-0.5)) and late.longest == pytest.approx(0.5625)
    with pytest.raises(ValueError, match="the player never ran"):
        latency.delivery([(1.0, 1, ""), (2.0, 1, "")], fps=16)


def test_the_number_may_wrap():
    pictures = [(i / 16, (2**16 - 3 + i) % 2**16, "") for i in range(9)]
    assert latency.delivery(pictures, fps=16).drift == pytest.approx(0)


def test_the_table():
    followed = [latency.Change("w", True, 0.004, 0.1, value / 1000) for value in range(101, 201)]
    cells = latency.row(1, 4, latency.Delivery(60.0, 954, 1, 0.3, -0.375), followed)
    table = latency.table([cells]).splitlines()
    assert len(table) == 3 and table[2].startswith("| 1 frame | 4 | 15.90 | 1 | 300 ms | -375 ms | 100 | 4 / 4 / 4 |")
    assert "| 150 / 195 / 199 |" in table[2]
    assert latency.row(3, 4, latency.Delivery(1.0, 1, 0, 0.0, 0.0), [])[-1] == "–"
