"""The training loop as a generator, its checkpoints, and the step of every stage.

    state = TrainState.of({"student": dit}, lr={"student": 1e-4}, seed=0)
    step = forcing_step(dit, batches, preset.stream, shift=preset.flow.shift)
    for row in fit(step, state, steps=1000, checkpoint=folder): plot(row)

A step is any function `step(state) -> dict` that draws its random numbers from `state.generator` and moves the weights
once. A killed run started again goes on from its last checkpoint and repeats the uninterrupted curve, bit for bit where
the arithmetic is deterministic (on a CPU it is).

On a GPU a small model's step is mostly the host's work. Two settings take it away: `compile` makes a forward and its
loss one graph, and `fit(..., log_every=k)` lets the host run ahead of the device for k steps, since only then does it
read a number back.
"""

import copy
import hashlib
import io
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lingbot_nb.distill import dmd, forcing, gan, parallel, trajectories
from lingbot_nb.distill.consistency import consistency
from lingbot_nb.distill.flow import FewStep
from lingbot_nb.distill.forcing import Info, Velocity, frame_t, given_clean
from lingbot_nb.distill.optim import can_skip, skip_where
from lingbot_nb.distill.record import Gradients, fresh
from lingbot_nb.distill.rollout import Conditions, camera_of, draw_exit, rollout
from lingbot_nb.distill.trajectories import Pair, read_json, write_bytes, write_text
from lingbot_nb.model import masks
from lingbot_nb.model.attention import kernel_mask
from lingbot_nb.model.dit import Time
from lingbot_nb.model.kv_cache import GradCache
from lingbot_nb.model.masks import FrameMask
from lingbot_nb.presets import PATCH, Preset, StreamSettings
from lingbot_nb.world.latents import Batch

Step = Callable[["TrainState"], dict[str, Tensor | float]]
Schedule = Callable[[float], float]
"""Progress in [0, 1] -> factor on the learning rate."""
Precision = Callable[[], AbstractContextManager]
"""Opens the context a forward runs in: `fp32` or `autocast(device)`."""
Compile = Callable[[Callable], Callable]
"""What a step does with the function that holds its forward and loss: `as_it_is` or `one_graph`."""
Record = Callable[[], Gradients]
"""Makes what gets the gradients of one loss: `plainly`, or `lambda: record.Recorded(generators…)` on a GPU."""


class Diverged(RuntimeError):
    """A loss or gradient became nan or inf; the weights were not touched by it."""


# ---- what is trained ------------------------------------------------------------------------------------------------


