"""The player without a browser: keys, credit, the two threads, the headless script, movies and the widget tree."""

import json
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from fake_session import FakeSession, read_keys, read_number

from lingbot_nb.control.keys import KEYS, held, parse_keys
from lingbot_nb.stream import look
from lingbot_nb.stream.movie import Movie, read_movie, write_movie
from lingbot_nb.stream.playback import HOLD_LIMIT, REPEAT_LIMIT, SWITCH, Credit, HeldKeys, Playback
from lingbot_nb.stream.player import letter_of, play, play_script, stop


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Viewer:
    """Collects frames, acknowledges them unless told not to, and lets a test wait for something it has seen."""

    def __init__(self, answers: bool = True):
        self.frames, self.answers, self.playback = [], answers, None
        self._change = threading.Condition()

    def __call__(self, number, frame):
        with self._change:
            self.frames.append(frame)
            self._change.notify_all()
        if self.answers:
            self.playback.acknowledge(number)

    def wait(self, seen, timeout=10.0):
        with self._change:
            assert self._change.wait_for(lambda: seen(self.frames), timeout), "the viewer never saw it"

    @property
    def numbers(self):
        return [read_number(frame) for frame in self.frames]


@pytest.fixture
def running():
    """Start playbacks that end with the test."""
    started = []

    def start(session, viewer, fps=400.0, credit=None):
        playback = Playback(session, viewer, fps=fps, credit=credit)
        viewer.playback = playback
        started.append(playback)
        return playback.start()

    yield start
    for playback in started:
        playback.stop()
        assert not playback.running


# -- held keys --------------------------------------------------------------------------------------------------------


def test_keys_are_held_until_released():
    keys = HeldKeys(Clock())
    keys.press("KeyW", "w")
    keys.press("KeyL", "l")
    assert keys.names() == {"w", "l"}
    keys.release("KeyW")
    assert keys.names() == {"l"}


def test_a_short_tap_counts_once():
    keys = HeldKeys(Clock())
    keys.press("KeyW", "w")
    keys.release("KeyW")
    assert keys.names() == set()
    assert keys.read()[0] == {"w"}
    assert keys.read()[0] == set()


def test_two_keys_with_one_meaning():
    keys = HeldKeys(Clock())
    keys.press("KeyW", "w")
    keys.press("ArrowUp", "w")
    keys.release("KeyW")
    assert keys.names() == {"w"}


def test_a_repeating_key_that_falls_silent_is_lost():
    clock = Clock()
    keys = HeldKeys(clock)
    keys.press("KeyW", "w")
    clock.now += 0.4
    keys.press("KeyW", "w", repeat=True)
    clock.now += REPEAT_LIMIT - 0.01
    assert keys.names() == {"w"}
    clock.now += 0.02
    assert keys.names() == set()
    keys.press("KeyW", "w", repeat=True)  # it was down after all
    assert keys.names() == {"w"}


def test_the_rest_of_a_chord_outlives_the_repeats():
    clock = Clock()
    keys = HeldKeys(clock)
    keys.press("KeyW", "w")
    keys.press("KeyL", "l")
    keys.press("KeyL", "l", repeat=True)
    keys.release("KeyL")
    clock.now += HOLD_LIMIT - 0.1
    assert keys.names() == {"w"}
    clock.now += 0.2
    assert keys.names() == set()


def test_read_tells_when_the_oldest_change_came():
    clock = Clock()
    keys = HeldKeys(clock)
    assert keys.read() == (frozenset(), None)
    keys.press("KeyW", "w")
    clock.now += 0.1
    keys.press("KeyL", "l")
    assert keys.read() == (frozenset("wl"), 100.0)
    assert keys.read() == (frozenset("wl"), None)
    clock.now += 1
    keys.clear()
    assert keys.read() == (frozenset(), 101.1)


def test_second_thoughts_take_what_has_changed_and_lose_no_tap():
    clock = Clock()
    keys = HeldKeys(clock)
    keys.press("KeyW", "w")
    assert keys.read() == (frozenset("w"), 100.0) and keys.reread() is None
    clock.now += 1
    keys.press("KeyL", "l")
    assert keys.reread() == (frozenset("wl"), 101.0) and keys.reread() is None
    keys.release("KeyW")
    keys.release("KeyL")
    assert keys.reread() is None  # both were given for the first time: a chunk is the least that a key counts for
    assert keys.read() == (frozenset(), 101.0)
    keys.press("KeyA", "a")
    keys.read(), keys.read()
    clock.now += 1
    keys.release("KeyA")
    assert keys.reread() == (frozenset(), 102.0)
    keys.press("KeyD", "d")
    keys.release("KeyD")
    assert keys.reread() == (frozenset("d"), 102.0) and keys.reread() is None
    assert keys.read() == (frozenset(), 102.0)


