import hashlib
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from lingbot_nb.control.keys import KEYS, held
from lingbot_nb.world.clips import HELD_OUT_SEED, MANIFEST, Clip, ClipStore, read_manifest
from lingbot_nb.world.walker import BODY, FloorPlan, Walker, heading

pytest.importorskip("vizdoom")
cv2 = pytest.importorskip("cv2")

from lingbot_nb.world.vizdoom import (  # noqa: E402
    ITEMS,
    TURN,
    Simulator,
    SimulatorSettings,
    _close_game,
    _open_game,
    camera_pose,
    collect,
    flaw,
    floor_plan,
    record,
    replay,
)

SHIPPED = Path(__file__).parents[1] / "data" / "clips"
FAST = SimulatorSettings(scale=2)
W, A, S, D, _, J, _, L = (held(key) for key in KEYS)
NONE = held("")


@pytest.fixture(scope="module")
def simulator():
    with Simulator(FAST, with_depth=True) as simulator:
        yield simulator


@pytest.fixture(scope="module")
def clips(simulator):
    return [record(simulator, seed) for seed in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    collect(folder, clips=6, seed=100, settings=FAST, shard_clips=2)
    return folder


def yaw_degrees(poses):
    return np.rad2deg(np.unwrap([heading(pose) for pose in poses.astype(float)]))


# The simulator


def test_a_clip_has_the_agreed_shapes(clips):
    clip = clips[0]
    assert clip.frames.shape == (81, 96, 160, 3) and clip.keys.shape == (81, 8) and clip.poses.shape == (81, 4, 4)
    assert not clip.keys[0].any()
    np.testing.assert_allclose(clip.intrinsics, [66.667, 80, 80, 48], atol=1e-3)


def test_poses_are_rigid_level_and_at_eye_height(clips):
    for clip in clips:
        rotation = clip.poses[:, :3, :3].astype(float)
        np.testing.assert_allclose(rotation @ rotation.swapaxes(1, 2), np.tile(np.eye(3), (81, 1, 1)), atol=1e-6)
        assert (np.linalg.det(rotation) > 0.999).all()
        # Image down is the map's down, the view axis is level.
        np.testing.assert_allclose(rotation[:, :, 1], [[0, 0, -1]] * 81)
        np.testing.assert_allclose(clip.poses[:, 2, 3], 41)


def test_keys_turn_the_view_by_exactly_the_stated_angle(simulator):
    poses = [simulator.reset(5)[1]]
    poses += [simulator.step(keys)[1] for keys in [J] * 20 + [NONE] * 3 + [L] * 20 + [J | L] * 2]
    turned = np.diff(yaw_degrees(np.array(poses)))
    # Doom keeps angles in steps of 360 / 65536 degrees; poses are float32.
    np.testing.assert_allclose(turned, [TURN] * 20 + [0] * 3 + [-TURN] * 20 + [0] * 2, atol=1e-4)
    assert abs(TURN - 4) < 0.001


@pytest.mark.parametrize("key, axis, sign", [("w", 2, 1), ("s", 2, -1), ("d", 0, 1), ("a", 0, -1)])
def test_walking_keys_move_along_the_camera_axes(simulator, key, axis, sign):
    for seed in range(40, 60):
        start = simulator.reset(seed)[1]
        if simulator.plan.clearance(start[:2, 3]) > 60:
            break
    for _ in range(6):
        pose = simulator.step(held(key))[1]
    moved = np.linalg.inv(start.astype(float)) @ pose
    assert sign * moved[axis, 3] > 10
    assert abs(np.delete(moved[:3, 3], axis)).max() < 0.05


def test_nothing_moves_without_keys(simulator):
    frame, pose = simulator.reset(8)
    for _ in range(5):
        again, still = simulator.step(NONE)
        assert np.array_equal(still, pose) and np.array_equal(again, frame)


def test_a_wall_stops_the_player(simulator):
    simulator.reset(9)
    poses = [simulator.step(W)[1] for _ in range(120)]
    clearances = [simulator.plan.clearance(pose[:2, 3]) for pose in poses]
    # The map's walls are axis-aligned, as is the player's box.
    assert min(clearances) >= BODY - 0.05 and clearances[-1] < BODY + 0.05


def test_seed_and_keys_give_the_frames_bit_for_bit(clips):
    """Clips recorded one after another in one game; replayed alone, in a fresh one and without the depth buffer."""
    for clip in (clips[1], clips[7]):
        assert hashlib.sha256(replay(clip, FAST)).digest() == hashlib.sha256(clip.frames).digest()
    assert not np.array_equal(clips[1].frames[0], clips[7].frames[0])


def test_the_default_settings_replay_too():
    with Simulator() as simulator:
        clip = record(simulator, 21, pixel_frames=17)
    assert np.array_equal(replay(clip), clip.frames)


def test_keys_alone_decide_the_path(simulator, clips):
    simulator.reset(clips[2].seed)
    for keys, pose in zip(clips[2].keys[1:], clips[2].poses[1:], strict=True):
        assert np.array_equal(simulator.step(keys)[1], pose)


def tracked(frames, poses, intrinsics, depths):
    """Predicted and tracked positions, [n, 2] each, of features of the first picture in the second one.

    Prediction: through depth and poses. Tracking: Lucas-Kanade with no knowledge of either. Points that are occluded
    in the second picture by its own depth, or that do not track back to where they began, are left out.
    """
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames]
    points = cv2.goodFeaturesToTrack(grey[0], 150, 0.02, 5)
    if points is None:
        return np.empty((0, 2)), np.empty((0, 2))
    track = dict(winSize=(11, 11), maxLevel=3)
    there, found, _ = cv2.calcOpticalFlowPyrLK(grey[0], grey[1], points, None, **track)
    back, found_back, _ = cv2.calcOpticalFlowPyrLK(grey[1], grey[0], there, None, **track)
    points, there, back = (array.reshape(-1, 2) for array in (points, there, back))
    keep = (found & found_back).ravel().astype(bool) & (np.linalg.norm(back - points, axis=1) < 0.5)
    fx, fy, cx, cy = intrinsics
    column, row = np.round(points).astype(int).T
    z = depths[0][row.clip(0, 95), column.clip(0, 159)]
    x, y = points.T + 0.5
    in_first = np.stack([(x - cx) / fx * z, (y - cy) / fy * z, z, np.ones_like(z)])
    second = np.linalg.inv(poses[1].astype(float)) @ poses[0] @ in_first
    depth = np.maximum(second[2], 1)
    predicted = np.stack([fx * second[0] / depth + cx, fy * second[1] / depth + cy], -1) - 0.5
    column, row = np.round(predicted).astype(int).T
    inside = (column >= 4) & (column < 156) & (row >= 4) & (row < 92) & (second[2] > 8)
    seen = depths[1][row.clip(0, 95), column.clip(0, 159)]
    keep &= inside & (np.abs(seen - second[2]) < 10 + 0.04 * second[2])
    return predicted[keep], there[keep]


