"""The distillation methods' claims, tested on the tiny world: one start, one change at a time, several seeds.

    python -m lingbot_nb.report.claims --data clips --weights weights --out papermill_runs/claims --seeds 3

The folder of weights holds tokenizer, bidirectional teacher and causal model (`distill.recipe` makes all three). An
arm is a way from the causal model to a few-step student: how the student starts (`Start`), whether distribution
matching follows and on which clips, how long a chunk is. All arms get the same numbers of updates, not the same time.
Their students then walk the same held-out walks with the same noise.

Every result is a file: a sweep that was killed goes on with what is missing, and several processes (one or more a
GPU) that are given the same folder share out the work.
"""

import argparse
import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import islice, product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d

from lingbot_nb import presets
from lingbot_nb.distill import flow, train, trajectories
from lingbot_nb.distill.long import joined
from lingbot_nb.distill.record import Recorded
from lingbot_nb.model import checkpoint
from lingbot_nb.model.dit import DiT
from lingbot_nb.model.graph import compile_often
from lingbot_nb.model.text import TinyText
from lingbot_nb.model.vae import TinyVAE, to_uint8
from lingbot_nb.parts import PROMPT
from lingbot_nb.presets import Preset, StreamSettings
from lingbot_nb.report import evaluation, metrics
from lingbot_nb.report.architecture import markdown_table
from lingbot_nb.report.metrics import Interval
from lingbot_nb.report.trials import ratio
from lingbot_nb.runs import write_json
from lingbot_nb.world.clips import Clip, ClipStore
from lingbot_nb.world.latents import Batch, LatentClips, encode_walks

REFERENCE = "consistency, DMD"
"""The arm that others are compared with, pair by pair."""


@dataclass(frozen=True)
class Sizes:
    """How much every arm gets. `dmd` counts the critic's updates, the student's being a `ratio`-th of them."""

    batch: int = 32
    pair_batches: int = 32
    solver_steps: int = 48
    regression: int = 400
    consistency: int = 300
    forcing: int = 300
    dmd: int = 310
    dmd_batch: int = 16
    ratio: int = 5
    critic_first: int = 10


@dataclass(frozen=True)
class Lab:
    """What all arms share on one device: `causal` is the many-step causal model that every student begins with and
    that is the causal teacher, learnt with chunks of `causal_chunk`; `teacher` is the bidirectional one."""

    preset: Preset
    causal: DiT
    teacher: DiT
    clips: LatentClips
    sizes: Sizes = Sizes()
    seed: int = 0
    precision: train.Precision = train.fp32
    lr: float = 2e-4
    dmd_lr: float = 3e-5
    critic_lr: float = 1e-4
    causal_chunk: int = 1

    @property
    def device(self) -> torch.device:
        return self.causal.patch_embedding.weight.device

    @property
    def settings(self) -> StreamSettings:
        return self.preset.stream

    @property
    def shift(self) -> float:
        return self.preset.flow.shift

    def with_chunk(self, chunk: int) -> "Lab":
        """The lab of students with another chunk length."""
        return replace(self, preset=replace(self.preset, stream=replace(self.settings, chunk=chunk)))

    def copy(self, dit: DiT) -> DiT:
        twin = DiT(self.preset.model, device=self.device)
        twin.load_state_dict(dit.state_dict())
        return twin

    def state(self, lr: Mapping[str, float], **models: DiT) -> train.TrainState:
        options = dict(seed=self.seed, betas=(0.0, 0.999), average={"student": 0.99})
        return train.TrainState.of(models, dict(lr), **options)

    def options(self, state: train.TrainState) -> dict:
        """What every step takes: precision, and on a GPU a recording."""
        record = partial(Recorded, state.generator) if self.device.type == "cuda" else train.plainly
        return dict(precision=self.precision, record=record)

    def compiled(self, dit: DiT) -> DiT:
        """On a GPU every layer compiled by itself; call it when the state has its average, which stays plain."""
        for layer in dit.blocks if self.device.type == "cuda" else ():
            layer.compile(dynamic=False)
        return dit

    def learnt(self, step: train.Step, state: train.TrainState, steps: int) -> DiT:
        """The student's average after `steps` steps."""
        torch.manual_seed(self.seed)
        for _ in train.fit(step, state, steps=steps, schedule=train.warmup_decay(0.05, 0.3), log_every=10):
            pass
        return state.averages["student"].module


# ---- how a student starts -------------------------------------------------------------------------------------------

Start = Callable[[Lab], DiT]