@pytest.mark.parametrize(
    ("event", "letter"),
    [
        ({"key": "w", "code": "KeyW"}, "w"),
        ({"key": "W", "code": "KeyW"}, "w"),
        ({"key": "ArrowLeft", "code": "ArrowLeft"}, "j"),
        ({"key": "ц", "code": "KeyW"}, "w"),
        ({"key": "w", "code": "Comma"}, "w"),
        ({"key": "z", "code": "KeyW"}, None),
        ({"key": "Shift", "code": "ShiftLeft"}, None),
        ({"key": "Dead", "code": "KeyE"}, None),
    ],
)
def test_letters_of_events(event, letter):
    assert letter_of(event) == letter


def test_arrows_look_and_where_one_cannot_look_up_they_walk():
    keys = ("ArrowUp", "ArrowDown", "ArrowLeft", "ArrowRight")
    assert "".join(letter_of({"key": key}) for key in keys) == "ikjl"
    assert "".join(letter_of({"key": key}, "wasdjl") for key in keys) == "wsjl"


# -- credit -----------------------------------------------------------------------------------------------------------


def test_credit_lets_two_frames_travel():
    credit = Credit(window=2, timeout=0.0)
    assert credit.wait() and credit.send() == 1
    assert credit.wait() and credit.send() == 2
    assert not credit.wait()
    credit.acknowledge(2)  # stands for 1 as well
    assert credit.wait() and credit.send() == 3


def test_credit_ignores_frames_never_sent():
    credit = Credit(window=1, timeout=0.0)
    credit.send()
    credit.acknowledge(99)
    credit.send()
    assert not credit.wait()


def test_half_a_window_without_an_answer_asks_for_one():
    credit = Credit(window=6, timeout=0.0)
    assert [credit.asks(credit.send()) for _ in range(5)] == [False, False, True, True, True]
    credit.acknowledge(3)
    assert [credit.asks(credit.send()) for _ in range(2)] == [True, True]
    credit.acknowledge(7)
    assert not credit.asks(credit.send())
    assert all(Credit(window=1).asks(number) for number in (1, 2))


# -- playback ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [1, 3])
def test_every_frame_is_shown_once_and_in_order(running, chunk):
    viewer = Viewer()
    running(FakeSession(chunk=chunk), viewer)
    viewer.wait(lambda frames: len(frames) > 30)
    numbers = viewer.numbers
    assert numbers == list(range(len(numbers)))


def test_while_it_plays_python_hands_its_lock_over_sooner(running):
    before = sys.getswitchinterval()
    playback = running(FakeSession(), Viewer())
    assert sys.getswitchinterval() == pytest.approx(SWITCH) and SWITCH < before
    playback.stop()
    assert sys.getswitchinterval() == pytest.approx(before)


def test_held_keys_reach_the_frames_and_leave_them(running):
    viewer = Viewer()
    playback = running(FakeSession(), viewer)
    playback.held.press("KeyW", "w")
    playback.held.press("KeyL", "l")
    viewer.wait(lambda frames: read_keys(frames[-1]) == "wl")
    playback.held.clear()
    viewer.wait(lambda frames: read_keys(frames[-1]) == "")


def test_keys_are_read_after_the_chunk_before_is_on_screen(running):
    """At most one chunk waits: the session is never more than two chunks ahead of the viewer."""
    session, viewer = FakeSession(), Viewer()
    ahead = []
    generate = session.generate

    def watched(keys):
        ahead.append(session.number - (viewer.numbers or [0])[-1])
        return generate(keys)

    session.generate = watched
    running(session, viewer)
    viewer.wait(lambda frames: len(frames) > 40)
    assert max(ahead) <= session.next_frames