def test_poses_and_pixels_agree(simulator):
    right, mirrored, still = [], [], []
    gap = 3
    for seed in range(12):
        clip = record(simulator, seed, pixel_frames=41)
        simulator.reset(seed)
        depths = [simulator.depth()]
        for keys in clip.keys[1:]:
            simulator.step(keys)
            depths.append(simulator.depth())
        for first in range(0, 38, gap):
            pair = [first, first + gap]
            if np.array_equal(*clip.poses[pair]):
                continue
            frames, poses, depth = clip.frames[pair], clip.poses[pair], [depths[i] for i in pair]
            predicted, there = tracked(frames, poses, clip.intrinsics, depth)
            right.append(np.linalg.norm(predicted - there, axis=1))
            # Controls that have to fail: the motion the other way round, and none.
            for wrong, errors in ((poses[::-1], mirrored), (poses[[0, 0]], still)):
                predicted, there = tracked(frames, wrong, clip.intrinsics, depth)
                errors.append(np.linalg.norm(predicted - there, axis=1))
    right, mirrored, still = map(np.concatenate, (right, mirrored, still))
    assert len(right) > 1000
    assert np.median(right) < 1
    assert np.median(still) > 3 and np.median(mirrored) > 4


def test_nothing_but_the_map_is_drawn(simulator):
    """The lower middle, where weapon and status bar would be, shows floor that moves with the view."""
    frames = [simulator.reset(3)[0]] + [simulator.step(J)[0] for _ in range(80)]
    spread = np.std(np.stack(frames).astype(float), 0).mean(-1)
    assert spread[60:].min() > 1


def test_monsters_and_items_are_gone(tmp_path):
    game = _open_game(SimulatorSettings(map="map01", scale=2), tmp_path, ["objects_info"])
    names = {thing.name for thing in game.get_state().objects}
    _close_game(game)
    assert {"HiddenClip", "HiddenStimpack", "HiddenShotgun"} <= names
    assert not names & set(ITEMS) and not names & {"ZombieMan", "ShotgunGuy", "DoomImp"}


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="scale 3"):
        SimulatorSettings(scale=3)
    with pytest.raises(ValueError, match="unknown map 'atlantis'"):
        Simulator(SimulatorSettings(map="atlantis"))
    with pytest.raises(RuntimeError, match="smaller clearance"), Simulator(SimulatorSettings(clearance=500)) as game:
        game.reset()


