"""What test_sharded starts on other processes: the curves of test_launch with sharded networks."""

from functools import partial

import launch_target
import torch
from micro_world import SHAPE, SIZE, random_dit

from lingbot_nb.distill import sharded, train
from lingbot_nb.distill.flow import few_steps
from lingbot_nb.model.kv_cache import GradCache
from lingbot_nb.model.lora import Adapted
from lingbot_nb.presets import MICRO


def whole(seed):
    return random_dit(seed)


def split(seed):
    return sharded.fill_from(sharded.empty(SIZE, "cpu"), random_dit(seed))


def forced(make, steps, checkpoint=None, recompute=False, copied=None, store=train.FILES):
    """Teacher forcing with an average and gradient accumulation."""
    dit, stream = make(0), train.Stream(launch_target.global_batches())
    state = train.TrainState.of(
        {"student": dit}, {"student": 1e-3}, seed=3, streams={"batches": stream}, preset="micro"
    )
    state.averages["student"] = train.Average(dit, 0.9, **({"copied": copied} if copied else {}))
    options = dict(shift=MICRO.flow.shift, context_noise=0.1, checkpoint=recompute, clip=0.5)
    step = train.forcing_step(dit, stream, MICRO.stream, accumulate=2, **options)
    for row in train.fit(step, state, steps=steps, checkpoint=checkpoint, every=1000, store=store):
        yield row | {"average": total(state.averages["student"].module), "weights": total(dit)}


def total(module):
    """One number of all weights, the same however they are spread."""
    parts = [p.detach().double().square().sum() for p in module.parameters()]
    return float(sum(p.full_tensor() if hasattr(p, "full_tensor") else p for p in parts))


def forced_split(steps, checkpoint=None, recompute=False):
    yield from forced(split, steps, checkpoint, recompute, sharded.twin, sharded.SHARDS)


def matched(make, steps):
    """Distribution matching on the student's own rollout, layers recomputed in backward."""
    student, critic, teacher = make(0), make(1), make(2).requires_grad_(False)
    models = {"student": student, "critic": critic}
    state = train.TrainState.of(models, {"student": 1e-3, "critic": 1e-3}, betas=(0.0, 0.999))
    clips = train.OwnRollout(
        student,
        MICRO.stream,
        few_steps((1, 0.5), MICRO.flow.shift),
        lambda batch: GradCache(SIZE, MICRO.stream, SHAPE, batch=len(batch)),
        checkpoint=True,
    )
    options = dict(shift=MICRO.flow.shift, ratio=2, checkpoint=True)
    step = train.dmd_step(clips, critic, teacher, launch_target.global_batches(), MICRO.stream, **options)
    yield from train.fit(step, state, steps=steps)


def matched_split(steps):
    yield from matched(split, steps)


def filled(folder, dtype="bfloat16"):
    """Loads a release into shards; yields how far they are from `folder`'s own tensors, and what was read."""
    dit = sharded.empty(SIZE, "cpu", dtype=getattr(torch, dtype))
    sharded.load_released(folder, dit)
    expected = random_dit(5).state_dict()
    worst = max(
        float((tensor.full_tensor().float() - expected[name].to(tensor.dtype).float()).abs().max())
        for name, tensor in dit.state_dict().items()
    )
    local = sum(tensor.to_local().numel() for tensor in dit.state_dict().values())
    yield {"worst": worst, "share": local / sum(tensor.numel() for tensor in expected.values())}


def adapted(steps):
    """Distribution matching with adapters on one frozen base, which every rank holds whole."""
    base = random_dit(0)
    torch.manual_seed(1)
    student, critic = Adapted(base, rank=2), Adapted(base, rank=3)
    models = {"student": student, "critic": critic}
    state = train.TrainState.of(models, {"student": 1e-2, "critic": 1e-2}, average={"student": 0.9})
    cache = partial(GradCache, SIZE, MICRO.stream, SHAPE)
    steps_of = few_steps((1, 0.5), MICRO.flow.shift)
    clips = train.OwnRollout(student, MICRO.stream, steps_of, lambda batch: cache(batch=len(batch)), checkpoint=True)
    batches = launch_target.global_batches()
    step = train.dmd_step(clips, critic, base, batches, MICRO.stream, shift=MICRO.flow.shift, ratio=2, checkpoint=True)
    for row in train.fit(step, state, steps=steps):
        yield row | {"weights": total(student), "average": total(state.averages["student"].module)}
