"""A walker for a map seen from above: the floor plan, and keys held as a person would hold them.

Nothing here knows the simulator: a plan is line segments, a walker is a generator that is sent poses and yields keys.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np

BODY = 16.0
"""Half the width of the player, in map units."""
REST = ""
Walk = Generator[str, np.ndarray, np.ndarray]
"""Yields the names of the keys to hold, is sent the pose they led to, returns the last pose."""


@dataclass(frozen=True, eq=False)
class FloorPlan:
    """A map from above, in map units: `walls` [W, 4] (x1, y1, x2, y2) cannot be passed; `edges` [E, 4] bound the
    rooms and `room_of_edge` [E] says which; `rooms` is how many there are, `standing` [rooms] where a player fits."""

    walls: np.ndarray
    edges: np.ndarray
    room_of_edge: np.ndarray
    standing: np.ndarray

    @property
    def rooms(self) -> int:
        return len(self.standing)

    def room_at(self, xy) -> int:
        """Number of the room that holds the point (x, y), -1 outside of all."""
        x, y = xy
        x1, y1, x2, y2 = self.edges.T
        crosses = (y1 > y) != (y2 > y)
        rise = np.where(crosses, y2 - y1, 1)
        left = crosses & (x < x1 + (y - y1) / rise * (x2 - x1))
        inside = np.flatnonzero(np.bincount(self.room_of_edge[left], minlength=self.rooms) % 2)
        return int(inside[0]) if len(inside) else -1

    def clearance(self, xy) -> float:
        """Distance from the point (x, y) to the nearest wall."""
        start, along = self.walls[:, :2], self.walls[:, 2:] - self.walls[:, :2]
        to_point = np.asarray(xy) - start
        share = (to_point * along).sum(1) / np.maximum((along**2).sum(1), 1e-9)
        nearest = to_point - np.clip(share, 0, 1)[:, None] * along
        return float(np.sqrt((nearest**2).sum(1)).min())

    def free(self, xy, angles) -> np.ndarray:
        """How far a player at (x, y) could walk straight along each angle [A] (radians): map units [A]."""
        angles = np.atleast_1d(angles)
        ahead = np.stack([np.cos(angles), np.sin(angles)], -1)
        side = np.stack([-ahead[:, 1], ahead[:, 0]], -1)
        # Three parallel rays: the middle, and one at either edge of the body.
        origins = np.asarray(xy) + side[:, None] * np.array([-BODY, 0, BODY])[:, None]
        along = self.walls[:, 2:] - self.walls[:, :2]
        to_wall = self.walls[:, :2] - origins[:, :, None]
        cross = _cross(ahead[:, None, None], along)
        cross = np.where(np.abs(cross) < 1e-9, np.inf, cross)
        distance = _cross(to_wall, along) / cross
        share = _cross(to_wall, ahead[:, None, None]) / cross
        hit = (distance > 0) & (share >= 0) & (share <= 1) & np.isfinite(cross)
        return np.maximum(np.where(hit, distance, 4096.0).min((1, 2)) - BODY, 0)

    def draw_start(self, rng: np.random.Generator, clearance: float) -> tuple[int, int, float]:
        """A spot (x, y in whole map units), uniform over the floor that is `clearance` from all walls, and a heading
        in degrees that mostly looks along free floor. Raises RuntimeError when the map has no such spot."""
        low, high = self.edges.reshape(-1, 2).min(0), self.edges.reshape(-1, 2).max(0)
        for _ in range(10000):
            spot = np.floor(rng.uniform(low, high))
            room = self.room_at(spot)
            if room >= 0 and self.standing[room] and self.clearance(spot) >= clearance:
                angles = rng.uniform(0, 2 * np.pi, 16)
                pick = _weighted(rng, 16.0**2 + np.minimum(self.free(spot, angles), 400) ** 2)
                return int(spot[0]), int(spot[1]), float(np.rad2deg(angles[pick]))
        raise RuntimeError(f"no spot is {clearance} map units from all walls: use a smaller clearance or another map")


def _cross(a, b):
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _weighted(rng: np.random.Generator, weights: np.ndarray) -> int:
    """An index, drawn in proportion to the weights."""
    sums = np.cumsum(weights)
    return min(int(np.searchsorted(sums, rng.uniform(0, sums[-1]), side="right")), len(weights) - 1)


def heading(pose: np.ndarray) -> float:
    """Yaw of a camera-to-world pose in radians, counter-clockwise from the map's x axis."""
    return float(np.arctan2(pose[1, 2], pose[0, 2]))


