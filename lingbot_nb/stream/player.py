"""Live play in a notebook: hold W and the world moves.

`play(session)` shows the player; `play_script(session, keys)` plays a key string without any widget, for headless runs.
"""

import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lingbot_nb.control.keys import KEYS, format_keys, parse_keys
from lingbot_nb.stream import look
from lingbot_nb.stream.movie import Movie
from lingbot_nb.stream.playback import Credit, HeldKeys, Playback, play_script

if TYPE_CHECKING:  # they need torch, which a player of another session can do without
    from lingbot_nb.stream.follow import Follower, Newest, Student

__all__ = ["Player", "Recorder", "letter_of", "play", "play_script", "record", "recorder_of", "stop"]

ARROWS = {"ArrowUp": "i", "ArrowDown": "k", "ArrowLeft": "j", "ArrowRight": "l"}
LEVEL = {"i": "w", "k": "s"}
"""What the upper and lower arrow do in a world where one cannot look up and down."""
TICK = 0.5
"""Seconds between read-outs."""

FEWEST_STEPS = 2
"""What `play` may lower the steps to. The tiny world's student is as close to held-out walks with two as with four."""

STILLS = 8
"""Pictures in the filmstrip, one a second."""

_current: "Player | None" = None


def play(session, *, scenes: Sequence[np.ndarray] = (), prompts: Sequence[str] = (), script: str = "",
         title: str = "Live play", folder: str | Path = "recordings", fps: float | None = None,
         window: int = 6, follow: "Newest | None" = None):  # fmt: skip
    """Show the player of `session` and start it; a player that this kernel already runs is stopped first.

    A session that can `tune` itself and has not yet does so, which takes about a second: dtype and threads, and fewer
    steps where those asked for leave a page on the same machine no time to draw. The head and the slider show it.
    `scenes` are start images u8 [H, W, 3] or clips u8 [4n + 1, H, W, 3]; `prompts` fill the prompt menu; `script` is a
    key string played first; recordings go to `folder`; `window` is how many frames may be unacknowledged (more for a
    slow connection, at the price of latency); with `follow` the student is swapped for each new one that a run writes.
    Returns the widget, whose `player` attribute is the `Player`. Raises RuntimeError without ipywidgets and ipyevents.
    """
    global _current
    keys = parse_keys(script) if script else None  # a bad script is told before the running player is stopped
    stop()
    asked = session.steps
    if hasattr(session, "tune") and getattr(session, "threads", 1) is None:
        session.tune(fewest_steps=FEWEST_STEPS)
    _current = Player(
        session, scenes=scenes, prompts=prompts, title=title, folder=folder, fps=fps, window=window, follow=follow
    )
    if session.steps < asked:
        _current.say(
            f"{session.steps} steps instead of {asked}, for an even pace on this machine; the slider takes more."
        )
    if keys is not None:
        _current.playback.play_keys(keys)
    _current.start()
    return _current.widget


def stop() -> None:
    """Stop the player that runs in this kernel, if any."""
    global _current
    if _current is not None:
        _current.stop("Stopped: a newer player took over.")
        _current = None


def _stream_of(session) -> dict[str, int]:
    """What the sliders of chunk, window and sink may offer; nothing for a session where those cannot be changed."""
    offered, longest = {}, 1
    if hasattr(session, "longest_chunk"):
        longest = max(session.longest_chunk, session.chunk)
        offered = dict(chunk=session.chunk, longest_chunk=longest)
    if getattr(session, "window", None) is not None:
        offered |= dict(
            window=session.window,
            sink=session.sink,
            # With the longest chunk and sink too, so that no pair of values is refused.
            shortest_window=session.longest_sink + longest,
            longest_window=session.longest_window,
            longest_sink=session.longest_sink,
        )
    return offered


def _on_interrupt(handler):
    """Have the kernel call `handler` when it is interrupted while idle (it ignores that otherwise); returns what it
    would have called before. Interrupting a running cell stops that cell, as ever."""
    kernel = getattr(sys.modules.get("IPython") and sys.modules["IPython"].get_ipython(), "kernel", None)
    before = getattr(kernel, "saved_sigint_handler", None)
    if before is not None and handler is not None:
        kernel.saved_sigint_handler = handler  # the kernel installs it when the running cell has ended
    return before


def letter_of(event: dict, known: str = KEYS) -> str | None:
    """The movement letter that a browser key event means in a world that has the keys `known`, or None.

    The printed letter counts; on layouts without Latin letters the key's place does.
    """
    key, code = event.get("key", ""), event.get("code", "")
    if key in ARROWS:
        return ARROWS[key] if ARROWS[key] in known else LEVEL.get(ARROWS[key])
    letter = key.lower()
    if not (letter.isascii() and letter.isalpha()) and code.startswith("Key"):
        letter = code[3:].lower()
    return letter if len(letter) == 1 and letter in KEYS else None


