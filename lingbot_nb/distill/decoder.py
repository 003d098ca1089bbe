"""A new decoder for a trained tokenizer: the latents stay, and with them every network that lives in them.

    torchrun --nproc-per-node 1 -m lingbot_nb.distill.decoder --data clips --vae vae.safetensors --out slim \\
        --widths 192 96 64 --depths 3 3 2

What decoding costs is decided by its widths alone, so a machine that plays too slowly needs no new teacher or student.
With `--go-on` the decoder that is there learns on instead; `--texture` says how much its discriminator may push, where
0 gives the most PSNR that these latents allow and the softest pictures; `distill.between` chooses between two pushes
afterwards. With `--whole` the encoder learns on, too, under a KL of `--kl`: then the latents move, and teacher and
students have to follow them.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from lingbot_nb.distill.recipe import Bench, Budget, Recipe, command_line, fit_tokenizer
from lingbot_nb.distill.tokenizer import TokenizerSettings
from lingbot_nb.model import checkpoint
from lingbot_nb.model.vae import TinyVAE, VAESize


def with_decoder(vae: TinyVAE, widths: tuple[int, ...], depths: tuple[int, ...]) -> TinyVAE:
    """`vae`'s encoder and latents' scale with an untrained decoder of another size (`VAESize`'s decoder fields)."""
    made = TinyVAE(replace(vae.size, decoder_widths=widths, decoder_depths=depths))
    made.encoder.load_state_dict(vae.encoder.state_dict())
    made.latent_mean.copy_(vae.latent_mean)
    made.latent_std.copy_(vae.latent_std)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(prog="lingbot_nb.distill.decoder", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of collected clips, both splits")
    parser.add_argument("--vae", type=Path, required=True, help="the trained tokenizer, a .safetensors file")
    parser.add_argument("--out", type=Path, required=True, help="folder for vae.safetensors, its card and log.jsonl")
    parser.add_argument("--widths", type=int, nargs=3, help="eighth, quarter, half size; default: the tiny VAE's")
    parser.add_argument("--depths", type=int, nargs=3, help="default: the tiny VAE's")
    parser.add_argument("--go-on", action="store_true", help="from the decoder that is there, its widths and depths")
    told = "the encoder learns on as well (with --go-on): latents move, and what lives in them must learn on"
    parser.add_argument("--whole", action="store_true", help=told)
    parser.add_argument("--kl", type=float, help=f"with --whole: weight of the latents' KL (default: {Recipe.kl:g})")
    parser.add_argument("--texture", type=float, default=TokenizerSettings.texture, help="push of the discriminator")
    parser.add_argument("--decibel", type=float, default=TokenizerSettings.decibel, help="worth of a dB, beside the L1")
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--batch", type=int, default=24, help="windows a rank and step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    if args.go_on and (args.widths or args.depths):
        parser.error("--go-on keeps the decoder's own widths and depths: leave --widths and --depths out")
    if args.whole and not args.go_on:
        parser.error("--whole goes on with the tokenizer that is there: add --go-on, or train a new one by the recipe")
    if args.kl is not None and not args.whole:
        parser.error(f"--kl {args.kl:g} weighs the latents of an encoder that learns: add --whole, or leave it out")
    loss = dict(texture=args.texture, decibel=args.decibel, kl=Recipe.kl if args.kl is None else args.kl)
    recipe = Recipe(compile=not args.no_compile, **loss)
    bench = Bench(recipe, args.data, args.out, args.seed, command=command_line(parser.prog))
    torch.manual_seed(args.seed)
    vae = TinyVAE.from_file(args.vae)
    if not args.go_on:
        default = VAESize()
        widths, depths = args.widths or default.decoder_widths, args.depths or default.decoder_depths
        vae = with_decoder(vae, tuple(widths), tuple(depths))
    budget = Budget(args.seconds, args.batch, args.lr)
    before = checkpoint.read_card(args.vae)
    fit_tokenizer(bench, vae, budget, decoder_only=not args.whole, **made_from(before, args.go_on, args.whole))


def made_from(card: Mapping, go_on: bool, whole: bool) -> dict:
    """What a new card tells of the tokenizer before: all of it, where its weights are what this one began with; and
    whose latents the decoder reads, where the encoder did not learn on."""
    begun = dict(made_from=dict(card)) if go_on else dict(encoder_command=card.get("command", ""))
    return begun | ({} if whole else dict(decoder_of=card["sha256"]))


if __name__ == "__main__":
    main()
