"""Runs: one folder for everything that an execution of the notebooks takes in and gives out.

`Run` is what a notebook holds: it finds and keeps files, records results and logs metrics. How the notebooks of a run
are executed is in execution.py.
"""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import cache
from pathlib import Path

from lingbot_nb import presets

PROJECT = Path(__file__).resolve().parents[1]
NOTEBOOKS = PROJECT / "notebooks"
WEIGHTS = PROJECT / "data" / "weights"
BY_HAND = "by-hand"
"""The run folder of notebooks that are opened by hand."""

FULL_RUN: Mapping[str, Mapping[str, int | float | str]] = {
    "tiny": {
        "train_clips": 16,
        "eval_clips": 3,
        "vae_steps": 12,
        "teacher_steps": 30,
        "solver_steps": 48,
        "pairs": 8,
        "pair_frames": 7,
        "objective_steps": 8,
        "forcing_steps": 40,
        "pretrain_steps": 50,
        "dmd_steps": 20,
        "exam_frames": 5,
        "eval_frames": 17,
        "teacher_solver_steps": 50,
        "control_pairs": "ws,ad,jl",
        "walk_seconds": 3,
        "script": "w-20,l-36,w-24,s-24,j-36,s-16,none-8",
    },
}
"""What `make run` sets over the notebooks' small defaults, by preset; names that no notebook declares are ignored."""

EXECUTION = "LINGBOT_EXECUTION"
"""Environment variable that tells a kernel which execution it is part of; `Run.record` writes it into the marker."""
ROOT = "LINGBOT_RUNS"
"""Environment variable that puts the runs elsewhere than papermill_runs/."""

_PACKAGES = (
    *("torch", "numpy", "einops", "safetensors", "diffusers", "transformers", "vizdoom", "av"),
    *("opencv-python-headless", "matplotlib", "ipywidgets", "ipyevents", "ipykernel", "papermill"),
)
_MADE_BY = (
    (("vae", "latents", "teacher"), "00_tiny_world"),
    (("pairs", "trajector", "ode"), "03_ode_pairs"),
    (("pretrain", "causal"), "04_pretrain"),
    (("student", "critic", "dmd"), "05_dmd"),
    (("eval",), "06_eval"),
    (("walk", "play"), "07_live_play"),
)


def runs_root() -> Path:
    """The folder of all runs: papermill_runs/, or what the environment variable LINGBOT_RUNS names."""
    return Path(os.environ.get(ROOT) or PROJECT / "papermill_runs").resolve()


def shipped_folders(preset: presets.Preset) -> tuple[Path, ...]:
    """Where a preset's shipped weights lie: its own folder first, then what it shares with the tiny preset."""
    return (WEIGHTS / preset.name, WEIGHTS)


def first_with(name: str, folders: Iterable[Path]) -> Path | None:
    """The file `name` in the first of `folders` that has it."""
    return next((folder / name for folder in folders if (folder / name).exists()), None)


class Run:
    """A run's folder: created if absent, then the one place where a notebook finds and leaves things.

    `folder` is a path, a bare name under `runs_root()`, or '' for the scratch run of notebooks opened by hand.
    `parameters` are the notebook's own, kept beside every result that it records.
    Raises ValueError for an unknown preset, an unreadable run.json or a folder of another preset, and RuntimeError when
    the disk has less than `need_bytes` left.
    """

    def __init__(
        self,
        folder: str | Path = "",
        preset: str | presets.Preset = "tiny",
        parameters: Mapping[str, object] | None = None,
        *,
        need_bytes: int = 0,
    ):
        self.preset = presets.by_name(preset) if isinstance(preset, str) else preset
        self.parameters = dict(parameters or {})
        self.folder = _place(folder)
        check_space(self.folder, need_bytes)
        self.folder.mkdir(parents=True, exist_ok=True)
        card = read_card(self.folder)
        if card is None:
            write_json(self.card_path, {"name": self.name, "preset": self.preset.name, "created": now()})
        elif card["preset"] != self.preset.name:
            raise ValueError(
                f"{self.folder} holds a run of preset '{card['preset']}', not '{self.preset.name}': "
                f"use another run folder for preset '{self.preset.name}'"
            )

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def card_path(self) -> Path:
        return self.folder / "run.json"

    @property
    def figures(self) -> Path:
        """Folder of the pictures that belong to the run rather than to one cell's output."""
        folder = self.folder / "figures"
        folder.mkdir(exist_ok=True)
        return folder

    def path(self, name: str) -> Path:
        """Where the run keeps `name` (its parent folder is made); ValueError if that lies outside the run."""
        path = self.folder / name
        if not path.resolve().is_relative_to(self.folder):
            raise ValueError(f"'{name}' lies outside the run folder {self.folder}: use a relative name")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def find(self, name: str) -> Path:
        """`name` in this run, else among the shipped weights; FileNotFoundError says which notebook makes it."""
        if file := first_with(name, (self.folder, *shipped_folders(self.preset))):
            return file
        raise FileNotFoundError(f"'{name}' is neither in {self.folder} nor in {WEIGHTS}: run {_maker(name)} first")

    def record(self, notebook: str, **results: object) -> Path:
        """Write results/<notebook>.json: the mark, made by the notebook itself, that it came to its end.

        Numbers of torch and numpy become plain ones; what is not finite becomes null.
        """
        entry = {
            "notebook": notebook,
            "preset": self.preset.name,
            "parameters": self.parameters,
            "execution": os.environ.get(EXECUTION),
            "recorded": now(),
            "conditions": self.conditions(),
            "results": results,
        }
        return write_json(self.path(f"results/{notebook}.json"), entry)

    def results(self, notebook: str) -> dict:
        """What `notebook` recorded last in this run; FileNotFoundError if it has not come to its end here."""
        entry = read_marker(self.folder, notebook)
        if entry is None:
            raise FileNotFoundError(f"{notebook} has recorded nothing in {self.folder}: run {notebook} first")
        return entry["results"]

    def log(self, **metrics: object) -> None:
        """Append one line to metrics.jsonl."""
        line = json.dumps(plain({"time": round(time.time(), 3), **metrics}), allow_nan=False)
        with open(self.path("metrics.jsonl"), "a") as file:
            file.write(line + "\n")

    def metrics(self) -> list[dict]:
        """All lines of metrics.jsonl; a line that a killed process left half written is passed over."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return [entry for line in lines if (entry := _parsed(line)) is not None]

    def conditions(self, device: object = None, dtype: object = None) -> str:
        """One line that belongs under every number: device, torch, threads, dtype, preset, commit.

        `device` and `dtype` are torch's; by default the first GPU if there is one, and float32.
        """
        import torch

        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        kind = str(dtype or torch.get_default_dtype()).removeprefix("torch.")
        return (
            f"{_device_name(device)} · torch {torch.__version__} · {torch.get_num_threads()} threads · {kind} · "
            f"preset {self.preset.name} · {_commit_text()}"
        )


def check_space(folder: Path, need_bytes: int) -> None:
    """Raise RuntimeError when the disk under `folder` (which need not exist yet) has less than `need_bytes` free."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if free < need_bytes:
        raise RuntimeError(
            f"{folder} has {free / 1e6:.0f} MB of free disk space where {need_bytes / 1e6:.0f} MB are needed: "
            f"free some, or choose a run folder on another disk"
        )


