"""Numbers that compare generated frames with real ones.

Frames are `[..., H, W, 3]`, either uint8 (0..255) or floating point in [-1, 1], NumPy or torch; results are NumPy
float64. This module knows nothing of models: it sees frames only. PSNR rewards blur, so it never stands without
`sharpness` beside it.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from lingbot_nb.presets import FPS, TIME_STRIDE

LUMA = np.array([0.299, 0.587, 0.114])
"""Rec. 601 weights of red, green, blue."""
FEW = 8
"""Frames that are measured at a time where each stands for itself."""
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Weights of MS-SSIM's scales, finest first (Wang et al. 2003)."""
PSNR_CAP = 100.0
"""PSNR of identical frames in dB: infinity would spoil every mean."""


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval; `n` counts the values it came from."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class Horizon:
    """One row of `horizon_table`: PSNR in dB and sharpness relative to the real frames, `seconds` after the start."""

    seconds: float
    psnr: Interval
    ssim: Interval
    sharpness: Interval


def psnr(real, generated) -> np.ndarray:
    """Peak signal-to-noise ratio in dB of every frame, shape [...] for frames [..., H, W, 3]; at most PSNR_CAP."""
    error = (_unit(real) - _matching(real, generated)) ** 2
    mse = error.mean(axis=(-3, -2, -1))
    return np.minimum(-10 * np.log10(np.maximum(mse, 1e-30)), PSNR_CAP)


def ssim(real, generated) -> np.ndarray:
    """Structural similarity of every frame in [-1, 1], the mean over pixels and colours.

    Gaussian window of 11 pixels, deviation 1.5, K1 0.01, K2 0.03 (Wang et al. 2004, eq. 13); only pixels whose whole
    window lies inside the picture count. Raises ValueError for pictures below 11 pixels.
    """
    lead, x, y = _planes(real, generated)
    luminance, structure = _similarity(x, y)
    return (luminance * structure).mean(dim=(-2, -1)).reshape(-1, 3).mean(-1).numpy().reshape(lead)


def ms_ssim(real, generated) -> np.ndarray:
    """Multi-scale structural similarity of every frame in [0, 1] (Wang et al. 2003, eq. 7), the mean over colours.

    The paper's five scales need 176 pixels. Smaller pictures get the scales at which SSIM's window still fits (four at
    96x160), with the paper's weights of those divided by their sum: numbers of different picture sizes do not compare.
    Negative structure terms count as 0. Raises ValueError for pictures below 11 pixels.
    """
    lead, x, y = _planes(real, generated)
    scales = min(len(SCALES), int(np.log2(min(x.shape[-2:]) / 11)) + 1)
    weights = np.array(SCALES[:scales]) / sum(SCALES[:scales])
    score = torch.ones(len(x), dtype=x.dtype)
    for scale, weight in enumerate(weights):
        luminance, structure = _similarity(x, y)
        last = scale == scales - 1
        term = (luminance * structure if last else structure).mean(dim=(-2, -1))
        score = score * term.clamp_min(0) ** weight
        x, y = (torch.nn.functional.avg_pool2d(plane[:, None], 2)[:, 0] for plane in (x, y))
    return score.reshape(-1, 3).mean(-1).numpy().reshape(lead)


def laplacian_variance(frames) -> np.ndarray:
    """Variance of the 4-neighbour Laplacian of the luma (0..255) of every frame; the border row is left out."""
    return _by_few(_laplacian_variance, frames)


def _laplacian_variance(frames) -> np.ndarray:
    luma = _unit(frames) @ LUMA * 255
    centre = luma[..., 1:-1, 1:-1]
    around = luma[..., :-2, 1:-1] + luma[..., 2:, 1:-1] + luma[..., 1:-1, :-2] + luma[..., 1:-1, 2:]
    return (around - 4 * centre).var(axis=(-2, -1))


def sharpness(generated, real) -> float:
    """Fine detail left in `generated`: its mean Laplacian variance over that of `real` (1 = as sharp as real).

    A ratio of means, because a single flat frame (a wall) would give a ratio of nothing by nothing. The two need not
    be the same frames or the same number of them. Raises ValueError when `real` has no detail at all.
    """
    reference = float(laplacian_variance(real).mean())
    if reference == 0:
        raise ValueError("the real frames are flat, so sharpness has no reference: use frames that show something")
    return float(laplacian_variance(generated).mean()) / reference


