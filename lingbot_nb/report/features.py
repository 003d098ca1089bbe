"""Distances between films in the judge's features, and the public ones where a user has installed them.

The learned distances know this world's pictures and no others: they rank films of the corpus that the judge was trained
on, and are not comparable with LPIPS, FID or FVD elsewhere. Frames are uint8 [..., H, W, 3].
"""

import importlib.util
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from lingbot_nb.presets import FPS, TIME_STRIDE
from lingbot_nb.report.judge import Judge, Reading, pictures
from lingbot_nb.report.metrics import gaussian_distance, laplacian_variance

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Two equally shaped sets of frames [..., H, W, 3] -> a distance for each frame, [...]."""
SECOND = FPS // TIME_STRIDE
"""Chunks of one latent frame in a second."""


@torch.no_grad()
def perceptual_distance(judge: Judge, first: np.ndarray, second: np.ndarray, size: int = 64) -> np.ndarray:
    """How different two pictures look to the judge's trunk: 0 for the same, at most 4; shape [...] of the frames.

    LPIPS (Zhang et al. 2018, eq. 1) without learned weights: features of three layers, each cell's channels scaled to
    length 1, squared differences summed over channels and averaged over cells, then over layers. `size` frames go
    through at a time. Raises ValueError for frames of different shapes.
    """
    if np.shape(first) != np.shape(second):
        raise ValueError(f"frames {np.shape(first)} and {np.shape(second)} differ in shape: compare equal cuts")
    lead = np.shape(first)[:-3]
    flat = [np.reshape(frames, (-1, *np.shape(frames)[-3:])) for frames in (first, second)]
    parts = [_distance(judge, *(x[i : i + size] for x in flat)) for i in range(0, len(flat[0]), size)]
    return np.concatenate(parts).reshape(lead)


def _distance(judge: Judge, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    layers = zip(*(judge.trunk(pictures(frames, judge.device)) for frames in (first, second)), strict=True)
    apart = [(F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean((1, 2)) for a, b in layers]
    return torch.stack(apart).mean(0).double().cpu().numpy()


def diversity(distance: Distance, films: np.ndarray) -> float:
    """Mean distance between films [K, N, H, W, 3] that began alike under different seeds, over all pairs and frames.

    0: the seed changes nothing. Where the keys alone decide what happens, as in a simulator, that is right. Raises
    ValueError for fewer than two films.
    """
    if len(films) < 2:
        raise ValueError(f"{len(films)} films have no pairs: give at least two seeds of one start")
    pairs = itertools.combinations(range(len(films)), 2)
    return float(np.mean([distance(films[i], films[j]).mean() for i, j in pairs]))


def corpus_distance(judge: Judge, frame_features: np.ndarray) -> np.ndarray:
    """How far frame features [..., 64] lie from those of the judge's corpus: about 1 for its own frames, shape [...].

    Mahalanobis distance over the square root of the number of features; a tenth of a percent of the mean variance
    keeps empty directions from deciding.
    """
    mean, covariance = _corpus(judge)
    away = np.asarray(frame_features, np.float64) - mean
    solved = np.linalg.solve(covariance, away.reshape(-1, len(mean)).T).T.reshape(away.shape)
    return np.sqrt((away * solved).sum(-1) / len(mean))


NEAREST = 8
"""Real pictures that tell how much fine detail a picture like them has."""
FEWEST = 256
"""Real pictures below which nothing like a given one need be among them."""


class LikeViews:
    """Real pictures by what they show: how much fine detail a picture of such a view has in the simulator.

    Sharpness over a first second's depends on where a walk leads: a wall close by has little to show. Over that of real
    views like it, it depends on the model alone. `films` u8 [B, 4n + 1, H, W, 3] are real ones.
    """

    def __init__(self, judge: Judge, films: np.ndarray):
        self.mean, covariance = _corpus(judge)
        self.white = np.linalg.cholesky(np.linalg.inv(covariance))
        self.views = self._white(judge.read(films).frames).reshape(-1, len(self.mean))
        self.detail = still_detail(films).ravel()

    def __len__(self) -> int:
        return len(self.views)

    def _white(self, frame_features: np.ndarray) -> np.ndarray:
        """Features in which `corpus_distance` is the plain one."""
        return (np.asarray(frame_features, np.float64) - self.mean) @ self.white

    def expected(self, frame_features: np.ndarray) -> np.ndarray:
        """Laplacian variance due to pictures of these features [..., 64]: the geometric mean over the `NEAREST` real
        ones; shape [...]."""
        wanted = self._white(frame_features).reshape(-1, len(self.mean))
        found = []
        for some in np.array_split(wanted, max(1, len(wanted) // 1024)):
            away = (self.views**2).sum(1) - 2 * some @ self.views.T
            nearest = np.argpartition(away, NEAREST - 1, axis=1)[:, :NEAREST]
            found.append(np.exp(np.log(np.maximum(self.detail[nearest], 1e-9)).mean(1)))
        return np.concatenate(found).reshape(np.shape(frame_features)[:-1])


def still_detail(films: np.ndarray) -> np.ndarray:
    """Laplacian variance of the pictures that the judge reads off films [B, 4n + 1, H, W, 3]: [B, n + 1]."""
    return np.stack([laplacian_variance(film[::TIME_STRIDE]) for film in films])


def corpus_frechet(judge: Judge, frame_features: np.ndarray) -> float:
    """The FID-like distance of frame features [n, 64] to the judge's corpus: needs no real films beside the generated
    ones. It falls with more frames (see `metrics.frechet_distance`)."""
    mean, covariance = _corpus(judge)
    features = np.asarray(frame_features, np.float64)
    return gaussian_distance(features.mean(0), np.cov(features, rowvar=False), mean, covariance)


def _corpus(judge: Judge) -> tuple[np.ndarray, np.ndarray]:
    mean = judge.corpus_mean.double().cpu().numpy()
    covariance = judge.corpus_covariance.double().cpu().numpy().reshape(len(mean), len(mean))
    return mean, covariance + 1e-3 * np.trace(covariance) / len(mean) * np.eye(len(mean))


def second_features(reading: Reading) -> np.ndarray:
    """What the FVD-like distance compares: for each whole second of each film, the mean of its frames' features and of
    its pairs', [films * seconds, 128]. Pairs see motion: a film of good stills that jumps lies far away."""
    count = reading.pairs.shape[1] // SECOND * SECOND
    parts = [x[:, :count] for x in (reading.frames[:, 1:], reading.pairs)]
    seconds = np.concatenate(parts, -1).reshape(len(reading.pairs), -1, SECOND, sum(p.shape[-1] for p in parts))
    return seconds.mean(2).reshape(-1, seconds.shape[-1])