class Recorder:
    """An mp4 of what was shown, and beside it a json with the keys and all that is needed to play them again, or to
    judge them (`report.recordings`)."""

    def __init__(self, path: Path, fps: float, *, scale: int = 1, **facts):
        self.path, self._facts = path, dict(fps=fps, scale=scale) | facts
        self._movie = Movie(path, fps, scale=scale)
        self._keys: list[np.ndarray] = []

    def append(self, frame: np.ndarray, keys_8: np.ndarray) -> None:
        """Add a pixel frame u8 [H, W, 3] and the keys bool [8] held on the way into it."""
        self._movie.append(frame)
        self._keys.append(keys_8)

    @property
    def pixel_frames(self) -> int:
        return len(self._keys)

    def discard(self) -> None:
        """Drop what was written."""
        self._movie.discard()

    def close(self) -> Path:
        """Finish both files and return the movie's path."""
        path = self._movie.close()
        card = {"pixel_frames": self.pixel_frames, "keys": format_keys(np.stack(self._keys))}
        temporary = path.with_suffix(".json.part")
        temporary.write_text(json.dumps({**card, **self._facts}, indent=2, ensure_ascii=False))
        os.replace(temporary, path.with_suffix(".json"))
        return path


def recorder_of(session, path: Path, *, fps: float, first_pixel_frame: int = 0) -> Recorder:
    """A recorder of a session's play; pixel frame 0 is its start image."""
    facts = dict(prompt=session.prompt, seed=session.seed, steps=session.steps, about=getattr(session, "about", ""))
    if hasattr(session, "preset"):
        from lingbot_nb.stream.session import lens

        intrinsics, turn = lens(session.preset)
        facts |= dict(focal=float(intrinsics[0]), turn=turn)
    scale = max(1, round(480 / session.shape.width))
    return Recorder(path, fps, scale=scale, first_pixel_frame=first_pixel_frame, **facts)


def record(session, frames: np.ndarray, keys: np.ndarray, path: Path) -> Path:
    """Keep what `play_script` made of `keys` [n, 8] from the start image on, as a player's Record button would."""
    rest = len(frames) - 1 - len(keys)  # the last chunk was filled up with no key
    recorder = recorder_of(session, path, fps=session.fps)
    try:
        for frame, row in zip(frames, np.pad(keys, ((1, rest), (0, 0))), strict=True):
            recorder.append(frame, row)
        return recorder.close()
    except BaseException:
        recorder.discard()
        raise


