"""The tiny tokenizer: a causal 4x8x8 video VAE whose decoder streams.

Pixels come in groups: the first pixel frame is a group of its own (shown to the encoder four times), every later group
holds four. One latent frame stands for one group. The encoder sees its own group only, so any pixel frame can start a
clip; the decoder sees its latent frame and `memory` earlier ones, so a stream never needs the future.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingbot_nb.model import checkpoint
from lingbot_nb.presets import LATENT_CHANNELS, MASK_CHANNELS, SPACE_STRIDE, TIME_STRIDE

RGB = 3
LOG_VARIANCE_RANGE = (-12.0, 2.0)
"""Bounds of the predicted log variance: a standard deviation between 0.0025 and 2.7 of a latent unit."""
FIRST_LOG_VARIANCE = -6.0
"""Predicted log variance before training: a standard deviation of 0.05."""


UNTOLD = {"decoder_widths": (192, 128, 96), "decoder_depths": (3, 2, 3)}
"""What differs from the default in weights whose card tells no size."""


@dataclass(frozen=True)
class VAESize:
    """Widths and depths of the two halves, finest resolution (half the picture) to coarsest (an eighth) or back.

    Depths count residual pairs of 3x3 convolutions. `memory` is how many earlier latent frames the decoder sees.
    """

    encoder_widths: tuple[int, ...] = (96, 128, 160)
    encoder_depths: tuple[int, ...] = (2, 2, 3)
    decoder_widths: tuple[int, ...] = (192, 96, 64)
    decoder_depths: tuple[int, ...] = (3, 3, 2)
    memory: int = 1

    def __post_init__(self):
        halves = (self.encoder_widths, self.encoder_depths, self.decoder_widths, self.decoder_depths)
        if any(len(half) != 3 for half in halves):
            raise ValueError(f"VAE widths and depths {halves} need three numbers each: resolutions 1/2, 1/4 and 1/8")
        if self.memory < 0:
            raise ValueError(f"decoder memory {self.memory} is negative: use 0 for none")

    @classmethod
    def of_card(cls, card: Mapping) -> "VAESize":
        """The size that a card's "size" tells (`dataclasses.asdict` of it); a card without one is older than that."""
        kept = card.get("size", UNTOLD)
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()})


MICRO_VAE = VAESize((8, 12, 16), (1, 1, 1), (16, 12, 8), (1, 1, 1))
"""For tests: milliseconds on one core."""


def from_uint8(frames_BNHW3: Tensor) -> Tensor:
    """Pixels 0..255 as [B, N, H, W, 3] to float video [B, 3, N, H, W] in [-1, 1]."""
    return frames_BNHW3.movedim(-1, 1).float().div(127.5).sub(1)


def to_uint8(video_B3NHW: Tensor) -> Tensor:
    """Float video in [-1, 1] to pixels [B, N, H, W, 3] in 0..255, rounded and clipped."""
    return video_B3NHW.float().add(1).mul(127.5).round().clamp(0, 255).byte().movedim(1, -1)


class Residual(nn.Module):
    """x + conv(silu(conv(silu(x)))), 3x3, starting as the identity: deep enough without a normalisation to pay for."""

    def __init__(self, width: int):
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        nn.init.zeros_(self.second.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(F.silu(x))))


def _stage(width: int, depth: int) -> list[nn.Module]:
    return [Residual(width) for _ in range(depth)]


class Encoder(nn.Sequential):
    """Groups [G, 12, H, W] to latent mean and log variance [G, 32, H/8, W/8]; every group on its own."""

    def __init__(self, size: VAESize):
        fine, middle, coarse = size.encoder_widths
        depths = size.encoder_depths
        super().__init__(
            nn.PixelUnshuffle(2),
            nn.Conv2d(RGB * TIME_STRIDE * 4, fine, 3, padding=1),
            *_stage(fine, depths[0]),
            nn.Conv2d(fine, middle, 2, stride=2),
            *_stage(middle, depths[1]),
            nn.Conv2d(middle, coarse, 2, stride=2),
            *_stage(coarse, depths[2]),
            nn.SiLU(),
            nn.Conv2d(coarse, 2 * LATENT_CHANNELS, 3, padding=1),
        )
        # Start almost as a plain autoencoder: unit noise would drown the means for the first hundreds of steps.
        nn.init.constant_(self[-1].bias[LATENT_CHANNELS:], FIRST_LOG_VARIANCE)


class Decoder(nn.Sequential):
    """A latent frame after its memory, [G, 16 (memory + 1), H/8, W/8], to a group of pixel frames [G, 12, H, W].

    Most of the arithmetic sits at half resolution, in the widths that a pixel shuffle turns into full-size texture.
    """

    def __init__(self, size: VAESize):
        coarse, middle, fine = size.decoder_widths
        depths = size.decoder_depths
        super().__init__(
            nn.Conv2d(LATENT_CHANNELS * (size.memory + 1), coarse, 3, padding=1),
            *_stage(coarse, depths[0]),
            nn.Conv2d(coarse, 4 * middle, 1),
            nn.PixelShuffle(2),
            *_stage(middle, depths[1]),
            nn.Conv2d(middle, 4 * fine, 1),
            nn.PixelShuffle(2),
            *_stage(fine, depths[2]),
            nn.SiLU(),
            nn.Conv2d(fine, RGB * TIME_STRIDE * 4, 3, padding=1),
            nn.PixelShuffle(2),
        )


