"""A training on several processes, started from a notebook: rows come back while it runs.

    for row in launch("my_module:train", {"steps": 1000}, processes=2, folder=run.path("launch")):
        curve.add(row["step"], loss=row["student_loss"])

The target is a function `train(**arguments) -> iterator of rows`, usually ending in `yield from fit(...)`, in an
importable module or in a cell of the notebook, if it imports what it needs: its source then travels. Every rank calls
it after `parallel.start()`; rank 0's rows come back. The processes belong to torch's elastic launcher, in a session of
their own: they begin without this process's CUDA state, and an interrupt meant for the notebook does not tear them
apart in the middle of a step.
"""

import contextlib
import dis
import importlib
import inspect
import json
import math
import os
import pkgutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType

import torch
import torch.distributed as dist

from lingbot_nb.distill import parallel
from lingbot_nb.distill.trajectories import write_text

MARK = "\x1e"
"""Begins the lines that carry rows; anything else that a process prints is for the log."""
TAIL = 80
"""Lines of output that an error repeats."""

Target = str | Callable[..., Iterator[dict]]


def launch(
    target: Target,
    arguments: Mapping[str, object] | None = None,
    *,
    processes: int,
    folder: Path | str,
    torchrun: Sequence[str] = (),
    say: Callable[[str], None] | None = None,
    patience: float = 120.0,
) -> Iterator[dict]:
    """Runs `target(**arguments)` on `processes` processes of this machine and yields rank 0's rows.

    `arguments` must be JSON. `folder` gets the order and output.log, whose lines `say` also receives. `torchrun` are
    further arguments of torch.distributed.run, which come last: ("--nnodes", "2", "--rdzv-endpoint", …) for several
    machines, each of which launches. Closing the generator, or an interrupt while it waits, lets all ranks finish their
    step and close theirs (`fit` then saves); after `patience` seconds they are killed. Ranks need not have equally many
    rows.

    Raises RuntimeError with the end of the output, the failing rank's traceback in it, when a process fails or is
    killed; ValueError for a target that other processes cannot import, or more processes than GPUs.
    """
    order = _order(target, arguments or {}, processes, Path(folder))
    process = subprocess.Popen(
        [*_command(processes, torchrun), str(order)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=_environment(order.parent),
        text=True,
        errors="replace",
        start_new_session=True,
    )
    tail: deque[str] = deque(maxlen=TAIL)
    try:
        with (order.parent / "output.log").open("w", buffering=1) as log:
            for line in process.stdout:
                # A rank may have printed half a line of its own before.
                words, mark, row = line.partition(MARK)
                if words:
                    tail.append(words)
                    log.write(words)
                    if say is not None:
                        say(words.rstrip("\n"))
                if mark:
                    yield _read_row(row)
        code = process.wait()
    finally:
        _stop(process, order.with_suffix(".stop"), patience)
    if code:
        raise RuntimeError(_failure(order, processes, code, tail))


def spread(
    target: Target,
    arguments: Mapping[str, object] | None = None,
    *,
    processes: int,
    folder: Path | str,
    here: Mapping[str, object] | None = None,
    **options,
) -> Iterator[dict]:
    """`launch` on two processes or more; for fewer the target's rows from this very process, where it can be looked
    into. `here` are further arguments that only this process has, such as clips it has encoded already; `options` are
    `launch`'s."""
    if processes > 1:
        return launch(target, arguments, processes=processes, folder=folder, **options)
    function = pkgutil.resolve_name(target) if isinstance(target, str) else target
    return function(**(arguments or {}), **(here or {}))


# ---- the notebook's side --------------------------------------------------------------------------------------------


def _order(target: Target, arguments: Mapping[str, object], processes: int, folder: Path) -> Path:
    if processes < 1:
        raise ValueError(f"{processes} processes: use 1 or more")
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise ValueError(f"{processes} processes for {torch.cuda.device_count()} GPUs: use one a GPU at most")
    order = folder.resolve() / "order.json"
    order.parent.mkdir(parents=True, exist_ok=True)
    for old in (order.with_suffix(".stop"), *order.parent.glob("rank-*.error")):
        old.unlink(missing_ok=True)
    try:
        text = json.dumps({"target": _importable(target, order.parent), "arguments": dict(arguments)}, indent=1)
    except TypeError as error:
        raise ValueError(
            f"arguments are not plain JSON ({error}): pass numbers, texts, lists and paths as text"
        ) from None
    write_text(order, text + "\n")
    return order


def _importable(target: Target, folder: Path) -> str:
    if not isinstance(target, str) and target.__module__ == "__main__" and "<" not in target.__qualname__:
        return _written(target, folder)
    name = target if isinstance(target, str) else f"{target.__module__}:{target.__qualname__}"
    if name.startswith("__main__") or "<" in name:
        raise ValueError(f"target {name} lives where other processes cannot find it: make it a function with a name")
    try:
        importlib.invalidate_caches()
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"target '{name}' cannot be imported ({error}): name it as module:function") from error
    return name