class Average:
    """An exponential moving average of a module's parameters, kept as a frozen module of its own.

    theta⁻ ← decay · theta⁻ + (1 - decay) · theta after each update; until update `start` it is a plain copy. Buffers
    are copied. After n averaged updates the decay is at most n / (n + 9), so that a short run does not keep the weights
    it started from: 0.999 alone would still hold 30 % of them after 1,200 updates.
    `copied` makes the module that is kept: `sharded.twin` where a deep copy cannot.
    """

    def __init__(
        self,
        module: nn.Module,
        decay: float,
        start: int = 0,
        copied: Callable[[nn.Module], nn.Module] = copy.deepcopy,
    ):
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay {decay} is outside [0, 1): use e.g. 0.99")
        self.module = copied(module).requires_grad_(False).eval()
        self.decay, self.start, self.updates = decay, start, 0
        self._followed: tuple[nn.Module, list[list[Tensor]]] | None = None

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        averaged = max(0, self.updates - self.start)
        decay = min(self.decay, averaged / (averaged + 9)) if self.updates >= self.start else 0.0
        self.updates += 1
        mine, theirs, my_buffers, their_buffers = self._tensors(module)
        torch._foreach_lerp_(mine, theirs, 1 - decay)
        if my_buffers:
            torch._foreach_copy_(my_buffers, their_buffers)

    def _tensors(self, module: nn.Module) -> list[list[Tensor]]:
        # Walking through two modules takes the host longer than the update takes a GPU.
        if self._followed is None or self._followed[0] is not module:
            pair = self.module, module
            self._followed = module, [[*m.parameters()] for m in pair] + [[*m.buffers()] for m in pair]
        return self._followed[1]

    def state_dict(self) -> dict:
        return {"updates": self.updates, "module": self.module.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        self.module.load_state_dict(state["module"])


class Stream:
    """A source of batches whose position goes into the checkpoint.

    Two kinds resume exactly: an iterator whose draws all come from `generator` (its state is saved), and a fixed
    sequence (a fresh iterator is advanced to the saved position). An iterator driven by `TrainState.generator` itself
    needs no Stream.
    """

    def __init__(self, batches: Iterable, generator: torch.Generator | None = None):
        self._batches, self.generator, self.position = iter(batches), generator, 0

    def __iter__(self) -> "Stream":
        return self

    def __next__(self):
        batch = next(self._batches)
        self.position += 1
        return batch

    def state_dict(self) -> dict:
        state = {"position": self.position}
        return state if self.generator is None else {**state, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        if self.generator is not None:
            self.generator.set_state(state["generator"].cpu())
            self.position = state["position"]
            return
        if self.position > state["position"]:
            raise ValueError(f"data is at {self.position}, past the checkpoint's {state['position']}: start it afresh")
        while self.position < state["position"]:
            next(self)


@dataclass
class TrainState:
    """All that a run needs to go on: models, optimizers and averages by role ("teacher", "student", "critic"), the
    generator of all noise, data streams, and how far it has come. `card` is compared on resume (preset, stage, …).

    `ahead` is set by `fit` while the host may run ahead of the device: see `descend`."""

    models: dict[str, nn.Module]
    optimizers: dict[str, Optimizer]
    generator: torch.Generator
    averages: dict[str, Average] = field(default_factory=dict)
    streams: dict[str, Stream] = field(default_factory=dict)
    card: dict[str, str | int | float | bool] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0
    ahead: bool = False

    @classmethod
    def of(
        cls,
        models: dict[str, nn.Module],
        lr: dict[str, float],
        *,
        seed: int = 0,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        average: dict[str, float] | None = None,
        average_start: int = 0,
        streams: dict[str, Stream] | None = None,
        **card: str | int | float | bool,
    ) -> "TrainState":
        """AdamW for each role in `lr`, an EMA for each in `average` (decays), a generator on the models' device that
        all ranks share (`parallel.SharedGenerator`)."""
        if unknown := sorted((lr.keys() | (average or {}).keys()) - models.keys()):
            raise ValueError(f"no model for role {unknown[0]!r}: the models are {', '.join(models)}")
        parameters = {role: [p for p in models[role].parameters() if p.requires_grad] for role in lr}
        device = next(iter(next(iter(models.values())).parameters())).device
        options = dict(betas=betas, weight_decay=weight_decay, fused=True)
        return cls(
            models,
            {role: torch.optim.AdamW(parameters[role], lr[role], **options) for role in lr},
            parallel.shared_generator(device, seed),
            {role: Average(models[role], decay, average_start) for role, decay in (average or {}).items()},
            streams or {},
            card,
        )

    @property
    def _parts(self) -> dict[str, dict[str, Any]]:
        return {
            "models": self.models,
            "optimizers": self.optimizers,
            "averages": self.averages,
            "streams": self.streams,
        }

    def state_dict(self) -> dict:
        parts = {kind: {name: part.state_dict() for name, part in group.items()} for kind, group in self._parts.items()}
        random = {"generator": self.generator.get_state(), "torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            random["cuda"] = torch.cuda.get_rng_state_all()
        return {**parts, "random": random, "card": self.card, "step": self.step, "seconds": self.seconds}

    def load_state_dict(self, state: dict) -> None:
        for kind, group in self._parts.items():
            if group.keys() != state[kind].keys():
                raise ValueError(f"checkpoint holds {kind} {sorted(state[kind])}, this run {sorted(group)}")
        for kind, group in self._parts.items():
            for name, part in group.items():
                part.load_state_dict(state[kind][name])
        self.generator.set_state(state["random"]["generator"])
        torch.set_rng_state(state["random"]["torch"])
        if torch.cuda.is_available() and len(state["random"].get("cuda", ())) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["random"]["cuda"])
        self.step, self.seconds = state["step"], state["seconds"]


# ---- checkpoints ----------------------------------------------------------------------------------------------------

KEEP = 2
"""Checkpoints kept: the newest, and one to fall back on."""


def save_checkpoint(folder: Path | str, state: TrainState) -> Path:
    """Writes `step-00000100.pt`, then its card `step-00000100.json` with sha256 and `state.card`, each by rename; a
    checkpoint without a card does not exist. Keeps the newest two.

    Raises RuntimeError when it cannot be written; earlier checkpoints are then untouched.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"step-{state.step:08d}.pt"
    buffer = io.BytesIO()
    torch.save(state.state_dict(), buffer)
    data = buffer.getvalue()
    _card(file).unlink(missing_ok=True)
    write_bytes(file, data)
    card = {"step": state.step, "seconds": state.seconds, "sha256": hashlib.sha256(data).hexdigest(), **state.card}
    write_text(_card(file), json.dumps(card, indent=1) + "\n")
    for old in checkpoints(folder)[:-KEEP]:
        _card(old).unlink(missing_ok=True)
        old.unlink(missing_ok=True)
    return file


def checkpoints(folder: Path | str) -> list[Path]:
    """Whole checkpoints in a folder, oldest first."""
    files = (card.with_suffix(".pt") for card in sorted(Path(folder).glob("step-*.json")))
    return [file for file in files if file.exists()]


def load_checkpoint(file: Path | str, state: TrainState) -> None:
    """Fills `state` from a checkpoint, tensors only (weights_only=True).

    Raises ValueError when the bytes differ from the card's sha256, or the card from this run's.
    """
    file = Path(file)
    card = read_json(_card(file))
    differing = sorted(k for k, v in state.card.items() if card.get(k) != v)
    if differing:
        said = ", ".join(f"{k} {card.get(k)} instead of {state.card[k]}" for k in differing)
        raise ValueError(f"checkpoint {file} was made with {said}: use another folder or the same settings")
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != card.get("sha256"):
        raise ValueError(
            f"checkpoint {file} does not match its sha256, some bytes changed on disk: delete it "
            f"to go on from the one before, or the folder {file.parent} to start afresh"
        )
    # Optimizers move their tensors to their parameters' device themselves.
    state.load_state_dict(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))


def _card(file: Path) -> Path:
    return file.with_suffix(".json")


def _save_once(folder: Path | str, state: TrainState) -> None:
    if parallel.place()[0] == 0:
        save_checkpoint(folder, state)


@dataclass(frozen=True)
class Store:
    """How checkpoints are kept: `save(folder, state)`, called by every rank; `found(folder)`, the whole ones, oldest
    first; `load(checkpoint, state)`. `sharded.SHARDS` is for models that no rank holds whole. `apart`: ranks with
    generators of their own can share its checkpoints."""

    save: Callable[[Path | str, TrainState], object]
    found: Callable[[Path | str], list[Path]]
    load: Callable[[Path, TrainState], None]
    apart: bool = False


def _found_files(folder: Path | str) -> list[Path]:
    """`checkpoints`; ValueError where those of a sharded network lie in their place: a run that began afresh beside
    them would end by being taken for them."""
    whole = checkpoints(folder)
    if not whole and (others := sorted(Path(folder).glob("step-*/card.json"))):
        raise ValueError(
            f"{others[-1].parent} is a checkpoint of a sharded network: pass fit store=sharded.SHARDS, or use another "
            "folder"
        )
    return whole


FILES = Store(_save_once, _found_files, load_checkpoint)
"""One file a checkpoint, written by rank 0."""


def drawn_anew(*generators: torch.Generator) -> Store:
    """`FILES` for ranks that draw apart: all take rank 0's weights, and each rank's generators, the state's and these,
    go on by `parallel.draw_on`."""

    def load(file: Path, state: TrainState) -> None:
        seeds = [generator.initial_seed() for generator in (state.generator, *generators)]
        load_checkpoint(file, state)
        for generator, seed in zip((state.generator, *generators), seeds, strict=True):
            parallel.draw_on(generator, seed, state.step)

    return Store(_save_once, _found_files, load, apart=True)


# ---- the loop -------------------------------------------------------------------------------------------------------


def constant(progress: float) -> float:
    """No schedule."""
    return 1.0


def warmup_decay(warmup: float = 0.02, decay: float = 0.35, floor: float = 0.0) -> Schedule:
    """Linear from 0 over the first `warmup` of the run, flat, then linear to `floor` over the last `decay` of it."""
    if warmup < 0 or decay < 0 or warmup + decay > 1:
        raise ValueError(f"warm-up {warmup} and decay {decay} do not fit in one run: their sum must be at most 1")

    def factor(progress: float) -> float:
        rise = min(1.0, progress / warmup) if warmup else 1.0
        fall = min(1.0, (1 - progress) / decay) if decay else 1.0
        return rise * (floor + (1 - floor) * max(0.0, fall))

    return factor


def fit(
    step: Step,
    state: TrainState,
    *,
    steps: int | None = None,
    seconds: float | None = None,
    checkpoint: Path | str | None = None,
    every: int = 100,
    schedule: Schedule = constant,
    metrics: Path | str | None = None,
    log_every: int = 1,
    skips: int = 0,
    store: Store = FILES,
) -> Iterator[dict[str, float]]:
    """Trains until `steps` steps or `seconds` seconds (of training, over all restarts) have passed, whichever is first.

    Yields a row per step: "step" (1, 2, …), "seconds", "lr" and what the step returned, as numbers. With a `checkpoint`
    folder it resumes from the newest checkpoint there, saves every `every` steps, at the end, and when the caller stops
    iterating. `metrics` is a file of JSON lines, cut back to the resumed step first. `schedule` scales every learning
    rate by progress = the larger of the step and the time fraction, taken at the middle of the step.

    With `log_every` k > 1 rows come k at a time, read from the device together; the state is then up to k - 1 steps
    ahead of the row at hand. Of several ranks, which must all call this, rank 0 writes; a checkpoint needs a
    `parallel.SharedGenerator`. `store` is how checkpoints are kept.

    Raises Diverged (nothing is saved after it) where a step met nan or inf, or returned a "…loss" or "…grad" that is.
    The first `skips` such steps are passed over instead, which moves no weight (`descend`): their rows say "skipped".
    """
    _check_fit(state, steps, seconds, checkpoint, log_every, store)
    saved = resume(state, checkpoint, store)
    log = _MetricsLog(metrics if parallel.place()[0] == 0 else None, state.step)
    rates = {role: [group["lr"] for group in optimizer.param_groups] for role, optimizer in state.optimizers.items()}
    clock, waiting, wrong = _Clock(state), [], None
    state.ahead = log_every > 1
    try:
        while not wrong and not _finished(state, steps, seconds):
            factor = schedule(_progress(state, steps, seconds))
            _set_rates(state, rates, factor)
            with clock:
                row = _attempted(step, state, skips, checkpoint, store)
            state.step += 1
            clock.tick(state)
            waiting.append({"step": state.step, "seconds": state.seconds, "lr": factor, **row})
            due = checkpoint is not None and state.step % every == 0
            if len(waiting) < log_every and not due and not _finished(state, steps, seconds):
                continue
            with clock:
                rows, wrong = _settled(waiting, skips)
            skips -= sum("skipped" in row for row in rows)
            waiting.clear()
            for row in rows:
                log.add(row)
            if due and not wrong:
                saved = _save(checkpoint, state, rates, store)
            yield from rows
        if wrong:
            raise _diverged(*wrong, checkpoint, store)
    except GeneratorExit:
        # Closed at a yield, between two steps: the state is whole. An exception inside a step is another matter.
        if checkpoint is not None and saved != state.step and not wrong:
            _save(checkpoint, state, rates, store)
        raise
    finally:
        state.ahead = False
        _set_rates(state, rates, 1.0)
        log.close()
    if checkpoint is not None and saved != state.step:
        _save(checkpoint, state, rates, store)


def _check_fit(
    state: TrainState,
    steps: int | None,
    seconds: float | None,
    checkpoint: Path | str | None,
    log_every: int,
    store: Store,
) -> None:
    if steps is None and seconds is None:
        raise ValueError("fit has no end: give steps, seconds or both")
    if log_every < 1:
        raise ValueError(f"log_every {log_every} is below 1: use 1 to read every row at once")
    apart = parallel.several() and not isinstance(state.generator, parallel.SharedGenerator)
    if checkpoint is not None and apart and not store.apart:
        raise ValueError("ranks with generators of their own cannot share a checkpoint: use parallel.shared_generator")


def resume(state: TrainState, checkpoint: Path | str | None, store: Store = FILES) -> int | None:
    """Loads the newest checkpoint of a folder into `state`; the step it stands at, None where there is none."""
    found = store.found(checkpoint) if checkpoint is not None else []
    if not found:
        return None
    store.load(found[-1], state)
    return state.step


def _save(checkpoint: Path | str, state: TrainState, rates: dict, store: Store) -> int:
    # A checkpoint keeps the unscaled rates: the schedule is applied anew from the step it resumes at.
    scaled = {role: [g["lr"] for g in state.optimizers[role].param_groups] for role in rates}
    _set_rates(state, rates, 1.0)
    store.save(checkpoint, state)
    _set_rates(state, scaled, 1.0)
    return state.step


def _set_rates(state: TrainState, rates: dict[str, list[float]], factor: float) -> None:
    for role, values in rates.items():
        for group, value in zip(state.optimizers[role].param_groups, values, strict=True):
            group["lr"] = value * factor


def _finished(state: TrainState, steps: int | None, seconds: float | None) -> bool:
    return (steps is not None and state.step >= steps) or (seconds is not None and state.seconds >= seconds)


def _progress(state: TrainState, steps: int | None, seconds: float | None) -> float:
    by_steps = 0.0 if steps is None else (state.step + 0.5) / steps
    by_time = 0.0 if seconds is None else state.seconds / seconds
    return min(1.0, max(by_steps, by_time))


class _Clock:
    """Seconds of training. Several ranks go by rank 0's clock, or one would stop while the others wait for its
    gradients: it is asked in the first steps and then every tenth; between them all assume its last pace."""

    EVERY = 10

    def __init__(self, state: TrainState):
        self.device, self.own, self.open = state.generator.device, state.seconds, 0.0
        self.ticks, self.asked, self.pace = 0, 0, 0.0
        self.agreed = state.seconds

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_) -> None:
        self.open += time.perf_counter() - self.began

    def tick(self, state: TrainState) -> None:
        """Adds the time since the last tick to the state."""
        passed, self.open = self.open, 0.0
        if not parallel.several():
            state.seconds += passed
            return
        self.own, self.ticks = self.own + passed, self.ticks + 1
        if self.ticks > self.EVERY and self.ticks % self.EVERY:
            state.seconds += self.pace
            return
        now = parallel.agree(self.own, self.device)
        self.pace = (now - self.agreed) / (self.ticks - self.asked)
        self.agreed, self.asked = now, self.ticks
        state.seconds = max(state.seconds, now)


def _attempted(
    step: Step, state: TrainState, skips: int, checkpoint: Path | str | None, store: Store
) -> dict[str, float | Tensor]:
    try:
        return step(state)
    except Diverged as error:
        if skips:
            return {"loss": math.nan}
        raise _diverged(state.step + 1, str(error), checkpoint, store) from error


def _settled(
    waiting: list[dict[str, float | Tensor]], skips: int
) -> tuple[list[dict[str, float]], tuple[int, str] | None]:
    """The rows as numbers, the first `skips` that are not finite as skipped; and (step, what is wrong) of the first
    after these that is not: that row and later ones are left out."""
    rows = []
    for row in _numbers(waiting):
        # `descend` looks before it leaps, or leaps nowhere; a step written elsewhere may not.
        if not (fault := _fault(row)):
            rows.append(row)
        elif skips:
            skips -= 1
            rows.append({name: row[name] for name in ("step", "seconds", "lr")} | {"skipped": 1})
        else:
            return rows, (row["step"], fault)
    return rows, None


def _fault(row: dict[str, float]) -> str:
    """'' or which loss or gradient of a row is not finite."""
    wrong = (n for n, value in row.items() if n.endswith(("loss", "_grad")) and not math.isfinite(value))
    return next((f"{name} is {row[name]}" for name in wrong), "")


def _numbers(rows: list[dict[str, float | Tensor]]) -> list[dict[str, float]]:
    """All tensors of all rows as numbers, by one transfer for each dtype."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for row in rows:
        for value in row.values():
            if isinstance(value, Tensor):
                found.setdefault((value.device, value.dtype), []).append(value.detach().reshape(()))
    read = {kind: iter(torch.stack(values).tolist()) for kind, values in found.items()}

    def number(value: float | Tensor) -> float:
        if isinstance(value, Tensor):
            return float(next(read[value.device, value.dtype]))
        return value if isinstance(value, int) else float(value)

    return [{name: number(value) for name, value in row.items()} for row in rows]


def _diverged(step: int, what: str, checkpoint: Path | str | None, store: Store) -> Diverged:
    found = store.found(checkpoint) if checkpoint is not None else []
    kept = f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint to go back to"
    return Diverged(f"step {step}: {what}; {kept}; lower the learning rate or check the data")


class _MetricsLog:
    """Appends rows as JSON lines; rows past the step that a run resumes at are dropped first."""

    def __init__(self, file: Path | str | None, step: int):
        self._file = None
        if file is None:
            return
        file = Path(file)
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            kept = [line for line in file.read_text().splitlines() if _line_step(line) <= step]
            write_text(file, "".join(line + "\n" for line in kept))
        self._file = file.open("a", buffering=1)

    def add(self, row: dict[str, float]) -> None:
        if self._file is not None:
            # JSON has no nan; a run log must stay readable by any parser.
            row = {name: value if math.isfinite(value) else None for name, value in row.items()}
            self._file.write(json.dumps(row) + "\n")

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _line_step(line: str) -> float:
    # A kill may leave half a line: it belongs to no step.
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf


# ---- one update -----------------------------------------------------------------------------------------------------


def fp32() -> AbstractContextManager:
    """Plain fp32 forwards."""
    return nullcontext()


def autocast(device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> Precision:
    """Forwards under autocast: fp32 weights, `dtype` matrix products."""
    kind = torch.device(device).type
    # Without the weight cache each use casts anew, so that the gradients of a rollout's chunks add up in fp32.
    return lambda: torch.autocast(kind, dtype, cache_enabled=False)


def as_it_is(function: Callable) -> Callable:
    """No compiler."""
    return function


def one_graph(function: Callable) -> Callable:
    """torch.compile of forward and loss together, for one size of batch: a few launches instead of thousands.

    Compiling takes a minute or so for 8 layers; it pays where the host is slower than the device.
    """
    return torch.compile(function, dynamic=False)


def plainly() -> Gradients:
    """No recording: every step runs its loss anew."""
    return fresh


def descend(
    state: TrainState,
    role: str,
    loss: Callable[[], tuple[Tensor, Info]],
    *,
    clip: float = 1.0,
    accumulate: int = 1,
    precision: Precision = fp32,
    gradients: Gradients = fresh,
) -> dict[str, float | Tensor]:
    """One optimizer step of `role` on the mean of `accumulate` calls of `loss`, gradients clipped to norm `clip`.

    Returns "<role>_loss", "<role>_grad" (norm before clipping) and the last call's info, means over ranks; updates the
    role's average. Raises Diverged, before any weight moves, when the loss or the norm is nan or inf. While
    `state.ahead`, an optimizer that can skips such an update on the device by itself, and the row tells `fit`, which
    raises once it has read it. `gradients` runs the loss and its backward, or replays them (`record.Recorded`).
    """
    optimizer = state.optimizers[role]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def careful() -> tuple[Tensor, Info]:
        with precision():
            return loss()

    total, info = gradients(parameters, careful, accumulate)
    total, *values = parallel.average_gradients(parameters, [total, *info.values()])
    norm = parallel.clip_gradients(parameters, clip)
    if state.ahead and can_skip(optimizer) and not parallel.sharded(parameters):
        bad = ~(total.isfinite() & norm.isfinite())
        skip_where(optimizer, bad.to(torch.float32))
    else:
        _check_finite(role, total, norm, optimizer)
        skip_where(optimizer, None)
    optimizer.step()
    if role in state.averages:
        state.averages[role].update(state.models[role])
    row = {f"{role}_loss": total, f"{role}_grad": norm}
    return row | {f"{role}_{name}": value for name, value in zip(info, values, strict=True)}


def _check_finite(role: str, loss: Tensor, norm: Tensor, optimizer: Optimizer) -> None:
    # One transfer from the device for both.
    value, grad = torch.stack([loss.double(), norm.double()]).tolist()
    if not (math.isfinite(value) and math.isfinite(grad)):
        optimizer.zero_grad(set_to_none=True)
        raise Diverged(f"the {role}'s loss is {value} with gradient norm {grad}")


@dataclass(frozen=True, eq=False)
class ReadyMask:
    """A FrameMask in the attention kernel's own form: a compiler meets finished tensors and not their making."""

    name: str
    frames: tuple[int, int]
    spans: list
    form: Any

    def ranges(self) -> list:
        return self.spans

    def dense(self, tokens_per_frame: int, device: torch.device) -> Tensor:
        return self.form

    def block_mask(self, tokens_per_frame: int, device: torch.device):
        return self.form


@lru_cache(maxsize=16)
def _ready(
    make: Callable, settings: StreamSettings, frames: int, tokens_per_frame: int, device: torch.device
) -> ReadyMask:
    mask = make(settings.chunk_lengths(frames), settings.window, settings.sink)
    return ReadyMask(mask.name, mask.frames, mask.ranges(), kernel_mask(mask, tokens_per_frame, device))


def _mask_for(make: Callable, batch: Batch, settings: StreamSettings) -> ReadyMask:
    frames, height, width = batch.latents.shape[2:]
    return _ready(make, settings, frames, height * width // (PATCH[1] * PATCH[2]), batch.latents.device)


def forced_mask(batch: Batch, settings: StreamSettings) -> ReadyMask:
    """The teacher-forcing mask of `settings` over [clean | noisy] of a batch's clips."""
    return _mask_for(masks.teacher_forcing, batch, settings)


def causal_mask(batch: Batch, settings: StreamSettings) -> ReadyMask:
    """The block-causal mask of `settings` over a batch's clips."""
    return _mask_for(masks.block_causal, batch, settings)


def bind(
    dit, batch: Batch, *, mask: FrameMask | ReadyMask | None = None, copies: int = 1, checkpoint: bool = False
) -> Velocity:
    """A DiT with a batch's text, camera and condition as a velocity of (latent, t).

    `copies` = 2 is for [clean | noisy]: both halves get the same camera, condition and positions. Text and camera are
    computed here, once for all calls; without gradient the camera goes all the way to each layer's modulation.
    """
    frames = batch.latents.shape[2]
    inputs = dict(
        condition_BCFHW=torch.cat([batch.condition] * copies, 2),
        text=dit.text(batch.context),
        camera=_repeated(camera_of(dit, batch.control, grad=torch.is_grad_enabled()), copies),
        mask=mask,
        positions=None if copies == 1 else [*range(frames)] * copies,
        checkpoint=checkpoint,
    )

    def velocity(latent_BCFHW: Tensor, t: Tensor | float | Time) -> Tensor:
        if not isinstance(t, Time):
            t = frame_t(t, len(latent_BCFHW), latent_BCFHW.shape[2], latent_BCFHW.device)
        return dit(latent_BCFHW, t, **inputs)

    return velocity


def _repeated(camera, copies: int):
    if camera is None or copies == 1:
        return camera
    if isinstance(camera, Tensor):
        return torch.cat([camera] * copies, 1)
    return [tuple(torch.cat([part] * copies, 1) for part in film) for film in camera]


def bind_forced(dit, batch: Batch, settings: StreamSettings, *, checkpoint: bool = False) -> Velocity:
    """A DiT under the teacher-forcing mask of `settings`: a velocity of 2F frames, [clean | noisy]."""
    return bind(dit, batch, mask=forced_mask(batch, settings), copies=2, checkpoint=checkpoint)


def bind_causal(dit, batch: Batch, settings: StreamSettings, *, checkpoint: bool = False) -> Velocity:
    """A DiT under the block-causal mask of `settings`: a velocity of F frames, their history as noisy as it comes."""
    return bind(dit, batch, mask=causal_mask(batch, settings), checkpoint=checkpoint)


def whole(dit, compile: Compile = as_it_is) -> Callable[[Batch], Velocity]:
    """A DiT as a function from a batch to its bidirectional velocity, text and camera inside what is compiled."""

    @compile
    def velocity(batch: Batch, latent_BCFHW: Tensor, t: Tensor) -> Tensor:
        return bind(dit, batch)(latent_BCFHW, t)

    return lambda batch: partial(velocity, batch)


def whole_forced(
    dit, settings: StreamSettings, compile: Compile = as_it_is, *, checkpoint: bool = False
) -> Callable[[Batch], Velocity]:
    """The same under the teacher-forcing mask: a velocity of the noisy half, its past the batch's own clean clips."""

    @compile
    def velocity(batch: Batch, mask: ReadyMask, latent_BCFHW: Tensor, t: Tensor) -> Tensor:
        both = bind(dit, batch, mask=mask, copies=2, checkpoint=checkpoint)
        return given_clean(both, batch.latents)(latent_BCFHW, t)

    return lambda batch: partial(velocity, batch, forced_mask(batch, settings))


def known_frames(settings: StreamSettings) -> int:
    """Leading frames that a student is given, not asked for: the start image's latent when `image_first`."""
    return 1 if settings.image_first else 0


# ---- the stages -----------------------------------------------------------------------------------------------------

Unconditional = Callable[[Batch], Batch]
"""A batch -> the same batch without what guidance amplifies (empty prompt; the camera stays)."""


Loss = Callable[[Batch, torch.Generator], tuple[Tensor, Info]]
"""(batch, generator) -> loss and what to log."""


def loss_step(
    role: str,
    batches: Iterator[Batch],
    loss: Loss,
    *,
    clip: float = 1.0,
    accumulate: int = 1,
    precision: Precision = fp32,
) -> Step:
    """A step of any loss: one update of `role` on loss(batch, generator). For the families without a stage of their own
    (`scm`, `meanflow`, the heads of `gan`) and for the reader's."""

    def step(state: TrainState) -> dict:
        options = dict(clip=clip, accumulate=accumulate, precision=precision)
        return descend(state, role, lambda: loss(next(batches), state.generator), **options)

    return step


def together(*steps: Step) -> Step:
    """Several updates as one step, in this order, their rows joined."""

    def step(state: TrainState) -> dict:
        row: dict[str, Tensor | float] = {}
        for part in steps:
            row |= part(state)
        return row

    return step


def teacher_step(
    dit,
    batches: Iterator[Batch],
    *,
    shift: float,
    clip: float = 1.0,
    accumulate: int = 1,
    precision: Precision = fp32,
    checkpoint: bool = False,
    compile: Compile = as_it_is,
    record: Record = plainly,
) -> Step:
    """Stage 0: the bidirectional teacher by flow matching (role "teacher")."""

    @compile
    def loss_at(batch: Batch, noise: forcing.Noise) -> tuple[Tensor, Info]:
        return forcing.velocity_loss(bind(dit, batch, checkpoint=checkpoint), batch.latents, *noise)

    options = dict(clip=clip, accumulate=accumulate, precision=precision, gradients=record())

    def step(state: TrainState) -> dict:
        def loss():
            batch = next(batches)
            return loss_at(batch, forcing.clip_noise(batch.latents, shift=shift, generator=state.generator))

        return descend(state, "teacher", loss, **options)

    return step


def forcing_step(
    dit,
    batches: Iterator[Batch],
    settings: StreamSettings,
    *,
    shift: float,
    context_noise: float = 0.0,
    clip: float = 1.0,
    accumulate: int = 1,
    precision: Precision = fp32,
    checkpoint: bool = False,
    compile: Compile = as_it_is,
    record: Record = plainly,
) -> Step:
    """Stage 1: the autoregressive many-step student by teacher forcing (role "student")."""

    @compile
    def loss_at(batch: Batch, mask: ReadyMask, noise: forcing.ForcedNoise) -> tuple[Tensor, Info]:
        velocity = bind(dit, batch, mask=mask, copies=2, checkpoint=checkpoint)
        return forcing.forced_loss(velocity, batch.latents, noise)

    options = dict(clip=clip, accumulate=accumulate, precision=precision, gradients=record())

    def step(state: TrainState) -> dict:
        def loss():
            batch = next(batches)
            noise = forcing.forced_noise(
                batch.latents,
                settings.chunk_lengths(batch.latents.shape[2]),
                shift=shift,
                generator=state.generator,
                known=known_frames(settings),
                context_noise=context_noise,
            )
            return loss_at(batch, forced_mask(batch, settings), noise)

        return descend(state, "student", loss, **options)

    return step


def keeping_step(
    dit,
    before,
    batches: Iterator[Batch],
    settings: StreamSettings,
    *,
    shift: float,
    context_noise: float = 0.0,
    weight: float = 1.0,
    clip: float = 1.0,
    accumulate: int = 1,
    precision: Precision = fp32,
    checkpoint: bool = False,
) -> Step:
    """Beside a step that teaches something new: holds the student to what it was `before`, a frozen network of its
    kind, on real walks (`forcing.kept_loss` times `weight`; role "student", row "kept_loss")."""
    options = dict(clip=clip, accumulate=accumulate, precision=precision)

    def step(state: TrainState) -> dict:
        def loss():
            batch = next(batches)
            noise = forcing.forced_noise(
                batch.latents,
                settings.chunk_lengths(batch.latents.shape[2]),
                shift=shift,
                generator=state.generator,
                known=known_frames(settings),
                context_noise=context_noise,
            )
            velocity, old = (bind_forced(net, batch, settings, checkpoint=checkpoint) for net in (dit, before))
            value, info = forcing.kept_loss(velocity, old, batch.latents, noise)
            return weight * value, info

        row = descend(state, "student", loss, **options)
        return {name.replace("student", "kept"): value for name, value in row.items()}

    return step


def diffusion_forcing_step(
    dit,
    batches: Iterator[Batch],
    settings: StreamSettings,
    *,
    shift: float,
    clip: float = 1.0,
    accumulate: int = 1,
    precision: Precision = fp32,
    checkpoint: bool = False,
    compile: Compile = as_it_is,
    record: Record = plainly,
) -> Step:
    """Stage 1, the other way: diffusion forcing under the block-causal mask (role "student")."""

    @compile
    def loss_at(batch: Batch, mask: ReadyMask, noise: forcing.Noise) -> tuple[Tensor, Info]:
        return forcing.velocity_loss(bind(dit, batch, mask=mask, checkpoint=checkpoint), batch.latents, *noise)

    options = dict(clip=clip, accumulate=accumulate, precision=precision, gradients=record())

    def step(state: TrainState) -> dict:
        def loss():
            batch = next(batches)
            noise = forcing.chunk_noise(
                batch.latents,
                settings.chunk_lengths(batch.latents.shape[2]),
                shift=shift,
                generator=state.generator,
                known=known_frames(settings),
            )
            return loss_at(batch, causal_mask(batch, settings), noise)

        return descend(state, "student", loss, **options)

    return step


def ode_regression_step(
    student,
    pairs: Iterator[Pair],
    settings: StreamSettings,
    sigmas: Tensor,
    *,
    clean_context: bool = True,
    clip: float = 1.0,
    accumulate: int = 1,
    precision: Precision = fp32,
    checkpoint: bool = False,
    record: Record = plainly,
) -> Step:
    """Stage 2a: regression onto the ends of stored trajectories (role "student"); `sigmas` = `Schedule.sigmas`.

    `clean_context`: Causal-Forcing's, the past being the real clip (for pairs of the causal teacher). Without it
    CausVid's, under the block-causal mask (for pairs of the bidirectional teacher).
    """
    options = dict(clip=clip, accumulate=accumulate, precision=precision, gradients=record())

    def step(state: TrainState) -> dict:
        def loss():
            pair = next(pairs)
            batch = pair.batch
            lengths = settings.chunk_lengths(batch.latents.shape[2])
            shared = dict(generator=state.generator, start=batch.latents[:, :, : known_frames(settings)])
            if clean_context:
                velocity = bind_forced(student, batch, settings, checkpoint=checkpoint)
                regress, clips = trajectories.clean_context_regression, (pair.states, batch.latents)
            else:
                velocity = bind_causal(student, batch, settings, checkpoint=checkpoint)
                regress, clips = trajectories.block_causal_regression, (pair.states,)
            return regress(velocity, *clips, sigmas, lengths, **shared)

        return descend(state, "student", loss, **options)

    return step


def consistency_step(
    student,
    teacher,
    batches: Iterator[Batch],
    settings: StreamSettings,
    sigmas: Tensor,
    *,
    guidance: float = 1.0,
    unconditional: Unconditional | None = None,
    clip: float = 1.0,
    accumulate: int = 1,
    precision: Precision = fp32,
    checkpoint: bool = False,
    compile: Compile = as_it_is,
    record: Record = plainly,
) -> Step:
    """Stage 2b: causal consistency distillation (role "student", whose average is the target theta⁻).

    `teacher` is the frozen teacher-forced causal model, guided to u + w·(c - u) with w = `guidance`; `sigmas` the
    discrete levels, `flow.sigma_grid(48, shift)`.
    """

    forced = partial(whole_forced, settings=settings, compile=compile, checkpoint=checkpoint)
    of_student, of_teacher = forced(student), forced(teacher)
    of_average = lru_cache(maxsize=1)(forced)

    options = dict(clip=clip, accumulate=accumulate, precision=precision, gradients=record())

    def step(state: TrainState) -> dict:
        if "student" not in state.averages:
            raise ValueError('consistency needs the student\'s average: TrainState.of(..., average={"student": 0.99})')

        def loss():
            batch = next(batches)
            plain = None if unconditional is None else of_teacher(unconditional(batch))
            return consistency(
                of_student(batch),
                of_average(state.averages["student"].module)(batch),
                forcing.guided(of_teacher(batch), plain, guidance),
                batch.latents,
                sigmas,
                generator=state.generator,
                known=known_frames(settings),
            )

        return descend(state, "student", loss, **options)

    return step


def causal_teacher(dit, settings: StreamSettings, schedule: trajectories.Schedule) -> Callable[[Batch, Tensor], Tensor]:
    """`trajectory` of `make_pairs` for the causal teacher: (batch, noise) -> states, past clean."""

    @torch.no_grad()
    def trajectory(batch: Batch, noise: Tensor) -> Tensor:
        velocity, known = bind_forced(dit, batch, settings), known_frames(settings)
        return trajectories.causal_trajectory(velocity, noise.to(batch.latents), batch.latents, schedule, known)

    return trajectory


def bidirectional_teacher(
    dit,
    schedule: trajectories.Schedule,
    *,
    guidance: float = 1.0,
    unconditional: Unconditional | None = None,
) -> Callable[[Batch, Tensor], Tensor]:
    """`trajectory` of `make_pairs` for the bidirectional teacher: (batch, noise) -> states."""

    @torch.no_grad()
    def trajectory(batch: Batch, noise: Tensor) -> Tensor:
        plain = None if unconditional is None else bind(dit, unconditional(batch))
        velocity = forcing.guided(bind(dit, batch), plain, guidance)
        return trajectories.teacher_trajectory(velocity, noise.to(batch.latents), schedule)

    return trajectory


# ---- distribution matching ------------------------------------------------------------------------------------------

MakeCache = Callable[[Batch], Any]
"""A batch -> an empty cache of its batch size (`GradCache`) for one rollout."""


def grad_caches(preset: Preset, settings: StreamSettings | None = None) -> MakeCache:
    """Caches for rollouts with gradients under a preset's stream settings, or others, where the batch lies."""
    options = preset.model, settings or preset.stream, preset.shape
    return lambda batch: GradCache(*options, batch=len(batch), device=batch.latents.device)


class MakeClip(Protocol):
    """A source of the student's clips B C F h w, with gradient where the caller has it enabled, each beside the batch
    that says what it shows: the one it was made from, or that of the part of it which is handed out (`long`)."""

    def draw(self, generator: torch.Generator) -> int:
        """What the host must know before the next clip is made, the same on all ranks: clips of one draw run the same
        operations, which is what makes them fit for a recording."""

    def __call__(self, batch: Batch, generator: torch.Generator, drawn: int | None = None) -> tuple[Batch, Tensor]:
        """A clip and its batch; `drawn` is `draw`'s, drawn here where it is None."""


Match = Callable[..., tuple[Tensor, Info]]
"""The student's loss on its clip: `dmd.distribution_matching`, or what takes the same arguments (`sid.score_identity`,
`f_distill.f_distribution_matching` with its ratio and divergence bound)."""


@dataclass(frozen=True)
class OwnRollout:
    """Self-Forcing's clips: the student walks through its own cache, with one exit step drawn for all chunks.

    Chunks before frame `grad_from` carry no gradient; the start image's frame is given when `image_first`.
    """

    student: Any
    settings: StreamSettings
    steps: Sequence[FewStep]
    make_cache: MakeCache
    grad_from: int = 0
    checkpoint: bool = False

    def draw(self, generator: torch.Generator) -> int:
        """The exit step."""
        return draw_exit(self.steps, generator)

    def __call__(self, batch: Batch, generator: torch.Generator, drawn: int | None = None) -> tuple[Batch, Tensor]:
        known = known_frames(self.settings)
        chunks = rollout(
            self.student,
            forcing.gaussian(batch.latents, generator),
            self.steps,
            conditions=Conditions(self.student.text(batch.context), batch.control, batch.condition),
            cache=self.make_cache(batch),
            settings=self.settings,
            generator=generator,
            start=batch.latents[:, :, :known] if known else None,
            exit_step=self.draw(generator) if drawn is None else drawn,
            grad_from=self.grad_from,
            checkpoint=self.checkpoint,
            write_last=False,
        )
        return batch, torch.cat(list(chunks), 2)


@dataclass(frozen=True)
class NoisyHistory:
    """CausVid's clips: one block-causal pass over real latents, each chunk noised to a random level of the list."""

    student: Any
    settings: StreamSettings
    steps: Sequence[FewStep]
    checkpoint: bool = False

    def draw(self, generator: torch.Generator) -> int:
        """Nothing: all clips run the same operations."""
        return 0

    def __call__(self, batch: Batch, generator: torch.Generator, drawn: int | None = None) -> tuple[Batch, Tensor]:
        velocity = bind_causal(self.student, batch, self.settings, checkpoint=self.checkpoint)
        lengths = self.settings.chunk_lengths(batch.latents.shape[2])
        sigmas = [step.sigma for step in self.steps]
        known = known_frames(self.settings)
        clip = dmd.noisy_history_clip(velocity, batch.latents, sigmas, lengths, generator=generator, known=known)
        return batch, clip


class LastClips:
    """The student's last clips and their batches, kept in the same tensors, so that a recording may read them.

    `slots` of them, one for each of an update's accumulated losses: they are filled and read in turn, so that the
    critic meets all clips of the student's update and not the last one several times.
    """

    def __init__(self, slots: int = 1):
        self._kept: list[tuple[Batch, Tensor] | None] = [None] * slots
        self._filled = self._read = 0

    def __bool__(self) -> bool:
        return None not in self._kept

    def get(self) -> tuple[Batch, Tensor]:
        """The next slot's."""
        self._read += 1
        return self._kept[(self._read - 1) % len(self._kept)]

    @torch.no_grad()
    def put(self, batch: Batch, clips: Tensor) -> None:
        """Into the next slot."""
        slot = self._filled % len(self._kept)
        self._filled += 1
        if self._kept[slot] is None:
            self._kept[slot] = Batch(*(t.clone() for t in batch.tensors)), clips.detach().clone()
            return
        kept, old = self._kept[slot]
        for mine, new in zip((*kept.tensors, old), (*batch.tensors, clips), strict=True):
            mine.copy_(new)


def dmd_step(
    make_clip: MakeClip,
    critic,
    teacher,
    batches: Iterator[Batch],
    settings: StreamSettings,
    *,
    shift: float,
    ratio: int = 5,
    critic_first: int = 0,
    reuse: bool = False,
    known: int | None = None,
    match: Match = dmd.distribution_matching,
    guidance: float = 1.0,
    unconditional: Unconditional | None = None,
    clip: float = 10.0,
    accumulate: int = 1,
    precision: Precision = fp32,
    checkpoint: bool = False,
    compile: Compile = as_it_is,
    record: Record = plainly,
) -> Step:
    """Stage 3: distribution matching on the clips of `OwnRollout` or `NoisyHistory` (roles "student" and "critic").

    Every step updates the critic; every `ratio`-th step updates the student first. Ratio 5 therefore means 5 critic
    updates to 1 of the student, and 600 steps are 120 student updates (Self-Forcing's way of counting). The first
    `critic_first` steps are the critic's alone. Teacher and critic are bidirectional; the teacher is guided to
    u + w·(c - u), w = `guidance`; student and critic never are. `reuse` lets the critic learn from the student's last
    clips at fresh noise levels instead of rolling out anew: a rollout costs far more than a critic's update. `known`
    leading frames of a clip are given and carry no loss; None means those of `settings`.
    Rows carry `dmd.vital_signs` of the student's clips, which `report.health` reads.
    """
    if ratio < 1:
        raise ValueError(f"ratio {ratio} is below 1: use 5 for five critic updates to one of the student")
    known = known_frames(settings) if known is None else known
    last = LastClips(accumulate)
    of_teacher, of_critic = whole(teacher, compile), whole(critic, compile)
    # Clips of different draws are different operations: each has a recording of its own.
    for_student, for_critic = defaultdict(record), defaultdict(record)

    @compile
    def critic_loss_at(batch: Batch, x: Tensor, noise: forcing.Noise) -> tuple[Tensor, Info]:
        return forcing.velocity_loss(bind(critic, batch, checkpoint=checkpoint), x, *noise)

    def made(state: TrainState, drawn: int) -> tuple[Batch, Tensor]:
        batch, x = make_clip(next(batches), state.generator, drawn)
        if reuse:
            last.put(batch, x)
        return batch, x

    def student_loss(state: TrainState, drawn: int) -> tuple[Tensor, Info]:
        batch, x = made(state, drawn)
        plain = None if unconditional is None else of_teacher(unconditional(batch))
        shared = dict(shift=shift, generator=state.generator, known=known)
        shared |= dict(unconditional=plain, guidance=guidance)
        loss, info = match(x, of_teacher(batch), of_critic(batch), **shared)
        return loss, info | dmd.vital_signs(x, batch.latents)

    def critic_loss(state: TrainState, drawn: int | None) -> tuple[Tensor, Info]:
        with torch.no_grad():
            batch, x = last.get() if drawn is None else made(state, drawn)
        return critic_loss_at(batch, x, dmd.critic_noise(x, shift=shift, generator=state.generator, known=known))

    def step(state: TrainState) -> dict:
        row = {}
        options = dict(clip=clip, accumulate=accumulate, precision=precision)
        if state.step >= critic_first and (state.step - critic_first) % ratio == 0:
            drawn = make_clip.draw(state.generator)
            loss = partial(student_loss, state, drawn)
            row |= descend(state, "student", loss, gradients=for_student[drawn], **options)
        alone = state.step < critic_first and state.step % ratio == 0
        drawn = None if reuse and last and not alone else make_clip.draw(state.generator)
        loss = partial(critic_loss, state, drawn)
        return row | descend(state, "critic", loss, gradients=for_critic[drawn], **options)

    return step


def heads_step(
    heads: gan.Heads,
    make_clip: MakeClip,
    teacher,
    batches: Iterator[Batch],
    *,
    shift: float,
    r1: float = 0.0,
    precision: Precision = fp32,
    **options,
) -> Step:
    """The discriminator beside stage 3 (role "heads"): the student's clips against their batches' real ones, on the
    tokens of all layers of the frozen `teacher`. Goes before `dmd_step` by `together`, whose student then takes
    `gan.with_adversary` as its match. `options` are `loss_step`'s.
    """

    def loss(batch: Batch, generator: torch.Generator) -> tuple[Tensor, Info]:
        with torch.no_grad():
            batch, x = make_clip(batch, generator)
        judge = gan.on_features(heads, bind(teacher, batch), teacher.blocks)
        return gan.discriminator_loss(judge, x, batch.latents, shift=shift, generator=generator, r1=r1)

    return loss_step("heads", batches, loss, precision=precision, **options)
