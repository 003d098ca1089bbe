"""The loop: exact resume, honest failure, schedules; and every stage's step on a micro network."""

import errno
import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from micro_world import SHAPE, SIZE, endless, gradients, random_batch, random_dit, rng
from torch import nn

from lingbot_nb.distill import parallel, train
from lingbot_nb.distill.flow import few_steps, sigma_grid
from lingbot_nb.distill.train import Average, Diverged, Stream, TrainState, fit
from lingbot_nb.distill.trajectories import PairStore, Schedule, make_pairs
from lingbot_nb.model.kv_cache import GradCache
from lingbot_nb.presets import MICRO

STREAM = replace(MICRO.stream, window=3)
SHIFT = MICRO.flow.shift


class Killed(Exception):
    """Stands for a kill -9: nothing of the run's own code gets to react."""


def line_state(seed=0, **options):
    """A two-number model that a noisy target pulls on: the smallest run with optimizer state, noise and EMA."""
    torch.manual_seed(seed)
    return TrainState.of({"student": nn.Linear(2, 1)}, {"student": 0.1}, seed=seed, average={"student": 0.9}, **options)


def line_step(fail_at=None, nan_at=None):
    def step(state):
        if fail_at is not None and state.step == fail_at:
            raise Killed
        x = torch.randn(8, 2, generator=state.generator)
        model = state.models["student"]

        def loss():
            value = (model(x) - x.sum(1, keepdim=True)).square().mean()
            return value * (torch.nan if state.step == nan_at else 1), {}

        return train.descend(state, "student", loss)

    return step


def run(step, state, steps, **options):
    rows = []
    for row in fit(step, state, steps=steps, **options):
        rows.append({name: value for name, value in row.items() if name != "seconds"})
    return rows


def weights(state):
    modules = [*state.models.values(), *(average.module for average in state.averages.values())]
    return [tensor.clone() for module in modules for tensor in module.state_dict().values()]


def assert_same(one, two):
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))


# ---- resume ---------------------------------------------------------------------------------------------------------


def kill_and_resume(make, steps, kill_at, folder, every, schedule=train.constant):
    """(uninterrupted rows, state), (rows of the killed run cut at its checkpoint + resumed rows, state)."""
    step, state = make(None)
    whole = run(step, state, steps, schedule=schedule)
    step, killed = make(kill_at)
    rows = []
    with pytest.raises(Killed):
        for row in fit(step, killed, steps=steps, checkpoint=folder, every=every, schedule=schedule):
            rows.append({name: value for name, value in row.items() if name != "seconds"})
    step, resumed = make(None)
    rest = run(step, resumed, steps, checkpoint=folder, every=every, schedule=schedule)
    kept = kill_at // every * every
    assert rest[0]["step"] == kept + 1
    return (whole, state), (rows[:kept] + rest, resumed)


def test_kill_and_resume_equals_uninterrupted(tmp_path):
    def make(fail_at):
        return line_step(fail_at), line_state()

    schedule = train.warmup_decay(0.2, 0.4)
    (whole, state), (rows, resumed) = kill_and_resume(make, 20, 13, tmp_path, 5, schedule)
    assert whole == rows and len(rows) == 20
    assert_same(state, resumed)


def fails_at(step, number):
    def failing(state):
        if state.step == number:
            raise Killed
        return step(state)

    return failing


def make_cache(batch):
    return GradCache(SIZE, STREAM, SHAPE, batch=len(batch))


def make_dmd(fail_at):
    student, critic, teacher = random_dit(0), random_dit(1), random_dit(2)
    stream = Stream(endless())
    state = TrainState.of(
        {"student": student, "critic": critic},
        {"student": 1e-3, "critic": 1e-3},
        betas=(0.0, 0.999),
        average={"student": 0.9},
        streams={"batches": stream},
    )
    clips = train.OwnRollout(student, STREAM, few_steps((1, 0.5), SHIFT), make_cache)
    step = train.dmd_step(clips, critic, teacher, stream, STREAM, shift=SHIFT, ratio=3, critic_first=1)
    return fails_at(step, fail_at), state


