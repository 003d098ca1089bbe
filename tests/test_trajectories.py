"""ODE pairs: the solver against closed forms, what depends on what, and a store that survives kills and bit flips."""

import json
import math

import pytest
import torch
from micro_world import random_batch, random_dit, rng
from test_losses import clips, gaussian_end, gaussian_velocity

from lingbot_nb.distill import flow, parallel, trajectories
from lingbot_nb.distill.train import bidirectional_teacher, causal_teacher
from lingbot_nb.distill.trajectories import PairStore, Schedule, make_pairs, visited
from lingbot_nb.presets import MICRO

SCHEDULE = Schedule(steps=8, shift=3.0)


def test_stored_levels_are_those_of_the_student():
    schedule = Schedule(steps=48, shift=5.0)
    assert schedule.kept == [0, 12, 24, 36, 48]
    assert schedule.sigmas.tolist() == pytest.approx([1, 0.9375, 5 / 6, 0.625, 0], abs=1e-6)
    assert schedule.sigmas.tolist()[:-1] == pytest.approx([step.sigma for step in flow.few_steps(schedule.labels, 5.0)])


def test_a_level_between_two_steps_is_refused():
    with pytest.raises(ValueError, match="solver of 50 steps does not visit sigma 0.9375 .nearest 0.94"):
        Schedule(steps=50, shift=5.0)
    assert Schedule(steps=50, shift=5.0, labels=(1, 0.5)).kept == [0, 25, 50]
    with pytest.raises(ValueError, match="use a number of steps"):
        visited(flow.sigma_grid(4, 1.0), [0.6])


def test_euler_states_converge_to_the_gaussian_trajectory_at_first_order():
    mean, std = 0.4, 0.7
    noise, errors = clips(seed=6), []
    for steps in (48, 96, 192):
        schedule = Schedule(steps, 3.0)
        states = trajectories.teacher_trajectory(gaussian_velocity(mean, std), noise, schedule)
        end = gaussian_end(noise.double(), 1.0, mean, std)
        worst = 0.0
        for sigma, state in zip(schedule.sigmas.tolist(), states.unbind(1), strict=True):
            spread = math.sqrt((1 - sigma) ** 2 * std**2 + sigma**2)
            exact = (1 - sigma) * mean + spread / std * (end - mean)
            worst = max(worst, (state - exact).abs().max().item())
        errors.append(worst)
        assert torch.equal(states[:, 0], noise)
    assert errors[0] < 0.1
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.15) and errors[1] / errors[2] == pytest.approx(2, rel=0.15)


def test_a_causal_pair_depends_on_its_own_noise_and_a_bidirectional_one_on_the_future():
    """What Causal-Forcing is about: only the causal teacher gives one end for one noisy chunk and its past."""
    dit, batch = random_dit(), random_batch()
    noise = torch.randn(batch.latents.shape, generator=rng(3))
    future = noise.clone()
    future[:, :, 4] += 1
    causal = causal_teacher(dit, MICRO.stream, SCHEDULE)
    here, there = causal(batch, noise), causal(batch, future)
    assert torch.equal(here[:, :, :, :4], there[:, :, :, :4])
    assert not torch.allclose(here[:, -1, :, 4], there[:, -1, :, 4])
    both = bidirectional_teacher(dit, SCHEDULE)
    assert not torch.allclose(both(batch, noise)[:, -1, :, :4], both(batch, future)[:, -1, :, :4], atol=1e-3)


def test_a_causal_pair_holds_the_start_image_and_reads_the_clean_past():
    dit, batch = random_dit(), random_batch()
    noise = torch.randn(batch.latents.shape, generator=rng(3))
    states = causal_teacher(dit, MICRO.stream, SCHEDULE)(batch, noise)
    assert states.shape == (2, 5, *batch.latents.shape[1:]) and states.requires_grad is False
    for state in states.unbind(1):
        assert torch.equal(state[:, :, 0], batch.latents[:, :, 0])
    moved = random_batch()
    moved.latents[:, :, 1] += 1
    after = causal_teacher(dit, MICRO.stream, SCHEDULE)(moved, noise)
    assert torch.equal(after[:, :, :, 1], states[:, :, :, 1])
    assert not torch.allclose(after[:, -1, :, 2], states[:, -1, :, 2])


def test_guidance_mixes_the_unconditional_trajectory():
    dit, batch = random_dit(), random_batch()
    noise = torch.randn(batch.latents.shape, generator=rng(3))
    one_step = Schedule(steps=1, shift=3.0, labels=(1,))

    def other(batch):
        return random_batch(9)

    plain = bidirectional_teacher(dit, one_step)
    c, u = plain(batch, noise)[:, -1], plain(other(batch), noise)[:, -1]
    guided = bidirectional_teacher(dit, one_step, guidance=4.0, unconditional=other)(batch, noise)[:, -1]
    torch.testing.assert_close(guided, u + 4 * (c - u), rtol=1e-4, atol=1e-4)


