"""TAEHV decoding at a stream's pace: a chunk's frames side by side, pictures as the GPU's convolutions like them.

Beside `taehv.TAEHVStream`, the plain one, this keeps all tensors channels-last, so that nothing is turned round
between layers; makes frames before it enlarges them, which gives the same numbers from a quarter of the work; and ends
in bytes.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingbot_nb.model.graph import Recorder
from lingbot_nb.model.taehv import TAEHV, Grow, MemoryLayer, Paired
from lingbot_nb.model.vae import to_uint8


class PlainPictures:
    """Any decoder of this project behind `PictureStream`'s interface."""

    def __init__(self, vae: nn.Module):
        self._stream = vae.decoder_stream()

    def reset(self) -> None:
        self._stream.reset()

    def state_dict(self) -> dict[str, Tensor]:
        return self._stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._stream.load_state_dict(state)

    @torch.no_grad()
    def __call__(self, latents_BCFHW: Tensor) -> Tensor:
        return to_uint8(self._stream.decode(latents_BCFHW))[0]


class PictureStream:
    """Latents of one stream as they come, [1, 16, f, h, w], to pixel frames u8 [n, 8h, 8w, 3] on the same device.

    n is 4 f, at the stream's start 3 less. The result is overwritten by the next call of the same f. Differs from the
    plain stream by the rounding of `vae`'s type, at most one level in fp32. `graph`: record each call on a GPU.
    """

    def __init__(self, vae: TAEHV, *, graph: bool = True):
        self._layers = _frames_first(vae.decoder)
        self._dtype, self._device = vae.dtype, vae.decoder[1].weight.device
        self._memories: dict[int, Tensor] = {}
        self._latents: dict[int, Tensor] = {}
        self._began = False
        self._run = Recorder().repeated(self._now) if graph and self._device.type == "cuda" else lambda key: self._now()

    # What play has remembered are inference tensors, which nothing else may write to.
    @torch.inference_mode()
    def reset(self) -> None:
        """Forget the stream so far: the next latent frame is a first frame again."""
        self._began = False
        for memory in self._memories.values():
            memory.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """What each layer remembers, by its number, on the CPU; nothing before a stream's first latent frame."""
        return {str(index): x.cpu().clone() for index, x in self._memories.items()} if self._began else {}

    @torch.inference_mode()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from where `state_dict` was taken."""
        self.reset()
        for index, saved in state.items():
            # A recording reads what lies where it was recorded: an existing memory keeps its place.
            there = self._memories.setdefault(int(index), torch.empty_like(saved, device=self._device))
            there.copy_(saved)
        self._began = bool(state)

    @torch.no_grad()
    def __call__(self, latents_BCFHW: Tensor) -> Tensor:
        frames = latents_BCFHW[0].transpose(0, 1)
        if len(frames) not in self._latents:
            empty = torch.empty(frames.shape, dtype=self._dtype, device=self._device)
            self._latents[len(frames)] = empty.to(memory_format=torch.channels_last)
        self._given = self._latents[len(frames)]
        self._given.copy_(frames)
        pictures = self._run(len(frames))
        skipped, self._began = 0 if self._began else 3, True
        # A clip's first latent frame stands for one picture: the last of the four it decodes to.
        return pictures[skipped:]

    def _now(self) -> Tensor:
        x = self._given
        for index, layer in enumerate(self._layers):
            if isinstance(layer, MemoryLayer):
                x = self._remembering(index, layer, x)
            elif isinstance(layer, Grow):
                x = _grown(layer, x)
            else:
                x = layer(x)
        # Channels-last pictures are rows of red, green, blue already.
        return x.float().clamp(0, 1).mul(255).round().to(torch.uint8).permute(0, 2, 3, 1)

    def _remembering(self, index: int, layer: MemoryLayer, x_TCHW: Tensor) -> Tensor:
        if index not in self._memories:
            self._memories[index] = torch.zeros_like(x_TCHW[:1])
        memory = self._memories[index]
        earlier = torch.cat([memory, x_TCHW[:-1]])
        memory.copy_(x_TCHW[-1:])
        return F.relu(layer.conv(torch.cat([x_TCHW, earlier], dim=1)) + x_TCHW)


def picture_stream(vae: nn.Module, *, graph: bool = True) -> "PictureStream | PlainPictures":
    """The fastest stream of pictures that there is for a decoder."""
    decoder = vae.decoder if isinstance(vae, Paired) else vae
    return PictureStream(decoder, graph=graph) if isinstance(decoder, TAEHV) else PlainPictures(decoder)


def _frames_first(layers: nn.ModuleList) -> list[nn.Module]:
    """The layers with every Grow, which is a map of single pixels, before the Upsample that it follows."""
    ordered = list(layers)
    for i in range(1, len(ordered)):
        if isinstance(ordered[i], Grow) and isinstance(ordered[i - 1], nn.Upsample):
            ordered[i - 1], ordered[i] = ordered[i], ordered[i - 1]
    return ordered


def _grown(layer: Grow, x_TCHW: Tensor) -> Tensor:
    rows = layer.conv(x_TCHW).permute(0, 2, 3, 1).unflatten(-1, (layer.stride, -1))
    return rows.permute(0, 3, 1, 2, 4).flatten(0, 1).permute(0, 3, 1, 2)
