"""The judge: one small network, trained on real clips, that reads off a film where the camera went.

Two pixel frames, one latent frame apart, go through the same trunk; a matching layer compares them, and heads say which
walking keys were held, which way the view turned and how the camera moved (inverse dynamics). What the trunk makes of a
single frame gives the learned distances of `features`. It never sees a generated frame in training.

    python -m lingbot_nb collect --out clips --clips 512
    python -m lingbot_nb.report.judge --data clips --out data/judge/judge.safetensors --minutes 10

The run is short and not resumable: one that was killed is started again.
"""

import argparse
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingbot_nb.control.camera import latent_poses, relative_poses
from lingbot_nb.control.keys import KEYS
from lingbot_nb.model import checkpoint
from lingbot_nb.presets import TIME_STRIDE, TINY
from lingbot_nb.runs import PROJECT
from lingbot_nb.world.clips import Clip, ClipStore

JUDGE = PROJECT / "data" / "judge" / "judge.safetensors"
WALKS = "wasd"
"""Order of the four walking directions: forward, left, back, right."""
SHOWS = 4.0
"""Mean change (of 255) between two pixel frames one chunk apart from which on a scene shows motion."""
STILL = 4.0
"""Map units a latent frame below which a held walking key moves nothing: the walker has run into something."""
NEAR, FAR = (2, 3), (1, 6)
"""Cells, up and sideways, within which a cell is looked for again: cells of 4 pixels, and of 8 for fast turns."""
LAYOUT = (3, 5)
"""Rows and columns that the pair head keeps of the picture: a turn and a step differ by where things move."""
IGNORED = -100
"""Label of a pair whose pictures cannot tell: a key held half the time, or held in vain."""


# ---- the network -----------------------------------------------------------------------------------------------------


def _layer(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(4, outputs), nn.SiLU())


