"""TAEHV-shaped tiny autoencoders (madebyollin/taehv; taew2_1 for Wan 2.1 latents): 25 times less work than the VAE.

Every layer works on single pictures but for the memory layers, which see their own input of one frame earlier: so a
stream keeps one tensor for each of nine layers. Latents are the DiT's scaled ones, pictures are [0, 1] inside.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingbot_nb.model import shards
from lingbot_nb.model.replay import ReplayStream
from lingbot_nb.presets import LATENT_CHANNELS, TIME_STRIDE

RGB = 3
WIDTHS = (256, 128, 64, 64)
"""Widths of the decoder's three levels and of its end; the encoder is 64 wide throughout."""
_ENCODER_WIDTH = 64
_LIMIT = 3.0
"""Latents are squashed softly into (-3, 3) before decoding."""


class MemoryLayer(nn.Module):
    """relu(x + convolutions of [x, the previous frame's x]); no frame counts as zeros before the first."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x_BTCHW: Tensor, previous_BCHW: Tensor | None) -> Tensor:
        if previous_BCHW is None:
            previous_BCHW = torch.zeros_like(x_BTCHW[:, 0])
        earlier = torch.cat([previous_BCHW[:, None], x_BTCHW[:, :-1]], dim=1)
        pairs = torch.cat([x_BTCHW, earlier], dim=2).flatten(0, 1)
        return F.relu(self.conv(pairs).view(x_BTCHW.shape) + x_BTCHW)


class Pool(nn.Module):
    """Every `stride` frames become one: [B, T, C, H, W] -> [B, T / stride, C, H, W]."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width * stride, width, 1, bias=False)

    def forward(self, x_BTCHW: Tensor) -> Tensor:
        batch, _, _, height, width = x_BTCHW.shape
        return self.conv(x_BTCHW.reshape(-1, self.conv.in_channels, height, width)).unflatten(0, (batch, -1))


class Grow(nn.Module):
    """Every frame becomes `stride`: [B, T, C, H, W] -> [B, stride T, C, H, W]."""

    def __init__(self, width: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, x_BTCHW: Tensor) -> Tensor:
        frames = self.conv(x_BTCHW.flatten(0, 1)).unflatten(1, (self.stride, -1)).flatten(0, 1)
        return frames.unflatten(0, (len(x_BTCHW), -1))


class Squash(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / _LIMIT) * _LIMIT


def _encoder(width: int) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(RGB, width, 3, padding=1), nn.ReLU()]
    for stride in (2, 2, 1):
        halve = nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False)
        layers += [Pool(width, stride), halve, *(MemoryLayer(width) for _ in range(3))]
    return [*layers, nn.Conv2d(width, LATENT_CHANNELS, 3, padding=1)]


def _decoder(widths: tuple[int, ...]) -> list[nn.Module]:
    layers: list[nn.Module] = [Squash(), nn.Conv2d(LATENT_CHANNELS, widths[0], 3, padding=1), nn.ReLU()]
    for level, stride in enumerate((1, 2, 2)):
        width, narrower = widths[level : level + 2]
        up = [nn.Upsample(scale_factor=2), Grow(width, stride), nn.Conv2d(width, narrower, 3, padding=1, bias=False)]
        layers += [*(MemoryLayer(width) for _ in range(3)), *up]
    return [*layers, nn.ReLU(), nn.Conv2d(widths[-1], RGB, 3, padding=1)]


