"""Metrics against hand-computed cases, a direct-sum SSIM and OpenCV's Laplacian."""

import math

import cv2
import numpy as np
import pytest
import torch

from lingbot_nb.report import metrics

RNG = np.random.default_rng(0)


def _frames(*shape: int) -> np.ndarray:
    return RNG.integers(0, 256, size=(*shape, 3), dtype=np.uint8)


def _scene(width: int, height: int = 96) -> np.ndarray:
    """A smooth textured picture wider than a frame, so that crops of it are shifted views."""
    noise = np.random.default_rng(3).random((height, width, 3)).astype(np.float32)
    picture = cv2.GaussianBlur(noise, (0, 0), 2.0)
    picture = (picture - picture.min()) / (picture.max() - picture.min())
    return (picture * 255).astype(np.uint8)


def test_psnr_of_a_constant_error_is_the_textbook_number():
    real = np.full((3, 4, 5, 3), 100, np.uint8)
    generated = real.copy()
    generated[1] += 16
    generated[2] -= 1
    want = [metrics.PSNR_CAP, 20 * math.log10(255 / 16), 20 * math.log10(255)]
    np.testing.assert_allclose(metrics.psnr(real, generated), want)


def test_psnr_counts_a_range_of_two_for_floats():
    real = torch.zeros(2, 4, 4, 3)
    np.testing.assert_allclose(metrics.psnr(real, real + 0.2), [20, 20], rtol=1e-6)
    assert metrics.psnr(_frames(2, 5, 12, 12), _frames(2, 5, 12, 12)).shape == (2, 5)


def test_uint8_and_float_frames_give_the_same_numbers():
    a, b = _frames(2, 16, 16), _frames(2, 16, 16)
    fa, fb = (x / 127.5 - 1 for x in (a, b))
    for measure in (metrics.psnr, metrics.ssim):
        np.testing.assert_allclose(measure(a, b), measure(fa, fb), rtol=1e-6)
    np.testing.assert_allclose(metrics.saturation(a), metrics.saturation(fa), rtol=1e-6)


def _ssim_by_sums(x: np.ndarray, y: np.ndarray) -> float:
    """One window of 11x11, one colour in [0, 1]: Wang et al. eq. 13 written out with weighted sums."""
    g = [math.exp(-((i - 5) ** 2) / 4.5) for i in range(11)]
    total = sum(a * b for a in g for b in g)
    mx = my = xx = yy = xy = 0.0
    for i in range(11):
        for j in range(11):
            w = g[i] * g[j] / total
            mx, my = mx + w * x[i, j], my + w * y[i, j]
    for i in range(11):
        for j in range(11):
            w = g[i] * g[j] / total
            xx += w * (x[i, j] - mx) ** 2
            yy += w * (y[i, j] - my) ** 2
            xy += w * (x[i, j] - mx) * (y[i, j] - my)
    return (2 * mx * my + 1e-4) * (2 * xy + 9e-4) / ((mx * mx + my * my + 1e-4) * (xx + yy + 9e-4))


def test_ssim_equals_the_written_out_sum():
    a, b = _frames(1, 11, 12), _frames(1, 11, 12)
    want = np.mean(
        [_ssim_by_sums(a[0, :, k : k + 11, c] / 255, b[0, :, k : k + 11, c] / 255) for c in range(3) for k in (0, 1)]
    )
    np.testing.assert_allclose(metrics.ssim(a, b), [want], rtol=1e-9)


def test_ssim_limits():
    frame = _frames(2, 3, 24, 20)
    np.testing.assert_allclose(metrics.ssim(frame, frame), np.ones((2, 3)))
    black, white = np.zeros((1, 16, 16, 3), np.uint8), np.full((1, 16, 16, 3), 255, np.uint8)
    # Flat pictures have no structure left, only the luminance term: C1 / (1 + C1).
    np.testing.assert_allclose(metrics.ssim(black, white), [1e-4 / (1 + 1e-4)], rtol=1e-6)
    with pytest.raises(ValueError, match="11x11"):
        metrics.ssim(_frames(1, 8, 20), _frames(1, 8, 20))


def test_ms_ssim_of_two_scales_is_the_weighted_product():
    a, b = _frames(1, 24, 30), _frames(1, 24, 30)
    b = (0.7 * a + 0.3 * b).astype(np.uint8)
    planes = [torch.from_numpy(x[0] / 255.0).permute(2, 0, 1) for x in (a, b)]
    _, fine = metrics._similarity(*planes)
    halves = [torch.nn.functional.avg_pool2d(x, 2) for x in planes]
    luminance, coarse = metrics._similarity(*halves)
    first, second = (w / (0.0448 + 0.2856) for w in (0.0448, 0.2856))
    want = (fine.mean((1, 2)) ** first * (luminance * coarse).mean((1, 2)) ** second).mean()
    np.testing.assert_allclose(metrics.ms_ssim(a, b), [want], rtol=1e-9)


