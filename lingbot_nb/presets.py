"""Sizes and settings: every number that a run depends on, as frozen dataclasses.

This module knows nothing of torch. Geometry (tokens per frame, latent sizes) is always computed from a `VideoShape`.
"""

from dataclasses import dataclass, replace

TIME_STRIDE = 4
"""Pixel frames in every latent frame after the first (the first holds one)."""
SPACE_STRIDE = 8
"""Pixels per latent cell along height and width."""
LATENT_CHANNELS = 16
MASK_CHANNELS = 4
"""Channels of the image-to-video mask: one per pixel frame of a latent frame."""
PATCH = (1, 2, 2)
"""Latent cells per token, (frames, height, width)."""
FPS = 16
"""Pixel frames a second."""


@dataclass(frozen=True)
class VideoShape:
    """A clip's size in pixels; everything else about its geometry follows.

    Raises ValueError when the size does not fill whole tokens or the length is not 4n + 1 pixel frames.
    """

    height: int
    width: int
    pixel_frames: int

    def __post_init__(self):
        cell = SPACE_STRIDE * PATCH[1]
        if self.height % cell or self.width % cell or min(self.height, self.width) < cell:
            raise ValueError(
                f"video size {self.height}x{self.width} does not divide into {cell}-pixel tokens: "
                f"use multiples of {cell}"
            )
        if self.pixel_frames < 1 or (self.pixel_frames - 1) % TIME_STRIDE:
            raise ValueError(f"{self.pixel_frames} pixel frames are not 4n + 1: use 1, 5, 9, …, 81, …")

    @property
    def frames(self) -> int:
        """Latent frames."""
        return (self.pixel_frames - 1) // TIME_STRIDE + 1

    @property
    def latent_height(self) -> int:
        return self.height // SPACE_STRIDE

    @property
    def latent_width(self) -> int:
        return self.width // SPACE_STRIDE

    @property
    def grid(self) -> tuple[int, int, int]:
        """Tokens as (frames, height, width)."""
        return self.frames, self.latent_height // PATCH[1], self.latent_width // PATCH[2]

    @property
    def tokens_per_frame(self) -> int:
        return self.grid[1] * self.grid[2]

    @property
    def tokens(self) -> int:
        return self.frames * self.tokens_per_frame

    @property
    def seconds(self) -> float:
        return self.pixel_frames / FPS

    def with_frames(self, frames: int) -> "VideoShape":
        """The same picture size with another number of latent frames."""
        return replace(self, pixel_frames=TIME_STRIDE * (frames - 1) + 1)


@dataclass(frozen=True)
class ModelSize:
    """What fixes the DiT's tensors. `control_channels` counts channels per pixel before the 8x8 unshuffle:
    0 none, 6 rays [origin, direction] (cam), 7 direction + 4 keys less the origin (act), 10 rays + keys (tiny)."""

    dim: int
    heads: int
    layers: int
    ffn_dim: int
    text_dim: int
    text_len: int
    control_channels: int
    in_channels: int = LATENT_CHANNELS + MASK_CHANNELS + LATENT_CHANNELS
    out_channels: int = LATENT_CHANNELS
    freq_dim: int = 256
    eps: float = 1e-6

    def __post_init__(self):
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"dim {self.dim} does not split into {self.heads} heads of even size")

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    @property
    def control_features(self) -> int:
        """Camera features of one token: an 8x8 unshuffle, then a 2x2 patch."""
        return self.control_channels * SPACE_STRIDE**2 * PATCH[1] * PATCH[2]


