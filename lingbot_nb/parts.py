"""What a notebook works with, loaded for its run: weights, clips, latents, a session to play.

Weights come from the run's folder where an earlier notebook left them, else from `data/weights/`; clips are walked anew
where ViZDoom is installed, else read from `data/clips/`.
"""

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from lingbot_nb.model import growth
from lingbot_nb.model.dit import DiT
from lingbot_nb.model.text import TinyText, map_prompt
from lingbot_nb.model.vae import TinyVAE
from lingbot_nb.runs import PROJECT, Run
from lingbot_nb.stream.session import Session
from lingbot_nb.world.clips import HELD_OUT_SEED, Clip, ClipStore
from lingbot_nb.world.latents import Batch, LatentClips, encode_walks

SHIPPED_CLIPS = PROJECT / "data" / "clips"
MAP = "my_way_home"
PROMPT = map_prompt(MAP)
START = 2
"""The shipped clip that play begins with: a corridor of lamps, where turning and walking show."""
FIRST_HELD_OUT = 112
"""Number of the first held-out walk of a run with seed 0: a walk through rooms with texture, on which errors show."""
SHARD = 4
"""Clips to a shard of a run's own walks."""


def device() -> torch.device:
    """The first GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_vae(run: Run) -> TinyVAE:
    """The tokenizer of this run, else the shipped one."""
    return TinyVAE.from_file(run.find("vae.safetensors"), device())


def load_dit(run: Run, file: str) -> DiT:
    """A DiT of the run's preset with the weights in `file`: "teacher.safetensors", "student.safetensors", …

    Weights of fewer layers are deepened (`model.growth`): "tiny-large" begins where the tiny preset's networks ended.
    """
    dit = DiT(run.preset.model)
    growth.load_into(run.find(file), dit)
    return dit.to(device())


def load_text(run: Run) -> TinyText:
    return TinyText(run.preset.model.text_dim, run.preset.model.text_len)


def shipped_clips(count: int | None = None) -> list[Clip]:
    """The first `count` (None: all) of the held-out clips in data/clips."""
    return list(ClipStore(SHIPPED_CLIPS))[:count]


def walks(run: Run, count: int, *, seed: int = 0, held_out: bool = False) -> list[Clip]:
    """`count` clips of 81 pixel frames, walked in the simulator and kept in the run's folder.

    Seeds of the two splits never meet. Without ViZDoom: the shipped clips, of which there are few.
    """
    if importlib.util.find_spec("vizdoom") is None:
        print("ViZDoom is not installed: using the shipped clips (pip install vizdoom for fresh walks)")
        return shipped_clips(count)
    from lingbot_nb.world.vizdoom import SimulatorSettings, collect

    split = "held-out" if held_out else "train"
    folder = run.path(f"clips/{split}-{seed}")
    first = seed * 100_000 + (HELD_OUT_SEED + FIRST_HELD_OUT if held_out else 0)
    # A few seeds more than wanted, since dark and stuck walks are dropped; whole shards of one size, so that a notebook
    # which wants more clips finds those of another as they are.
    wanted = -(-(count + 2 + count // 8) // SHARD) * SHARD
    settings, processes = SimulatorSettings(map=MAP), min(os.cpu_count() or 1, 8)
    collect(folder, clips=wanted, processes=processes, seed=first, settings=settings, shard_clips=SHARD)
    return list(ClipStore(folder))[:count]


def encode(
    run: Run, vae: TinyVAE, clips: Sequence[Clip], *, frames: int | None = None, starts: int | None = None
) -> LatentClips:
    """Clips as latents, poses and keys on the VAE's device: their first `frames` frames, of which a batch may begin at
    the first `starts` (None: all)."""
    context, where = load_text(run).encode(PROMPT), next(vae.parameters()).device
    return encode_walks(vae, clips, context, run.preset, frames=frames, starts=starts, device=where)


def whole(clips: LatentClips, count: int, *, with_poses: bool, frames: int | None = None, start: int = 0) -> Batch:
    """The `count` clips from number `start`, from their first frame, under one control mode."""
    where = clips.latents.device
    rows = torch.arange(start, start + count, device=where)
    modes = torch.full((count,), with_poses, device=where)
    return clips.batch(rows, torch.zeros_like(rows), frames or clips.latents.shape[1], modes)


def real_frames(clips: Sequence[Clip], frames: int | None = None) -> np.ndarray:
    """Pixel frames u8 [B, N, H, W, 3] of clips, cut to `frames` latent frames."""
    stop = None if frames is None else 4 * (frames - 1) + 1
    return np.stack([clip.frames[:stop] for clip in clips])


def session(
    run: Run, file: str = "student.safetensors", *, start_image=None, steps: int = 4, seed: int = 0, **options
) -> Session:
    """A live session of this run's student; it starts where shipped clip `START` does unless a picture is given.
    `options` are `Session`'s."""
    image = shipped_clips()[START].frames[0] if start_image is None else start_image
    parts = run.preset, load_dit(run, file), load_vae(run), load_text(run)
    return Session(*parts, start_image=image, prompt=PROMPT, steps=steps, seed=seed, **options)


def megabytes(path: Path) -> float:
    """Size of a file or of all files in a folder."""
    files = [path] if path.is_file() else [f for f in path.rglob("*") if f.is_file()]
    return sum(f.stat().st_size for f in files) / 1e6
