"""One step of each kind at the size of the released model, on random weights: one frozen base, adapters for the roles.

    torchrun --nproc-per-node 2 -m lingbot_nb.report.bench_large --preset lingbot --frames 9
    torchrun --nproc-per-node 2 -m lingbot_nb.report.bench_large --preset lingbot-1.3b --all-weights

Time and memory depend on shapes alone, so that weights are made where they are used. Every row is printed when it is
known: the pretraining step (teacher forcing of the student), then distribution matching with the student's exit step
held at the first and at the last of its steps. Cost grows linearly with the exit step, so that the mean of the two is
the mean over the random exits of a training.

Memory of a GPU at 18.5 B, 9 latent frames of 480x832, chunk 3, rank 64, batch 1 a GPU (`budget` works it out), in GB:

    frozen base, bf16, whole on every GPU, shared by teacher, critic and student             37.1
    adapters of student and critic, 307 M each: fp32 weight, gradient and two moments         9.8
    generator: fp32 input of every layer of the three chunks, kept for recomputation         11.5
    generator: keys and values of the past that each chunk's graph holds (3 + 6 frames, which
               are the cache too), and those keys turned                                     17.3
                                                                                     sum     75.7 GB, 70.5 GiB

That is the highest point but for the layer at work: the rollout's last chunk is not written to its cache, which would
take another 15.3 GB, and teacher and critic are `lean`, or the camera's scale and shift of all layers would take 11.5
GB while they score. Pretraining holds 37.1 + 4.9 + 23.0 (inputs of [clean | noisy])
and the layer at work. So the base fits whole into 80 GB and need not be sharded, and no pass waits for another GPU:
ranks only average the adapters' gradients. Sharding (`distill.sharded`) is for training all weights, whose
pretraining step `--all-weights` measures: 16 bytes a parameter, spread over the GPUs, so that 18.5 B want four or more.

FLOPs are counted as `architecture.forward_flops` does, a multiply-add as two. Backward through frozen weights costs a
forward's matrix products once and attention's twice; with gradients for all weights both count twice. The adapters' own
products, under 2 %, are left out. "Model" FLOPs are those alone; "computed" ones include the forwards that activation
checkpointing repeats.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import repeat

import torch
from torch import Tensor, nn

from lingbot_nb import presets
from lingbot_nb.distill import flow, parallel, sharded, train
from lingbot_nb.distill.record import Loss, fresh
from lingbot_nb.distill.train import known_frames
from lingbot_nb.model import masks
from lingbot_nb.model.dit import DiT
from lingbot_nb.model.lora import Adapted
from lingbot_nb.presets import LATENT_CHANNELS, MASK_CHANNELS, SPACE_STRIDE, ModelSize, Preset, VideoShape
from lingbot_nb.report.architecture import (
    Flops,
    forward_flops,
    kv_bytes,
    markdown_table,
    tensor_shapes,
    total,
    visible_frames,
)
from lingbot_nb.report.bench import measure, synchroniser
from lingbot_nb.world.latents import Batch

Say = Callable[[str], None]


@dataclass(frozen=True)
class Order:
    """What to measure: `frames` latent frames a clip, `batch` clips a GPU, adapters of `rank`, `repeats` warm steps of
    pretraining; no step begins that would end after `seconds`."""

    preset: Preset
    frames: int = 9
    batch: int = 1
    rank: int = 64
    repeats: int = 1
    guidance: float = 5.0
    seconds: float = float("inf")

    @property
    def shape(self) -> VideoShape:
        return self.preset.shape.with_frames(self.frames)

    @property
    def lengths(self) -> list[int]:
        return self.preset.stream.chunk_lengths(self.frames)

    @property
    def steps(self) -> list[flow.FewStep]:
        return flow.few_steps(self.preset.flow.student_labels, self.preset.flow.shift)


@dataclass(frozen=True)
class Work:
    """FLOPs of one clip: `model` what must be computed, `repeated` what activation checkpointing computes again."""

    model: float
    repeated: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.model + other.model, self.repeated + other.repeated)

    def __mul__(self, times: float) -> "Work":
        return Work(self.model * times, self.repeated * times)


@dataclass(frozen=True)
class Row:
    """One kind of update: `seconds` of it, clips' tokens a second over all GPUs, model TFLOP/s of one GPU and its share
    of the GEMM rate (`mfu`; `computed` with repeated forwards), peak memory of each GPU. `cold` rows paid for warming
    up."""

    stage: str
    seconds: float
    tokens: float
    tflops: float
    mfu: float
    computed: float
    peak_gib: list[float]
    cold: bool = False

    def __str__(self) -> str:
        peaks = ", ".join(f"{peak:.1f}" for peak in self.peak_gib)
        return (
            f"{self.stage}{' (cold)' if self.cold else ''}: {self.seconds:.2f} s, {self.tokens:,.0f} tokens/s, "
            f"{self.tflops:.0f} model TFLOP/s a GPU, MFU {self.mfu:.1%} (with repeated forwards {self.computed:.1%}), "
            f"peak GiB {peaks}"
        )


# ---- what it must cost ----------------------------------------------------------------------------------------------


def forward(flops: Flops) -> Work:
    return Work(flops.total)


def forward_backward(flops: Flops) -> Work:
    """With gradient for the input and adapters, none for the weights, every layer recomputed."""
    return Work(2 * (flops.linear + flops.camera) + 3 * flops.attention, flops.total)


def whole_backward(flops: Flops) -> Work:
    """With gradients for all weights, every layer recomputed."""
    return Work(3 * flops.total, flops.total)


def forced_flops(order: Order) -> Flops:
    """One forward of teacher forcing: [clean | noisy] under its mask."""
    settings = order.preset.stream
    mask = masks.teacher_forcing(order.lengths, settings.window, settings.sink)
    seen = int(mask.keep.sum()) / mask.frames[0]
    return forward_flops(order.preset.model, order.shape, mask.frames[0], seen)


def chunk_flops(order: Order) -> list[Flops]:
    """One forward of each chunk that the student makes itself."""
    size, seen = order.preset.model, visible_frames(order.preset.stream, order.lengths)
    both = [forward_flops(size, order.shape, *pair) for pair in zip(order.lengths, seen, strict=True)]
    return both[known_frames(order.preset.stream) :]


def generator_work(order: Order, exit_step: int) -> Work:
    """Steps before the exit and the clean pass of all chunks but the last without gradient, the exit with it, three
    scores of the whole clip."""
    work, chunks = Work(0.0), chunk_flops(order)
    for chunk in chunks:
        work += forward(chunk) * (exit_step + (chunk is not chunks[-1])) + forward_backward(chunk)
    whole = forward_flops(order.preset.model, order.shape, order.frames, order.frames)
    return work + forward(whole) * (3 if order.guidance != 1 else 2)


def critic_work(order: Order, exit_step: int) -> Work:
    """A rollout without gradient, whose chunks share the camera's part, and the critic's own forward and backward."""
    chunks = chunk_flops(order)
    rolled = sum((c.linear + c.attention) * (exit_step + 1 + (c is not chunks[-1])) + c.camera for c in chunks)
    return Work(rolled) + forward_backward(forward_flops(order.preset.model, order.shape, order.frames, order.frames))


def budget(order: Order, adapter_parameters: int, weight_bytes: int = 2) -> dict[str, int]:
    """Bytes of a GPU at the highest point of the generator's step, by what holds them; the layer at work comes on top.
    `adapter_parameters`: of one role."""
    size, shape, settings = order.preset.model, order.shape, order.preset.stream
    seen = visible_frames(settings, order.lengths)
    past = sum(visible - own for visible, own in zip(seen, order.lengths, strict=True))
    inputs = size.layers * order.frames * shape.tokens_per_frame * size.dim * 4
    held = kv_bytes(size, shape, past, weight_bytes)
    return {
        "base": weight_bytes * total(tensor_shapes(size)).parameters,
        "adapters": 2 * 16 * adapter_parameters,
        "layer inputs": order.batch * inputs,
        "pasts": order.batch * (held + held // 2),
    }


# ---- what is run ----------------------------------------------------------------------------------------------------


def random_base(size: ModelSize, device: torch.device, dtype: torch.dtype) -> DiT:
    """A network of fresh weights, the same on all ranks, made where it is used; its head is not zero."""
    torch.manual_seed(0)
    dit = DiT(size, device=device, dtype=dtype).eval()
    nn.init.normal_(dit.head.head.weight, std=size.dim**-0.5)
    return dit.requires_grad_(False)


def random_batch(order: Order, device: torch.device, seed: int) -> Batch:
    """Clips of noise."""
    size, shape = order.preset.model, order.shape
    make = torch.Generator(device).manual_seed(seed)

    def noise(*extents: int) -> Tensor:
        return torch.randn(order.batch, *extents, generator=make, device=device)

    cells = (order.frames, shape.latent_height, shape.latent_width)
    return Batch(
        noise(LATENT_CHANNELS, *cells),
        noise(MASK_CHANNELS + LATENT_CHANNELS, *cells),
        noise(SPACE_STRIDE**2 * size.control_channels, *cells),
        noise(size.text_len, size.text_dim),
    )


def without_prompt(batch: Batch) -> Batch:
    return replace(batch, context=torch.zeros_like(batch.context))


@dataclass
class HeldExit:
    """The student's rollout with its exit step held instead of drawn."""

    clips: train.OwnRollout
    exit_step: int = 0

    def draw(self, generator: torch.Generator) -> int:
        return self.exit_step

    def __call__(self, batch: Batch, generator: torch.Generator, drawn: int | None = None) -> tuple[Batch, Tensor]:
        return self.clips(batch, generator, drawn)


