"""Training steps a second of every stage, on random clips: what a step costs does not depend on what it sees.

    python -m lingbot_nb.report.bench_training --preset tiny --batch 32
    torchrun --nproc-per-node 2 -m lingbot_nb.report.bench_training --batch 16      (the same global batch on two)

A step is timed with all that training does around it: batch, noise, forward, backward, update, average, log row.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lingbot_nb import presets
from lingbot_nb.distill import flow, parallel, train
from lingbot_nb.distill.optim import muon_adamw
from lingbot_nb.distill.record import Recorded
from lingbot_nb.model.dit import DiT
from lingbot_nb.presets import LATENT_CHANNELS, Preset
from lingbot_nb.report.architecture import markdown_table
from lingbot_nb.world.latents import LatentClips

RATIO = 5
"""Critic updates to one of the student in the stage "student"."""


@dataclass(frozen=True)
class Rate:
    """One stage's speed. `first_seconds` is what the first step took, compiling included; `peak_gib` of GPU memory, 0
    on a CPU; `batch` is the global one."""

    stage: str
    steps_per_second: float
    milliseconds: float
    spread: tuple[float, float]
    first_seconds: float
    peak_gib: float
    batch: int


@dataclass(frozen=True)
class Workplace:
    """What a stage is built from: `compile` goes around forward and loss, `layerwise` compiles each layer instead,
    `recorded` replays forward and backward from a CUDA graph."""

    preset: Preset
    device: torch.device
    clips: LatentClips
    batch: int
    precision: train.Precision = train.fp32
    compile: train.Compile = train.as_it_is
    layerwise: bool = False
    recorded: bool = False

    def dit(self) -> DiT:
        torch.manual_seed(0)
        dit = DiT(self.preset.model, device=self.device)
        # A zero head would give the layers no gradient.
        nn.init.normal_(dit.head.head.weight, std=0.02)
        if self.layerwise:
            for layer in dit.blocks:
                layer.compile(dynamic=False)
        return dit

    def state(self, models: dict[str, nn.Module], average: str) -> train.TrainState:
        generator = parallel.shared_generator(self.device, 0)
        optimizers = {role: muon_adamw(model, 1e-4) for role, model in models.items()}
        return train.TrainState(models, optimizers, generator, {average: train.Average(models[average], 0.99)})

    def options(self, state: train.TrainState) -> dict:
        batches = self.clips.batches(self.batch, state.generator)
        record = partial(Recorded, state.generator) if self.recorded else train.plainly
        return dict(batches=batches, precision=self.precision, compile=self.compile, record=record)


Built = tuple[train.Step, train.TrainState]


def teacher(place: Workplace) -> Built:
    dit = place.dit()
    state = place.state({"teacher": dit}, "teacher")
    return train.teacher_step(dit, shift=place.preset.flow.shift, **place.options(state)), state


def causal(place: Workplace) -> Built:
    dit = place.dit()
    state = place.state({"student": dit}, "student")
    options = dict(settings=place.preset.stream, shift=place.preset.flow.shift, context_noise=0.2)
    return train.forcing_step(dit, **options, **place.options(state)), state


def consistency(place: Workplace) -> Built:
    dit, frozen = place.dit(), place.dit().requires_grad_(False)
    state = place.state({"student": dit}, "student")
    sigmas = flow.sigma_grid(48, place.preset.flow.shift)
    options = dict(settings=place.preset.stream, sigmas=sigmas)
    return train.consistency_step(dit, frozen, **options, **place.options(state)), state


def student(place: Workplace) -> Built:
    preset = place.preset
    dit, critic, frozen = place.dit(), place.dit(), place.dit().requires_grad_(False)
    state = place.state({"student": dit, "critic": critic}, "student")
    steps = flow.few_steps(preset.flow.student_labels, preset.flow.shift)
    make_clip = train.OwnRollout(dit, preset.stream, steps, train.grad_caches(preset))
    options = dict(settings=preset.stream, shift=preset.flow.shift, ratio=RATIO, reuse=True)
    return train.dmd_step(make_clip, critic, frozen, **options, **place.options(state)), state


STAGES: tuple[Callable[[Workplace], Built], ...] = (teacher, causal, consistency, student)


def random_clips(preset: Preset, count: int, device: torch.device) -> LatentClips:
    """Clips of noise along random walks, of a preset's shape."""
    shape, make = preset.shape, torch.Generator().manual_seed(0)

    def noise(*extents: int) -> Tensor:
        return torch.randn(*extents, generator=make).to(device)

    picture = (LATENT_CHANNELS, shape.latent_height, shape.latent_width)
    poses = torch.eye(4).repeat(count, shape.frames, 1, 1)
    poses[:, :, :3, 3] = torch.randn(count, shape.frames, 3, generator=make).cumsum(1)
    return LatentClips(
        preset,
        latents=noise(count, shape.frames, *picture),
        images=noise(count, shape.frames, *picture),
        tail=noise(*picture),
        poses=poses.to(device),
        keys=torch.zeros(count, shape.frames, 4, device=device),
        intrinsics=torch.tensor([shape.width / 2.4, shape.height / 1.2, shape.width / 2, shape.height / 2]),
        context=noise(preset.model.text_len, preset.model.text_dim),
    )