def make_forcing(fail_at):
    dit, generator = random_dit(), rng(5)

    def batches():
        while True:
            yield random_batch(int(torch.randint(1000, (), generator=generator)))

    stream = Stream(batches(), generator)
    state = TrainState.of({"student": dit}, {"student": 1e-3}, streams={"batches": stream})
    return fails_at(train.forcing_step(dit, stream, STREAM, shift=SHIFT, context_noise=0.1), fail_at), state


@pytest.mark.parametrize("make", [make_forcing, make_dmd])
def test_stages_resume_exactly(make, tmp_path):
    (whole, state), (rows, resumed) = kill_and_resume(make, 6, 5, tmp_path, 2)
    assert whole == rows
    assert_same(state, resumed)


def test_stopping_the_loop_saves_and_goes_on(tmp_path):
    whole, once, again = line_state(), line_state(), line_state()
    run(line_step(), whole, 10)
    for row in fit(line_step(), once, steps=10, checkpoint=tmp_path, every=100):
        if row["step"] == 4:
            break
    assert [file.name for file in train.checkpoints(tmp_path)] == ["step-00000004.pt"]
    rows = run(line_step(), again, 10, checkpoint=tmp_path)
    assert [row["step"] for row in rows] == [5, 6, 7, 8, 9, 10]
    assert_same(whole, again)
    assert run(line_step(), line_state(), 10, checkpoint=tmp_path) == []


def test_only_the_newest_two_checkpoints_stay(tmp_path):
    run(line_step(), line_state(), 10, checkpoint=tmp_path, every=2)
    files = sorted(file.name for file in tmp_path.iterdir())
    assert files == [f"step-000000{step}.{kind}" for step in ("08", "10") for kind in ("json", "pt")]


def test_metrics_are_json_lines_cut_back_on_resume(tmp_path):
    file, folder = tmp_path / "metrics.jsonl", tmp_path / "checkpoints"
    with pytest.raises(Killed):
        run(line_step(fail_at=8), line_state(), 12, checkpoint=folder, every=5, metrics=file)
    assert len(file.read_text().splitlines()) == 8
    with file.open("a") as handle:
        handle.write('{"step": 9, "stu')
    run(line_step(), line_state(), 12, checkpoint=folder, every=5, metrics=file)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert set(rows[0]) == {"step", "seconds", "lr", "student_loss", "student_grad"}


# ---- bad luck and bad input -----------------------------------------------------------------------------------------


def test_nan_stops_before_the_weights_and_names_step_and_checkpoint(tmp_path):
    clean = line_state()
    run(line_step(), clean, 7)
    state = line_state()
    with pytest.raises(Diverged, match=r"step 8: the student's loss is nan.*step-00000006.pt"):
        run(line_step(nan_at=7), state, 20, checkpoint=tmp_path, every=3)
    assert_same(clean, state)
    assert train.checkpoints(tmp_path)[-1].name == "step-00000006.pt"
    with pytest.raises(Diverged, match="there is no checkpoint"):
        run(line_step(nan_at=0), line_state(), 2)


def test_a_step_of_the_readers_own_is_stopped_by_the_loss_it_returns(tmp_path):
    def step(state):
        return {"my_loss": torch.tensor(torch.inf if state.step == 3 else 1.0), "ratio": torch.nan}

    with pytest.raises(Diverged, match=r"step 4: my_loss is inf.*step-00000002.pt"):
        run(step, line_state(), 9, checkpoint=tmp_path, every=2)
    assert train.checkpoints(tmp_path)[-1].name == "step-00000002.pt"


def test_infinite_gradient_of_a_finite_loss_stops_too():
    state = line_state()
    before = weights(state)

    def loss():
        weight = state.models["student"].weight
        return (weight - weight.detach()).abs().sqrt().sum(), {}

    with pytest.raises(Diverged, match="gradient norm"):
        train.descend(state, "student", loss)
    assert all(torch.equal(a, b) for a, b in zip(before, weights(state), strict=True))