def forced(lab: Lab) -> DiT:
    """The causal model itself; for another chunk length than its own it goes on with teacher forcing at that length."""
    if lab.settings.chunk == lab.causal_chunk:
        return lab.copy(lab.causal)
    student = lab.copy(lab.causal)
    state = lab.state({"student": lab.lr}, student=student)
    batches = lab.clips.batches(lab.sizes.batch, state.generator)
    options = dict(shift=lab.shift, context_noise=0.2, **lab.options(state))
    return lab.learnt(
        train.forcing_step(lab.compiled(student), batches, lab.settings, **options), state, lab.sizes.forcing
    )


def bidirectional_ode(lab: Lab) -> DiT:
    """ODE regression onto the ends of the bidirectional teacher's paths, the past noisy (CausVid, Self-Forcing)."""
    schedule = _schedule(lab)
    return _regressed(lab, train.bidirectional_teacher(lab.teacher, schedule), schedule, clean_context=False)


def causal_ode(lab: Lab) -> DiT:
    """ODE regression onto the ends of the causal teacher's paths, the past clean (Causal-Forcing)."""
    schedule = _schedule(lab)
    return _regressed(lab, train.causal_teacher(lab.causal, lab.settings, schedule), schedule, clean_context=True)


def consistency(lab: Lab) -> DiT:
    """Causal consistency distillation: no stored paths at all (Causal-Forcing++)."""
    teacher = forced(lab)
    student = lab.copy(teacher)
    state = lab.state({"student": lab.lr}, student=student)
    batches = lab.clips.batches(lab.sizes.batch, state.generator)
    sigmas = flow.sigma_grid(lab.sizes.solver_steps, lab.shift)
    frozen = lab.compiled(teacher.requires_grad_(False))
    step = train.consistency_step(lab.compiled(student), frozen, batches, lab.settings, sigmas, **lab.options(state))
    return lab.learnt(step, state, lab.sizes.consistency)


def _schedule(lab: Lab) -> trajectories.Schedule:
    return trajectories.Schedule(lab.sizes.solver_steps, lab.shift, lab.preset.flow.student_labels)


def _regressed(lab: Lab, trajectory: Callable, schedule: trajectories.Schedule, *, clean_context: bool) -> DiT:
    student = lab.copy(lab.causal)
    state = lab.state({"student": lab.lr}, student=student)
    made = dict(batch=lab.sizes.batch, batches=lab.sizes.pair_batches, generator=state.generator)
    with lab.precision():
        pairs = trajectories.pairs_in_memory(lab.clips, trajectory, **made)
    options = dict(clean_context=clean_context, **lab.options(state))
    step = train.ode_regression_step(lab.compiled(student), pairs, lab.settings, schedule.sigmas, **options)
    return lab.learnt(step, state, lab.sizes.regression)


# ---- distribution matching ------------------------------------------------------------------------------------------

Clips = Callable[[Lab, DiT], train.MakeClip]
"""Where the clips come from on which the distributions are matched."""


def own_rollout(lab: Lab, student: DiT) -> train.MakeClip:
    """Self-Forcing: the student's walk through its own cache."""
    return train.OwnRollout(student, lab.settings, _few_steps(lab), train.grad_caches(lab.preset))


def noisy_history(lab: Lab, student: DiT) -> train.MakeClip:
    """CausVid: one pass over real latents, each chunk noised to a level of its own."""
    return train.NoisyHistory(student, lab.settings, _few_steps(lab))


def standing(batch: Batch) -> Batch:
    """The batch without its walking, turning kept: what guidance moves away from in a world of one prompt."""
    # `camera.tiny_channels`: three values of the origin, three of the direction, four keys.
    per_value = batch.control.shape[1] // 10
    control = torch.zeros_like(batch.control)
    turned = slice(3 * per_value, 6 * per_value)
    control[:, turned] = batch.control[:, turned]
    return replace(batch, control=control)


def matched(lab: Lab, start: DiT, clips: Clips, *, length: float = 1.0, guidance: float = 1.0) -> DiT:
    """The student after distribution matching for `length` times `sizes.dmd` updates; the critic begins with the
    teacher's weights, and the teacher is guided away from `standing` for another `guidance` than 1."""
    student, critic = lab.copy(start), lab.copy(lab.teacher)
    state = lab.state({"student": lab.dmd_lr, "critic": lab.critic_lr}, student=student, critic=critic)
    batches = lab.clips.batches(lab.sizes.dmd_batch, state.generator)
    options = dict(ratio=lab.sizes.ratio, critic_first=lab.sizes.critic_first, reuse=True, **lab.options(state))
    options |= dict(guidance=guidance, unconditional=None if guidance == 1 else standing)
    step = train.dmd_step(
        clips(lab, student),
        lab.compiled(critic),
        lab.compiled(lab.teacher),
        batches,
        lab.settings,
        shift=lab.shift,
        **options,
    )
    return lab.learnt(step, state, round(length * lab.sizes.dmd))