@dataclass
class Watch:
    """Gradients, timed: `spans` gets (whose parameters, seconds, peak bytes) of each call; what follows, averaging over
    ranks and the optimizer, is the rest of the step."""

    roles: dict[str, nn.Module]
    device: torch.device
    spans: list[tuple[str, float, int]] = field(default_factory=list)

    def __call__(self, parameters: Sequence[nn.Parameter], loss: Loss, accumulate: int = 1):
        sync, gpu = synchroniser(self.device), self.device.type == "cuda"
        sync()
        if gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
        began = time.perf_counter()
        result = fresh(parameters, loss, accumulate)
        sync()
        peak = torch.cuda.max_memory_allocated(self.device) if gpu else 0
        self.spans.append((self._role(parameters), time.perf_counter() - began, peak))
        return result

    def _role(self, parameters: Sequence[nn.Parameter]) -> str:
        return next(name for name, module in self.roles.items() if parameters[0] is next(module.parameters()))


class Bench:
    """One rank's clock; `rows` fills as updates are measured. What is measured are the subclasses' `stages`."""

    def __init__(self, order: Order, device: torch.device, dtype: torch.dtype, say: Say = print):
        self.order, self.device, self.say = order, device, say
        self.began, self.last_step = time.perf_counter(), 0.0
        self.rank, self.ranks = parallel.place()
        self.rows: list[Row] = []
        self.gemm = gemm_tflops(device, dtype)
        self.tell(f"{str(dtype).removeprefix('torch.')} GEMM {self.gemm:.3g} TFLOP/s")
        self.batches = repeat(random_batch(order, device, self.rank))
        self.watch = Watch({}, device)
        self._build(dtype)

    def _build(self, dtype: torch.dtype) -> None:
        """Makes the networks and names them to the watch."""
        raise NotImplementedError

    @property
    def stages(self) -> tuple[Callable[[], None], ...]:
        """What is measured, in this order."""
        return (self.pretrain,)

    def _pretrain(self, student: nn.Module, work: Work) -> None:
        """Teacher forcing, cold and then warm."""
        order = self.order
        state = train.TrainState.of({"student": student}, {"student": 1e-5})
        options = dict(settings=order.preset.stream, shift=order.preset.flow.shift, record=lambda: self.watch)
        step = train.forcing_step(student, self.batches, checkpoint=True, **options)
        for number in range(1 + order.repeats):
            self._step(step, state, {"student": ("pretrain", work)}, cold=number == 0)

    def tell(self, line: str) -> None:
        """One line, at once, from rank 0."""
        if self.rank == 0:
            self.say(f"[{time.perf_counter() - self.began:6.1f} s] {line}")

    def _step(self, step: train.Step, state: train.TrainState, pieces: dict[str, tuple[str, Work]], cold: bool) -> None:
        if not self._time_left():
            return
        self.watch.spans.clear()
        synchroniser(self.device)()
        began = time.perf_counter()
        for _ in train.fit(step, state, steps=state.step + 1):
            pass
        synchroniser(self.device)()
        self.last_step = time.perf_counter() - began
        for role, seconds, peak in self.watch.spans:
            self._keep(self._row(*pieces[role], seconds, peak, cold))
        rest = self.last_step - sum(seconds for _, seconds, _ in self.watch.spans)
        self.tell(f"whole step {self.last_step:.2f} s, of which averaging over ranks and optimizer {rest:.2f} s")

    def _time_left(self) -> bool:
        passed = parallel.agree(time.perf_counter() - self.began, self.device)
        if passed + parallel.agree(self.last_step, self.device) > self.order.seconds:
            self.tell(f"no time left of {self.order.seconds:.0f} s: the next step is left out")
            return False
        return True

    def _row(self, stage: str, work: Work, seconds: float, peak: int, cold: bool) -> Row:
        order = self.order
        peaks = parallel.gathered(torch.tensor([peak / 2**30], device=self.device)).tolist()
        tokens = order.batch * order.frames * order.shape.tokens_per_frame * self.ranks
        tflops, repeated = (order.batch * flops / seconds / 1e12 for flops in (work.model, work.repeated))
        shares = (tflops / self.gemm, (tflops + repeated) / self.gemm)
        return Row(stage, seconds, tokens / seconds, tflops, *shares, peaks, cold)

    def _keep(self, row: Row) -> None:
        self.rows.append(row)
        self.tell(str(row))

    def summary(self) -> None:
        """The table, and what a training's step costs on average over its exits."""
        self.tell("in all\n" + table(self.rows))
        for stage in ("generator", "critic"):
            warm = [row for row in self.rows if row.stage.startswith(stage) and not row.cold]
            if len(warm) == 2:
                seconds, mfu = sum(row.seconds for row in warm) / 2, _mean_share(warm)
                self.tell(f"{stage}, mean over exits: {seconds:.2f} s, MFU {mfu:.1%}")
        self.tell(f"highest peak {max((max(row.peak_gib) for row in self.rows), default=0.0):.1f} GiB a GPU")


