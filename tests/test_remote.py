"""A session in two other processes: the same frames, agreement before a chunk, death noticed and mended."""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from fake_session import read_keys, read_number
from far_session import broken, in_folder, micro, painted, refusing, shared, waiting

from lingbot_nb.stream.playback import Playback, play_script
from lingbot_nb.stream.remote import Lost, RemoteSession

LOOPBACK = "0100007F"
"""127.0.0.1 as /proc/net/tcp has it."""


@pytest.fixture
def far():
    """Start remote sessions that end with the test."""
    started = []

    def start(make, world=2, **options):
        started.append(RemoteSession(make, world, **options))
        return started[-1]

    yield start
    for session in started:
        processes = [process for process, _ in session._workers]
        session.close()
        assert not any(process.is_alive() for process in processes)


def pids(session):
    return [process.pid for process, _ in session._workers]


def lines(folder, rank):
    file = folder / f"rank-{rank}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_frames_of_two_processes_are_those_of_one(far):
    away, here = far(micro), micro()
    assert (away.about, away.next_frames, away.window, away.keys) == (here.about, 4, here.window, here.keys)
    assert np.array_equal(away.first_frame, here.first_frame)
    assert np.array_equal(play_script(away, "w-8,jl-4"), play_script(here, "w-8,jl-4"))
    for session in (away, here):
        session.prompt = "a burning forest"
        session.steps = 1
        session.window = 3
    assert np.array_equal(away.step("w"), here.step("w"))
    assert away.steps == 1 and away.pixel_frames == here.pixel_frames == 17
    one, other = away.ask("recording")
    assert np.array_equal(one.keys, other.keys) and one.changes == other.changes
    with pytest.raises(ValueError, match="at most 21"):
        away.window = 50
    with pytest.raises(ValueError, match="key 'q'"):
        away.step("q")
    assert np.array_equal(away.step("l"), here.step("l"))
    away.reset(seed=9)
    here.reset(seed=9)
    assert np.array_equal(away.step("w"), here.step("w")) and away.seed == 9


def test_two_processes_share_one_world(far):
    away, here = far(shared), micro()
    for keys in ("w-8,jl-4", "w-8"):
        films = [play_script(session, keys).astype(int) for session in (away, here)]
        assert np.abs(films[0] - films[1]).max() <= 1
        for session in (away, here):
            session.prompt, session.steps, session.window = "a burning forest", 3, 3
    os.kill(pids(away)[1], signal.SIGKILL)
    with pytest.raises(Lost, match="rank 1 of 2"):
        away.step("w")
    away.reset(seed=3)
    here.reset(seed=3)
    assert np.abs(away.step("w").astype(int) - here.step("w")).max() <= 1


def listening(pid: int) -> set[str]:
    """Addresses (hexadecimal, as Linux writes them) at which a process waits for TCP connections."""
    links = [os.readlink(entry.path) for entry in os.scandir(f"/proc/{pid}/fd") if entry.is_symlink()]
    sockets = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:")}
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and columns[9] in sockets:
                found.add(columns[1].split(":")[0])
    return found


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="reads Linux's table of connections")
def test_nothing_listens_beyond_this_machine(far):
    with socket.create_server(("", 0)):
        assert listening(os.getpid()) - {LOOPBACK}  # it would be seen
    before = listening(os.getpid())
    whole, away = far(micro), far(shared)
    away.step("w")
    assert listening(os.getpid()) == before
    assert not any(listening(pid) for pid in pids(whole))
    assert all(listening(pid) <= {LOOPBACK} for pid in pids(away))


def test_an_error_of_one_rank_keeps_all_in_step(far):
    session = far(refusing)
    for key in ("i", "k"):  # both ranks refuse i, one of them k
        with pytest.raises(ValueError, match="not known here"):
            session.generate(key)
        session.finish()
    assert read_keys(session.step("w")[-1]) == "w"
    calls = session.ask("calls")
    assert len(calls[0]) == len(calls[1]) + 1  # what the second rank refused alone, and told


