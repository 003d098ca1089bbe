import json

import pytest
import torch
from torch import nn

from lingbot_nb.model import checkpoint


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    module = nn.Linear(4, 3)
    return module, checkpoint.save(tmp_path / "w" / "linear.safetensors", module, kind="linear", steps=7)


def test_round_trip_is_bit_exact_and_the_card_says_how(saved):
    module, path = saved
    other = nn.Linear(4, 3)
    card = checkpoint.load_into(path, other)
    assert torch.equal(other.weight, module.weight) and torch.equal(other.bias, module.bias)
    assert (card["kind"], card["steps"], card["parameters"]) == ("linear", 7, 15)
    assert not list(path.parent.glob("*.partial"))


def test_bf16_halves_matrices_and_keeps_vectors_exact(saved, tmp_path):
    module, _ = saved
    path = checkpoint.save(tmp_path / "half.safetensors", module, dtype=torch.bfloat16)
    other = nn.Linear(4, 3)
    checkpoint.load_into(path, other)
    assert torch.equal(other.weight, module.weight.bfloat16().float())
    assert torch.equal(other.bias, module.bias)


@pytest.mark.parametrize("where", [0, 20, -1])
def test_one_flipped_byte_is_refused_by_name(saved, where):
    _, path = saved
    data = bytearray(path.read_bytes())
    data[where] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"linear.safetensors do not match the sha256"):
        checkpoint.load_into(path, nn.Linear(4, 3))


def test_another_size_is_refused_and_named(saved):
    with pytest.raises(ValueError, match="1 wrong shapes .first: weight"):
        checkpoint.load_into(saved[1], nn.Linear(5, 3))
    with pytest.raises(ValueError, match="1 unexpected tensors .first: bias"):
        checkpoint.load_into(saved[1], nn.Linear(4, 3, bias=False))


def test_missing_and_unreadable_cards_are_told(saved, tmp_path):
    _, path = saved
    with pytest.raises(FileNotFoundError, match="nothing.safetensors does not exist"):
        checkpoint.load_into(tmp_path / "nothing.safetensors", nn.Linear(4, 3))
    checkpoint.card_path(path).write_text(json.dumps(["no", "card"]))
    with pytest.raises(ValueError, match="card .*linear.json is unreadable"):
        checkpoint.load_into(path, nn.Linear(4, 3))


def test_a_failed_write_leaves_the_old_weights(saved, monkeypatch):
    module, path = saved
    before = path.read_bytes()
    monkeypatch.setattr(checkpoint, "save_file", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError):
        checkpoint.save(path, module)
    assert path.read_bytes() == before
    checkpoint.load_into(path, nn.Linear(4, 3))
