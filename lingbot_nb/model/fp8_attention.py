"""Self-attention on 8-bit floating point numbers (e4m3): half the cache's bytes, and more than bf16's rate on Hopper.

Queries and keys come out of a norm, so their entries are of the order of 1 and are kept as they are; values and outputs
are kept `SCALE` times as large, and cut off where the format ends. Needs NVIDIA's cudnn-frontend package.
"""

import warnings
from functools import lru_cache

import torch
from torch import Tensor

from lingbot_nb.model.attention import attend_reference
from lingbot_nb.model.fp8 import E4M3, LARGEST

SCALE = 4.0
"""Of values and outputs. An output is a mean of values, so it ends no sooner than they do."""
_SOFTMAX_SCALE = 256.0
"""Of the weights inside the kernel, which are at most 1."""
_TOLERANCE = 0.15
"""Largest relative error of a kernel that is believed: rounding alone gives 0.06 on noise."""


def lowered(x: Tensor, scale: float = 1.0) -> Tensor:
    """`scale` x as e4m3, cut off at the format's ends."""
    return (x.float() * scale).clamp(-LARGEST, LARGEST).to(E4M3)


def lifted(y: Tensor) -> Tensor:
    """An output of `attend_fp8` as bf16."""
    return (y.float() / SCALE).to(torch.bfloat16)


def emulated_attend(q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor) -> Tensor:
    """What `attend_fp8` computes, anywhere and slowly: the weights too are rounded to e4m3 before they meet values."""
    q, k, v = (x.float().transpose(1, 2) for x in (q_BLND, k_BLND, v_BLND))
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    rounded = lowered(weights, _SOFTMAX_SCALE).float() / _SOFTMAX_SCALE
    return lowered((rounded @ v / weights.sum(-1, keepdim=True)).transpose(1, 2))


def attend_fp8(q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of e4m3 tensors, [B, Lq, N, D] e4m3: values and output stand for 1 / SCALE of
    themselves. cuDNN on Hopper; its plan for a new length takes a moment."""
    plan = _plan(
        tuple(q_BLND.shape), q_BLND.stride(), tuple(k_BLND.shape), k_BLND.stride(), v_BLND.stride(), q_BLND.device
    )
    return plan(q_BLND, k_BLND, v_BLND)


def usable(device: torch.device, head_dim: int) -> bool:
    """Whether `attend_fp8` can be used, and is right, on `device`; if not, one warning says why."""
    make = torch.Generator(device=device).manual_seed(0)
    q, k, v = (
        torch.randn(1, length, 2, head_dim, generator=make, device=device).to(torch.bfloat16)
        for length in (384, 1000, 1000)
    )
    try:
        got = lifted(attend_fp8(lowered(q), lowered(k), lowered(v, SCALE))).float()
    except Exception as error:
        warnings.warn(f"attention stays in bf16: {type(error).__name__}: {error}", stacklevel=2)
        return False
    wanted = attend_reference(q, k, v).float()
    error = ((got - wanted).norm() / wanted.norm()).item()
    if not error < _TOLERANCE:
        warnings.warn(f"attention stays in bf16: the fp8 kernel is wrong by {error:.2g} of the result", stacklevel=2)
        return False
    return True


@lru_cache(maxsize=64)
def _plan(q_shape, q_stride, k_shape, k_stride, v_stride, device: torch.device) -> "_Plan":
    return _Plan(q_shape, q_stride, k_shape, k_stride, v_stride, device)


@lru_cache(maxsize=8)
def _handle(device: torch.device):
    import cudnn

    with torch.cuda.device(device):
        return cudnn.create_handle()


class _Plan:
    """cuDNN's kernel for tensors of one shape and layout, ready to run. Shapes and strides are [B, L, N, D]'s."""

    def __init__(self, q_shape, q_stride, k_shape, k_stride, v_stride, device: torch.device):
        import cudnn

        kinds = cudnn.data_type
        self._cudnn, self._device = cudnn, device
        graph = cudnn.pygraph(
            io_data_type=kinds.FP8_E4M3,
            intermediate_data_type=kinds.FLOAT,
            compute_data_type=kinds.FLOAT,
            handle=_handle(device),
        )

        def tensor(shape, stride):
            # cuDNN names the axes B N L D, and takes any order of them in memory.
            axes = (0, 2, 1, 3)
            return graph.tensor(
                dim=[shape[i] for i in axes], stride=[stride[i] for i in axes], data_type=kinds.FP8_E4M3
            )

        def scalar():
            return graph.tensor(dim=[1, 1, 1, 1], stride=[1, 1, 1, 1], data_type=kinds.FLOAT)

        self._inputs = tensor(q_shape, q_stride), tensor(k_shape, k_stride), tensor(k_shape, v_stride)
        scales = [scalar() for _ in range(6)]
        out, _, *largest = graph.sdpa_fp8(
            *self._inputs, *scales, generate_stats=False, attn_scale=q_shape[-1] ** -0.5, use_causal_mask=False
        )
        batch, length, heads, dim = q_shape
        out.set_output(True).set_dim([batch, heads, length, dim])
        out.set_stride([length * heads * dim, dim, heads * dim, 1]).set_data_type(kinds.FP8_E4M3)
        for tensor_ in largest:
            tensor_.set_output(True).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1]).set_data_type(kinds.FLOAT)
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
        graph.check_support()
        graph.build_plans()
        self._graph, self._out, self._shape = graph, out, q_shape
        # descale of q, k, v and weights, then scale of weights and output: an output that keeps the values' scale.
        numbers = (1.0, 1.0, 1.0, 1 / _SOFTMAX_SCALE, _SOFTMAX_SCALE, 1.0)
        constants = torch.tensor([*numbers, 0.0, 0.0], device=device).view(8, 1, 1, 1, 1)
        self._constants = dict(zip([*scales, *largest], constants, strict=True))
        self._workspace = torch.empty(max(graph.get_workspace_size(), 1), dtype=torch.uint8, device=device)

    def __call__(self, *qkv: Tensor) -> Tensor:
        handle = _handle(self._device)
        self._cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(self._device).cuda_stream)
        out = torch.empty(self._shape, dtype=E4M3, device=self._device)
        given = {**dict(zip(self._inputs, qkv, strict=True)), self._out: out, **self._constants}
        self._graph.execute(given, self._workspace, handle=handle)
        return out
