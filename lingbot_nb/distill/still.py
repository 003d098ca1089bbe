"""Standing still: where nobody presses a key nothing changes, so that the student's whole future is known.

    halts = halts_of(vae, latents, clips)
    batches = halts.batches(8, generator, 29, settings)
    step = together(keeping_step(…), still_step(student, batches, settings, steps, make_cache))

A student's own errors come back to it through the cache. Where something moves they are walked out of sight; where one
stands they add up for as long as one stands, and no clip that the teacher was trained on stands longer than a second or
two. But of a halt the truth is known without a simulator and for any time: the picture at which one halted (this holds
in worlds that nothing moves by itself in). So the student's rollout (Self-Forcing's, Huang et al. 2025) is regressed to
it. Regression blurs where a future is open; here it is not.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from lingbot_nb.distill import parallel
from lingbot_nb.distill.flow import FewStep
from lingbot_nb.distill.forcing import Info, frame_mean, gaussian, loss_frames, random_index
from lingbot_nb.distill.rollout import Conditions, draw_exit, rollout
from lingbot_nb.distill.train import MakeCache, Precision, Step, TrainState, descend, fp32
from lingbot_nb.model.vae import from_uint8
from lingbot_nb.presets import TIME_STRIDE, StreamSettings
from lingbot_nb.world.clips import Clip
from lingbot_nb.world.latents import Batch, LatentClips, condition_from

HaltedBatch = tuple[Batch, int]
"""A batch, and how many of its leading frames are a walk that really was; after them nothing moves."""


@dataclass(frozen=True, eq=False)
class Halts:
    """Places in `clips` where the walker stands: clip and frame [N, 2], int64, in order of the frame, and the latent
    `stills` N 16 h w that each of the frames has if one goes on standing there."""

    clips: LatentClips
    places: Tensor
    stills: Tensor

    def __len__(self) -> int:
        return len(self.places)

    def batch(self, rows: Tensor, history: int, frames: int, with_poses: Tensor) -> Batch:
        """The last `history` frames before the halts [B] and the halts themselves, `frames` in all."""
        clip, at = self.places[rows].T
        walk = self.clips.batch(clip, at - (history - 1), history, with_poses)
        still = self.stills[rows][:, :, None].expand(-1, -1, frames - history, -1, -1)
        stay = torch.eye(4, device=rows.device).expand(len(rows), 1 + frames - history, 4, 4)
        control = self.clips.control(stay, stay.new_zeros(*stay.shape[:2], 4), with_poses)[:, :, 1:]
        return Batch(
            torch.cat([walk.latents, still.float()], 2),
            condition_from(walk.latents[:, :, 0], self.clips.tail.float(), frames),
            torch.cat([walk.control, control], 2),
            walk.context,
        )

    def batches(
        self, size: int, generator: torch.Generator, frames: int, settings: StreamSettings, latest: int = 10
    ) -> Iterator[HaltedBatch]:
        """Random batches without end. Half of them stand after their first chunk, the others after more chunks of a
        walk, `latest` frames at most, the same number for a whole batch; control modes are drawn as in
        `LatentClips.batches`. Raises ValueError when no halt has a chunk before it."""
        frame = self.places[:, 1].contiguous()
        # Ranks hold different walks, and must draw from the same list.
        own = min(latest, 1 + int(frame.max()), frames - 1)
        most = int(parallel.gathered(torch.tensor([own], device=frame.device)).min())
        histories = [at for at in accumulate(settings.chunk_lengths(frames)) if at <= most]
        if not histories:
            raise ValueError(
                f"no halt among {len(self)} has a chunk of {settings.chunk} before it within {latest} of {frames} "
                "frames: give more walks or a larger `latest`"
            )
        while True:
            later = len(histories) > 1 and agreed_below(2, generator)
            history = histories[1 + agreed_below(len(histories) - 1, generator)] if later else histories[0]
            # Places come in order of their frame: those with so much of a walk before them are the last ones.
            first = int(torch.searchsorted(frame, history - 1))
            rows = first + random_index(len(self) - first, (size,), generator).to(frame.device)
            modes = random_index(2, (size,), generator).to(frame.device).bool()
            yield self.batch(rows, history, frames, modes), history


def agreed_below(high: int, generator: torch.Generator) -> int:
    """A whole number below `high`, the same on every rank."""
    drawn = torch.randint(high, (), generator=generator, device=generator.device)
    return int(parallel.agree(drawn.item(), generator.device))


@torch.no_grad()
def halts_of(vae, latents: LatentClips, clips: Sequence[Clip], size: int = 16) -> Halts:
    """The halts in walks and their encodings `latents`: each walk's first frame, where its walker begins standing, and
    every frame after which its pose stays as it is for a frame. `size` pictures go through the VAE at a time."""
    device = latents.latents.device
    stays = (latents.steps - torch.eye(4, device=device)).abs().amax((-2, -1)) < 1e-6
    rests = torch.cat([torch.ones_like(stays[:, :1]), stays[:, 2:]], 1)
    frame, clip = rests[:, : latents.images.shape[1]].T.nonzero().T
    pictures = [clips[c].frames[TIME_STRIDE * f] for c, f in zip(clip.tolist(), frame.tolist(), strict=True)]
    stills = [_still(vae, torch.from_numpy(np.stack(pictures[i : i + size])).to(device))
              for i in range(0, len(pictures), size)]  # fmt: skip
    return Halts(latents, torch.stack([clip, frame], 1), torch.cat(stills).to(latents.latents.dtype))


def _still(vae, pictures_BHWC: Tensor) -> Tensor:
    """The latent of four equal pixel frames after others like them. The encoder keeps no memory across frames, so that
    the second latent frame of a short film stands for all later ones."""
    film = from_uint8(pictures_BHWC[:, None].expand(-1, 1 + TIME_STRIDE, -1, -1, -1))
    return vae.encode(film)[:, :, 1]


def still_step(
    student,
    batches: Iterator[HaltedBatch],
    settings: StreamSettings,
    steps: Sequence[FewStep],
    make_cache: MakeCache,
    *,
    clip: float = 1.0,
    precision: Precision = fp32,
) -> Step:
    """The student's own rollout after a halt, regressed to the picture at the halt (role "student"): mean squared error
    of the x0 that a randomly drawn step predicts, over all frames after the given ones."""

    def loss_of(state: TrainState) -> tuple[Tensor, Info]:
        batch, history = next(batches)
        chunks = rollout(
            student,
            gaussian(batch.latents, state.generator),
            steps,
            conditions=Conditions(student.text(batch.context), batch.control, batch.condition),
            cache=make_cache(batch),
            settings=settings,
            generator=state.generator,
            start=batch.latents[:, :, :history],
            exit_step=draw_exit(steps, state.generator),
            grad_from=history,
            write_last=False,
        )
        error = (torch.cat(list(chunks), 2) - batch.latents).square()
        count, device = error.shape[2], error.device
        loss, end = (frame_mean(error, loss_frames(count, known, device)) for known in (history, count - 1))
        return loss, {"end": end.detach()}

    def step(state: TrainState) -> dict:
        return descend(state, "student", lambda: loss_of(state), clip=clip, precision=precision)

    return step