class TinyVAE(nn.Module):
    """Video in [-1, 1] to 16-channel latents of about unit variance and back, 4x8x8 smaller, strictly causal.

    `latent_mean` and `latent_std` [16] are set by `calibrate` after training; until then latents are unscaled.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, size: VAESize | None = None):
        super().__init__()
        self.size = size or VAESize()
        self.encoder = Encoder(self.size)
        self.decoder = Decoder(self.size)
        self.register_buffer("latent_mean", torch.zeros(LATENT_CHANNELS))
        self.register_buffer("latent_std", torch.ones(LATENT_CHANNELS))
        self.to(memory_format=torch.channels_last)

    @classmethod
    def from_file(cls, path: Path | str, device: torch.device | str = "cpu") -> "TinyVAE":
        """Stored weights of whatever size their card tells, ready for use: on `device`, in eval mode.

        Raises FileNotFoundError, or ValueError for damaged files.
        """
        vae = cls(VAESize.of_card(checkpoint.read_card(path)))
        checkpoint.load_into(path, vae)
        return vae.to(device).eval()

    @property
    def dtype(self) -> torch.dtype:
        return self.latent_mean.dtype

    def moments(self, video_B3NHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the unscaled latents, each [B, 16, F, H/8, W/8] with F = (N - 1) / 4 + 1.

        Raises ValueError for a video that is not [B, 3, 4n + 1, H, W] with H and W multiples of 8.
        """
        _check_video(video_B3NHW)
        batch = video_B3NHW.shape[0]
        latents = self.encoder(_groups(video_B3NHW).contiguous(memory_format=torch.channels_last))
        mean, log_variance = latents.unflatten(0, (batch, -1)).transpose(1, 2).chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE_RANGE)

    def decode_groups(self, unscaled_BCFHW: Tensor, past_BCMHW: Tensor | None = None) -> Tensor:
        """Unscaled latents [B, 16, F, h, w] to four pixel frames each, [B, 3, 4F, 8h, 8w], about [-1, 1], not clipped.

        `past` [B, 16, memory, h, w] are the latents before them, zeros (the default) before a clip's start.
        """
        batch, _, frames = unscaled_BCFHW.shape[:3]
        if past_BCMHW is None:
            past_BCMHW = self.no_past(unscaled_BCFHW)
        line = torch.cat([past_BCMHW, unscaled_BCFHW], dim=2)
        seen = torch.cat([line[:, :, i : i + frames] for i in range(self.size.memory + 1)], dim=1)
        folded = seen.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        pixels = self.decoder(folded).unflatten(0, (batch, frames)).unflatten(2, (TIME_STRIDE, RGB))
        return pixels.flatten(1, 2).transpose(1, 2)

    def no_past(self, like_BCFHW: Tensor) -> Tensor:
        """What the decoder remembers before a clip's first frame: zeros [B, 16, memory, h, w]."""
        batch, channels, _, height, width = like_BCFHW.shape
        return like_BCFHW.new_zeros(batch, channels, self.size.memory, height, width)

    @torch.no_grad()
    def encode(self, video_B3NHW: Tensor) -> Tensor:
        """Video [B, 3, 4n + 1, H, W] in [-1, 1] to scaled latents [B, 16, n + 1, H/8, W/8], float32.

        Deterministic: the mean, never a sample. Raises ValueError for sizes that do not fill whole latent cells.
        """
        mean, _ = self.moments(video_B3NHW.to(self.dtype))
        return ((mean - _per_channel(self.latent_mean)) / _per_channel(self.latent_std)).float()

    @torch.no_grad()
    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """Scaled latents [B, 16, F, h, w] of a whole clip to video [B, 3, 4(F - 1) + 1, 8h, 8w] in [-1, 1], float32."""
        return self.decoder_stream().decode(latents_BCFHW)

    def decoder_stream(self) -> "DecoderStream":
        """A decoder that takes a clip's latents as they come; equal to `decode` of them all."""
        return DecoderStream(self)

    @torch.no_grad()
    def image_condition(self, image_B3HW: Tensor, frames: int) -> Tensor:
        """The image-to-video condition of a start image in [-1, 1] for a clip of `frames` latent frames.

        Returns [B, 20, frames, H/8, W/8]: four mask channels (1 over the first frame, 0 later), then the latents of the
        clip [image, grey, grey, …]. The encoder has no memory, so the grey tail is one latent frame, repeated.
        """
        if frames < 1:
            raise ValueError(f"a condition of {frames} latent frames: use 1 or more")
        grey = torch.zeros_like(image_B3HW[:1, :, None]).expand(-1, -1, 1 + TIME_STRIDE, -1, -1)
        image = self.encode(image_B3HW[:, :, None])
        tail = self.encode(grey)[:, :, 1:].expand(image.shape[0], -1, frames - 1, -1, -1)
        mask = torch.zeros_like(image[:, :MASK_CHANNELS]).repeat(1, 1, frames, 1, 1)
        mask[:, :, 0] = 1
        return torch.cat([mask, torch.cat([image, tail], dim=2)], dim=1)

    def unscale(self, latents_BCFHW: Tensor) -> Tensor:
        """Scaled latents, as `encode` returns them, to the unscaled ones that the decoder was trained on."""
        return latents_BCFHW.to(self.dtype) * _per_channel(self.latent_std) + _per_channel(self.latent_mean)

    @torch.no_grad()
    def calibrate(self, latents_BCFHW: Tensor) -> None:
        """Set the scale so that latents like these, as `encode` returned them, have mean 0 and variance 1 per channel.

        Repeating it with freshly encoded latents changes nothing. Raises ValueError when a channel is constant.
        """
        std, mean = torch.std_mean(latents_BCFHW.double(), dim=(0, 2, 3, 4))
        if not (std > 1e-6).all():
            raise ValueError(
                f"latent channel {int(std.nan_to_num(0).argmin())} is constant over {tuple(latents_BCFHW.shape)} "
                "latents: calibrate a trained VAE, on more pictures"
            )
        self.latent_mean.copy_(self.latent_mean + self.latent_std * mean)
        self.latent_std.copy_(self.latent_std * std)