def test_a_freedoom_map_works_too():
    settings = SimulatorSettings(map="map01", scale=2)
    with Simulator(settings) as simulator:
        clip = record(simulator, 4, pixel_frames=9)
        assert simulator.plan.rooms > 50
    assert clip.map == "map01" and np.array_equal(replay(clip, FAST), clip.frames)


def test_the_working_directory_stays_clean(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Simulator(FAST) as simulator:
        simulator.reset()
    assert list(tmp_path.iterdir()) == []


# Floor plan and walker


def square(size=400.0):
    corners = np.array([[0, 0], [size, 0], [size, size], [0, size]], float)
    edges = np.concatenate([corners, np.roll(corners, -1, 0)], 1)
    return FloorPlan(edges, edges, np.zeros(4, int), np.array([True]))


def test_the_floor_plan_measures_a_square_room():
    plan = square()
    assert plan.room_at((1, 399)) == 0 and plan.room_at((-1, 5)) == -1 and plan.room_at((5, 401)) == -1
    assert plan.clearance((100, 150)) == 100 and plan.clearance((390, 200)) == 10
    np.testing.assert_allclose(plan.free((100, 200), [0, np.pi / 2, np.pi]), [300 - BODY, 200 - BODY, 100 - BODY])
    # Towards a corner the shoulder that meets the wall first counts.
    assert plan.free((200, 200), np.pi / 4)[0] < 200 * np.sqrt(2) - BODY


def test_the_map_has_its_rooms():
    plan = floor_plan("my_way_home")
    assert plan.rooms == 18 and plan.standing.all()
    assert plan.room_at((240, -176)) != plan.room_at((464, 48)) and plan.room_at((0, 0)) == -1
    # A doorway joins two sectors: it can be walked through.
    assert plan.free((240, -176), 0)[0] > 400


def test_starts_cover_the_floor_evenly():
    plan = square()
    starts = np.array([plan.draw_start(np.random.default_rng([seed, 0]), 40)[:2] for seed in range(400)])
    assert starts.min() >= 40 and starts.max() <= 360
    quarters = Counter(map(tuple, (starts > 200).tolist()))
    assert len(quarters) == 4 and min(quarters.values()) > 70


def test_the_walker_is_steered_by_its_seed_and_leaves_walls():
    plan = square()

    def walk(seed, count=300):
        """A player without momentum in a square room."""
        place, angle = np.array([200.0, 200.0]), 0.0
        walker = Walker(plan, np.random.default_rng(seed), np.deg2rad(TURN), 7.0)
        walk = walker.walk(camera_pose(*place, 41, 0))
        keys, path = next(walk), []
        for _ in range(count):
            angle += TURN * (("j" in keys) - ("l" in keys))
            ahead = np.array([np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))])
            aside = np.array([ahead[1], -ahead[0]])
            move = 7 * (("w" in keys) - ("s" in keys)) * ahead + 7 * (("d" in keys) - ("a" in keys)) * aside
            place = (place + move).clip(BODY, 400 - BODY)
            path.append((keys, *place))
            keys = walk.send(camera_pose(*place, 41, angle))
        return path

    assert walk(1) == walk(1) != walk(2)
    for seed in range(5):
        path = walk(seed)
        pushed = [a[1:] == b[1:] and any(key in "wasd" for key in b[0]) for a, b in zip(path, path[1:], strict=False)]
        assert np.mean(pushed) < 0.25


def test_people_use_all_keys_and_rest(clips):
    keys = np.concatenate([clip.keys[1:] for clip in clips])
    share = dict(zip(KEYS, keys.mean(0), strict=True))
    assert share["w"] > 0.2 and share["i"] == share["k"] == 0
    assert all(0.01 < share[key] for key in "asdjl")
    assert 0.05 < (~keys.any(1)).mean() < 0.35
    assert not (keys[:, 0] & keys[:, 2]).any() and not (keys[:, 5] & keys[:, 7]).any()
    # Keys are held for a while, not drawn anew for each frame.
    assert (keys[1:] != keys[:-1]).any(1).mean() < 0.3


# Flaws and collection


