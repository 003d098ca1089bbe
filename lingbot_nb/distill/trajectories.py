"""ODE pairs: where a teacher's probability-flow ODE takes a piece of noise, and regression onto its end.

A pair is a handful of states of one trajectory: at the student's noise levels and at the end, sigma = 0. The states are
those that the Euler solver really visits; a level between two of its steps is refused, not rounded. Pairs lie on disk
in shards, one per batch, that can be made by any number of processes and resumed after a kill.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor

from lingbot_nb.distill import flow
from lingbot_nb.distill.forcing import (
    Info,
    Velocity,
    check_lengths,
    gaussian,
    given_clean,
    hold_start,
    loss_frames,
    on_device,
    per_chunk,
    random_index,
)
from lingbot_nb.world.latents import Batch, LatentClips

# ---- integrating ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """How pairs are made: the solver's `steps` and `shift`, and the unshifted `labels` at which states are kept (the
    end is always kept).

    Raises ValueError when the solver does not visit a label.
    """

    steps: int
    shift: float
    labels: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)

    def __post_init__(self):
        object.__setattr__(self, "labels", tuple(self.labels))
        _ = self.kept

    @property
    def kept(self) -> list[int]:
        """Solver indices of the stored states, the last being the end."""
        wanted = torch.tensor([flow.shift(label, self.shift) for label in self.labels])
        return visited(flow.sigma_grid(self.steps, self.shift), wanted) + [self.steps]

    @property
    def sigmas(self) -> Tensor:
        """Noise levels of the stored states, S values falling to 0."""
        return flow.sigma_grid(self.steps, self.shift)[self.kept]


def visited(grid: Tensor, wanted: Sequence[float] | Tensor, tolerance: float = 1e-4) -> list[int]:
    """Index into `grid` of each wanted sigma; ValueError naming the nearest visited one when the grid misses it."""
    grid = torch.as_tensor(grid, dtype=torch.float64)
    indices = []
    for sigma in torch.as_tensor(wanted, dtype=torch.float64).tolist():
        distance = (grid - sigma).abs()
        index = int(distance.argmin())
        if distance[index] > tolerance:
            raise ValueError(
                f"a solver of {len(grid) - 1} steps does not visit sigma {sigma:.4f} (nearest {grid[index]:.4f}): "
                "use a number of steps that all unshifted labels divide, such as 48 for 1, 0.75, 0.5, 0.25"
            )
        indices.append(index)
    return indices


def solve(velocity: Velocity, noise_BCFHW: Tensor, schedule: Schedule) -> Tensor:
    """Integrates dx/dsigma = v(x, 1000·sigma) from noise at sigma = 1 by Euler; the stored states as B S C F H W."""
    grid = flow.sigma_grid(schedule.steps, schedule.shift)
    kept = set(schedule.kept)
    states = [x for i, (_, x) in enumerate(flow.euler(velocity, noise_BCFHW, grid)) if i in kept]
    return torch.stack(states, 1)


@torch.no_grad()
def teacher_trajectory(velocity: Velocity, noise_BCFHW: Tensor, schedule: Schedule) -> Tensor:
    """States of the bidirectional teacher, B S C F H W: all frames at one sigma, the first denoised like the others
    (CausVid, Yin et al. 2025, §4.2). `velocity` is guided already."""
    return solve(velocity, noise_BCFHW, schedule)


@torch.no_grad()
def causal_trajectory(
    velocity: Velocity, noise_BCFHW: Tensor, clean_BCFHW: Tensor, schedule: Schedule, known: int = 0
) -> Tensor:
    """States of the causal teacher given a clean past, B S C F H W (Causal-Forcing, arXiv 2602.02214).

    `velocity` reads [clean | noisy] under the teacher-forcing mask; a chunk's end then depends on its own noise and the
    clean past alone, so that regression has a function to learn. The first `known` frames stay at `clean`.
    """
    start = clean_BCFHW[:, :, :known]
    held = hold_start(given_clean(velocity, clean_BCFHW), start)
    return solve(held, torch.cat([start, noise_BCFHW[:, :, known:]], 2), schedule)


# ---- regression -----------------------------------------------------------------------------------------------------


def block_causal_regression(
    velocity: Velocity,
    states_BSCFHW: Tensor,
    sigmas: Tensor,
    lengths: Sequence[int],
    *,
    generator: torch.Generator,
    start: Tensor | None = None,
) -> tuple[Tensor, Info]:
    """CausVid's ODE regression: each chunk at its own random stored level, its history noisy at theirs.

    L = Σ_b mean || x0_theta(x^b_{sigma_b} | x^{<b}_{sigma_<b}) - x^b_0 ||², sigma_b uniform over the stored levels, the
    clean one included (such chunks are context and carry no loss). `velocity` runs under a block-causal mask.
    """
    return _regression(velocity, states_BSCFHW, sigmas, lengths, generator, start, clean_levels=1)


def clean_context_regression(
    velocity: Velocity,
    states_BSCFHW: Tensor,
    clean_BCFHW: Tensor,
    sigmas: Tensor,
    lengths: Sequence[int],
    *,
    generator: torch.Generator,
    start: Tensor | None = None,
) -> tuple[Tensor, Info]:
    """Causal-Forcing's ODE regression: the past clean, as the causal teacher had it.

    L = Σ_b mean || x0_theta(x^b_{sigma_b} | x0^{<b}) - Phi(x^b_{sigma_b}; x0^{<b}) ||², Phi the trajectory's end, not
    the real clip. `velocity` reads [clean | noisy] under the teacher-forcing mask. (The released code draws one level
    for all chunks; here noisy chunks do not see each other, so that one level each is the same loss with less noise.)
    """
    velocity = given_clean(velocity, clean_BCFHW)
    return _regression(velocity, states_BSCFHW, sigmas, lengths, generator, start, clean_levels=0)


def _regression(velocity, states, sigmas, lengths, generator, start, clean_levels: int) -> tuple[Tensor, Info]:
    batch, levels, _, frames = states.shape[:4]
    check_lengths(lengths, frames)
    if levels != len(sigmas) or float(sigmas[-1]) != 0:
        raise ValueError(f"pairs hold {levels} states but {len(sigmas)} sigmas were given, the last of which must be 0")
    known = 0 if start is None else start.shape[2]
    index = random_index(levels - 1 + clean_levels, (batch, len(lengths)), generator)
    index = per_chunk(index.to(states.device), lengths)
    sigma = on_device(sigmas.tolist(), torch.float32, states.device)[index]
    noisy, end = pick_states(states, index), states[:, -1]
    weight = (sigma > 0) * loss_frames(frames, known, states.device)
    if known:
        velocity = hold_start(velocity, start)
    error = (flow.x0_from_v(noisy, velocity(noisy, 1000 * sigma), sigma) - end).square()
    per_frame = error.float().mean((1, 3, 4))
    # All chunks may have drawn the clean level: then there is nothing to learn, not a division by zero.
    loss = (per_frame * weight).sum() / weight.sum().clamp(min=1)
    return loss, {"sigma": sigma.mean(), "regression_loss": loss.detach()}


def pick_states(states_BSCFHW: Tensor, index_BF: Tensor) -> Tensor:
    """One stored state per frame: out[b, :, f] = states[b, index[b, f], :, f]; B C F H W."""
    batch, _, channels, frames, height, width = states_BSCFHW.shape
    index = index_BF[:, None, None, :, None, None].expand(batch, 1, channels, frames, height, width)
    return states_BSCFHW.gather(1, index)[:, 0]


# ---- the store ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A shard read back: the batch it was made under (`latents` are the real clips) and its states B S C F H W."""

    batch: Batch
    states: Tensor


