"""What a number format costs on a trained network: the same walks through the engine, format by format.

    python -m lingbot_nb.report.precision --walks 8         (the shipped student of the tiny world)

Every format walks on its own past from the same picture, poses and noise, so that its errors add up as they do in play.
The reference is the plain network in fp32. On a CPU the 8-bit products and attention are emulated to the bit of their
rounding (`fp8.emulated_product`, `fp8_attention.emulated_attend`), and what lies between them stays in fp32, since few
CPUs compute in bf16; on a GPU the products are its own and all else is bf16.
"""

import argparse
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lingbot_nb.distill.flow import few_steps
from lingbot_nb.distill.train import known_frames
from lingbot_nb.model.dit import DiT
from lingbot_nb.presets import Preset
from lingbot_nb.report.architecture import markdown_table
from lingbot_nb.report.evaluation import HORIZONS, decode_clips
from lingbot_nb.report.metrics import Interval, bootstrap_difference, bootstrap_mean, horizon_frames, psnr
from lingbot_nb.stream.engine import Engine, Plain, Speed, fast
from lingbot_nb.world.latents import Batch

PLAIN = Speed(compile=False, graph=False)
FORMATS: Mapping[str, Speed] = {
    "bf16": PLAIN,
    "fp8 products": Speed(compile=False, graph=False, fp8=True),
    "fp8 products and attention": Speed(compile=False, graph=False, fp8=True, fp8_attention=True),
}
"""By name, what the engine computes in; what lies between its products is in the engine's `dtype`."""


@dataclass(frozen=True)
class Cost:
    """One format against fp32, `seconds` after the start: PSNR in dB of latents (peak: their own range) and of pixel
    frames, both to fp32's, and how much PSNR to the simulator it gains over fp32, walk by walk."""

    name: str
    seconds: float
    latents: Interval
    frames: Interval
    gained: Interval


@torch.no_grad()
def walked(path: Engine | Plain, batch: Batch, preset: Preset, steps: int, seed: int = 0) -> Tensor:
    """Latents [1, 16, F, h, w], fp32, of one walk: the known frames of `batch` (one clip) as they are, then chunk by
    chunk under its control. The same seed draws the same noise for every path."""
    make = torch.Generator().manual_seed(seed)
    path.reset()
    path.prompt(batch.context)
    done, known, first = [], known_frames(preset.stream), 0
    for length in preset.stream.chunk_lengths(batch.latents.shape[2]):
        told = batch.control[:, :, first : first + length], batch.condition[:, :, first : first + length]
        real = batch.latents[:, :, first : first + length]
        if first < known:
            path.write(real, *told)
            done.append(real)
        else:
            noise, *fresh = (torch.randn(real.shape, generator=make).to(real.device) for _ in range(steps))
            done.append(path.denoise(noise, torch.stack(fresh) if fresh else noise[None][:0], *told).float().clone())
            path.finish()
        first += length
    return torch.cat(done, 2)


def costs(
    dit: DiT,
    vae,
    batches: Sequence[Batch],
    real: np.ndarray,
    preset: Preset,
    *,
    steps: int = 4,
    formats: Mapping[str, Speed] = FORMATS,
    seconds: Sequence[float] = HORIZONS,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Cost]:
    """Rows of every format and horizon. `dit` in fp32; `batches` of one clip each, `real` their pixel frames u8
    [B, N, H, W, 3]; `dtype` of everything that a format leaves as it is."""
    schedule = few_steps(preset.flow.labels(steps), preset.flow.shift)
    settings = preset.stream, preset.shape, schedule
    latents, frames = _all(Plain(dit, *settings), vae, batches, preset, steps)
    for name, speed in formats.items():
        path = Engine(fast(_copied(dit, dtype), speed), *settings, graph=False)
        other = _all(path, vae, batches, preset, steps)
        for at in seconds:
            span = horizon_frames(at)
            if span.stop <= real.shape[1]:
                # Latent frame k ends where its pixel frames do.
                yield _cost(name, at, (latents, frames), other, real, (span.stop - 1) // 4, span)


def _cost(name: str, at: float, plain, other, real: np.ndarray, frame: int, span: slice) -> Cost:
    own, theirs = plain[0][:, :, frame], other[0][:, :, frame]
    peak = float(plain[0].max() - plain[0].min())
    errors = (own - theirs).square().flatten(1).mean(1).clamp_min(1e-20)
    told = [psnr(real[:, span], films[:, span]).mean(1) for films in (other[1], plain[1])]
    return Cost(
        name,
        at,
        bootstrap_mean((10 * torch.log10(peak**2 / errors)).tolist()),
        bootstrap_mean(psnr(plain[1][:, span], other[1][:, span]).mean(1)),
        bootstrap_difference(*told),
    )


def _all(path: Engine | Plain, vae, batches: Sequence[Batch], preset: Preset, steps: int) -> tuple[Tensor, np.ndarray]:
    latents = torch.cat([walked(path, batch, preset, steps, seed) for seed, batch in enumerate(batches)])
    return latents.cpu(), decode_clips(vae, latents)


def _copied(dit: DiT, dtype: torch.dtype) -> DiT:
    return copy.deepcopy(dit).to(dtype).eval().requires_grad_(False)


def table(rows: Sequence[Cost]) -> str:
    """The rows as a Markdown table: mean and 95 % interval over walks."""
    names = ("format", "seconds", "latents, dB to fp32", "pictures, dB to fp32", "to the simulator, dB more")
    return markdown_table(
        names, [(r.name, f"{r.seconds:g}", str(r.latents), str(r.frames), str(r.gained)) for r in rows]
    )


def main() -> None:
    from lingbot_nb import parts
    from lingbot_nb.runs import Run

    parser = argparse.ArgumentParser(prog="lingbot_nb.report.precision", description=__doc__.splitlines()[0])
    parser.add_argument("--walks", type=int, default=8, help="of the shipped held-out ones")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--student", default="student.safetensors", help="weights, by name")
    args = parser.parse_args()
    run = Run("", "tiny")
    vae, clips = parts.load_vae(run), parts.shipped_clips(args.walks)
    held = parts.encode(run, vae, clips)
    batches = [parts.whole(held, 1, with_poses=True, start=i) for i in range(len(clips))]
    dit = parts.load_dit(run, args.student).eval().requires_grad_(False)
    gpu = parts.device().type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    formats = {name: speed for name, speed in FORMATS.items() if gpu or speed is not PLAIN}
    given = dit, vae, batches, parts.real_frames(clips), run.preset
    print(table([*costs(*given, steps=args.steps, formats=formats, dtype=dtype)]))
    print(f"{len(clips)} walks, {args.steps} steps · {run.conditions(dtype=dtype)}")


if __name__ == "__main__":
    main()