class TAEHV(nn.Module):
    """Video in [-1, 1] to the DiT's scaled latents and back, roughly; the calls are the VAE's.

    Parameters carry the names of the public taew2_1 file (`encoder.{i}…`, `decoder.{i}…`).
    """

    def __init__(self, widths: tuple[int, ...] = WIDTHS, encoder_width: int = _ENCODER_WIDTH):
        super().__init__()
        self.encoder = nn.ModuleList(_encoder(encoder_width))
        self.decoder = nn.ModuleList(_decoder(widths))

    @classmethod
    def from_file(
        cls,
        path: Path | str,
        *,
        names: Mapping[str, str] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "TAEHV":
        """From taew2_1.pth (opened weights-only) or a safetensors file of it.

        `names` translates the file's tensor names to ours where they differ. Files whose growing layers make more
        frames than Wan 2.1 needs are cut to the last ones, as their own loader does. Raises FileNotFoundError, or
        ValueError that names what does not fit.
        """
        names = names or {}
        state = {names.get(name, name): t.to(device, dtype) for name, t in shards.tensors(path, shards.header(path))}
        if "decoder.1.weight" not in state or "encoder.0.weight" not in state:
            raise ValueError(
                f"{path} has no decoder.1.weight or encoder.0.weight: give taew2_1 weights, or a table of names"
            )
        tails = ["decoder.1.weight", "decoder.8.weight", "decoder.14.weight", "decoder.20.weight"]
        with torch.device("meta"):
            vae = cls(tuple(len(state.get(name, ())) for name in tails), len(state["encoder.0.weight"]))
        wanted = vae.state_dict()
        for name in state.keys() & wanted.keys():
            if state[name].shape[1:] == wanted[name].shape[1:] and len(state[name]) > len(wanted[name]):
                state[name] = state[name][-len(wanted[name]) :]
        wrong = sorted(n for n in state.keys() | wanted.keys() if n not in state or n not in wanted
                       or state[n].shape != wanted[n].shape)  # fmt: skip
        if wrong:
            raise ValueError(f"{path} does not fit a TAEHV for Wan 2.1: {len(wrong)} tensors differ, first {wrong[0]}")
        vae.load_state_dict(state, assign=True)
        return vae.eval().requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder[1].weight.dtype

    @torch.no_grad()
    def encode(self, video_B3NHW: Tensor) -> Tensor:
        """Video [B, 3, 4n + 1, H, W] in [-1, 1] to scaled latents [B, 16, n + 1, H/8, W/8], float32.

        The clip is filled up to whole groups of four with its last picture, as the public weights were trained.
        """
        pixel_frames = video_B3NHW.shape[2]
        if (pixel_frames - 1) % TIME_STRIDE:
            raise ValueError(f"{pixel_frames} pixel frames are not 4n + 1: use 1, 5, 9, …")
        last = video_B3NHW[:, :, -1:].expand(-1, -1, TIME_STRIDE - 1, -1, -1)
        frames = torch.cat([video_B3NHW, last], dim=2).transpose(1, 2).to(self.dtype)
        memories: dict[int, Tensor] = {}
        return _walk(self.encoder, (frames + 1) / 2, memories).transpose(1, 2).float()

    @torch.no_grad()
    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """Scaled latents [B, 16, F, h, w] of a whole clip to video [B, 3, 4(F - 1) + 1, 8h, 8w] in [-1, 1], float32."""
        return self.decoder_stream().decode(latents_BCFHW)

    def decoder_stream(self) -> "TAEHVStream":
        """A decoder that takes a clip's latents as they come; equal to `decode` of them all."""
        return TAEHVStream(self)


class Paired(nn.Module):
    """One VAE that encodes and another that decodes, for a `Session`: the Wan VAE once for the start image, and a TAEHV
    for every frame. Both must speak the same scaled latents."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def encode(self, video_B3NHW: Tensor) -> Tensor:
        return self.encoder.encode(video_B3NHW)

    def image_condition(self, image_B3HW: Tensor, frames: int) -> Tensor:
        return self.encoder.image_condition(image_B3HW, frames)

    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        return self.decoder.decode(latents_BCFHW)

    def decoder_stream(self) -> ReplayStream:
        return self.decoder.decoder_stream()


class TAEHVStream(ReplayStream):
    """Decodes latents as they come, remembering one frame for each memory layer."""

    def __init__(self, vae: TAEHV):
        self.vae = vae
        super().__init__(_reach(vae.decoder), vae.decoder[1].weight.device)

    def forget(self) -> None:
        self._memories: dict[int, Tensor] = {}

    def advance(self, latents_BCFHW: Tensor) -> Tensor:
        latents = latents_BCFHW.transpose(1, 2).to(self.vae.dtype)
        # One latent frame at a time, whatever arrives together: the same arithmetic in play and over a whole clip.
        return torch.cat([self._decode(frame) for frame in latents.split(1, dim=1)], dim=1).transpose(1, 2)

    def _decode(self, frame_BTCHW: Tensor) -> Tensor:
        first = not self._memories
        frames = _walk(self.vae.decoder, frame_BTCHW, self._memories).clamp(0, 1) * 2 - 1
        # A clip's first latent frame stands for one picture: the last of the four it decodes to.
        return frames[:, -1:] if first else frames


def _walk(layers: nn.ModuleList, x_BTCHW: Tensor, memories: dict[int, Tensor]) -> Tensor:
    """Frames through all layers; `memories`, by layer, is read and replaced."""
    for index, layer in enumerate(layers):
        if isinstance(layer, MemoryLayer):
            remembered, memories[index] = memories.get(index), x_BTCHW[:, -1]
            x_BTCHW = layer(x_BTCHW, remembered)
        elif isinstance(layer, Pool | Grow):
            x_BTCHW = layer(x_BTCHW)
        else:
            x_BTCHW = layer(x_BTCHW.flatten(0, 1)).unflatten(0, (len(x_BTCHW), -1))
    return x_BTCHW


def _reach(layers: nn.ModuleList) -> int:
    """Latent frames that the next picture can depend on: every memory layer looks one frame back at its own rate."""
    frames, rate = 0.0, 1
    for layer in layers:
        frames += 1 / rate if isinstance(layer, MemoryLayer) else 0
        rate *= layer.stride if isinstance(layer, Grow) else 1
    return int(-(-frames // 1))