# ---- what a user may have installed ----------------------------------------------------------------------------------


def lpips_distance(device: torch.device | str = "cpu") -> Distance | None:
    """LPIPS (AlexNet), where the `lpips` package and AlexNet's weights are on this machine; else None.

    Nothing is ever downloaded: without torchvision's weights in torch's hub folder, lpips itself would fetch them.
    """
    weights = Path(torch.hub.get_dir()) / "checkpoints" / "alexnet-owt-7be5be79.pth"
    if importlib.util.find_spec("lpips") is None or not weights.exists():
        return None
    import lpips

    network = lpips.LPIPS(net="alex", verbose=False).to(device).eval()

    @torch.no_grad()
    def distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        lead = first.shape[:-3]
        pairs = zip(*(x.reshape(-1, 1, *x.shape[-3:]) for x in (first, second)), strict=True)
        return np.array([network(*(pictures(x, device) for x in pair)).item() for pair in pairs]).reshape(lead)

    return distance


EXPORT_NOTE = """# Films for public metrics

One folder a model, the same walk under the same number. None of these tools is installed by this project, and all of
them fetch weights of their own.

VBench (what needs no prompt), a folder at a time:

    vbench evaluate --videos_path NAME --mode custom_input --dimension subject_consistency
    vbench evaluate --videos_path NAME --mode custom_input --dimension background_consistency
    vbench evaluate --videos_path NAME --mode custom_input --dimension motion_smoothness
    vbench evaluate --videos_path NAME --mode custom_input --dimension imaging_quality

FVD: any implementation that takes two folders; `simulator` is the real one.
"""


def export_films(folder: Path | str, films: dict[str, np.ndarray]) -> Path:
    """Writes label -> films [B, N, H, W, 3] as mp4s, a folder a label, with a note of commands for VBench and FVD."""
    from lingbot_nb.stream.movie import Movie

    folder = Path(folder)
    for label, some in films.items():
        for number, film in enumerate(some):
            movie = Movie(folder / label.replace(", ", "-").replace(" ", "-") / f"{number:03d}.mp4")
            for frame in film:
                movie.append(frame)
            movie.close()
    partial = folder / "README.md.partial"
    partial.write_text(EXPORT_NOTE)
    return partial.replace(folder / "README.md").parent
