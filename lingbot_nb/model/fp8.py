"""Linear layers in 8-bit floating point (e4m3): half the bytes, and on Hopper and later about twice the rate.

Every row of the activations and every row of the weight has a scale of its own, which puts its largest entry on the
largest number of the format. Products are summed in fp32.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingbot_nb.model.dit import Attention, Layer

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
_SMALLEST = 1e-12

Product = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""(rows [M, K] e4m3, their scales [M, 1], weight [N, K] e4m3, its scales [1, N], bias [N]) -> [M, N] in bias's type."""


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., K] as e4m3 of the same shape, and the scale [..., 1] fp32 that gives x back: error at most 1/16 of each
    entry, or 2^-10 of a scale for tiny ones."""
    x = x.float()
    largest = x.abs().amax(dim=-1, keepdim=True).clamp(min=_SMALLEST)
    return (x * (LARGEST / largest)).to(E4M3), largest / LARGEST


def scaled_product(rows: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor) -> Tensor:
    """The GPU's own product of e4m3 matrices with a scale for each row; compute capability 8.9 and later."""
    return torch._scaled_mm(rows, weight.t(), scales, weight_scales, bias, out_dtype=bias.dtype, use_fast_accum=True)


def emulated_product(rows: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor, bias: Tensor) -> Tensor:
    """The same numbers by an fp32 product, anywhere: what `scaled_product` is tested against."""
    product = F.linear(rows.float(), weight.float()) * scales * weight_scales
    return (product + bias.float()).to(bias.dtype)


def product_for(device: torch.device) -> Product:
    """The GPU's product where there is one."""
    has = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    return scaled_product if has else emulated_product


class Fp8Linear(nn.Module):
    """A linear map with its weight stored, and its input taken, as e4m3; output in the bias's type."""

    def __init__(self, linear: nn.Linear, product: Product | None = None):
        super().__init__()
        weight, scales = quantised(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scales", scales.t().contiguous())
        self.register_buffer("bias", linear.bias.detach())
        self._product = product or product_for(weight.device)

    def forward(self, x: Tensor) -> Tensor:
        rows, scales = quantised(x.flatten(0, -2))
        return self._product(rows, scales, self.weight, self.scales, self.bias).unflatten(0, x.shape[:-1])


CAMERA = ("cam_injector_layer1", "cam_injector_layer2", "cam_scale_layer", "cam_shift_layer")


def quantise_layer(layer: Layer) -> None:
    """All products of a layer that run in every pass or chunk, in place: the projections of queries, keys, values and
    outputs, the feed-forward and the camera. Keys and values of the text are made once a prompt and stay as they are.
    """
    _replace(layer.self_attn, *(name for name, part in layer.self_attn.named_children() if isinstance(part, nn.Linear)))
    _replace(layer.cross_attn, "q", "o")
    _replace(layer.ffn, "0", "2")
    _replace(layer, *(name for name in CAMERA if hasattr(layer, name)))


def _replace(module: nn.Module | Attention, *names: str) -> None:
    for name in names:
        setattr(module, name, Fp8Linear(getattr(module, name)))
