"""Low-rank adapters: several networks that share one frozen base (LoRA, Hu et al. 2021, arXiv 2106.09685).

    student = Adapted(base, rank=64)
    critic = Adapted(base, rank=128)
    teacher = base

An adapted linear map is y = W x + b + (alpha / rank) · B (A x) with W and b frozen, A [rank, in] random and B
[out, rank] zero at first: a fresh adapter changes nothing, bit for bit. Which adapter a call uses is decided by which
network is called; nothing is switched. Recomputing a layer in backward (activation checkpointing), a compiler's graph
and a second thread therefore cannot meet the wrong one.

That is why this is not peft: there one model holds all adapters and `set_adapter` switches them, so that a layer
recomputed in backward would run with whichever was switched on last; and what peft would save is the few lines below.
"""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingbot_nb.model import checkpoint
from lingbot_nb.model.dit import DiT
from lingbot_nb.presets import ModelSize

TARGETS = (
    *(f"{attention}.{name}" for attention in ("self_attn", "cross_attn") for name in "qkvo"),
    "ffn.0",
    "ffn.2",
)
"""The linear maps of a layer that are adapted: both attentions and the feed-forward."""
CAMERA = ("cam_injector_layer1", "cam_injector_layer2", "cam_scale_layer", "cam_shift_layer")
"""Further targets, for when the camera is to be learnt anew: they lie in a layer too."""

KIND = "LoRA adapters"


class LowRank(nn.Module):
    """(alpha / rank) · B A: `down` is A [rank, in], `up` is B [out, rank], both kept in `dtype` and used in the type of
    the map they are added to."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dtype: torch.dtype):
        super().__init__()
        kwargs = {"device": linear.weight.device, "dtype": dtype}
        self.down = nn.Parameter(torch.empty(rank, linear.in_features, **kwargs))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank, **kwargs))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """y + (alpha / rank) · B A x for x [..., in], y [..., out]."""
        hidden = F.linear(x.to(y.dtype), self.down.to(y.dtype)).flatten(0, -2)
        # One product that adds as it goes: the sum does not travel through memory once more.
        return torch.addmm(y.flatten(0, -2), hidden, self.up.to(y.dtype).t(), alpha=self.scale).view(y.shape)

    def weight(self) -> Tensor:
        """What the adapter adds to the map's weight, [out, in] in fp32."""
        return self.scale * (self.up.float() @ self.down.float())


class AdaptedLinear(nn.Module):
    """A frozen linear map with an adapter beside it."""

    def __init__(self, linear: nn.Linear, adapter: LowRank):
        super().__init__()
        self.linear, self.adapter = linear, adapter

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.linear.weight.dtype)  # once for both
        return self.adapter(x, self.linear(x))


class Adapted(nn.Module):
    """A DiT of its own that consists of a frozen base and adapters; to callers it is a `DiT`.

    Its parameters, its state dict and its copies are the adapters alone: the base, which it freezes, belongs to the
    caller, who shares it between as many networks as there are roles. `targets` name linear maps by their path inside a
    layer; () adapts nothing. `lean` leaves the camera's scale and shift to each layer instead of keeping all of them at
    once: 1.3 GB less a frame at 18.5 B, for a fifth more work where several passes would have shared them.

    Raises ValueError for a rank below 1 or a target that no layer has.
    """

    def __init__(
        self,
        base: DiT,
        *,
        rank: int = 64,
        alpha: float | None = None,
        targets: Sequence[str] = TARGETS,
        dtype: torch.dtype = torch.float32,
        lean: bool = False,
    ):
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank {rank} is below 1: use e.g. 64")
        base.requires_grad_(False)
        self.rank, self.alpha, self.targets = rank, float(rank if alpha is None else alpha), tuple(targets)
        self.dtype, self.lean = dtype, lean
        adapters = {name: LowRank(linear, rank, self.alpha, dtype) for name, linear in _chosen(base, targets).items()}
        for name, adapter in adapters.items():
            _plant(self, name, adapter)
        # In a tuple, where nn.Module does not look for parameters.
        self._whole = (base, _with_adapters(base, adapters))

    @property
    def base(self) -> DiT:
        return self._whole[0]

    @property
    def dit(self) -> DiT:
        """The base's structure with the adapters in their places: the same weights, not copies."""
        return self._whole[1]

    @property
    def size(self) -> ModelSize:
        return self.base.size

    @property
    def adapters(self) -> dict[str, LowRank]:
        """By the name of the linear map that each belongs to."""
        return {name: module for name, module in self.named_modules() if isinstance(module, LowRank)}

    def forward(self, *args, **kwargs) -> Tensor:
        """`DiT.forward`."""
        return self.dit(*args, **kwargs)

    def text(self, context):
        """`DiT.text`."""
        return self.dit.text(context)

    def text_tokens(self, context):
        """`DiT.text_tokens`."""
        return self.dit.text_tokens(context)

    def camera_tokens(self, control_BCFHW: Tensor) -> Tensor:
        """`DiT.camera_tokens`."""
        return self.dit.camera_tokens(control_BCFHW)

    def film(self, control_BCFHW: Tensor):
        """`DiT.film`, or, when `lean`, the tokens it is made from, which `forward` takes as well."""
        return self.camera_tokens(control_BCFHW) if self.lean else self.dit.film(control_BCFHW)

    def time(self, t: Tensor):
        """`DiT.time`."""
        return self.dit.time(t)

    def __deepcopy__(self, memo: dict) -> "Adapted":
        options = dict(alpha=self.alpha, targets=self.targets, dtype=self.dtype, lean=self.lean)
        with torch.random.fork_rng(devices=[]):
            twin = Adapted(self.base, rank=self.rank, **options)
        twin.load_state_dict(self.state_dict())
        twin.train(self.training)
        for mine, theirs in zip(self.parameters(), twin.parameters(), strict=True):
            theirs.requires_grad_(mine.requires_grad)
        return twin


