"""A session that lives in other processes: the player drives it like its own.

One process or several, one per GPU; each builds its session with the same `make(rank, world)`. Commands go over pipes
that only these processes hold, so nothing listens; pictures come back through memory that they share. A command is
done in two rounds: every rank gets it and answers with its number and checksum, and only when all have answered alike
are they told to go. So no rank begins a chunk that another has not agreed to, and a rank that died is noticed before
its peers wait for it in a collective. Whatever is said of a command bears its number: when the one who waited was
interrupted, what still comes of it is known for that and passed over.
"""

import copy
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import threading
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from lingbot_nb.distill.parallel import MEETING
from lingbot_nb.stream.mailbox import Mailbox, folder_in_memory

if TYPE_CHECKING:  # a session of others needs no torch here
    from lingbot_nb.stream.session import Choice, Newer, Recording

FACTS = (
    "fps", "keys", "about", "shape", "prompt", "steps", "seed", "start_image", "first_frame", "last_frame",
    "next_frames", "pixel_frames", "last_timings", "chunk", "window", "sink", "longest_chunk", "longest_window",
    "longest_sink", "preset", "device", "dtype", "threads", "shrinks", "shrunk",
)  # fmt: skip
"""What is known of the far session without asking; sent along with every answer where it has changed."""
KEPT = ("prompt", "steps", "chunk", "window", "sink", "threads", "shrinks")
"""Settings that a restarted session is given again."""
PICTURES = "-pictures"
"""Ending of the file that holds rank 0's pictures."""
READY_SECONDS = 600.0
"""Building a session may mean loading and compiling a large model."""
GO = b"go"
"""What follows a command that all ranks have heard."""


class Lost(RuntimeError):
    """A process of the session has ended or does not answer; `reset` starts all of them again."""