def _written(target: Callable, folder: Path) -> str:
    """A notebook's function as a module of its own in the order's folder."""
    if foreign := sorted(_globals(target.__code__) & target.__globals__.keys()):
        raise ValueError(
            f"{target.__name__} uses {', '.join(foreign)} of this notebook, which other processes do not have: import "
            "it inside the function, or pass it as an argument"
        )
    module = f"cell_{target.__name__}"
    write_text(folder / f"{module}.py", textwrap.dedent(inspect.getsource(target)))
    return f"{module}:{target.__name__}"


def _globals(code: CodeType) -> set[str]:
    """Names that a function and those inside it look up outside."""
    own = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    return own.union(*(_globals(part) for part in code.co_consts if isinstance(part, CodeType)))


def _command(processes: int, torchrun: Sequence[str]) -> list[str]:
    own = ["--nproc-per-node", str(processes), "--monitor-interval", "0.5", "--max-restarts", "0"]
    where = [] if torchrun else ["--standalone"]
    module = ["-m", "lingbot_nb.distill.launch"]
    return [sys.executable, "-u", "-m", "torch.distributed.run", *where, *own, *torchrun, *module]


def _environment(folder: Path) -> dict[str, str]:
    # Modules that this notebook can import, its neighbours say, the other processes can too.
    path = os.pathsep.join(entry or os.getcwd() for entry in (str(folder), *sys.path))
    return {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}


def _read_row(line: str) -> dict:
    # JSON has no nan: it travels as null.
    return {name: math.nan if value is None else value for name, value in json.loads(line).items()}


def _stop(process: subprocess.Popen, stop: Path, patience: float) -> None:
    """Asks the ranks to end, waits, and makes sure that nothing of the session is left."""
    try:
        if process.poll() is None:
            stop.touch()
            # Somebody must go on reading, or a rank waits for room to print.
            threading.Thread(target=deque, args=(process.stdout, 0), daemon=True).start()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _failure(order: Path, processes: int, code: int, tail: Sequence[str]) -> str:
    errors = sorted(order.parent.glob("rank-*.error"), key=lambda file: file.stat().st_mtime_ns)
    # The first to fail is the cause; the others lost a partner.
    said = errors[0].read_text() if errors else "".join(tail)
    who = f"{errors[0].stem.replace('-', ' ')} failed first" if errors else "no rank could say why"
    if killed := _killed(tail):
        who, said = f"a process was killed by {killed}", "".join(tail)
    where = order.parent / "output.log"
    return f"training on {processes} processes ended with code {code}, {who}; the whole output is in {where}:\n{said}"


def _killed(tail: Sequence[str]) -> str | None:
    """The signal of a process that died by one from outside, from the launcher's closing words."""
    for line in tail:
        name, _, value = line.partition(":")
        if name.strip() == "exitcode" and value.strip().startswith("-"):
            number = int(value.split()[0])
            if -number not in (signal.SIGTERM, signal.SIGABRT):
                return signal.Signals(-number).name
    return None


# ---- a rank's side --------------------------------------------------------------------------------------------------


def work(order: Path) -> None:
    """What each rank runs: the order's target, its rows to the notebook, its traceback to a file."""
    rank, ranks, _ = parallel.start()
    try:
        _follow(order, rank, ranks)
    except BaseException:
        import traceback

        write_text(order.with_name(f"rank-{rank}.error"), traceback.format_exc())
        raise
    if ranks > 1:
        dist.destroy_process_group()


def _follow(order: Path, rank: int, ranks: int) -> None:
    told = json.loads(order.read_text())
    sums, stop = _summing(ranks), order.with_suffix(".stop")
    rows = iter(pkgutil.resolve_name(told["target"])(**told["arguments"]))
    going = True
    while going:
        row = next(rows, None)
        if rank == 0 and row is not None:
            _print_row(row)
        # Rank 0 looks for the file, and all hear the same, so that all end after the same step; a rank that has no
        # rows left goes on answering until none has.
        asked, left = sums(rank == 0 and stop.exists(), row is not None)
        going = left and not asked
    if hasattr(rows, "close"):
        rows.close()


def _summing(ranks: int) -> Callable[[bool, bool], Sequence[int]]:
    """Adds up two yes or no over all ranks."""
    if ranks == 1:
        return lambda *mine: mine
    # On the CPU, so that asking does not wait for a GPU.
    group = dist.new_group(backend="gloo")

    def sums(*mine: bool) -> list[int]:
        total = torch.tensor(mine, dtype=torch.int32)
        dist.all_reduce(total, group=group)
        return total.tolist()

    return sums


def _print_row(row: Mapping[str, object]) -> None:
    plain = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in row.items()}
    # One write: ranks share the pipe, and lines must not mix.
    line = (MARK + json.dumps(plain) + "\n").encode()
    sys.stdout.flush()
    os.write(sys.stdout.fileno(), line)


if __name__ == "__main__":
    work(Path(sys.argv[-1]))