def training_steps(
    preset: Preset,
    *,
    batch: int = 2,
    steps: int = 10,
    warmup: int = 5,
    device: torch.device | str = "cpu",
    precision: train.Precision = train.fp32,
    compile: train.Compile = train.as_it_is,
    layerwise: bool = False,
    recorded: bool = False,
    log_every: int = 5,
    clips: int = 8,
    stages: Sequence[Callable[[Workplace], Built]] = STAGES,
) -> Iterator[Rate]:
    """Measures the stages one after the other: `steps` steps each, after `warmup`, rows read `log_every` at a time.

    `batch` is each rank's. The student's stage counts as dmd_step does: five steps hold one update of the student.
    """
    device = torch.device(device)
    data = random_clips(preset, clips, device)
    place = Workplace(preset, device, data, batch, precision, compile, layerwise, recorded)
    for build in stages:
        yield _rate(build, place, steps, warmup, log_every)


def _rate(build: Callable[[Workplace], Built], place: Workplace, steps: int, warmup: int, log_every: int) -> Rate:
    gpu = place.device.type == "cuda"
    if gpu:
        torch.cuda.reset_peak_memory_stats(place.device)
    step, state = build(place)
    began = time.perf_counter()
    for _ in train.fit(step, state, steps=1):
        first = time.perf_counter() - began
    for _ in train.fit(step, state, steps=1 + warmup):
        pass
    times, began = [], time.perf_counter()
    for row in train.fit(step, state, steps=1 + warmup + steps, log_every=log_every):
        # Rows arrive in groups: the clock moves at the first of each, when all its steps have been paid for.
        if (row["step"] - warmup - 2) % log_every == 0:
            now = time.perf_counter()
            times.append((now - began) / min(log_every, 2 + warmup + steps - row["step"]))
            began = now
    low, median, high = 1000 * np.percentile(times, [10, 50, 90])
    peak = torch.cuda.max_memory_allocated(place.device) / 2**30 if gpu else 0.0
    batch = place.batch * parallel.place()[1]
    return Rate(build.__name__, 1000 / median, median, (low, high), first, peak, batch)


def rate_table(rates: Sequence[Rate]) -> str:
    """The rates as a Markdown table."""
    rows = [
        (
            r.stage,
            f"{r.steps_per_second:.2f}",
            f"{r.milliseconds:.1f}",
            f"{r.spread[0]:.1f} – {r.spread[1]:.1f}",
            r.batch,
            f"{r.steps_per_second * r.batch:.1f}",
            f"{r.first_seconds:.1f}",
            f"{r.peak_gib:.2f}",
        )
        for r in rates
    ]
    names = ("stage", "steps / s", "ms a step", "p10 – p90", "batch", "clips / s", "first step s", "peak GiB")
    return markdown_table(names, rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="lingbot_nb.report.bench_training", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--batch", type=int, default=2, help="clips a rank and step")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--log-every", type=int, default=5)
    parser.add_argument("--compile", choices=("none", "layers", "graph"), default="none")
    parser.add_argument("--record", action="store_true", help="replay forward and backward from a CUDA graph")
    parser.add_argument("--warmup", type=int, default=5, help="steps before the clock starts; recording happens there")
    parser.add_argument("--stages", nargs="*", default=[stage.__name__ for stage in STAGES])
    args = parser.parse_args()
    rank, ranks, device = parallel.start()
    preset = presets.by_name(args.preset)
    precision = train.autocast(device) if device.type == "cuda" else train.fp32
    rates = []
    for rate in training_steps(
        preset,
        batch=args.batch,
        steps=args.steps,
        warmup=args.warmup,
        device=device,
        precision=precision,
        compile=train.one_graph if args.compile == "graph" else train.as_it_is,
        layerwise=args.compile == "layers",
        recorded=args.record,
        log_every=args.log_every,
        stages=[stage for stage in STAGES if stage.__name__ in args.stages],
    ):
        rates.append(rate)
        if rank == 0:
            print(json.dumps(rate.__dict__), flush=True)
    if rank == 0:
        kind = "bf16 autocast" if device.type == "cuda" else "fp32"
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        print(rate_table(rates))
        print(
            f"{ranks} x {name} · torch {torch.__version__} · {torch.get_num_threads()} threads · {kind} · "
            f"preset {preset.name}, {preset.shape.frames} frames · compile {args.compile}"
            f"{' · recorded' if args.record else ''}"
        )


if __name__ == "__main__":
    main()