def _chosen(base: DiT, targets: Sequence[str]) -> dict[str, nn.Linear]:
    found = {
        f"blocks.{index}.{name}": module
        for index, layer in enumerate(base.blocks)
        for name, module in layer.named_modules()
        if name in targets and isinstance(module, nn.Linear)
    }
    absent = [name for name in targets if f"blocks.0.{name}" not in found]
    if absent:
        there = ", ".join(name for name, module in base.blocks[0].named_modules() if isinstance(module, nn.Linear))
        raise ValueError(f"no layer has a linear map {absent[0]!r} to adapt: use some of {there}")
    return found


def _plant(tree: nn.Module, path: str, leaf: nn.Module) -> None:
    """Registers `leaf` under a dotted path, so that its parameters carry the name of the map they adapt."""
    first, _, rest = path.partition(".")
    if not rest:
        tree.add_module(first, leaf)
        return
    if first not in tree._modules:
        tree.add_module(first, nn.Module())
    _plant(tree._modules[first], rest, leaf)


def _with_adapters(module: nn.Module, adapters: dict[str, LowRank], path: str = "") -> nn.Module:
    """The module with its adapted maps wrapped. What holds none is the very same module; what holds some is a shallow
    copy, whose parameters are the very same tensors."""
    if path in adapters:
        return AdaptedLinear(module, adapters[path])
    children = {
        name: _with_adapters(child, adapters, f"{path}.{name}".removeprefix("."))
        for name, child in module.named_children()
    }
    if all(child is module._modules[name] for name, child in children.items()):
        return module
    twin = copy.copy(module)
    twin._modules = children
    return twin


# ---- merging and files ----------------------------------------------------------------------------------------------


@torch.no_grad()
def merge_into(dit: DiT, adapted: Adapted) -> DiT:
    """Adds the adapters to a DiT's own weights, W + (alpha / rank) · B A, worked out in fp32; returns the DiT.

    `dit` is a copy of the base, or the base itself where nobody else needs it any longer.
    """
    for name, adapter in adapted.adapters.items():
        weight = dit.get_submodule(name).weight
        weight.copy_(weight.float() + adapter.weight())
    return dit


def save(path: Path | str, adapted: Adapted, **card) -> Path:
    """Writes the adapters alone, safetensors beside a card that names rank, alpha and targets and what `card` adds."""
    made = {"kind": KIND, "rank": adapted.rank, "alpha": adapted.alpha, "targets": list(adapted.targets)}
    return checkpoint.save(path, adapted, **made, **card)


def load(path: Path | str, base: DiT, *, adapt: Callable[..., Adapted] = Adapted) -> Adapted:
    """The adapters of a file on a base; `adapt` makes them, `partial(Adapted, lean=True)` for instance.

    Raises FileNotFoundError, or ValueError for a damaged file, one that holds no adapters, or a base of another size.
    """
    card = checkpoint.read_card(path)
    if card.get("kind") != KIND:
        raise ValueError(f"{path} holds {card.get('kind', 'weights')}, no {KIND}: load it as a network of its own")
    adapted = adapt(base, rank=card["rank"], alpha=card["alpha"], targets=card["targets"])
    checkpoint.load_into(path, adapted)
    return adapted
