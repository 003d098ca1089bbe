"""Keys and poses to control channels, against numbers of the released code and plain geometry."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lingbot_nb.control import camera
from lingbot_nb.control.camera import (
    LivePath,
    clip_scale,
    control_act,
    control_cam,
    control_tiny,
    control_tiny_batch,
    latent_poses,
    load_path,
    normalise,
    poses_from_keys,
    rays,
    relative_poses,
    save_path,
    scale_intrinsics,
    tiny_steps,
    unshuffle,
)
from lingbot_nb.control.keys import MOVES, held, pad_to_clip, parse_keys
from lingbot_nb.presets import LINGBOT, MICRO, TINY, VideoShape

FIXTURE = np.load(Path(__file__).parent / "fixtures" / "camera.npz")
CASES = sorted({name.rsplit("/", 1)[0] for name in FIXTURE.files})
STRINGS = [case for case in CASES if case.startswith("string/")]
SHAPE = VideoShape(48, 80, 17)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SOURCE = (502.9, 503.1, 415.8, 239.8)
TINY_CAMERA = (66.67, 80.0, 80.0, 48.0)
# The released arithmetic is float32, so one last bit in a rotation is multiplied by coordinate / step: 145 units
# against 0.002 in example 00, 15 against 0.07 in example 03. Equal to the last bit on the machine this was written on.
ROUNDING = {"example00_17": 2e-3, "example03_17_rays": 2e-5}


def reference(case: str, name: str) -> np.ndarray:
    return FIXTURE[f"{case}/{name}"]


def path_of(case: str) -> tuple[np.ndarray, np.ndarray]:
    if case in STRINGS:
        return poses_from_keys(pad_to_clip(parse_keys(case.split("/")[1]))), np.array(SOURCE)
    return reference(case, "camera_to_world"), reference(case, "source_intrinsics")[0]


def random_keys(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((rows, 8)) < 0.4


def random_poses(count: int, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    poses = np.tile(np.eye(4), (count, 1, 1))
    rotations = np.linalg.qr(rng.normal(size=(count, 3, 3)))[0]
    poses[:, :3, :3] = rotations * np.linalg.det(rotations)[:, None, None]
    poses[:, :3, 3] = rng.normal(size=(count, 3)) * spread
    return poses


# ---- the released numbers ------------------------------------------------------------------------


@pytest.mark.parametrize("case", STRINGS)
def test_keys_give_the_released_poses(case):
    np.testing.assert_allclose(path_of(case)[0], reference(case, "camera_to_world"), atol=1e-14)


@pytest.mark.parametrize("case", CASES)
def test_poses_give_the_released_steps_and_rays(case):
    poses, source = path_of(case)
    atol = ROUNDING.get(case, 1e-6)
    latent = latent_poses(poses)
    np.testing.assert_allclose(latent, reference(case, "latent_poses"), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(normalise(relative_poses(latent)), reference(case, "relative_poses"), atol=atol)
    intrinsics = scale_intrinsics(source, SHAPE.height, SHAPE.width)
    np.testing.assert_allclose(np.broadcast_to(intrinsics, (len(latent), 4)), reference(case, "intrinsics"), rtol=1e-6)
    if case == "example03_17_rays":
        control = control_act(poses, np.zeros((17, 4)), intrinsics, SHAPE)[:192]
    else:
        control = control_cam(poses, intrinsics, SHAPE)
    np.testing.assert_allclose(control, reference(case, "plucker"), atol=atol)


@pytest.mark.parametrize("case", CASES)
def test_released_steps_give_the_released_rays(case):
    control = unshuffle(rays(reference(case, "relative_poses"), reference(case, "intrinsics"), 48, 80))
    expected = reference(case, "plucker")
    np.testing.assert_allclose(control[-len(expected) :], expected, atol=5e-7)


def test_act_puts_directions_before_every_fourth_row_of_keys():
    case = STRINGS[0]
    poses, source = path_of(case)
    intrinsics = scale_intrinsics(source, SHAPE.height, SHAPE.width)
    wasd = reference(case, "wasd")
    control = control_act(poses, wasd, intrinsics, SHAPE)
    assert control.shape == (448, len(wasd) // 4 + 1, 6, 10)
    np.testing.assert_allclose(control[:192], reference(case, "plucker")[192:], atol=5e-7)
    for column in range(4):
        channels = control[192 + 64 * column : 256 + 64 * column].numpy()
        np.testing.assert_array_equal(channels, np.broadcast_to(wasd[::4, column][:, None, None], channels.shape))


def test_fewer_frames_stretch_the_path_and_cut_the_keys():
    keys = random_keys(81)
    poses = poses_from_keys(keys[1:])
    sampled = latent_poses(poses, 20)
    np.testing.assert_allclose(sampled[[0, -1]], poses[[0, -1]], atol=1e-12)
    assert control_act(poses, keys[:, MOVES], SOURCE, SHAPE, frames=20).shape[1] == 20


# ---- geometry ------------------------------------------------------------------------------------


def test_interpolation_turns_at_constant_speed_and_passes_through_the_poses():
    axis = np.array([1.0, 2.0, -0.5]) / np.linalg.norm([1.0, 2.0, -0.5])
    cross = np.cross(np.eye(3), -axis)

    def turned(angle):
        return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross  # Rodrigues

    poses = np.tile(np.eye(4), (2, 1, 1))
    poses[1, :3, :3], poses[1, :3, 3] = turned(2.9), [3, 0, -6]
    for part, pose in zip(np.linspace(0, 1, 7), latent_poses(poses, 7), strict=True):
        np.testing.assert_allclose(pose[:3, :3], turned(2.9 * part), atol=1e-12)
        np.testing.assert_allclose(pose[:3, 3], part * np.array([3, 0, -6]), atol=1e-12)
    scattered = random_poses(9)
    np.testing.assert_allclose(latent_poses(scattered, 9), scattered, atol=1e-12)


def test_rounded_rotations_are_replaced_by_the_nearest_ones():
    poses = random_poses(5)
    poses[:, :3, :3] += np.random.default_rng(1).normal(size=(5, 3, 3)) * 1e-4
    values, vectors = np.linalg.eigh(poses[:, :3, :3].transpose(0, 2, 1) @ poses[:, :3, :3])
    stretch = np.einsum("nij,nj,nkj->nik", vectors, values**-0.5, vectors)
    np.testing.assert_allclose(latent_poses(poses, 5)[:, :3, :3], poses[:, :3, :3] @ stretch, atol=1e-12)


@given(st.integers(0, 2**31), st.integers(1, 8))
@settings(max_examples=30, deadline=None)
def test_steps_rebuild_the_path_and_ignore_the_world_frame(seed, frames):
    poses = random_poses(frames, seed, spread=5)
    steps = relative_poses(poses, torch.float64)
    at = poses[0]
    for pose, step in zip(poses[1:], steps[1:], strict=True):
        at = at @ step
        np.testing.assert_allclose(at, pose, atol=1e-9)
    moved = random_poses(1, seed + 1)[0] @ poses
    np.testing.assert_allclose(relative_poses(moved, torch.float64), steps, atol=1e-9)
    np.testing.assert_array_equal(steps[0], np.eye(4))


def test_normalise_divides_by_the_longest_step_or_a_fixed_scale():
    steps = relative_poses(random_poses(6, spread=3), torch.float64)
    longest = clip_scale(steps)
    assert clip_scale(normalise(steps)) == pytest.approx(1)
    np.testing.assert_allclose(normalise(steps, longest), normalise(steps), atol=1e-15)
    np.testing.assert_allclose(normalise(steps, 32)[:, :3, 3] * 32, steps[:, :3, 3])
    still = np.tile(np.eye(4), (3, 1, 1))
    np.testing.assert_array_equal(normalise(still), still)
    with pytest.raises(ValueError, match="world scale 0 is not positive"):
        normalise(steps, 0)


def test_right_turns_point_forward_to_the_right_and_move_content_left():
    poses = poses_from_keys(parse_keys("l-1"), turn=4.0)
    forward = poses[1] @ [0, 0, 1, 0]
    assert forward[0] == pytest.approx(np.sin(np.deg2rad(4))) and forward[1] == 0
    ahead = np.linalg.inv(poses[1]) @ [0, 0, 10, 1]  # what was straight ahead, in the turned camera
    assert ahead[0] < 0 and ahead[2] > 0
    assert (poses_from_keys(parse_keys("j-1"))[1] @ [0, 0, 1, 0])[0] < 0
    assert (poses_from_keys(parse_keys("i-1"))[1] @ [0, 0, 1, 0])[1] < 0  # up is -y


def test_a_simulator_turn_equals_the_same_turn_from_keys():
    def doom_pose(heading):  # x east, y north, z up; angles grow to the left
        h = np.deg2rad(heading)
        right, down, forward = (np.sin(h), -np.cos(h), 0), (0, 0, -1), (np.cos(h), np.sin(h), 0)
        pose = np.eye(4)
        pose[:3, :3] = np.array([right, down, forward]).T
        pose[:3, 3] = [1234.5, -987.6, 41]
        return pose

    turning = np.stack([doom_pose(30 - 4 * frame) for frame in range(9)])
    keys = parse_keys("l-9")
    control = control_tiny(turning, keys, TINY_CAMERA, TINY.shape, 32.0, with_poses=False)
    np.testing.assert_allclose(LivePath.tiny(TINY_CAMERA, TINY.shape).push(keys), control, atol=1e-6)
    step = relative_poses(turning[::4], torch.float64)[1]
    np.testing.assert_allclose(step[:3, 2], [np.sin(np.deg2rad(16)), 0, np.cos(np.deg2rad(16))], atol=1e-9)


def test_pitch_stops_at_85_degrees_and_walking_stays_level():
    poses = poses_from_keys(parse_keys("iw-60"))
    forward = poses[-1] @ [0, 0, 1, 0]
    assert np.rad2deg(np.arcsin(-forward[1])) == pytest.approx(85)
    assert (poses[:, 1, 3] == 0).all()
    assert poses[-1, 2, 3] == pytest.approx(60 * 0.05, rel=2e-5)


def test_rays_pass_through_pixel_centres():
    ray = rays(np.eye(4)[None], (10.0, 20.0, 8.0, 8.0), 16, 16)[3:, 0].numpy()
    expected = np.array([(3.5 - 8) / 10, (12.5 - 8) / 20, 1.0])
    np.testing.assert_allclose(ray[:, 12, 3], expected / np.linalg.norm(expected), atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(ray, axis=0), 1, atol=1e-6)


def test_unshuffle_orders_channel_row_column():
    picture = torch.arange(2 * 3 * 16 * 24).float().reshape(2, 3, 16, 24)
    cells = unshuffle(picture)
    assert cells.shape == (128, 3, 2, 3)
    assert cells[64 + 5 * 8 + 6, 2, 1, 2] == picture[1, 2, 8 + 5, 16 + 6]
    torch.testing.assert_close(cells.transpose(0, 1), torch.nn.functional.pixel_unshuffle(picture.transpose(0, 1), 8))
    with pytest.raises(ValueError, match="12x24 is not a multiple of 8"):
        unshuffle(torch.zeros(1, 1, 12, 24))


# ---- the tiny world ------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("with_poses", [True, False])
def test_batch_and_single_clip_agree(with_poses, device):
    shape = MICRO.shape
    clips = [(random_poses(21, seed, spread=900), random_keys(21, seed)) for seed in range(3)]
    singles = [control_tiny(*clip, TINY_CAMERA, shape, 32.0, with_poses=with_poses) for clip in clips]
    steps, moves = zip(*(tiny_steps(*clip, 32.0, with_poses=with_poses) for clip in clips), strict=True)
    stacked = (torch.from_numpy(np.stack(rows)).to(device) for rows in (steps, moves))
    batch = control_tiny_batch(*stacked, TINY_CAMERA, shape.height, shape.width)
    assert batch.device.type == device
    assert batch.shape == (3, 640, shape.frames, shape.latent_height, shape.latent_width)
    assert batch.shape[1] * 4 == MICRO.model.control_features and batch.dtype == torch.float32
    torch.testing.assert_close(batch.cpu(), torch.stack(singles), atol=1e-6, rtol=1e-6)


def test_tiny_modes_hold_what_they_promise():
    poses, keys = random_poses(9, spread=500), random_keys(9)
    keys[0] = True
    with_poses = control_tiny(poses, keys, TINY_CAMERA, TINY.shape, 32.0, with_poses=True)
    with_keys = control_tiny(poses, keys, TINY_CAMERA, TINY.shape, 32.0, with_poses=False)
    step = np.linalg.inv(poses[4]) @ poses[8]
    for axis in range(3):
        np.testing.assert_allclose(with_poses[64 * axis : 64 * axis + 64, 2], step[axis, 3] / 32, rtol=1e-5)
    assert not with_poses[384:].any() and not with_keys[:192].any()
    torch.testing.assert_close(with_poses[192:384], with_keys[192:384])
    assert not with_keys[384:, 0].any()
    for column in range(4):
        np.testing.assert_allclose(with_keys[384 + 64 * column :, 2][:64], keys[5:9, column].mean())


def test_live_tiny_equals_the_clip_and_ignores_pitch():
    keys = random_keys(41, 3)
    path = LivePath.tiny(TINY_CAMERA, TINY.shape)
    live = torch.cat([path.push(rows) for rows in np.split(keys, [1, 5, 9, 21])], dim=1)
    turning = keys.copy()
    turning[:, [4, 6]] = False
    poses = poses_from_keys(turning[1:], turn=4.0)
    whole = control_tiny(poses, keys, TINY_CAMERA, TINY.shape, 32.0, with_poses=False)
    torch.testing.assert_close(live, whole, atol=1e-6, rtol=0)


# ---- live play -----------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.lists(st.integers(1, 3), min_size=1, max_size=5), st.integers(0, 2))
@settings(max_examples=25, deadline=None)
def test_live_cam_equals_the_whole_clip_at_the_same_scale(seed, chunks, first):
    keys = random_keys(1 + 4 * first + 4 * sum(chunks), seed)
    poses = poses_from_keys(keys[1:])
    scale = clip_scale(relative_poses(latent_poses(poses))) or 0.2
    path = LivePath.cam(TINY_CAMERA, MICRO.shape, scale)
    cuts = np.cumsum([1 + 4 * first] + [4 * chunk for chunk in chunks])[:-1]
    live = torch.cat([path.push(rows) for rows in np.split(keys, cuts)], dim=1)
    torch.testing.assert_close(live, control_cam(poses, TINY_CAMERA, MICRO.shape), atol=3e-6, rtol=0)
    assert path.frames == live.shape[1]


def test_live_act_equals_the_whole_clip():
    keys = random_keys(33, 5)
    path = LivePath.act(TINY_CAMERA, MICRO.shape)
    live = torch.cat([path.push(keys[:9]), path.push(keys[9:21]), path.push(keys[21:])], dim=1)
    whole = control_act(poses_from_keys(keys[1:]), keys[:, MOVES], TINY_CAMERA, MICRO.shape)
    torch.testing.assert_close(live, whole, atol=1e-6, rtol=0)


def test_live_play_knows_no_future():
    one, other = random_keys(17, 1), random_keys(17, 2)
    other[:9] = one[:9]
    paths = [LivePath.cam(TINY_CAMERA, MICRO.shape, 0.2) for _ in range(2)]
    first, second = (path.push(keys) for path, keys in zip(paths, (one, other), strict=True))
    assert torch.equal(first[:, :3], second[:, :3]) and not torch.equal(first[:, 3:], second[:, 3:])


def test_a_long_stream_keeps_its_precision_and_reset_starts_over():
    path = LivePath.cam(TINY_CAMERA, MICRO.shape, LINGBOT.world_scale)
    path.push(np.zeros((1, 8)))
    rows = np.tile(held("wl"), (4, 1))
    early = path.push(rows)
    for _ in range(600):
        late = path.push(rows)
    assert torch.equal(early, late)
    path.push(np.tile(held("i"), (4, 1)))
    path.reset()
    again = path.push(np.concatenate([np.zeros((1, 8)), rows]))[:, 1:]
    # Two frames in one product: some processors round that in another order.
    torch.testing.assert_close(again, early, atol=1e-6, rtol=0)


def test_a_straight_step_is_one_at_lingbots_world_scale():
    path = LivePath.cam(TINY_CAMERA, MICRO.shape, LINGBOT.world_scale)
    path.push(np.zeros((1, 8)))
    origin = path.push(np.tile(held("w"), (4, 1)))[:192, 0, 0, 0].reshape(3, 64)[:, 0]
    np.testing.assert_allclose(origin, [0, 0, 1], atol=1e-5)


def test_live_play_refuses_part_frames_and_stays_as_it_was():
    path = LivePath.cam(TINY_CAMERA, MICRO.shape, 0.2)
    with pytest.raises(ValueError, match=r"4 rows of keys do not fill whole frames: push 4n \+ 1 rows first"):
        path.push(np.zeros((4, 8)))
    path.push(np.zeros((5, 8)))
    with pytest.raises(ValueError, match="5 rows of keys do not fill whole frames: push 4n"):
        path.push(np.zeros((5, 8)))
    assert path.frames == 2
    with pytest.raises(ValueError, match=r"shape \[4, 4\]"):
        path.push(np.zeros((4, 4)))
    with pytest.raises(ValueError, match="world scale nan"):
        LivePath.cam(TINY_CAMERA, MICRO.shape, float("nan"))


# ---- folders -------------------------------------------------------------------------------------


def test_paths_survive_the_disk(tmp_path):
    keys = random_keys(22)
    poses = poses_from_keys(keys[1:])
    save_path(tmp_path / "walk", poses, SOURCE, keys)
    assert not list(tmp_path.rglob("*.partial"))
    path = load_path(tmp_path / "walk")
    np.testing.assert_allclose(path.poses, poses, atol=1e-6)
    np.testing.assert_allclose(path.intrinsics, SOURCE, rtol=1e-6)
    np.testing.assert_array_equal(path.keys, keys)
    poses, intrinsics, keys = path.cut(81)
    assert (len(poses), intrinsics.shape, keys.shape) == (21, (4,), (21, 8))
    assert len(path.cut(12).poses) == 9
    assert load_path(tmp_path / "walk", with_keys=False).keys is None
    assert np.load(tmp_path / "walk" / "action.npy").dtype == np.int32


def spoiled(tmp_path, name, table) -> Path:
    poses = poses_from_keys(random_keys(16))
    save_path(tmp_path, poses, SOURCE, random_keys(17))
    np.save(tmp_path / f"{name}.npy", table(np.load(tmp_path / f"{name}.npy")))
    return tmp_path


def with_value(index, value):
    def change(table):
        table[index] = value
        return table

    return change


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("action", lambda a: np.tile(a, (4, 1)), "action.npy has 68 rows for 17 poses, so it belongs to another path"),
        ("ijkl_action", lambda a: a[:9], "ijkl_action.npy has 9 rows for 17 poses"),
        ("action", lambda a: a[:, :3], r"action.npy: have shape \[17, 3\]"),
        ("action", with_value((3, 1), 7), "action.npy: hold 7 at row 3, column 1"),
        ("poses", with_value((5, 0, 3), np.nan), "poses.npy: pose 5 holds NaN"),
        ("poses", with_value((4, 0, 0), 2.0), "poses.npy: pose 4 is not rigid"),
        ("poses", with_value((2, 3, 3), 0.5), "poses.npy: pose 2 does not end in the row 0 0 0 1"),
        ("poses", lambda p: p * np.array([-1, 1, 1, 1]), "poses.npy: pose 0 mirrors"),
        ("poses", lambda p: p[:, :3], r"poses.npy: have shape \[17, 3, 4\]"),
        ("intrinsics", lambda k: k[:5], "intrinsics.npy has 5 rows for 17 poses"),
        ("intrinsics", with_value((0, 0), 0), "fx and fy above 0"),
        ("poses", lambda p: p.astype(object), "poses.npy is not a plain numpy array"),
    ],
)
def test_spoiled_folders_are_refused_in_one_sentence(tmp_path, name, table, message):
    with pytest.raises(ValueError, match=message) as error:
        load_path(spoiled(tmp_path, name, table))
    assert "\n" not in str(error.value)


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="poses.npy is missing"):
        load_path(tmp_path)
    save_path(tmp_path, poses_from_keys(random_keys(4)), SOURCE)
    assert load_path(tmp_path).keys is None
    (tmp_path / "poses.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="poses.npy is not a plain numpy array"):
        load_path(tmp_path)


def test_a_stale_action_file_does_not_stop_cam_control(tmp_path):
    folder = spoiled(tmp_path, "action", lambda a: a[:5])
    assert len(load_path(folder, with_keys=False).poses) == 17
    assert load_path(folder, moves=("wasd_action.npy",)).keys.shape == (17, 8)
    (folder / "action.npy").unlink()
    assert load_path(folder).keys.shape == (17, 8)  # wasd_action.npy stands in


def test_either_file_of_moves_can_be_asked_for(tmp_path):
    """As in released example 02, whose action.npy is all zeros beside a walk."""
    folder = spoiled(tmp_path, "action", lambda a: 0 * a)
    assert not load_path(folder).keys[:, MOVES].any()
    walked = load_path(folder, moves=("wasd_action.npy",)).keys
    np.testing.assert_array_equal(walked, random_keys(17))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tiny_steps(random_poses(8), random_keys(8), 32.0, with_poses=True), "8 pixel frames is not 4n"),
        (lambda: tiny_steps(random_poses(9), random_keys(5), 32.0, with_poses=True), "9 poses but 5 rows of keys"),
        (lambda: control_act(random_poses(9), np.zeros((5, 4)), SOURCE, SHAPE), "5 rows of wasd keys do not reach"),
        (lambda: scale_intrinsics((1, 2, 3), 48, 80), r"shape \[3\]"),
        (lambda: camera.pixel_directions(np.ones((2, 4)), 48, 80), "one camera"),
        (lambda: latent_poses(random_poses(9), 0), "0 frames"),
        (lambda: save_path("/nowhere", random_poses(3), SOURCE, random_keys(2)), "3 poses but 2 rows"),
    ],
)
def test_wrong_lengths_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