def _few_steps(lab: Lab, count: int | None = None) -> list[flow.FewStep]:
    labels = lab.preset.flow.student_labels if count is None else lab.preset.flow.labels(count)
    return flow.few_steps(labels, lab.shift)


# ---- the arms -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """One way to a student; without `clips` its start is all. `length` and `guidance` are `matched`'s. `windows` are
    (window, sink) to walk with beside the ones it was trained with."""

    name: str
    start: Start
    clips: Clips | None = None
    chunk: int = 1
    length: float = 1.0
    guidance: float = 1.0
    windows: tuple[tuple[int | None, int], ...] = ()


SHORTER = {", an eighth as long": 0.125, ", a quarter as long": 0.25}
LONGER = {", four times as long": 4.0}
WINDOWS = ((4, 1), (7, 0), (12, 1), (None, 0))
ARMS: tuple[Arm, ...] = (
    Arm("causal model", forced),
    Arm("bidirectional ODE", bidirectional_ode),
    Arm("causal ODE", causal_ode),
    Arm("consistency", consistency),
    Arm("causal model, DMD", forced, own_rollout),
    Arm("bidirectional ODE, DMD", bidirectional_ode, own_rollout),
    Arm("causal ODE, DMD", causal_ode, own_rollout),
    Arm(REFERENCE, consistency, own_rollout, windows=WINDOWS),
    Arm("consistency, DMD on real history", consistency, noisy_history),
    Arm("causal model, DMD, chunks of 3", forced, own_rollout, chunk=3),
    *(
        Arm(f"causal model, DMD{text}", forced, own_rollout, length=length)
        for text, length in (SHORTER | LONGER).items()
    ),
    Arm("causal model, DMD, guided by 2", forced, own_rollout, guidance=2.0),
)


# ---- held-out walks -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exam:
    """Held-out walks on one device. `clips` encoded, `real` u8 [B, N, H, W, 3]; the first `walks` rows, each joined
    from four clips, are the long walks."""

    clips: LatentClips
    real: Tensor
    vae: TinyVAE
    counts: tuple[int, ...] = (4, 2, 1)
    walks: int = 24
    joins: int = 4

    def batch(self, with_poses: bool) -> Batch:
        rows = torch.arange(len(self.clips), device=self.real.device)
        modes = torch.full_like(rows, with_poses).bool()
        return self.clips.batch(rows, torch.zeros_like(rows), self.clips.latents.shape[1], modes)

    @cached_property
    def long(self) -> Batch:
        """Walks by keys, four clips long, the keys of one clip after those of another."""
        rows = torch.arange(min(self.walks, len(self.clips)), device=self.real.device)
        parts = [(rows + k * len(rows)) % len(self.clips) for k in range(self.joins)]
        no = torch.zeros_like(rows)
        frames = self.clips.latents.shape[1]
        return joined([self.clips.batch(part, no, frames, no.bool()) for part in parts])

    @torch.no_grad()
    def pictures(self, latents: Tensor) -> Tensor:
        """u8 [B, N, H, W, 3] on the device."""
        return torch.cat([to_uint8(self.vae.decode(part.float())) for part in latents.split(8)])

    def walked(self, lab: Lab, student: DiT, batch: Batch, count: int, settings: StreamSettings) -> Tensor:
        """Pixel frames of the student's walk; every arm's noise is the same."""
        draws = torch.Generator(lab.device).manual_seed(1000 + lab.seed)
        with lab.precision():
            made = evaluation.student_clips(
                student, batch, lab.preset, steps=_few_steps(lab, count), generator=draws, settings=settings
            )
        return self.pictures(made)

    def marks(self, lab: Lab, student: DiT, windows: Sequence[tuple[int | None, int]] = ()) -> dict[str, dict]:
        """Everything that is measured of a student, by name."""
        poses, keys, settings = self.batch(True), self.batch(False), lab.settings
        found = {f"poses, {n}": self.short(self.walked(lab, student, poses, n, settings)) for n in self.counts}
        found[f"keys, {self.counts[0]}"] = self.short(self.walked(lab, student, keys, self.counts[0], settings))
        found["long walk"] = self.lasting(self.walked(lab, student, self.long, self.counts[0], settings))
        for window, sink in windows:
            seen = replace(settings, window=window, sink=sink)
            name = f"window {window or 'all'}, sink {sink}"
            found[name] = self.short(self.walked(lab, student, keys, self.counts[0], seen))
            found[f"{name}, long walk"] = self.lasting(self.walked(lab, student, self.long, self.counts[0], seen))
        return found

    def short(self, made: Tensor) -> dict[str, list[float]]:
        """By walk: PSNR at every horizon, and fine detail of both."""
        spans = evaluation.horizon_spans(self.real.shape[1])
        row = {at: psnr(self.real[:, span], made[:, span]) for at, span in spans.items()}
        row |= {"detail": detail(made), "real detail": detail(self.real)}
        return {name: [round(v, 3) for v in values.tolist()] for name, values in row.items()}

    def lasting(self, made: Tensor) -> dict[str, list[float]]:
        """By walk: fine detail and saturation of the first second and of the last five."""
        second, last = slice(1, 17), slice(-80, None)
        row = {"detail": detail(made[:, last]), "first detail": detail(made[:, second])}
        row |= {"saturation": saturation(made[:, last]), "first saturation": saturation(made[:, second])}
        return {name: [round(v, 4) for v in values.tolist()] for name, values in row.items()}


def psnr(real_BNHWC: Tensor, made_BNHWC: Tensor) -> Tensor:
    """`metrics.psnr` of u8 frames on their device, the mean over a clip's frames: B."""
    error = (real_BNHWC.float() - made_BNHWC.float()).square().mean((2, 3, 4)) / 255**2
    return (-10 * error.clamp(min=1e-10).log10()).mean(1)


