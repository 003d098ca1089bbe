"""Clips from ViZDoom: a simulator that keys alone move, replay of a clip, and collection by many processes.

ViZDoom is imported when a simulator opens, so that everything else works without it.
"""

import atexit
import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np

from lingbot_nb.control.keys import KEYS, held
from lingbot_nb.presets import TINY
from lingbot_nb.world.clips import Clip, read_manifest, sha256, split_of, write_manifest, write_shard
from lingbot_nb.world.walker import FloorPlan, Walker

HEIGHT, WIDTH = TINY.shape.height, TINY.shape.width
BAM = 65536
"""Doom's angles: 65536 to the circle."""
TICS = 2
"""Game tics to a pixel frame: 17.5 frames a second of game time, shown at 16."""
TURN_BAM = 364
"""Turn per tic: the whole number next to 2 degrees."""
TURN = TICS * TURN_BAM * 360 / BAM
"""Degrees that j or l turn the view in one pixel frame: 3.999."""
DEPTH_UNIT = 7.35
"""Map units to one step of ViZDoom's 8-bit depth (fitted against exact wall distances)."""
SETTLE = 16
"""Tics to wait after a start: the game ignores keys during the first 7."""
STILL = 1.0
"""Map units a pixel frame: below this, a held walking key does nothing."""
ITEMS = (
    "Clip ClipBox Shell ShellBox RocketAmmo RocketBox Cell CellPack Backpack Shotgun SuperShotgun Chaingun Chainsaw "
    "RocketLauncher PlasmaRifle BFG9000 Stimpack Medikit HealthBonus ArmorBonus GreenArmor BlueArmor Soulsphere "
    "Megasphere Berserk BlurSphere InvulnerabilitySphere RadSuit Allmap Infrared RedCard BlueCard YellowCard RedSkull "
    "BlueSkull YellowSkull"
).split()
"""Actor classes that the game is told to replace by nothing."""


@dataclass(frozen=True)
class SimulatorSettings:
    """What a picture and a step depend on, next to seed and keys.

    `map` is a scenario wad that ships with ViZDoom ("my_way_home", "deathmatch", …) or a Freedoom level ("map01",
    "e1m5"). The game draws 160·scale x 100·scale (scale 2, 4 or 5), which area averaging brings to 160x96: a scale of
    4 flickers less in the distance. `gamma` below 1 brightens. `walk` and `strafe` are the game's forward and sideways
    speeds (25 is its own walk; 12 settles near 7.5 map units a pixel frame). `clearance` keeps starts off the walls.
    """

    map: str = "my_way_home"
    scale: int = 4
    gamma: float = 0.75
    walk: int = 12
    strafe: int = 11
    clearance: float = 24.0

    def __post_init__(self):
        if self.scale not in (2, 4, 5):
            raise ValueError(f"scale {self.scale} is no ViZDoom resolution of shape 160x100: use 2, 4 or 5")

    @property
    def intrinsics(self) -> np.ndarray:
        """fx, fy, cx, cy [4] in pixels of the 160x96 picture; (0, 0) is its corner, so pixel centres are at .5.
        Pixels are 1.2 times as high as wide, as on the screens of 1993."""
        focal = WIDTH * 100 / 160 * 2 / 3
        return np.array([focal, 1.2 * focal, WIDTH / 2, HEIGHT / 2], np.float32)


