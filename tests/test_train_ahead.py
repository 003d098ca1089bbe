"""The host running ahead of the device: same numbers, no waiting inside a step, no nan in a checkpoint."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from micro_world import endless, random_dit, rng
from test_train import SHIFT, STREAM, assert_same, line_state, line_step, make_cache, run, weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lingbot_nb.control.camera import control_tiny, poses_from_keys
from lingbot_nb.distill import forcing, parallel, train
from lingbot_nb.distill.flow import few_steps
from lingbot_nb.distill.optim import Muon, can_skip, muon_adamw, skip_where
from lingbot_nb.distill.train import Diverged, TrainState, fit
from lingbot_nb.presets import MICRO
from lingbot_nb.report.bench_training import random_clips
from lingbot_nb.world.latents import LatentClips, frame_keys

# ---- rows read together ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_every", [2, 4, 50])
def test_rows_read_together_are_the_same_rows(log_every, tmp_path):
    one, many = line_state(), line_state()
    schedule = train.warmup_decay(0.2, 0.4)
    rows = run(line_step(), one, 11, schedule=schedule)
    assert run(line_step(), many, 11, schedule=schedule, log_every=log_every, checkpoint=tmp_path, every=3) == rows
    assert_same(one, many)
    assert [file.name for file in train.checkpoints(tmp_path)] == ["step-00000009.pt", "step-00000011.pt"]


def test_stopping_between_rows_saves_the_step_the_state_is_at(tmp_path):
    for row in fit(line_step(), line_state(), steps=20, checkpoint=tmp_path, log_every=4):
        if row["step"] == 6:
            break
    assert train.checkpoints(tmp_path)[-1].name == "step-00000008.pt"
    rest, whole = line_state(), line_state()
    assert [row["step"] for row in run(line_step(), rest, 10, checkpoint=tmp_path)] == [9, 10]
    run(line_step(), whole, 10)
    assert_same(rest, whole)


def without_the_seventh(inner):
    def step(state):
        if state.step != 6:
            return inner(state)
        torch.randn(8, 2, generator=state.generator)
        return {}

    return step


def test_a_nan_found_late_has_moved_nothing_and_is_never_saved(tmp_path):
    state, clean, rows = line_state(), line_state(), []
    with pytest.raises(Diverged, match=r"step 7: student_loss is nan.*step-00000004.pt"):
        for row in fit(line_step(nan_at=6), state, steps=20, log_every=4, checkpoint=tmp_path, every=4):
            rows.append(row["step"])
    assert rows == [1, 2, 3, 4, 5, 6] and state.step == 8
    assert train.checkpoints(tmp_path)[-1].name == "step-00000004.pt"

    run(without_the_seventh(line_step()), clean, 8)
    assert all(tensor.isfinite().all() for tensor in weights(state))
    assert torch.equal(clean.models["student"].weight, state.models["student"].weight)


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_bad_batch_now_and_then_is_passed_over(tmp_path, log_every):
    state, clean = line_state(), line_state()
    rows = run(line_step(nan_at=6), state, 9, log_every=log_every, checkpoint=tmp_path, every=3, skips=1)
    assert [row["step"] for row in rows] == list(range(1, 10))
    assert [row.get("skipped") for row in rows] == 6 * [None] + [1] + 2 * [None]
    assert set(rows[6]) == {"step", "lr", "skipped"}
    run(without_the_seventh(line_step()), clean, 9)
    assert torch.equal(clean.models["student"].weight, state.models["student"].weight)
    assert train.checkpoints(tmp_path)[-1].name == "step-00000009.pt"


def test_ruined_weights_are_not_passed_over_for_long():
    def step(state):
        return {"my_loss": torch.tensor(torch.nan if state.step >= 6 else 1.0)}

    with pytest.raises(Diverged, match="step 9: my_loss is nan"):
        run(step, line_state(), 20, log_every=4, skips=2)


def test_closing_the_loop_before_the_bad_row_saves_nothing_after_it(tmp_path):
    """A step of the reader's own may have ruined the weights by the time its row is read."""

    def step(state):
        return {"my_loss": torch.tensor(torch.nan if state.step == 6 else 1.0)}

    for row in fit(step, line_state(), steps=20, log_every=4, checkpoint=tmp_path, every=4):
        if row["step"] == 5:
            break
    assert train.checkpoints(tmp_path)[-1].name == "step-00000004.pt"


def test_an_optimizer_that_cannot_skip_is_checked_at_once():
    state = line_state()
    model = state.models["student"]
    state.optimizers["student"] = torch.optim.SGD(model.parameters(), 0.1)
    assert not can_skip(state.optimizers["student"])
    with pytest.raises(Diverged, match="step 3: the student's loss is nan"):
        run(line_step(nan_at=2), state, 8, log_every=8)
    assert model.weight.isfinite().all()


