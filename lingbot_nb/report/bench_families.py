"""Loss families from one start, for the same seconds: which one earns its place on the tiny world.

    python -m lingbot_nb.report.bench_families --data clips --start weights/causal.safetensors --seconds 120
    python -m lingbot_nb.report.bench_families --data clips --forcing 300       (its own causal start, from the teacher)

Every family begins with the same weights, sees the same clips and gets the same time on the clock, its discriminator's
and critic's updates included; then its average makes held-out walks in 4, 2 and 1 steps. `start` is the row to beat:
the weights that all began with, which must be a many-step causal model, since the consistency families take it for
their teacher. A short run ranks what learns fastest, not what ends best; print the conditions.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lingbot_nb.distill import dmd, f_distill, flow, gan, meanflow, scm, sid, train
from lingbot_nb.distill.forcing import Info, Velocity, frame_t
from lingbot_nb.model.dit import DiT
from lingbot_nb.model.vae import TinyVAE
from lingbot_nb.parts import SHIPPED_CLIPS
from lingbot_nb.presets import Preset
from lingbot_nb.report import claims, evaluation
from lingbot_nb.report.architecture import markdown_table
from lingbot_nb.runs import PROJECT
from lingbot_nb.world.clips import ClipStore
from lingbot_nb.world.latents import Batch, LatentClips

GAN_WEIGHT = 0.03
"""Weight of the adversarial term beside a score's."""
FORCING_LR = 1e-4
"""Learning rate of the teacher forcing that makes a start."""


@dataclass(frozen=True)
class Place:
    """What a family is built from. `start` are the student's first weights, which are also the causal teacher's;
    `teacher` is bidirectional; learning rates are one family's as much as another's."""

    preset: Preset
    start: DiT
    teacher: DiT
    clips: LatentClips
    batch: int = 8
    frames: int | None = None
    lr: float = 3e-5
    critic_lr: float = 1e-4
    seed: int = 0
    precision: train.Precision = train.fp32

    @property
    def device(self) -> torch.device:
        return self.start.patch_embedding.weight.device

    @property
    def shift(self) -> float:
        return self.preset.flow.shift

    def copy(self, dit: DiT) -> DiT:
        twin = DiT(self.preset.model, device=self.device)
        twin.load_state_dict(dit.state_dict())
        return twin

    def state(self, **models: nn.Module) -> train.TrainState:
        rates = {role: self.lr if role == "student" else self.critic_lr for role in models}
        return train.TrainState.of(models, rates, seed=self.seed, betas=(0.0, 0.999), average={"student": 0.99})

    def batches(self, state: train.TrainState) -> Iterator[Batch]:
        return self.clips.batches(self.batch, state.generator, self.frames)


Built = tuple[train.Step, train.TrainState]
Family = Callable[[Place], Built]


# ---- matching distributions on the student's own rollout ------------------------------------------------------------


def _own_clips(place: Place, student: DiT) -> train.OwnRollout:
    preset = place.preset
    steps = flow.few_steps(preset.flow.student_labels, place.shift)
    return train.OwnRollout(student, preset.stream, steps, train.grad_caches(preset))


def _matching(place: Place, match: train.Match, heads: gan.Heads | None = None) -> Built:
    """dmd_step with another loss for the student; with heads they learn first in every step."""
    student, critic = place.copy(place.start), place.copy(place.teacher)
    models = {"student": student, "critic": critic} | ({"heads": heads} if heads is not None else {})
    state, clips = place.state(**models), _own_clips(place, student)
    shared = dict(shift=place.shift, precision=place.precision)
    options = dict(ratio=5, reuse=True, match=match, **shared)
    step = train.dmd_step(clips, critic, place.teacher, place.batches(state), place.preset.stream, **options)
    if heads is None:
        return step, state
    judge = train.heads_step(heads, clips, place.teacher, place.batches(state), r1=0.1, **shared)
    return train.together(judge, step), state


def _heads(place: Place) -> gan.Heads:
    return gan.Heads(place.preset.model.dim, place.preset.model.layers).to(place.device)


def matching(place: Place) -> Built:
    """DMD: the difference of two scores."""
    return _matching(place, dmd.distribution_matching)


def score_identity(place: Place) -> Built:
    """SiD: the gradient goes through teacher and critic as well."""
    return _matching(place, sid.score_identity)


def divergence(place: Place) -> Built:
    """f-distill: DMD's gradient weighted for the Jensen-Shannon divergence by a discriminator's density ratio."""
    heads = _heads(place)

    def match(x: Tensor, real: Velocity, fake: Velocity, **options) -> tuple[Tensor, Info]:
        ratio = gan.on_features(heads, real, place.teacher.blocks)
        return f_distill.f_distribution_matching(x, real, fake, ratio, f_distill.jensen_shannon, **options)

    return _matching(place, match, heads)