class Player:
    """Wires a session, its playback and the panel together; `widget` is what the notebook shows.

    Keys are taken while the mouse is over the picture, and only then: outside it JupyterLab's shortcuts work as ever,
    inside it none of them fires. All keys are let go when the mouse leaves, when a modifier goes down (Alt+Tab,
    Ctrl+T, …), on pause and restart, and by silence (see `HeldKeys`).
    """

    def __init__(self, session, *, scenes: Sequence[np.ndarray] = (), prompts: Sequence[str] = (),
                 title: str = "Live play", folder: str | Path = "recordings", fps: float | None = None,
                 window: int = 6, follow: "Newest | None" = None):  # fmt: skip
        try:
            from lingbot_nb.stream.panel import Offer, Panel
        except ImportError as error:
            raise RuntimeError(
                f"live play needs ipywidgets and ipyevents ({error}): run `pip install ipywidgets ipyevents`, "
                "or use play_script(session, keys), which needs neither"
            ) from error
        self.session, self.folder = session, Path(folder)
        self.fps = fps or session.fps
        self.held = HeldKeys()
        self.playback = Playback(
            session, self._show, fps=self.fps, held_keys=self.held, credit=Credit(window), on_frame=self._note
        )
        self.keys = getattr(session, "keys", KEYS)
        self._title = title
        self._scenes = list(scenes)
        self._prompts = list(prompts or getattr(session, "prompts", ()))
        stills = [scene if scene.ndim == 3 else scene[-1] for scene in self._scenes]
        offer = Offer(
            title, self.about, self.keys, self._prompts, session.prompt, stills, session.steps, session.seed,
            session.shape.height, session.shape.width, **_stream_of(session),
        )  # fmt: skip
        self.panel = Panel(offer)
        self.widget = self.panel.root
        self.widget.player = self
        self._stills: deque[look.Still] = deque(maxlen=STILLS)
        self._shown = 0
        self._step: int | None = None
        self._hint, self._shrunk = True, False
        self._html: dict[int, str] = {}
        self._recorder: Recorder | None = None
        self._recording, self._drawing = threading.Lock(), threading.Lock()
        self._ended = threading.Event()
        self._ticker = threading.Thread(target=self._tick_forever, name="lingbot-readout", daemon=True)
        self._follower = self._follow(follow) if follow else None
        self._connect()
        self._refresh()

    @property
    def about(self) -> str:
        """What is being played, in one line: settings change, so that it does too."""
        shape = self.session.shape
        return getattr(self.session, "about", f"{shape.width} × {shape.height}")

    # -- life -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the world."""
        self._before = _on_interrupt(self._interrupted)
        self.playback.start()
        self._ticker.start()
        if self._follower:
            self._follower.start()

    def stop(self, words: str = "Stopped. Run the cell again to play.") -> None:
        """End the threads, finish a running recording and leave a still picture with `words` on it."""
        if self._ended.is_set():
            return
        self._ended.set()
        _on_interrupt(self._before)
        if self._follower:
            self._follower.stop()
        self.playback.stop()
        self._end_recording()
        self._ticker.join(2.0)
        self.panel.disable()
        self._refresh(words)

    def _interrupted(self, *_) -> None:
        # A signal handler must return at once: ending the threads may take as long as a chunk.
        words = "Stopped: the kernel was interrupted. Run the cell again to play."
        threading.Thread(target=self.stop, args=(words,), name="lingbot-stop", daemon=True).start()

    def _connect(self) -> None:
        panel, on = self.panel, self._observe
        panel.events.on_dom_event(self._on_event)
        panel.arrived.observe(lambda change: self.playback.acknowledge(change["new"]), "value")
        panel.pause.on_click(lambda _: self._toggle_pause())
        panel.restart.on_click(lambda _: self._restart())
        panel.record.on_click(lambda _: self._toggle_recording())
        for index, button in enumerate(panel.scenes):
            button.on_click(lambda _, index=index: self._choose_scene(index))
        on(panel.prompts, lambda prompt: prompt and setattr(panel.prompt, "value", prompt))
        on(panel.prompt, lambda prompt: self.playback.request(lambda session: setattr(session, "prompt", prompt)))
        on(panel.steps, partial(self._choose, "steps"))
        on(panel.chunk, partial(self._choose, "chunk"))
        on(panel.window, partial(self._choose, "window"))
        on(panel.sink, partial(self._choose, "sink"))
        on(panel.seed, self._choose_seed)
        panel.new_seed.on_click(lambda _: setattr(panel.seed, "value", int(np.random.default_rng().integers(10**6))))
        on(panel.script, self._play_keys)

    @staticmethod
    def _observe(widget, act) -> None:
        widget.observe(lambda change: act(change["new"]), "value")

    # -- what the user does ---------------------------------------------------------------------------------------

    def _on_event(self, event: dict) -> None:
        kind = event.get("type") or event.get("event")
        if kind in ("keydown", "keyup"):
            self._on_key(kind, event)
        elif kind == "mouseleave":
            self.held.clear()
        self._show_caps()

    def _on_key(self, kind: str, event: dict) -> None:
        if event.get("ctrlKey") or event.get("altKey") or event.get("metaKey"):
            self.held.clear()  # the way out of the page: Alt+Tab, Ctrl+T, …
            return
        code, letter = event.get("code") or event.get("key", ""), letter_of(event, self.keys)
        if kind == "keyup":
            self.held.release(code)
        elif letter and letter in self.keys:
            self._hint = False
            if not self.playback.paused:
                self.held.press(code, letter, bool(event.get("repeat")))
        elif not event.get("repeat"):
            {" ": self._toggle_pause, "r": self._restart}.get(event.get("key", "").lower(), lambda: None)()

    def _toggle_pause(self) -> None:
        self.playback.pause(not self.playback.paused)
        self.panel.show_paused(self.playback.paused)
        self._refresh()

    def _restart(self) -> None:
        self._begin_anew()
        self.playback.reset()

    def _begin_anew(self) -> None:
        self._end_recording()
        self._stills.clear()
        self._shown = 0

    def _choose_scene(self, index: int) -> None:
        self._begin_anew()
        self.panel.choose_scene(index)
        scene = self._scenes[index]
        self.held.clear()

        def begin(session) -> None:
            if scene.ndim == 3:
                session.start_image = scene
            else:
                session.start_clip(scene)

        self.playback.request(begin, restart=True)

    def _choose(self, setting: str, value: int) -> None:
        self.playback.request(lambda session: setattr(session, setting, value))

    def _follow(self, newest: "Newest") -> "Follower":
        from lingbot_nb.stream.follow import Follower

        return Follower(newest, self._take, partial(self.say, bad=True))

    def _take(self, student: "Student") -> None:
        """Have the next chunk made by another student, and tell its training step."""

        def swap(session) -> None:
            session.use(student.dit)
            self._step = student.step

        self.playback.request(swap)

    def _choose_seed(self, seed: int) -> None:
        self._begin_anew()
        self.held.clear()
        self.playback.request(lambda session: session.reset(seed=seed), restart=True)

    def _play_keys(self, text: str) -> None:
        if not text.strip():
            return
        try:
            rows = parse_keys(text)
            self.playback.play_keys(rows)
            self.panel.script.value = ""
            self.say(f"Playing {len(rows) / self.fps:.1f} s of keys.")
        except ValueError as error:
            self.say(str(error), bad=True)

    # -- recording ------------------------------------------------------------------------------------------------

    def _toggle_recording(self) -> None:
        if self._recorder:
            self._end_recording()
            return
        name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        path = self.folder / f"play_{name}.mp4"
        try:
            with self._recording:
                self._recorder = recorder_of(self.session, path, fps=self.fps, first_pixel_frame=self._shown)
            self.say("Recording …")
        except (RuntimeError, OSError) as error:
            self.say(str(error), bad=True)
        self.panel.show_recording(self._recorder is not None)
        self._refresh()

    def _end_recording(self) -> None:
        with self._recording:
            recorder, self._recorder = self._recorder, None
            if recorder is None:
                return
            try:
                path = recorder.close()
                if hasattr(self.session, "recording"):  # all play since the last reset: keys, poses, start image
                    self.session.recording().save(path.with_suffix(".safetensors"))
                self.say(f"Saved {path} ({recorder.pixel_frames / self.fps:.1f} s) and its keys.")
            except (ValueError, RuntimeError, OSError) as error:
                self.say(str(error), bad=True)
        self.panel.show_recording(False)

    def _keep(self, frame: np.ndarray, keys_8: np.ndarray) -> None:
        """Add a picture to a running recording. One that cannot be written on is dropped, and play goes on."""
        with self._recording:
            try:
                if self._recorder:
                    self._recorder.append(frame, keys_8)
                return
            except Exception as error:  # a full disk must not end the thread that shows the pictures
                self._recorder.discard()
                self._recorder = None
                self.say(f"The recording is lost: {error}", bad=True)
        self.panel.show_recording(False)

    # -- what is shown --------------------------------------------------------------------------------------------

    def _show(self, number: int, frame: np.ndarray) -> None:
        self.panel.picture.show(look.jpeg(frame), number if self.playback.asks(number) else None)

    def _note(self, frame: np.ndarray, keys_8: np.ndarray) -> None:
        self._keep(frame, keys_8)
        if self._shown % round(self.fps) == 0:
            names = "".join(name for name, down in zip(KEYS, keys_8, strict=True) if down)
            self._stills.append(look.Still(look.thumbnail(frame, 120), self._shown / self.fps, names))
            self._show_strip()
        self._shown += 1

    def _show_strip(self) -> None:
        shape = self.session.shape
        self._set(self.panel.strip, look.filmstrip(list(self._stills), STILLS, shape.width / shape.height))

    def _show_caps(self) -> None:
        with self._drawing:  # two threads draw the caps: the one with the older keys must not come last
            self._set(self.panel.caps, look.key_caps(self.held.names(), self.keys))

    def say(self, text: str, bad: bool = False) -> None:
        """One line of news under the controls."""
        self._set(self.panel.message, look.message(text, bad) if text else "")

    def _tick_forever(self) -> None:
        beat = 0
        while not self._ended.wait(TICK):
            beat += 1
            self._refresh(alive=beat % 2 == 0)

    def _refresh(self, words: str = "", alive: bool = False) -> None:
        now = self.playback.read_out()
        panel = self.panel
        state = "stopped" if words else now.state
        self._show_caps()
        about = self.about if self._step is None else f"{self.about} · step {self._step:,}"
        self._set(panel.header, look.header(self._title, about, state, self._recorder is not None))
        self._set(panel.statistics, look.statistics(now.fps, now.latency_ms, now.waiting, now.chunk_ms))
        self._tell_shrunk()
        if not self._stills:
            self._show_strip()
        # The same text set twice sends nothing; the space makes the browser restart the note's clock (see look.veil).
        pulse = " " * (int(time.monotonic()) % 2) if alive and state != "stopped" else None
        if pulse is not None or words or state != getattr(self, "_veiled", None):
            self._veiled = state
            self._set(panel.veil, look.veil(state, words or now.message, self._hint) + (pulse or ""))

    def _tell_shrunk(self) -> None:
        """Show once that the session has shortened its window, because the GPU was full."""
        shrunk = getattr(self.session, "shrunk", False)
        if shrunk and not self._shrunk:
            self.panel.window.min = min(self.panel.window.min, self.session.window)
            self.panel.window.value = self.session.window
            self.say(f"The GPU was full: the window is now {self.session.window} frames.", bad=True)
        self._shrunk = shrunk

    def _set(self, widget, value: str) -> None:
        if self._html.get(id(widget)) != value:
            self._html[id(widget)] = value
            widget.value = value