class Trunk(nn.Module):
    """One picture [G, 3, H, W] in [-1, 1] to three layers of features: two at a quarter of its size, one at an eighth.
    A cell sees all 4x4 of its pixels at once, so that detail is not lost where resolution is."""

    widths = (32, 32, 64)

    def __init__(self):
        super().__init__()
        fine, middle, coarse = self.widths
        self.fine = nn.Sequential(nn.PixelUnshuffle(4), _layer(48, fine))
        self.middle = _layer(fine, middle)
        self.coarse = _layer(middle, coarse, 2)

    def forward(self, pictures_G3HW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fine = self.fine(pictures_G3HW)
        middle = self.middle(fine)
        return fine, middle, self.coarse(middle)


def match(before_GCHW: Tensor, after_GCHW: Tensor, reach: tuple[int, int]) -> Tensor:
    """How alike each cell is to the cells around the same place one picture later: [G, (2r + 1)(2c + 1), H, W].

    The matching layer of FlowNet (Dosovitskiy et al. 2015, eq. 1) over r rows and c columns either way. Features are
    compared as they are: normalise them for a cosine.
    """
    up, side = reach
    height, width = before_GCHW.shape[-2:]
    padded = F.pad(after_GCHW, (side, side, up, up))
    places = [(row, column) for row in range(2 * up + 1) for column in range(2 * side + 1)]
    return torch.stack([(before_GCHW * padded[:, :, y : y + height, x : x + width]).sum(1) for y, x in places], 1)


def flow(alike_GMHW: Tensor, reach: tuple[int, int], sharp: Tensor) -> Tensor:
    """Where each cell went, as a mean over the matches weighed by softmax(sharp * alike), and how sure that is:
    [G, 3, H, W], columns, rows, and the best match's weight."""
    up, side = reach
    weight = torch.softmax(sharp * alike_GMHW, 1)
    rows = torch.arange(-up, up + 1, device=weight.device, dtype=weight.dtype).repeat_interleave(2 * side + 1)
    columns = torch.arange(-side, side + 1, device=weight.device, dtype=weight.dtype).repeat(2 * up + 1)
    went = [(weight * where[:, None, None]).sum(1) for where in (columns, rows)]
    return torch.stack([*went, weight.amax(1)], 1)


class Matching(nn.Module):
    """Features of two pictures [G, C, H, W] to what a matching layer makes of them: matches and flow."""

    def __init__(self, channels: int, reach: tuple[int, int]):
        super().__init__()
        self.reach, self.outputs = reach, (2 * reach[0] + 1) * (2 * reach[1] + 1) + 3
        self.project = nn.Conv2d(channels, 16, 1)
        self.sharp = nn.Parameter(torch.tensor(10.0))

    def forward(self, before_GCHW: Tensor, after_GCHW: Tensor) -> Tensor:
        alike = match(*(F.normalize(self.project(x), dim=1) for x in (before_GCHW, after_GCHW)), self.reach)
        return torch.cat([alike, flow(alike, self.reach, self.sharp)], 1)


class Judge(nn.Module):
    """Reads pairs of pixel frames; `read` reads whole films.

    `scale` is the world scale of its steps. `corpus_mean` [64] and `corpus_covariance` [64 * 64] describe the frame
    features of the clips it learnt from (flat, so that a cast to bf16 leaves it alone).
    """

    hidden = 64
    heads_out = dict(along=3, across=3, turn=3, motion=3)

    def __init__(self, scale: float = TINY.world_scale):
        super().__init__()
        self.trunk = Trunk()
        _, middle, coarse = Trunk.widths
        self.near, self.far = Matching(middle, NEAR), Matching(coarse, FAR)
        self.narrow = nn.Sequential(nn.Conv2d(self.near.outputs, 32, 1), nn.SiLU(), _layer(32, 32, 2))
        self.pair = nn.Sequential(
            nn.Conv2d(self.far.outputs + 32, 64, 1), nn.SiLU(), _layer(64, 64, 2),
            nn.AdaptiveAvgPool2d(LAYOUT), nn.Flatten(), nn.Linear(64 * LAYOUT[0] * LAYOUT[1], self.hidden), nn.SiLU(),
        )  # fmt: skip
        self.heads = nn.ModuleDict({name: nn.Linear(self.hidden, size) for name, size in self.heads_out.items()})
        self.place = nn.Sequential(nn.Linear(coarse, 64), nn.SiLU(), nn.Linear(64, 6))
        self.register_buffer("scale", torch.tensor(float(scale)))
        self.register_buffer("corpus_mean", torch.zeros(coarse))
        self.register_buffer("corpus_covariance", torch.eye(coarse).flatten())

    def compare(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Middle and coarse features of two pictures to the pair's features [G, 64] and what the heads say of it.

        along: back, none, forward; across and turn: left, none, right (logits). motion: degrees to the right, then
        steps to the right and forward in world scales, in the first picture's camera.
        """
        near, far = self.near(before[0], after[0]), self.far(before[1], after[1])
        narrow = F.adaptive_avg_pool2d(self.narrow(near), far.shape[-2:])
        pair = self.pair(torch.cat([far, narrow], 1))
        said = {name: head(pair) for name, head in self.heads.items()}
        # A turn of 16 degrees and a step of one world scale both count about 1.
        said["motion"] = said["motion"] * said["motion"].new_tensor([16.0, 1.0, 1.0])
        return pair, said

    def forward(self, pictures_BK3HW: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """K pictures in a row to frame features [B, K, 64], pair features [B, K - 1, 64] and the heads' words."""
        batch, count = pictures_BK3HW.shape[:2]
        layers = [layer.unflatten(0, (batch, count)) for layer in self.trunk(pictures_BK3HW.flatten(0, 1))[1:]]
        before, after = ([layer[:, cut].flatten(0, 1) for layer in layers] for cut in (slice(-1), slice(1, None)))
        pairs, said = self.compare(before, after)
        said = {name: words.unflatten(0, (batch, count - 1)) for name, words in said.items()}
        return layers[1].mean((3, 4)), pairs.unflatten(0, (batch, count - 1)), said

    @property
    def device(self) -> torch.device:
        return self.scale.device

    @torch.no_grad()
    def read(self, films, size: int = 8) -> "Reading":
        """What films say, chunk by chunk: uint8 [B, 4n + 1, H, W, 3], a chunk being 4 pixel frames.

        `size` films go through at a time. Raises ValueError for films of another layout.
        """
        films = _films(films)
        parts = [self._read(films[i : i + size]) for i in range(0, len(films), size)]
        return Reading(*(np.concatenate([getattr(p, field.name) for p in parts]) for field in fields(Reading)))

    def _read(self, films: np.ndarray) -> "Reading":
        stills = films[:, ::TIME_STRIDE]
        frames, pairs, said = self(pictures(stills, self.device))
        walks = torch.softmax(said["along"], -1), torch.softmax(said["across"], -1)
        along, across, turn = (x.cpu().numpy() for x in (*walks, torch.softmax(said["turn"], -1)))
        walk = np.stack([along[..., 2], across[..., 0], along[..., 0], across[..., 2]], -1)
        motion = said["motion"].cpu().numpy()
        change = np.abs(np.diff(stills.astype(np.int16), axis=1)).mean((2, 3, 4))
        return Reading(walk, turn, motion[..., 0], motion[..., 1:], change, frames.cpu().numpy(), pairs.cpu().numpy())


@dataclass(frozen=True)
class Reading:
    """What the judge reads off B films of C chunks each.

    walk [B, C, 4]: probability that w a s d was held. turn [B, C, 3]: of left, none, right. yaw [B, C]: degrees turned,
    right positive. step [B, C, 2]: right and forward in world scales. change [B, C]: mean difference (of 255) between
    the chunk's last pixel frame and the one before it. frames [B, C + 1, 64], pairs [B, C, 64]: features.
    """

    walk: np.ndarray
    turn: np.ndarray
    yaw: np.ndarray
    step: np.ndarray
    change: np.ndarray
    frames: np.ndarray
    pairs: np.ndarray

    @property
    def shows(self) -> np.ndarray:
        """Chunks whose scene shows motion, bool [B, C]: the picture changes by `SHOWS` or more."""
        return self.change >= SHOWS

    @property
    def direction(self) -> np.ndarray:
        """The likeliest of the four walking directions, [B, C], an index into `WALKS`."""
        return self.walk.argmax(-1)

    @property
    def side(self) -> np.ndarray:
        """-1 left or 1 right, whichever way is the likelier turn, [B, C]; as `direction`, it does not ask whether."""
        return np.where(self.turn[..., 2] > self.turn[..., 0], 1, -1)

    @property
    def turned(self) -> np.ndarray:
        """-1 left, 0 none, 1 right: the likeliest, [B, C]."""
        return self.turn.argmax(-1) - 1


def load_judge(path: Path | str = JUDGE, device: torch.device | str = "cpu") -> Judge:
    """The judge in `path`, by default the shipped one, ready to read. Raises FileNotFoundError without it."""
    judge = Judge()
    checkpoint.load_into(path, judge)
    return judge.to(device).eval().requires_grad_(False)


def pictures(frames_u8: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """Pixel frames u8 [..., H, W, 3] as the judge takes them: float [..., 3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames_u8)).to(device).movedim(-1, -3).float().div(127.5).sub(1)


def _films(films) -> np.ndarray:
    films = np.asarray(films)
    if films.ndim != 5 or films.shape[-1] != 3 or films.dtype != np.uint8 or films.shape[1] % TIME_STRIDE != 1:
        raise ValueError(f"films are {films.dtype} {list(films.shape)}: give uint8 [films, 4n + 1, height, width, 3]")
    return films


# ---- what is true ----------------------------------------------------------------------------------------------------


def true_motion(poses_N44: np.ndarray, scale: float) -> np.ndarray:
    """Of each latent frame of a path of 4n + 1 poses: degrees turned right, steps right and forward in world scales;
    float64 [n, 3], in the camera of the frame before."""
    relative = relative_poses(latent_poses(poses_N44), torch.float64)[1:]
    yaw = np.rad2deg(np.arctan2(relative[:, 0, 2], relative[:, 2, 2]))
    return np.stack([yaw, relative[:, 0, 3] / scale, relative[:, 2, 3] / scale], -1)


def pressed(keys_N8: np.ndarray) -> np.ndarray:
    """Mean of w - s, d - a and l - j over each latent frame's four pixel frames: [n, 3] in [-1, 1]."""
    column = {key: np.asarray(keys_N8, float)[1:, i] for i, key in enumerate(KEYS)}
    rows = np.stack([column["w"] - column["s"], column["d"] - column["a"], column["l"] - column["j"]], -1)
    return rows.reshape(-1, TIME_STRIDE, 3).mean(1)


def labels(keys_N3: np.ndarray, motion_N3: np.ndarray, still: float) -> np.ndarray:
    """Classes 0, 1, 2 (back or left, none, forward or right) of along, across and turn, `IGNORED` where pictures cannot
    tell: a key held for half of the chunk, held in vain, or let go while momentum carries on.

    keys: `pressed`; motion: `true_motion`; `still`: world scales a chunk that count as none.
    """
    moved = np.stack([motion_N3[:, 2], motion_N3[:, 1], keys_N3[:, 2]], -1)
    quiet = np.array([still, still, 0.5])
    held = np.where(np.abs(keys_N3) >= 0.75, np.sign(keys_N3), np.where(keys_N3 == 0, 0, np.nan))
    seen = np.where(np.abs(moved) >= quiet, np.sign(moved), 0)
    return np.where(held == seen, seen + 1, IGNORED).astype(np.int64)


# ---- training --------------------------------------------------------------------------------------------------------

WINDOW = 5
"""Pictures of one training example, a latent frame apart: each is looked at once for two pairs."""


@dataclass(frozen=True, eq=False)
class Lesson:
    """A clip and, for every pair of pixel frames n and n + 4, its true motion forwards and backwards in time and its
    `pressed` keys, [N - 4, 3] each; `place` [N, 6] is position (centred and scaled) and view axis of every frame."""

    frames: np.ndarray
    ahead: np.ndarray
    back: np.ndarray
    keys: np.ndarray
    place: np.ndarray


def lesson(clip: Clip, scale: float, centre: np.ndarray, spread: float) -> Lesson:
    pairs = len(clip) - TIME_STRIDE
    ahead, back, keys = (np.zeros((pairs, 3)) for _ in range(3))
    for offset in range(TIME_STRIDE):
        stop = offset + (len(clip) - 1 - offset) // TIME_STRIDE * TIME_STRIDE + 1
        poses, at = clip.poses[offset:stop], slice(offset, stop - 1, TIME_STRIDE)
        ahead[at], back[at] = true_motion(poses, scale), true_motion(poses[::-1], scale)[::-1]
        keys[at] = pressed(clip.keys[offset:stop])
    place = np.concatenate([(clip.poses[:, :3, 3] - centre) / spread, clip.poses[:, :3, 2]], -1)
    return Lesson(clip.frames, ahead, back, keys, place)


def lessons(clips: Sequence[Clip], scale: float) -> list[Lesson]:
    spots = np.stack([clip.poses[:, :3, 3] for clip in clips]).reshape(-1, 3)
    centre, spread = spots.mean(0), max(spots.std(0).max(), 1e-6)
    return [lesson(clip, scale, centre, spread) for clip in clips]


def examples(
    prepared: Sequence[Lesson], scale: float, batch: int, rng: np.random.Generator, device: torch.device | str = "cpu"
) -> Iterator[tuple]:
    """Batches without end: pictures f32 [B, 5, 3, H, W], labels [B, 4, 3], motion [B, 4, 3], place [B, 5, 6] (nan where
    mirrored).

    Half of them run backwards, half are mirrored, half are degraded: the judge will read soft frames.
    """
    while True:
        drawn = [example(prepared[rng.integers(len(prepared))], scale, rng) for _ in range(batch)]
        frames, *rest = (np.stack(column) for column in zip(*drawn, strict=True))
        yield degrade(pictures(frames, device), rng), *(torch.from_numpy(x).to(device) for x in rest)


def example(one: Lesson, scale: float, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Five pictures, a latent frame apart, with what is true of them and of the pairs between them."""
    length = TIME_STRIDE * (WINDOW - 1)
    start = int(rng.integers(len(one.frames) - length))
    stills, pairs = (slice(start, start + length + extra, TIME_STRIDE) for extra in (1, 0))
    frames, motion, keys, place = one.frames[stills], one.ahead[pairs], one.keys[pairs], one.place[stills]
    if rng.random() < 0.5:  # backwards in time
        frames, motion, keys, place = frames[::-1], one.back[pairs][::-1], -keys[::-1], place[::-1]
    if rng.random() < 0.5:  # mirrored
        frames, motion = frames[:, :, ::-1], motion * [-1, -1, 1]
        keys, place = keys * [1, -1, -1], np.full_like(place, np.nan)
    said = labels(keys, motion, STILL / scale)
    return np.ascontiguousarray(frames), said, motion.astype(np.float32), place.astype(np.float32)


def degrade(pictures_BK3HW: Tensor, rng: np.random.Generator) -> Tensor:
    """Softens, recolours and adds noise to half of the examples, all pictures of one in the same way."""
    out = pictures_BK3HW.clone()
    for i in range(len(out)):
        if rng.random() < 0.5:
            continue
        x = soften(out[i], rng.uniform(1, 2.4))
        grey = x.mean(1, keepdim=True)
        x = grey + (x - grey) * rng.uniform(0.6, 1.2)
        x = x * rng.uniform(0.85, 1.15) + rng.uniform(-0.08, 0.08)
        out[i] = (x + torch.randn_like(x) * rng.uniform(0, 0.04)).clamp(-1, 1)
    return out


def soften(pictures_K3HW: Tensor, factor: float) -> Tensor:
    """Loses the detail finer than `factor` pixels: down by area and up again, bilinearly."""
    size = pictures_K3HW.shape[-2:]
    small = F.interpolate(pictures_K3HW, size=[max(1, round(n / factor)) for n in size], mode="area")
    return F.interpolate(small, size=size, mode="bilinear", align_corners=False)


def loss(judge: Judge, batch: tuple) -> Tensor:
    """Cross-entropies of the three key heads, Huber losses of the motion and, at a small weight, of the place, which
    gives the single-frame features something to know."""
    shown, said, motion, place = batch
    frames, _, words = judge(shown)
    heads = zip(("along", "across", "turn"), said.unbind(-1), strict=True)
    keys = [F.cross_entropy(words[n].flatten(0, 1), y.flatten(), ignore_index=IGNORED, reduction="sum") /
            (y != IGNORED).sum().clamp_min(1) for n, y in heads]  # fmt: skip
    unit = motion.new_tensor([8.0, 0.25, 0.25])
    moved = F.smooth_l1_loss(words["motion"] / unit, motion / unit)
    known = ~place.isnan()
    where = F.smooth_l1_loss(judge.place(frames)[known], place[known]) if known.any() else frames.new_zeros(())
    return sum(keys) + moved + 0.3 * where


def train(
    clips: Sequence[Clip],
    *,
    seconds: float = float("inf"),
    steps: int | None = None,
    scale: float = TINY.world_scale,
    batch: int = 12,
    lr: float = 2e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
    start: Path | None = None,
    say: Callable[[str], None] = print,
) -> tuple[Judge, int]:
    """A judge that has learnt from `clips` for `seconds`, or for `steps`, with its corpus statistics; and its steps.

    `start`: a judge's file whose weights it begins with.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    judge = Judge(scale)
    if start is not None:
        checkpoint.load_into(start, judge)
    judge.to(device)
    optimiser = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.02)
    began, done, mean = time.monotonic(), 0, 0.0
    for shown in examples(lessons(clips, scale), scale, batch, rng, device):
        progress = (time.monotonic() - began) / seconds if steps is None else done / steps
        if progress >= 1:
            break
        done += 1
        for group in optimiser.param_groups:
            group["lr"] = lr * min(1, done / 50) * 0.5 * (1 + np.cos(np.pi * progress))
        value = loss(judge, shown)
        optimiser.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
        optimiser.step()
        mean += value.detach() / 50
        if done % 50 == 0:
            say(f"step {done}, {time.monotonic() - began:.0f} s, loss {mean:.3f}")
            mean = 0.0
    describe_corpus(judge.eval(), clips, rng)
    return judge.requires_grad_(False), done


def describe_corpus(judge: Judge, clips: Sequence[Clip], rng: np.random.Generator, limit: int = 256) -> None:
    """Sets the judge's corpus mean and covariance from every fourth pixel frame of up to `limit` clips."""
    chosen = rng.permutation(len(clips))[:limit]
    seen = np.concatenate([judge.read(clips[i].frames[None]).frames[0] for i in chosen]).astype(np.float64)
    judge.corpus_mean.copy_(torch.from_numpy(seen.mean(0)))
    judge.corpus_covariance.copy_(torch.from_numpy(np.cov(seen, rowvar=False)).flatten())


# ---- how well it reads -----------------------------------------------------------------------------------------------


def examine(judge: Judge, films: Sequence[np.ndarray], clips: Sequence[Clip]) -> dict:
    """How well the judge reads `films` (the clips' own frames, or their reconstructions), as shares and mean errors.

    `turn`: left or right, of the chunks with j or l held throughout; `turn_or_none`: left, right or none, of those and
    of the chunks with neither. `direction`: which of w a s d, of the chunks with exactly one of them held throughout
    and not in vain. All over chunks whose scene shows motion, with their number. `still`: no walk and no turn seen
    where no key is held and nothing moves. `yaw` in degrees, `step` in world scales: mean absolute error over all
    chunks; `yaw_moving` and `step_moving` over those that turn or move.
    """
    reading = judge.read(np.stack(films))
    return scored(reading, *truth(clips, float(judge.scale)), STILL / float(judge.scale))


def truth(clips: Sequence[Clip], scale: float) -> tuple[np.ndarray, np.ndarray]:
    """`pressed` keys and `true_motion` of clips of one length, each [B, C, 3]."""
    return np.stack([pressed(clip.keys) for clip in clips]), np.stack([true_motion(c.poses, scale) for c in clips])


def scored(reading: Reading, keys_BC3: np.ndarray, motion_BC3: np.ndarray, still: float) -> dict:
    """`examine` on a reading whose keys and motion are known."""
    turn, walk = (right[counts] for right, counts in told(reading, keys_BC3, motion_BC3, still))
    three = (reading.turned == np.sign(keys_BC3[..., 2]))[reading.shows & np.isin(np.abs(keys_BC3[..., 2]), (0, 1))]
    quiet = (keys_BC3 == 0).all(-1) & (np.linalg.norm(motion_BC3[..., 1:], axis=-1) < still)
    calm = (reading.turned == 0) & (reading.walk.max(-1) < 0.5)
    errors = np.abs(reading.yaw - motion_BC3[..., 0]), np.linalg.norm(reading.step - motion_BC3[..., 1:], axis=-1)
    moving = np.abs(motion_BC3[..., 0]) > 1, np.linalg.norm(motion_BC3[..., 1:], axis=-1) > still
    return {
        "turn": [_share(turn), len(turn)],
        "turn_or_none": [_share(three), len(three)],
        "direction": [_share(walk), len(walk)],
        "still": [_share(calm[quiet]), int(quiet.sum())],
        "yaw": float(errors[0].mean()),
        "step": float(errors[1].mean()),
        "yaw_moving": _mean(errors[0][moving[0]]),
        "step_moving": _mean(errors[1][moving[1]]),
    }


Told = tuple[np.ndarray, np.ndarray]
"""Chunks told right, and chunks that count: bool [B, C] each."""


def told(reading: Reading, keys_BC3: np.ndarray, motion_BC3: np.ndarray, still: float) -> tuple[Told, Told]:
    """Which turns, and which walking directions, were told right, and which chunks count for each (see `examine`)."""
    said = np.stack([labels(k, m, still) for k, m in zip(keys_BC3, motion_BC3, strict=True)])
    turns = np.isin(said[..., 2], (0, 2)) & reading.shows
    alone = (keys_BC3[..., :2] != 0).sum(-1) == 1
    walks = alone & np.isin(said[..., :2], (0, 2)).any(-1) & reading.shows
    return (reading.side == said[..., 2] - 1, turns), (reading.direction == key_direction(keys_BC3), walks)


def key_direction(keys_BC3: np.ndarray) -> np.ndarray:
    """The walking direction that `pressed` keys ask for, or that steps forward and to the right go, as an index into
    `WALKS`; 0 where there is none."""
    along, across = keys_BC3[..., 0], keys_BC3[..., 1]
    sideways = np.where(across < 0, 1, 3)
    return np.where(np.abs(across) > np.abs(along), sideways, np.where(along < 0, 2, 0))


def moved_as_asked(keys_BC3: np.ndarray, motion_BC3: np.ndarray, still: float) -> np.ndarray:
    """Chunks in which `true_motion` is `still` world scales or more and goes, for the most part, where the walking keys
    of `pressed` ask: bool [B, C]. Momentum and walls make it go elsewhere."""
    walks = (keys_BC3[..., :2] != 0).any(-1) & (np.linalg.norm(motion_BC3[..., 1:], axis=-1) >= still)
    return walks & (key_direction(motion_BC3[..., [2, 1]]) == key_direction(keys_BC3))


def _share(right: np.ndarray) -> float:
    return _mean(right.astype(float))


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else float("nan")


# ---- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    from lingbot_nb.parts import SHIPPED_CLIPS

    parser = argparse.ArgumentParser(prog="lingbot_nb.report.judge", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of clips; its train split is learnt from")
    parser.add_argument("--out", type=Path, default=JUDGE)
    parser.add_argument("--clips", type=int, help="how many clips to learn from (default: all)")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--start", type=Path, help="begin with this judge's weights")
    parser.add_argument("--batch", type=int, default=12, help="windows of five pictures a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", type=Path, default=PROJECT / "data" / "weights" / "vae.safetensors")
    parser.add_argument("--softened", type=int, default=16, help="clips that are learnt through the tokenizer as well")
    parser.add_argument("--held-out", type=int, default=32, help="held-out clips to be examined on")
    args = parser.parse_args()
    learnt = list(islice(ClipStore(args.data, split="train"), args.clips))
    unseen = (list(ClipStore(args.data, split="held-out")) or list(ClipStore(SHIPPED_CLIPS)))[: args.held_out]
    if not learnt:
        raise SystemExit(f"{args.data} has no train clips: collect some with seeds below the held-out ones")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    again = reconstructed(learnt[: args.softened], args.tokenizer, device)
    options = dict(batch=args.batch, seed=args.seed, device=device, start=args.start, say=partial(print, flush=True))
    judge, steps = train([*learnt, *again], seconds=60 * args.minutes, **options)
    checkpoint.save(args.out, judge, dtype=torch.bfloat16, kind="judge", train_clips=len(learnt), softened=len(again),
                    seed=args.seed, steps=steps, minutes=args.minutes, batch=args.batch, machine=machine(),
                    command=f"python -m {parser.prog} {shlex.join(sys.argv[1:])}")  # fmt: skip
    judge = load_judge(args.out, device)
    soft = reconstructed(unseen, args.tokenizer, device)
    found = {
        "clips": len(unseen),
        "real": examine(judge, [clip.frames for clip in unseen], unseen),
        "reconstruction": examine(judge, [clip.frames for clip in soft], unseen),
    }
    checkpoint.annotate(args.out, held_out=rounded(found))
    print(rounded(found))


def reconstructed(clips: Sequence[Clip], tokenizer: Path, device: torch.device | str = "cpu") -> list[Clip]:
    """The same clips as the tokenizer gives their pictures back."""
    from lingbot_nb.model.vae import TinyVAE, from_uint8, to_uint8

    vae = TinyVAE.from_file(tokenizer, device)

    def through(frames: np.ndarray) -> np.ndarray:
        video = from_uint8(torch.from_numpy(frames.copy())[None].to(device))
        return to_uint8(vae.decode(vae.encode(video)))[0].cpu().numpy()

    return [replace(clip, frames=through(clip.frames)) for clip in clips]


def machine() -> str:
    """The first GPU, else the CPU with the threads that torch uses of it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()}, {torch.get_num_threads()} threads"


def rounded(value):
    """Numbers of a nested result to four digits."""
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