def matching_adversarial(place: Place) -> Built:
    """DMD with an adversarial term beside it (DMD2)."""
    heads = _heads(place)
    return _matching(
        place, gan.with_adversary(dmd.distribution_matching, heads, place.teacher.blocks, GAN_WEIGHT), heads
    )


def adversarial(place: Place) -> Built:
    """LADD: the discriminator alone, no scores. (The critic of the shared step learns beside it and is not asked.)"""
    heads = _heads(place)
    return _matching(place, gan.alone(heads, place.teacher.blocks), heads)


# ---- consistency along the causal teacher's trajectories ------------------------------------------------------------


def discrete_consistency(place: Place) -> Built:
    """CM: neighbours of 48 levels must agree."""
    student, teacher = place.copy(place.start), place.start
    state = place.state(student=student)
    options = dict(sigmas=flow.sigma_grid(48, place.shift), precision=place.precision)
    return train.consistency_step(student, teacher, place.batches(state), place.preset.stream, **options), state


def continuous_consistency(place: Place) -> Built:
    """sCM: the limit of infinitely many levels, its derivative by central differences."""
    student = place.copy(place.start)
    state = place.state(student=student)
    of_student, of_teacher = (train.whole_forced(dit, place.preset.stream) for dit in (student, place.start))

    def loss(batch: Batch, generator: torch.Generator) -> tuple[Tensor, Info]:
        options = dict(shift=place.shift, generator=generator, known=train.known_frames(place.preset.stream))
        return scm.continuous_consistency(of_student(batch), of_teacher(batch), batch.latents, **options)

    return train.loss_step("student", place.batches(state), loss, precision=place.precision), state


class ToClean(nn.Module):
    """A MeanFlow network as a few-step student: asked at t, it gives its average velocity from t to clean, so that
    x - sigma · v is its jump to the end. To callers it is a `DiT`."""

    def __init__(self, dit: DiT):
        super().__init__()
        self.dit = dit

    def forward(self, latent_BCFHW: Tensor, t: Tensor, **inputs) -> Tensor:
        t = frame_t(t, *latent_BCFHW.shape[:3:2], latent_BCFHW.device)
        return self.dit(latent_BCFHW, meanflow.interval_time(self.dit, t, torch.zeros_like(t)), **inputs)

    def text(self, context):
        """`DiT.text`."""
        return self.dit.text(context)

    def camera_tokens(self, control_BCFHW: Tensor) -> Tensor:
        """`DiT.camera_tokens`."""
        return self.dit.camera_tokens(control_BCFHW)

    def film(self, control_BCFHW: Tensor):
        """`DiT.film`."""
        return self.dit.film(control_BCFHW)