class RolesBench(Bench):
    """Student and critic as adapters on one frozen base, which every GPU holds whole."""

    def _build(self, dtype: torch.dtype) -> None:
        order = self.order
        self.base = random_base(order.preset.model, self.device, dtype)
        self.student = Adapted(self.base, rank=order.rank)
        self.critic = Adapted(self.base, rank=order.rank, lean=True)
        self.teacher = Adapted(self.base, targets=(), lean=True)
        for network in (self.student, self.critic):
            parallel.same_start(network)
        self.watch.roles.update(student=self.student, critic=self.critic)
        self._tell_sizes(dtype.itemsize)

    @property
    def stages(self) -> tuple[Callable[[], None], ...]:
        return self.pretrain, self.match

    def _tell_sizes(self, weight_bytes: int) -> None:
        base, adapters = (sum(p.numel() for p in net.parameters()) for net in (self.base, self.student))
        parts = budget(self.order, adapters, weight_bytes)
        said = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
        self.tell(f"{base / 1e9:.2f} B parameters, adapters {adapters / 1e6:.0f} M a role, rank {self.order.rank}")
        self.tell(f"budget GB: {said}; sum {sum(parts.values()) / 1e9:.1f} GB, {sum(parts.values()) / 2**30:.1f} GiB")

    def pretrain(self) -> None:
        """Teacher forcing of the student's adapters."""
        self._pretrain(self.student, forward_backward(forced_flops(self.order)))

    def match(self) -> None:
        """Distribution matching, student and critic updated once a step: cold, then warm at the last and the first
        exit."""
        order, last = self.order, len(self.order.steps) - 1
        models = {"student": self.student, "critic": self.critic}
        state = train.TrainState.of(models, {"student": 1e-5, "critic": 1e-5}, betas=(0.0, 0.999))
        clips = HeldExit(self._rollout())
        step = train.dmd_step(
            clips,
            self.critic,
            self.teacher,
            self.batches,
            order.preset.stream,
            shift=order.preset.flow.shift,
            ratio=1,
            guidance=order.guidance,
            unconditional=without_prompt if order.guidance != 1 else None,
            checkpoint=True,
            record=lambda: self.watch,
        )
        for exit_step, cold in ((0, True), (last, False), (0, False)):
            clips.exit_step = exit_step
            pieces = {
                "student": (f"generator, exit {exit_step + 1}", generator_work(order, exit_step)),
                "critic": (f"critic, exit {exit_step + 1}", critic_work(order, exit_step)),
            }
            self._step(step, state, pieces, cold)

    def _rollout(self) -> train.OwnRollout:
        order = self.order
        caches = train.grad_caches(replace(order.preset, shape=order.shape))
        return train.OwnRollout(self.student, order.preset.stream, order.steps, caches, checkpoint=True)


