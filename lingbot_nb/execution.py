"""Execution of the notebooks: a thin layer over papermill.

It adds what papermill lacks: a success marker that the notebook itself writes, resuming, and parameters checked before
any work is done.
"""

import ast
import contextlib
import fcntl
import os
import re
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from lingbot_nb import presets
from lingbot_nb.runs import (
    EXECUTION,
    FULL_RUN,
    NOTEBOOKS,
    Run,
    git_state,
    now,
    plain,
    read_card,
    read_marker,
    runs_root,
    versions,
    write_json,
)

NEED_BYTES = 1 << 30
"""Free disk space that `execute` asks for before it starts."""

_NAME = re.compile(r"\w[\w.+-]*")
# These say where and on what a notebook runs, not what it computes: changing them does not undo a finished notebook.
_NOT_COMPARED = {"run_folder", "gpus"}


@dataclass(frozen=True)
class Order:
    """What to execute. `notebooks` are numbers or names, () for all; `given` are parameters set by hand, which win over
    FULL_RUN; `cell_seconds` is the longest that one cell may take; `source` holds the notebooks, `root` the runs."""

    name: str
    preset: str = "tiny"
    notebooks: tuple[str, ...] = ()
    given: Mapping[str, object] = field(default_factory=dict)
    gpus: int | None = None
    cell_seconds: int | None = None
    source: Path = NOTEBOOKS
    root: Path = field(default_factory=runs_root)

    @property
    def folder(self) -> Path:
        return self.root / self.name


@dataclass(frozen=True)
class Step:
    """One notebook of an order: where it is, what papermill injects, and with the notebook's defaults below that."""

    notebook: str
    path: Path
    injected: Mapping[str, object]
    parameters: Mapping[str, object]


@dataclass(frozen=True)
class Outcome:
    """What became of a notebook: status running, finished, skipped or failed; `error` is one line or ''."""

    notebook: str
    status: str
    seconds: float
    path: Path
    error: str = ""


def default_name(preset: str, root: Path) -> str:
    """date-time-preset, with a number behind it when two runs start within a second."""
    stem = f"{datetime.now():%Y%m%d-%H%M%S}-{preset}"
    names = (stem if i == 1 else f"{stem}-{i}" for i in range(1, 1000))
    return next(name for name in names if not (root / name).exists())


def plan(order: Order) -> list[Step]:
    """The notebooks of `order` with their parameters; every mistake in it is a ValueError, before any work."""
    presets.by_name(order.preset)
    if not _NAME.fullmatch(order.name):
        raise ValueError(f"run name '{order.name}' is no folder name: use letters, digits and . _ + -")
    if order.gpus is not None and order.gpus < 0:
        raise ValueError(f"{order.gpus} GPUs: use 0 (the CPU) or more")
    declared = {path: _declared(path) for path in _chosen(order)}
    _check_given(order.given, declared)
    return [_step(order, path, defaults) for path, defaults in declared.items()]


def execute(order: Order) -> Iterator[Outcome]:
    """Execute the notebooks of `order` one after the other, yielding each when it starts and when it has ended.

    A notebook is finished when papermill returned without an error *and* the notebook recorded its results during this
    execution under the same parameters: papermill alone also calls timed-out notebooks completed. Finished notebooks of
    an earlier try are skipped. The first failure ends the run, for later notebooks build on earlier ones.
    Raises ValueError and RuntimeError before any work; KeyboardInterrupt passes through and leaves a run that resumes.
    """
    steps = plan(order)
    run = Run(order.folder, order.preset, need_bytes=NEED_BYTES)
    with _alone(run.folder):
        _update(run, planned=[step.notebook for step in steps], versions=versions(), git=git_state())
        for step in steps:
            if (seconds := _finished_in(run, step)) is not None:
                yield Outcome(step.notebook, "skipped", seconds, _executed(run, step))
                continue
            yield Outcome(step.notebook, "running", 0.0, _executed(run, step))
            outcome = _carry_out(run, step, order.cell_seconds)
            yield outcome
            if outcome.status == "failed":
                return


