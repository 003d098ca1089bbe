"""Trains the tiny world from nothing: one command, on one or many GPUs.

    torchrun --nproc-per-node 2 -m lingbot_nb.distill.recipe --data clips --out weights --collect 12000

Stages run in order, each as long as its seconds say, each leaving weights and a card in `--out`; a command that was
killed goes on with the first stage whose weights are not there, from the last checkpoint of that stage.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lingbot_nb import presets
from lingbot_nb.distill import flow, parallel, tokenizer, train, trajectories
from lingbot_nb.distill.long import LongRollout, check_walks, clips_for, last_picture, long_batches
from lingbot_nb.distill.optim import muon_adamw
from lingbot_nb.distill.record import Recorded
from lingbot_nb.distill.still import halts_of, still_step
from lingbot_nb.distill.tokenizer import TokenizerSettings
from lingbot_nb.model import checkpoint, growth
from lingbot_nb.model.dit import DiT
from lingbot_nb.model.text import TinyText, map_prompt
from lingbot_nb.model.vae import TinyVAE, VAESize
from lingbot_nb.presets import Preset
from lingbot_nb.report import evaluation
from lingbot_nb.world.clips import HELD_OUT_SEED, ClipStore
from lingbot_nb.world.latents import Batch, LatentClips, encode_walks
from lingbot_nb.world.vizdoom import SimulatorSettings, collect


@dataclass(frozen=True)
class Budget:
    """Seconds and clips per rank and step of each stage, and its learning rate; with `steps` a stage takes so many and
    whatever time they need."""

    seconds: float
    batch: int
    lr: float
    steps: int | None = None


@dataclass(frozen=True)
class Recipe:
    """All settings of one training. The defaults are for two H200 GPUs; shipped weights got what their cards say."""

    preset: Preset = presets.TINY
    vae_size: VAESize = VAESize()
    tokenizer: Budget = Budget(1250, 24, 2e-3)
    teacher: Budget = Budget(1300, 32, 2e-3)
    causal: Budget = Budget(315, 24, 1e-3)
    ode: Budget = Budget(90, 32, 2e-4, steps=400)
    """Regression onto the ends of `pair_batches` batches of the causal model's own paths of `solver_steps` steps."""
    pair_batches: int = 32
    solver_steps: int = 48
    student: Budget = Budget(150, 16, 3e-5, steps=310)
    """310 updates of the critic, 60 of the student. From pairs, three seeds keep a seventh more fine detail than a
    student of 39 and 6 did, and lead no walk astray (`report.claims`); from a teacher that had learnt less they did."""
    walks: tuple[int, ...] = ()
    """Lengths in latent frames of the walks at whose ends matching looks (`long`); none: it looks at plain clips."""
    still: Budget = Budget(240, 6, 3e-5, steps=60)
    """The last stage: as many updates on halts of this many clips, and on half as many real walks."""
    still_frames: int = 29
    """How many frames a halt is walked and stood: seven seconds."""
    kept: float = 16.0
    """Weight of staying what one was on real walks, beside learning to stand: walks lose 6 % of their sharpness with
    it, and a quarter beside teacher forcing, which takes them back to the mean of all futures."""
    critic_lr: float = 1e-4
    context_noise: float = 0.2
    kl: float = 3e-4
    """Beside a loss that counts decibels, six times as steep as one that does not."""
    decibel: float = 0.05
    texture: float = 0.22
    """Push of the tokenizer's discriminator: twice as much buys a sixth more fine detail for 0.2 dB."""
    map: str = SimulatorSettings.map
    teacher_from: Path | None = None
    """Weights that the teacher goes on from instead of from nothing, of as many layers or fewer."""
    compile: bool = True
    one_graph: bool = False
    """Compile a stage's forward and loss as one graph instead of layer by layer: fewer launches, longer compiling."""
    record: bool = True
    """On a GPU, replay each step's forward and backward from a recording (`record.Recorded`)."""

    def __post_init__(self):
        # Here, not where they are walked: matching comes after the stages that take the time.
        check_walks(self.walks, self.preset.shape.frames, self.preset.stream)