class PairStore:
    """A folder of trajectories: `store.json` says what they are, `pairs-000012.safetensors` holds shard 12 with its
    card `pairs-000012.json` (sha256). A card on disk means a whole shard; shards may be written in any order.

    Opening a folder made with another `preset`, `schedule` or `card` raises ValueError. States are kept as `dtype`.
    """

    def __init__(
        self,
        folder: Path | str,
        preset: str,
        schedule: Schedule,
        *,
        dtype: torch.dtype = torch.float32,
        **card: str | int | float | bool,
    ):
        self.folder, self.schedule, self.dtype = Path(folder), schedule, dtype
        self.header = json.loads(json.dumps({"preset": preset, **asdict(schedule), **card}))
        self._checked: set[int] = set()
        self._open()

    def _open(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "store.json"
        if not file.exists():
            write_text(file, json.dumps(self.header, indent=1) + "\n")
            return
        found = read_json(file)
        differing = sorted(k for k in found.keys() | self.header.keys() if found.get(k) != self.header.get(k))
        if differing:
            said = ", ".join(f"{k} {found.get(k)} instead of {self.header.get(k)}" for k in differing)
            raise ValueError(f"pairs in {self.folder} were made with {said}: use another folder or the same settings")

    def file(self, shard: int) -> Path:
        return self.folder / f"pairs-{shard:06d}.safetensors"

    @property
    def shards(self) -> list[int]:
        """Indices of the finished shards."""
        return sorted(int(card.stem.removeprefix("pairs-")) for card in self.folder.glob("pairs-*.json"))

    def missing(self, count: int, rank: int = 0, world: int = 1) -> list[int]:
        """Of shards 0…count-1, those that process `rank` of `world` still has to make."""
        done = set(self.shards)
        return [shard for shard in range(rank, count, world) if shard not in done]

    def write(self, shard: int, states_BSCFHW: Tensor, latents_BCFHW: Tensor) -> None:
        """Stores the states of one batch beside the batch's own latents, shard first, card last."""
        if states_BSCFHW.shape[1] != len(self.schedule.kept):
            raise ValueError(f"{states_BSCFHW.shape[1]} states for {len(self.schedule.kept)} kept levels: use solve")
        if not bool(states_BSCFHW.isfinite().all()):
            raise ValueError(f"shard {shard} holds nan or inf: the teacher diverged, nothing was written")
        tensors = {"states": states_BSCFHW, "latents": latents_BCFHW}
        data = save({name: tensor.detach().to(self.dtype).cpu().contiguous() for name, tensor in tensors.items()})
        write_bytes(self.file(shard), data)
        card = {"sha256": hashlib.sha256(data).hexdigest(), "pairs": len(states_BSCFHW)}
        write_text(self.file(shard).with_suffix(".json"), json.dumps(card) + "\n")

    def read(self, shard: int, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """`states` and `latents` of a shard, fp32; FileNotFoundError or ValueError (sha256) in a sentence."""
        file = self.file(shard)
        card = file.with_suffix(".json")
        if not card.exists() or not file.exists():
            raise FileNotFoundError(f"shard {shard} is not in {self.folder}: make the pairs first (notebook 03)")
        data = file.read_bytes()
        # Hashing costs more than reading: once a process is enough.
        if shard not in self._checked and hashlib.sha256(data).hexdigest() != read_json(card)["sha256"]:
            raise ValueError(f"shard {file} does not match its sha256: delete it and its card, and make it again")
        self._checked.add(shard)
        return {name: tensor.to(device).float() for name, tensor in load(data).items()}

    def pairs(self, batch_at: Callable[[int], Batch], generator: torch.Generator) -> Iterator[Pair]:
        """Random shards without end, each with its batch. Where it goes next lies in the generator alone; ranks that
        share it (`parallel.SharedGenerator`) go each their own way."""
        shards = self.shards
        if not shards:
            raise FileNotFoundError(f"no pairs in {self.folder}: make them first (notebook 03)")
        while True:
            at = int(random_index(len(shards), (1,), generator))
            yield self.pair(shards[at], batch_at)

    def pair(self, shard: int, batch_at: Callable[[int], Batch]) -> Pair:
        """One shard with its batch; ValueError when `batch_at` gives other clips than the pairs were made under."""
        batch = batch_at(shard)
        tensors = self.read(shard, batch.latents.device)
        states, stored = tensors["states"], tensors["latents"]
        tolerance = 1e-3 if self.dtype == torch.float32 else 2e-2
        same = stored.shape == batch.latents.shape and torch.allclose(
            stored, batch.latents.float(), rtol=tolerance, atol=tolerance
        )
        if not same:
            raise ValueError(f"shard {shard} in {self.folder} was made under other clips: make the pairs again")
        return Pair(batch, states)


def make_pairs(
    store: PairStore,
    trajectory: Callable[[Batch, Tensor], Tensor],
    batch_at: Callable[[int], Batch],
    count: int,
    *,
    seed: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[dict]:
    """Fills `store` up to `count` shards, skipping finished ones; yields {"shard", "pairs", "left"} after each.

    `trajectory(batch, noise)` returns the states; shard i uses `batch_at(i)` and noise seeded by (seed, i), so that
    neither a restart nor the number of processes changes a pair.
    """
    left = store.missing(count, rank, world)
    for done, shard in enumerate(left, 1):
        batch = batch_at(shard)
        noise = gaussian(batch.latents.float(), torch.Generator().manual_seed(seed * 1_000_003 + shard))
        store.write(shard, trajectory(batch, noise), batch.latents)
        yield {"shard": shard, "pairs": len(batch.latents), "left": len(left) - done}


def pairs_in_memory(
    clips: LatentClips,
    trajectory: Callable[[Batch, Tensor], Tensor],
    *,
    batch: int,
    batches: int,
    generator: torch.Generator,
) -> Iterator[Pair]:
    """`batches` batches of `batch` pairs, made now and kept on the clips' device instead of in a store: by poses or by
    keys, whole clips. Then random pairs of them without end, `batch` at a time."""
    rows, modes, states = [], [], []
    for _ in range(batches):
        rows.append(random_index(len(clips), (batch,), generator).to(clips.latents.device))
        modes.append(random_index(2, (batch,), generator).to(clips.latents.device).bool())
        given = whole_clips(clips, rows[-1], modes[-1])
        states.append(trajectory(given, gaussian(given.latents, generator)).float())
    return _drawn(clips, batch, torch.cat(rows), torch.cat(modes), torch.cat(states), generator)


def _drawn(
    clips: LatentClips, batch: int, rows: Tensor, modes: Tensor, states: Tensor, generator: torch.Generator
) -> Iterator[Pair]:
    while True:
        at = random_index(len(rows), (batch,), generator).to(rows.device)
        yield Pair(whole_clips(clips, rows[at], modes[at]), states[at])


def whole_clips(clips: LatentClips, rows: Tensor, modes: Tensor) -> Batch:
    """The clips of `rows` from their first frame to their last, by poses where `modes`, else by keys."""
    return clips.batch(rows, torch.zeros_like(rows), clips.latents.shape[1], modes)


def write_bytes(file: Path, data: bytes) -> None:
    """Writes through a temporary name; an OSError (a full disk) leaves the old file as it was."""
    # The process id keeps two writers of one file apart.
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(data)
        os.replace(partial, file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RuntimeError(f"{file} could not be written ({error.strerror}): free some room and run again") from error


def write_text(file: Path, text: str) -> None:
    write_bytes(file, text.encode())


def read_json(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not readable JSON: delete it and make it again") from error