def test_ms_ssim_of_the_same_is_one_and_falls_with_noise():
    real = np.stack([_scene(160)] * 2)
    noise = np.random.default_rng(1).normal(0, 1, real.shape)
    noisy = [np.clip(real + level * noise, 0, 255).astype(np.uint8) for level in (5, 20, 80)]
    np.testing.assert_allclose(metrics.ms_ssim(real, real), [1, 1])
    scores = [metrics.ms_ssim(real, frames).mean() for frames in noisy]
    assert 1 > scores[0] > scores[1] > scores[2] >= 0
    # A one-pixel shift breaks the finest scale most, which MS-SSIM weighs least.
    assert metrics.ms_ssim(real, np.roll(real, 1, 2)).mean() > metrics.ssim(real, np.roll(real, 1, 2)).mean()
    with pytest.raises(ValueError, match="11x11"):
        metrics.ms_ssim(_frames(1, 8, 20), _frames(1, 8, 20))


def test_ms_ssim_of_pictures_of_one_scale_is_ssim():
    a, b = _frames(1, 16, 20), _frames(1, 16, 20)
    b = (0.8 * a + 0.2 * b).astype(np.uint8)
    terms = [metrics._similarity(*(torch.from_numpy(x[0, ..., c] / 255.0)[None] for x in (a, b))) for c in range(3)]
    want = np.mean([(luminance * structure).mean() for luminance, structure in terms])
    np.testing.assert_allclose(metrics.ms_ssim(a, b), [want], rtol=1e-9)
    np.testing.assert_allclose(metrics.ms_ssim(a, b), metrics.ssim(a, b), rtol=1e-9)


def test_frechet_distance_of_known_gaussians():
    mean1, mean2 = np.array([0.0, 1.0]), np.array([3.0, 1.0])
    one, two = np.diag([4.0, 1.0]), np.diag([1.0, 9.0])
    # Axis-aligned: |mu|^2 plus the squared differences of the deviations.
    assert metrics.gaussian_distance(mean1, one, mean2, two) == pytest.approx(9 + (2 - 1) ** 2 + (1 - 3) ** 2)
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    turned = [turn @ c @ turn.T for c in (one, two)]
    assert metrics.gaussian_distance(turn @ mean1, turned[0], turn @ mean2, turned[1]) == pytest.approx(14)
    assert metrics.gaussian_distance(mean1, one, mean1, one) == pytest.approx(0, abs=1e-9)
    rng = np.random.default_rng(0)
    first, second = (rng.multivariate_normal(m, c, 40000) for m, c in ((mean1, one), (mean2, two)))
    assert metrics.frechet_distance(first, second) == pytest.approx(14, rel=0.03)
    assert metrics.frechet_distance(first, second) == pytest.approx(metrics.frechet_distance(second, first))
    with pytest.raises(ValueError, match="2 rows"):
        metrics.frechet_distance(first[:1], second)
    with pytest.raises(ValueError, match="one network"):
        metrics.frechet_distance(first, second[:, :1])


@pytest.mark.parametrize("measure", [metrics.laplacian_variance, metrics.saturation])
def test_many_frames_at_once_measure_as_one_by_one(measure):
    films = np.random.default_rng(3).integers(0, 256, (2, 11, 12, 10, 3), dtype=np.uint8)
    together = measure(films)
    assert together.shape == (2, 11)
    np.testing.assert_array_equal(together, [[measure(frame) for frame in film] for film in films])
    assert measure(films[:, :0]).shape == (2, 0)


def test_laplacian_variance_equals_opencv():
    frame = _frames(1, 24, 30)
    luma = (frame[0] @ metrics.LUMA).astype(np.float64)
    want = cv2.Laplacian(luma, cv2.CV_64F, ksize=1)[1:-1, 1:-1].var()
    np.testing.assert_allclose(metrics.laplacian_variance(frame), [want], rtol=1e-9)


def test_sharpness_falls_with_blur_and_names_flat_references():
    real = _scene(200)[None]
    blurred = cv2.GaussianBlur(real[0], (0, 0), 2.0)[None]
    assert metrics.sharpness(real, real) == 1
    assert 0 < metrics.sharpness(blurred, real) < 0.5
    with pytest.raises(ValueError, match="flat"):
        metrics.sharpness(real, np.zeros_like(real))


def test_saturation_by_hand():
    frame = np.zeros((1, 1, 4, 3), np.uint8)
    frame[0, 0] = [[255, 0, 0], [200, 100, 100], [50, 50, 50], [0, 0, 0]]
    np.testing.assert_allclose(metrics.saturation(frame), [(1 + 0.5 + 0 + 0) / 4])


def test_freeze_rate_counts_only_steps_that_should_move():
    frames = np.zeros((5, 4, 4, 3), np.uint8)
    frames[1:] += 10
    frames[3:] += 10
    assert metrics.freeze_rate(frames) == 0.5
    assert metrics.freeze_rate(frames, moving=[True, False, True, True]) == pytest.approx(1 / 3)
    assert math.isnan(metrics.freeze_rate(frames, moving=[False] * 4))
    with pytest.raises(ValueError, match="moving"):
        metrics.freeze_rate(frames, moving=[True])


