"""Adapters: nothing at first, gradients for themselves alone, the right one under recomputation, files, merging."""

import copy
from functools import partial

import pytest
import sharded_target
import torch
from micro_world import SHAPE, SIZE, endless, gradients, random_batch, random_dit, rng

from lingbot_nb.distill import train
from lingbot_nb.distill.flow import few_steps
from lingbot_nb.distill.launch import launch
from lingbot_nb.model import checkpoint, lora
from lingbot_nb.model.kv_cache import GradCache
from lingbot_nb.model.lora import Adapted
from lingbot_nb.presets import MICRO


def adapted(base, seed=1, **options):
    """Adapters that do something: a fresh `up` is zero."""
    torch.manual_seed(seed)
    network = Adapted(base, rank=3, alpha=6, **options)
    for adapter in network.adapters.values():
        torch.nn.init.normal_(adapter.up, std=0.2)
    return network


def velocity(dit, batch, **options):
    t = torch.tensor([300.0, 700.0])
    return train.bind(dit, batch, **options)(batch.latents, t)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_changes_nothing_bit_for_bit(dtype):
    base, batch = random_dit().to(dtype), random_batch()
    with torch.no_grad():
        expected = velocity(base, batch)
        fresh = Adapted(base, rank=4, targets=lora.TARGETS + lora.CAMERA)
        assert torch.equal(velocity(fresh, batch), expected)
        assert not torch.equal(velocity(adapted(base), batch), expected)


def test_it_computes_w_x_plus_b_a_x():
    linear = torch.nn.Linear(5, 7)
    adapter = lora.LowRank(linear, 2, 3.0, torch.float64)
    torch.nn.init.normal_(adapter.up)
    x = torch.randn(2, 4, 5, generator=rng())
    expected = linear(x) + 1.5 * (x.double() @ adapter.down.T @ adapter.up.T).float()
    torch.testing.assert_close(lora.AdaptedLinear(linear, adapter)(x), expected)


def test_parameters_are_the_adapters_alone():
    base = random_dit()
    network = Adapted(base, rank=3)
    per_layer = 8 * 3 * 2 * SIZE.dim + 2 * 3 * (SIZE.dim + SIZE.ffn_dim)
    assert sum(p.numel() for p in network.parameters()) == SIZE.layers * per_layer
    assert network.state_dict().keys() == {
        f"blocks.{i}.{target}.{part}" for i in range(SIZE.layers) for target in lora.TARGETS for part in ("down", "up")
    }
    assert not any(p.requires_grad for p in base.parameters())
    assert all(p.requires_grad for p in network.parameters())


def test_gradients_reach_the_called_adapters_and_nothing_else():
    base, batch = random_dit(), random_batch()
    student, critic = adapted(base, 1), adapted(base, 2)
    velocity(student, batch).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in student.parameters())
    assert all(p.grad is None for p in (*critic.parameters(), *base.parameters()))


def test_the_base_answers_as_before_while_adapters_train():
    base, batch = random_dit(), random_batch()
    student = adapted(base)
    with torch.no_grad():
        before = velocity(base, batch)
    optimizer = torch.optim.AdamW(student.parameters(), 0.1)
    velocity(student, batch).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        assert torch.equal(velocity(base, batch), before)


def test_recomputing_meets_the_adapter_that_was_called():
    """Both graphs are open when backward begins: a switched adapter would be the last one's."""
    base, batch = random_dit(), random_batch()

    def both(checkpoint):
        student, critic = adapted(base, 1), adapted(base, 2)
        losses = [velocity(net, batch, checkpoint=checkpoint).square().mean() for net in (student, critic)]
        sum(losses).backward()
        return gradients(student) | {f"critic {name}": g for name, g in gradients(critic).items()}

    kept, recomputed = both(False), both(True)
    assert kept.keys() == recomputed.keys()
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_a_copy_shares_the_base_and_owns_its_adapters():
    base, batch = random_dit(), random_batch()
    student = adapted(base)
    average = train.Average(student, 0.9)
    assert average.module.base is base
    assert all(not p.requires_grad for p in average.module.parameters())
    with torch.no_grad():
        assert torch.equal(velocity(average.module, batch), velocity(student, batch))
        next(student.parameters()).add_(1)
        assert not torch.equal(velocity(average.module, batch), velocity(student, batch))


