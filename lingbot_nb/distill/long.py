"""Long tuning: the student walks further than its teacher can see, and is judged by the end of the walk.

    clips = OwnRollout(student, settings, steps, make_cache)
    make_clip = LongRollout(clips, frames=21, walks=(21, 41), picture=last_picture(vae))
    batches = long_batches(latents, 8, generator, clips_for(41, 21))
    step = dmd_step(make_clip, critic, teacher, batches, settings, known=1, shift=3.0)

A teacher knows clips of F frames; the student's errors grow over many more. So the student walks N > F frames through
its cache, window and sink included, the first N - F + 1 of them without gradient, and teacher and critic are shown the
last F as a clip of its own (the way in which Self-Forcing's training, Huang et al. 2025, exceeds its teacher's length).

Two things make a clip of a piece. Its first frame has to be a start image: a latent from the middle of a walk stands
for four pixel frames and was decoded with a past, which no teacher has seen at a clip's start, so that its last pixel
frame is decoded and encoded anew, alone. And the conditions have to say that the clip begins there: the image in its
place, and a camera that nothing has moved yet. The first frame is given and carries no loss (`known` = 1).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lingbot_nb.distill import parallel
from lingbot_nb.distill.forcing import random_index
from lingbot_nb.distill.train import OwnRollout
from lingbot_nb.presets import MASK_CHANNELS, StreamSettings
from lingbot_nb.world.latents import Batch, LatentClips

Picture = Callable[[Tensor], Tensor]
"""Latents of a walk so far, B 16 f h w -> its last pixel frame as the latent of a start image, B 16 h w."""


def last_picture(vae, sees: int | None = None) -> Picture:
    """Decode, take the last pixel frame, encode it alone; `sees` is how many latent frames its decoder looks at (None:
    all of them), `vae.size.memory + 1` for the tiny one."""

    @torch.no_grad()
    def picture(latents_BCFHW: Tensor) -> Tensor:
        seen = latents_BCFHW if sees is None else latents_BCFHW[:, :, -sees:]
        return vae.encode(vae.decode(seen)[:, :, -1:])[:, :, 0]

    return picture


def check_walks(walks: Sequence[int], frames: int, settings: StreamSettings) -> None:
    """Raises ValueError unless the last `frames` frames of every walk are one frame and whole chunks."""
    for walk in walks:
        lengths = settings.chunk_lengths(walk)
        borders = {sum(lengths[:i]) for i in range(len(lengths) + 1)}
        if walk < frames or walk - frames + 1 not in borders:
            fitting = [f"{walk - end + 1}" for end in sorted(borders) if 1 <= end < walk]
            raise ValueError(
                f"the last {frames} frames of a walk of {walk} are not one frame and whole chunks of "
                f"{lengths}: for this walk use clips of {', '.join(fitting) or 'no length at all'}"
            )


@dataclass(frozen=True)
class LongRollout:
    """Clips of `frames` frames from the ends of longer walks, one length out of `walks` drawn for each.

    Everything but the length is `clips`': student, cache, sink and window, steps. A walk of exactly `frames` is a plain
    clip. Raises ValueError for a length whose clip would not consist of its first frame and whole chunks.
    """

    clips: OwnRollout
    frames: int
    walks: Sequence[int]
    picture: Picture

    def __post_init__(self):
        check_walks(self.walks, self.frames, self.clips.settings)

    def draw(self, generator: torch.Generator) -> int:
        """Exit step and length of the walk, as one number."""
        exit_step = self.clips.draw(generator)
        walk = torch.randint(len(self.walks), (), generator=generator, device=generator.device)
        return exit_step * len(self.walks) + int(parallel.agree(walk.item(), generator.device))

    def __call__(self, batch: Batch, generator: torch.Generator, drawn: int | None = None) -> tuple[Batch, Tensor]:
        """The clip's own batch and the clip. ValueError for a batch that is shorter than the walk."""
        exit_step, at = divmod(self.draw(generator) if drawn is None else drawn, len(self.walks))
        walk, there = self.walks[at], batch.latents.shape[2]
        if there < walk:
            raise ValueError(f"a walk of {walk} frames needs control for as many, not {there}: see long_batches")
        first = walk - self.frames
        batch, x = replace(self.clips, grad_from=first + 1)(batch.frames(walk), generator, exit_step)
        if not first:
            return batch, x
        image = self.picture(x[:, :, : first + 1].detach()).to(x.dtype)
        return starting_at(batch, first, image), torch.cat([image[:, :, None], x[:, :, first + 1 :]], 2)


def starting_at(batch: Batch, first: int, image_BCHW: Tensor) -> Batch:
    """The batch of a clip that begins at frame `first` with a start image of its own, B 16 h w."""
    image, frames = image_BCHW[:, :, None], batch.latents.shape[2] - first
    # A clip's first frame has the mask and no motion before it, whatever the walk did; later ones are as they were.
    mask, after = batch.condition[:, :MASK_CHANNELS, :frames], batch.condition[:, MASK_CHANNELS:, 1:frames]
    condition = torch.cat([mask, torch.cat([image.to(after.dtype), after], 2)], 1)
    control = torch.cat([batch.control[:, :, :1], batch.control[:, :, first + 1 :]], 2)
    latents = torch.cat([image.to(batch.latents.dtype), batch.latents[:, :, first + 1 :]], 2)
    return Batch(latents, condition, control, batch.context)


# ---- control for walks that are longer than any clip ----------------------------------------------------------------


def joined(batches: Sequence[Batch]) -> Batch:
    """Clips end to end, 1 + n·(F - 1) frames of n times F: each later one goes on where the one before stopped.

    Control tells a frame's motion from the frame before, so that a walk of any length can be put together; a later
    clip's first frame, to which nothing led, is left out. The latents are those of the clips, one after the other: good
    for comparing spread and motion, not as a film.
    """
    first, *later = (batch.tensors[:3] for batch in batches)
    tensors = (torch.cat([whole, *(part[i][:, :, 1:] for part in later)], 2) for i, whole in enumerate(first))
    return Batch(*tensors, batches[0].context)


def clips_for(walk: int, frames: int) -> int:
    """How many clips of `frames`, `joined`, are at least a walk of `walk` frames."""
    return -(-(walk - 1) // (frames - 1))


def long_batches(clips: LatentClips, size: int, generator: torch.Generator, count: int) -> Iterator[Batch]:
    """Random batches without end, each row `count` whole clips `joined` under one control mode; `size` is this rank's
    part of the batch."""
    frames, device = clips.latents.shape[1], clips.latents.device
    starts = torch.zeros(size, dtype=torch.int64, device=device)

    def draw(high: int) -> Tensor:
        return random_index(high, (size,), generator).to(device)

    while True:
        modes = draw(2).bool()
        yield joined([clips.batch(draw(len(clips)), starts, frames, modes) for _ in range(count)])
