import json
import subprocess
import sys

import pytest
import torch

from lingbot_nb import presets
from lingbot_nb.model import checkpoint, packing
from lingbot_nb.model.dit import DiT
from lingbot_nb.model.vae import TinyVAE, VAESize
from lingbot_nb.runs import PROJECT


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    draws = torch.randn(300, 256) * torch.logspace(-4, 2, 300)[:, None]
    rows = {"matrix": draws, "kernel": draws.view(300, 16, 4, 4).clone(), "vector": draws[:, 0].clone()}
    return rows | {"mean": draws[0, :16].clone(), "count": torch.arange(70_000), "small": draws[:20].clone()}


def test_a_weight_moves_by_half_a_level_of_its_own_row_at_most(state):
    back = packing.unpacked(packing.packed(state))
    for name in ("matrix", "kernel"):
        apart = (back[name] - state[name]).flatten(1).abs().amax(1)
        # bf16 scales may lie a 256th below what the row's extreme needs; its weight is cut by as much.
        allowed = state[name].flatten(1).abs().amax(1) / packing.LEVELS * (0.5 + packing.LEVELS / 256)
        assert (apart <= allowed).all(), name
        noise = (back[name] - state[name]).flatten(1).norm(dim=1) / state[name].flatten(1).norm(dim=1)
        assert 0.005 < noise.median() < 0.01


def test_statistics_and_counts_stay_exact_and_the_rest_is_bf16(state):
    there = packing.packed(state)
    back = packing.unpacked(there)
    assert torch.equal(back["mean"], state["mean"]) and torch.equal(back["count"], state["count"])
    for name in ("vector", "small"):
        assert torch.equal(there[name], state[name].bfloat16())
    assert back.keys() == state.keys()


@pytest.mark.parametrize("share", (1, 60, 64, 1000))
def test_numbers_can_share_a_scale_with_fewer_than_their_row(state, share):
    """A part's own extreme decides, whatever the rest of the row holds; a last part may be shorter."""
    there = packing.packed(state, share)
    back = packing.unpacked(there)
    for name in ("matrix", "kernel"):
        rows, got = state[name].flatten(1), back[name].flatten(1)
        parts = there[name + packing.SCALE].shape[1]
        size = -(-rows.shape[1] // parts)
        assert size <= share and (parts - 1) * size < rows.shape[1] <= parts * size
        for wanted, found in zip(rows.split(size, 1), got.split(size, 1), strict=True):
            allowed = wanted.abs().amax(1) / packing.LEVELS * (0.5 + packing.LEVELS / 256)
            assert ((found - wanted).abs().amax(1) <= allowed).all()
    coarse = packing.unpacked(packing.packed(state))
    moved = {n: (b["matrix"] - state["matrix"]).norm() for n, b in (("fine", back), ("coarse", coarse))}
    assert moved["fine"] < 0.9 * moved["coarse"] or share > 256


def test_what_lies_on_its_rows_levels_already_is_not_rounded_a_second_time(state):
    """An encoder whose decoder learnt on comes out of its packed file as it went in, whatever the decoder gets."""
    once = packing.unpacked(packing.packed(state))
    moved = dict(once, kernel=once["kernel"] * (1 + 0.1 * torch.randn(300, 16, 4, 4)))
    there = packing.packed(moved, 64)
    assert torch.equal(packing.unpacked(there)["matrix"], once["matrix"])
    assert there["matrix" + packing.SCALE].dim() == 1 and there["kernel" + packing.SCALE].shape == (300, 4)


def test_nobody_can_share_a_scale_with_no_number(state):
    with pytest.raises(ValueError, match="0 numbers cannot share a scale"):
        packing.packed(state, 0)


def test_a_row_of_zeros_stays_zero():
    back = packing.unpacked(packing.packed({"zeros": torch.zeros(256, 256)}))
    assert torch.equal(back["zeros"], torch.zeros(256, 256))


def test_what_was_never_packed_comes_back_as_it_is(state):
    back = packing.unpacked(state)
    assert back.keys() == state.keys() and all(back[name] is state[name] for name in state)


def test_the_command_packs_a_file_whose_loaded_network_is_nearly_the_same(tmp_path):
    torch.manual_seed(1)
    whole = TinyVAE(VAESize())
    source = checkpoint.save(tmp_path / "vae.safetensors", whole, dtype=torch.bfloat16, kind="tokenizer")
    out = tmp_path / "small" / "vae.safetensors"
    command = [sys.executable, "-m", "lingbot_nb.model.packing", str(source), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["megabytes"] < 0.55 * told["megabytes_before"]
    finer = subprocess.run(
        [*command[:-1], str(tmp_path / "finer.safetensors"), "--share", "64"],
        **dict(capture_output=True, text=True, cwd=PROJECT, timeout=120),
    )
    assert 1.01 < json.loads(finer.stdout)["megabytes"] / told["megabytes"] < 1.06
    before, after = checkpoint.read_card(source), checkpoint.read_card(out)
    assert after["packed_from"] == before["sha256"] != after["sha256"]
    assert {**after, "sha256": 0, "packed_from": 0} == {**before, "sha256": 0, "packed_from": 0}
    small = TinyVAE(VAESize())
    checkpoint.load_into(out, small)
    latents = torch.randn(1, 16, 2, 4, 6)
    with torch.no_grad():
        one, two = (vae.eval().decode_groups(latents) for vae in (whole, small))
    assert 0 < (one - two).norm() < 0.05 * one.norm()


def test_a_flipped_byte_of_a_packed_file_is_refused(tmp_path):
    dit = DiT(presets.MICRO.model)
    source = checkpoint.save(tmp_path / "whole.safetensors", dit)
    path = checkpoint.write(
        tmp_path / "packed.safetensors", packing.packed(dit.state_dict()), checkpoint.read_card(source)
    )
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"packed.safetensors do not match the sha256"):
        checkpoint.load_into(path, dit)
    again = subprocess.run(
        [sys.executable, "-m", "lingbot_nb.model.packing", str(path), str(tmp_path / "again.safetensors")],
        **dict(capture_output=True, text=True, cwd=PROJECT, timeout=120),
    )
    assert "do not match the sha256" in again.stderr and not (tmp_path / "again.safetensors").exists()