def test_no_rank_begins_a_chunk_that_another_did_not_hear_of(far, tmp_path):
    session = far(in_folder(tmp_path))
    session.step("w")
    os.kill(pids(session)[1], signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(Lost, match="rank 1 of 2 .*killed by signal 9"):
        session.step("l")
    assert time.monotonic() - began < 2
    assert [line["keys"] for line in lines(tmp_path, 0)] == ["w"]
    assert [line["keys"] for line in lines(tmp_path, 1)] == ["w"]
    session.reset()
    assert read_number(session.step("l")[-1]) == 4
    assert lines(tmp_path, 0)[-1]["keys"] == lines(tmp_path, 1)[-1]["keys"] == "l"


def test_a_hung_rank_is_ended_and_settings_come_back(far):
    session = far(painted, seconds=20)
    session.prompt = "the same corridor at night"
    session.steps = 2
    session._seconds = 0.3
    os.kill(pids(session)[1], signal.SIGSTOP)
    with pytest.raises(Lost, match="rank 1 of 2 has not answered for 0.3 s"):
        session.generate("w")
    assert not session.alive
    with pytest.raises(Lost, match="rank 1 of 2 has not answered for 0.3 s"):
        session.check()
    session._seconds = 20
    session.reset(seed=5)
    assert (session.prompt, session.steps, session.seed) == ("the same corridor at night", 2, 5)
    assert session.alive and read_keys(session.step("w")[0]) == "w"


def runs(pid: str) -> bool:
    """Whether a process does; one that has ended and is still listed has no command line."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="reads Linux's table of processes")
def test_with_a_killed_kernel_its_processes_and_their_memory_go():
    code = (
        "import time\n"
        "from far_session import painted\n"
        "from lingbot_nb.stream.remote import RemoteSession\n"
        "session = RemoteSession(painted, 2)\n"
        "session.step('w')\n"
        "print(*[process.pid for process, _ in session._workers], session._meeting.name, flush=True)\n"
        "time.sleep(60)\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    kernel = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    *ranks, folder = kernel.stdout.readline().split()
    assert all(map(runs, ranks)) and Path(folder).exists()
    kernel.kill()
    kernel.communicate()
    end = time.monotonic() + 15
    while Path(folder).exists() or any(map(runs, ranks)):
        assert time.monotonic() < end, "something is left"
        time.sleep(0.05)


def test_a_rank_that_failed_is_named_when_its_peers_wait_for_it_in_vain(far):
    session = far(waiting, seconds=20)
    session.step("w")
    session._seconds = 0.5
    with pytest.raises(Lost, match="rank 1 of 2 has not answered for 0.5 s, rank 0 had failed: cuda:0 is full"):
        session.step("k")


def test_a_full_gpu_may_shorten_the_window_of_one_process_only(far):
    session = far(micro, 1)
    assert not session.shrinks
    session.shrinks = True
    assert session.ask("shrinks") == [True]
    session.restart()
    assert session.ask("shrinks") == [True]
    with pytest.raises(ValueError, match="set `session.window`"):
        far(painted).shrinks = True


def test_pictures_come_in_the_parts_that_a_session_here_gives(far):
    away, here = far(micro, 1), micro()
    for session in (away, here):
        session.chunk = 3
        session.reset()
    parts, expected = list(away.stream("w")), list(here.stream("w"))
    assert [len(part) for part in parts] == [len(part) for part in expected]
    assert all(np.array_equal(*pair) for pair in zip(parts, expected, strict=True))
    for frames in away.stream("l"):  # the rest is made although nobody takes it
        first = frames
        break
    expected = here.step("l")
    assert np.array_equal(first, expected[: len(first)]) and np.array_equal(away.last_frame, here.last_frame)
    assert np.array_equal(away.step("w"), here.step("w"))


def test_one_process_begins_a_chunk_again_for_newer_keys(far):
    away, here = far(micro, 1), micro()
    asked = []

    def newer():
        asked.append(1)
        return "l" if len(asked) == 1 else None

    assert np.array_equal(np.concatenate(list(away.stream("w", newer))), here.step("l"))
    assert len(asked) > 1 and np.array_equal(away.recording().keys, here.recording().keys)


def test_several_processes_keep_to_the_keys_they_agreed_on(far):
    away = far(micro)
    frames = np.concatenate(list(away.stream("w", lambda: "l")))
    assert np.array_equal(frames, micro().step("w"))


def test_an_interrupted_chunk_is_made_and_the_next_one_is_its_own(far):
    away, here = far(micro, 1), micro()

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(away.stream("w", interrupted))
    here.step("w")
    assert np.array_equal(away.step("l"), here.step("l"))
    away._order("generate", frozenset("j"), False)  # as if interrupted before anything was waited for
    here.step("j")
    assert np.array_equal(away.step("l"), here.step("l"))
    away._number += 1  # as if interrupted before it was told to go: that chunk is not made
    away._send(0, pickle.dumps((away._number, ("generate", frozenset("w"), False))))
    assert np.array_equal(away.step("l"), here.step("l"))


def test_a_state_and_a_recording_come_from_one_process(far, tmp_path):
    away, here = far(micro, 1), micro()
    for session in (away, here):
        session.step("w")
        session.save(tmp_path / "state.safetensors")
    expected = here.step("l")
    assert np.array_equal(away.step("l"), expected)
    away.load(tmp_path / "state.safetensors")
    assert np.array_equal(away.step("l"), expected)
    assert np.array_equal(away.recording().keys, here.recording().keys)
    with pytest.raises(RuntimeError, match="2 processes share this world"):
        far(painted).save(tmp_path / "none.safetensors")


def test_one_process_chooses_threads_and_keeps_them_when_it_is_started_again(far):
    session = far(micro, 1)
    assert session.threads is None
    choice = session.tune(0.1)
    assert session.threads == choice.threads and session.dtype == choice.dtype
    session.threads = choice.threads + 1
    os.kill(pids(session)[0], signal.SIGKILL)
    with pytest.raises(Lost, match="killed by signal 9"):
        session.step("w")
    session.reset()
    assert session.threads == choice.threads + 1 and len(session.step("w"))
    assert far(painted).tune() is None  # several would not choose alike


def test_a_session_that_cannot_be_built_says_why():
    with pytest.raises(FileNotFoundError, match="weights of rank 0 are missing"):
        RemoteSession(broken, 2)


def test_a_paused_player_tells_of_a_death_and_restarts(far):
    session = far(painted)
    seen = threading.Condition()
    frames = []

    def show(number, frame):
        with seen:
            frames.append(frame)
            seen.notify_all()
        playback.acknowledge(number)

    def wait(so, seconds=20):
        with seen:
            assert seen.wait_for(so, seconds), playback.read_out().message

    playback = Playback(session, show, fps=200.0)
    playback.start()
    try:
        wait(lambda: len(frames) > 8)
        playback.pause()
        os.kill(pids(session)[1], signal.SIGKILL)
        died = time.monotonic()
        while playback.read_out().state == "paused" and time.monotonic() - died < 5:
            threading.Event().wait(0.01)
        assert playback.read_out().state == "failed" and time.monotonic() - died < 2
        assert "rank 1 of 2" in playback.read_out().message
        playback.pause(False)
        count = len(frames)
        playback.reset()
        wait(lambda: len(frames) > count + 8)
        assert read_number(frames[count]) == 0
        assert playback.read_out().state == "playing"
    finally:
        playback.stop()


def test_the_player_shows_a_death_within_two_seconds_and_r_mends_it(far):
    pytest.importorskip("ipyevents")
    from lingbot_nb.stream.player import play, stop

    session = far(painted)
    before = listening(os.getpid())
    player = play(session, fps=200, script="w-4000").player
    picture = player.panel.picture

    def wait(so, seconds):
        end = time.monotonic() + seconds
        while not so():
            assert time.monotonic() < end, player.playback.read_out()
            player.playback.acknowledge(player.playback.credit.sent)  # as the page would
            time.sleep(0.01)

    try:
        wait(lambda: player._shown > 12, 10)
        assert listening(os.getpid()) == before, "a player opened a port"
        os.kill(pids(session)[1], signal.SIGKILL)
        wait(lambda: "rank 1 of 2" in player.panel.veil.value, 2)
        assert "press R" in player.panel.veil.value and "Stopped by an error" in player.panel.header.value
        player._on_event({"type": "keydown", "key": "r", "code": "KeyR"})
        seen = picture.number
        wait(lambda: picture.number > seen + 12 and player.playback.read_out().state == "playing", 20)
        player.panel.chunk.value = 2
        wait(lambda: session.chunk == 2 and session.ask("chunk") == [2, 2], 10)
    finally:
        stop()