def status(folder: Path) -> str:
    """One phrase on how a run stands: running, finished, failed, interrupted, or opened by hand."""
    card = read_card(folder) or {}
    planned, entries = card.get("planned"), card.get("notebooks", {})
    if not planned:
        return "by hand"
    if _is_locked(folder):
        return "running"
    failed = [name for name in planned if entries.get(name, {}).get("status") == "failed"]
    if failed:
        return f"failed in {failed[0]}"
    finished = sum(entries.get(name, {}).get("status") == "finished" for name in planned)
    if finished < len(planned):
        return f"interrupted, {finished} of {len(planned)} done"
    outdated = sum(entry.get("status") == "outdated" for entry in entries.values())
    return f"finished {finished}" + (f", {outdated} outdated" if outdated else "")


def _chosen(order: Order) -> list[Path]:
    paths = sorted(Path(order.source).resolve().glob("[0-9][0-9]_*.ipynb"))
    if not paths:
        raise ValueError(f"{order.source} holds no notebooks named 00_…: run from a checkout of the project")
    for choice in order.notebooks:
        if not any(choice in _names(path) for path in paths):
            known = ", ".join(path.stem for path in paths)
            raise ValueError(f"unknown notebook '{choice}': use numbers or names out of {known}")
    return [path for path in paths if not order.notebooks or _names(path) & set(order.notebooks)]


def _names(path: Path) -> set[str]:
    """00_tiny_world answers to its number, its name and its file."""
    return {path.stem[:2], path.stem[3:], path.stem, path.name}


def _declared(path: Path) -> dict[str, object]:
    """The parameters that a notebook declares, with their defaults."""
    import papermill

    try:
        found = papermill.inspect_notebook(str(path))
    except Exception as error:
        raise ValueError(
            f"{path} is no notebook that papermill can read ({_one_line(error)}): restore the file"
        ) from error
    return {name: literal(entry["default"]) for name, entry in found.items()}


