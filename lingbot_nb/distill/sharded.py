"""Networks that no GPU holds whole: FSDP2 shards of a DiT, filled from released weights, trained by the usual loop.

    dit = sharded.empty(size, device)                        every rank: its rows of each tensor, not yet filled
    sharded.load_released(folder, dit)                       reads those rows and no others
    state = TrainState.of({"student": dit}, lr={"student": 1e-5}, seed=0)
    for row in fit(step, state, steps=1000, checkpoint=folder, store=sharded.SHARDS): ...

A layer is gathered when it is called and given back after it, in forward and again in backward (ZeRO-3, Rajbhandari et
al. 2020; torch's `fully_shard`). Gradients arrive as each rank's share of their mean, so that optimizers and averages
work on shards alone. Activation checkpointing is the steps' `checkpoint=True`: it recomputes a layer while that layer
is gathered for its backward anyway.

Memory a rank, of N parameters on R ranks with AdamW: 16 N / R bytes (fp32 weights, gradients, two moments), two layers
gathered in `compute`'s type, and activations. 18.5 B on 8 ranks: 37 GB before activations.

What does not go together: `torch.compile` of layers, `record.Recorded`, Muon (it needs whole matrices), and
`fit(log_every=k)`, whose rows come together but whose host does not run ahead.
"""

import json
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lingbot_nb.distill import parallel
from lingbot_nb.distill.train import KEEP, Store, TrainState
from lingbot_nb.distill.trajectories import read_json, write_text
from lingbot_nb.model import released, shards
from lingbot_nb.model.dit import DiT
from lingbot_nb.model.released import Place, Report
from lingbot_nb.presets import ModelSize

Rows = Callable[[str, int, int], Tensor]
"""(name of a tensor, first row, end) -> those rows of it, along its first dimension."""

AS_STORED = MixedPrecisionPolicy(cast_forward_inputs=False)
"""Layers are gathered in the type they are stored in: fp32 throughout, or a frozen network in bf16."""
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
"""Layers are gathered in bf16 and gradients averaged in fp32; weights and moments stay in fp32."""


class ShardedDiT(DiT):
    """A DiT whose layers make their own text keys and camera modulation: outside its forward a layer's weights are not
    there. `text` and `film` therefore return the tokens that `forward` takes as well."""

    compute: MixedPrecisionPolicy = AS_STORED

    def text(self, context) -> Tensor:
        """`DiT.text_tokens`."""
        return self.text_tokens(context)

    def film(self, control_BCFHW: Tensor) -> Tensor:
        """`DiT.camera_tokens`."""
        return self.camera_tokens(control_BCFHW)


def mesh(device: torch.device | str) -> DeviceMesh:
    """All ranks in a row; a process that is alone becomes a group of one."""
    device = torch.device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(device.type, (dist.get_world_size(),))


def empty(
    size: ModelSize,
    device: torch.device | str,
    *,
    dtype: torch.dtype = torch.float32,
    compute: MixedPrecisionPolicy = AS_STORED,
    over: DeviceMesh | None = None,
) -> ShardedDiT:
    """A DiT with this rank's rows of every tensor, stored in `dtype`, not filled: see `fill` and `load_released`.

    Nothing whole is ever allocated: the network is laid out on the meta device and only shards become real. `over` is a
    mesh of one dimension, all ranks by default.
    """
    # No caller writes into a layer's output.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    over = mesh(device) if over is None else over
    dit = ShardedDiT(size, device="meta", dtype=dtype)
    for layer in dit.blocks:
        fully_shard(layer, mesh=over, mp_policy=compute, reshard_after_forward=True)
    fully_shard(dit, mesh=over, mp_policy=compute)
    for method in ("text_tokens", "camera_tokens"):
        register_fsdp_forward_method(dit, method)
    dit.compute = compute
    return dit.to_empty(device=device)