class WholeBench(Bench):
    """All weights of one student, sharded over the GPUs: fp32 weights, on GPUs gathered in bf16."""

    def _build(self, dtype: torch.dtype) -> None:
        compute = sharded.BF16 if dtype == torch.bfloat16 else sharded.AS_STORED
        self.student = sharded.empty(self.order.preset.model, self.device, compute=compute)
        shapes = {name: tensor.shape for name, tensor in self.student.state_dict().items()}

        def noise(name: str, first: int, end: int) -> Tensor:
            return 0.02 * torch.randn(end - first, *shapes[name][1:], device=self.device)

        sharded.fill(self.student, noise)
        self.watch.roles.update(student=self.student)
        count = sum(p.numel() for p in self.student.parameters())
        self.tell(f"{count / 1e9:.2f} B parameters, {16 * count / self.ranks / 1e9:.1f} GB a GPU with their optimizer")

    def pretrain(self) -> None:
        """Teacher forcing of all weights."""
        self._pretrain(self.student, whole_backward(forced_flops(self.order)))


def _mean_share(rows: Sequence[Row]) -> float:
    return sum(row.mfu * row.seconds for row in rows) / sum(row.seconds for row in rows)


def gemm_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """TFLOP/s of a large square matrix product: what a share of the rate is a share of."""
    side = 8192 if device.type == "cuda" else 512
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    timing = measure(lambda: a @ b, warmup=5, repeats=20, sync=synchroniser(device))
    return 2e-9 * side**3 / timing.median


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    names = ("update", "s", "tokens / s", "TFLOP/s a GPU", "MFU", "with repeats", "peak GiB")
    lines = [
        (
            r.stage + (" (cold)" if r.cold else ""),
            f"{r.seconds:.2f}",
            f"{r.tokens:,.0f}",
            f"{r.tflops:.0f}",
            f"{r.mfu:.1%}",
            f"{r.computed:.1%}",
            ", ".join(f"{peak:.1f}" for peak in r.peak_gib),
        )
        for r in rows
    ]
    return markdown_table(names, lines)


