"""A session that lives in other processes: the player drives it like its own.

One process or several, one per GPU; each builds its session with the same `make(rank, world)`. Commands go over pipes
that only these processes hold, so nothing listens; pictures come back through memory that they share. A command is
done in two rounds: every rank gets it and answers with its number and checksum, and only when all have answered alike
are they told to go. So no rank begins a chunk that another has not agreed to, and a rank that died is noticed before
its peers wait for it in a collective.
"""

import copy
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import traceback
import zlib
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np

from lingbot_nb.distill.parallel import MEETING
from lingbot_nb.stream.mailbox import Mailbox, folder_in_memory

FACTS = (
    "fps", "keys", "about", "shape", "prompt", "steps", "seed", "start_image", "first_frame", "last_frame",
    "next_frames", "pixel_frames", "last_timings", "chunk", "window", "sink", "longest_chunk", "longest_window",
    "longest_sink", "preset",
)  # fmt: skip
"""What is known of the far session without asking; sent along with every answer where it has changed."""
KEPT = ("prompt", "steps", "chunk", "window", "sink")
"""Settings that a restarted session is given again."""
PICTURES = "-pictures"
"""Ending of the file that holds rank 0's pictures."""
READY_SECONDS = 600.0
"""Building a session may mean loading and compiling a large model."""


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
        self._lost = ""
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
        self._call("set", name, value)
        if name in KEPT:
            self._wishes[name] = value
        elif name == "start_image":
            self._wishes["start"] = ("set", name, value)

    def generate(self, keys: Iterable[str] | np.ndarray) -> np.ndarray:
        """The next chunk's pixel frames; the far session does its clean pass while they are shown."""
        return self._call("generate", keys if isinstance(keys, np.ndarray) else frozenset(keys))

    def finish(self) -> None:
        """Wait for the clean pass of the last chunk."""
        with self._lock:
            if self._finishing:
                self._finishing = False
                self._gather("finished", self._seconds)

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
        try:
            self._gather("done", READY_SECONDS)
        except BaseException:
            self.close()
            raise

    # -- the protocol ---------------------------------------------------------------------------------------------

    def _call(self, *command, everyone: bool = False):
        with self._lock:
            self.check()
            self.finish()
            self._number += 1
            data = pickle.dumps((self._number, command))
            self._agree(data)
            for rank in range(self._world):
                self._send(rank, b"go")
            self._finishing = command[0] == "generate"
            answers = self._gather("done", self._seconds)
            return answers if everyone else answers[0]

    def _agree(self, data: bytes) -> None:
        for rank in range(self._world):
            self._send(rank, data)
        expected = (self._number, zlib.crc32(data))
        for rank, answer in enumerate(self._gather("heard", self._seconds)):
            if answer != expected:
                self._lose(f"rank {rank} of {self._world} heard command {answer} where {expected} was sent")

    def _send(self, rank: int, data: bytes) -> None:
        try:
            self._workers[rank][1].send_bytes(data)
        except OSError:
            self._lose(self._epitaph(rank))

    def _gather(self, kind: str, seconds: float) -> list:
        """One answer of each rank; raises at once when a process ends, and what the far session raised."""
        answers: dict[int, Any] = {}
        ranks = {pipe: rank for rank, (_, pipe) in enumerate(self._workers)}
        ends = {process.sentinel: rank for rank, (process, _) in enumerate(self._workers)}
        while len(answers) < self._world:
            waiting = [pipe for pipe, rank in ranks.items() if rank not in answers]
            ready = wait([*waiting, *ends], seconds)
            if not ready:
                late = min(set(ranks.values()) - answers.keys())
                self._lose(f"rank {late} of {self._world} has not answered for {seconds:g} s")
            for pipe in ready:
                if pipe in ranks:
                    self._receive(pipe, ranks[pipe], kind, answers)
            for end in ready:
                if end in ends and ends[end] not in answers:
                    self._lose(self._epitaph(ends[end]))
        in_order = [answers[rank] for rank in range(self._world)]
        for answer in in_order:
            if isinstance(answer, Exception):
                raise answer
        return in_order

    def _receive(self, pipe: Connection, rank: int, kind: str, answers: dict[int, Any]) -> None:
        try:
            said, answer, facts = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            self._lose(self._epitaph(rank))
        if rank == 0:
            self._facts.update(facts)
        if said != kind:
            self._lose(f"rank {rank} of {self._world} answered {said} where {kind} was due")
        answers[rank] = self._mailbox.take(answer)

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
    except (EOFError, OSError):  # the player has closed the pipe, or is gone
        return


class _Worker:
    def __init__(self, pipe: Connection, rank: int, mailbox: Mailbox):
        self._pipe, self._rank, self._mailbox = pipe, rank, mailbox
        self._told: dict[str, Any] = {}
        self.session: Any = SimpleNamespace()

    def serve(self) -> None:
        data = self._pipe.recv_bytes()
        number, (name, *arguments) = pickle.loads(data)
        self._pipe.send_bytes(pickle.dumps(("heard", (number, zlib.crc32(data)), {})))
        if self._pipe.recv_bytes() != b"go":
            raise EOFError("the command was called off")
        try:
            answer = getattr(self, f"_{name}")(*arguments)
        except Exception as error:
            answer = _portable(error)
        self.answer("done", answer)
        if name == "generate":
            self.answer("finished", self._finish())

    def answer(self, kind: str, value) -> None:
        self._pipe.send_bytes(pickle.dumps((kind, value, self._news())))

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

    def _generate(self, keys) -> np.ndarray | None:
        frames = self.session.generate(keys)
        return self._mailbox.put(frames) if self._rank == 0 else None

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