def test_the_first_part_of_a_chunk_is_shown_while_the_rest_is_made(running):
    """The session makes each next part, and the next chunk, only once the viewer has seen the part before."""
    session, viewer = FakeSession(chunk=3), Viewer()
    generate = session.generate

    def stream(keys, newer):
        for part in np.split(generate(keys), 3):
            yield part
            first = read_number(part[0])
            viewer.wait(lambda frames, first=first: read_number(frames[-1]) >= first or len(frames) > 40)

    session.stream = stream
    playback = running(session, viewer)
    viewer.wait(lambda frames: len(frames) > 40)
    numbers = viewer.numbers
    assert numbers == list(range(len(numbers)))
    assert playback.read_out().state == "playing"


class Hesitant(FakeSession):
    """Asks for newer keys once a chunk, after `before()`; other keys make it begin again."""

    def __init__(self, before, **options):
        super().__init__(**options)
        self.before, self.begun = before, []

    def stream(self, keys, newer):
        self.before(self)
        rows = newer()
        self.begun.append((read_keys_of(keys), None if rows is None else read_keys_of(rows)))
        yield self.generate(keys if rows is None else rows)


def read_keys_of(rows):
    return "".join(name for name, down in zip(KEYS, rows[0], strict=True) if down)


def test_a_key_that_comes_just_after_a_chunk_began_still_counts(running):
    viewer = Viewer()
    session = Hesitant(lambda session: session.number == 8 and playback.held.press("KeyW", "w"))
    playback = Playback(session, viewer, fps=40.0)
    viewer.playback = playback
    playback.start()
    viewer.wait(lambda frames: read_number(frames[-1]) >= 16)
    playback.stop()
    assert session.begun[:4] == [("", None), ("", None), ("", "w"), ("w", None)]
    assert [read_keys(frame) for frame in viewer.frames[:14]] == [""] * 9 + ["w"] * 5
    assert viewer.numbers == list(range(len(viewer.numbers)))


def test_a_chunk_that_is_well_under_way_or_scripted_is_kept(running):
    viewer = Viewer()

    def late(session):
        if session.number == 4:
            threading.Event().wait(0.06)  # more than a fifth of the 0.1 s that four pixel frames last
            playback.held.press("KeyW", "w")
        if session.number == 8:
            playback.held.release("KeyW")

    session = Hesitant(late)
    playback = Playback(session, viewer, fps=40.0)
    playback.play_keys("l-4")
    viewer.playback = playback
    playback.start()
    viewer.wait(lambda frames: read_number(frames[-1]) >= 16)
    playback.stop()
    assert session.begun[0] == ("l", None) and session.begun[1] == ("", None)
    assert session.begun[2] == ("w", None), "a key that was given for the first time stays"


def test_another_chunk_length_begins_with_fresh_times(running):
    session, viewer = FakeSession(seconds=0.05, chunk=3), Viewer()
    playback = running(session, viewer, fps=200.0)
    viewer.wait(lambda frames: len(frames) > 20)
    assert playback.read_out().chunk_ms >= 50
    session.seconds = 0.0
    playback.request(lambda session: setattr(session, "chunk", 1))
    count = len(viewer.frames)
    viewer.wait(lambda frames: len(frames) > count + 24)
    assert playback.read_out().chunk_ms < 30
    numbers = viewer.numbers
    assert numbers == list(range(len(numbers)))


def test_a_silent_viewer_stops_the_world_and_a_returning_one_resumes_it(running):
    session, viewer = FakeSession(), Viewer(answers=False)
    playback = running(session, viewer, credit=Credit(window=2, timeout=0.02))
    viewer.wait(lambda frames: len(frames) >= 12)
    assert playback.read_out().state == "waiting"
    assert set(viewer.numbers) <= {0, 1}  # the same picture is sent again and again, asking for an answer
    assert session.number <= 2 * session.next_frames
    viewer.answers = True
    playback.acknowledge(playback.credit.sent)
    viewer.wait(lambda frames: read_number(frames[-1]) >= 20)
    assert playback.read_out().state == "playing"
    fresh = sorted(set(viewer.numbers))
    assert fresh == list(range(len(fresh)))


def test_pause_holds_and_reset_shows_the_first_frame(running):
    viewer = Viewer()
    playback = running(FakeSession(), viewer)
    viewer.wait(lambda frames: len(frames) > 10)
    playback.pause()
    assert playback.read_out().state == "paused"
    playback.reset()
    viewer.wait(lambda frames: read_number(frames[-1]) == 0)
    count = len(viewer.frames)
    playback.pause(False)
    viewer.wait(lambda frames: len(frames) > count + 8)
    assert viewer.numbers[count : count + 8] == list(range(1, 9))