def test_boundary_jump_finds_the_seam():
    values = np.cumsum([0, 8, 2, 2, 2, 8, 2, 2, 2])
    frames = np.broadcast_to(values[:, None, None, None], (9, 4, 4, 3)).astype(np.uint8)
    assert metrics.boundary_jump(frames) == pytest.approx(4)
    assert math.isnan(metrics.boundary_jump(np.zeros((9, 4, 4, 3), np.uint8)))


@pytest.mark.parametrize("step", [-6, -3, 0, 2, 5])
def test_horizontal_shift_of_shifted_crops(step):
    scene = _scene(260)
    frames = np.stack([scene[:, 50 - step * n : 210 - step * n] for n in range(4)])
    np.testing.assert_allclose(metrics.horizontal_shift(frames), step, atol=0.3)


def test_horizontal_shift_of_a_turning_pinhole_camera():
    """A wall of texture at infinity, rendered by rotating the camera 3 degrees left a frame."""
    focal, degrees = 66.67, 3.0
    panorama = _scene(1440)
    rows, columns = np.mgrid[0:96, 0:160]
    frames = []
    for n in range(4):
        angle = np.rad2deg(np.arctan((columns - 80) / focal)) - n * degrees
        frames.append(panorama[rows, ((angle + 180) * 4).astype(int) % 1440])
    want = metrics.pinhole_shift(degrees, focal)
    assert want == pytest.approx(3.494, abs=1e-3)
    assert metrics.horizontal_shift(np.stack(frames)) == pytest.approx([want] * 3, rel=0.2)


def test_flat_frames_have_no_shift():
    assert metrics.horizontal_shift(np.full((3, 32, 32, 3), 90, np.uint8)).tolist() == [0, 0]


def test_horizon_frames_are_those_of_the_latent_frame():
    spans = [metrics.horizon_frames(s) for s in (0.25, 1, 4)]
    assert [(s.start, s.stop) for s in spans] == [(1, 5), (13, 17), (61, 65)]
    with pytest.raises(ValueError, match="multiples"):
        metrics.horizon_frames(0.3)


def test_horizon_table_reads_the_right_frames_and_drops_what_is_too_long():
    real = np.full((2, 33, 12, 12, 3), 100, np.uint8)
    real[:, :, ::2] = 140
    generated = real.copy()
    generated[:, 13:17] += 10
    rows = metrics.horizon_table(real, generated)
    assert [row.seconds for row in rows] == [0.25, 1, 2]
    assert [round(row.psnr.mean, 3) for row in rows] == [100, round(20 * math.log10(25.5), 3), 100]
    assert [row.sharpness.mean for row in rows] == pytest.approx([1, 1, 1])
    assert rows[0].psnr.n == 2
    base = metrics.horizon_table(real, metrics.copy_first_frame(real))
    assert all(row.psnr.mean == 100 for row in base)


def test_copy_first_frame_repeats():
    clip = _frames(2, 5, 12, 12)
    copied = metrics.copy_first_frame(clip)
    assert copied.shape == clip.shape
    assert (copied == clip[:, :1]).all()


def test_bootstrap_interval_is_seeded_and_has_the_width_of_the_normal_one():
    values = np.random.default_rng(1).normal(5, 2, 400)
    one, two = metrics.bootstrap_mean(values, seed=7), metrics.bootstrap_mean(values, seed=7)
    assert one == two and one.n == 400
    half = 1.96 * values.std() / math.sqrt(400)
    assert (one.high - one.low) / 2 == pytest.approx(half, rel=0.08)
    assert one.mean == pytest.approx(values.mean())
    with pytest.raises(ValueError, match="not finite"):
        metrics.bootstrap_mean([1.0, float("inf")])


def test_paired_difference_sees_what_unpaired_means_hide():
    rng = np.random.default_rng(2)
    clip = rng.normal(18, 4, 60)
    gap = metrics.bootstrap_difference(clip + 0.5 + rng.normal(0, 0.3, 60), clip)
    assert gap.low > 0
    assert metrics.bootstrap_mean(clip).high - metrics.bootstrap_mean(clip).low > 1


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((2, 3, 4, 4), np.uint8), "height, width, 3"),
        (np.zeros((2, 4, 4, 3), np.int64), "int64"),
        (np.full((2, 4, 4, 3), 200.0), "clamp"),
    ],
)
def test_wrong_frames_are_named(frames, message):
    with pytest.raises(ValueError, match=message):
        metrics.psnr(frames, frames)


def test_shapes_must_match():
    with pytest.raises(ValueError, match="differ in shape"):
        metrics.psnr(_frames(2, 12, 12), _frames(3, 12, 12))