def test_a_flipped_byte_is_said_and_the_one_before_still_works(tmp_path):
    run(line_step(), line_state(), 10, checkpoint=tmp_path, every=5)
    newest = train.checkpoints(tmp_path)[-1]
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    with pytest.raises(ValueError, match="step-00000010.pt does not match its sha256.*delete it"):
        run(line_step(), line_state(), 20, checkpoint=tmp_path)
    newest.unlink()
    assert run(line_step(), line_state(), 20, checkpoint=tmp_path)[0]["step"] == 6


def test_another_runs_checkpoint_is_refused(tmp_path):
    run(line_step(), line_state(preset="tiny"), 2, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="made with preset tiny instead of micro"):
        run(line_step(), line_state(preset="micro"), 4, checkpoint=tmp_path)
    state = line_state(preset="tiny")
    state.averages = {}
    with pytest.raises(ValueError, match=r"checkpoint holds averages \['student'\], this run \[\]"):
        run(line_step(), state, 4, checkpoint=tmp_path)


def test_a_sharded_run_in_the_folder_is_not_taken_for_an_empty_one(tmp_path):
    (tmp_path / "step-00000005").mkdir()
    (tmp_path / "step-00000005" / "card.json").write_text("{}")
    with pytest.raises(ValueError, match="step-00000005 is a checkpoint of a sharded network: pass fit store"):
        run(line_step(), line_state(), 6, checkpoint=tmp_path)
    assert not list(tmp_path.glob("*.pt"))


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    state = line_state()
    run(line_step(), state, 5, checkpoint=tmp_path)
    kept = train.checkpoints(tmp_path)[-1].read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(RuntimeError, match="step-00000007.pt could not be written .No space left on device"):
        run(line_step(), state, 7, checkpoint=tmp_path, every=100)
    monkeypatch.undo()
    assert [file.name for file in tmp_path.glob("*")].count("step-00000005.pt") == 1
    assert train.checkpoints(tmp_path)[-1].read_bytes() == kept and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: next(fit(line_step(), line_state())), "fit has no end"),
        (lambda: train.warmup_decay(0.8, 0.5), "do not fit in one run"),
        (lambda: Average(nn.Linear(1, 1), 1.0), "EMA decay 1.0"),
        (lambda: TrainState.of({"student": nn.Linear(1, 1)}, {"critic": 0.1}), "no model for role 'critic'"),
        (lambda: train.dmd_step(None, None, None, None, STREAM, shift=3, ratio=0), "ratio 0 is below 1"),
    ],
)
def test_bad_settings_are_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_stream_past_its_checkpoint_is_refused():
    stream = Stream(iter(range(10)))
    assert [next(stream) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="data is at 4, past the checkpoint's 2"):
        stream.load_state_dict({"position": 2})
    stream.load_state_dict({"position": 6})
    assert next(stream) == 6


# ---- the pieces of an update ----------------------------------------------------------------------------------------


def test_schedule_rises_stays_and_falls():
    factor = train.warmup_decay(0.1, 0.4, floor=0.2)
    assert [factor(p) for p in (0.05, 0.1, 0.5, 0.8, 1.0)] == pytest.approx([0.5, 1, 1, 0.6, 0.2])
    assert train.warmup_decay(0, 0)(0.0) == 1


def test_learning_rate_follows_steps_or_seconds_and_comes_back():
    state, seen = line_state(), []

    def step(state):
        seen.append(state.optimizers["student"].param_groups[0]["lr"])
        return {}

    rows = list(fit(step, state, steps=4, schedule=lambda progress: 1 - progress))
    assert seen == pytest.approx([0.1 * f for f in (0.875, 0.625, 0.375, 0.125)])
    assert [row["lr"] for row in rows] == pytest.approx([0.875, 0.625, 0.375, 0.125])
    assert state.optimizers["student"].param_groups[0]["lr"] == 0.1
    state, seen[:] = line_state(), []
    for _ in fit(step, state, seconds=10, schedule=lambda progress: 1 - progress):
        # As if each step took 2.5 s.
        state.seconds = 2.5 * state.step
    assert seen == pytest.approx([0.1, 0.075, 0.05, 0.025])