def test_reset_shows_nothing_stale(running):
    viewer = Viewer()
    playback = running(FakeSession(chunk=3), viewer)
    viewer.wait(lambda frames: len(frames) > 30)
    playback.reset()
    viewer.wait(lambda frames: 0 in [read_number(frame) for frame in frames[30:]])
    viewer.wait(lambda frames: 14 < read_number(frames[-1]) < 40)
    numbers = viewer.numbers
    after = numbers[len(numbers) - 1 - numbers[::-1].index(0) :]
    assert after == list(range(len(after)))


def test_a_script_is_played_frame_by_frame_and_then_the_keyboard(running):
    viewer = Viewer()
    playback = Playback(FakeSession(), viewer, fps=400.0)
    viewer.playback = playback
    playback.play_keys("w-5,jl-2")
    playback.held.press("KeyA", "a")
    playback.start()
    viewer.wait(lambda frames: len(frames) > 10)
    playback.stop()
    assert [read_keys(frame) for frame in viewer.frames[1:10]] == ["w"] * 5 + ["jl"] * 2 + ["a"] * 2


def test_an_error_is_told_and_reset_goes_on(running):
    session, viewer = FakeSession(), Viewer()
    good = session.generate

    def bad(keys):
        raise RuntimeError("the GPU is full")

    playback = running(session, viewer)
    viewer.wait(lambda frames: len(frames) > 4)
    session.generate = bad
    for _ in range(200):
        if playback.read_out().state == "failed":
            break
        threading.Event().wait(0.01)
    now = playback.read_out()
    assert now.state == "failed" and "the GPU is full" in now.message
    session.generate = good
    count = len(viewer.frames)
    playback.reset()
    viewer.wait(lambda frames: len(frames) > count + 8)
    assert playback.read_out().state == "playing"


def test_latency_runs_from_key_to_acknowledged_frame(running):
    viewer = Viewer()
    playback = running(FakeSession(), viewer)
    viewer.wait(lambda frames: len(frames) > 4)
    assert np.isnan(playback.read_out().latency_ms)
    playback.held.press("KeyW", "w")
    viewer.wait(lambda frames: read_keys(frames[-1]) == "w")
    viewer.wait(lambda frames: read_number(frames[-1]) % 4 == 0)
    assert 0 < playback.read_out().latency_ms < 5000


def test_play_script_rounds_up_to_whole_chunks():
    frames = play_script(FakeSession(chunk=3), "w-5,l-9")
    assert frames.shape == (1 + 24, 96, 160, 3)
    assert [read_number(frame) for frame in frames] == list(range(25))
    expected = ["w"] * 5 + ["l"] * 9 + [""] * 10
    assert [read_keys(frame) for frame in frames[1:]] == expected
    again = play_script(FakeSession(chunk=3), parse_keys("w-5,l-9"))
    assert np.array_equal(frames, again)


# -- movies -----------------------------------------------------------------------------------------------------------


def test_a_movie_keeps_size_length_and_markers(tmp_path):
    pytest.importorskip("av")
    frames = play_script(FakeSession(), "w-8,l-8")
    path = write_movie(tmp_path / "walk.mp4", frames)
    back = read_movie(path)
    assert back.shape == frames.shape
    assert [read_number(frame) for frame in back] == list(range(len(frames)))
    assert [read_keys(frame) for frame in back] == [read_keys(frame) for frame in frames]
    assert np.abs(back.astype(int) - frames).mean() < 6
    assert [file.name for file in tmp_path.iterdir()] == ["walk.mp4"]


def test_a_movie_that_fails_leaves_the_old_one(tmp_path):
    pytest.importorskip("av")
    path = tmp_path / "walk.mp4"
    path.write_bytes(b"old")
    frame = np.zeros((33, 47, 3), np.uint8)
    with pytest.raises(ValueError, match="one size"):
        write_movie(path, [frame, frame[:-1]])
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="no frames"):
        write_movie(path, [])
    assert read_movie(write_movie(path, [frame], scale=2)).shape == (1, 66, 94, 3)
    with Movie(path) as movie:
        movie.append(frame)
    assert read_movie(path).shape == (1, 34, 48, 3)  # odd sizes are padded


# -- look -------------------------------------------------------------------------------------------------------------


def test_what_users_wrote_is_escaped():
    evil = "<script>alert(1)</script>"
    for text in (
        look.header(evil, evil, "playing"),
        look.veil("failed", evil),
        look.message(evil),
        look.label("x", evil),
    ):
        assert "<script" not in text and "&lt;script" in text


