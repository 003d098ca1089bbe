"""A decoder between two that read the same latents, one of which went on from the other: the mean of their weights.

    python -m lingbot_nb.distill.between vae.safetensors decoder/vae.safetensors --out between --part 0.5

What the discriminator's push brought one of them, and what that cost, is shared out; what the noise of their steps did
to either averages out (Wortsman et al. 2022, "Model soups"). No training: the push can be chosen afterwards.
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch

from lingbot_nb.model import checkpoint
from lingbot_nb.model.vae import TinyVAE


def between(first: TinyVAE, second: TinyVAE, part: float) -> TinyVAE:
    """`first` with the decoder that lies `part` of the way to `second`'s: 0 is the first, 1 the second.

    Raises ValueError for a part outside [0, 1], for decoders of two sizes, and for tokenizers of different latents.
    """
    if not 0 <= part <= 1:
        raise ValueError(f"part {part:g} lies beyond the two decoders: choose a number from 0 to 1")
    if first.size != second.size:
        raise ValueError(f"tokenizers of two sizes have no mean: {first.size} and {second.size}")
    ours, theirs = first.state_dict(), second.state_dict()
    for name, value in ours.items():
        if not name.startswith("decoder.") and not torch.equal(value, theirs[name]):
            raise ValueError(
                f"the tokenizers make different latents ({name} differs): name two decoders of one encoder"
            )
    made = TinyVAE(first.size)
    made.load_state_dict({name: torch.lerp(value, theirs[name], part) for name, value in ours.items()})
    return made.eval()


def main() -> None:
    parser = argparse.ArgumentParser(prog="lingbot_nb.distill.between", description=__doc__.splitlines()[0])
    parser.add_argument("first", type=Path, help="a tokenizer, a .safetensors file")
    parser.add_argument("second", type=Path, help="another with the same encoder")
    parser.add_argument("--part", type=float, default=0.5, help="how far from the first to the second, 0 to 1")
    parser.add_argument("--out", type=Path, required=True, help="folder for vae.safetensors and its card")
    args = parser.parse_args()
    files = (args.first, args.second)
    made = between(*map(TinyVAE.from_file, files), args.part)
    cards = [checkpoint.read_card(file) for file in files]
    told = {name: cards[1][name] for name in ("preset", "kind", "size") if name in cards[1]}
    command = f"python -m {parser.prog} {shlex.join(sys.argv[1:])}"
    file = args.out / "vae.safetensors"
    # In fp32: the encoder is both files' own and must not be rounded; packing comes after.
    checkpoint.save(file, made, dtype=torch.float32, command=command, **told, part=args.part, between=cards)
    print(f"{file}: {args.part:g} of the way from {args.first} to {args.second}")


if __name__ == "__main__":
    main()