def test_average_follows_its_formula_and_is_frozen():
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(0.0)
    average = Average(module, 0.9, start=1)
    values = []
    for value in (1.0, 2.0, 3.0):
        module.weight.data.fill_(value)
        average.update(module)
        values.append(average.module.weight.item())
    assert values == pytest.approx([1.0, 2.0, 0.1 * 2.0 + 0.9 * 3.0])
    assert not average.module.weight.requires_grad


def test_a_long_average_reaches_its_decay_and_a_short_one_forgets_its_start():
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(100.0)
    average, expected = Average(module, 0.9), 0.0
    for n in range(200):
        value = math.sin(n)
        module.weight.data.fill_(value)
        average.update(module)
        decay = min(0.9, n / (n + 9))
        expected = decay * expected + (1 - decay) * value
    assert average.module.weight.item() == pytest.approx(expected, abs=1e-5)


def test_accumulated_batches_give_the_mean_gradient():
    batches = [torch.randn(4, 2, generator=rng(i)) for i in range(3)]

    def gradient(parts):
        state, left = line_state(), iter(parts)
        model = state.models["student"]
        train.descend(
            state, "student", lambda: (model(next(left)).square().mean(), {}), accumulate=len(parts), clip=math.inf
        )
        return model.weight.grad

    torch.testing.assert_close(gradient(batches), gradient([torch.cat(batches)]))


def test_a_global_batch_is_shared_out_over_ranks_and_rounds(monkeypatch):
    assert parallel.rounds(64) == (64, 1) and parallel.rounds(64, 12) == (8, 8) and parallel.rounds(7, 4) == (1, 7)
    monkeypatch.setattr(parallel, "place", lambda: (1, 4))
    assert parallel.rounds(64, 8) == (8, 2)
    with pytest.raises(ValueError, match="a batch of 6 clips does not spread over 4 processes"):
        parallel.rounds(6)


def test_clipping_bounds_the_gradient_and_reports_its_norm():
    state = line_state()
    model = state.models["student"]
    row = train.descend(state, "student", lambda: (1e3 * model.weight.sum(), {}), clip=2.0)
    assert row["student_grad"] == pytest.approx(1e3 * math.sqrt(2))
    assert model.weight.grad.norm().item() == pytest.approx(2, rel=1e-4)


# ---- the stages -----------------------------------------------------------------------------------------------------


def one_role(role, make_step, steps=2, lr=1e-3, **options):
    dit = random_dit()
    state = TrainState.of({role: dit}, {role: lr}, **options)
    rows = run(make_step(dit), state, steps)
    return dit, rows


def assert_all_learn(dit):
    silent = {name for name, _ in dit.named_parameters()} - gradients(dit).keys()
    assert not silent
    assert all(grad.isfinite().all() for grad in gradients(dit).values())


STAGES = {
    "teacher": lambda dit, batches: train.teacher_step(dit, batches, shift=SHIFT),
    "forcing": lambda dit, batches: train.forcing_step(dit, batches, STREAM, shift=SHIFT),
    "diffusion forcing": lambda dit, batches: train.diffusion_forcing_step(dit, batches, STREAM, shift=SHIFT),
}


@pytest.mark.parametrize("stage", STAGES)
def test_pretraining_moves_every_parameter_and_brings_the_loss_down(stage):
    role, fixed = "teacher" if stage == "teacher" else "student", itertools.repeat(random_batch())
    dit, rows = one_role(role, lambda dit: STAGES[stage](dit, fixed), steps=24, lr=4e-3)
    losses = [row[f"{role}_loss"] for row in rows]
    assert sum(losses[-8:]) < 0.95 * sum(losses[:8])
    assert_all_learn(dit)