def test_key_caps_light_the_held_keys():
    caps = look.key_caps({"w", "l"}, "wasdjl")
    assert 'lb-down">W' in caps and 'lb-down">L' in caps and caps.count("lb-down") == 2
    assert 'lb-cap lb-none"></span>' in caps and ">I<" not in caps
    assert 'aria-label="keys held: L, W"' in caps


def test_statistics_show_dashes_for_nothing():
    text = look.statistics(0.0, float("nan"), 0, 12.4)
    assert text.count("–") == 2 and "12 <small>ms</small>" in text


def test_the_filmstrip_has_the_last_seconds_with_their_keys():
    stills = [look.Still(b"picture", 58.0 + second, names) for second, names in enumerate(["", "w", "wl"])]
    strip = look.filmstrip(stills, 4, 1.6)
    assert strip.count("<figure>") == 4 and strip.count("<img") == 3 and strip.startswith('<div class="lb-strip"')
    assert strip.index("<i ") < strip.index("<img"), "the newest stands at the right"
    for time, keys in (("0:58", ""), ("0:59", "W"), ("1:00", "WL")):
        assert f"<span>{time}</span><b>{keys}</b>" in strip
    assert "0:58" not in look.filmstrip(stills, 2, 1.6)


# -- widgets, without a browser ---------------------------------------------------------------------------------------


@pytest.fixture
def one_player():
    pytest.importorskip("ipyevents")
    yield
    stop()


def _press(player, kind, key, **flags):
    code = {" ": "Space"}.get(key, key if len(key) > 1 else f"Key{key.upper()}")
    player._on_event({"type": kind, "key": key, "code": code, **flags})


def test_keys_of_the_panel(one_player):
    player = play(FakeSession()).player
    _press(player, "keydown", "w")
    _press(player, "keydown", "ArrowRight")
    assert player.held.names() == {"w", "l"}
    assert player.panel.caps.value.count("lb-down") == 2
    _press(player, "keyup", "w")
    assert player.held.names() == {"l"}
    player._on_event({"type": "mouseleave"})
    assert player.held.names() == set() and "lb-down" not in player.panel.caps.value
    _press(player, "keydown", "w")
    _press(player, "keydown", "Tab", altKey=True)
    assert player.held.names() == set()
    _press(player, "keydown", "i")  # this model was not taught to look up
    assert player.held.names() == set()


def test_space_pauses_and_keys_wait(one_player):
    player = play(FakeSession()).player
    _press(player, "keydown", " ")
    assert player.playback.paused and "Paused" in player.panel.veil.value
    _press(player, "keydown", " ", repeat=True)
    assert player.playback.paused
    _press(player, "keydown", "w")
    assert player.held.names() == set()
    _press(player, "keydown", " ")
    assert not player.playback.paused


def test_a_picture_and_its_number_travel_together(one_player):
    """One message a picture; the number, which the page answers, only where an answer is wanted."""
    panel, sent = play(FakeSession()).player.panel, []
    stop()
    panel.picture.send_state = lambda key=None: sent.append(set(key))
    panel.picture.show(b"one", 7)
    panel.picture.show(b"two", None)
    assert sent == [{"value", "number"}, {"value"}]
    assert panel.picture.number == 7 and panel.picture.value == b"data:image/jpeg;base64,dHdv"


def test_a_session_is_tuned_once(one_player):
    class Tunable(FakeSession):
        threads, tuned = None, 0

        def tune(self, fewest_steps):
            self.threads, self.tuned, self.steps = 1, self.tuned + 1, fewest_steps

    session = Tunable()
    first, second = play(session).player, play(session).player
    assert session.tuned == 1
    assert "2 steps instead of 4" in first.panel.message.value and not second.panel.message.value
    assert first.panel.steps.value == second.panel.steps.value == 2


def test_a_window_that_the_session_shortened_is_told_once(one_player):
    session = FakeSession()
    session.window, session.sink, session.longest_window, session.longest_sink = 9, 1, 21, 3
    session.preset = SimpleNamespace(stream=SimpleNamespace(chunk=1))
    player = play(session).player
    session.window, session.shrunk = 5, True
    player._refresh()
    assert player.panel.window.value == 5 and "window is now 5 frames" in player.panel.message.value
    player.panel.window.value = 12  # the user has another try
    player._refresh()
    assert player.panel.window.value == 12


