"""Softmax attention through the fastest kernel that is there, beside a plain reference."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lingbot_nb.model.graph import compile_often
from lingbot_nb.model.masks import FrameMask

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Unmasked attention of q [B, Lq, N, D] over k, v [B, Lk, N, D]."""


LONG_GROUP = 1024
"""Query tokens that see the same keys from which unmasked calls beat one FlexAttention call. Measured on an H200,
bf16, 21 frames of 1560 tokens, chunk 3: 23 against 39 ms forward, 87 against 124 with backward."""


class Kernel(NamedTuple):
    """One way to compute unmasked attention on a GPU: its name, the call, the head sizes it takes, and whether its
    gradients can be trusted."""

    name: str
    attend: Attend
    head_dims: frozenset[int]
    trains: bool = True


def attend_reference(q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor, keep: Tensor | None = None) -> Tensor:
    """Attention spelled out in fp32: softmax(q k^T / sqrt(D)) v. `keep`: bool [Lq, Lk]. Slow; for tests."""
    q, k, v = (x.float().transpose(1, 2) for x in (q_BLND, k_BLND, v_BLND))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if keep is not None:
        scores = scores.masked_fill(~keep, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).to(v_BLND.dtype)


def sdpa(q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor, keep: Tensor | None = None) -> Tensor:
    """torch's scaled_dot_product_attention, whichever kernel it chooses. `keep`: bool [Lq, Lk]."""
    q, k, v = (x.transpose(1, 2) for x in (q_BLND, k_BLND, v_BLND))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep).transpose(1, 2)


def cudnn(q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor) -> Tensor:
    """scaled_dot_product_attention held to cuDNN's kernel; RuntimeError where cuDNN cannot."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return sdpa(q_BLND, k_BLND, v_BLND)


def without_cudnn(q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor) -> Tensor:
    """scaled_dot_product_attention by any of torch's own kernels."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        return sdpa(q_BLND, k_BLND, v_BLND)


def flex(q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor, block_mask) -> Tensor:
    """FlexAttention under a BlockMask, compiled; forward and backward, GPU only."""
    from torch.nn.attention.flex_attention import flex_attention

    call = flex_attention if torch.compiler.is_compiling() else _compiled_flex()
    q, k, v = (x.transpose(1, 2) for x in (q_BLND, k_BLND, v_BLND))
    return call(q, k, v, block_mask=block_mask).transpose(1, 2)


@cache
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    compile_often()
    return torch.compile(flex_attention)


def attend_ranges(q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor, ranges: "Ranges") -> Tensor:
    """A mask without a mask kernel: one unmasked `attend` for each group of queries that see the same keys."""
    outputs = []
    for (first, end), stretches in ranges.groups:
        k, v = (_stretched(x, stretches) for x in (k_BLND, v_BLND))
        outputs.append(attend(q_BLND[:, first:end], k, v))
    return torch.cat(outputs, dim=1)


def _stretched(x_BLND: Tensor, stretches: tuple[tuple[int, int], ...]) -> Tensor:
    parts = [x_BLND[:, first:end] for first, end in stretches]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class Ranges(NamedTuple):
    """FrameMask.ranges() in tokens: ((first query, end), ((first key, end), ...)) per group."""

    groups: tuple[tuple[tuple[int, int], tuple[tuple[int, int], ...]], ...]


def token_ranges(mask: FrameMask, tokens_per_frame: int) -> Ranges:
    """A mask as unmasked pieces; see `attend_ranges`."""

    def tokens(span: tuple[int, int]) -> tuple[int, int]:
        return span[0] * tokens_per_frame, span[1] * tokens_per_frame

    return Ranges(tuple((tokens(q), tuple(tokens(k) for k in ks)) for q, ks in mask.ranges()))


_PLAIN = Kernel("SDPA", sdpa, frozenset())
_TRAINS = Kernel("SDPA", without_cudnn, frozenset())


def _first(outcome) -> Tensor:
    # Releases of the flash kernels differ in whether the log-sum-exp comes along.
    return outcome[0] if isinstance(outcome, tuple) else outcome


def _flash_4() -> Attend:
    from flash_attn.cute import flash_attn_func

    return lambda q, k, v: _first(flash_attn_func(q, k, v))


def _flash_3() -> Attend:
    from flash_attn_interface import flash_attn_func

    return lambda q, k, v: _first(flash_attn_func(q, k, v))


def _flash_2() -> Attend:
    from flash_attn import flash_attn_func

    return lambda q, k, v: _first(flash_attn_func(q, k, v))


def _imported(name: str, load: Callable[[], Attend], head_dims: range | tuple[int, ...]) -> list[Kernel]:
    try:
        # The kernels are opaque to the compiler: a layer is compiled up to them and after them.
        return [Kernel(name, torch.compiler.disable(load()), frozenset(head_dims))]
    except (ImportError, OSError, AttributeError, RuntimeError):
        return []