@dataclass(frozen=True)
class Walker:
    """A person with a keyboard on `plan`: `turn` radians and about `stride` map units per pixel frame."""

    plan: FloorPlan
    rng: np.random.Generator
    turn: float
    stride: float

    def walk(self, pose: np.ndarray) -> Walk:
        """Keys without end from `pose` on: `keys = next(walk)`, then `keys = walk.send(pose)` for ever."""
        habits: list[tuple[float, Callable[[np.ndarray], Walk]]] = [
            (0.43, self.go),
            (0.19, self.rest),
            (0.08, self.look_around),
            (0.11, self.strafe),
            (0.07, self.orbit),
            (0.06, self.back_off),
            (0.06, self.go_and_return),
        ]
        weights = np.array([share for share, _ in habits])
        while True:
            pose = yield from habits[_weighted(self.rng, weights)][1](pose)

    def frames(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def free(self, pose: np.ndarray, offset: float = 0.0) -> float:
        return float(self.plan.free(pose[:2, 3], heading(pose) + offset)[0])

    def hold(self, pose: np.ndarray, keys: str, frames: int) -> Walk:
        """Holds keys for a number of pixel frames; lets go two or three frames after running into something."""
        walking = any(key in "wasd" for key in keys)
        still = 0
        for count in range(frames):
            before = pose
            pose = yield keys
            moved = np.linalg.norm(pose[:2, 3] - before[:2, 3])
            still = still + 1 if walking and count > 2 and moved < 0.08 * self.stride else 0
            if still > 2:
                break
        return pose

    def face(self, pose: np.ndarray, angle: float, also: str = "") -> Walk:
        """Turns to an angle (radians), holding the keys `also` on the way."""
        left = (angle - heading(pose) + np.pi) % (2 * np.pi) - np.pi
        return (yield from self.hold(pose, ("j" if left > 0 else "l") + also, round(abs(left) / self.turn)))

    def inviting(self, pose: np.ndarray) -> float:
        """An angle that leads over much free floor, rather ahead than behind."""
        offsets = self.rng.uniform(-np.pi, np.pi, 48)
        floor = np.minimum(self.plan.free(pose[:2, 3], heading(pose) + offsets), 400)
        return heading(pose) + offsets[_weighted(self.rng, floor**2 * (1.4 + np.cos(offsets)) + 1e-3)]

    def go(self, pose: np.ndarray) -> Walk:
        """A straight walk towards free floor, often begun while still turning, with small corrections."""
        if self.free(pose) < 14 * self.stride or self.rng.random() < 0.4:
            also = "w" if self.free(pose) > 8 * self.stride and self.rng.random() < 0.6 else ""
            pose = yield from self.face(pose, self.inviting(pose), also)
        # Some walks end at the wall: what a wall does to a held key has to be seen too.
        stop = 0.0 if self.rng.random() < 0.2 else self.rng.uniform(5, 11) * self.stride
        left = self.frames(10, 44)
        while left > 0 and self.free(pose) > stop:
            step = min(left, self.frames(3, 8))
            keys = "w" + self.rng.choice(["", "", "", "", "", "", "a", "d", "j", "l"])
            pose = yield from self.hold(pose, keys, 2 if keys[1:] in ("j", "l") else step)
            left -= step
            if stop == 0.0 and self.free(pose) < 2:
                return (yield from self.hold(pose, "w", self.frames(2, 6)))
        return pose

    def rest(self, pose: np.ndarray) -> Walk:
        return (yield from self.hold(pose, REST, self.frames(5, 22)))

    def look_around(self, pose: np.ndarray) -> Walk:
        """Turns one way, looks, turns the other way."""
        one, other = self.rng.permutation(["j", "l"])
        turned = self.frames(6, 22)
        pose = yield from self.hold(pose, one, turned)
        pose = yield from self.hold(pose, REST, self.frames(2, 8))
        return (yield from self.hold(pose, other, self.frames(turned // 2, 2 * turned)))

    def strafe(self, pose: np.ndarray) -> Walk:
        """Sideways, sometimes and forwards too, to the side with more room (mostly)."""
        room = {"a": self.free(pose, np.pi / 2), "d": self.free(pose, -np.pi / 2)}
        key = max(room, key=room.get) if self.rng.random() < 0.8 else min(room, key=room.get)
        forward = "w" if self.free(pose) > 8 * self.stride and self.rng.random() < 0.5 else ""
        return (yield from self.hold(pose, forward + key, self.frames(7, 20)))

    def orbit(self, pose: np.ndarray) -> Walk:
        """Walks a curve, or circles around what is ahead."""
        left = self.free(pose, np.pi / 4) > self.free(pose, -np.pi / 4)
        keys = self.rng.choice(["wj", "al"] if left else ["wl", "dj"])
        return (yield from self.hold(pose, str(keys), self.frames(5, 18)))

    def back_off(self, pose: np.ndarray) -> Walk:
        steps = min(self.frames(5, 16), 2 + int(self.free(pose, np.pi) / self.stride))
        return (yield from self.hold(pose, "s", steps))

    def go_and_return(self, pose: np.ndarray) -> Walk:
        """Somewhere and back: backwards, or after a turn on the spot."""
        if self.free(pose) < 12 * self.stride:
            pose = yield from self.face(pose, self.inviting(pose))
        away = min(self.frames(10, 22), 5 + int(self.free(pose) / self.stride))
        pose = yield from self.hold(pose, "w", away)
        pose = yield from self.hold(pose, REST, self.frames(0, 5))
        if self.rng.random() < 0.5:
            return (yield from self.hold(pose, "s", away))
        pose = yield from self.face(pose, heading(pose) + np.pi)
        return (yield from self.hold(pose, "w", away))