def read_card(folder: Path) -> dict | None:
    """run.json of a run folder, None if there is none; ValueError if it cannot be read."""
    return _read(
        folder / "run.json", {"preset": str}, "delete it to start the run's records afresh, or name another run"
    )


def read_marker(folder: Path, notebook: str) -> dict | None:
    """results/<notebook>.json, None if there is none; ValueError if it cannot be read."""
    return _read(folder / "results" / f"{notebook}.json", {"results": dict}, f"delete it and run {notebook} again")


def all_results(folder: Path) -> dict[str, dict]:
    """What every notebook recorded in a run, in the notebooks' order."""
    names = sorted(path.stem for path in folder.glob("results/*.json"))
    return {name: entry["results"] for name in names if (entry := read_marker(folder, name))}


def write_json(path: Path, value: object) -> Path:
    """Write `value` as strict JSON to a temporary name, then rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(plain(value), indent=1, ensure_ascii=False, allow_nan=False)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    return path


def _read(path: Path, needs: Mapping[str, type], fix: str) -> dict | None:
    if not path.exists():
        return None
    entry = _parsed(path.read_text(encoding="utf-8", errors="replace"))
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), kind) for key, kind in needs.items()):
        raise ValueError(f"{path} is damaged and cannot be read: {fix}")
    return entry


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def plain(value: object) -> object:
    """`value` out of dicts, lists and plain scalars; torch and numpy values through their own tolist()."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return plain(value.tolist()) if hasattr(value, "tolist") else str(value)


def _place(folder: str | Path) -> Path:
    if not str(folder):
        return runs_root() / BY_HAND
    # A notebook's working directory is notebooks/: a bare name must not make a folder there.
    bare = len(Path(folder).parts) == 1 and not Path(folder).is_absolute()
    return (runs_root() / folder if bare else Path(folder).expanduser()).resolve()


def _maker(name: str) -> str:
    for prefixes, notebook in _MADE_BY:
        if any(part.startswith(prefixes) for part in Path(name).parts):
            return f"notebook {notebook} in this run folder"
    return "the notebook that makes it in this run folder"


def now() -> str:
    """Local time to the second, with its zone."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _device_name(device) -> str:
    if device.type == "cuda":
        import torch

        return torch.cuda.get_device_name(device)
    return f"CPU ({_processor()})"


@cache
def _processor() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that shape a run's numbers; absent packages are left out."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def git_state() -> dict[str, object] | None:
    """Commit and branch of the checkout and whether files differ from it; None outside a git checkout."""
    if not (PROJECT / ".git").exists() or (commit := _git("rev-parse", "HEAD")) is None:
        return None
    changed = _git("status", "--porcelain") or ""
    return {"commit": commit, "branch": _git("rev-parse", "--abbrev-ref", "HEAD"), "changed": bool(changed)}


def _git(*command: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", PROJECT, *command], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _commit_text() -> str:
    state = git_state()
    return f"commit {state['commit'][:9]}{' + changes' if state['changed'] else ''}" if state else "no commit"
