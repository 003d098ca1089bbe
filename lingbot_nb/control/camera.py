"""From held keys or recorded poses to the control channels that the network is given.

A pose is a camera-to-world 4x4 with OpenCV axes (x right, y down, z forward). The network never sees poses but the
steps between frames, T_i = P_{i-1}^-1 P_i, so the choice of world axes does not matter. What LingBot calls Plücker
is, per pixel of a frame, [origin, direction] of its ray in the previous frame's camera; then 8x8 pixels become
channels of one latent cell.

Poses are numpy float64 (they add up over a walk), channels torch float32. Intrinsics are (fx, fy, cx, cy) in pixels.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lingbot_nb.control.keys import KEYS, LOOKS, MOVES, check_keys, check_pressed
from lingbot_nb.presets import SPACE_STRIDE, TIME_STRIDE, VideoShape

MOVE = 0.05
"""LingBot's step per pixel frame, in its examples' world units."""
TURN = 2.0
"""LingBot's turn per pixel frame, in degrees."""
TINY_TURN = 4.0
"""The tiny world's turn per pixel frame, in degrees."""
MAX_PITCH = 85.0
"""Degrees up or down at which LingBot's camera stops."""
SOURCE_SIZE = (480, 832)
"""Height and width that LingBot's intrinsics.npy refers to."""
RIGID_TOLERANCE = 1e-3
"""Largest entry of R^T R - I that still counts as a rotation (float32 files of reconstructed cameras)."""


# ---- keys to poses -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Walk:
    """How keys move a camera: `move` world units and `turn` degrees for each pixel frame that a key is held."""

    move: float = MOVE
    turn: float = TURN

    def step(self, camera: "Walker", keys_8: np.ndarray) -> "Walker":
        """The camera one pixel frame later; upstream's arithmetic: turn first, then move along the new heading."""
        w, a, s, d, up, left, down, right = (float(key) for key in keys_8)
        turn = np.deg2rad(self.turn)
        limit = np.deg2rad(MAX_PITCH)
        yaw = camera.yaw + turn * (right - left)
        pitch = float(np.clip(camera.pitch + turn * (up - down), -limit, limit))
        rotation = _rotation(yaw, pitch)
        step = self.move * ((w - s) * _level(rotation[:, 2]) + (d - a) * _level(rotation[:, 0]))
        return Walker(yaw, pitch, camera.position + step)


@dataclass(frozen=True)
class Walker:
    """A camera that keys have moved: yaw (right is positive) and pitch (up is positive) in radians, position [3]."""

    yaw: float = 0.0
    pitch: float = 0.0
    position: np.ndarray = field(default_factory=lambda: np.zeros(3))

    def pose(self) -> np.ndarray:
        """Camera-to-world [4, 4]."""
        pose = np.eye(4)
        pose[:3, :3] = _rotation(self.yaw, self.pitch)
        pose[:3, 3] = self.position
        return pose


def poses_from_keys(keys_N8: np.ndarray, move: float = MOVE, turn: float = TURN) -> np.ndarray:
    """Walk from the identity with N rows of keys: N + 1 poses, float64 [N + 1, 4, 4].

    w s a d move on the level (no flying; diagonals are sqrt 2 faster), l turns right, i looks up, both `turn` degrees a
    row; pitch stops at 85 degrees. For a clip, whose row 0 moves nothing, pass `keys[1:]`.
    """
    walk, camera = Walk(move, turn), Walker()
    poses = [camera.pose()]
    for row in check_keys(keys_N8):
        camera = walk.step(camera, row)
        poses.append(camera.pose())
    return np.stack(poses)


# ---- poses to steps between frames ---------------------------------------------------------------