def saturation(frames) -> np.ndarray:
    """Mean HSV saturation of every frame in [0, 1]: (max - min) / max over the colours, 0 where black."""
    return _by_few(_saturation, frames)


def _saturation(frames) -> np.ndarray:
    red, green, blue = np.moveaxis(_unit(frames), -1, 0)
    high, low = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    return np.divide(high - low, high, out=np.zeros_like(high), where=high > 0).mean(axis=(-2, -1))


def frame_difference(frames) -> np.ndarray:
    """Mean absolute difference (0..255) of every frame [N, H, W, 3] to the one before: shape [N - 1]."""
    return np.abs(np.diff(_unit(frames), axis=-4)).mean(axis=(-3, -2, -1)) * 255


def freeze_rate(frames, moving=None, threshold: float = 0.25) -> float:
    """Share of steps in [0, 1] whose picture stays the same: `frame_difference` below `threshold` (of 255).

    `moving`, bool [N - 1], limits the count to steps in which something should move (a key is held): standing still
    is no fault when nobody walks. NaN when no step counts.
    """
    frozen = frame_difference(frames) < threshold
    if moving is not None:
        moving = np.asarray(moving, dtype=bool)
        if moving.shape != frozen.shape:
            raise ValueError(f"moving has shape {moving.shape}, the steps between frames {frozen.shape}")
        frozen = frozen[moving]
    return float(frozen.mean()) if frozen.size else float("nan")


def boundary_jump(frames, period: int = TIME_STRIDE, first: int = 1) -> float:
    """How much more the picture changes where a chunk begins than inside chunks: a ratio, 1 = no seam.

    `period` = pixel frames a chunk, `first` = pixel frames before the second chunk. NaN without any change inside.
    """
    change = frame_difference(frames)
    starts = (np.arange(1, len(change) + 1) - first) % period == 0
    inside = change[~starts].mean() if (~starts).any() else 0.0
    return float(change[starts].mean() / inside) if inside > 0 and starts.any() else float("nan")


def horizontal_shift(frames, middle: float = 0.5) -> np.ndarray:
    """Pixels that the picture moves to the right at every step of [N, H, W, 3]: shape [N - 1], sub-pixel.

    Phase correlation of the luma over the `middle` share of the width (a turn shifts the borders further than the
    centre). Positive = content moves right = the camera turns left. Shifts beyond half of that width cannot be told.
    """
    luma = _unit(frames) @ LUMA
    width = luma.shape[-1]
    cut = int(width * (1 - middle) / 2)
    luma = luma[..., cut : width - cut]
    return np.array([_phase_shift(before, after) for before, after in zip(luma[:-1], luma[1:], strict=True)])


def pinhole_shift(degrees, focal: float) -> np.ndarray:
    """Pixels that the picture's centre moves right when the camera turns left by `degrees`: focal * tan(degrees)."""
    return focal * np.tan(np.deg2rad(degrees))