def test_run_all_twice_leaves_one_player(one_player):
    first = play(FakeSession()).player
    second = play(FakeSession()).player
    assert not first.playback.running and second.playback.running
    assert "newer player" in first.panel.veil.value and first.panel.record.disabled
    names = [thread.name for thread in threading.enumerate() if thread.name.startswith("lingbot-")]
    assert sorted(names) == ["lingbot-model", "lingbot-presenter", "lingbot-readout"]


def test_stopping_twice_keeps_the_first_words(one_player):
    player = play(FakeSession()).player
    player.stop("Stopped: the kernel was interrupted.")
    stop()
    assert "was interrupted" in player.panel.veil.value
    assert not player.playback.running


def test_a_session_that_breaks_while_paused_is_told(running):
    session = FakeSession()
    playback = running(session, viewer := Viewer())
    viewer.wait(lambda frames: len(frames) > 2)
    playback.pause()

    def check():
        raise RuntimeError("rank 1 has ended")

    session.check = check
    for _ in range(300):
        if playback.read_out().state == "failed":
            break
        threading.Event().wait(0.01)
    assert "rank 1 has ended" in playback.read_out().message


def test_a_bad_script_keeps_the_running_player(one_player):
    first = play(FakeSession()).player
    with pytest.raises(ValueError, match="x"):
        play(FakeSession(), script="x-4")
    assert first.playback.running


def test_settings_reach_the_session(one_player):
    scenes = [np.full((96, 160, 3), 40, np.uint8), np.full((96, 160, 3), 90, np.uint8)]
    session = FakeSession()
    player = play(session, scenes=scenes).player
    assert (player.panel.steps.min, player.panel.steps.max, player.panel.chunk.max) == (1, 4, 3)
    player.panel.prompts.value = session.prompts[1]
    player.panel.steps.value = 2
    player.panel.chunk.value = 3
    player.panel.seed.value = 7
    player.panel.scenes[1].click()
    for _ in range(300):
        if session.start_image is scenes[1]:
            break
        player.playback.acknowledge(player.playback.credit.sent)
        threading.Event().wait(0.01)
    assert (session.prompt, session.steps, session.seed, session.chunk) == (session.prompts[1], 2, 7, 3)
    player._refresh()
    assert "3 a chunk" in player.panel.header.value
    assert session.start_image is scenes[1]


def test_a_recording_holds_frames_and_keys(one_player, tmp_path):
    pytest.importorskip("av")
    player = play(FakeSession(), folder=tmp_path, script="w-40,l-40", fps=200).player
    player.panel.record.click()
    answer = player._show

    def answering(number, frame):
        answer(number, frame)
        player.playback.acknowledge(number)

    player.playback._show = answering
    player.playback.acknowledge(player.playback.credit.sent)
    for _ in range(500):
        if player._shown > 60:
            break
        threading.Event().wait(0.01)
    player.panel.record.click()
    (movie,) = tmp_path.glob("*.mp4")
    card = json.loads(movie.with_suffix(".json").read_text())
    keys = parse_keys(card["keys"])
    frames = read_movie(movie)
    assert len(keys) == len(frames) == card["pixel_frames"] > 30
    small = frames[:, 1::3, 1::3]
    shown = [read_number(frame) for frame in small]
    assert shown == list(range(shown[0], shown[0] + len(shown)))
    assert all(np.array_equal(held(read_keys(frame)), row) for frame, row in zip(small, keys, strict=True))
    assert card["prompt"] == "a painted corridor" and card["seed"] == 0
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob(".*"))


def test_a_recording_that_fails_is_told_and_play_goes_on(one_player, tmp_path):
    """As on a full disk: the thread that writes the movie is the one that shows the pictures."""
    pytest.importorskip("av")
    player = play(FakeSession(), folder=tmp_path, fps=200).player
    player.panel.record.click()

    def full(frame, keys_8):
        raise OSError(28, "No space left on device")

    player._recorder.append = full
    shown = player._shown
    for _ in range(300):
        player.playback.acknowledge(player.playback.credit.sent)
        if player._shown > shown + 12:
            break
        threading.Event().wait(0.01)
    assert player._shown > shown + 12 and player.playback.read_out().state == "playing"
    assert "No space left" in player.panel.message.value and player.panel.record.description == "Record"
    assert not list(tmp_path.iterdir())