def latent_poses(poses_N44: np.ndarray, frames: int | None = None) -> np.ndarray:
    """One pose per frame: `frames` (default (N - 1) // 4 + 1) even samples of the whole path; float64 [F, 4, 4].

    Positions are interpolated linearly, rotations on the shortest arc (Slerp). With N = 4n + 1 these are rows 0, 4, 8,
    …; otherwise the path is stretched, as upstream does.
    """
    poses = check_poses(poses_N44)
    frames = (len(poses) - 1) // TIME_STRIDE + 1 if frames is None else frames
    if frames < 1:
        raise ValueError(f"{frames} frames cannot be sampled from a path: use 1 or more")
    at = np.linspace(0, len(poses) - 1, frames)
    sampled = np.tile(np.eye(4), (frames, 1, 1))
    sampled[:, :3, :3] = _slerp(_nearest_rotations(poses[:, :3, :3]), at)
    sampled[:, :3, 3] = np.stack(
        [np.interp(at, np.arange(len(poses)), column) for column in poses[:, :3, 3].T], axis=-1
    )
    return sampled


def relative_poses(latent_F44: np.ndarray, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Steps between frames: T_0 = I, T_i = P_{i-1}^-1 P_i; [F, 4, 4] of `dtype`, rigid.

    float32 repeats upstream's arithmetic (the path is first re-based on its first pose). Where coordinates are large
    against steps its rounding shows: 0.7% of a step in a released example; float64 is right there.
    """
    poses = torch.from_numpy(check_poses(latent_F44)).to(dtype)
    identity = torch.eye(4, dtype=dtype)
    based = torch.matmul(_inverse(poses[:1]), poses)
    based[0] = identity
    steps = torch.bmm(_inverse(based[:-1]), based[1:])
    return torch.cat([identity[None], steps]).numpy()


def normalise(relative_F44: np.ndarray, scale: float | None = None) -> np.ndarray:
    """Divide the translations by `scale` world units; None takes the longest step of the clip, as upstream does.

    Keeps float32 or float64. Upstream's divisor needs the whole clip and hides absolute speed; live play passes a fixed
    world scale. A clip that stands still is left as it is.
    """
    scale = clip_scale(relative_F44) if scale is None else _world_scale(scale)
    steps = np.array(relative_F44)
    if scale:
        steps[:, :3, 3] /= scale
    return steps


def clip_scale(relative_F44: np.ndarray) -> float:
    """The longest translation in the clip, 0 when nothing moves."""
    return float(np.linalg.norm(np.asarray(relative_F44)[:, :3, 3], axis=-1).max())


def check_poses(poses_N44: np.ndarray, what: str = "poses") -> np.ndarray:
    """The poses as float64; ValueError unless they are [N, 4, 4] rigid camera-to-world matrices of finite numbers."""
    poses = np.asarray(poses_N44)
    if poses.ndim != 3 or poses.shape[1:] != (4, 4) or not len(poses):
        raise ValueError(f"{what} have shape {list(poses.shape)}: use [pixel frames, 4, 4]")
    if poses.dtype.kind not in "iuf":
        raise ValueError(f"{what} are of type {poses.dtype}: use numbers")
    poses = poses.astype(np.float64)
    _every(np.isfinite(poses).all((1, 2)), what, "holds NaN or infinity: remove it or cut the path before it")
    last_row = np.abs(poses[:, 3] - [0, 0, 0, 1]).max(1)
    _every(last_row <= RIGID_TOLERANCE, what, "does not end in the row 0 0 0 1: use camera-to-world 4x4")
    poses[:, 3] = [0, 0, 0, 1]
    rotation = poses[:, :3, :3]
    error = np.abs(rotation.transpose(0, 2, 1) @ rotation - np.eye(3)).max((1, 2))
    _every(error <= RIGID_TOLERANCE, what, "is not rigid (its axes are not unit and square): take scale and shear out")
    _every(np.linalg.det(rotation) > 0, what, "mirrors the picture (determinant -1): use right-handed OpenCV axes")
    return poses


# ---- rays ----------------------------------------------------------------------------------------


def scale_intrinsics(intrinsics, height: int, width: int, source: tuple[int, int] = SOURCE_SIZE) -> np.ndarray:
    """Intrinsics (…, 4) of `source` pictures (height, width) for pictures of height x width; float64, same shape."""
    values = check_intrinsics(intrinsics)
    across, down = width / source[1], height / source[0]
    return values * np.array([across, down, across, down])


def check_intrinsics(intrinsics, what: str = "intrinsics") -> np.ndarray:
    """Intrinsics as float64 (…, 4); ValueError unless they are finite with positive focal lengths."""
    values = np.asarray(intrinsics)
    if values.ndim not in (1, 2) or values.shape[-1] != 4 or not values.size or values.dtype.kind not in "iuf":
        raise ValueError(
            f"{what} have shape {list(values.shape)}, type {values.dtype}: use numbers fx, fy, cx, cy in rows"
        )
    values = values.astype(np.float64)
    if not np.isfinite(values).all() or (values[..., :2] <= 0).any():
        raise ValueError(
            f"{what} start with {values.reshape(-1, 4)[0].tolist()}: use finite numbers, fx and fy above 0"
        )
    return values


def rays(relative_F44: np.ndarray, intrinsics, height: int, width: int) -> Tensor:
    """[origin, direction] of the ray through each pixel centre; float32 [6, F, height, width].

    intrinsics: 4 numbers, or one row for each frame, at this picture size. Directions are unit vectors turned by R_i;
    the origin is t_i everywhere in the frame.
    """
    relative = torch.as_tensor(np.asarray(relative_F44), dtype=torch.float32)
    frames = len(relative)
    fx, fy, cx, cy = (
        torch.as_tensor(check_intrinsics(intrinsics), dtype=torch.float32).reshape(-1, 4).T[..., None, None]
    )
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    camera_NHWC = torch.stack(torch.broadcast_tensors((x - cx) / fx, (y - cy) / fy, torch.ones(())), dim=-1)
    camera_NHWC = torch.nn.functional.normalize(camera_NHWC, dim=-1)
    direction_FHWC = torch.einsum("fij,fhwj->fhwi", relative[:, :3, :3], camera_NHWC.expand(frames, -1, -1, -1))
    origin_FHWC = relative[:, None, None, :3, 3].expand_as(direction_FHWC)
    return torch.cat([origin_FHWC, direction_FHWC], dim=-1).permute(3, 0, 1, 2).contiguous()


def unshuffle(channels_CFHW: Tensor) -> Tensor:
    """8x8 pixels into channels, index c * 64 + row * 8 + column: [C, F, H, W] -> [C * 64, F, H / 8, W / 8]."""
    channels, frames, height, width = channels_CFHW.shape
    if height % SPACE_STRIDE or width % SPACE_STRIDE:
        raise ValueError(
            f"picture size {height}x{width} is not a multiple of {SPACE_STRIDE}: rays need whole latent cells"
        )
    rows, columns = height // SPACE_STRIDE, width // SPACE_STRIDE
    cells = channels_CFHW.reshape(channels, frames, rows, SPACE_STRIDE, columns, SPACE_STRIDE)
    return cells.permute(0, 3, 5, 1, 2, 4).reshape(channels * SPACE_STRIDE**2, frames, rows, columns)


# ---- whole clips ---------------------------------------------------------------------------------


def control_cam(poses_N44, intrinsics, shape: VideoShape, *, scale: float | None = None, frames=None) -> Tensor:
    """LingBot's cam control of a whole path: rays, float32 [384, F, H / 8, W / 8].

    poses: [N, 4, 4]; intrinsics at the picture size of `shape` (`scale_intrinsics`); only height and width of `shape`
    count. scale: world units for 1.0, None for upstream's longest step of the clip. frames: see `latent_poses`.
    """
    relative = normalise(relative_poses(latent_poses(poses_N44, frames)), scale)
    return unshuffle(rays(relative, intrinsics, shape.height, shape.width))


def control_act(poses_N44, wasd_N4, intrinsics, shape: VideoShape, *, frames=None) -> Tensor:
    """LingBot's act control: ray directions (192 channels), then w a s d (256); float32 [448, F, H / 8, W / 8].

    Looking reaches the network through rotation, moving through the keys of every fourth row (0, 4, 8, …), so
    translations and their scale play no part. wasd: [N, 4] in [0, 1]. Raises ValueError when it has too few rows for
    the frames.
    """
    relative = relative_poses(latent_poses(poses_N44, frames))
    pressed = _moves(wasd_N4, "wasd keys")[::TIME_STRIDE]
    if len(pressed) < len(relative):
        raise ValueError(
            f"{len(wasd_N4)} rows of wasd keys do not reach over {len(relative)} frames: give one a pixel frame"
        )
    directions = rays(relative, intrinsics, shape.height, shape.width)[3:]
    return unshuffle(torch.cat([directions, _broadcast(pressed[: len(relative)], directions)]))


def tiny_steps(poses_N44, keys_N8, world_scale: float, *, with_poses: bool) -> tuple[np.ndarray, np.ndarray]:
    """What `control_tiny_batch` needs of a clip of 4n + 1 pixel frames: float32 steps [F, 4, 4] and w a s d [F, 4].

    with_poses: the true steps over `world_scale`, keys zero. Otherwise the true rotations, no translation, and each
    key's mean over the frame's four pixel frames (frame 0: zeros).
    """
    poses, keys = check_poses(poses_N44), check_keys(keys_N8)
    if len(poses) != len(keys):
        raise ValueError(
            f"{len(poses)} poses but {len(keys)} rows of keys: a clip has one of each for every pixel frame"
        )
    if (len(poses) - 1) % TIME_STRIDE:
        raise ValueError(
            f"a clip of {len(poses)} pixel frames is not 4n + 1: cut it to {(len(poses) - 1) // 4 * 4 + 1}"
        )
    relative = normalise(relative_poses(poses[::TIME_STRIDE], torch.float64), world_scale)
    moves = np.zeros((len(relative), 4), dtype=np.float32)
    if not with_poses:
        relative[:, :3, 3] = 0
        moves[1:] = keys[1:, MOVES].reshape(-1, TIME_STRIDE, 4).mean(1)
    return relative.astype(np.float32), moves


def control_tiny(
    poses_N44, keys_N8, intrinsics_4, shape: VideoShape, world_scale: float, *, with_poses: bool
) -> Tensor:
    """The tiny world's control of one clip: rays (6) and w a s d (4) at every pixel; float32 [640, F, H / 8, W / 8].

    Poses in world units, intrinsics at the picture size of `shape`; `with_poses` as in `tiny_steps`. The plain path
    that `control_tiny_batch` is tested against.
    """
    relative, moves = tiny_steps(poses_N44, keys_N8, world_scale, with_poses=with_poses)
    ray = rays(relative, intrinsics_4, shape.height, shape.width)
    return unshuffle(torch.cat([ray, _broadcast(moves, ray)]))


# ---- on the device -------------------------------------------------------------------------------


def pixel_directions(intrinsics_4, height: int, width: int, device=None) -> Tensor:
    """Camera-space unit rays, already unshuffled: float32 [3, 64, H / 8, W / 8]; remembered, so don't write into it."""
    numbers = check_intrinsics(intrinsics_4)
    if numbers.ndim != 1:
        raise ValueError(
            f"intrinsics have shape {list(numbers.shape)}: a batch or a stream has one camera, use 4 numbers"
        )
    return _pixel_directions(tuple(numbers.tolist()), height, width, torch.device(device or "cpu"))


@lru_cache(maxsize=8)
def _pixel_directions(intrinsics: tuple[float, ...], height: int, width: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # kept for later calls, which may need gradients
        one = rays(np.eye(4)[None], intrinsics, height, width)[3:]
        return unshuffle(one)[:, 0].unflatten(0, (3, SPACE_STRIDE**2)).to(device)


def direction_channels(relative_BF44: Tensor, directions: Tensor) -> Tensor:
    """Turn `pixel_directions` by each frame's step: [B, 192, F, h, w] in their dtype."""
    rotation = relative_BF44[..., :3, :3].to(directions)
    return torch.einsum("bfij,jphw->bipfhw", rotation, directions).flatten(1, 2)


def constant_channels(values_BFC: Tensor, like_BCFHW: Tensor) -> Tensor:
    """Values that hold for a whole frame as channels, each repeated 64 times: [B, F, C] -> [B, C * 64, F, h, w]."""
    values = values_BFC.to(like_BCFHW).permute(0, 2, 1).repeat_interleave(SPACE_STRIDE**2, dim=1)
    return values[..., None, None].expand(-1, -1, -1, *like_BCFHW.shape[-2:])


def control_tiny_batch(relative_BF44: Tensor, keys_BF4: Tensor, intrinsics_4, height: int, width: int) -> Tensor:
    """`control_tiny` of a batch on any device: float32 [B, 640, F, H / 8, W / 8].

    relative, keys: stacked results of `tiny_steps`, on that device.
    """
    return tiny_channels(relative_BF44, keys_BF4, pixel_directions(intrinsics_4, height, width, relative_BF44.device))


def cam_channels(relative_BF44: Tensor, keys_BF4: Tensor, directions: Tensor) -> Tensor:
    """LingBot cam from normalised steps: [B, 384, F, h, w]; the keys are not used."""
    turned = direction_channels(relative_BF44, directions)
    return torch.cat([constant_channels(relative_BF44[..., :3, 3], turned), turned], dim=1)


def act_channels(relative_BF44: Tensor, keys_BF4: Tensor, directions: Tensor) -> Tensor:
    """LingBot act: directions, then keys, [B, 448, F, h, w]; the translations are not used."""
    turned = direction_channels(relative_BF44, directions)
    return torch.cat([turned, constant_channels(keys_BF4, turned)], dim=1)


def tiny_channels(relative_BF44: Tensor, keys_BF4: Tensor, directions: Tensor) -> Tensor:
    """The tiny world: origin, direction, keys, [B, 640, F, h, w]."""
    turned = direction_channels(relative_BF44, directions)
    origin = constant_channels(relative_BF44[..., :3, 3], turned)
    return torch.cat([origin, turned, constant_channels(keys_BF4, turned)], dim=1)


# ---- live play -----------------------------------------------------------------------------------


Channels = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(steps [B, F, 4, 4], keys [B, F, 4], pixel directions) -> control [B, C, F, h, w]."""


def last_moves(rows_N8: np.ndarray) -> np.ndarray:
    """w a s d held into a frame's last pixel frame, [4]: LingBot act's rows 0, 4, 8, …"""
    return rows_N8[-1, MOVES]


def mean_moves(rows_N8: np.ndarray) -> np.ndarray:
    """w a s d averaged over a frame's pixel frames, [4]; zeros for the start image, into which nothing moved."""
    return rows_N8[:, MOVES].mean(0) if len(rows_N8) == TIME_STRIDE else np.zeros(4)


class LivePath:
    """Keys in, control out, pixel frame by pixel frame and without the future.

    `push` takes the rows of keys of the next pixel frames and returns the control of their frames. The first push has
    4n + 1 rows (row 0, on the way into the start image, moves nothing), every later one 4n. The world scale is fixed,
    so a path pushed in pieces equals `control_cam(poses_from_keys(keys[1:]), scale=world_scale)` of the whole. The
    camera is re-based at every frame: a stream of any length keeps its precision.
    """

    def __init__(
        self,
        intrinsics,
        shape: VideoShape,
        world_scale: float,
        turn_degrees: float = TURN,
        move: float = MOVE,
        *,
        channels: Channels = cam_channels,
        frame_keys: Callable[[np.ndarray], np.ndarray] = last_moves,
        allowed: str = KEYS,
        device=None,
    ):
        """A path at its start image: intrinsics at the picture size of `shape`, world_scale in the units of `move`.

        `frame_keys` makes a frame's w a s d values [4] from the keys of its pixel frames: [4, 8], at the start [1, 8].
        Keys outside `allowed` are ignored.
        """
        self._walk = Walk(move, turn_degrees)
        self._scale = _world_scale(world_scale)
        self._directions = pixel_directions(intrinsics, shape.height, shape.width, device)
        self._channels = channels
        self._frame_keys = frame_keys
        self._allowed = np.array([key in allowed for key in KEYS])
        self.reset()

    @classmethod
    def cam(cls, intrinsics, shape: VideoShape, world_scale: float, **walk) -> "LivePath":
        """LingBot cam: 6 channels a pixel, translation from the keys. walk: turn_degrees, move, device."""
        return cls(intrinsics, shape, world_scale, **walk)

    @classmethod
    def act(cls, intrinsics, shape: VideoShape, **walk) -> "LivePath":
        """LingBot act: 7 channels a pixel, directions and the keys into each frame's last pixel frame."""
        return cls(intrinsics, shape, world_scale=1.0, channels=act_channels, **walk)

    @classmethod
    def tiny(cls, intrinsics, shape: VideoShape, turn_degrees: float = TINY_TURN, device=None) -> "LivePath":
        """The tiny world's keys mode: 10 channels a pixel; j l turn, w a s d are values, nothing moves or pitches."""
        return cls(
            intrinsics,
            shape,
            world_scale=1.0,
            turn_degrees=turn_degrees,
            move=0.0,
            channels=tiny_channels,
            frame_keys=mean_moves,
            allowed="wasdjl",
            device=device,
        )

    def reset(self) -> None:
        """Back to the start image."""
        self.frames = 0
        self.pitch = 0.0

    def push(self, keys_N8: np.ndarray) -> Tensor:
        """Control of the next pixel frames: keys [n, 8] -> float32 [C, f, H / 8, W / 8] on the path's device.

        n = 4f, or 4(f - 1) + 1 for the first push. Raises ValueError for other lengths, and changes nothing then.
        """
        keys = check_keys(keys_N8) & self._allowed
        first = 1 if self.frames == 0 else 0
        if len(keys) < 1 or (len(keys) - first) % TIME_STRIDE:
            raise ValueError(
                f"{len(keys)} rows of keys do not fill whole frames: push {'4n + 1 rows first' if first else '4n'}"
            )
        steps, moves = [np.eye(4)] * first, [self._frame_keys(keys[:1])] * first
        for rows in keys[first:].reshape(-1, TIME_STRIDE, len(KEYS)):
            steps.append(self._step(rows))
            moves.append(self._frame_keys(rows))
        self.frames += len(steps)
        return self._channels(self._tensor(steps), self._tensor(moves), self._directions)[0]

    def _step(self, rows: np.ndarray) -> np.ndarray:
        start = camera = Walker(pitch=self.pitch)
        for row in rows:
            camera = self._walk.step(camera, row)
        self.pitch = camera.pitch
        return normalise(relative_poses(np.stack([start.pose(), camera.pose()]), torch.float64), self._scale)[1]

    def _tensor(self, rows: list[np.ndarray]) -> Tensor:
        return torch.as_tensor(np.stack(rows)[None], dtype=torch.float32).to(self._directions.device)


# ---- folders in LingBot's example format ---------------------------------------------------------


@dataclass(frozen=True)
class CameraPath:
    """A recorded path: poses float64 [N, 4, 4], intrinsics float64 [4] at 480x832, keys bool [N, 8] or None."""

    poses: np.ndarray
    intrinsics: np.ndarray
    keys: np.ndarray | None

    def __iter__(self):
        return iter((self.poses, self.intrinsics, self.keys))

    def cut(self, pixel_frames: int) -> "CameraPath":
        """The first 4n + 1 <= `pixel_frames` pixel frames, as many as there are."""
        length = (min(pixel_frames, len(self.poses)) - 1) // TIME_STRIDE * TIME_STRIDE + 1
        if length < 1:
            raise ValueError(
                f"a path of {len(self.poses)} poses cannot be cut to {pixel_frames} pixel frames: use 1 or more"
            )
        return CameraPath(self.poses[:length], self.intrinsics, None if self.keys is None else self.keys[:length])


MOVE_FILES = ("action.npy", "wasd_action.npy")
"""Where w a s d lie in a path's folder. Upstream's act control reads the first, its way from keys to poses the second;
in one released example they differ."""


def load_path(folder: str | Path, *, with_keys: bool = True, moves: Sequence[str] = MOVE_FILES) -> CameraPath:
    """Read poses, intrinsics and keys of a folder in LingBot's example format; unpacks as `poses, intrinsics, keys`.

    poses.npy [N, 4, 4] and intrinsics.npy [N or 1, 4] (row 0 counts, pixels at 480x832) must be there. w a s d come
    from the first of `moves` that is there, i j k l from ijkl_action.npy, else nothing is held; keys are None when
    there is no key file or `with_keys` is False (cam control reads none). Raises FileNotFoundError, or ValueError for
    poses that are not rigid or finite, other shapes, and key files of another length (two of the released examples
    carry a stale action.npy beside a good wasd_action.npy).
    """
    folder = Path(folder)
    poses = check_poses(_read(folder / "poses.npy"), f"{folder}/poses.npy:")
    intrinsics = check_intrinsics(_read(folder / "intrinsics.npy"), f"{folder}/intrinsics.npy:").reshape(-1, 4)
    if len(intrinsics) not in (1, len(poses)):
        raise ValueError(
            f"{folder}: intrinsics.npy has {len(intrinsics)} rows for {len(poses)} poses: use one, or one a pose"
        )
    return CameraPath(poses, intrinsics[0], _read_keys(folder, len(poses), moves) if with_keys else None)


def save_path(folder: str | Path, poses_N44, intrinsics_4, keys_N8=None) -> Path:
    """Write a folder that `load_path` and LingBot's own scripts read; intrinsics at 480x832."""
    poses = check_poses(poses_N44)
    tables = {"poses": poses, "intrinsics": np.tile(check_intrinsics(intrinsics_4).reshape(-1, 4)[0], (len(poses), 1))}
    tables = {name: table.astype(np.float32) for name, table in tables.items()}
    if keys_N8 is not None:
        keys = check_keys(keys_N8)
        if len(keys) != len(poses):
            raise ValueError(
                f"{len(poses)} poses but {len(keys)} rows of keys: a path has one of each for every pixel frame"
            )
        tables["action"] = keys[:, MOVES].astype(np.int32)
        tables["wasd_action"] = keys[:, MOVES].astype(np.float32)
        tables["ijkl_action"] = keys[:, LOOKS].astype(np.float32)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        _write(folder / f"{name}.npy", table)
    return folder


def _read_keys(folder: Path, length: int, names: Sequence[str]) -> np.ndarray | None:
    moves = next((folder / name for name in names if (folder / name).exists()), None)
    looks = folder / "ijkl_action.npy"
    if moves is None and not looks.exists():
        return None
    keys = np.zeros((length, len(KEYS)), dtype=bool)
    for file, columns in ((moves, MOVES), (looks, LOOKS)):
        if file is not None and file.exists():
            keys[:, columns] = _read_moves(file, length)
    return keys


def _read_moves(file: Path, length: int) -> np.ndarray:
    table = _moves(_read(file), f"{file}:")
    if len(table) != length:
        raise ValueError(
            f"{file} has {len(table)} rows for {length} poses, so it belongs to another path: "
            "move it away, read another file (moves=), or none (with_keys=False)"
        )
    return table


def _read(file: Path) -> np.ndarray:
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: a path folder holds poses.npy [N, 4, 4] and intrinsics.npy [N, 4]")
    try:
        return np.load(file, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"{file} is not a plain numpy array ({error}): save it with numpy.save, without objects"
        ) from error


def _write(file: Path, table: np.ndarray) -> None:
    partial = file.with_suffix(".npy.partial")
    with open(partial, "wb") as out:
        np.save(out, table, allow_pickle=False)
    os.replace(partial, file)


# ---- details -------------------------------------------------------------------------------------


def _rotation(yaw: float, pitch: float) -> np.ndarray:
    cy, sy, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_x = np.array([[1, 0, 0], [0, cp, -sp], [0, sp, cp]])
    return about_y @ about_x


def _level(axis_3: np.ndarray) -> np.ndarray:
    flat = axis_3 * [1, 0, 1]
    return flat / (np.linalg.norm(flat) + 1e-6)


def _inverse(poses_N44: Tensor) -> Tensor:
    inverse = torch.eye(4, dtype=poses_N44.dtype).repeat(len(poses_N44), 1, 1)
    back = poses_N44[:, :3, :3].transpose(1, 2)
    inverse[:, :3, :3] = back
    inverse[:, :3, 3:] = -torch.bmm(back, poses_N44[:, :3, 3:])
    return inverse


def _nearest_rotations(matrices_N33: np.ndarray) -> np.ndarray:
    """Polar decomposition: takes the rounding of float32 files out, as upstream's rotation library does."""
    u, _, vt = np.linalg.svd(matrices_N33)
    return u @ vt


def _slerp(rotations_N33: np.ndarray, at: np.ndarray) -> np.ndarray:
    last = max(len(rotations_N33) - 2, 0)
    low = np.minimum(np.floor(at).astype(int), last)
    part = (at - low)[:, None]
    quaternions = _quaternions(rotations_N33)
    a, b = quaternions[low], quaternions[np.minimum(low + 1, len(quaternions) - 1)]
    b = np.where((a * b).sum(-1, keepdims=True) < 0, -b, b)
    # The angle from chord lengths: arccos of the dot product loses half the digits where frames are close.
    angle = 2 * np.arctan2(np.linalg.norm(a - b, axis=-1), np.linalg.norm(a + b, axis=-1))[:, None]
    sine = np.where(angle < 1e-12, 1.0, np.sin(angle))
    first = np.where(angle < 1e-12, 1 - part, np.sin((1 - part) * angle) / sine)
    second = np.where(angle < 1e-12, part, np.sin(part * angle) / sine)
    return _matrices(first * a + second * b)


def _quaternions(rotations_N33: np.ndarray) -> np.ndarray:
    """(w, x, y, z) of each rotation; the largest of the four is computed first, so none is lost to cancellation."""
    m = rotations_N33
    trace = np.trace(m, axis1=1, axis2=2)
    squares = np.concatenate([trace[:, None], np.diagonal(m, axis1=1, axis2=2) * 2 - trace[:, None]], axis=1)
    skew = [m[:, 2, 1] - m[:, 1, 2], m[:, 0, 2] - m[:, 2, 0], m[:, 1, 0] - m[:, 0, 1]]
    even = [m[:, 2, 1] + m[:, 1, 2], m[:, 0, 2] + m[:, 2, 0], m[:, 1, 0] + m[:, 0, 1]]
    w, x, y, z = 1 + squares.T
    outer = np.stack(
        [w, *skew, skew[0], x, even[2], even[1], skew[1], even[2], y, even[0], skew[2], even[1], even[0], z]
    )
    outer = outer.T.reshape(-1, 4, 4)  # 4 q q^T: any row is a multiple of q, the longest the most precise
    rows = outer[np.arange(len(m)), squares.argmax(1)]
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def _matrices(quaternions_N4: np.ndarray) -> np.ndarray:
    w, x, y, z = (quaternions_N4 / np.linalg.norm(quaternions_N4, axis=-1, keepdims=True)).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.array(rows).transpose(2, 0, 1)


def _broadcast(values_F4: np.ndarray, like_CFHW: Tensor) -> Tensor:
    values = torch.as_tensor(np.asarray(values_F4), dtype=torch.float32)
    return values.T[:, :, None, None].expand(-1, -1, *like_CFHW.shape[-2:])


def _moves(values, what: str) -> np.ndarray:
    table = check_pressed(values, what)
    if table.shape[1] != 4:
        raise ValueError(f"{what} have shape {list(table.shape)}: use [pixel frames, 4]")
    return table


def _world_scale(scale: float) -> float:
    if not (np.isfinite(scale) and scale > 0):
        raise ValueError(f"world scale {scale} is not positive: use the world units that count as 1.0 in a step")
    return float(scale)


def _every(good_N: np.ndarray, what: str, problem: str) -> None:
    if not good_N.all():
        raise ValueError(f"{what} pose {int(np.argmin(good_N))} {problem}")