def copy_first_frame(real):
    """The baseline that any model must beat: the first frame of [..., N, H, W, 3], repeated."""
    return np.broadcast_to(_array(real)[..., :1, :, :, :], np.shape(real))


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Squared Frechet distance between two sets of features [n, D] and [m, D], each taken for a Gaussian.

    |mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) (Dowson and Landau 1982; FID, Heusel et al. 2017). It falls with more
    samples: compare only sets of equal size, and print how many. Raises ValueError for fewer than two samples or
    features of two widths.
    """
    moments = []
    for features in (first, second):
        features = np.asarray(features, dtype=np.float64)
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"features have shape {list(features.shape)}: give at least 2 rows of one width")
        moments.append((features.mean(0), np.atleast_2d(np.cov(features, rowvar=False))))
    return gaussian_distance(*moments[0], *moments[1])


def gaussian_distance(mean1: np.ndarray, covariance1: np.ndarray, mean2: np.ndarray, covariance2: np.ndarray) -> float:
    """`frechet_distance` of two Gaussians that are known: means [D], covariances [D, D]."""
    if np.shape(mean1) != np.shape(mean2):
        raise ValueError(f"features are {len(mean1)} and {len(mean2)} wide: use one network for both sets")
    root = _root(covariance1)
    # (C1 C2)^(1/2) has the trace of (R C2 R)^(1/2) with R = C1^(1/2), which is symmetric.
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ covariance2 @ root), 0, None)).sum()
    apart = float(((np.asarray(mean1) - np.asarray(mean2)) ** 2).sum())
    return max(0.0, apart + float(np.trace(covariance1) + np.trace(covariance2) - 2 * cross))


def horizon_frames(seconds: float) -> slice:
    """Pixel frames of the latent frame that ends `seconds` after the start: 0.25 s -> 1..4, 1 s -> 13..16."""
    latent = round(seconds * FPS / TIME_STRIDE)
    if latent < 1 or abs(latent - seconds * FPS / TIME_STRIDE) > 1e-6:
        raise ValueError(
            f"horizon {seconds} s is no whole number of latent frames: use multiples of {TIME_STRIDE / FPS}"
        )
    return slice(TIME_STRIDE * (latent - 1) + 1, TIME_STRIDE * latent + 1)


def horizon_table(real, generated, seconds: Sequence[float] = (0.25, 1, 2, 4), seed: int = 0) -> list[Horizon]:
    """PSNR, SSIM and sharpness at several distances from the start, each with its 95 % interval over clips.

    `real`, `generated`: equally many clips [N, H, W, 3] (a stacked array or an iterable of arrays) that start from the
    same frame. A cell is the mean over the four pixel frames of the latent frame that ends at that time; horizons
    beyond the shortest clip are left out. `copy_first_frame(real)` as `generated` gives the baseline's table.
    """
    pairs = [(_array(a), _array(b)) for a, b in zip(real, generated, strict=True)]
    if not pairs:
        raise ValueError("no clips to compare: pass at least one real and one generated clip")
    shortest = min(min(len(a), len(b)) for a, b in pairs)
    spans = [(s, horizon_frames(s)) for s in seconds]
    return [_horizon(s, [(a[span], b[span]) for a, b in pairs], seed) for s, span in spans if span.stop <= shortest]


def bootstrap_mean(values: Iterable[float], seed: int = 0, level: float = 0.95, resamples: int = 4000) -> Interval:
    """Mean of `values` with its percentile bootstrap interval (Efron 1979); the same seed gives the same interval.

    To compare two rows that share clips, pass the paired differences: see `bootstrap_difference`.
    """
    values = np.asarray(list(values), dtype=float)
    if values.size == 0 or not np.isfinite(values).all():
        raise ValueError(f"bootstrap of {values.size} values, {int((~np.isfinite(values)).sum())} of them not finite")
    draws = np.random.default_rng(seed).integers(0, values.size, size=(resamples, values.size))
    low, high = np.quantile(values[draws].mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values.mean()), float(low), float(high), values.size)


def bootstrap_difference(first: Iterable[float], second: Iterable[float], seed: int = 0, **options) -> Interval:
    """Mean of first - second over pairs (same clip, same keys) with its interval: 0 outside it = they differ."""
    pairs = list(zip(first, second, strict=True))
    return bootstrap_mean([a - b for a, b in pairs], seed, **options)


def _horizon(seconds: float, pairs: list[tuple[np.ndarray, np.ndarray]], seed: int) -> Horizon:
    detail = float(np.mean([laplacian_variance(real).mean() for real, _ in pairs]))
    # One reference for all clips: per-clip ratios would let a single flat wall decide the mean.
    sharp = [laplacian_variance(generated).mean() / max(detail, 1e-12) for _, generated in pairs]
    return Horizon(
        seconds,
        bootstrap_mean([psnr(a, b).mean() for a, b in pairs], seed),
        bootstrap_mean([ssim(a, b).mean() for a, b in pairs], seed),
        bootstrap_mean(sharp, seed),
    )


def _array(frames) -> np.ndarray:
    return frames.detach().cpu().numpy() if isinstance(frames, torch.Tensor) else np.asarray(frames)


def _by_few(measure: Callable[[np.ndarray], np.ndarray], frames) -> np.ndarray:
    """A number for every frame [..., H, W, 3], a few frames at a time: a long film in float64 does not fit into a
    processor's cache, and takes eight times as long."""
    array = _array(frames)
    if array.ndim < 4:
        return measure(array)
    flat = array.reshape(-1, *array.shape[-3:])
    parts = [measure(flat[i : i + FEW]) for i in range(0, max(1, len(flat)), FEW)]
    return np.concatenate(parts).reshape(array.shape[:-3])


