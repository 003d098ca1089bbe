import re
from dataclasses import replace
from functools import partial

import pytest
import torch

from lingbot_nb import presets
from lingbot_nb.model import checkpoint, growth
from lingbot_nb.model.dit import DiT

SIZE = presets.MICRO.model


def network(layers: int, seed: int = 1, **other) -> DiT:
    dit = DiT(replace(SIZE, layers=layers, **other))
    torch.manual_seed(seed)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return dit


def walked(dit: DiT) -> torch.Tensor:
    draws = torch.Generator().manual_seed(2)
    noise = partial(torch.randn, generator=draws)
    inputs = dict(condition_BCFHW=noise(1, 20, 3, 4, 6), text=dit.text(noise(1, 5, SIZE.text_dim)))
    camera = dit.film(noise(1, 64 * SIZE.control_channels, 3, 4, 6))
    return dit(noise(1, 16, 3, 4, 6), torch.tensor([500.0]), camera=camera, **inputs)


@pytest.mark.parametrize(("have", "want"), [(2, 3), (2, 4), (3, 5), (4, 4)])
@torch.no_grad()
def test_a_deeper_network_computes_what_the_shallower_did(have, want):
    small, large = network(have), network(want, seed=3)
    assert not torch.allclose(walked(small), walked(large), atol=1e-3)
    large.load_state_dict(growth.deeper(small.state_dict(), want))
    torch.testing.assert_close(walked(large), walked(small), rtol=0, atol=1e-6)


def test_every_new_layer_learns_from_the_first_step():
    large = network(4)
    large.load_state_dict(growth.deeper(network(2).state_dict(), 4))
    walked(large).square().mean().backward()
    fresh = [n for n, p in large.named_parameters() if n.startswith(("blocks.1.", "blocks.3.")) and not p.any()]
    assert {name.split(".")[1] for name in fresh} == {"1", "3"} and len(fresh) == 2 * 2 * len(growth.LAST_MAPS)
    gradients = dict(large.named_parameters())
    assert all(gradients[name].grad.abs().max() > 0 for name in fresh)


def test_new_layers_are_spread_evenly():
    state = {f"blocks.{i}.norm3.weight": torch.tensor([float(i)]) for i in range(8)}
    grown = growth.deeper(state, 12)
    assert [int(grown[f"blocks.{i}.norm3.weight"]) for i in range(12)] == [0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7]


def test_fewer_layers_are_refused():
    with pytest.raises(ValueError, match="weights of 4 layers do not fit into 2"):
        growth.deeper(network(4).state_dict(), 2)


def test_a_file_of_another_width_is_refused_by_name(tmp_path):
    path = checkpoint.save(tmp_path / "small.safetensors", network(2, dim=32))
    large = network(3)
    with pytest.raises(ValueError, match=re.escape(str(path))):
        checkpoint.load_into(path, large, partial(growth.deeper, layers=3))
