"""Three-axis rotary positions: every pair of channels turns with the token's frame, row or column."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

BASE = 10_000.0


class RopeTable(NamedTuple):
    """Cosine and sine of every token's angles, each [tokens, head_dim / 2], fp32."""

    cos: Tensor
    sin: Tensor


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Real channels that turn with (frame, row, column): 128 -> (44, 42, 42)."""
    if head_dim % 2:
        raise ValueError(f"head_dim {head_dim} is odd: rotary positions turn pairs of channels")
    plane = 2 * (head_dim // 6)
    return head_dim - 2 * plane, plane, plane


def _angles(positions: Tensor, dim: int) -> Tensor:
    pairs = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device)
    return torch.outer(positions.to(torch.float64), BASE ** (-pairs / dim))


@lru_cache(maxsize=8)
def _plane(grid_hw: tuple[int, int], head_dim: int, device: torch.device) -> Tensor:
    """Angles of rows and columns, fp64 [h*w, pairs]: the same in every frame."""
    _, row_dim, column_dim = axis_dims(head_dim)
    height, width = grid_hw
    with torch.inference_mode(False):
        rows = _angles(torch.arange(height, device=device), row_dim)
        columns = _angles(torch.arange(width, device=device), column_dim)
        return torch.cat([rows.repeat_interleave(width, 0), columns.repeat(height, 1)], dim=1)


def _positions(positions: Sequence[int], device: torch.device) -> Tensor:
    if isinstance(positions, range) and positions.step == 1:
        # Counting on the device itself: copying a list over would make the host wait for it.
        return torch.arange(positions.start, positions.stop, device=device)
    return torch.tensor([int(p) for p in positions], device=device)


def fresh_rope_table(
    positions: Sequence[int], grid_hw: tuple[int, int], head_dim: int, device: torch.device | str = "cpu"
) -> RopeTable:
    """`rope_table` without the memory: for streams, whose positions never come back."""
    device = torch.device(device)
    plane = _plane(tuple(grid_hw), head_dim, device)
    time = _angles(_positions(positions, device), axis_dims(head_dim)[0])

    def spread(of_time: Tensor, of_plane: Tensor) -> Tensor:
        size = (len(time), len(plane), -1)
        return torch.cat([of_time[:, None].expand(size), of_plane[None].expand(size)], dim=-1).flatten(0, 1)

    return RopeTable(spread(time.cos().float(), plane.cos().float()), spread(time.sin().float(), plane.sin().float()))


@lru_cache(maxsize=8)
def _table(positions: Sequence[int], grid_hw: tuple[int, int], head_dim: int, device: torch.device) -> RopeTable:
    # Tables made under inference_mode could not be used by a training pass that finds them remembered here.
    with torch.inference_mode(False):
        return fresh_rope_table(positions, grid_hw, head_dim, device)


def rope_table(
    positions: Sequence[int], grid_hw: tuple[int, int], head_dim: int, device: torch.device | str = "cpu"
) -> RopeTable:
    """Angles of F frames of h x w tokens at the given frame positions (any integers, repeats allowed).

    Returns cos and sin, [F*h*w, head_dim / 2] fp32, worked out in fp64 so that position 1,000,000 is as exact as 1.
    The last few tables are remembered: treat them as read-only.
    """
    key = positions if isinstance(positions, range) else tuple(int(p) for p in positions)
    return _table(key, tuple(grid_hw), head_dim, torch.device(device))


def apply_rope(x_BLND: Tensor, table: RopeTable) -> Tensor:
    """Turn adjacent channel pairs (2j, 2j + 1) of x [B, L, N, D] by the table's angles, in fp32; keeps x's dtype."""
    if x_BLND.shape[1] != table.cos.shape[0]:
        raise ValueError(f"{x_BLND.shape[1]} tokens do not match a rotary table of {table.cos.shape[0]} tokens")
    pairs = x_BLND.float().contiguous().view(*x_BLND.shape[:-1], -1, 2)
    if torch.compiler.is_compiling():
        # The compiler fuses this but not complex numbers; without it one complex product is several times faster.
        cos, sin = (part[None, :, None, :] for part in table)
        even, odd = pairs.unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(*table)[None, :, None, :])
    return turned.flatten(-2).to(x_BLND.dtype)