@pytest.mark.parametrize("clean_context", [True, False])
def test_ode_regression_fits_stored_pairs(clean_context, tmp_path):
    schedule = Schedule(8, SHIFT, (1, 0.5))
    teacher = random_dit(3)
    if clean_context:
        trajectory = train.causal_teacher(teacher, STREAM, schedule)
    else:
        trajectory = train.bidirectional_teacher(teacher, schedule)
    store = PairStore(tmp_path, "micro", schedule)
    list(make_pairs(store, trajectory, random_batch, 2))
    pairs = store.pairs(random_batch, rng())

    def make(dit):
        return train.ode_regression_step(dit, pairs, STREAM, schedule.sigmas, clean_context=clean_context)

    dit, rows = one_role("student", make, steps=24, lr=4e-3)
    losses = [row["student_loss"] for row in rows]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    assert_all_learn(dit)


def test_causal_teacher_itself_regresses_to_zero_on_one_euler_step(tmp_path):
    """With a one-step solver x0 = x - sigma·v is the trajectory's end: the teacher is its own perfect student."""
    schedule = Schedule(1, SHIFT, (1,))
    teacher = random_dit(3)
    store = PairStore(tmp_path, "micro", schedule)
    list(make_pairs(store, train.causal_teacher(teacher, STREAM, schedule), random_batch, 1))
    state = TrainState.of({"student": teacher}, {"student": 0.0}, weight_decay=0)
    step = train.ode_regression_step(teacher, store.pairs(random_batch, rng()), STREAM, schedule.sigmas)
    assert step(state)["student_loss"] < 1e-10


def test_consistency_moves_the_student_and_its_average_only():
    teacher = random_dit(0)
    frozen = [p.clone() for p in teacher.parameters()]
    averages = dict(average={"student": 0.99})

    def make(dit):
        return train.consistency_step(dit, teacher, endless(), STREAM, sigma_grid(8, SHIFT))

    dit, rows = one_role("student", make, **averages)
    assert all(torch.equal(a, b) for a, b in zip(frozen, teacher.parameters(), strict=True))
    assert all(p.grad is None for p in teacher.parameters())
    assert math.isfinite(rows[-1]["student_loss"])
    with pytest.raises(ValueError, match="needs the student's average"):
        one_role("student", make)


def test_dmd_updates_the_critic_every_step_and_the_student_every_third():
    step, state = make_dmd(None)
    before = [p.clone() for p in state.models["student"].parameters()]
    rows = run(step, state, 1)
    assert all(torch.equal(a, b) for a, b in zip(before, state.models["student"].parameters(), strict=True))
    rows += run(step, state, 8)
    # critic_first = 1, ratio = 3: steps 2, 5, 8 update the student too.
    assert [row["step"] for row in rows if "student_loss" in row] == [2, 5, 8]
    assert all("critic_loss" in row for row in rows)
    assert rows[1]["student_g"] > 0 and 0.02 <= rows[1]["student_sigma"] <= 0.98
    assert_all_learn(state.models["critic"])


def test_dmd_gives_the_student_no_gradient_when_teacher_and_critic_agree():
    student, same = random_dit(0), random_dit(1)
    state = TrainState.of({"student": student, "critic": same}, {"student": 1e-3, "critic": 0.0}, weight_decay=0)
    clips = train.OwnRollout(student, STREAM, few_steps((1, 0.5), SHIFT), make_cache)
    row = train.dmd_step(clips, same, same, endless(), STREAM, shift=SHIFT)(state)
    assert row["student_grad"] == 0 and row["student_loss"] == 0 and row["critic_grad"] > 0


@pytest.mark.parametrize("labels", [(1,), (1, 0.5), (1, 2 / 3, 1 / 3)])
def test_students_of_one_to_three_steps_learn_at_every_exit(labels):
    student, critic, teacher = random_dit(0), random_dit(1), random_dit(2)
    models = {"student": student, "critic": critic}
    state = TrainState.of(models, {"student": 1e-3, "critic": 1e-3}, betas=(0.0, 0.999))
    clips = train.OwnRollout(student, STREAM, few_steps(labels, SHIFT), make_cache)
    drawn = []

    class Watched(train.OwnRollout):
        def draw(self, generator):
            drawn.append(super().draw(generator))
            return drawn[-1]

    watched = Watched(clips.student, clips.settings, clips.steps, clips.make_cache)
    step = train.dmd_step(watched, critic, teacher, endless(), STREAM, shift=SHIFT, ratio=1)
    rows = run(step, state, 6)
    assert all(row["student_grad"] > 0 for row in rows) and set(drawn) == set(range(len(labels)))


