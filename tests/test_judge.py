"""The judge: what is true of a path, what it learns, and what the shipped one reads off real clips."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from lingbot_nb.control.camera import poses_from_keys
from lingbot_nb.control.keys import parse_keys
from lingbot_nb.model import checkpoint
from lingbot_nb.parts import shipped_clips
from lingbot_nb.report import features, judge
from lingbot_nb.report.metrics import frechet_distance
from lingbot_nb.world.clips import Clip


@pytest.fixture(scope="module")
def shipped() -> judge.Judge:
    return judge.load_judge()


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return shipped_clips(6)


def keys_of(text: str) -> np.ndarray:
    return np.concatenate([np.zeros((1, 8), bool), parse_keys(text)])


def panning_clip(seed: int, keys: str, size: tuple[int, int] = (32, 48)) -> Clip:
    """A camera that turns in front of a far panorama: only j and l move anything, two pixels a pixel frame."""
    rng = np.random.default_rng(seed)
    height, width = size
    noise = cv2.GaussianBlur(rng.random((height, 600, 3)).astype(np.float32), (0, 0), 1.5)
    panorama = ((noise - noise.min()) / np.ptp(noise) * 255).astype(np.uint8)
    rows = keys_of(keys)
    turned = np.cumsum(rows[:, 7].astype(int) - rows[:, 5].astype(int))
    frames = np.stack([np.roll(panorama, -2 * n - 100, 1)[:, :width] for n in turned])
    poses = poses_from_keys(rows[1:], move=0.0, turn=4.0).astype(np.float32)
    return Clip(frames, poses, rows, np.array([30, 30, 24, 16], np.float32), seed, "panorama", f"panorama-{seed}")


def test_matching_is_the_sum_written_out():
    a, b = torch.randn(2, 5, 4, 6), torch.randn(2, 5, 4, 6)
    got = judge.match(a, b, (1, 2))
    assert got.shape == (2, 15, 4, 6)
    padded = torch.nn.functional.pad(b, (2, 2, 1, 1))
    for index, (dy, dx) in enumerate((dy, dx) for dy in range(3) for dx in range(5)):
        want = (a * padded[:, :, dy : dy + 4, dx : dx + 6]).sum(1)
        torch.testing.assert_close(got[:, index], want)


def test_flow_follows_a_shifted_picture():
    a = torch.nn.functional.normalize(torch.randn(1, 24, 8, 12), dim=1)
    moved = torch.roll(a, (1, -2), (2, 3))
    found = judge.flow(judge.match(a, moved, (1, 3)), (1, 3), torch.tensor(50.0))
    inside = found[0, :, 1:-1, 3:-3]
    torch.testing.assert_close(inside[0], torch.full_like(inside[0], -2), atol=0.05, rtol=0)
    torch.testing.assert_close(inside[1], torch.full_like(inside[1], 1), atol=0.05, rtol=0)
    assert (inside[2] > 0.95).all()


def test_motion_of_a_path_has_the_signs_of_its_keys():
    motion = judge.true_motion(poses_from_keys(parse_keys("l-4,j-4,w-4,d-4,s-4"), move=8.0, turn=4.0), scale=32.0)
    want = [[16, 0, 0], [-16, 0, 0], [0, 0, 1], [0, 1, 0], [0, 0, -1]]
    np.testing.assert_allclose(motion, want, atol=1e-5)
    np.testing.assert_array_equal(judge.pressed(keys_of("l-4,wa-2,w-2,none-4")), [[0, 0, 1], [1, -0.5, 0], [0, 0, 0]])


def test_a_walk_is_as_asked_where_it_mostly_goes_that_way_and_far_enough():
    forward, left, none = [1, 0, 0], [0, -1, 0], [0, 0, 1]
    rows = [  # keys; yaw, right, forward; as asked
        (forward, [0, 0.1, 0.2], True),
        (forward, [0, 0.2, 0.1], False),  # slid along a wall
        (forward, [0, 0, -0.2], False),  # momentum
        (forward, [0, 0, 0.12], False),  # below `still`
        (forward, [0, 0.09, 0.1], True),  # neither part alone is far enough
        (left, [0, -0.2, 0.1], True),
        (left, [0, 0.2, 0.1], False),
        (none, [4, 0, 0.2], False),
    ]
    keys, motion, asked = (np.array(column)[None] for column in zip(*rows, strict=True))
    assert judge.moved_as_asked(keys, motion, still=0.125).tolist() == asked.tolist()


def test_labels_ignore_what_pictures_cannot_tell():
    keys = np.array([[1, 0, 0], [1, 0, 0], [0, 0, 0], [0.5, 0, 0], [0, -1, 1], [0, 0, -0.75]])
    motion = np.array([[0, 0, 0.9], [0, 0, 0], [0, 0, 0.5], [0, 0, 0.4], [16, -0.8, 0], [-12, 0, 0]])
    got = judge.labels(keys, motion, still=0.125)
    none = judge.IGNORED
    assert got[:, 0].tolist() == [2, none, none, none, 1, 1]
    assert got[:, 1].tolist() == [1, 1, 1, 1, 0, 1]
    assert got[:, 2].tolist() == [1, 1, 1, 1, 2, 0]


def test_examples_run_backwards_and_mirrored_with_the_right_signs():
    clip = panning_clip(0, "l-20")
    rng = np.random.default_rng(0)
    (prepared,) = judge.lessons([clip], 32.0)
    drawn = [judge.example(prepared, 32.0, rng) for _ in range(24)]
    yaws = np.array([motion[:, 0] for _, _, motion, _ in drawn])
    assert np.allclose(np.abs(yaws), 16, atol=1e-3) and (yaws > 0).any() and (yaws < 0).any()
    for frames, said, motion, place in drawn:
        assert (said[:, 2] == np.where(motion[:, 0] > 0, 2, 0)).all()
        assert np.isnan(place).all() or np.isfinite(place).all()
        # Turning right moves the content left, whichever way the film is run or mirrored.
        moves_left = np.abs(frames[0, :, 8:].astype(int) - frames[1, :, :-8]).mean()
        moves_right = np.abs(frames[0, :, :-8].astype(int) - frames[1, :, 8:]).mean()
        assert (moves_left < moves_right) == (motion[0, 0] > 0)


def test_training_learns_which_way_a_panorama_turns(tmp_path):
    learnt = [panning_clip(seed, "l-12,none-6,j-14,none-8") for seed in range(6)]
    unseen = [panning_clip(seed, "j-16,l-16,none-8") for seed in (100, 101)]
    made, steps = judge.train(learnt, steps=80, batch=4, lr=3e-3, say=lambda line: None)
    assert steps == 80
    found = judge.examine(made, [clip.frames for clip in unseen], unseen)
    assert found["turn"][0] > 0.9 and found["turn"][1] == 16
    assert found["direction"][1] == 0 and np.isnan(found["direction"][0])
    path = checkpoint.save(tmp_path / "judge.safetensors", made, dtype=torch.bfloat16, kind="judge")
    again = judge.load_judge(path)
    torch.testing.assert_close(again.corpus_covariance, made.corpus_covariance, rtol=0, atol=0)


def test_a_training_without_clips_to_learn_from_says_so(monkeypatch, tmp_path):
    from lingbot_nb.parts import SHIPPED_CLIPS

    monkeypatch.setattr("sys.argv", ["judge", "--data", str(SHIPPED_CLIPS), "--out", str(tmp_path / "x.safetensors")])
    with pytest.raises(SystemExit, match="no train clips"):
        judge.main()


def test_films_of_another_layout_are_named(shipped):
    with pytest.raises(ValueError, match="4n \\+ 1"):
        shipped.read(np.zeros((1, 8, 96, 160, 3), np.uint8))


def test_the_shipped_judge_tells_turns_and_steps_of_real_clips(shipped, clips):
    found = judge.examine(shipped, [clip.frames for clip in clips], clips)
    assert found["turn"][1] >= 15 and found["turn"][0] >= 0.95
    assert found["direction"][1] >= 15 and found["direction"][0] >= 0.9
    assert found["yaw"] < 4 and found["step"] < 0.25
    card = checkpoint.read_card(judge.JUDGE)
    assert card["held_out"]["real"]["turn"][0] >= 0.95 and card["train_clips"] > 100
    assert sum(path.stat().st_size for path in judge.JUDGE.parent.iterdir()) < 0.5e6


def test_the_shipped_judge_sees_a_mirrored_film_turn_the_other_way(shipped, clips):
    films = np.stack([clip.frames for clip in clips])
    yaw, mirrored = shipped.read(films).yaw, shipped.read(films[:, :, :, ::-1]).yaw
    turning = np.abs(yaw) > 6
    assert turning.sum() > 15
    assert np.corrcoef(yaw[turning], mirrored[turning])[0, 1] < -0.9


# ---- distances -------------------------------------------------------------------------------------------------------


def test_perceptual_distance_is_zero_for_the_same_and_grows_with_blur(shipped, clips):
    frames = clips[0].frames[::20]
    blurred = [np.stack([cv2.GaussianBlur(f, (0, 0), s) for f in frames]) for s in (0.7, 1.5, 3.0)]
    assert features.perceptual_distance(shipped, frames, frames).tolist() == [0] * len(frames)
    apart = [features.perceptual_distance(shipped, frames, soft) for soft in blurred]
    assert apart[0].shape == (len(frames),)
    assert (0 < apart[0]).all() and (apart[0] < apart[1]).all() and (apart[1] < apart[2]).all()
    with pytest.raises(ValueError, match="differ in shape"):
        features.perceptual_distance(shipped, frames, frames[:2])


def test_diversity_is_the_mean_over_pairs():
    films = np.zeros((3, 2, 4, 4, 3), np.uint8)
    films[1], films[2] = 10, 40

    def apart(a, b):
        return np.abs(a.astype(float) - b).mean((-3, -2, -1))

    assert features.diversity(apart, films) == pytest.approx((10 + 40 + 30) / 3)
    with pytest.raises(ValueError, match="two seeds"):
        features.diversity(apart, films[:1])


def test_real_frames_lie_nearer_to_the_corpus_than_noise_and_blur(shipped, clips):
    real = np.stack([clip.frames for clip in clips])
    noise = np.random.default_rng(0).integers(0, 256, (1, 9, 96, 160, 3), np.uint8)
    soft = np.stack([[cv2.GaussianBlur(f, (0, 0), 4) for f in film] for film in real])
    read = {name: shipped.read(films).frames for name, films in (("real", real), ("soft", soft), ("noise", noise))}
    mean = {name: features.corpus_distance(shipped, frames).mean() for name, frames in read.items()}
    assert 0.5 < mean["real"] < 1.6 and mean["real"] < mean["soft"] < mean["noise"]
    flat = {name: frames.reshape(-1, frames.shape[-1]) for name, frames in read.items()}
    assert features.corpus_frechet(shipped, flat["real"]) < features.corpus_frechet(shipped, flat["soft"])
    assert frechet_distance(flat["real"], flat["real"]) == pytest.approx(0, abs=1e-6)


def test_real_views_alike_tell_how_much_detail_is_due(shipped):
    """Each walk by the others; soft pictures are found by what they show, and lack what is due."""
    real = np.stack([clip.frames for clip in shipped_clips(9)])
    soft = np.stack([[cv2.GaussianBlur(f, (0, 0), 0.7) for f in film] for film in real])
    sums = {"real": [], "soft": []}
    for number in range(9):
        views = features.LikeViews(shipped, np.delete(real, number, 0))
        assert len(views) == 8 * 21
        for name, films in (("real", real), ("soft", soft)):
            film = films[number : number + 1]
            due = views.expected(shipped.read(film).frames)
            assert due.shape == (1, 21) and (due > 0).all()
            sums[name].append((features.still_detail(film).sum(), due.sum()))
    shares = {name: np.divide(*np.sum(pairs, 0)) for name, pairs in sums.items()}
    assert 0.6 < shares["real"] < 1.6 and shares["soft"] < 0.3 * shares["real"]
    views, stills = features.LikeViews(shipped, real), features.still_detail(real)
    own = views.expected(shipped.read(real).frames)
    assert np.corrcoef(np.log(own.ravel()), np.log(stills.ravel()))[0, 1] > 0.9


def test_second_features_are_means_of_whole_seconds(shipped, clips):
    reading = shipped.read(clips[0].frames[None, :41])
    got = features.second_features(reading)
    assert got.shape == (2, 128)
    np.testing.assert_allclose(got[1, :64], reading.frames[0, 5:9].mean(0), rtol=1e-5)
    np.testing.assert_allclose(got[0, 64:], reading.pairs[0, :4].mean(0), rtol=1e-5)
    short = replace(reading, pairs=reading.pairs[:, :3], frames=reading.frames[:, :4])
    assert len(features.second_features(short)) == 0


def test_lpips_is_used_only_where_package_and_weights_are_there(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert features.lpips_distance() is None  # no weights: nothing may be fetched
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").write_bytes(b"")
    assert features.lpips_distance() is None


def test_films_are_written_for_public_metrics(tmp_path):
    pytest.importorskip("av")
    films = {"student, 4 steps": np.zeros((2, 5, 32, 48, 3), np.uint8)}
    folder = features.export_films(tmp_path / "films", films)
    assert sorted(p.name for p in (folder / "student-4-steps").iterdir()) == ["000.mp4", "001.mp4"]
    assert "vbench evaluate" in (folder / "README.md").read_text()
