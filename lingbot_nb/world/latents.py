"""From clips to what the network is trained on: latents, image condition, control channels, text states.

Encoded clips stay on one device as plain tensors; rays are made per batch, since they are 40 times larger than poses.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lingbot_nb.control.camera import control_tiny_batch
from lingbot_nb.distill import parallel
from lingbot_nb.model.vae import from_uint8
from lingbot_nb.presets import LATENT_CHANNELS, MASK_CHANNELS, TIME_STRIDE, Preset
from lingbot_nb.world.clips import Clip


@dataclass(frozen=True)
class Batch:
    """What one training step sees. `latents` B 16 F h w (normalised), `condition` B 20 F h w (4 mask + 16 image),
    `control` B C F h w, `context` B L text_dim."""

    latents: Tensor
    condition: Tensor
    control: Tensor
    context: Tensor

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All four, in the order of the constructor."""
        return self.latents, self.condition, self.control, self.context

    def frames(self, stop: int) -> "Batch":
        """The first `stop` frames."""
        cut = (tensor[:, :, :stop] for tensor in (self.latents, self.condition, self.control))
        return Batch(*cut, self.context)


def frame_keys(keys_N8: np.ndarray) -> np.ndarray:
    """Keys per pixel frame [N, 8] to the w a s d part per frame [F, 4] in [0, 1]: the mean over a frame's 4 pixel
    frames; zero for the first, which no key led to."""
    walk = np.asarray(keys_N8, np.float32)[1:, :4].reshape(-1, TIME_STRIDE, 4).mean(1)
    return np.concatenate([np.zeros((1, 4), np.float32), walk])


def condition_from(image_latent: Tensor, tail: Tensor, frames: int) -> Tensor:
    """Image latents B 16 h w and the latent of grey 16 h w to the condition B 20 F h w."""
    batch, _, height, width = image_latent.shape
    condition = image_latent.new_zeros(batch, MASK_CHANNELS + LATENT_CHANNELS, frames, height, width)
    condition[:, :MASK_CHANNELS, 0] = 1
    condition[:, MASK_CHANNELS:, 0] = image_latent
    condition[:, MASK_CHANNELS:, 1:] = tail[:, None]
    return condition


@dataclass
class LatentClips:
    """Encoded clips on one device.

    `latents` N F 16 h w; `images` N S 16 h w, the last pixel frames of the first S frames encoded as start images: a
    batch can be cut from those frames on, S = F at most;
    `tail` 16 h w, the latent of grey; `poses` N F 4 4 camera-to-world; `keys` N F 4; `intrinsics` 4; `context` L D.
    `steps` N F 4 4, made here once, are the poses relative to the frame before, translations in world scales.
    """

    preset: Preset
    latents: Tensor
    images: Tensor
    tail: Tensor
    poses: Tensor
    keys: Tensor
    intrinsics: Tensor
    context: Tensor
    steps: Tensor = field(init=False)

    def __post_init__(self):
        self.steps = pose_steps(self.poses, self.preset.world_scale)

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, clips: Tensor, starts: Tensor, frames: int, with_poses: Tensor) -> Batch:
        """Clips [B] cut from frame `starts` [B] on; `with_poses` [B] chooses the control: true poses, or keys with
        rotation only."""
        at = starts[:, None] + torch.arange(frames, device=starts.device)
        rows = clips[:, None]
        latents = self.latents[rows, at]
        first = self.images[clips, starts]
        latents = torch.cat([first[:, None], latents[:, 1:]], 1).movedim(1, 2)
        control = self.control(self.steps[rows, at], self.keys[rows, at], with_poses)
        condition = condition_from(first.float(), self.tail.float(), frames)
        return Batch(latents.float(), condition, control, self.context.expand(len(clips), -1, -1))

    def control(self, steps_BF44: Tensor, keys_BF4: Tensor, with_poses_B: Tensor) -> Tensor:
        """Control channels of clips that start at the first of the given frames: nothing led to it."""
        eye = torch.eye(4, device=steps_BF44.device).expand(len(steps_BF44), 1, 4, 4)
        relative = torch.cat([eye, steps_BF44[:, 1:]], 1)
        relative[..., :3, 3] *= with_poses_B[:, None, None]
        keys = keys_BF4 * (~with_poses_B)[:, None, None]
        keys = torch.cat([torch.zeros_like(keys[:, :1]), keys[:, 1:]], 1)
        shape = self.preset.shape
        return control_tiny_batch(relative, keys, self.intrinsics, shape.height, shape.width)

    def batches(self, size: int, generator: torch.Generator, frames: int | None = None) -> Iterator[Batch]:
        """Random batches without end: clip, start (a frame with an image) and control mode (half poses, half keys)
        drawn anew each time.

        With a generator on the clips' device nothing here makes the host wait. `size` is this rank's part of the batch.
        """
        frames = frames or self.latents.shape[1]
        starts = min(self.images.shape[1], self.latents.shape[1] - frames + 1)
        device = self.latents.device

        def draw(high: int) -> Tensor:
            def whole(shape: tuple[int, ...]) -> Tensor:
                return torch.randint(high, shape, generator=generator, device=generator.device)

            return parallel.draw(whole, (size,), generator).to(device)

        while True:
            yield self.batch(draw(len(self)), draw(starts), frames, draw(2).bool())