# ---- the store ------------------------------------------------------------------------------------------------------


def trajectory(batch, noise):
    return trajectories.teacher_trajectory(gaussian_velocity(0.0, 1.0), noise, SCHEDULE)


def store_at(folder, **card):
    return PairStore(folder, "micro", SCHEDULE, **{"teacher": "bidirectional", **card})


def fill(store, count=4, **options):
    return list(make_pairs(store, trajectory, random_batch, count, **options))


def test_pairs_come_back_with_their_batch(tmp_path):
    store = store_at(tmp_path)
    rows = fill(store)
    assert [row["left"] for row in rows] == [3, 2, 1, 0] and store.shards == [0, 1, 2, 3]
    pair = store.pair(2, random_batch)
    assert torch.equal(pair.batch.latents, random_batch(2).latents)
    noise = pair.states[:, 0]
    assert torch.equal(pair.states, trajectory(pair.batch, noise))


def test_restart_and_two_processes_make_the_same_pairs(tmp_path):
    whole, pieces = store_at(tmp_path / "whole"), store_at(tmp_path / "pieces")
    fill(whole)
    killed = make_pairs(pieces, trajectory, random_batch, 4, rank=1, world=2)
    next(killed)
    (pieces.folder / "pairs-000000.safetensors").write_bytes(b"half")
    assert pieces.missing(4) == [0, 2, 3] and pieces.missing(4, rank=1, world=2) == [3]
    fill(pieces, rank=0, world=2)
    fill(pieces, rank=1, world=2)
    for shard in range(4):
        assert whole.file(shard).read_bytes() == pieces.file(shard).read_bytes()
    assert fill(pieces) == [] and not list(pieces.folder.glob("*.partial"))


def test_seed_changes_the_noise(tmp_path):
    one, two = store_at(tmp_path / "1"), store_at(tmp_path / "2")
    fill(one, 1)
    fill(two, 1, seed=1)
    assert not torch.equal(one.read(0)["states"], two.read(0)["states"])


def test_a_flipped_byte_is_found(tmp_path):
    store = store_at(tmp_path)
    fill(store, 1)
    data = bytearray(store.file(0).read_bytes())
    data[-5] ^= 1
    store.file(0).write_bytes(data)
    with pytest.raises(ValueError, match="pairs-000000.safetensors does not match its sha256"):
        store.read(0)
    with pytest.raises(FileNotFoundError, match="shard 7 is not in"):
        store.read(7)


def test_pairs_of_other_settings_or_clips_are_refused(tmp_path):
    store = store_at(tmp_path)
    fill(store, 1)
    with pytest.raises(ValueError, match="preset micro instead of tiny"):
        PairStore(tmp_path, "tiny", SCHEDULE, teacher="bidirectional")
    with pytest.raises(ValueError, match="shift 3.0 instead of 5.0"):
        PairStore(tmp_path, "micro", Schedule(8, 5.0), teacher="bidirectional")
    with pytest.raises(ValueError, match="teacher bidirectional instead of causal"):
        store_at(tmp_path, teacher="causal")
    with pytest.raises(ValueError, match="made under other clips"):
        store.pair(0, lambda i: random_batch(i + 1))
    assert json.loads((tmp_path / "store.json").read_text())["steps"] == 8


def test_nan_is_not_stored(tmp_path):
    store = store_at(tmp_path)
    with pytest.raises(ValueError, match="nan or inf"):
        store.write(0, torch.full((1, 5, 2, 1, 2, 2), torch.nan), torch.zeros(1, 2, 1, 2, 2))
    assert store.shards == []
    with pytest.raises(FileNotFoundError, match="no pairs in"):
        next(store.pairs(random_batch, rng()))


def test_half_precision_store_and_random_order(tmp_path):
    store = PairStore(tmp_path, "micro", SCHEDULE, dtype=torch.float16)
    fill(store)
    generator = rng(2)
    walk = store.pairs(random_batch, generator)
    state = generator.get_state()
    first = [next(walk).states for _ in range(6)]
    generator.set_state(state)
    again = store.pairs(random_batch, generator)
    assert all(torch.equal(a, next(again).states) for a in first)
    exact = trajectory(None, trajectories.gaussian(random_batch(0).latents, rng(0)))
    torch.testing.assert_close(store.read(0)["states"], exact, rtol=2e-3, atol=2e-3)


def test_ranks_that_share_a_generator_take_shards_of_their_own(tmp_path, monkeypatch):
    store = store_at(tmp_path)
    fill(store, 4)

    def walk(rank, ranks):
        monkeypatch.setattr(parallel, "place", lambda: (rank, ranks))
        pairs = store.pairs(random_batch, parallel.shared_generator("cpu", 3))
        return [next(pairs).batch.latents[0, 0, 0, 0, 0].item() for _ in range(6)]

    alone, first, second = walk(0, 1), walk(0, 2), walk(1, 2)
    assert first != second and first[:3] == alone[::2] and second[:3] == alone[1::2]