def test_the_critic_meets_every_clip_of_an_accumulated_update():
    student, critic, teacher = random_dit(0), random_dit(1), random_dit(2)
    models = {"student": student, "critic": critic}
    state = TrainState.of(models, {"student": 1e-3, "critic": 1e-3}, betas=(0.0, 0.999))
    made, seen = [], []

    class Clips(train.OwnRollout):
        def __call__(self, *args):
            made.append(super().__call__(*args))
            return made[-1]

    class Critic(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dit = critic

        def __getattr__(self, name):
            return super().__getattr__(name) if name == "dit" else getattr(self.dit, name)

        def forward(self, x, t, **inputs):
            if torch.is_grad_enabled():
                # What was noised: x_sigma at the lowest levels is nearly the clip.
                seen.append(inputs["condition_BCFHW"])
            return self.dit(x, t, **inputs)

    clips = Clips(student, STREAM, few_steps((1,), SHIFT), make_cache)
    options = dict(shift=SHIFT, ratio=5, reuse=True, accumulate=2)
    step = train.dmd_step(clips, Critic(), teacher, endless(), STREAM, **options)
    run(step, state, 2)
    assert len(made) == 2 and len(seen) == 4
    for at, condition in enumerate(seen):
        assert torch.equal(condition, made[at % 2][0].condition)


def test_a_student_that_moved_is_held_back_to_what_it_was():
    before, dit = random_dit().requires_grad_(False), random_dit()
    with torch.no_grad():
        for weight in dit.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=rng(3)))
    frozen = [weight.clone() for weight in before.parameters()]
    state = TrainState.of({"student": dit}, {"student": 3e-3})
    step = train.keeping_step(dit, before, endless(), STREAM, shift=SHIFT, context_noise=0.2, weight=2.0)
    rows = run(step, state, 60)
    losses = [row["kept_loss"] for row in rows]
    assert losses[0] > 0 and sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert all(torch.equal(old, new) for old, new in zip(frozen, before.parameters(), strict=True))
    twin = TrainState.of({"student": random_dit()}, {"student": 3e-3})
    row = train.keeping_step(twin.models["student"], before, endless(), STREAM, shift=SHIFT)(twin)
    assert row["kept_loss"] == 0 and row["kept_grad"] == 0


def test_noisy_history_is_another_source_of_clips():
    student = random_dit(0)
    clips = train.NoisyHistory(student, STREAM, few_steps((1, 0.5), SHIFT))
    batch = random_batch()
    same, clip = clips(batch, rng())
    assert same is batch and clip.shape == batch.latents.shape and torch.equal(clip[:, :, 0], batch.latents[:, :, 0])
    state = TrainState.of({"student": student, "critic": random_dit(1)}, {"student": 1e-3, "critic": 1e-3})
    step = train.dmd_step(clips, state.models["critic"], random_dit(2), endless(), STREAM, shift=SHIFT)
    assert step(state)["student_grad"] > 0
    assert_all_learn(student)


def test_bfloat16_autocast_trains_every_parameter():
    def make(dit):
        return train.forcing_step(dit, endless(), STREAM, shift=SHIFT, precision=train.autocast("cpu"))

    dit, rows = one_role("student", make)
    assert_all_learn(dit)
    assert all(p.dtype == torch.float32 for p in dit.parameters())
    _, exact = one_role("student", lambda dit: train.forcing_step(dit, endless(), STREAM, shift=SHIFT))
    assert rows[0]["student_loss"] == pytest.approx(exact[0]["student_loss"], rel=0.02)


def test_checkpointed_layers_give_the_same_losses():
    rows = []
    for checkpoint in (False, True):
        _, found = one_role(
            "student", lambda dit, c=checkpoint: train.forcing_step(dit, endless(), STREAM, shift=SHIFT, checkpoint=c)
        )
        rows.append([row["student_loss"] for row in found])
    assert rows[0] == pytest.approx(rows[1], rel=1e-5)
