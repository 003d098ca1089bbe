"""A deeper transformer that begins as a trained shallower one: new layers that at first leave everything as it is.

Net2DeeperNet (arXiv 1511.05641) for residual layers: a new layer is a copy of the one below it whose last maps are
zero, so it adds nothing until it has learnt to.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from lingbot_nb.model import checkpoint
from lingbot_nb.model.dit import DiT

LAST_MAPS = ("self_attn.o", "cross_attn.o", "ffn.2", "cam_scale_layer", "cam_shift_layer")
"""The maps through which a layer reaches the residual stream."""


def load_into(path: Path | str, dit: DiT) -> dict:
    """Fills `dit` with weights of as many layers or fewer and returns their card; errors as `checkpoint.load_into`."""
    return checkpoint.load_into(path, dit, partial(deeper, layers=dit.size.layers))


def deeper(state: Mapping[str, Tensor], layers: int) -> dict[str, Tensor]:
    """A DiT's state dict with `layers` layers that computes exactly what `state` does; new layers spread evenly. What
    has no layers comes back as it is.

    Raises ValueError where `state` already has more layers.
    """
    have = depth(state)
    if layers < have:
        raise ValueError(f"weights of {have} layers do not fit into {layers}: choose a deeper preset")
    if not have:
        return dict(state)
    grown = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.")}
    for place in range(layers):
        source = place * have // layers
        fresh = place > 0 and source == (place - 1) * have // layers
        for name, tensor in _layer(state, source).items():
            ends = fresh and name.startswith(LAST_MAPS)
            grown[f"blocks.{place}.{name}"] = tensor.new_zeros(tensor.shape) if ends else tensor.clone()
    return grown


def depth(state: Mapping[str, Tensor]) -> int:
    """How many layers a DiT's state dict has."""
    return 1 + max((int(name.split(".")[1]) for name in state if name.startswith("blocks.")), default=-1)


def _layer(state: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    prefix = f"blocks.{index}."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
