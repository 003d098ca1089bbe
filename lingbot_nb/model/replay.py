"""What streaming decoders with long memories share: a state that is short to save and exact to restore."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from lingbot_nb.presets import LATENT_CHANNELS


class ReplayStream(ABC):
    """Decodes a clip's latents piece by piece; its state is the last `reach` latent frames.

    Such a decoder's feature cache takes gigabytes, but follows from the latents that it can still see. So those are
    its `state_dict`, and loading them decodes them again.
    """

    def __init__(self, reach: int, device: torch.device):
        self.reach = reach
        self.device = device
        self.reset()

    @abstractmethod
    def forget(self) -> None:
        """Make the next latent frame a clip's first."""

    @abstractmethod
    def advance(self, latents_BCFHW: Tensor) -> Tensor:
        """Pixel frames [B, 3, n, H, W] in [-1, 1] of the next latent frames, in the decoder's type."""

    def reset(self) -> None:
        """Forget the clip so far: the next latent frame is a first frame again."""
        self._past: Tensor | None = None
        self.forget()

    @torch.no_grad()
    def decode(self, latents_BCFHW: Tensor) -> Tensor:
        """Scaled latents [B, 16, f, h, w], f >= 1, to video [B, 3, n, 8h, 8w] in [-1, 1], float32.

        n is 4 pixel frames per latent frame, 1 for the clip's first. Raises ValueError for another layout or size.
        """
        self._check(latents_BCFHW)
        frames = self.advance(latents_BCFHW)
        seen = latents_BCFHW if self._past is None else torch.cat([self._past, latents_BCFHW], dim=2)
        self._past = seen[:, :, -self.reach :].clone()
        return frames.float()

    def state_dict(self) -> dict[str, Tensor]:
        """The latents that the next picture can depend on, on the CPU as "past"; nothing before a clip's first."""
        return {} if self._past is None else {"past": self._past.cpu().clone()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from where `state_dict` was taken; costs the decoding of up to `reach` latent frames."""
        self.reset()
        if "past" in state:
            self.decode(state["past"].to(self.device))

    def _check(self, latents: Tensor) -> None:
        if latents.dim() != 5 or latents.shape[1] != LATENT_CHANNELS or latents.shape[2] < 1:
            raise ValueError(
                f"latents {tuple(latents.shape)} are not [batch, {LATENT_CHANNELS}, frames >= 1, height, width]: "
                "use that layout"
            )
        past = self._past
        if past is not None and past.shape[:2] + past.shape[3:] != latents.shape[:2] + latents.shape[3:]:
            raise ValueError(
                f"latents {tuple(latents.shape)} do not continue a stream of {tuple(past.shape)}: "
                "reset() before another batch or picture size"
            )