def detail(frames_BNHWC: Tensor) -> Tensor:
    """`metrics.laplacian_variance` of u8 frames on their device, the mean over a clip's frames: B."""
    weights = torch.tensor(metrics.LUMA, dtype=torch.float32, device=frames_BNHWC.device)
    kernel = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]], device=frames_BNHWC.device)[None, None]
    rows = [
        conv2d((clip.float() @ weights)[:, None], kernel).flatten(1).var(1, correction=0).mean()
        for clip in frames_BNHWC
    ]
    return torch.stack(rows)


def saturation(frames_BNHWC: Tensor) -> Tensor:
    """`metrics.saturation` of u8 frames on their device, the mean over a clip's frames: B."""
    high, low = frames_BNHWC.amax(-1).float(), frames_BNHWC.amin(-1).float()
    return ((high - low) / high.clamp(min=1)).mean((1, 2, 3))


# ---- the sweep ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """A folder of results, `arms` times `seeds`; see the module."""

    lab: Lab
    exam: Exam
    folder: Path
    seeds: int = 3
    arms: tuple[Arm, ...] = ARMS
    conditions: str = ""

    def run(self) -> Iterator[str]:
        """Does what is missing and not in another process's hands; yields a line per result."""
        # All arms of one seed first: a sweep that is cut short can still compare them.
        for seed, arm in product(range(self.seeds), self.arms):
            file = result_file(self.folder, arm, seed)
            with _held(file.with_suffix(".lock")) as mine:
                if mine and not file.exists():
                    yield self._one(replace(self.lab, seed=seed).with_chunk(arm.chunk), arm, file)

    def _one(self, lab: Lab, arm: Arm, file: Path) -> str:
        began = time.perf_counter()
        student = self._start(lab, arm)
        if arm.clips is not None:
            student = matched(lab, student, arm.clips, length=arm.length, guidance=arm.guidance)
        trained = time.perf_counter() - began
        card = dict(arm=arm.name, seed=lab.seed, sizes=asdict(lab.sizes), conditions=self.conditions)
        checkpoint.save(self.folder / "students" / f"{file.stem}.safetensors", student, dtype=torch.bfloat16, **card)
        marks = self.exam.marks(lab, student, arm.windows)
        seconds = time.perf_counter() - began
        write_json(file, card | dict(train_seconds=trained, seconds=seconds, marks=marks))
        values = marks[f"poses, {self.exam.counts[0]}"]
        told = ", ".join(f"{np.mean(values[at]):.1f} dB at {at} s" for at in values if "detail" not in at)
        return f"{arm.name}, seed {lab.seed}: {told}; {trained:.0f} s of training, {seconds:.0f} in all"

    def _start(self, lab: Lab, arm: Arm) -> DiT:
        """The arm's start, made once for all arms that share it."""
        file = self.folder / "starts" / f"{arm.start.__name__}-{arm.chunk}-{lab.seed}.safetensors"
        # Another process may be making it: then this one waits.
        with _held(file.with_suffix(".lock"), wait=True):
            if not file.exists():
                checkpoint.save(file, arm.start(lab), kind=arm.start.__name__, seed=lab.seed, chunk=arm.chunk)
        student = lab.copy(lab.causal)
        checkpoint.load_into(file, student)
        return student