def _unit(frames) -> np.ndarray:
    """float64 frames in [0, 1]; ValueError when the last axis is not RGB or floats leave [-1, 1]."""
    array = _array(frames)
    if array.ndim < 3 or array.shape[-1] != 3:
        raise ValueError(f"frames have shape {array.shape}: expected [..., height, width, 3]")
    if array.dtype == np.uint8:
        return array / 255.0
    if not np.issubdtype(array.dtype, np.floating):
        raise ValueError(f"frames are {array.dtype}: use uint8 (0..255) or floating point in [-1, 1]")
    if array.size and np.abs(array).max() > 1.001:
        raise ValueError(f"frames reach {np.abs(array).max():.3g}: floating-point frames lie in [-1, 1], clamp them")
    return (array.astype(np.float64) + 1) / 2


def _matching(real, generated) -> np.ndarray:
    if np.shape(real) != np.shape(generated):
        raise ValueError(
            f"real frames {tuple(np.shape(real))} and generated {tuple(np.shape(generated))} differ in shape"
        )
    return _unit(generated)


def _planes(real, generated) -> tuple[tuple[int, ...], torch.Tensor, torch.Tensor]:
    """The frames' leading axes, and both sets as planes of one colour [n * 3, H, W] in [0, 1]."""
    x, y = _unit(real), _matching(real, generated)
    lead, (height, width) = x.shape[:-3], x.shape[-3:-1]
    if min(height, width) < 11:
        raise ValueError(f"SSIM needs pictures of at least 11x11 pixels, not {height}x{width}: use psnr instead")
    x, y = (torch.from_numpy(a).reshape(-1, height, width, 3).permute(0, 3, 1, 2).flatten(0, 1) for a in (x, y))
    return lead, x, y


def _similarity(x_NHW: torch.Tensor, y_NHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """SSIM's luminance term and its contrast and structure term, at every pixel whose window lies inside."""
    mean_x, mean_y = _blur(x_NHW), _blur(y_NHW)
    var_x, var_y = _blur(x_NHW * x_NHW) - mean_x**2, _blur(y_NHW * y_NHW) - mean_y**2
    covariance = _blur(x_NHW * y_NHW) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    return (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1), (2 * covariance + c2) / (var_x + var_y + c2)


def _root(matrix: np.ndarray) -> np.ndarray:
    """The symmetric square root of a covariance."""
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T


def _blur(x_NHW: torch.Tensor) -> torch.Tensor:
    """SSIM's Gaussian window over every place where it lies inside. As two products with banded matrices: fp64
    convolutions of one channel take a CPU core three times as long."""
    down, across = (_window_rows(size, x_NHW.dtype) for size in x_NHW.shape[-2:])
    return down @ x_NHW @ across.T


@lru_cache(maxsize=16)
def _window_rows(size: int, dtype: torch.dtype) -> torch.Tensor:
    """The window at each of the `size` - 10 places along a line, as rows [size - 10, size]."""
    offsets = torch.arange(-5, 6, dtype=dtype)
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = window / window.sum()
    rows = torch.zeros(size - 10, size, dtype=dtype)
    for place, row in enumerate(rows):
        row[place : place + 11] = window
    return rows


def _phase_shift(before_HW: np.ndarray, after_HW: np.ndarray) -> float:
    height, width = before_HW.shape
    window = np.hanning(height)[:, None] * np.hanning(width)[None]
    a, b = (np.fft.fft2((x - x.mean()) * window) for x in (before_HW, after_HW))
    cross = b * a.conj()
    magnitude = np.abs(cross)
    if magnitude.max() < 1e-12:
        return 0.0
    # Bins without energy carry only rounding noise; a floor keeps whitening from raising them to full weight.
    peak = np.fft.ifft2(cross / (magnitude + 1e-3 * magnitude.max())).real
    row = peak[np.unravel_index(peak.argmax(), peak.shape)[0]]
    at = int(row.argmax())
    left, centre, right = row[at - 1], row[at], row[(at + 1) % width]
    curve = left - 2 * centre + right
    shift = at + (0.5 * (left - right) / curve if curve < 0 else 0.0)
    return float((shift + width / 2) % width - width / 2)