@pytest.mark.parametrize(
    "make",
    [
        lambda m: Muon([m.weight], 0.1, weight_decay=0.1),
        lambda m: torch.optim.AdamW(m.parameters(), 0.1, fused=True),
    ],
)
def test_skipping_on_the_device_changes_neither_weights_nor_momenta(make):
    def trained(skips):
        torch.manual_seed(0)
        model = nn.Linear(3, 4)
        optimizer = make(model)
        for number, skip in enumerate(skips):
            torch.manual_seed(number if skip != 1 else 99)
            model.weight.grad, model.bias.grad = torch.randn(4, 3), torch.randn(4)
            if skip == 1:
                model.weight.grad[0, 0], model.bias.grad[0] = torch.nan, torch.inf
            skip_where(optimizer, None if skip is None else torch.tensor(float(skip)))
            optimizer.step()
        return model.weight

    torch.testing.assert_close(trained([None, None]), trained([0, 0]))
    before, after = trained([0]), trained([0, 1])
    assert torch.equal(before, after)
    torch.testing.assert_close(trained([0, 0, 0]), trained([0, 0, 0]))
    assert not torch.equal(trained([0, 0]), before)


# ---- nothing waits --------------------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts what makes a host wait for a device: reading a number, or asking which elements are not zero."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            self.found[str(function)] += 1
        return function(*args, **(kwargs or {}))


def stage_step(stage, dit, batches, compile=train.as_it_is):
    if stage == "teacher":
        return train.teacher_step(dit, batches, shift=SHIFT, compile=compile)
    if stage == "diffusion forcing":
        return train.diffusion_forcing_step(dit, batches, STREAM, shift=SHIFT, compile=compile)
    return train.forcing_step(dit, batches, STREAM, shift=SHIFT, context_noise=0.1, compile=compile)


PRETRAINING = ("teacher", "forcing", "diffusion forcing")


@pytest.mark.parametrize("stage", PRETRAINING)
def test_a_step_reads_no_number_while_ahead(stage):
    dit, role = random_dit(), "teacher" if stage == "teacher" else "student"
    state = TrainState({role: dit}, {role: muon_adamw(dit, 1e-3)}, rng(), {role: train.Average(dit, 0.9)})
    step = stage_step(stage, dit, endless())
    state.ahead = True
    step(state)  # tables that are remembered are made here
    with Waits() as waits:
        row = step(state)
    assert not waits.found and isinstance(row[f"{role}_loss"], torch.Tensor)
    state.ahead = False
    with Waits() as waits:
        float(step(state)[f"{role}_loss"])
    assert waits.found  # the counter does count


def test_batches_are_drawn_without_waiting():
    batches = random_clips(MICRO, 3, torch.device("cpu")).batches(2, rng())
    next(batches)
    with Waits() as waits:
        next(batches)
    assert not waits.found


# ---- one graph ------------------------------------------------------------------------------------------------------


def counted():
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    return graphs, lambda function: torch.compile(function, backend=backend, dynamic=False, fullgraph=True)


@pytest.mark.parametrize("stage", PRETRAINING)
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_forward_and_loss_are_one_graph_with_the_same_numbers(stage):
    graphs, compile = counted()
    torch._dynamo.reset()
    role = "teacher" if stage == "teacher" else "student"
    rows = []
    for hook in (train.as_it_is, compile):
        dit = random_dit()
        rows.append(run(stage_step(stage, dit, endless(), hook), TrainState.of({role: dit}, {role: 1e-3}), 3))
    assert len(graphs) == 1
    assert rows[0] == rows[1]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_distillation_takes_a_compiler_too():
    graphs, compile = counted()
    torch._dynamo.reset()
    rows = []
    for hook in (train.as_it_is, compile):
        student, critic = random_dit(0), random_dit(1)
        state = TrainState.of({"student": student, "critic": critic}, {"student": 1e-3, "critic": 1e-3})
        clips = train.OwnRollout(student, STREAM, few_steps((1,), SHIFT), make_cache)
        step = train.dmd_step(clips, critic, random_dit(2), endless(), STREAM, shift=SHIFT, ratio=2, compile=hook)
        rows.append(run(step, state, 1))
    assert rows[0] == rows[1] and graphs


# ---- batches --------------------------------------------------------------------------------------------------------


def walks(count, pixel_frames):
    make = np.random.default_rng(3)
    keys = make.random((count, pixel_frames, 8)) < 0.4
    return keys, [poses_from_keys(k[1:], move=9.0, turn=4.0) for k in keys]


