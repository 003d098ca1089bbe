"""How a network's output changes along a path: what continuous consistency and MeanFlow both need.

A *path derivative* is a function (f, point, direction) -> (f(point), d/dh f(point + h · direction) at h = 0), where
point and direction are tuples of tensors.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Network = Callable[..., Tensor]
PathDerivative = Callable[[Network, tuple[Tensor, ...], tuple[Tensor, ...]], tuple[Tensor, Tensor]]


def by_jvp(f: Network, point: tuple[Tensor, ...], direction: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Exact, by forward-mode differentiation; attention must be one that supports it (most fused kernels do not)."""
    return torch.func.jvp(f, point, direction)


def by_difference(size: float = 2e-4) -> PathDerivative:
    """Central differences of width 2 · `size`: two more forwards of any network, fused attention included.

    Rounding costs about 1e-7 / size, so run these forwards in fp32. A DiT's clock sets the upper limit: its fastest
    wave turns by 1000 · size radians, and at 1e-3 (one unit of t) the derivative of that wave is 16 % short.
    """

    def derivative(f: Network, point: tuple[Tensor, ...], direction: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        ahead, behind = (f(*(p + sign * size * d for p, d in zip(point, direction, strict=True))) for sign in (1, -1))
        return f(*point), (ahead - behind) / (2 * size)

    return derivative