def run(
    order: Order,
    device: torch.device,
    dtype: torch.dtype,
    say: Say = print,
    make: Callable[..., Bench] = RolesBench,
) -> Iterator[Row]:
    """Measures what `make`'s stages are; yields each stage's rows when it is done."""
    bench = make(order, device, dtype, say)
    for stage in bench.stages:
        known = len(bench.rows)
        stage()
        yield from bench.rows[known:]
    bench.summary()


def main() -> None:
    parser = argparse.ArgumentParser(prog="lingbot_nb.report.bench_large", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="lingbot")
    parser.add_argument("--frames", type=int, default=9, help="latent frames of a clip")
    parser.add_argument("--batch", type=int, default=1, help="clips a GPU")
    parser.add_argument("--rank", type=int, default=64, help="of the adapters")
    parser.add_argument("--repeats", type=int, default=1, help="warm steps of pretraining")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no step that would end later")
    parser.add_argument("--all-weights", action="store_true", help="pretrain all weights, sharded, instead of adapters")
    args = parser.parse_args()
    rank, ranks, device = parallel.start()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    preset = presets.by_name(args.preset)
    order = Order(preset, args.frames, args.batch, args.rank, args.repeats, preset.flow.guidance, args.seconds)
    if rank == 0:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        print(
            f"{ranks} x {name} · torch {torch.__version__} · {str(dtype).removeprefix('torch.')} · preset "
            f"{preset.name}, {order.frames} frames of {order.shape.height}x{order.shape.width}, chunks "
            f"{order.lengths}, batch {order.batch} a process",
            flush=True,
        )
    make = WholeBench if args.all_weights else RolesBench
    for _ in run(order, device, dtype, lambda line: print(line, flush=True), make):
        pass
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