def literal(text: str) -> object:
    """A Python number, string, bool, None or list written out; anything else stays the text that it is."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return value if value is None or isinstance(value, (bool, int, float, str, list)) else text


def _check_given(given: Mapping[str, object], declared: Mapping[Path, Mapping[str, object]]) -> None:
    instead = {"preset": "--preset", "gpus": "--gpus", "run_folder": "--name"}
    for name, value in given.items():
        if name in instead:
            raise ValueError(f"parameter '{name}' is set by {instead[name]}, not by -p")
        defaults = [parameters[name] for parameters in declared.values() if name in parameters]
        if not defaults:
            known = sorted({key for parameters in declared.values() for key in parameters} - set(instead))
            raise ValueError(f"no chosen notebook has a parameter '{name}': they have {', '.join(known) or 'none'}")
        if _is_number(defaults[0]) and not _is_number(value):
            raise ValueError(f"parameter '{name}' is a number such as {defaults[0]}, not '{value}'")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _step(order: Order, path: Path, defaults: Mapping[str, object]) -> Step:
    wanted = {**FULL_RUN.get(order.preset, {}), **order.given, "preset": order.preset, "run_folder": str(order.folder)}
    if order.gpus is not None:
        wanted["gpus"] = order.gpus
    injected = {name: value for name, value in wanted.items() if name in defaults}
    return Step(path.stem, path, injected, {**defaults, **injected})


def _executed(run: Run, step: Step) -> Path:
    return run.folder / step.path.name


def _finished_in(run: Run, step: Step) -> float | None:
    """Seconds that the notebook took, if it was finished with these parameters; else None."""
    entry = (read_card(run.folder) or {}).get("notebooks", {}).get(step.notebook, {})
    same = _compared(entry.get("parameters", {})) == _compared(plain(step.parameters))
    done = entry.get("status") == "finished" and same and read_marker(run.folder, step.notebook) is not None
    return entry["seconds"] if done else None


def _compared(parameters: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in parameters.items() if name not in _NOT_COMPARED}


def _carry_out(run: Run, step: Step, cell_seconds: int | None) -> Outcome:
    execution, started = uuid.uuid4().hex, time.monotonic()
    _note(run, step, "running", started=now(), seconds=0.0, error="", parameters=step.parameters)
    try:
        error = _papermill(run, step, execution, cell_seconds) or _marker_fault(run, step, execution)
    except KeyboardInterrupt:
        _note(run, step, "interrupted", seconds=time.monotonic() - started)
        raise
    seconds, state = time.monotonic() - started, "failed" if error else "finished"
    _note(run, step, state, seconds=seconds, error=error)
    return Outcome(step.notebook, state, seconds, _executed(run, step), error)


def _papermill(run: Run, step: Step, execution: str, cell_seconds: int | None) -> str:
    """Execute one notebook; '' or the error in one line."""
    import papermill
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    try:
        variables = {EXECUTION: execution, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
        with _environment(variables), _terminal_into(run.folder / "kernel.log"):
            papermill.execute_notebook(
                step.path,
                _executed(run, step),
                dict(step.injected),
                kernel_name="python3",
                progress_bar=False,
                cwd=step.path.parent,
                execution_timeout=cell_seconds,
            )
    except papermill.exceptions.PapermillExecutionError as error:
        return f"cell [{error.exec_count}]: {error.ename}: {_one_line(error.evalue)}"
    except CellTimeoutError:
        return f"a cell took longer than the {cell_seconds} s that --timeout allows"
    except DeadKernelError:
        return "the kernel died, most often because the machine ran out of memory"
    except Exception as error:  # whatever breaks here, the run must be left in order
        return f"{type(error).__name__}: {_one_line(error)}"
    return ""


def _marker_fault(run: Run, step: Step, execution: str) -> str:
    """'' if the notebook recorded its results during this execution with its parameters, else what is wrong."""
    try:
        marker = read_marker(run.folder, step.notebook)
    except ValueError as error:
        return str(error)
    if marker is None or marker.get("execution") != execution:
        return f"it ended without recording its results: its last cell must call run.record('{step.notebook}', …)"
    recorded, wanted = marker.get("parameters", {}), plain(step.injected)
    other = sorted(name for name in recorded.keys() & wanted.keys() if recorded[name] != wanted[name])
    if marker.get("preset") != run.preset.name or other:
        return f"it recorded its results under other parameters ({', '.join(other) or 'preset'}) than it was given"
    return ""


def _note(run: Run, step: Step, state: str, **entry: object) -> None:
    """Write a notebook's state into run.json, and what it recorded once it has finished."""
    card = read_card(run.folder) or {}
    entries, metrics = card.get("notebooks", {}), card.get("metrics", {})
    if state == "running" and entries.get(step.notebook, {}).get("status") == "finished":
        # It was finished with other parameters: what later notebooks made of that no longer holds.
        for name in entries:
            if name > step.notebook and entries[name]["status"] == "finished":
                entries[name]["status"] = "outdated"
    entries[step.notebook] = {**entries.get(step.notebook, {}), "status": state, **entry}
    if state == "finished":
        metrics[step.notebook] = read_marker(run.folder, step.notebook)["results"]
    _update(run, notebooks=dict(sorted(entries.items())), metrics=dict(sorted(metrics.items())))


def _update(run: Run, **entries: object) -> None:
    write_json(run.card_path, {**(read_card(run.folder) or {}), **entries, "updated": now()})


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the run for one process; RuntimeError if another one has it."""
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RuntimeError(
                f"{folder} is being executed by another process: wait for it, or name another run"
            ) from None
        yield


def _is_locked(folder: Path) -> bool:
    if not (folder / ".lock").exists():
        return False
    try:
        with _alone(folder):
            return False
    except RuntimeError:
        return True


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


@contextlib.contextmanager
def _terminal_into(log: Path) -> Iterator[None]:
    """Send what this process and the kernels it starts write to the terminal to a file: notebooks keep their own."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = os.dup(1), os.dup(2)
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, descriptor in enumerate(before, start=1):
            os.dup2(descriptor, target)
            os.close(descriptor)


def _one_line(error: object, limit: int = 300) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else "no message")[:limit]