class RemoteSession:
    """`generate`, `finish`, `reset` and the settings of a session that `world` other processes run together.

    `make(rank, world) -> session` must be importable by name (it is pickled). Frames come from rank 0. `seconds` is how
    long a chunk may take before the session counts as hung. Errors of the far session are raised here, as they are
    there; Lost when a process has ended. Any thread may call, one call runs at a time.
    """

    def __init__(self, make: Callable[[int, int], Any], world: int = 1, *, seconds: float = 60.0):
        self._make, self._world, self._seconds = make, world, seconds
        self._lock = threading.RLock()
        self._facts: dict[str, Any] = {}
        self._wishes: dict[str, Any] = {}
        self._workers: list[tuple[multiprocessing.Process, Connection]] = []
        self._number = 0
        self._finishing = False
        self._lost = self._complaint = ""
        self._meeting: tempfile.TemporaryDirectory | None = None
        self._start()

    # -- what a player needs --------------------------------------------------------------------------------------

    def __getattr__(self, name: str):
        if name in FACTS and name in self.__dict__.get("_facts", {}):
            return self._facts[name]
        raise AttributeError(f"the far session has no '{name}'")

    def __setattr__(self, name: str, value) -> None:
        if name not in FACTS:
            super().__setattr__(name, value)
            return
        if name == "shrinks" and self._world > 1:  # one would shorten its window, and the others not
            raise ValueError(f"{self._world} processes share this world: set `session.window`, which all of them hear")
        self._call("set", name, value)
        if name in KEPT:
            self._wishes[name] = value
        elif name == "start_image":
            self._wishes["start"] = ("set", name, value)

    def generate(self, keys: Iterable[str] | np.ndarray) -> np.ndarray:
        """The next chunk's pixel frames; the far session does its clean pass while they are shown."""
        return np.concatenate(list(self.stream(keys)))

    def stream(self, keys: Iterable[str] | np.ndarray, newer: "Newer | None" = None) -> Iterator[np.ndarray]:
        """`generate`, handing out pixel frames as they come, see `Session.stream`.

        A single process asks `newer()`; several keep to the keys that they have agreed on. What has begun is made to
        its end, also when nobody takes the rest.
        """
        keys = keys if isinstance(keys, np.ndarray) else frozenset(keys)
        with self._lock:
            self._order("generate", keys, newer is not None and self._world == 1)
            self._finishing = True
            try:
                while (frames := self._part(newer)) is not None:
                    yield frames
            except GeneratorExit:
                while self._part(newer) is not None:
                    pass
                raise
            except KeyboardInterrupt:
                self._finishing = False
                raise

    def finish(self) -> None:
        """Wait for the clean pass of the last chunk."""
        with self._lock:
            if self._finishing:
                self._finishing = False
                self._gather("finished")

    def step(self, keys: Iterable[str] | np.ndarray) -> np.ndarray:
        frames = self.generate(keys)
        self.finish()
        return frames

    def reset(self, seed: int | None = None) -> None:
        """Back to the start; processes that have ended are started again, with the settings as they were."""
        with self._lock:
            if self.alive:
                self._call("reset", seed)
            else:
                self.restart(seed)

    def start_clip(self, frames: np.ndarray, keys: np.ndarray | None = None) -> None:
        """Start anew after a clip, see `Session.start_clip`."""
        self._call("start_clip", frames, keys)
        self._wishes["start"] = ("start_clip", frames, keys)

    def use(self, dit) -> None:
        """Go on with another student of the same size, on every rank."""
        self._call("use", dit)
        self._wishes["student"] = ("use", dit)

    def tune(self, seconds: float = 1.0, fewest_steps: int | None = None) -> "Choice | None":
        """Have a single process choose dtype, threads and steps, see `Session.tune`; several would not choose alike."""
        if self._world > 1:
            return None
        self._wishes["tuned"] = ("ask", "tune", (seconds, fewest_steps))
        return self.ask("tune", seconds, fewest_steps)[0]

    def recording(self) -> "Recording":
        """What was played since the last reset."""
        return self.ask("recording")[0]

    def save(self, path: str | Path) -> Path:
        """Write the whole state of a session of one process, see `Session.save`."""
        return self._alone("save", path)

    def load(self, path: str | Path) -> None:
        """Go on from a file that `save` wrote."""
        self._alone("load", path)

    def _alone(self, name: str, path: str | Path):
        if self._world > 1:
            raise RuntimeError(f"{self._world} processes share this world: only one process can {name} its state")
        return self.ask(name, Path(path).resolve())[0]

    def ask(self, name: str, *arguments) -> list:
        """What the method or attribute `name` of each rank's session gives, by rank."""
        return self._call("ask", name, arguments, everyone=True)

    # -- life -----------------------------------------------------------------------------------------------------

    @property
    def alive(self) -> bool:
        """Whether every process is there."""
        return bool(self._workers) and not self._lost and all(p.is_alive() for p, _ in self._workers)

    def check(self) -> None:
        """Raise Lost when a process has ended; the player asks this several times a second, also while paused."""
        if self._lost:
            raise Lost(self._lost)
        for rank, (process, _) in enumerate(self._workers):
            if not process.is_alive():
                raise Lost(self._epitaph(rank))

    def restart(self, seed: int | None = None) -> None:
        """End whatever is left and start all processes anew, with every setting and the seed as they were."""
        with self._lock:
            seed = self._facts.get("seed") if seed is None else seed
            self.close()
            self._start()
            if "tuned" in self._wishes:
                self._call(*self._wishes["tuned"])
            for name in KEPT:
                if name in self._wishes:
                    self._call("set", name, self._wishes[name])
            for name in ("student", "start"):
                if name in self._wishes:
                    self._call(*self._wishes[name])
            self._call("reset", seed)

    def close(self) -> None:
        """End the processes."""
        with self._lock:
            for process, pipe in self._workers:
                pipe.close()  # a worker whose pipe is closed ends by itself
                process.join(0.5)
                if process.is_alive():
                    process.kill()
                    process.join(30)  # its GPU memory must be free before others ask for it
            self._workers, self._finishing, self._lost = [], False, ""
            if self._meeting:
                self._meeting.cleanup()

    def __enter__(self) -> "RemoteSession":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _start(self) -> None:
        # Forking a process that has used CUDA or threads is unsafe: the workers start from nothing.
        context = multiprocessing.get_context("spawn")
        # Anew each time: what processes that were killed have left in it would confuse the next ones.
        self._meeting = tempfile.TemporaryDirectory(prefix="lingbot-", dir=folder_in_memory())
        meeting = os.path.join(self._meeting.name, "meeting")
        self._mailbox = Mailbox(meeting + PICTURES)
        for rank in range(self._world):
            mine, theirs = context.Pipe()
            arguments = (theirs, self._make, rank, self._world, meeting)
            process = context.Process(target=_work, args=arguments, name=f"lingbot-rank-{rank}", daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, mine))
        self._number = 0
        try:
            self._gather("done", READY_SECONDS)
        except BaseException:
            self.close()
            raise

    # -- the protocol ---------------------------------------------------------------------------------------------

    def _call(self, *command, everyone: bool = False):
        with self._lock:
            self._order(*command)
            answers = self._gather("done")
            return answers if everyone else answers[0]

    def _order(self, *command) -> None:
        """Have all ranks begin a command."""
        self.check()
        self.finish()
        self._number += 1
        self._complaint = ""
        data = pickle.dumps((self._number, command))
        self._agree(data)
        try:
            for rank in range(self._world):
                self._send(rank, GO)
        except KeyboardInterrupt:
            self._lose("the session was interrupted when some of its processes had begun")

    def _agree(self, data: bytes) -> None:
        for rank in range(self._world):
            self._send(rank, data)
        expected = (self._number, zlib.crc32(data))
        for rank, answer in enumerate(self._gather("heard")):
            if answer != expected:
                self._lose(f"rank {rank} of {self._world} heard command {answer} where {expected} was sent")

    def _send(self, rank: int, data: bytes) -> None:
        try:
            self._workers[rank][1].send_bytes(data)
        except OSError:
            self._lose(self._epitaph(rank))
        except KeyboardInterrupt:
            self._lose("the session was interrupted while it was spoken to")

    def _part(self, newer: "Newer | None") -> np.ndarray | None:
        """The next pixel frames of the chunk that is being made; None when all ranks have made it."""
        while True:
            said, answer = self._next(0, self._seconds, "part", "asks", "done")
            if said == "part":
                return answer
            if said == "done":
                break
            self._send(0, pickle.dumps((self._number, newer())))
        self._in_order({0: answer, **self._answers("done", range(1, self._world), self._seconds)})
        return None

    def _gather(self, kind: str, seconds: float | None = None) -> list:
        """One answer of each rank; raises at once when a process ends, and what the far session raised."""
        return self._in_order(self._answers(kind, range(self._world), seconds or self._seconds))

    def _in_order(self, answers: dict[int, Any]) -> list:
        in_order = [answers[rank] for rank in range(self._world)]
        for answer in in_order:
            if isinstance(answer, Exception):
                raise answer
        return in_order

    def _answers(self, kind: str, ranks: Iterable[int], seconds: float) -> dict[int, Any]:
        missing, answers = set(ranks), {}
        while missing:
            for rank in self._await(missing, seconds):
                answer = self._receive(rank, kind)
                if answer is not None:
                    answers[rank] = answer[1]
                    missing.discard(rank)
        return answers

    def _next(self, rank: int, seconds: float, *kinds: str) -> tuple[str, Any]:
        """The next answer of one rank, while all are watched."""
        while True:
            for _ in self._await({rank}, seconds):
                if (answer := self._receive(rank, *kinds)) is not None:
                    return answer

    def _await(self, ranks: set[int], seconds: float) -> list[int]:
        """Those of `ranks` that have said something; Lost when one has ended that has not, or none speaks in time."""
        pipes = {self._workers[rank][1]: rank for rank in ranks}
        ends = {self._workers[rank][0].sentinel: rank for rank in ranks}
        ready = wait([*pipes, *ends], seconds)
        if not ready:
            self._lose(f"rank {min(ranks)} of {self._world} has not answered for {seconds:g} s{self._complaint}")
        spoken = [rank for pipe, rank in pipes.items() if pipe in ready]
        for end in ready:
            if end in ends and ends[end] not in spoken:
                self._lose(self._epitaph(ends[end]))
        return spoken

    def _receive(self, rank: int, *kinds: str) -> tuple[str, Any] | None:
        """What a rank says, and what about; None where that is of a command that nobody waits for any more."""
        try:
            number, said, answer, facts = pickle.loads(self._workers[rank][1].recv_bytes())
        except (EOFError, OSError):
            self._lose(self._epitaph(rank))
        except KeyboardInterrupt:
            self._lose("the session was interrupted while it spoke")
        if rank == 0:
            self._facts.update(facts)
        if number < self._number:
            return None
        if said not in kinds:
            self._lose(f"rank {rank} of {self._world} answered {said} where {' or '.join(kinds)} was due")
        if isinstance(answer, Exception):  # its peers may now wait for it in vain: then this is why
            self._complaint = f", rank {rank} had failed: {answer}"
        return said, self._mailbox.take(answer)

    def _lose(self, why: str) -> NoReturn:
        """Give up on all processes: half an exchange cannot be resumed, and peers may wait for the dead in vain."""
        # Nobody waits for their end here: to give back tens of gigabytes of a GPU takes seconds.
        for process, _ in self._workers:
            process.kill()
        self._finishing, self._lost = False, why
        raise Lost(why)

    def _epitaph(self, rank: int) -> str:
        process = self._workers[rank][0]
        process.join(1)
        code = process.exitcode
        how = f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        return f"rank {rank} of {self._world} of the session has ended ({how})"