def average_velocity(place: Place) -> Built:
    """MeanFlow along the causal teacher's velocity, past clean; half of the clips are plain flow matching."""
    student, settings = ToClean(place.copy(place.start)), place.preset.stream
    state = place.state(student=student)
    of_teacher = train.whole_forced(place.start, settings)

    def loss(batch: Batch, generator: torch.Generator) -> tuple[Tensor, Info]:
        both, clean = train.bind_forced(student.dit, batch, settings), batch.latents
        none = torch.zeros(len(batch), clean.shape[2], device=place.device)

        def average(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            time = meanflow.interval_time(student.dit, torch.cat([none, t], 1), torch.cat([none, r], 1))
            return both(torch.cat([clean, x], 2), time)[:, :, clean.shape[2] :]

        options = dict(shift=place.shift, generator=generator, known=train.known_frames(settings))
        return meanflow.mean_flow(average, clean, teacher=of_teacher(batch), **options)

    return train.loss_step("student", place.batches(state), loss, precision=place.precision), state


FAMILIES: tuple[Family, ...] = (
    matching,
    score_identity,
    divergence,
    matching_adversarial,
    adversarial,
    discrete_consistency,
    continuous_consistency,
    average_velocity,
)


def causal_start(place: Place, seconds: float) -> Place:
    """The place with a start made here: its own after `seconds` of teacher forcing."""
    dit = place.copy(place.start)
    state = replace(place, lr=FORCING_LR).state(student=dit)
    options = dict(shift=place.shift, context_noise=0.2, precision=place.precision)
    step = train.forcing_step(dit, place.batches(state), place.preset.stream, **options)
    for _ in train.fit(step, state, seconds=seconds, schedule=train.warmup_decay(0.0, 0.4)):
        pass
    return replace(place, start=state.averages["student"].module.requires_grad_(False))


# ---- what came of it ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A family after its time: `steps` of training, `seconds` they took, and by number of sampling steps the PSNR at
    one second (dB) and the sharpness (1 is the simulator's) of held-out walks; `ended` says why it stopped early."""

    family: str
    steps: int
    seconds: float
    psnr: dict[int, float]
    sharpness: dict[int, float]
    ended: str = ""


@dataclass(frozen=True)
class Exam:
    """Held-out clips: `batch` as latents, `frames` u8 [B, N, H, W, 3] as the simulator drew them."""

    batch: Batch
    frames: np.ndarray
    vae: TinyVAE
    counts: tuple[int, ...] = (4, 2, 1)

    def row(self, place: Place, dit: nn.Module, name: str, steps: int, seconds: float, ended: str = "") -> Row:
        rows = {count: self._summary(place, dit, count) for count in self.counts}
        horizon = {count: row["psnr"] for count, row in rows.items()}
        psnr = {count: values.get("1", list(values.values())[-1])[0] for count, values in horizon.items()}
        return Row(name, steps, seconds, psnr, {count: row["sharpness"] for count, row in rows.items()}, ended)

    def _summary(self, place: Place, dit: nn.Module, count: int) -> dict:
        steps = flow.few_steps(place.preset.flow.labels(count), place.shift)
        generator = torch.Generator(place.device).manual_seed(place.seed)
        with place.precision():
            made = evaluation.student_clips(dit, self.batch, place.preset, steps=steps, generator=generator)
        return evaluation.summary(self.frames, evaluation.decode_clips(self.vae, made.float()))


def families(place: Place, exam: Exam, seconds: float, which: Sequence[Family] = FAMILIES) -> Iterator[Row]:
    """The start's row, then each family's after `seconds` of training; one that diverges is reported, not raised."""
    yield exam.row(place, place.start, "start", 0, 0.0)
    for family in which:
        yield _trained(place, exam, seconds, family)


def _trained(place: Place, exam: Exam, seconds: float, family: Family) -> Row:
    torch.manual_seed(place.seed)
    step, state = family(place)
    began, ended = time.perf_counter(), ""
    try:
        for _ in train.fit(step, state, seconds=seconds):
            pass
    except train.Diverged as error:
        ended = str(error)
    student = state.averages["student"].module
    return exam.row(place, student, family.__name__, state.step, time.perf_counter() - began, ended)


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    counts = list(rows[0].psnr)
    names = ("family", "steps", "s", *(f"dB, {n} steps" for n in counts), *(f"sharpness, {n}" for n in counts))
    lines = [
        (
            row.family + (" (diverged)" if row.ended else ""),
            row.steps,
            f"{row.seconds:.0f}",
            *(f"{row.psnr[n]:.2f}" for n in counts),
            *(f"{row.sharpness[n]:.2f}" for n in counts),
        )
        for row in rows
    ]
    return markdown_table(names, lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="lingbot_nb.report.bench_families", description=__doc__.splitlines()[0])
    weights = PROJECT / "data" / "weights"
    parser.add_argument("--data", type=Path, default=SHIPPED_CLIPS, help="clips, both splits or the shipped ones")
    parser.add_argument("--weights", type=Path, default=weights, help="folder of vae and teacher")
    parser.add_argument(
        "--start", type=Path, default=weights / "student.safetensors", help="the student's first weights"
    )
    parser.add_argument(
        "--forcing", type=float, default=0.0, help="begin with the teacher's weights after so many seconds of forcing"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of training, a family")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--frames", type=int, default=None, help="latent frames of a training clip; default: all")
    parser.add_argument("--held-out", type=int, default=4, help="clips to be judged by")
    parser.add_argument("--train", type=int, default=256, help="clips to learn from")
    parser.add_argument("--only", nargs="*", default=[family.__name__ for family in FAMILIES])
    args = parser.parse_args()
    place, exam = prepared(args)
    if args.forcing:
        place = causal_start(replace(place, start=place.teacher), args.forcing)
    rows = []
    for row in families(place, exam, args.seconds, [f for f in FAMILIES if f.__name__ in args.only]):
        rows.append(row)
        print(row, flush=True)
    name = torch.cuda.get_device_name() if place.device.type == "cuda" else "CPU"
    print(table(rows))
    start = f"the teacher and {args.forcing:.0f} s of forcing" if args.forcing else args.start
    print(f"{name} · torch {torch.__version__} · batch {args.batch} · {args.seconds:.0f} s a family · from {start}")


def prepared(args: argparse.Namespace) -> tuple[Place, Exam]:
    """Weights and clips of the command line on the GPU if there is one. ValueError where no clips are left to learn
    from; clips that judge are never learnt from."""
    known, others = (list(ClipStore(args.data, split=split)) for split in ("held-out", "train"))
    held_out, learnt = known[: args.held_out], (others or known[args.held_out :])[: args.train]
    if not held_out or not learnt:
        raise ValueError(f"{args.data} has no clips left to learn from beside {len(held_out)} held out: collect more")
    lab, exam = claims.assembled(learnt, held_out, args.weights, args.start)
    networks = dict(start=lab.causal, teacher=lab.teacher, precision=lab.precision)
    place = Place(lab.preset, clips=lab.clips, batch=args.batch, frames=args.frames, **networks)
    return place, Exam(exam.batch(with_poses=True), exam.real.cpu().numpy(), exam.vae)


if __name__ == "__main__":
    main()