def test_a_copy_draws_nothing_from_the_callers_noise():
    student = adapted(random_dit())
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    copy.deepcopy(student)
    assert torch.equal(torch.rand(3), expected)


def test_lean_gives_the_same_numbers():
    base, batch = random_dit(), random_batch()
    with torch.no_grad():
        expected = velocity(base, batch)
        torch.testing.assert_close(velocity(Adapted(base, targets=(), lean=True), batch), expected)


def test_merged_weights_do_what_the_adapters_did():
    base, batch = random_dit(), random_batch()
    student = adapted(base, targets=lora.TARGETS + lora.CAMERA)
    with torch.no_grad():
        expected = velocity(student, batch)
        merged = lora.merge_into(copy.deepcopy(base), student)
        torch.testing.assert_close(velocity(merged, batch), expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(velocity(base, batch), expected, atol=1e-2)


def test_files_hold_the_adapters_and_bring_them_back(tmp_path):
    base, batch = random_dit(), random_batch()
    student = adapted(base)
    file = lora.save(tmp_path / "student.safetensors", student, stage="dmd")
    loaded = lora.load(file, base, adapt=partial(Adapted, lean=True))
    assert (loaded.rank, loaded.alpha, loaded.targets, loaded.lean) == (3, 6.0, lora.TARGETS, True)
    with torch.no_grad():
        torch.testing.assert_close(velocity(loaded, batch), velocity(student, batch))
    parameters = sum(p.numel() for p in student.parameters())
    assert file.stat().st_size < 4 * parameters + 20_000


def test_bad_input_is_one_sentence(tmp_path):
    base = random_dit()
    with pytest.raises(ValueError, match="no layer has a linear map 'self_attn.w' to adapt: use some of self_attn.q"):
        Adapted(base, targets=("self_attn.w",))
    with pytest.raises(ValueError, match="rank 0 is below 1"):
        Adapted(base, rank=0)
    file = checkpoint.save(tmp_path / "dit.safetensors", base, kind="teacher")
    with pytest.raises(ValueError, match="holds teacher, no LoRA adapters"):
        lora.load(file, base)


def test_dmd_trains_adapters_of_one_base():
    """The step of distribution matching takes them as it takes networks; resume included."""
    base = random_dit()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    student, critic = Adapted(base, rank=2), Adapted(base, rank=2, lean=True)
    stream = MICRO.stream
    state = train.TrainState.of(
        {"student": student, "critic": critic}, {"student": 1e-2, "critic": 1e-2}, average={"student": 0.9}
    )
    clips = train.OwnRollout(
        student,
        stream,
        few_steps((1, 0.5), MICRO.flow.shift),
        lambda batch: GradCache(SIZE, stream, SHAPE, batch=len(batch)),
        checkpoint=True,
    )
    step = train.dmd_step(clips, critic, base, endless(), stream, shift=MICRO.flow.shift, ratio=1, checkpoint=True)
    rows = list(train.fit(step, state, steps=2))
    assert all(row["student_grad"] > 0 and row["critic_grad"] > 0 for row in rows[1:])
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    assert "blocks.0.ffn.0.up" in state.state_dict()["models"]["student"]
    assert len(state.state_dict()["averages"]["student"]["module"]) == len(student.state_dict())


def test_adapters_on_two_processes_follow_one_processes_curve(tmp_path):
    alone = list(sharded_target.adapted(3))
    both = list(launch(sharded_target.adapted, {"steps": 3}, processes=2, folder=tmp_path))
    for name in ("student_loss", "critic_loss", "critic_grad", "weights", "average"):
        expected = [row[name] for row in alone if name in row]
        assert [row[name] for row in both if name in row] == pytest.approx(expected, rel=1e-4), name
