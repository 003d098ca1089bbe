"""Optimizers: Muon for matrices, AdamW for the rest, and several as one; and updates that the device may skip."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def orthogonalised(matrices_GRC: Tensor, steps: int = 5) -> Tensor:
    """The nearest semi-orthogonal matrices, about: Newton-Schulz with the quintic of Jordan et al. 2024 (Muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices_GRC.bfloat16() if matrices_GRC.is_cuda else matrices_GRC
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        # a x + (b gram + c gram²) x, sums inside the products: three launches a turn.
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(matrices_GRC.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, for matrices and for convolution kernels seen as [out, in x height x width] matrices.

    Updates have the size of Adam's (0.2 sqrt(largest side), Liu et al. 2025), so both can share a learning rate.
    Weights of one shape are orthogonalised together. With `found_inf` (see `skip_where`) at 1 a step changes nothing.
    """

    found_inf: Tensor | None = None

    def __init__(self, weights: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(weights, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.shape, []).append(weight)
            for weights in by_shape.values():
                self._update(weights, group["lr"], group["momentum"], group["weight_decay"])

    def _update(self, weights: list[Tensor], lr: float, momentum: float, weight_decay: float) -> None:
        means = [self._momentum(weight) for weight in weights]
        grads = [weight.grad for weight in weights]
        if self.found_inf is not None:
            grads = _where_finite(grads, means, self.found_inf)
        torch._foreach_lerp_(means, grads, 1 - momentum)
        ahead = torch._foreach_lerp(grads, means, momentum)
        matrices = torch.stack([update.flatten(1) for update in ahead])
        updates = orthogonalised(matrices) * (0.2 * math.sqrt(max(matrices.shape[1:])))
        if self.found_inf is not None:
            alive = 1 - self.found_inf
            updates = updates * alive
            torch._foreach_mul_(weights, 1 - lr * weight_decay * alive)
        elif weight_decay:
            torch._foreach_mul_(weights, 1 - lr * weight_decay)
        updates = [update.view_as(weight) for update, weight in zip(updates.unbind(), weights, strict=True)]
        torch._foreach_add_(weights, updates, alpha=-lr)

    def _momentum(self, weight: Tensor) -> Tensor:
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        return state["momentum"]


def _where_finite(grads: list[Tensor], means: list[Tensor], found_inf: Tensor) -> list[Tensor]:
    """The gradients, or the momenta themselves, which they then leave as they are, where `found_inf` is 1."""
    return list(torch.where(found_inf > 0, torch.stack(means), torch.stack(grads)).unbind())


def can_skip(optimizer: "torch.optim.Optimizer | Several") -> bool:
    """Whether the optimizer heeds `skip_where`: Muon, and torch's fused ones."""
    if isinstance(optimizer, Several):
        return all(can_skip(part) for part in optimizer.optimizers)
    return isinstance(optimizer, Muon) or all(group.get("fused") for group in optimizer.param_groups)


def skip_where(optimizer: "torch.optim.Optimizer | Several", found_inf: Tensor | None) -> None:
    """Makes coming steps do nothing where `found_inf` (a float scalar on the device) is 1; None to forget about it.

    The fused optimizers read this attribute for `torch.amp.GradScaler`: the host need not know.
    """
    for part in optimizer.optimizers if isinstance(optimizer, Several) else (optimizer,):
        part.found_inf = found_inf


class Several:
    """Several optimizers over different parameters as one: the part of `torch.optim.Optimizer` that training uses."""

    def __init__(self, *optimizers: torch.optim.Optimizer):
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict:
        return {str(i): optimizer.state_dict() for i, optimizer in enumerate(self.optimizers)}

    def load_state_dict(self, state: dict) -> None:
        for i, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state[str(i)])


def muon_adamw(module: nn.Module, lr: float, *, betas=(0.9, 0.99), weight_decay: float = 0.01) -> Several:
    """Muon for the matrices inside `module.blocks`, AdamW for everything else (embeddings, head, norms, biases)."""
    hidden = [p for p in module.blocks.parameters() if p.ndim == 2]
    taken = {id(p) for p in hidden}
    rest = [p for p in module.parameters() if id(p) not in taken]
    return Several(
        Muon(hidden, lr, weight_decay=weight_decay),
        torch.optim.AdamW(rest, lr, betas, weight_decay=weight_decay, fused=True),
    )