class DecoderStream:
    """Decodes a clip's latents piece by piece, remembering the last `memory` latent frames.

    A batch is decoded side by side; `reset` starts the next clip.
    """

    def __init__(self, vae: TinyVAE):
        self.vae = vae
        self.past_BCMHW: Tensor | None = None

    def reset(self) -> None:
        """Forget the clip so far: the next latent frame is a first frame again."""
        self.past_BCMHW = None

    def state_dict(self) -> dict[str, Tensor]:
        """The remembered latents on the CPU as "past"; nothing before a clip's first latent frame."""
        return {} if self.past_BCMHW is None else {"past": self.past_BCMHW.cpu().clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from where `state_dict` was taken."""
        device = self.vae.latent_mean.device
        self.past_BCMHW = state["past"].to(device, self.vae.dtype) if "past" in state else None

    @torch.no_grad()
    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """Scaled latents [B, 16, f, h, w], f >= 1, to video [B, 3, n, 8h, 8w] in [-1, 1], float32.

        n is 4 pixel frames per latent frame, 1 for the clip's first. Raises ValueError for another layout or size.
        """
        _check_latents(latents_BCFHW)
        unscaled = self.vae.unscale(latents_BCFHW)
        first = self.past_BCMHW is None
        past = self.vae.no_past(unscaled) if first else self.past_BCMHW
        if past.shape[:1] + past.shape[3:] != unscaled.shape[:1] + unscaled.shape[3:]:
            raise ValueError(
                f"latents {tuple(latents_BCFHW.shape)} do not continue a stream of {tuple(past.shape)}: "
                "reset() before another batch or picture size"
            )
        line = torch.cat([past, unscaled], dim=2)
        memory = self.vae.size.memory
        # One latent frame at a time, whatever arrives together: the same arithmetic in play and over a whole clip.
        groups = [
            self.vae.decode_groups(line[:, :, i : i + 1], line[:, :, i - memory : i])
            for i in range(memory, line.shape[2])
        ]
        if first:
            groups[0] = groups[0][:, :, -1:]
        self.past_BCMHW = line[:, :, line.shape[2] - memory :]
        return torch.cat(groups, dim=2).float().clamp(-1, 1)


def _per_channel(values_C: Tensor) -> Tensor:
    return values_C[:, None, None, None]


def _groups(video_B3NHW: Tensor) -> Tensor:
    """[B, 3, 4n + 1, H, W] to [B (n + 1), 12, H, W], the first pixel frame four times."""
    first = video_B3NHW[:, :, :1].expand(-1, -1, TIME_STRIDE, -1, -1)
    frames = torch.cat([first, video_B3NHW[:, :, 1:]], dim=2).transpose(1, 2)
    return frames.unflatten(1, (-1, TIME_STRIDE)).flatten(0, 1).flatten(1, 2)


def _check_video(video: Tensor) -> None:
    if video.dim() != 5 or video.shape[1] != RGB:
        raise ValueError(f"video {tuple(video.shape)} is not [batch, 3, pixel frames, height, width]: use that layout")
    pixel_frames, height, width = video.shape[2:]
    if pixel_frames < 1 or (pixel_frames - 1) % TIME_STRIDE:
        raise ValueError(f"{pixel_frames} pixel frames are not 4n + 1: use 1, 5, 9, …")
    if height % SPACE_STRIDE or width % SPACE_STRIDE:
        raise ValueError(f"pictures of {height}x{width} do not divide into latent cells: use multiples of 8")


def _check_latents(latents: Tensor) -> None:
    if latents.dim() != 5 or latents.shape[1] != LATENT_CHANNELS or latents.shape[2] < 1:
        raise ValueError(
            f"latents {tuple(latents.shape)} are not [batch, {LATENT_CHANNELS}, frames >= 1, height, width]: "
            "use that layout"
        )
