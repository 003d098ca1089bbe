"""The Wan 2.1 VAE that LingBot-World works in: diffusers' network, the released file's names, a decoder that streams.

The same calls as the tiny tokenizer: `encode`, `decode`, `decoder_stream`, and a start image's condition.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingbot_nb.model import shards
from lingbot_nb.model.replay import ReplayStream
from lingbot_nb.presets import MASK_CHANNELS, PATCH, SPACE_STRIDE, TIME_STRIDE

RGB = 3
LATENT_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
               0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
LATENT_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
              3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip
"""Mean and standard deviation of the Wan 2.1 VAE's 16 latent channels: the DiT sees (z - mean) / std."""

FILES = ("Wan2.1_VAE.pth", "Wan2.1_VAE.safetensors", "diffusion_pytorch_model.safetensors", "vae")
"""What `WanVAE.from_file` looks for in a folder, in this order."""

# A residual branch of the released file is a Sequential: norm, SiLU, convolution, norm, SiLU, dropout, convolution.
_RESIDUAL = {"0": "norm1", "2": "conv1", "3": "norm2", "6": "conv2"}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_ENDS = {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out"}
_OUTSIDE = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
_START = 3
"""A clip's first frames pass the upsamplers in their own way: so many must be out of sight."""
_UPSAMPLES_PER_LEVEL = 4
"""Three residual blocks and an upsampler; the last level has no upsampler."""


def diffusers_name(name: str) -> str:
    """Where diffusers' AutoencoderKLWan keeps a tensor of Wan2.1_VAE.pth; names it has itself stay as they are."""
    if name.split(".")[0] in _OUTSIDE and name.count(".") == 1:
        module, leaf = name.split(".")
        return f"{_OUTSIDE[module]}.{leaf}"
    name = re.sub(r"^(\w+)\.(conv1|head\.0|head\.2)\.", lambda m: f"{m[1]}.{_ENDS[m[2]]}.", name)
    name = re.sub(r"^(\w+)\.middle\.(\d)\.", lambda m: f"{m[1]}.mid_block.{_MIDDLE[m[2]]}.", name)
    name = re.sub(r"^encoder\.downsamples\.", "encoder.down_blocks.", name)
    name = re.sub(r"^decoder\.upsamples\.(\d+)\.", _up_block, name)
    name = re.sub(r"\.residual\.([0236])\.", lambda m: f".{_RESIDUAL[m[1]]}.", name)
    return re.sub(r"\.shortcut\.", ".conv_shortcut.", name)


def _up_block(match: re.Match) -> str:
    level, place = divmod(int(match[1]), _UPSAMPLES_PER_LEVEL)
    part = "upsamplers.0" if place == _UPSAMPLES_PER_LEVEL - 1 else f"resnets.{place}"
    return f"decoder.up_blocks.{level}.{part}."


AREA = 480 * 832
"""Pixels that LingBot-World is asked for by "480*832"; the start image's sides decide how they are laid out."""


def released_size(height: int, width: int, area: int = AREA) -> tuple[int, int]:
    """Height and width of the clip that LingBot-World makes of a start image: whole tokens, its sides, about `area`.

    Upstream's arithmetic to the last bit. So a picture of exactly 480x832 gives 464x832: the square root comes out as
    479.999…, and rounding down to whole tokens takes the 16 pixels.
    """
    if min(height, width, area) < 1:
        raise ValueError(f"a start image of {height}x{width} for {area} pixels: use sizes above 0")
    sides = height / width
    rows, columns = (_whole_tokens(math.sqrt(pixels)) for pixels in (area * sides, area / sides))
    if not rows or not columns:
        raise ValueError(f"{area} pixels laid out as {height}x{width} hold no whole token: use a larger area")
    return rows, columns


def _whole_tokens(pixels: float) -> int:
    return SPACE_STRIDE * round(pixels // SPACE_STRIDE // PATCH[1] * PATCH[1])


def start_picture(image_HW3: Tensor, area: int = AREA) -> Tensor:
    """A start image, uint8 [H, W, 3], as the released pipeline takes it: [1, 3, h, w] in [-1, 1] and a little beyond.

    Bicubic to `released_size`, neither cropped nor smoothed before; edges overshoot, and upstream lets them.
    """
    if image_HW3.dtype != torch.uint8 or image_HW3.ndim != 3 or image_HW3.shape[2] != RGB:
        raise ValueError(f"start image {image_HW3.dtype} {tuple(image_HW3.shape)}: give uint8 [height, width, 3]")
    image = image_HW3.permute(2, 0, 1)[None].float().div(255).sub(0.5).div(0.5)
    return F.interpolate(image, released_size(*image_HW3.shape[:2], area), mode="bicubic")


class WanVAE(nn.Module):
    """Video in [-1, 1] to scaled 16-channel latents and back, 4x8x8 smaller, strictly causal (Wan, arXiv 2503.20314).

    `model` is diffusers' AutoencoderKLWan. bfloat16 weights are fine; latents and pictures are float32 outside.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @classmethod
    def build(cls, *, base_dim: int = 96, device: torch.device | str | None = None) -> "WanVAE":
        """With fresh weights; 96 is the released width. Raises RuntimeError when diffusers is not installed."""
        try:
            from diffusers import AutoencoderKLWan
        except ImportError as missing:
            raise RuntimeError("the Wan VAE needs the diffusers package: pip install 'diffusers>=0.35'") from missing
        with torch.device(device or "cpu"):
            model = AutoencoderKLWan(base_dim=base_dim)
        return cls(model.eval().requires_grad_(False))

    @classmethod
    def from_file(
        cls, path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> "WanVAE":
        """From Wan2.1_VAE.pth (opened weights-only), a safetensors file in either naming, or a folder that holds one.

        Raises FileNotFoundError, or ValueError that names the tensors when they are not this VAE's.
        """
        path = _file(Path(path))
        headers = shards.header(path)
        state = {diffusers_name(name): tensor.to(device, dtype) for name, tensor in shards.tensors(path, headers)}
        if "encoder.conv_in.weight" not in state:
            raise ValueError(f"{path} has no encoder.conv1.weight: these are not the weights of the Wan 2.1 VAE")
        vae = cls.build(base_dim=len(state["encoder.conv_in.weight"]), device="meta")
        _check_names(path, state, vae.model.state_dict())
        vae.model.load_state_dict(state, assign=True)
        vae.model.requires_grad_(False)
        return vae

    def channels_last(self) -> "WanVAE":
        """The same network with its convolutions' weights laid out as a GPU's tensor cores want them, in place. What
        flows between the layers is then laid out so too, and is not turned round for each of them."""
        for part in self.model.modules():
            if isinstance(part, nn.Conv2d | nn.Conv3d):
                part.to(memory_format=torch.channels_last if isinstance(part, nn.Conv2d) else torch.channels_last_3d)
        return self

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @torch.no_grad()
    def encode(self, video_B3NHW: Tensor) -> Tensor:
        """Video [B, 3, 4n + 1, H, W] in [-1, 1] to scaled latents [B, 16, n + 1, H/8, W/8], float32.

        Deterministic: the mean, never a sample. Raises ValueError for sizes that do not fill whole latent cells.
        """
        _check_video(video_B3NHW)
        mean = self.model.encode(video_B3NHW.to(self.dtype)).latent_dist.mode().float()
        return (mean - _per_channel(LATENT_MEAN, mean)) / _per_channel(LATENT_STD, mean)

    @torch.no_grad()
    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """Scaled latents [B, 16, F, h, w] of a whole clip to video [B, 3, 4(F - 1) + 1, 8h, 8w] in [-1, 1], float32."""
        return self.decoder_stream().decode(latents_BCFHW)

    def decoder_stream(self) -> "WanDecoderStream":
        """A decoder that takes a clip's latents as they come; equal to `decode` of them all."""
        return WanDecoderStream(self)

    def unscale(self, latents_BCFHW: Tensor) -> Tensor:
        """Scaled latents, as `encode` returns them, to the network's own, in its type."""
        latents = latents_BCFHW.float()
        return (latents * _per_channel(LATENT_STD, latents) + _per_channel(LATENT_MEAN, latents)).to(self.dtype)

    def image_condition(self, image_B3HW: Tensor, frames: int) -> Tensor:
        """The image-to-video condition [B, 20, frames, H/8, W/8] of a start image in [-1, 1].

        Four mask channels (1 over the first frame, 0 later), then the latents of the clip [image, grey, grey, …]. The
        encoder remembers the image for `encoder_reach` frames; after those all are one grey frame, encoded once.
        """
        if frames < 1:
            raise ValueError(f"a condition of {frames} latent frames: use 1 or more")
        encoded = min(frames, self.encoder_reach + 1)
        grey = torch.zeros_like(image_B3HW[:, :, None]).expand(-1, -1, TIME_STRIDE * (encoded - 1), -1, -1)
        latents = self.encode(torch.cat([image_B3HW[:, :, None], grey], dim=2))
        tail = latents[:, :, -1:].expand(-1, -1, frames - encoded, -1, -1)
        mask = torch.zeros_like(latents[:, :MASK_CHANNELS, :1]).repeat(1, 1, frames, 1, 1)
        mask[:, :, 0] = 1
        return torch.cat([mask, torch.cat([latents, tail], dim=2)], dim=1)

    @property
    def decoder_reach(self) -> int:
        """Latent frames that a decoder must be shown again to go on exactly as if it had seen the whole clip."""
        half, rate = self.model.decoder, 1
        frames = _memory(half.conv_in) + _memory(half.mid_block)
        for block in half.up_blocks:
            frames += _memory(block) / rate
            rate *= 2 if _resamples_time(block) else 1
        return math.ceil(frames + _memory(half.conv_out) / rate) + _START

    @property
    def encoder_reach(self) -> int:
        """Earlier latent frames whose pictures a latent frame depends on."""
        half, rate = self.model.encoder, TIME_STRIDE
        frames = _memory(half.conv_in) / rate
        for block in half.down_blocks:
            frames += _memory(block) / rate
            rate //= 2 if _resamples_time(block) else 1
        return math.ceil(frames + _memory(half.mid_block) + _memory(half.conv_out))


class WanDecoderStream(ReplayStream):
    """Decodes one latent frame at a time through the network's feature cache, of which every stream has its own."""

    def __init__(self, vae: WanVAE):
        self.vae = vae
        self._slots = len(_causal(vae.model.decoder))
        super().__init__(vae.decoder_reach, next(vae.parameters()).device)

    def forget(self) -> None:
        self._features: list = [None] * self._slots

    def advance(self, latents_BCFHW: Tensor) -> Tensor:
        # One latent frame at a time from the start, whatever arrives together: the same kernels round the same way in
        # play and over a whole clip.
        frames = [self._decode(frame.contiguous()) for frame in self.vae.unscale(latents_BCFHW).split(1, dim=2)]
        return torch.cat(frames, dim=2).clamp(-1, 1)

    def _decode(self, frame_BCFHW: Tensor) -> Tensor:
        model, first = self.vae.model, self._features[0] is None
        frame_BCFHW = model.post_quant_conv(frame_BCFHW)
        # The network counts its way through the cache in the list it is given.
        return model.decoder(frame_BCFHW, feat_cache=self._features, feat_idx=[0], first_chunk=first)


def _causal(module: nn.Module) -> list[nn.Conv3d]:
    return [part for part in module.modules() if isinstance(part, nn.Conv3d)]


def _memory(module: nn.Module) -> int:
    """Earlier frames that a module sees, counted at the rate of its input."""
    return sum(conv.kernel_size[0] - 1 for conv in _causal(module))


def _resamples_time(block: nn.Module) -> bool:
    return any(name.split(".")[-1] == "time_conv" for name, _ in block.named_modules())


def _file(path: Path) -> Path:
    if path.is_dir():
        for name in FILES:
            if (path / name).is_dir():
                return _file(path / name)
            if (path / name).is_file():
                return path / name
        raise FileNotFoundError(f"{path} holds none of {', '.join(FILES)}: give the VAE's file")
    return path


def _check_names(path: Path, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    problems = {
        "missing": wanted.keys() - found.keys(),
        "unexpected": found.keys() - wanted.keys(),
        "of another shape": {n for n in wanted.keys() & found.keys() if found[n].shape != wanted[n].shape},
    }
    told = [f"{len(names)} {what}, first {min(names)}" for what, names in problems.items() if names]
    if told:
        raise ValueError(f"{path} does not fit the Wan 2.1 VAE: {'; '.join(told)}")


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device)[:, None, None, None]


def _check_video(video: Tensor) -> None:
    if video.dim() != 5 or video.shape[1] != RGB:
        raise ValueError(f"video {tuple(video.shape)} is not [batch, 3, pixel frames, height, width]: use that layout")
    pixel_frames, height, width = video.shape[2:]
    if pixel_frames < 1 or (pixel_frames - 1) % TIME_STRIDE:
        raise ValueError(f"{pixel_frames} pixel frames are not 4n + 1: use 1, 5, 9, …")
    if height % SPACE_STRIDE or width % SPACE_STRIDE:
        raise ValueError(f"pictures of {height}x{width} do not divide into latent cells: use multiples of 8")