def test_flaws_are_named(clips):
    good = next(clip for clip in clips if flaw(clip) is None)

    def changed(frames=good.frames, poses=good.poses, keys=good.keys):
        return Clip(frames, poses, keys, good.intrinsics, good.seed, good.map, good.id)

    assert flaw(changed(frames=good.frames // 8)) == "dark"
    assert flaw(changed(frames=np.full_like(good.frames, 90))) == "blank"
    far = good.poses.copy()
    far[40:, 0, 3] += 200
    assert flaw(changed(poses=far)) == "jump"
    far[40:] = np.nan
    assert flaw(changed(poses=far)) == "jump"
    frozen = np.repeat(good.poses[:1], 81, 0)
    assert flaw(changed(poses=frozen, keys=np.tile(W, (81, 1)))) == "stuck"
    assert flaw(changed(poses=frozen, keys=np.tile(J, (81, 1)))) is None


def test_collecting_twice_makes_nothing_anew(folder):
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    report = collect(folder, clips=6, seed=100, settings=FAST, shard_clips=2)
    assert report.skipped == report.shards == 3 and len(before) == 3
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    store = ClipStore(folder)
    assert report.tried == 6 and report.kept == len(store) == 6 - sum(report.dropped.values())
    assert report.frames == sum(len(clip) for clip in store) == sum(report.rooms.values())
    assert 0 < report.coverage <= 1 and str(report).startswith("6 of 6 clips")
    assert np.array_equal(replay(store[0], FAST), store[0].frames)


def test_a_kill_is_mended_without_touching_the_rest(folder):
    lines = read_manifest(folder)
    wanted = [line["sha256"] for line in lines]
    kept, damaged, missing = (folder / line["shard"] for line in lines)
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    missing.unlink()
    (folder / "my_way_home-0000000104.safetensors.partial").write_bytes(b"half")
    stamp = kept.stat().st_mtime_ns
    with pytest.raises(FileNotFoundError):
        ClipStore(folder)
    reports = []
    report = collect(folder, clips=6, seed=100, settings=FAST, shard_clips=2, progress=reports.append)
    assert report.skipped == 1 and [r.shards for r in reports] == [1, 2, 3]
    assert kept.stat().st_mtime_ns == stamp
    assert [line["sha256"] for line in read_manifest(folder)] == wanted
    assert sorted(path.name for path in folder.iterdir()) == sorted([MANIFEST, kept.name, damaged.name, missing.name])


def test_a_killed_collection_goes_on_where_it_was(folder, tmp_path):
    """The process kills itself as soon as its first shard is in the manifest."""
    program = f"""
import os, signal
from lingbot_nb.world.vizdoom import SimulatorSettings, collect
def kill(report):
    if report.shards: os.kill(os.getpid(), signal.SIGKILL)
collect({str(tmp_path)!r}, clips=4, seed=100, settings=SimulatorSettings(scale=2), shard_clips=2, progress=kill)
"""
    assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    assert len(ClipStore(tmp_path).lines) == 1
    assert collect(tmp_path, clips=4, seed=100, settings=FAST, shard_clips=2).skipped == 1
    one, two = ({line["shard"]: line["sha256"] for line in read_manifest(path)} for path in (folder, tmp_path))
    assert len(two) == 2 and two.items() <= one.items()


def test_two_processes_collect_the_same_bytes(folder, tmp_path):
    collect(tmp_path, clips=4, seed=100, settings=FAST, shard_clips=2, processes=2)
    one, two = ({line["shard"]: line["sha256"] for line in read_manifest(path)} for path in (folder, tmp_path))
    assert len(two) == 2 and two.items() <= one.items()


def test_collections_that_do_not_fit_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="use another folder"):
        collect(folder, clips=2, seed=100, settings=SimulatorSettings(scale=2, gamma=1.0))
    with pytest.raises(ValueError, match="partly held out"):
        collect(tmp_path, clips=4, seed=HELD_OUT_SEED - 2, settings=FAST)
    with pytest.raises(ValueError, match="1 or more clips"):
        collect(tmp_path, clips=0, settings=FAST)
    assert list(tmp_path.iterdir()) == []


def test_held_out_clips_are_marked(tmp_path):
    report = collect(tmp_path, clips=1, seed=HELD_OUT_SEED + 5, settings=FAST, compress=True)
    assert [line["split"] for line in read_manifest(tmp_path)] == ["held-out"]
    assert len(ClipStore(tmp_path, split="train")) == 0 and len(ClipStore(tmp_path, split="held-out")) == report.kept


def test_the_shipped_clips_replay():
    store = ClipStore(SHIPPED)
    assert len(store) == 9 and all(clip.split == "held-out" for clip in store)
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 9e6
    assert np.array_equal(replay(store[4]), store[4].frames)
