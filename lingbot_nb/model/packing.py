"""Weight files of half the size: large matrices in 8 bits a number, with a scale a row, or several.

    python -m lingbot_nb.model.packing weights/student.safetensors data/weights/student.safetensors

For disks and downloads, not for speed: whoever loads a packed file gets floating weights, as of any other. Rounding to
the nearest of 255 levels between a row's extremes moves a weight by 0.7 % of its row's standard deviation (a Gaussian
row of some hundred), where bf16 moves it by 0.2 % of itself. The fewer numbers share a scale, the nearer its extremes:
`--share 64` costs 3 % more bytes, and a scale a row takes 0.21 dB from the tiny tokenizer where that takes 0.07.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

LARGE = 2**15
"""Numbers in a tensor from which on it is packed. Smaller ones, like the last map and the modulations, are where an
error reaches everything, and they are a fiftieth of a file."""
STATISTICS = 64
"""Vectors of fewer numbers than this scale everything (a latent channel's mean) and keep their precision."""
LEVELS = 127
SCALE = ".row_scale"
"""What a packed tensor's scales are called, after its own name."""


def packed(state: dict[str, Tensor], share: int | None = None) -> dict[str, Tensor]:
    """A state dict with its large matrices as int8 and, beside each, bf16 scales: [rows], or [rows, parts] of `share`
    numbers or fewer where that moves a matrix less; the rest in bf16. Raises ValueError for a share below 1."""
    if share is not None and share < 1:
        raise ValueError(f"{share} numbers cannot share a scale: give 1 or more, or nothing for whole rows")
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if not tensor.is_floating_point() or tensor.numel() < STATISTICS:
            out[name] = tensor
        elif tensor.dim() > 1 and tensor.numel() >= LARGE:
            out[name], out[name + SCALE] = _nearest(tensor, share)
        else:
            out[name] = tensor.bfloat16()
    return out


def unpacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The floating state dict of a packed one, fp32 where it was packed; of any other, itself."""
    scales = {name.removesuffix(SCALE): tensor for name, tensor in state.items() if name.endswith(SCALE)}
    whole = {name: tensor for name, tensor in state.items() if not name.endswith(SCALE)}
    return whole | {name: whole[name].float() * _beside(scale, whole[name]) for name, scale in scales.items()}


def _nearest(tensor: Tensor, share: int | None) -> tuple[Tensor, Tensor]:
    """`_rows` of whole rows or of parts, whichever moves the tensor less: what was packed by rows before (an encoder
    whose decoder learnt on) lies on their levels exactly and would be rounded a second time on others."""
    made = [_rows(tensor, parts) for parts in ((share, None) if share else (None,))]
    return min(made, key=lambda pair: float((pair[0].float() * _beside(pair[1], tensor) - tensor.float()).norm()))


def _rows(tensor: Tensor, share: int | None) -> tuple[Tensor, Tensor]:
    """(int8 of the same shape, bf16 [rows] or [rows, parts]) of a tensor whose first dimension counts rows."""
    rows = tensor.float().flatten(1).abs()
    parts = -(-rows.shape[1] // share) if share else 1
    # Equal parts: their number alone, which the file keeps, tells where they end.
    extremes = torch.stack([part.amax(1) for part in rows.split(-(-rows.shape[1] // parts), 1)], 1)
    # The scale that is stored is the one that is divided by: its own rounding costs nothing but a hair of the range.
    scale = (extremes / LEVELS).clamp(min=torch.finfo(torch.bfloat16).tiny).bfloat16()
    levels = (tensor.float() / _beside(scale, tensor)).round().clamp(-LEVELS, LEVELS)
    return levels.to(torch.int8), scale if share else scale[:, 0]


def _beside(scale: Tensor, tensor: Tensor) -> Tensor:
    """The scale of every number of `tensor`, whose rows are cut into as many equal parts as `scale` has columns."""
    scale = scale.float().view(len(scale), -1)
    numbers = tensor[0].numel()
    return scale.repeat_interleave(-(-numbers // scale.shape[1]), 1)[:, :numbers].reshape(tensor.shape)


def main() -> None:
    from lingbot_nb.model import checkpoint  # which unpacks by this module

    parser = argparse.ArgumentParser(prog="lingbot_nb.model.packing", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="weights that the workbook wrote, with their card beside them")
    parser.add_argument("out", type=Path, help="the packed file; its card goes beside it")
    parser.add_argument("--share", type=int, help="numbers of a row that share a scale (default: all)")
    args = parser.parse_args()
    state, card = checkpoint.read(args.source)
    checkpoint.write(args.out, packed(state, args.share), {**card, "packed_from": card["sha256"]})
    sizes = [file.stat().st_size / 1e6 for file in (args.source, args.out)]
    print(json.dumps({"file": str(args.out), "megabytes_before": sizes[0], "megabytes": sizes[1]}))


if __name__ == "__main__":
    main()