def pose_steps(poses_NF44: Tensor, world_scale: float) -> Tensor:
    """Camera poses relative to the frame before, identity for the first; translations divided by `world_scale`; fp32.

    Solved in fp64: in fp32 a long walk's coordinates would eat up the digits of its steps.
    """
    poses = poses_NF44.double().cpu()
    steps = torch.eye(4, dtype=torch.float64).expand_as(poses).clone()
    steps[:, 1:] = torch.linalg.solve(poses[:, :-1], poses[:, 1:])
    steps[..., :3, 3] /= world_scale
    return steps.float().to(poses_NF44.device)


def encode_walks(vae, clips: Sequence[Clip], context: Tensor, preset: Preset, **options) -> LatentClips:
    """`encode_clips` of whole clips of one camera; `options` are its."""
    parts = ([clip.frames for clip in clips], [clip.poses for clip in clips], [clip.keys for clip in clips])
    return encode_clips(vae, *parts, clips[0].intrinsics, context, preset, **options)


@torch.no_grad()
def encode_clips(
    vae,
    frames_u8,
    poses_N44,
    keys_N8,
    intrinsics,
    context,
    preset,
    *,
    frames=None,
    starts=None,
    device="cpu",
    size=8,
    dtype=torch.float32,
):
    """Encodes clips (lists or arrays over clips of uint8 N H W 3, N 4 4, N 8) to `LatentClips` on `device`.

    Of every clip the first `frames` frames, the first `starts` of them as start images too, which costs as much again
    (None: all). `size` clips go through the VAE at a time; latents are kept as `dtype`.
    """
    stop = None if frames is None else TIME_STRIDE * (frames - 1) + 1
    frames_u8, poses_N44, keys_N8 = ([part[:stop] for part in parts] for parts in (frames_u8, poses_N44, keys_N8))
    latents, images = [], []
    for start in range(0, len(frames_u8), size):
        video = from_uint8(torch.from_numpy(np.stack(frames_u8[start : start + size])).to(device))
        latents.append(vae.encode(video).movedim(1, 2).to(dtype))
        images.append(_start_images(vae, video[:, :, ::TIME_STRIDE][:, :, :starts], latents[-1][:, :1]))
    # One grey clip; the encoder keeps no memory across frames, so that its second latent frame stands for all.
    grey = torch.zeros(1, 3, 1 + TIME_STRIDE, *frames_u8[0].shape[1:3], device=device)
    return LatentClips(
        preset,
        torch.cat(latents),
        torch.cat(images),
        vae.encode(grey)[0, :, 1],
        torch.stack([torch.as_tensor(np.asarray(p)[::TIME_STRIDE]).float() for p in poses_N44]).to(device),
        torch.stack([torch.from_numpy(frame_keys(k)) for k in keys_N8]).to(device),
        torch.as_tensor(intrinsics).float().cpu(),
        context.float().to(device),
    )


def _start_images(vae, stills_B3SHW: Tensor, first_B1CHW: Tensor) -> Tensor:
    """Pixel frames, each encoded alone: B S 16 h w. The first is a clip's first frame, whose latents are `first`."""
    later = stills_B3SHW[:, :, 1:].movedim(2, 1)
    if not later.shape[1]:
        return first_B1CHW
    encoded = vae.encode(later.flatten(0, 1)[:, :, None])[:, :, 0]
    return torch.cat([first_B1CHW, encoded.unflatten(0, later.shape[:2]).to(first_B1CHW.dtype)], 1)
