"""Keys in, pixel frames out, at an even pace: the two threads behind the player. No widgets here.

The model thread makes one chunk ahead and starts it as late as it safely can, so that it reads the newest keys; the
presenter thread shows pixel frames one by one and only as fast as the viewer acknowledges them. At most one finished
chunk waits, so there is never a backlog, and a viewer that has gone away stops the world.
"""

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from lingbot_nb.control.keys import KEYS, held, parse_keys

REPEAT_LIMIT = 1.0
"""Seconds after which a key that was repeating and has fallen silent counts as lost."""
HOLD_LIMIT = 10.0
"""Seconds without any key event after which held keys count as lost."""
MARGIN = 0.02
"""Seconds by which a chunk is started earlier than its expected duration asks for."""
RETHINK = 0.2
"""Part of a chunk's playing time, from its start, in which it is begun again for a key that changes."""
LONGEST_RETHINK = 0.1
"""The same in seconds at most: by so much the picture may come late."""

SWITCH = 0.0005
"""Seconds after which Python takes its lock from a thread that others wait for. Every operation of a network gives the
lock up and wants it back: at Python's 5 ms a chunk beside the presenter took twice its time (`LOG.md`)."""


class HeldKeys:
    """Which keys are down, safe to use from any thread.

    Key-up events get lost (the browser sends none when the window loses focus or another tab opens), so keys are also
    let go by silence. While a key is held a browser repeats its key-down about 30 times a second: if the last event
    was such a repeat, `REPEAT_LIMIT` seconds of silence mean that nobody holds it any more. In a chord only the newest
    key repeats, and lifting it ends the repeats although the others are still down: then `HOLD_LIMIT` holds. A key
    that is in truth still down comes back with its next repeat.

    A key that was pressed and lifted between two reads still counts for one read: short taps are not lost. Nor are
    they when the reader has second thoughts (`reread`).
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._lock = threading.Lock()
        self._letters: dict[str, str] = {}
        self._tapped: set[str] = set()
        self._given = self._given_before = frozenset[str]()
        self._last_event = clock()
        self._repeating = False
        self._changed_at: float | None = None

    def press(self, code: str, letter: str, repeat: bool = False) -> None:
        """Note that the physical key `code`, which means `letter`, went down (or repeats)."""
        with self._lock:
            self._expire()
            self._last_event, self._repeating = self._clock(), repeat
            if code not in self._letters:
                self._letters[code] = letter
                self._tapped.add(letter)
                self._mark()

    def release(self, code: str) -> None:
        """Note that the physical key `code` went up."""
        with self._lock:
            self._last_event, self._repeating = self._clock(), False
            if self._letters.pop(code, None):
                self._mark()

    def clear(self) -> None:
        """Let go of everything: the mouse left, the world was paused or reset."""
        with self._lock:
            self._drop()

    def names(self) -> frozenset[str]:
        """Letters that are down now."""
        with self._lock:
            self._expire()
            return frozenset(self._letters.values())

    def read(self) -> tuple[frozenset[str], float | None]:
        """Letters for the next chunk, and when the oldest change since the last read came in (None: no change)."""
        with self._lock:
            self._expire()
            self._given_before = self._given
            return self._give(frozenset())

    def reread(self) -> tuple[frozenset[str], float | None] | None:
        """What the last read should rather have given, now that some time has passed; None if that is the same.

        Keys that it gave for the first time stay, also when they have been lifted.
        """
        with self._lock:
            self._expire()
            fresh = self._given - self._given_before
            same = self._given == self._tapped.union(self._letters.values(), fresh)
            return None if same else self._give(fresh)

    def _give(self, more: frozenset[str]) -> tuple[frozenset[str], float | None]:
        self._given = more.union(self._letters.values(), self._tapped)
        changed_at, self._changed_at = self._changed_at, None
        if self._given - set(self._letters.values()):  # lifted already: that counts from the next read on
            self._changed_at = self._clock()
        self._tapped.clear()
        return self._given, changed_at

    def _expire(self) -> None:
        limit = REPEAT_LIMIT if self._repeating else HOLD_LIMIT
        if self._letters and self._clock() - self._last_event > limit:
            self._drop()

    def _drop(self) -> None:
        if self._letters or self._tapped:
            self._mark()
        self._letters.clear()
        self._tapped.clear()
        self._repeating = False

    def _mark(self) -> None:
        if self._changed_at is None:
            self._changed_at = self._clock()


class Credit:
    """How many frames may be on their way: `window` unacknowledged ones, then a wait of at most `timeout` seconds."""

    def __init__(self, window: int = 2, timeout: float = 1.0):
        self.window, self.timeout = window, timeout
        self.sent = self.acknowledged = 0
        self._change = threading.Condition()

    def send(self) -> int:
        """The number of the frame that is about to be sent, counted from 1."""
        with self._change:
            self.sent += 1
            return self.sent

    def acknowledge(self, number: int) -> None:
        """The viewer has frame `number`, and so every earlier one (acknowledgements may be merged on the way)."""
        with self._change:
            self.acknowledged = max(self.acknowledged, min(number, self.sent))
            self._change.notify_all()

    def asks(self, number: int) -> bool:
        """Whether frame `number` should ask for an acknowledgement: when half the window is on its way without one.

        Every answer costs the kernel, the server and the page three more messages than the picture itself.
        """
        with self._change:
            return number - self.acknowledged >= max(1, self.window // 2)

    def wait(self) -> bool:
        """Wait for room; False when the viewer has been silent for `timeout` seconds."""
        with self._change:
            return self._change.wait_for(lambda: self.sent - self.acknowledged < self.window, self.timeout)


@dataclass(frozen=True)
class Part:
    """Pixel frames u8 [n, H, W, 3] of a chunk with the keys bool [n, 8] they were made under; its first part also
    tells when those were pressed."""

    frames: np.ndarray
    keys: np.ndarray
    epoch: int
    begins: bool = True
    changed_at: float | None = None


@dataclass
class _Asked:
    """What a chunk is made under: keys bool [n, 8], when the oldest change among them came, when it (last) began, and
    until when it may begin again under others."""

    keys: np.ndarray
    changed_at: float | None
    began: float
    until: float


@dataclass(frozen=True)
class ReadOut:
    """What the player tells about itself. Times in milliseconds; NaN until there is something to tell."""

    state: str
    fps: float
    latency_ms: float
    latency_p95_ms: float
    waiting: int
    chunk_ms: float
    timings: dict[str, float] = field(default_factory=dict)
    message: str = ""


class Playback:
    """Runs a session at `fps` pixel frames a second and hands every pixel frame to `show(number, frame)`.

    The session needs `generate(keys) -> u8 [n, H, W, 3]`, `finish()`, `reset()`, `first_frame`, `next_frames` (how many
    pixel frames the next call makes) and `last_timings`. With `stream(keys, newer)` it hands them out part by part, and
    the first are shown while the others are made; a chunk that has hardly begun may ask `newer()` for other keys. It is
    only ever touched by the model thread: use `request` to change it. A session that can break while nothing is asked
    of it may have `check()`, which raises what is wrong and is called twice a second. `show` runs in the presenter
    thread, as does `on_frame(frame, keys_8)`, called once per new pixel frame.
    `credit.acknowledge` must be called as frames arrive at the viewer (without a viewer pass a Credit nobody waits on).
    """

    def __init__(self, session, show: Callable[[int, np.ndarray], None], *, fps: float = 16.0,
                 held_keys: HeldKeys | None = None, credit: Credit | None = None,
                 on_frame: Callable[[np.ndarray, np.ndarray], None] | None = None):  # fmt: skip
        self.session, self.fps = session, fps
        self.held = held_keys or HeldKeys()
        self.credit = credit or Credit()
        self._show, self._on_frame = show, on_frame
        self._change = threading.Condition()
        self._slot: deque[Part] = deque()
        self._commands: deque[Callable] = deque()
        self._script = np.zeros((0, len(KEYS)), bool)
        self._paused = self._stopped = self._absent = False
        self._message = ""
        self._failed = False
        self._epoch = 0
        self._left = self._count = 0
        self._empty_at = 0.0
        self._due = 0.0
        self._generate_times: deque[float] = deque(maxlen=12)
        self._busy = self._credit_wait = 0.0
        self._last_frame: np.ndarray | None = None
        self._shown_at: deque[float] = deque(maxlen=int(4 * fps))
        self._latencies: deque[float] = deque(maxlen=64)
        self._marks: deque[tuple[int, float]] = deque()
        self._switch_before: float | None = None
        self._threads = [
            threading.Thread(target=self._model_thread, name="lingbot-model", daemon=True),
            threading.Thread(target=self._presenter_thread, name="lingbot-presenter", daemon=True),
        ]

    # -- what the player calls, from any thread -------------------------------------------------------------------

    def start(self) -> "Playback":
        """Show the session's first pixel frame and go."""
        self._offer_still(self._epoch)
        self._switch_before = sys.getswitchinterval()
        sys.setswitchinterval(min(SWITCH, self._switch_before))
        for thread in self._threads:
            thread.start()
        return self

    def stop(self, timeout: float = 10.0) -> None:
        """End both threads; waits for the chunk being made, at most `timeout` seconds."""
        with self._change:
            self._stopped = True
            self._change.notify_all()
        for thread in self._threads:
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(timeout)
        if self._switch_before is not None:
            sys.setswitchinterval(self._switch_before)
            self._switch_before = None

    @property
    def running(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)

    @property
    def paused(self) -> bool:
        return self._paused

    def pause(self, paused: bool = True) -> None:
        """Hold the world where it is, or let it go on."""
        self.held.clear()
        with self._change:
            self._paused = paused
            self._change.notify_all()

    def request(self, change: Callable, *, restart: bool = False) -> None:
        """Have the model thread call `change(session)` before its next chunk.

        With `restart` everything made so far and not yet shown is dropped and the session's first frame is shown.
        """
        with self._change:
            if restart:
                self._epoch += 1
                self._slot.clear()
                self._script = self._script[:0]
            self._commands.append((change, restart, self._epoch))
            self._failed, self._message = False, ""
            self._change.notify_all()

    def reset(self) -> None:
        """Start again from the start image."""
        self.held.clear()
        self.request(lambda session: session.reset(), restart=True)

    def play_keys(self, keys: np.ndarray | str) -> None:
        """Play keys bool [n, 8] (or a key string) before listening to the held ones again."""
        rows = parse_keys(keys) if isinstance(keys, str) else np.asarray(keys, bool)
        with self._change:
            self._script = np.concatenate([self._script, rows])
            self._change.notify_all()

    def asks(self, number: int) -> bool:
        """Whether the viewer should acknowledge frame `number`: for the credit, or to learn a key's latency."""
        marked = bool(self._marks) and self._marks[-1][0] == number
        return marked or self.credit.asks(number)

    def acknowledge(self, number: int) -> None:
        """Pass on that the viewer holds frame `number`."""
        self.credit.acknowledge(number)
        now = time.monotonic()
        while self._marks and self._marks[0][0] <= number:
            _, changed_at = self._marks.popleft()
            self._latencies.append(1000 * (now - changed_at))

    def read_out(self) -> ReadOut:
        """State, frames shown a second, key-to-viewer latency, frames waiting, time per chunk."""
        latencies = np.array(self._latencies or [np.nan])
        return ReadOut(
            state=self._state(),
            fps=self._measured_fps() if self._state() == "playing" else 0.0,
            latency_ms=float(np.median(latencies)),
            latency_p95_ms=float(np.percentile(latencies, 95)),
            waiting=self._left + self._waiting(),
            chunk_ms=1000 * self._busy,
            timings=dict(getattr(self.session, "last_timings", {}) or {}),
            message=self._message,
        )

    def _state(self) -> str:
        if self._stopped:
            return "stopped"
        if self._failed:
            return "failed"
        if self._paused:
            return "paused"
        return "waiting" if self._absent else "playing"

    def _measured_fps(self) -> float:
        now = time.monotonic()
        recent = [moment for moment in list(self._shown_at) if now - moment < 2.0]
        return (len(recent) - 1) / (recent[-1] - recent[0]) if len(recent) > 2 else 0.0

    # -- model thread ---------------------------------------------------------------------------------------------

    def _model_thread(self) -> None:
        while (turn := self._next_turn()) is not None:
            try:
                turn()
            except Exception as error:  # a bad prompt or a full GPU must not end the thread: it waits for a change
                self._fail(error)

    def _next_turn(self) -> Callable[[], None] | None:
        """What to do next, a change that was asked for or a chunk; None when stopped.

        The epoch is fixed together with the choice, so that a chunk made before a restart can't pass for a later one.
        """
        with self._change:
            while not self._stopped:
                self._look_after()
                if self._commands:
                    return partial(self._run, *self._commands.popleft())
                unseen = any(part.begins for part in self._slot)
                ready = not (self._paused or self._failed or self._absent or unseen)
                empty_at = self._empty_at + self._waiting() * self._interval()
                early = empty_at - self._lead() - time.monotonic()
                if ready and early <= 0:
                    return partial(self._make_chunk, self._epoch)
                self._change.wait(min(early, 0.5) if ready else 0.5)
            return None

    def _look_after(self) -> None:
        check = getattr(self.session, "check", None)
        if check is None or self._failed or self._commands:
            return
        try:
            check()
        except Exception as error:
            self._fail(error)

    def _lead(self) -> float:
        """How long before the screen runs dry to start: what three of four chunks keep to. The others come a little
        late, which the next pictures make up for; waiting for the slowest would make every key later."""
        times = sorted(self._generate_times) or [1.0]
        return times[max(len(times) * 3 // 4 - 1, 0)] + MARGIN

    def _run(self, change: Callable, restart: bool, epoch: int) -> None:
        change(self.session)
        if restart:
            self._offer_still(epoch)

    def _make_chunk(self, epoch: int) -> None:
        asked = self._ask(self.session.next_frames)
        at = 0
        for frames in self._parts(asked):
            if at == 0:
                self._generate_times.append(time.monotonic() - asked.began)
            keys = asked.keys[at : at + len(frames)]
            self._offer(Part(frames, keys, epoch, at == 0, None if at else asked.changed_at))
            at += len(frames)
        self.session.finish()
        busy = time.monotonic() - asked.began
        self._busy = busy if not self._busy else 0.8 * self._busy + 0.2 * busy

    def _parts(self, asked: "_Asked") -> Iterable[np.ndarray]:
        stream = getattr(self.session, "stream", None)
        return stream(asked.keys, partial(self._rethink, asked)) if stream else [self.session.generate(asked.keys)]

    def _ask(self, count: int) -> "_Asked":
        """The newest keys for a chunk of `count` pixel frames."""
        if count != self._count:  # what chunks of another length took says nothing about this one
            self._count, self._busy = count, 0.0
            self._generate_times.clear()
        with self._change:
            rows, self._script = self._script[:count], self._script[count:]
        names, changed_at = self.held.read()
        keys = np.repeat(held(names)[None], count, axis=0)
        keys[: len(rows)] = rows
        now = time.monotonic()
        until = now + min(RETHINK * count / self.fps, LONGEST_RETHINK) if not len(rows) else now
        return _Asked(keys, changed_at, now, until)

    def _rethink(self, asked: "_Asked") -> np.ndarray | None:
        """Other keys for a chunk that has hardly begun; the picture comes a little late, and not a whole chunk."""
        now = time.monotonic()
        found = self.held.reread() if now < asked.until else None
        if found is None:
            return None
        names, changed_at = found
        asked.keys = np.repeat(held(names)[None], len(asked.keys), axis=0)
        asked.changed_at = changed_at if asked.changed_at is None else asked.changed_at
        asked.began = now
        return asked.keys

    def _offer_still(self, epoch: int) -> None:
        still = np.asarray(self.session.first_frame)[None]
        self._offer(Part(still, np.zeros((1, len(KEYS)), bool), epoch))

    def _offer(self, part: Part) -> None:
        with self._change:
            if part.epoch == self._epoch:
                self._slot.append(part)
                self._change.notify_all()

    def _waiting(self) -> int:
        """Pixel frames that are made and not yet the presenter's."""
        return sum(len(part.frames) for part in list(self._slot))

    def _fail(self, error: Exception) -> None:
        with self._change:
            self._failed, self._message = True, f"{type(error).__name__}: {error}"
            self._change.notify_all()

    # -- presenter thread -----------------------------------------------------------------------------------------

    def _presenter_thread(self) -> None:
        while (part := self._take()) is not None:
            for index, frame in enumerate(part.frames):
                if not self._wait_to_show(part, index):
                    break
                self._present(part, index, frame)
            self._left = 0

    def _take(self) -> Part | None:
        with self._change:
            self._change.wait_for(lambda: self._slot or self._stopped)
            if self._stopped:
                return None
            part = self._slot.popleft()
            self._plan(len(part.frames), time.monotonic())
            self._change.notify_all()
            return part

    def _interval(self) -> float:
        """Seconds between pixel frames: stretched when the model is slower than `fps`, so that motion stays even."""
        return max(1 / self.fps, self._busy / max(self._count, 1))

    def _plan(self, left: int, now: float) -> None:
        self._left = left
        self._empty_at = max(now, self._due) + left * (self._interval() + self._credit_wait)

    def _wait_to_show(self, part: Part, index: int) -> bool:
        """Wait for the frame's time, for play to go on and for the viewer; False when the part is out of date."""
        while True:
            with self._change:
                if self._stopped or part.epoch != self._epoch:
                    return False
                still = len(part.frames) == 1 and index == 0  # a restart is shown even while paused
                late = time.monotonic() - self._due
                if (self._paused and not still) or late < 0:
                    self._change.wait(0.5 if late >= 0 else -late)
                    continue
            waiting_since = time.monotonic()
            if self.credit.wait():
                # What a slow viewer adds to every frame, so that chunks are not started too early for it.
                self._credit_wait += 0.1 * (time.monotonic() - waiting_since - self._credit_wait)
                self._set_absent(False)
                return True
            self._set_absent(True)
            self._probe(part.frames[index] if self._last_frame is None else self._last_frame)

    def _set_absent(self, absent: bool) -> None:
        if absent != self._absent:
            with self._change:
                self._absent = absent
                self._change.notify_all()

    def _probe(self, frame: np.ndarray) -> None:
        """Send the old frame again: its acknowledgement tells that somebody is looking again."""
        self._guarded_show(self.credit.send(), frame)

    def _present(self, part: Part, index: int, frame: np.ndarray) -> None:
        now = time.monotonic()
        number = self.credit.send()
        if index == 0 and part.changed_at is not None:
            self._marks.append((number, part.changed_at))
        self._guarded_show(number, frame)
        self._last_frame = frame
        self._shown_at.append(now)
        with self._change:
            # After a stall the clock starts anew: catching up would show a burst of old frames.
            self._due = (self._due if now - self._due < 0.1 else now) + self._interval()
            self._plan(len(part.frames) - index - 1, now)
            self._change.notify_all()
        if self._on_frame:
            self._on_frame(frame, part.keys[index])

    def _guarded_show(self, number: int, frame: np.ndarray) -> None:
        try:
            self._show(number, frame)
        except Exception as error:  # a closed widget must not kill the thread without a word
            self._fail(error)


def play_script(session, keys: np.ndarray | str | Iterable[str]) -> np.ndarray:
    """Play keys (a key string such as "w-40,jl-20", or bool [n, 8]) without a widget, from where the session stands.

    Returns u8 [1 + n', H, W, 3]: the picture before the keys and n' >= n pixel frames (n rounded up to whole chunks,
    the last keys let go).
    """
    rows = parse_keys(keys) if isinstance(keys, str) else np.asarray(keys, bool)
    frames = [np.asarray(session.last_frame)[None]]
    while len(rows):
        count = session.next_frames
        chunk = np.zeros((count, len(KEYS)), bool)
        chunk[: len(rows[:count])] = rows[:count]
        rows = rows[count:]
        frames.append(session.step(chunk))
    return np.concatenate(frames)