@dataclass(frozen=True)
class StreamSettings:
    """How the student walks through time. Units are latent frames; the window counts sink and current chunk.

    `relative` keeps keys unrotated and counts positions inside the window, so a stream never runs out of positions;
    `image_first` makes the first frame a chunk of its own (the start image is then written to the cache, not denoised).
    `window=None` keeps everything.
    """

    chunk: int = 1
    window: int | None = 7
    sink: int = 1
    relative: bool = True
    image_first: bool = True

    def __post_init__(self):
        if self.chunk < 1:
            raise ValueError(f"chunk {self.chunk} is below 1: a chunk holds at least one latent frame")
        if self.sink < 0:
            raise ValueError(f"sink {self.sink} is negative: use 0 for no sink")
        if self.window is not None and self.window < self.sink + self.chunk:
            raise ValueError(
                f"window {self.window} cannot hold sink {self.sink} + chunk {self.chunk}: "
                f"use at least {self.sink + self.chunk}"
            )

    def chunk_lengths(self, frames: int) -> list[int]:
        """Latent frames of each chunk of a clip of `frames`: 1 + n + n + … when image_first, the rest last."""
        lengths = [1] if self.image_first else []
        while (left := frames - sum(lengths)) > 0:
            lengths.append(min(self.chunk, left))
        return lengths


@dataclass(frozen=True)
class FlowSettings:
    """Noise schedule: `shift` of the teacher and of the student's sigmas, teacher steps, student's unshifted labels."""

    shift: float
    teacher_steps: int
    student_labels: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)
    guidance: float = 1.0

    def labels(self, steps: int) -> tuple[float, ...]:
        """`steps` evenly spaced unshifted labels from 1 down, e.g. 2 -> (1, 0.5)."""
        if steps < 1:
            raise ValueError(f"{steps} student steps: use 1 or more")
        return tuple(1 - i / steps for i in range(steps))


@dataclass(frozen=True)
class Preset:
    """One scale of the workbook: the same code runs at each."""

    name: str
    shape: VideoShape
    model: ModelSize
    stream: StreamSettings
    flow: FlowSettings
    world_scale: float
    """World units that count as 1.0 in a relative pose: a fixed divisor, so that play never needs the future."""


_TINY_MODEL = ModelSize(dim=256, heads=8, layers=8, ffn_dim=1024, text_dim=64, text_len=16, control_channels=10)
_WAN_TEXT = dict(text_dim=4096, text_len=512)

TINY = Preset(
    name="tiny",
    shape=VideoShape(96, 160, 81),
    model=_TINY_MODEL,
    stream=StreamSettings(),
    flow=FlowSettings(shift=3.0, teacher_steps=50),
    world_scale=32.0,
)
# Half as many layers again, each of the tiny preset's shape: it can begin as a trained tiny network (`model.growth`).
TINY_LARGE = replace(TINY, name="tiny-large", model=replace(_TINY_MODEL, layers=12))
LINGBOT = Preset(
    name="lingbot",
    shape=VideoShape(480, 832, 81),
    model=ModelSize(dim=5120, heads=40, layers=40, ffn_dim=13824, control_channels=6, **_WAN_TEXT),
    stream=StreamSettings(chunk=3, window=9, sink=3, image_first=False),
    flow=FlowSettings(shift=10.0, teacher_steps=70, guidance=5.0),
    world_scale=0.2,
)
LINGBOT_ACT = replace(LINGBOT, name="lingbot-act", model=replace(LINGBOT.model, control_channels=7))
LINGBOT_1B = replace(
    LINGBOT, name="lingbot-1.3b", model=replace(LINGBOT.model, dim=1536, heads=12, layers=30, ffn_dim=8960)
)
# For tests: seconds on one core, odd sizes on purpose.
MICRO = Preset(
    name="micro",
    shape=VideoShape(32, 48, 21),
    model=ModelSize(dim=48, heads=2, layers=2, ffn_dim=96, text_dim=64, text_len=16, control_channels=10, freq_dim=32),
    stream=StreamSettings(chunk=1, window=4, sink=1),
    flow=FlowSettings(shift=3.0, teacher_steps=8),
    world_scale=32.0,
)

ALL = (TINY, TINY_LARGE, LINGBOT, LINGBOT_ACT, LINGBOT_1B, MICRO)


def by_name(name: str) -> Preset:
    """The preset called `name`; a ValueError that lists the names otherwise (papermill hands over plain strings)."""
    for preset in ALL:
        if preset.name == name:
            return preset
    raise ValueError(f"unknown preset '{name}': use one of {', '.join(preset.name for preset in ALL)}")
