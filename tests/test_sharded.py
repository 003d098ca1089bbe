"""Sharded networks on two real processes: the plain curve, exact resume on other ranks, rows read from a release."""

import json
from itertools import chain

import pytest
import sharded_target
import torch
from micro_world import SIZE, random_dit
from safetensors.torch import save_file

from lingbot_nb.distill import parallel, sharded, train
from lingbot_nb.distill.launch import launch

CLOSE = dict(rel=1e-5, abs=1e-7)
"""How far curves may differ: sums run in another order, and the optimizer's kernel for shards is another one."""
NAMES = ("student_loss", "student_grad", "average", "weights")


@pytest.fixture(autouse=True)
def no_group_left():
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def columns(rows, names=NAMES):
    return {name: [row[name] for row in rows if name in row] for name in names}


def assert_close(found, expected, names=NAMES):
    found, expected = columns(found, names), columns(expected, names)
    for name in names:
        assert found[name] == pytest.approx(expected[name], **CLOSE), name


def two(target, arguments, folder):
    return list(launch(target, arguments, processes=2, folder=folder))


@pytest.fixture(scope="module")
def plain():
    return list(sharded_target.forced(sharded_target.whole, 6))


def test_two_processes_give_the_plain_curve_and_go_on_as_one_and_back(plain, tmp_path):
    kept = str(tmp_path / "kept")
    rows = two(sharded_target.forced_split, {"steps": 2, "checkpoint": kept}, tmp_path)
    rows += list(sharded_target.forced_split(4, kept))
    rows += two(sharded_target.forced_split, {"steps": 6, "checkpoint": kept, "recompute": True}, tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert_close(rows, plain)
    cards = [json.loads((folder / "card.json").read_text()) for folder in sharded.found(kept)]
    assert [(card["step"], card["ranks"], card["preset"]) for card in cards] == [(4, 1, "micro"), (6, 2, "micro")]


def test_recomputed_layers_give_the_same_curve(plain):
    assert_close(list(sharded_target.forced_split(2, recompute=True)), plain[:2])


def test_distribution_matching_on_shards_is_distribution_matching(tmp_path):
    names = ("student_loss", "student_grad", "student_g", "critic_loss", "critic_grad")
    expected = list(sharded_target.matched(sharded_target.whole, 3))
    assert_close(two(sharded_target.matched_split, {"steps": 3}, tmp_path), expected, names)


def write_release(folder):
    folder.mkdir()
    state = random_dit(5).state_dict()
    names = list(state)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = folder / f"diffusion_pytorch_model-{number:05}-of-00002.safetensors"
        save_file({name: state[name].contiguous() for name in part}, file)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_rank_reads_its_rows_of_a_release(dtype, tmp_path):
    write_release(tmp_path / "release")
    (row,) = two(sharded_target.filled, {"folder": str(tmp_path / "release"), "dtype": dtype}, tmp_path)
    assert row["worst"] == 0
    # One row cannot be halved, so that the modulations, 1 x 6 x D, lie on rank 0.
    assert 0.5 <= row["share"] < 0.6


def test_a_pickle_is_read_by_rows_too(tmp_path):
    torch.save(random_dit(5).state_dict(), tmp_path / "dit.pth")
    (row,) = sharded_target.filled(str(tmp_path / "dit.pth"), "float32")
    assert row == {"worst": 0, "share": 1}


def test_a_release_of_another_size_is_refused(tmp_path):
    state = random_dit().state_dict()
    state["blocks.0.ffn.0.weight"] = state["blocks.0.ffn.0.weight"][:-1].contiguous()
    save_file(state, tmp_path / "dit.safetensors")
    with pytest.raises(ValueError, match="do not fit a DiT of width 32: 1 of another shape: blocks.0.ffn.0.weight"):
        sharded.load_released(tmp_path, sharded.empty(SIZE, "cpu"))


def test_bf16_compute_keeps_fp32_weights_and_gradients():
    dit = sharded.fill_from(sharded.empty(SIZE, "cpu", compute=sharded.BF16), random_dit())
    state = train.TrainState.of({"student": dit}, {"student": 1e-3})
    batches = sharded_target.launch_target.global_batches()
    step = train.forcing_step(dit, batches, sharded_target.MICRO.stream, shift=3.0)
    rows = list(train.fit(step, state, steps=2))
    plain = train.TrainState.of({"student": random_dit()}, {"student": 1e-3})
    other = sharded_target.launch_target.global_batches()
    step = train.forcing_step(plain.models["student"], other, sharded_target.MICRO.stream, shift=3.0)
    expected = list(train.fit(step, plain, steps=2))
    assert {p.dtype for p in chain(dit.parameters(), (p.grad for p in dit.parameters()))} == {torch.float32}
    for name in ("student_loss", "student_grad"):
        assert columns(rows, [name])[name] == pytest.approx(columns(expected, [name])[name], rel=0.03)
        assert rows[0][name] != expected[0][name]


def test_clipping_is_by_the_norm_of_all_shards():
    dit = sharded.fill_from(sharded.empty(SIZE, "cpu"), random_dit())
    parameters = list(dit.parameters())
    for p in parameters:
        p.grad = torch.ones_like(p)
    count = sum(p.numel() for p in parameters)
    norm = parallel.clip_gradients(parameters, 1.0)
    assert type(norm) is torch.Tensor and norm.item() == pytest.approx(count**0.5)
    assert parameters[0].grad.full_tensor().flatten()[0].item() == pytest.approx(count**-0.5, rel=1e-4)


@pytest.fixture
def kept(tmp_path):
    list(sharded_target.forced_split(1, str(tmp_path)))
    return tmp_path


def test_damaged_foreign_and_plain_checkpoints_are_one_sentence(kept):
    newest = sharded.found(kept)[-1]

    def state(**card):
        dit = sharded.empty(SIZE, "cpu")
        return train.TrainState.of({"student": dit}, {"student": 1e-3}, **card)

    with pytest.raises(ValueError, match="was made with preset micro instead of tiny"):
        sharded.load(newest, state(preset="tiny"))
    with pytest.raises(ValueError, match=r"holds .*'averages': \['student'\].* this run .*'averages': \[\]"):
        sharded.load(newest, state())
    piece = max(newest.glob("*.distcp"), key=lambda file: file.stat().st_size)
    piece.write_bytes(piece.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"is damaged: {piece.name} is missing or not"):
        list(sharded_target.forced_split(2, str(kept)))


def test_a_folder_without_a_card_is_no_checkpoint(kept):
    (sharded.found(kept)[-1] / "card.json").unlink()
    assert sharded.found(kept) == []
    (kept / "step-00000003.pt").touch()
    with pytest.raises(ValueError, match="checkpoint of a network that was not sharded"):
        sharded.found(kept)


def test_a_disk_that_is_full_is_said(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sharded.dcp, "save", full)
    with pytest.raises(RuntimeError, match="cannot be written: .*No space left"):
        list(sharded_target.forced_split(1, str(tmp_path)))
    assert sharded.found(tmp_path) == []
