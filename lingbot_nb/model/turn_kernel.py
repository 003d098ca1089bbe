"""Norm, rotation and cache write of a chunk's queries, keys and values as one Triton kernel.

A compiler makes one kernel of it too, but that one keeps a whole row of 5120 numbers in registers and reads each twice
for its rotation: 0.275 ms for 4680 tokens on an H100, where this one takes 0.085 and moving the bytes alone 0.08.
"""

import warnings
from functools import cache

import torch
from torch import Tensor

from lingbot_nb.model.fp8 import LARGEST
from lingbot_nb.model.fp8_attention import SCALE
from lingbot_nb.model.rope import RopeTable, fresh_rope_table

_LONGEST_BLOCK = 1024


def norm_turn_write(raw, table: RopeTable, to: tuple[Tensor, Tensor, Tensor], slots: Tensor | None = None) -> None:
    """RMS-normed and turned q and k, and v, of a `fused.Raw` of batch 1, into `to`.

    Each of `to` is [parts, rows, N / parts, D], the heads shared out over the parts: bf16, or bytes that then hold
    e4m3, v times `fp8_attention.SCALE`. Token i goes to row i; of k and v to row `slots[i]` where these are given.
    """
    kernel = _kernel()
    q, k, v = raw.q[0], raw.k[0], raw.v[0]
    tokens, dim = q.shape
    of_q, of_k, of_v = to
    head_dim = of_q.shape[3]
    block = _block(dim, head_dim)
    kernel[(tokens, 3)](
        *(q, k, v, q.stride(0), k.stride(0), v.stride(0), raw.norm_q, raw.norm_k, table.cos, table.sin),
        *(of_q, of_k, of_v, of_q.stride(0), of_q.stride(1), of_k.stride(0), of_k.stride(1)),
        *(slots if slots is not None else table.cos, raw.eps, SCALE, LARGEST),
        DIM=dim,
        BLOCK=block,
        HALF=head_dim // 2,
        PART=dim // of_q.shape[0],
        PLACED=slots is not None,
        FP8=of_q.dtype == torch.uint8,
        num_warps=4,
    )


def _block(dim: int, head_dim: int) -> int:
    """Numbers that a program holds at once: whole heads, a power of two."""
    block = _LONGEST_BLOCK
    while dim % block:
        block //= 2
    if block % head_dim:
        raise ValueError(f"rows of {dim} do not split into blocks of whole heads of {head_dim}: use no kernel for them")
    return block


@cache
def _kernel():
    import triton
    import triton.language as tl

    @triton.jit
    def run(
        q, k, v, q_row, k_row, v_row, norm_q, norm_k, cos, sin,
        to_q, to_k, to_v, q_part, q_token, kv_part, kv_token, slots, eps, v_scale, largest,
        DIM: tl.constexpr, BLOCK: tl.constexpr, HALF: tl.constexpr, PART: tl.constexpr,
        PLACED: tl.constexpr, FP8: tl.constexpr,
    ):  # fmt: skip
        token, which = tl.program_id(0), tl.program_id(1)
        at = tl.arange(0, BLOCK)
        row = q + token * q_row
        weight, to, part_stride, scale = norm_q, to_q + token * q_token, q_part, 1.0
        if which > 0:
            place = token
            if PLACED:
                place = tl.load(slots + token).to(tl.int32)
            row = k + token * k_row
            weight, to, part_stride = norm_k, to_k + place.to(tl.int64) * kv_token, kv_part
            if which > 1:
                row = v + token * v_row
                to = to_v + place.to(tl.int64) * kv_token
                scale = v_scale
        rate = 1.0
        if which < 2:
            squares = tl.zeros([BLOCK], tl.float32)
            for first in range(0, DIM, BLOCK):
                x = tl.load(row + first + at).to(tl.float32)
                squares += x * x
            rate = tl.rsqrt(tl.sum(squares) / DIM + eps)
        pair = tl.arange(0, BLOCK // 2) % HALF
        for first in range(0, DIM, BLOCK):
            y = tl.load(row + first + at)
            if which < 2:
                # Rounded where the plain path rounds: after the norm, after the weight, after the turn.
                y = (y.to(tl.float32) * rate).to(tl.bfloat16)
                y = (y.to(tl.float32) * tl.load(weight + first + at).to(tl.float32)).to(tl.bfloat16)
                even, odd = tl.split(tl.reshape(y.to(tl.float32), (BLOCK // 2, 2)))
                c, s = tl.load(cos + token * HALF + pair), tl.load(sin + token * HALF + pair)
                y = tl.reshape(tl.join(even * c - odd * s, even * s + odd * c), (BLOCK,)).to(tl.bfloat16)
            where = first + at
            address = to + (where // PART).to(tl.int64) * part_stride + where % PART
            if FP8:
                y = tl.minimum(tl.maximum(y.to(tl.float32) * scale, -largest), largest)
                tl.store(address, y.to(tl.float8e4nv).to(tl.uint8, bitcast=True))
            else:
                tl.store(address, y)

    return run


def usable(device: torch.device, heads: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the kernel runs on `device` and computes what the plain path does; if not, one warning says why."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return False
    try:
        error = _error(device, heads, head_dim)
    except Exception as problem:
        warnings.warn(f"norm and rotation stay with the compiler: {type(problem).__name__}: {problem}", stacklevel=2)
        return False
    if not error < 0.01:
        warnings.warn(f"norm and rotation stay with the compiler: the kernel is off by {error:.2g}", stacklevel=2)
        return False
    return True


def _error(device: torch.device, heads: int, head_dim: int) -> float:
    """Relative error of the kernel's turned keys on noise."""
    from lingbot_nb.model.dit import Attention
    from lingbot_nb.model.fused import raw_of
    from lingbot_nb.model.rope import apply_rope

    make = torch.Generator(device=device).manual_seed(0)
    attention = Attention(heads * head_dim, heads, 1e-6, device="meta")
    for norm in (attention.norm_q, attention.norm_k):
        drawn = torch.randn(heads * head_dim, generator=make, device=device).to(torch.bfloat16)
        norm.weight = torch.nn.Parameter(drawn, requires_grad=False)
    raw = [torch.randn(1, 24, heads * head_dim, generator=make, device=device).to(torch.bfloat16) for _ in range(3)]
    table = fresh_rope_table(range(2), (3, 4), head_dim, device)
    to = tuple(torch.zeros(1, 24, heads, head_dim, dtype=torch.bfloat16, device=device) for _ in range(3))
    norm_turn_write(raw_of(attention, *raw), table, to, torch.arange(24, device=device).flip(0))
    q, k, v = attention.normed(*raw)
    wanted = apply_rope(q, table), apply_rope(k, table).flip(1), v.flip(1)
    return max(((a.float() - b.float()).norm() / b.float().norm()).item() for a, b in zip(to, wanted, strict=True))