_found: tuple[Kernel, ...] | None = None


def kernels() -> tuple[Kernel, ...]:
    """Unmasked half-precision kernels of this machine, fastest first; empty without a CUDA GPU."""
    global _found
    # A plain global and not functools.cache, which the compiler would look through into the imports.
    if _found is None:
        _found = _search()
    return _found


def _search() -> tuple[Kernel, ...]:
    if not torch.cuda.is_available() or torch.version.hip:
        return ()
    generation = torch.cuda.get_device_capability()[0]
    # Versions 3 and 4 import on any machine but run on these generations alone: Hopper, and Hopper to data-centre
    # Blackwell (consumer Blackwell is 12).
    flash_4 = _imported("flash-attn-4", _flash_4, (64, 96, 128)) if generation in (9, 10, 11) else []
    flash_3 = _imported("flash-attn-3", _flash_3, range(64, 257, 64)) if generation == 9 else []
    flash_2 = _imported("flash-attn-2", _flash_2, range(8, 257, 8)) if generation >= 8 else []
    # From Hopper on cuDNN's kernel is well ahead of flash-attn 2. Two trainings of the tiny
    # world met nan with it after 2,400 and 3,600 steps (torch 2.11, recorded steps), and none in 5,900 without; others
    # tell of nan from its backward. No call of it alone has shown one here: a precaution, so nothing learns through it.
    cudnn_here = [Kernel("cuDNN", cudnn, frozenset(range(8, 129, 8)), trains=False)] if generation >= 9 else []
    return (*flash_4, *flash_3, *cudnn_here, *flash_2)


def _kernel(device_type: str, dtype: torch.dtype, head_dim: int, learns: bool) -> Kernel:
    if device_type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return _PLAIN
    for kernel in kernels():
        if head_dim in kernel.head_dims and (kernel.trains or not learns):
            return kernel
    return _TRAINS if learns else _PLAIN


def backend(
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    learns: bool = False,
) -> str:
    """Which kernel `attend` uses without a mask: "flash-attn-4", "flash-attn-3", "cuDNN", "flash-attn-2" or "SDPA".

    Device: the GPU if there is one. `learns`: with gradients, never cuDNN's. With a mask it is FlexAttention on a GPU
    and SDPA with a dense mask elsewhere.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return _kernel(device.type, dtype, head_dim, learns).name


def _tokens_per_frame(q_BLND: Tensor, k_BLND: Tensor, mask: FrameMask) -> int:
    tokens = q_BLND.shape[1] // mask.frames[0]
    if (q_BLND.shape[1], k_BLND.shape[1]) != (tokens * mask.frames[0], tokens * mask.frames[1]):
        raise ValueError(
            f"mask '{mask.name}' of {mask.frames[0]}x{mask.frames[1]} frames does not fit {q_BLND.shape[1]} queries, "
            f"{k_BLND.shape[1]} keys: build it for this clip"
        )
    return tokens


def kernel_mask(mask: FrameMask, tokens_per_frame: int, device: torch.device):
    """The form of a mask that `attend` is fastest with: dense bool on a CPU; on a GPU a FlexAttention BlockMask, or
    Ranges where every group of frames is long enough to fill the GPU by itself."""
    if device.type != "cuda":
        return mask.dense(tokens_per_frame, device)
    shortest = min(end - first for (first, end), _ in mask.ranges()) * tokens_per_frame
    if shortest >= LONG_GROUP:
        return token_ranges(mask, tokens_per_frame)
    return mask.block_mask(tokens_per_frame, device)


def attend(q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor, mask=None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v through the best kernel: [B, Lq, N, D] in v's dtype.

    q [B, Lq, N, D]; k, v [B, Lk, N, D]. mask: None, a FrameMask, or what `kernel_mask` made of one. Raises ValueError
    when a FrameMask does not fit the lengths.
    """
    q_BLND, k_BLND = q_BLND.to(v_BLND.dtype), k_BLND.to(v_BLND.dtype)
    if mask is None:
        learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q_BLND, k_BLND, v_BLND))
        return _kernel(v_BLND.device.type, v_BLND.dtype, v_BLND.shape[-1], learns).attend(q_BLND, k_BLND, v_BLND)
    if isinstance(mask, FrameMask):
        mask = kernel_mask(mask, _tokens_per_frame(q_BLND, k_BLND, mask), q_BLND.device)
    if isinstance(mask, Ranges):
        return attend_ranges(q_BLND, k_BLND, v_BLND, mask)
    return (sdpa if isinstance(mask, Tensor) else flex)(q_BLND, k_BLND, v_BLND, mask)