class Simulator:
    """One ViZDoom game: `reset()`, then `step(keys)`; each returns the picture u8 [96, 160, 3] and the camera-to-world
    pose f32 [4, 4] (OpenCV axes, map units). Seed and keys decide every bit of both.

    A context manager. Raises RuntimeError without ViZDoom or when the game ends, ValueError for an unknown map.
    `with_depth` also keeps `depth()`, f32 [96, 160] in map units along the view axis, in steps of 7.35.
    """

    def __init__(self, settings: SimulatorSettings | None = None, seed: int = 0, *, with_depth: bool = False):
        self.settings = settings or SimulatorSettings()
        self.seed = seed
        self.plan = floor_plan(self.settings.map)
        self._folder = tempfile.TemporaryDirectory(prefix="lingbot-nb-")
        self._game = _open_game(self.settings, Path(self._folder.name), ["depth_buffer"] if with_depth else [])
        self._levels = _gamma_levels(self.settings)

    def __enter__(self) -> "Simulator":
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        _close_game(self._game)
        self._folder.cleanup()

    def reset(self, seed: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Starts anew at a spot and heading that the seed draws; returns picture and pose once the player can move."""
        self.seed = self.seed if seed is None else seed
        x, y, angle = self.plan.draw_start(np.random.default_rng([self.seed, 0]), self.settings.clearance)
        game = self._game
        game.set_seed(self.seed % 2**32)
        game.new_episode()
        self._act(0, 0, 0, SETTLE)
        game.send_game_command(f"warp {x} {y}")
        yaw = float(self._state().game_variables[3])
        self._act(0, 0, round((angle - yaw) * BAM / 360) % BAM, 1)
        self._act(0, 0, 0, SETTLE)
        return self._look()

    def step(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Holds keys (bool [8], columns as in `KEYS`; opposite keys cancel) for one pixel frame."""
        down = dict(zip(KEYS, np.asarray(keys, int), strict=True))
        walk = self.settings.walk * (down["w"] - down["s"])
        strafe = self.settings.strafe * (down["d"] - down["a"])
        self._act(walk, strafe, TURN_BAM * (down["j"] - down["l"]), TICS)
        return self._look()

    def depth(self) -> np.ndarray:
        """Distance along the view axis of the present picture, f32 [96, 160], map units, at each pixel's centre."""
        steps = _crop(self._state().depth_buffer, self.settings.scale)
        middle = self.settings.scale // 2
        return (steps[middle :: self.settings.scale, middle :: self.settings.scale] + np.float32(0.5)) * DEPTH_UNIT

    def _act(self, walk: float, strafe: float, turn_bam: int, tics: int):
        turn_bam = (turn_bam + BAM // 2) % BAM - BAM // 2
        # ViZDoom turns right by a positive number and rounds down: half a unit more makes both ways exact.
        self._game.make_action([walk, strafe, (0.5 - turn_bam) * 360 / BAM if turn_bam else 0], tics)

    def _state(self):
        state = self._game.get_state()
        if state is None:
            raise RuntimeError(f"the game on map '{self.settings.map}' ended (seed {self.seed}): use another seed")
        return state

    def _look(self) -> tuple[np.ndarray, np.ndarray]:
        state = self._state()
        picture = _crop(state.screen_buffer, self.settings.scale)
        return self._levels[_box_sum(picture, self.settings.scale)], camera_pose(*state.game_variables[:4])


def camera_pose(x: float, y: float, z: float, yaw: float) -> np.ndarray:
    """Camera-to-world f32 [4, 4], OpenCV axes, of a level camera: position in map units, yaw in degrees from the
    map's x axis, counter-clockwise seen from above."""
    cos, sin = np.cos(np.deg2rad(yaw)), np.sin(np.deg2rad(yaw))
    return np.array([[sin, 0, cos, x], [-cos, 0, sin, y], [0, -1, 0, z], [0, 0, 0, 1]], np.float32)


def replay(clip: Clip, settings: SimulatorSettings | None = None) -> np.ndarray:
    """The frames u8 [N, 96, 160, 3] that the clip's seed and keys give, bit for bit those of the clip when `settings`
    (default: those of `collect`) and the ViZDoom version are the same."""
    settings = replace(settings or SimulatorSettings(), map=clip.map)
    with Simulator(settings, clip.seed) as simulator:
        return np.stack([simulator.reset()[0]] + [simulator.step(keys)[0] for keys in clip.keys[1:]])


def record(simulator: Simulator, seed: int, pixel_frames: int = TINY.shape.pixel_frames) -> Clip:
    """One clip of a person walking from where `seed` starts; raises RuntimeError when the game ends before it."""
    frame, pose = simulator.reset(seed)
    frames, poses, keys = [frame], [pose], [held(())]
    walker = Walker(simulator.plan, np.random.default_rng([seed, 1]), np.deg2rad(TURN), 0.6 * simulator.settings.walk)
    walk = walker.walk(pose)
    names = next(walk)
    for _ in range(pixel_frames - 1):
        keys.append(held(names))
        frame, pose = simulator.step(keys[-1])
        frames.append(frame)
        poses.append(pose)
        names = walk.send(pose)
    name = simulator.settings.map
    intrinsics = simulator.settings.intrinsics
    return Clip(np.stack(frames), np.stack(poses), np.stack(keys), intrinsics, seed, name, f"{name}-{seed}")


def flaw(clip: Clip) -> str | None:
    """Why a clip is of no use: 'dark', 'blank' (one plain wall throughout), 'jump' (moved other than by walking),
    'stuck' (walking keys held in vain for most of the clip), or None."""
    grey = clip.frames[::8].mean(-1)
    if grey.mean() < DARK:
        return "dark"
    if np.median(grey.std((1, 2))) < BLANK:
        return "blank"
    moved = np.linalg.norm(np.diff(clip.poses[:, :2, 3], axis=0), axis=1)
    if not np.isfinite(moved).all() or moved.max() > JUMP:
        return "jump"
    walking = clip.keys[1:, [KEYS.index(key) for key in "wasd"]].any(1)
    if (walking & (moved < STILL)).sum() > 0.5 * len(moved):
        return "stuck"
    return None


DARK, BLANK, JUMP = 20.0, 5.0, 64.0
"""Limits of `flaw`: mean grey of the clip, spread of grey within a picture, map units in one pixel frame."""


@dataclass(frozen=True)
class Collection:
    """What a collection has given so far: seeds `tried` of `clips`, clips `kept`, `dropped` by reason, pixel `frames`
    kept, of which `idle` without any key, frames per room of the map (`rooms`), shards that were there already
    (`skipped`), `seconds` of this call."""

    clips: int
    tried: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    frames: int = 0
    idle: int = 0
    rooms: dict[int, int] = field(default_factory=dict)
    shards: int = 0
    skipped: int = 0
    seconds: float = 0.0

    @property
    def coverage(self) -> float:
        """Share of the map's rooms that a kept frame was taken in."""
        return sum(count > 0 for count in self.rooms.values()) / max(len(self.rooms), 1)

    def __str__(self) -> str:
        dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(self.dropped.items())) or "none"
        return (
            f"{self.tried} of {self.clips} clips: {self.kept} kept, dropped {dropped}; {self.frames} frames, "
            f"{self.idle / max(self.frames, 1):.0%} idle, {self.coverage:.0%} of {len(self.rooms)} rooms, "
            f"{self.shards} shards ({self.skipped} were there), {self.seconds:.1f} s"
        )


def collect(
    folder: Path | str,
    *,
    clips: int,
    processes: int = 1,
    seed: int = 0,
    settings: SimulatorSettings | None = None,
    compress: bool = False,
    shard_clips: int = 32,
    progress: Callable[[Collection], None] | None = None,
) -> Collection:
    """Walks with seeds `seed` … `seed + clips - 1` and stores the good ones as shards in `folder`.

    Shards and manifest are renamed into place, so the call may be killed and repeated: shards whose hash is right are
    skipped. Neither the number of `processes` nor a kill changes any clip. `compress` stores lossless WebP; `progress`
    is called after each shard. Raises ValueError when the seeds straddle the held-out border or the folder holds clips
    of other settings, RuntimeError without ViZDoom.
    """
    folder, settings = Path(folder).absolute(), settings or SimulatorSettings()
    jobs = _jobs(clips, seed, shard_clips, settings, compress)
    folder.mkdir(parents=True, exist_ok=True)
    lines = {line["shard"]: line for line in read_manifest(folder)}
    _refuse_other_settings(folder, lines.values(), settings)
    begun = time.monotonic()
    ready = [job for job in jobs if _is_ready(folder, lines.get(job["shard"]), job)]
    report = replace(_sum([lines[job["shard"]] for job in ready], clips), skipped=len(ready))
    todo = [job for job in jobs if job not in ready]
    if progress:
        progress(report)
    for line in _run_jobs(folder, todo, settings, processes):
        lines[line["shard"]] = line
        write_manifest(folder, sorted(lines.values(), key=lambda line: line["first_seed"]))
        done = [lines[job["shard"]] for job in jobs if job in ready or job["shard"] == line["shard"]]
        ready.append(next(job for job in jobs if job["shard"] == line["shard"]))
        report = replace(_sum(done, clips), skipped=report.skipped, seconds=time.monotonic() - begun)
        if progress:
            progress(report)
    return report


def _jobs(clips: int, seed: int, shard_clips: int, settings: SimulatorSettings, compress: bool) -> list[dict]:
    if clips < 1 or shard_clips < 1 or seed < 0:
        raise ValueError(f"clips {clips}, shard_clips {shard_clips}, seed {seed}: use 1 or more clips, seed 0 or more")
    if split_of(seed) != split_of(seed + clips - 1):
        raise ValueError(f"seeds {seed} to {seed + clips - 1} are partly held out: collect the two splits apart")
    return [
        {
            "shard": f"{settings.map}-{first:010d}.safetensors",
            "split": split_of(first),
            "first_seed": first,
            "tried": min(shard_clips, seed + clips - first),
            "compress": compress,
        }
        for first in range(seed, seed + clips, shard_clips)
    ]


def _is_ready(folder: Path, line: dict | None, job: dict) -> bool:
    path = folder / job["shard"]
    same = line is not None and all(line[key] == value for key, value in job.items())
    return same and path.exists() and sha256(path) == line["sha256"]


def _refuse_other_settings(folder: Path, lines, settings: SimulatorSettings):
    wanted = _made_by(settings)
    for line in lines:
        if line["made_by"] != wanted:
            raise ValueError(
                f"'{folder}' holds clips made by {json.dumps(line['made_by'])}, not {json.dumps(wanted)}: "
                "use another folder or delete this one"
            )


def _made_by(settings: SimulatorSettings) -> dict:
    try:
        game = version("vizdoom")
    except PackageNotFoundError:
        game = "unknown"
    return {"vizdoom": game, **asdict(settings)}


def _sum(lines: list[dict], clips: int) -> Collection:
    dropped, rooms = Counter(), Counter()
    for line in lines:
        dropped.update(line["dropped"])
        rooms.update({int(room): count for room, count in line["rooms"].items()})
    totals = {name: sum(line[name] for line in lines) for name in ("tried", "frames", "idle")}
    kept = sum(len(line["seeds"]) for line in lines)
    return Collection(clips, kept=kept, dropped=dict(dropped), rooms=dict(rooms), shards=len(lines), **totals)


def _run_jobs(folder: Path, jobs: list[dict], settings: SimulatorSettings, processes: int) -> Iterator[dict]:
    if processes <= 1 or len(jobs) <= 1:
        for job in jobs:
            yield _make_shard(folder, job, settings)
        return
    # Spawned, not forked: a fork of a process that holds a GPU or threads is not safe.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(processes, len(jobs)), context, _start_worker) as pool:
        futures = [pool.submit(_make_shard, folder, job, settings) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker():
    """Gives a worker a working directory of its own: every game makes a `_vizdoom` folder where it runs, and dies when
    another made it a moment before."""
    home = tempfile.TemporaryDirectory(prefix="lingbot-nb-")
    os.chdir(home.name)
    atexit.register(home.cleanup)
    _die_with_parent()


def _die_with_parent():
    """Ends this worker and its game when the process that started it is killed; both would stay for ever otherwise."""

    def watch():
        wait([multiprocessing.parent_process().sentinel])
        for children in Path("/proc/self/task").glob("*/children"):
            for child in children.read_text().split():
                os.kill(int(child), signal.SIGKILL)  # a game ignores SIGTERM
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _make_shard(folder: Path, job: dict, settings: SimulatorSettings) -> dict:
    """Walks the seeds of one job, writes the shard, returns its line of the manifest."""
    kept, dropped = [], Counter()
    with Simulator(settings) as simulator:
        plan = simulator.plan
        for seed in range(job["first_seed"], job["first_seed"] + job["tried"]):
            try:
                clip = record(simulator, seed)
            except RuntimeError:
                dropped["broken"] += 1
                continue
            reason = flaw(clip)
            if reason:
                dropped[reason] += 1
            else:
                kept.append(clip)
    visited = Counter(plan.room_at(xy) for clip in kept for xy in clip.poses[:, :2, 3])
    return {
        **job,
        "sha256": write_shard(folder / job["shard"], kept, compress=job["compress"]),
        "seeds": [clip.seed for clip in kept],
        "dropped": dict(dropped),
        "frames": sum(len(clip) for clip in kept),
        "idle": int(sum((~clip.keys[1:].any(1)).sum() for clip in kept)),
        "rooms": {int(room): visited[room] for room in np.flatnonzero(plan.standing)},
        "made_by": _made_by(settings),
    }


def _vizdoom():
    try:
        import vizdoom
    except ImportError as error:
        raise RuntimeError(f"ViZDoom cannot be imported ({error}): pip install vizdoom==1.3.2") from error
    return vizdoom


def _open_game(settings: SimulatorSettings, folder: Path, extras: Sequence[str]):
    """Starts a game that keeps its files in `folder`; `extras` of its state: depth_buffer, sectors_info, …"""
    vizdoom = _vizdoom()
    game = vizdoom.DoomGame()
    _choose_map(game, settings.map, Path(vizdoom.__file__).parent)
    game.set_doom_config_path(str(folder / "vizdoom.ini"))
    game.set_screen_resolution(getattr(vizdoom.ScreenResolution, f"RES_{160 * settings.scale}X{100 * settings.scale}"))
    game.set_screen_format(vizdoom.ScreenFormat.RGB24)
    for extra in extras:
        getattr(game, f"set_{extra}_enabled")(True)
    for part in "hud weapon crosshair messages decals particles effects_sprites corpses screen_flashes".split():
        getattr(game, f"set_render_{part}")(False)
    moves = "MOVE_FORWARD_BACKWARD_DELTA MOVE_LEFT_RIGHT_DELTA TURN_LEFT_RIGHT_DELTA"
    game.set_available_buttons([getattr(vizdoom.Button, name) for name in moves.split()])
    camera = "CAMERA_POSITION_X CAMERA_POSITION_Y CAMERA_POSITION_Z CAMERA_ANGLE"
    game.set_available_game_variables([getattr(vizdoom.GameVariable, name) for name in camera.split()])
    game.set_window_visible(False)
    game.set_sound_enabled(False)
    game.set_episode_timeout(0)
    game.add_game_args("-nomonsters +sv_cheats 1 +movebob 0 +stillbob 0")
    game.add_game_args(f"-file {_write_no_items(folder)}")
    with _no_litter():
        game.init()
    return game


def _close_game(game):
    with _no_litter():
        game.close()


@contextmanager
def _no_litter():
    """Takes away the empty folder that the game makes in the working directory, at its start and at its end."""
    litter = Path("_vizdoom")
    was_there = litter.exists()
    yield
    if not was_there:
        with suppress(OSError):
            litter.rmdir()


def _choose_map(game, name: str, root: Path):
    scenario = root / "scenarios" / f"{name}.wad"
    freedoom = root / ("freedoom1.wad" if name.startswith("e") else "freedoom2.wad")
    if scenario.exists():
        game.set_doom_scenario_path(str(scenario))
        game.set_doom_map("map01")
    elif f"\0{name.upper()}\0".encode() in b"\0" + freedoom.read_bytes():
        game.set_doom_game_path(str(freedoom))
        game.set_doom_map(name)
    else:
        found = ", ".join(sorted(path.stem for path in scenario.parent.glob("*.wad")))
        raise ValueError(f"unknown map '{name}': use a Freedoom level (map01 … map32, e1m1 … e4m9) or one of {found}")


def _write_no_items(folder: Path) -> Path:
    """A wad of one DECORATE lump that replaces each item by an invisible actor which cannot be touched."""
    hidden = "actor Hidden { +NOBLOCKMAP +NOGRAVITY\nStates {\nSpawn:\nTNT1 A -1\nStop\n} }\n"
    text = (hidden + "".join(f"actor Hidden{item} : Hidden replaces {item} {{}}\n" for item in ITEMS)).encode()
    entry = (12).to_bytes(4, "little") + len(text).to_bytes(4, "little") + b"DECORATE"
    path = folder / "no_items.wad"
    path.write_bytes(b"PWAD" + (1).to_bytes(4, "little") + (12 + len(text)).to_bytes(4, "little") + text + entry)
    return path


@lru_cache
def floor_plan(map: str) -> FloorPlan:
    """The floor plan of a map, read once from the game itself."""
    with tempfile.TemporaryDirectory(prefix="lingbot-nb-") as folder:
        game = _open_game(SimulatorSettings(map=map, scale=2), Path(folder), ["sectors_info"])
        sectors = game.get_state().sectors
        floors = [(sector.floor_height, sector.ceiling_height) for sector in sectors]
        edges = [(n, (e.x1, e.y1, e.x2, e.y2), e.is_blocking) for n, sector in enumerate(sectors) for e in sector.lines]
        _close_game(game)
    sides: dict[tuple, set[int]] = {}
    for room, line, _ in edges:
        sides.setdefault(line, set()).add(room)
    walls = {line for _, line, blocks in edges if blocks or not _passable([floors[room] for room in sides[line]])}
    return FloorPlan(
        np.array(sorted(walls), float),
        np.array([line for _, line, _ in edges], float),
        np.array([room for room, _, _ in edges]),
        np.array([ceiling - floor >= PLAYER_HEIGHT for floor, ceiling in floors]),
    )


PLAYER_HEIGHT, MAX_RISE = 56, 24


def _passable(sides: list[tuple[float, float]]) -> bool:
    floors, ceilings = zip(*sides, strict=True)
    return min(ceilings) - max(floors) >= PLAYER_HEIGHT and max(floors) - min(floors) <= MAX_RISE


def _crop(picture: np.ndarray, scale: int) -> np.ndarray:
    margin = (100 - HEIGHT) // 2 * scale
    return picture[margin : margin + HEIGHT * scale]


def _box_sum(picture: np.ndarray, scale: int) -> np.ndarray:
    """Sums scale x scale boxes: u8 [H·s, W·s, 3] to u16 [H, W, 3]. Whole numbers, so that every machine agrees."""
    rows = picture.reshape(-1, scale, picture.shape[1] * 3).sum(1, dtype=np.uint16)
    boxes = rows.reshape(len(rows), -1, scale, 3)
    total = boxes[:, :, 0]
    for column in range(1, scale):
        total = total + boxes[:, :, column]
    return total


def _gamma_levels(settings: SimulatorSettings) -> np.ndarray:
    """u8 brightness for every box sum."""
    levels = np.linspace(0, 1, 255 * settings.scale**2 + 1) ** settings.gamma
    return np.round(255 * levels).astype(np.uint8)