REPORT_EVERY = 200
"""Steps between two rows of a tokenizer."""
KEEP_EVERY = 2000
"""Steps between two checkpoints of a stage that goes by time: about a minute of one H200."""
KEEP_PARTS = 4
"""Parts with a checkpoint between them, of a stage whose budget counts steps: it takes minutes in all."""
LOG_EVERY = 10
"""Steps between two looks at the device's numbers: the host runs ahead meanwhile."""
SKIPS = 3
"""Steps of a stage that may meet nan: a teacher of a second map met it once in 2,420 steps and was lost, though a step
on one bad batch moves nothing."""


GOING_ON = 0.5
"""Of the learning rate, for a teacher that does not begin from nothing."""


class Bench:
    """One rank's place: its data, device and folder, shared by all stages."""

    def __init__(self, recipe: Recipe, data: Path, out: Path, seed: int, collect: int = 0, command: str = ""):
        self.rank, self.ranks, self.device = parallel.start()
        if collect and self.rank == 0:
            collect_walks(data, collect, recipe.map)
        if self.ranks > 1:
            torch.distributed.barrier()
        self.recipe, self.preset, self.seed, self.command = recipe, recipe.preset, seed, command
        self.data, self.out = Path(data), Path(out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.text = TinyText(self.preset.model.text_dim, self.preset.model.text_len)
        began = time.monotonic()
        # Collecting has just hashed every shard: hashing 40 GB again on every rank would cost minutes of GPUs.
        walks = list(ClipStore(data, split="train", check=False))
        self.train, self.train_clips = walks[self.rank :: self.ranks], len(walks)
        self.held_out = list(ClipStore(data, split="held-out", check=False))
        self.precision = train.autocast(self.device) if self.device.type == "cuda" else train.fp32
        self.say("data", clips=len(self.train), held_out=len(self.held_out), seconds=time.monotonic() - began)

    def say(self, stage: str, **row) -> None:
        """One JSON line to the log and the terminal, from rank 0."""
        if self.rank == 0:
            row = {k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}
            line = json.dumps({"stage": stage, **row})
            print(line, flush=True)
            with (self.out / "log.jsonl").open("a") as log:
                log.write(line + "\n")

    def generator(self, purpose: int = 0) -> torch.Generator:
        """Different draws on every rank and for every purpose."""
        return torch.Generator(self.device).manual_seed(1000 * self.seed + 100 * purpose + self.rank)

    def record(self, *generators: torch.Generator) -> train.Record:
        """What a step's gradients come from: recordings that draw from these generators, where that is possible."""
        return partial(Recorded, *generators) if self.recipe.record and self.device.type == "cuda" else train.plainly

    def pictures(self, clips: list) -> Tensor:
        return torch.from_numpy(np.stack([clip.frames for clip in clips])).to(self.device)

    def dit(self, file: str | None = None) -> DiT:
        torch.manual_seed(self.seed)
        dit = DiT(self.preset.model, device=self.device)
        if file:
            checkpoint.load_into(self.out / file, dit)
        return dit

    def vae(self) -> TinyVAE:
        return TinyVAE.from_file(self.out / "vae.safetensors", self.device)

    @cached_property
    def latents(self) -> LatentClips:
        """This rank's training clips, encoded: once the tokenizer has learnt, for all stages."""
        return self.encoded(self.train)

    def encoded(self, clips: list) -> LatentClips:
        """Clips through the trained tokenizer, resident on this rank's device."""
        context = self.text.encode(map_prompt(self.recipe.map))
        return encode_walks(self.vae(), clips, context, self.preset, device=self.device, size=16)

    def keep(
        self, file: str, module: nn.Module, budget: Budget, *, dtype: torch.dtype = torch.bfloat16, **card
    ) -> None:
        """Rank 0 writes the weights with a card that says how they were made."""
        if self.rank == 0:
            name = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
            made = {"preset": self.preset.name, "machine": f"{self.ranks} x {name}", "torch": torch.__version__}
            made |= {"command": self.command} if self.command else {}
            data = {"map": self.recipe.map, "train_clips": self.train_clips}
            data |= {"seed": self.seed, **asdict(budget)}
            data.pop("steps")  # a card's is how many were made
            checkpoint.save(self.out / file, module, dtype=dtype, **made, **data, **card)
            shutil.rmtree(self.unfinished, ignore_errors=True)

    @property
    def unfinished(self) -> Path:
        """Folder of the checkpoints of the stage that runs: gone when its weights are kept."""
        return self.out / "unfinished"

    def has(self, file: str) -> bool:
        return checkpoint.card_path(self.out / file).exists()


def collect_walks(data: Path, clips: int, map: str = SimulatorSettings.map, held_out: int = 128) -> None:
    """Walks for both splits, as many processes as this machine has cores to spare; shards that are there stay."""
    options = dict(processes=max(1, len(os.sched_getaffinity(0)) - 4), settings=SimulatorSettings(map))
    for count, seed, shard in ((held_out, HELD_OUT_SEED, 4), (clips, 0, 32)):
        print(collect(data, clips=count, seed=seed, shard_clips=shard, **options), flush=True)


def train_tokenizer(bench: Bench) -> None:
    torch.manual_seed(bench.seed)
    fit_tokenizer(bench, TinyVAE(bench.recipe.vae_size), bench.recipe.tokenizer)


def fit_tokenizer(bench: Bench, vae: TinyVAE, budget: Budget, *, decoder_only: bool = False, **card) -> None:
    """Trains a VAE, or its decoder, on this rank's clips by the recipe's losses and keeps it as vae.safetensors."""
    parallel.same_start(vae.to(bench.device))
    recipe, begun = bench.recipe, fingerprint(vae)
    generator = bench.generator(1)
    frames = bench.pictures(bench.train)
    held_out = bench.pictures(bench.held_out[:16])[:, 20:37]
    loss = dict(texture=recipe.texture, decibel=recipe.decibel)
    options = dict(batch=budget.batch, lr=budget.lr, kl=recipe.kl)
    settings = TokenizerSettings(**options, **loss, decoder_only=decoder_only)
    rows = tokenizer.train_tokenizer(
        vae,
        tokenizer.group_batches(frames, budget.batch, generator),
        seconds=budget.seconds,
        settings=settings,
        generator=generator,
        held_out=held_out,
        report_every=REPORT_EVERY,
        checkpoint=bench.unfinished / f"tokenizer-{begun}.pt",
        checkpoint_every=KEEP_EVERY,
        compile=recipe.compile,
    )
    row = {}
    for row in rows:
        bench.say("tokenizer", **row)
    result = tokenizer.evaluate_tokenizer(vae, bench.pictures(bench.held_out[:32]))
    bench.say("tokenizer", held_out=result)
    told = dict(kind="tokenizer", steps=row["step"], metrics=result, size=asdict(vae.size), **loss)
    told |= {} if decoder_only else {"kl": recipe.kl}
    # An encoder that stays is another file's weights, in whose latents networks live: not to be rounded again.
    dtype = torch.float32 if decoder_only else torch.bfloat16
    bench.keep("vae.safetensors", vae, budget, dtype=dtype, **told, **card)


def fingerprint(module: nn.Module) -> str:
    """Eight digits that tell a module's weights from others: what began otherwise cannot go on from its checkpoint."""
    state = module.state_dict().values()
    return hashlib.sha256(b"".join(tensor.cpu().numpy().tobytes() for tensor in state)).hexdigest()[:8]


def run_fit(
    bench: Bench,
    stage: str,
    step: train.Step,
    state: train.TrainState,
    budget: Budget,
    schedule: train.Schedule,
    *draws: torch.Generator,
) -> None:
    """Trains to a budget's end, or on from where a killed command left its checkpoints; `draws` are the generators that
    the step draws from beside the state's own."""
    ends = dict(steps=budget.steps) if budget.steps else dict(seconds=budget.seconds)
    state.card |= dict(preset=bench.preset.name, map=bench.recipe.map, seed=bench.seed)
    every = -(-budget.steps // KEEP_PARTS) if budget.steps else KEEP_EVERY
    kept = dict(checkpoint=bench.unfinished / stage, every=every)
    options = dict(schedule=schedule, log_every=LOG_EVERY, skips=SKIPS, store=train.drawn_anew(*draws))
    for row in train.fit(step, state, **ends, **kept, **options):
        if row["step"] % 100 == 0 or row["step"] in (1, 10) or budget.steps or "skipped" in row:
            bench.say(stage, steps_per_second=row["step"] / row["seconds"], **row)


def compiled(bench: Bench, dit: DiT) -> DiT:
    """Every layer compiled by itself: they share one graph, which compiles once."""
    if bench.recipe.compile and not bench.recipe.one_graph:
        for layer in dit.blocks:
            layer.compile(dynamic=False)
    return dit


def around_loss(bench: Bench) -> train.Compile:
    """What to put around a step's forward and loss."""
    return train.one_graph if bench.recipe.compile and bench.recipe.one_graph else train.as_it_is


def state_for(bench: Bench, role: str, dit: DiT, lr: float, average: float) -> train.TrainState:
    """Muon on the layers' matrices, AdamW on the rest, an EMA, and this rank's own noise."""
    return train.TrainState(
        {role: dit},
        {role: muon_adamw(dit, lr)},
        bench.generator(2),
        averages={role: train.Average(dit, average)},
    )


def tuning_state(
    bench: Bench, models: dict[str, DiT], lr: dict[str, float], average: float, purpose: int
) -> train.TrainState:
    """AdamW with DMD's betas for every role, an EMA of the student, this rank's own noise: what turns trained weights
    into a student."""
    adam = partial(torch.optim.AdamW, betas=(0.0, 0.999), weight_decay=0.01, fused=True)
    return train.TrainState(
        models,
        {role: adam(dit.parameters(), lr=lr[role]) for role, dit in models.items()},
        bench.generator(purpose),
        averages={"student": train.Average(models["student"], average)},
    )


def keep_student(bench: Bench, file: str, state: train.TrainState, budget: Budget, made_from: str, **card) -> None:
    """The student's average, with the seconds that it took and the card of the weights it began as."""
    told = dict(kind="student", steps=state.step, made_from=checkpoint.read_card(bench.out / made_from)) | card
    bench.keep(file, state.averages["student"].module, replace(budget, seconds=state.seconds), **told)


def train_teacher(bench: Bench) -> None:
    budget, dit, made = bench.recipe.teacher, bench.dit(), {}
    if bench.recipe.teacher_from:
        made["made_from"] = growth.load_into(bench.recipe.teacher_from, dit)
        budget = replace(budget, lr=GOING_ON * budget.lr)
    parallel.same_start(dit)
    state = state_for(bench, "teacher", dit, budget.lr, 0.999)
    draws = bench.generator(3)
    batches = bench.latents.batches(budget.batch, draws)
    options = dict(precision=bench.precision, compile=around_loss(bench), record=bench.record(state.generator, draws))
    step = train.teacher_step(compiled(bench, dit), batches, shift=bench.preset.flow.shift, **options)
    run_fit(bench, "teacher", step, state, budget, train.warmup_decay(0.02, 0.45), draws)
    card = dict(kind="teacher", steps=state.step, **made)
    bench.keep("teacher.safetensors", state.averages["teacher"].module, budget, **card)


def train_causal(bench: Bench) -> None:
    """The teacher's weights under the causal mask, by teacher forcing: the causal teacher of Causal-Forcing."""
    budget, dit = bench.recipe.causal, bench.dit("teacher.safetensors")
    state = state_for(bench, "student", dit, budget.lr, 0.999)
    draws = bench.generator(4)
    batches = bench.latents.batches(budget.batch, draws)
    step = train.forcing_step(
        compiled(bench, dit),
        batches,
        bench.preset.stream,
        shift=bench.preset.flow.shift,
        context_noise=bench.recipe.context_noise,
        precision=bench.precision,
        compile=around_loss(bench),
        record=bench.record(state.generator, draws),
    )
    run_fit(bench, "causal", step, state, budget, train.warmup_decay(0.02, 0.45), draws)
    bench.keep("causal.safetensors", state.averages["student"].module, budget, kind="causal teacher", steps=state.step)


def regress(bench: Bench) -> None:
    """Causal-Forcing's ODE pairs: the causal model as teacher of itself in few steps, the past clean. Matching that
    begins here keeps its fine detail in one step, where the causal model alone loses it (`report.claims`)."""
    recipe, preset, budget = bench.recipe, bench.preset, bench.recipe.ode
    student, teacher = bench.dit("causal.safetensors"), bench.dit("causal.safetensors").requires_grad_(False)
    state = tuning_state(bench, {"student": student}, {"student": budget.lr}, 0.99, 12)
    schedule = trajectories.Schedule(recipe.solver_steps, preset.flow.shift, preset.flow.student_labels)
    trajectory, draws = train.causal_teacher(teacher, preset.stream, schedule), bench.generator(13)
    made = dict(batch=budget.batch, batches=recipe.pair_batches, generator=draws)
    with bench.precision():
        pairs = trajectories.pairs_in_memory(bench.latents, trajectory, **made)
    options = dict(precision=bench.precision, record=bench.record(state.generator, draws))
    step = train.ode_regression_step(compiled(bench, student), pairs, preset.stream, schedule.sigmas, **options)
    run_fit(bench, "ode", step, state, budget, train.warmup_decay(0.05, 0.3), draws)
    card = dict(kind="causal student", pairs=recipe.pair_batches * budget.batch * bench.ranks)
    keep_student(bench, "ode.safetensors", state, budget, "causal.safetensors", **card)


def match_distributions(bench: Bench) -> None:
    """Self-Forcing's distribution matching: bidirectional teacher and critic, the student's own rollout. What it leaves
    walks, but does not stand yet."""
    budget, preset = bench.recipe.student, bench.preset
    student, critic = bench.dit("ode.safetensors"), bench.dit("teacher.safetensors")
    teacher = bench.dit("teacher.safetensors").requires_grad_(False)
    rates = {"student": budget.lr, "critic": bench.recipe.critic_lr}
    state = tuning_state(bench, {"student": student, "critic": critic}, rates, 0.99, 6)
    draws = bench.generator(7)
    labels = flow.few_steps(preset.flow.student_labels, preset.flow.shift)
    make_clip = train.OwnRollout(student, preset.stream, labels, train.grad_caches(preset))
    make_clip, batches = to_be_judged(bench, make_clip, draws)
    step = train.dmd_step(
        make_clip,
        compiled(bench, critic),
        compiled(bench, teacher),
        batches,
        preset.stream,
        shift=preset.flow.shift,
        ratio=5,
        critic_first=10,
        reuse=True,
        precision=bench.precision,
        compile=around_loss(bench),
        record=bench.record(state.generator, draws),
    )
    run_fit(bench, "student", step, state, budget, train.warmup_decay(0.05, 0.3), draws)
    keep_student(bench, "matched.safetensors", state, budget, "ode.safetensors")


def to_be_judged(
    bench: Bench, clips: train.OwnRollout, draws: torch.Generator
) -> tuple[train.MakeClip, Iterator[Batch]]:
    """What matching looks at, and the batches that it is made of: plain clips, or the ends of longer walks."""
    size, frames = bench.recipe.student.batch, bench.preset.shape.frames
    if not bench.recipe.walks:
        return clips, bench.latents.batches(size, draws)
    vae = bench.vae()
    walks = LongRollout(clips, frames, bench.recipe.walks, last_picture(vae, vae.size.memory + 1))
    return walks, long_batches(bench.latents, size, draws, clips_for(max(bench.recipe.walks), frames))


def steady(bench: Bench) -> None:
    """Teaches the student to stand (`still`) and holds it to what it was on real walks, lest it forgets to walk."""
    budget, preset = bench.recipe.still, bench.preset
    dit, before = bench.dit("matched.safetensors"), bench.dit("matched.safetensors").requires_grad_(False)
    state = tuning_state(bench, {"student": dit}, {"student": budget.lr}, 0.9, 10)
    draws, precision = bench.generator(11), dict(precision=bench.precision)
    walks = bench.latents.batches(max(1, budget.batch // 2), draws)
    halts = halts_of(bench.vae(), bench.latents, bench.train)
    bench.say("steady", halts=len(halts))
    labels = flow.few_steps(preset.flow.student_labels, preset.flow.shift)
    options = dict(shift=preset.flow.shift, context_noise=bench.recipe.context_noise, weight=bench.recipe.kept)
    batches = halts.batches(budget.batch, draws, bench.recipe.still_frames, preset.stream)
    step = train.together(
        train.keeping_step(dit, before, walks, preset.stream, **options, **precision),
        still_step(dit, batches, preset.stream, labels, train.grad_caches(preset), **precision),
    )
    run_fit(bench, "steady", step, state, budget, train.warmup_decay(0.08, 0.3), draws)
    keep_student(bench, "student.safetensors", state, budget, "matched.safetensors")


def evaluate(bench: Bench, clips: int = 128) -> None:
    """Every stage's weights against the simulator on held-out walks, shared out over the ranks; the cards keep the
    results as "held_out"."""
    clips = min(clips, len(bench.held_out)) // bench.ranks * bench.ranks
    mine = bench.held_out[:clips][bench.rank :: bench.ranks]
    encoded, real, vae = bench.encoded(mine), bench.pictures(mine), bench.vae()
    everyone = torch.arange(len(encoded), device=bench.device)
    for with_poses in (True, False):
        modes = torch.full_like(everyone, with_poses).bool()
        batch = encoded.batch(everyone, torch.zeros_like(everyone), bench.preset.shape.frames, modes)
        mode = "poses" if with_poses else "keys"
        for file, name, latents in generated(bench, batch):
            if file == "vae.safetensors" and not with_poses:
                continue
            made = torch.from_numpy(evaluation.decode_clips(vae, latents)).to(bench.device)
            pair = [parallel.gathered(x).cpu().numpy() for x in (real, made)]
            if bench.rank == 0:
                row = evaluation.summary(*pair)
                bench.say("evaluate", name=f"{name}, {mode}", **row)
                known = checkpoint.read_card(bench.out / file).get("held_out", {})
                checkpoint.annotate(bench.out / file, held_out={**known, f"{name}, {mode}": rounded(row)})


def generated(bench: Bench, batch: Batch) -> Iterator[tuple[str, str, Tensor]]:
    """(file, name, latents) of everything that the weights at hand make of a batch."""
    shift = bench.preset.flow.shift
    yield "vae.safetensors", "reconstruction", batch.latents
    if bench.has("teacher.safetensors"):
        teacher = bench.dit("teacher.safetensors")
        with bench.precision():
            clips = evaluation.teacher_clips(teacher, batch, steps=50, shift=shift, generator=bench.generator(8))
        yield "teacher.safetensors", "50 steps", clips
    for file, counts in (("causal", (4,)), ("ode", (4,)), ("matched", (4,)), ("student", (4, 2, 1))):
        for count in counts if bench.has(f"{file}.safetensors") else ():
            steps = flow.few_steps(bench.preset.flow.labels(count), shift)
            with bench.precision():
                clips = evaluation.student_clips(
                    bench.dit(f"{file}.safetensors"), batch, bench.preset, steps=steps, generator=bench.generator(9)
                )
            yield f"{file}.safetensors", f"{count} steps", clips


def rounded(value: dict | list | float):
    """A summary to three decimals, for people's eyes."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    if isinstance(value, list):
        return [rounded(part) for part in value]
    return round(value, 3)


STAGES: tuple[tuple[str, Callable[[Bench], None]], ...] = (
    ("vae.safetensors", train_tokenizer),
    ("teacher.safetensors", train_teacher),
    ("causal.safetensors", train_causal),
    ("ode.safetensors", regress),
    ("matched.safetensors", match_distributions),
    ("student.safetensors", steady),
)


def run(bench: Bench, until: str = STAGES[-1][0]) -> Iterator[str]:
    """Trains what is missing, stage by stage up to the one that makes `until`; yields each finished file."""
    last = [file for file, _ in STAGES].index(until)
    for file, stage in STAGES[: last + 1]:
        if not bench.has(file):
            began = time.monotonic()
            stage(bench)
            if bench.ranks > 1:
                torch.distributed.barrier()
            bench.say("done", file=file, seconds=time.monotonic() - began)
        yield file


def main() -> None:
    parser = argparse.ArgumentParser(prog="lingbot_nb.distill.recipe", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of collected clips, both splits")
    parser.add_argument("--out", type=Path, required=True, help="folder for weights, cards and log.jsonl")
    parser.add_argument("--collect", type=int, default=0, help="walk this many clips to train on first (0: none)")
    parser.add_argument("--map", default=SimulatorSettings.map, help="where to walk: see `collect --map`")
    parser.add_argument("--preset", default="tiny", help="tiny or tiny-large")
    parser.add_argument("--teacher-from", type=Path, help="weights that the teacher goes on from")
    parser.add_argument("--seed", type=int, default=0)
    files = [file for file, _ in STAGES]
    parser.add_argument("--until", choices=files, default=files[-1], help="the last stage, by what it leaves")
    parser.add_argument("--no-evaluate", action="store_true", help="train, and measure nothing")
    parser.add_argument("--evaluate-only", action="store_true", help="train nothing, measure the weights in --out")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the seconds of stages")
    told = "matching looks at the ends of walks of so many latent frames instead of plain clips"
    parser.add_argument("--walks", type=int, nargs="*", default=[], help=told)
    parser.add_argument("--no-compile", action="store_true", help="eager layers: slower steps, no compile time")
    parser.add_argument(
        "--no-record", action="store_true", help="run every step anew instead of replaying a CUDA graph"
    )
    parser.add_argument("--one-graph", action="store_true", help="compile whole losses instead of single layers")
    args = parser.parse_args()
    compiling = dict(compile=not args.no_compile, one_graph=args.one_graph, record=not args.no_record)
    place = dict(preset=presets.by_name(args.preset), map=args.map, teacher_from=args.teacher_from)
    recipe = scaled(Recipe(**place, **compiling, walks=tuple(args.walks)), args.scale)
    bench = Bench(recipe, args.data, args.out, args.seed, args.collect, command_line(parser.prog))
    if not args.evaluate_only:
        for _ in run(bench, args.until):
            pass
    if not args.no_evaluate:
        evaluate(bench)


def command_line(module: str) -> str:
    """This process's command, as a card tells it."""
    return f"torchrun --nproc-per-node {os.environ.get('WORLD_SIZE', 1)} -m {module} {shlex.join(sys.argv[1:])}"


def scaled(recipe: Recipe, factor: float) -> Recipe:
    """The same recipe with every stage's seconds times `factor`."""
    names = ("tokenizer", "teacher", "causal", "ode", "student", "still")
    budgets = {name: getattr(recipe, name) for name in names}
    return replace(recipe, **{n: replace(b, seconds=b.seconds * factor) for n, b in budgets.items()})


if __name__ == "__main__":
    main()