def result_file(folder: Path, arm: Arm, seed: int) -> Path:
    """Where an arm's result lies."""
    return folder / f"{arm.name.replace(', ', '-').replace(' ', '_')}-{seed}.json"


@contextlib.contextmanager
def _held(lock: Path, wait: bool = False) -> Iterator[bool]:
    """Whether this process alone holds `lock`; the lock of a killed process is free at once."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


# ---- what came of it ------------------------------------------------------------------------------------------------


def results(folder: Path) -> dict[str, dict[int, dict]]:
    """marks by arm and seed, of what is in a sweep's folder."""
    found: dict[str, dict[int, dict]] = {}
    for file in sorted(folder.glob("*.json")):
        entry = trajectories.read_json(file)
        found.setdefault(entry["arm"], {})[entry["seed"]] = entry["marks"]
    return found


def over_walks(by_seed: Mapping[int, Mapping], mark: str, value: str) -> np.ndarray:
    """One number a walk, the mean over seeds."""
    return np.mean([marks[mark][value] for marks in by_seed.values()], axis=0)


def ratio_of(by_seed: Mapping[int, Mapping], mark: str, above: str, below: str) -> list[float]:
    """[ratio, low, high] of sums over walks (single flat walks would spoil a mean of ratios)."""
    found = ratio(over_walks(by_seed, mark, above), over_walks(by_seed, mark, below)) or [float("nan")] * 3
    return [round(value, 3) for value in found[:3]]


def summary(folder: Path, reference: str = REFERENCE) -> dict[str, dict]:
    """By arm: every mark as [mean, low, high] (95 % over walks, seeds averaged), seeds' own means beside it, and the
    paired difference to `reference`."""
    found = results(folder)
    return {arm: _summary(by_seed, found.get(reference)) for arm, by_seed in found.items()}


def _summary(by_seed: Mapping[int, Mapping], reference: Mapping[int, Mapping] | None) -> dict:
    row: dict = {"seeds": sorted(by_seed)}
    for mark, values in next(iter(by_seed.values())).items():
        if "first detail" in values:
            row[mark] = {
                "sharpness kept": ratio_of(by_seed, mark, "detail", "first detail"),
                "saturation kept": ratio_of(by_seed, mark, "saturation", "first saturation"),
            }
            continue
        row[mark] = {at: _psnr(by_seed, reference, mark, at) for at in values if "detail" not in at}
        row[mark]["sharpness"] = ratio_of(by_seed, mark, "detail", "real detail")
    return row


def _psnr(by_seed: Mapping, reference: Mapping | None, mark: str, at: str) -> dict:
    mine = over_walks(by_seed, mark, at)
    row = {"db": _listed(metrics.bootstrap_mean(mine))}
    row["by_seed"] = [round(float(np.mean(marks[mark][at])), 2) for _, marks in sorted(by_seed.items())]
    shared = sorted(set(by_seed) & set(reference or {}))
    if shared and mark in reference[shared[0]]:
        pair = [over_walks({s: side[s] for s in shared}, mark, at) for side in (by_seed, reference)]
        row["to_reference"] = _listed(metrics.bootstrap_difference(*pair))
    return row


def _listed(value: Interval) -> list[float]:
    return [round(value.mean, 3), round(value.low, 3), round(value.high, 3)]


def table(summary: Mapping[str, Mapping], arms: Sequence[str] | None = None) -> str:
    """The arms as a Markdown table: PSNR at one and four seconds by poses, with 95 % intervals over walks."""
    heads = (
        "arm",
        "seeds",
        "dB at 1 s",
        "at 4 s",
        "1 step, 1 s",
        "keys, 1 s",
        "sharpness",
        "kept over 20 s",
        "saturation",
    )
    return markdown_table(heads, [_row(name, summary[name]) for name in arms or known(summary)])