def span(shard: DTensor) -> tuple[int, int]:
    """The rows [first, end) of a sharded tensor that this rank holds. ValueError on a mesh of several dimensions."""
    if shard.device_mesh.ndim != 1:
        raise ValueError(f"a mesh of {shard.device_mesh.ndim} dimensions: shard over one")
    rows, ranks = shard.shape[0], shard.device_mesh.size()
    each = -(-rows // ranks)
    first = min(rows, shard.device_mesh.get_local_rank() * each)
    return first, min(rows, first + each)


@torch.no_grad()
def fill(dit: ShardedDiT, rows: Rows, names: Sequence[str] | None = None) -> ShardedDiT:
    """Copies `rows(name, first, end)` into this rank's shards of all tensors, or of `names`."""
    tensors = dit.state_dict()
    for name in tensors if names is None else names:
        first, end = span(tensors[name])
        if end > first:
            tensors[name].to_local().copy_(rows(name, first, end))
    return dit


def fill_from(dit: ShardedDiT, whole: DiT) -> ShardedDiT:
    """Takes this rank's rows from a DiT that lies whole beside it."""
    tensors = whole.state_dict()
    return fill(dit, lambda name, first, end: tensors[name][first:end])


def load_released(path: Path | str, dit: ShardedDiT, *, part: str | None = None) -> Report:
    """Fills a sharded DiT from a release's folder or a converted one, strictly; every rank reads its own rows.

    Several files are read side by side. Raises ValueError before anything is read when a name or shape is off.
    """
    weights = released.find_one(path, part)
    report = released.compare(weights, released.tensor_shapes(dit), dit.size).check()

    def load(file: Path, stop) -> None:
        names = [name for name, place in weights.places.items() if place.file == file]
        with _reader(file) as read:
            fill(dit, lambda name, first, end: read(weights.places[name], first, end), names)

    released.shardwise(load, weights.files)
    return report


class _reader:
    """Rows of a file's tensors, without the rest of the file."""

    def __init__(self, file: Path):
        pickled = file.suffix in shards.PICKLES
        # A pickle is mapped into memory: what is not sliced off is not read.
        self._whole = shards.load_pickle(file) if pickled else None
        self._safe = None if pickled else safe_open(file, framework="pt")

    def __enter__(self) -> Callable[[Place, int, int], Tensor]:
        if self._safe is not None:
            self._safe.__enter__()
        return self._rows

    def __exit__(self, *error) -> None:
        if self._safe is not None:
            self._safe.__exit__(*error)

    def _rows(self, place: Place, first: int, end: int) -> Tensor:
        source = self._whole[place.name] if self._safe is None else self._safe.get_slice(place.name)
        return source[first:end]


@torch.no_grad()
def twin(dit: ShardedDiT) -> ShardedDiT:
    """A copy with shards of its own: `train.Average(dit, 0.99, copied=sharded.twin)`."""
    weight = dit.patch_embedding.weight
    other = empty(dit.size, weight.device, dtype=weight.dtype, compute=dit.compute, over=weight.device_mesh)
    for mine, theirs in zip(dit.parameters(), other.parameters(), strict=True):
        theirs.to_local().copy_(mine.to_local())
    return other


# ---- checkpoints ----------------------------------------------------------------------------------------------------

_CARD, _REST = "card.json", "rest.pt"


def save(folder: Path | str, state: TrainState) -> Path:
    """Writes a checkpoint folder `step-00000100`: every rank its shards, rank 0 the rest, and the card last; a folder
    without a card is no checkpoint. Keeps the newest two. All ranks must call it, on a file system that they share.

    Raises RuntimeError when it cannot be written; earlier checkpoints are then untouched.
    """
    target = Path(folder) / f"step-{state.step:08d}"
    first = parallel.place()[0] == 0
    if first:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
    dist.barrier()
    try:
        dcp.save(_shards(state), checkpoint_id=target)
        if first:
            torch.save(_rest(state), target / _REST)
    except Exception as error:
        raise RuntimeError(f"checkpoint {target} cannot be written: {error}; the ones before it are whole") from error
    dist.barrier()
    if first:
        _close(target, state)
        for old in found(folder)[:-KEEP]:
            (old / _CARD).unlink()
            shutil.rmtree(old)
    return target


def found(folder: Path | str) -> list[Path]:
    """Whole checkpoints in a folder, oldest first. ValueError where checkpoints of another kind lie in their place."""
    whole = [card.parent for card in sorted(Path(folder).glob(f"step-*/{_CARD}"))]
    if not whole and (others := sorted(Path(folder).glob("step-*.pt"))):
        raise ValueError(f"{others[-1]} is a checkpoint of a network that was not sharded: use another folder")
    return whole


def load(checkpoint: Path | str, state: TrainState) -> None:
    """Fills `state`, whose models are sharded over any number of ranks; each reads what its shards need.

    Raises ValueError when the card is not this run's, when the roles differ, or when a file is missing or cut short.
    """
    checkpoint = Path(checkpoint)
    _check(checkpoint, read_json(checkpoint / _CARD), state)
    parts = _shards(state)
    dcp.load(parts, checkpoint_id=checkpoint)
    for role, model in state.models.items():
        set_model_state_dict(model, parts["models"][role])
    for role, average in state.averages.items():
        set_model_state_dict(average.module, parts["averages"][role])
    for role, optimizer in state.optimizers.items():
        set_optimizer_state_dict(state.models[role], optimizer, parts["optimizers"][role])
    _restore(torch.load(checkpoint / _REST, weights_only=True), state)


SHARDS = Store(save, found, load)
"""A folder a checkpoint, to which every rank writes its part; resumes on any number of ranks."""


def _shards(state: TrainState) -> dict:
    return {
        "models": {role: get_model_state_dict(model) for role, model in state.models.items()},
        "averages": {role: get_model_state_dict(average.module) for role, average in state.averages.items()},
        "optimizers": {
            role: get_optimizer_state_dict(state.models[role], optimizer)
            for role, optimizer in state.optimizers.items()
        },
    }


def _rest(state: TrainState) -> dict:
    return {
        "step": state.step,
        "seconds": state.seconds,
        "updates": {role: average.updates for role, average in state.averages.items()},
        "streams": {name: stream.state_dict() for name, stream in state.streams.items()},
        "generator": state.generator.get_state(),
        "torch": torch.get_rng_state(),
    }


def _restore(rest: dict, state: TrainState) -> None:
    state.step, state.seconds = rest["step"], rest["seconds"]
    state.generator.set_state(rest["generator"])
    torch.set_rng_state(rest["torch"])
    for role, average in state.averages.items():
        average.updates = rest["updates"][role]
    for name, stream in state.streams.items():
        stream.load_state_dict(rest["streams"][name])


def _roles(state: TrainState) -> dict[str, list[str]]:
    kinds = ("models", "optimizers", "averages", "streams")
    return {kind: sorted(getattr(state, kind)) for kind in kinds}


def _close(target: Path, state: TrainState) -> None:
    sizes = {file.name: file.stat().st_size for file in target.iterdir()}
    own = {"step": state.step, "seconds": state.seconds, "ranks": parallel.place()[1], "roles": _roles(state)}
    write_text(target / _CARD, json.dumps({**own, "files": sizes, **state.card}, indent=1) + "\n")


def _check(checkpoint: Path, card: dict, state: TrainState) -> None:
    differing = sorted(k for k, v in state.card.items() if card.get(k) != v)
    if differing:
        said = ", ".join(f"{k} {card.get(k)} instead of {state.card[k]}" for k in differing)
        raise ValueError(f"checkpoint {checkpoint} was made with {said}: use another folder or the same settings")
    if card["roles"] != _roles(state):
        raise ValueError(f"checkpoint {checkpoint} holds {card['roles']}, this run {_roles(state)}")
    for name, size in card["files"].items():
        file = checkpoint / name
        if not file.exists() or file.stat().st_size != size:
            raise ValueError(f"checkpoint {checkpoint} is damaged: {name} is missing or not {size} bytes; delete it")