@pytest.mark.parametrize(("start", "frames"), [(0, 6), (2, 3)])
def test_control_of_a_crop_is_that_of_the_cut_clip(start, frames):
    shape, scale, count = MICRO.shape, MICRO.world_scale, 2
    keys, poses = walks(count, shape.pixel_frames)
    made = random_clips(MICRO, count, torch.device("cpu"))
    clips = LatentClips(
        MICRO,
        made.latents,
        made.images,
        made.tail,
        torch.stack([torch.as_tensor(p[::4]).float() for p in poses]),
        torch.stack([torch.from_numpy(frame_keys(k)) for k in keys]),
        made.intrinsics,
        made.context,
    )
    modes = torch.tensor([True, False])
    batch = clips.batch(torch.arange(count), torch.full((count,), start), frames, modes)
    cut = slice(4 * start, 4 * (start + frames - 1) + 1)
    for row, with_poses in enumerate(modes.tolist()):
        wanted = control_tiny(poses[row][cut], keys[row][cut], made.intrinsics, shape, scale, with_poses=with_poses)
        torch.testing.assert_close(batch.control[row], wanted, rtol=0, atol=2e-6)
    assert torch.equal(batch.latents[:, :, 0], made.images[:, start])


# ---- shared noise ---------------------------------------------------------------------------------------------------


def test_ranks_draw_the_rows_of_one_global_batch(monkeypatch):
    like = torch.empty(6, 2, 3)
    whole = forcing.gaussian(like, parallel.shared_generator("cpu", 4)), forcing.draw_sigma((6, 1), 3.0, rng(5))
    parts = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "place", lambda rank=rank: (rank, 3))
        shared, apart = parallel.shared_generator("cpu", 4), rng(4)
        assert torch.equal(forcing.gaussian(like[:2], apart), torch.randn(2, 2, 3, generator=rng(4)))
        sigma = forcing.draw_sigma((2, 1), 3.0, parallel.shared_generator("cpu", 5))
        parts.append((forcing.gaussian(like[:2], shared), sigma))
    for part, expected in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(part), expected)


@pytest.mark.parametrize(
    ("options", "message"), [({"log_every": 0}, "log_every 0 is below 1"), ({"steps": None}, "fit has no end")]
)
def test_bad_settings_are_one_sentence(options, message):
    with pytest.raises(ValueError, match=message):
        next(fit(line_step(), line_state(), **{"steps": 1, **options}))


def test_ranks_with_noise_of_their_own_have_no_common_checkpoint(monkeypatch, tmp_path):
    monkeypatch.setattr(parallel, "several", lambda: True)
    state = replace(line_state(), generator=rng())
    with pytest.raises(ValueError, match="cannot share a checkpoint"):
        next(fit(line_step(), state, steps=1, checkpoint=tmp_path))


def test_ranks_that_draw_anew_take_the_same_weights_and_other_noise(monkeypatch, tmp_path):
    """Of two ranks with generators of their own: one checkpoint, the first's; nothing is drawn twice."""
    monkeypatch.setattr(parallel, "several", lambda: True)
    monkeypatch.setattr(parallel, "agree", lambda value, device: value)
    monkeypatch.setattr(parallel, "average_gradients", lambda parameters, values=(): list(values))
    seeds = []

    def trained(rank: int, steps: int) -> TrainState:
        monkeypatch.setattr(parallel, "place", lambda: (rank, 2))
        state, clips = replace(line_state(rank), generator=rng(rank)), rng(10 + rank)
        options = dict(checkpoint=tmp_path, store=train.drawn_anew(clips))
        assert [row["step"] for row in fit(line_step(), state, steps=steps, **options)] == [steps - 2, steps - 1, steps]
        seeds.append((state.generator.initial_seed(), clips.initial_seed()))
        return state

    trained(1, 3)
    assert train.checkpoints(tmp_path) == [], "the second rank writes nothing"
    first = trained(0, 3)
    assert [file.name for file in train.checkpoints(tmp_path)] == ["step-00000003.pt"]
    resumed = replace(line_state(1), generator=rng(1))
    train.resume(resumed, tmp_path, train.drawn_anew())
    assert all(torch.equal(*pair) for pair in zip(weights(first), weights(resumed), strict=True))
    trained(1, 6)
    trained(0, 6)
    assert seeds[:2] == [(1, 11), (0, 10)] and len({seed for pair in seeds for seed in pair}) == 8


def test_ranks_ask_for_the_time_now_and_then_and_walk_at_the_last_pace_between(monkeypatch):
    state, asked = line_state(), []

    def rank_0(value, device):
        asked.append(clock.ticks)
        return 2.0 * clock.ticks

    monkeypatch.setattr(parallel, "several", lambda: True)
    monkeypatch.setattr(parallel, "agree", rank_0)
    clock, seen = train._Clock(state), []
    for _ in range(40):
        clock.tick(state)
        seen.append(state.seconds)
    assert asked == [*range(1, 11), 20, 30, 40]
    assert seen == pytest.approx([2.0 * i for i in range(1, 41)])