def known(summary: Mapping[str, Mapping]) -> list[str]:
    """The arms of a summary, in the order of `ARMS`."""
    return [arm.name for arm in ARMS if arm.name in summary]


def _row(name: str, row: Mapping) -> tuple[str, ...]:
    def cell(mark: str, at: str) -> str:
        return told(row[mark][at]["db"]) if mark in row and at in row[mark] else ""

    poses = next(mark for mark in row if mark.startswith("poses"))
    keys = next(mark for mark in row if mark.startswith("keys"))
    lasting = row["long walk"]
    return (
        *(name, str(len(row["seeds"])), cell(poses, "1"), cell(poses, "4"), cell("poses, 1", "1"), cell(keys, "1")),
        *(told(row[poses]["sharpness"], 2), told(lasting["sharpness kept"], 2), told(lasting["saturation kept"], 2)),
    )


def told(value: Sequence[float], digits: int = 1) -> str:
    """[mean, low, high] as a table's cell."""
    mean, low, high = value
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def prepared(data: Path, weights: Path, *, train_clips: int, held_out: int, sizes: Sizes = Sizes()) -> tuple[Lab, Exam]:
    """`assembled` from a folder of clips of both splits, their first so many, and one of weights. ValueError where a
    split is empty."""
    learnt, known = (
        list(islice(ClipStore(data, split=split, check=False), count))
        for split, count in (("train", train_clips), ("held-out", held_out))
    )
    if not learnt or not known:
        raise ValueError(f"{data} has {len(learnt)} clips to learn from and {len(known)} held out: collect both splits")
    return assembled(learnt, known, weights, weights / "causal.safetensors", sizes)


def assembled(
    learnt: Sequence[Clip], known: Sequence[Clip], weights: Path, causal: Path, sizes: Sizes = Sizes()
) -> tuple[Lab, Exam]:
    """Lab that learns from some clips and exam on others, on the GPU if there is one: tokenizer and bidirectional
    teacher from the folder `weights`, the causal model from the file `causal`. FileNotFoundError for weights that are
    not there."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    preset = presets.TINY
    vae = TinyVAE.from_file(weights / "vae.safetensors", device)
    networks = [DiT(preset.model, device=device).requires_grad_(False) for _ in range(2)]
    for file, network in zip((causal, weights / "teacher.safetensors"), networks, strict=True):
        checkpoint.load_into(file, network)
    precision = train.autocast(device) if device.type == "cuda" else train.fp32
    lab = Lab(preset, *networks, _encoded(vae, learnt, preset), sizes, precision=precision)
    real = torch.from_numpy(np.stack([clip.frames for clip in known])).to(device)
    return lab, Exam(_encoded(vae, known, preset), real, vae)


def _encoded(vae: TinyVAE, clips: Sequence[Clip], preset: Preset) -> LatentClips:
    context = TinyText(preset.model.text_dim, preset.model.text_len).encode(PROMPT)
    return encode_walks(vae, clips, context, preset, device=next(vae.parameters()).device, size=16)


def main() -> None:
    parser = argparse.ArgumentParser(prog="lingbot_nb.report.claims", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of collected clips, both splits")
    parser.add_argument("--weights", type=Path, required=True, help="vae, teacher and causal as safetensors")
    parser.add_argument("--out", type=Path, required=True, help="folder of results; may be shared by processes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--clips", type=int, default=2048, help="clips to learn from")
    parser.add_argument("--held-out", type=int, default=96, help="walks to be judged by")
    names = [arm.name for arm in ARMS]
    parser.add_argument("--only", nargs="*", default=names, choices=names, help="arms, in the order to take them in")
    parser.add_argument("--summary", type=Path, help="write the summary of what is in --out here, and train nothing")
    args = parser.parse_args()
    if args.summary:
        write_json(args.summary, summary(args.out))
        print(table(summary(args.out)))
        return
    compile_often()
    lab, exam = prepared(args.data, args.weights, train_clips=args.clips, held_out=args.held_out)
    name = torch.cuda.get_device_name() if lab.device.type == "cuda" else "CPU"
    conditions = f"{name} · torch {torch.__version__} · {len(lab.clips)} clips · {len(exam.clips)} held-out walks"
    arms = tuple(ARMS[names.index(chosen)] for chosen in args.only)
    for line in Sweep(lab, exam, args.out, args.seeds, arms, conditions).run():
        print(line, flush=True)
    print(table(summary(args.out)))


if __name__ == "__main__":
    main()