# -- the other side ---------------------------------------------------------------------------------------------------


def _work(pipe: Connection, make: Callable[[int, int], Any], rank: int, world: int, meeting: str) -> None:
    """One rank: build the session, then do what the pipe says until it is closed."""
    # Interrupting a kernel signals its whole process group: the session is ended by its pipe, not by that.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), MEETING: meeting})
    worker = _Worker(pipe, rank, Mailbox(meeting + PICTURES))
    try:
        worker.session = make(rank, world)
    except Exception as error:
        worker.answer("done", _portable(error))
        return
    worker.answer("done", None)
    try:
        while True:
            worker.serve()
    except (EOFError, OSError):  # the player has closed the pipe, or is gone: killed, it has left its folder in memory
        shutil.rmtree(os.path.dirname(meeting), ignore_errors=True)


class _Worker:
    def __init__(self, pipe: Connection, rank: int, mailbox: Mailbox):
        self._pipe, self._rank, self._mailbox = pipe, rank, mailbox
        self._told: dict[str, Any] = {}
        self._number = 0
        self._unasked: bytes | None = None
        self.session: Any = SimpleNamespace()

    def serve(self) -> None:
        name, *arguments = self._agreed()
        self._mailbox.empty()
        try:
            answer = getattr(self, f"_{name}")(*arguments)
        except Exception as error:
            answer = _portable(error)
        self.answer("done", answer)
        if name == "generate":
            self.answer("finished", self._finish())

    def _agreed(self) -> tuple:
        """The next command that all have heard. One that is followed by another was called off."""
        data = self._unasked or self._pipe.recv_bytes()
        self._unasked = None
        while True:
            self._number, command = pickle.loads(data)
            self._tell("heard", (self._number, zlib.crc32(data)), {})
            data = self._pipe.recv_bytes()
            if data == GO:
                return command

    def answer(self, kind: str, value) -> None:
        """Say it, with the facts that have changed."""
        self._tell(kind, value, self._news())

    def _tell(self, kind: str, value, facts: dict[str, Any]) -> None:
        self._pipe.send_bytes(pickle.dumps((self._number, kind, value, facts)))

    def _news(self) -> dict[str, Any]:
        """Facts that have changed since they were told; rank 0 speaks for all."""
        if self._rank:
            return {}
        now = {name: getattr(self.session, name) for name in FACTS if hasattr(self.session, name)}
        news = {
            name: value for name, value in now.items() if name not in self._told or not _same(value, self._told[name])
        }
        # Copies: what a session changes in place is news too.
        self._told.update(copy.deepcopy(news))
        return news

    def _generate(self, keys, asks: bool) -> None:
        stream = getattr(self.session, "stream", None)
        for frames in stream(keys, self._newer if asks else None) if stream else [self.session.generate(keys)]:
            if self._rank == 0:
                self._tell("part", self._mailbox.put(frames), {})

    def _newer(self):
        """Other keys, if the player has some by now."""
        if self._unasked is not None:
            return None
        self._tell("asks", None, {})
        data = self._pipe.recv_bytes()
        number, keys = pickle.loads(data)
        if number == self._number:
            return keys
        self._unasked = data  # the player was interrupted: it waits for this chunk no more, and wants something else
        return None

    def _finish(self) -> Exception | None:
        try:
            self.session.finish()
        except Exception as error:
            return _portable(error)
        return None

    def _set(self, name: str, value) -> None:
        setattr(self.session, name, value)

    def _reset(self, seed: int | None) -> None:
        self.session.reset() if seed is None else self.session.reset(seed=seed)

    def _start_clip(self, frames: np.ndarray, keys: np.ndarray | None) -> None:
        self.session.start_clip(frames, keys)

    def _use(self, dit) -> None:
        self.session.use(dit)

    def _ask(self, name: str, arguments: tuple):
        found = getattr(self.session, name)
        return found(*arguments) if callable(found) else found


def _same(value, told) -> bool:
    if isinstance(value, np.ndarray) and isinstance(told, np.ndarray):
        return value.dtype == told.dtype and np.array_equal(value, told)
    return type(value) is type(told) and bool(value == told)


def _portable(error: Exception) -> Exception:
    """The error itself where it survives the way, else its words."""
    error.add_note("".join(traceback.format_exception(error))[-2000:])
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
