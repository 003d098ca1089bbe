"""The trials of an exam: a student follows real walks, obeys keys, stands, returns, walks for a minute.

A trial takes an `Exam` and returns an `Outcome`. Where ViZDoom is installed, the simulator plays the same keys from the
same starts, and its films and their reconstructions are scored by the same rules: what they fail, no student can pass.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
import torch

from lingbot_nb.control.camera import TINY_TURN
from lingbot_nb.control.keys import KEYS, held, parse_keys
from lingbot_nb.distill import flow
from lingbot_nb.model.vae import from_uint8
from lingbot_nb.presets import FPS, TIME_STRIDE, Preset
from lingbot_nb.report import bench, evaluation, metrics
from lingbot_nb.report.features import (
    FEWEST,
    SECOND,
    Distance,
    LikeViews,
    corpus_distance,
    diversity,
    lpips_distance,
    perceptual_distance,
    second_features,
)
from lingbot_nb.report.judge import STILL, WALKS, Judge, Reading, moved_as_asked, pressed, told, true_motion, truth
from lingbot_nb.report.metrics import frechet_distance, psnr
from lingbot_nb.stream.endless import FROZEN, wander
from lingbot_nb.world.clips import Clip
from lingbot_nb.world.latents import LatentClips, encode_walks

PAIRS = ("ws", "sw", "ad", "da", "jl", "lj")
"""What is held in the control test: a second of the one, then a second of the other, which leads back."""
HOLD = FPS
"""Pixel frames that each of a pair is held."""
GO_AND_RETURN = "w-16,none-8,s-16,none-8"
"""A second out and a second back, each with half a second to come to rest: walkers have momentum."""
LAST = 10
"""Seconds at the end of a free walk, at most half of it, that are compared with its first second."""
STRAY = "simulator, another's keys"
"""Label of the simulator's free walks by keys that were meant for another start."""
Interval = list
"""[mean, low, high, n]: 95 % bootstrap over walks. None where nothing could be counted."""


@dataclass(frozen=True, eq=False)
class Exam:
    """Who is examined, by whom and on what. `clips` are held-out walks; `simulate`: whether ViZDoom plays along, and
    `reconstructs`: whether its films are also seen through the tokenizer, which costs as much as a step of the student;
    `teacher` None leaves the teacher out; `student_steps`: numbers of steps in the comparison, the first of them in
    every other part; `size`: films side by side."""

    preset: Preset
    vae: torch.nn.Module
    student: torch.nn.Module
    judge: Judge
    context: torch.Tensor
    clips: Sequence[Clip]
    teacher: torch.nn.Module | None = None
    teacher_steps: int = 50
    student_steps: tuple[int, ...] = (4, 2, 1)
    simulate: bool = False
    reconstructs: bool = True
    seed: int = 0
    size: int = 8
    say: Callable[[str], None] = print

    @property
    def starts(self) -> np.ndarray:
        return np.stack([clip.frames[0] for clip in self.clips])

    @property
    def name(self) -> str:
        """Label of the student that plays by keys."""
        return steps_label(self.student_steps[0])

    @property
    def still(self) -> float:
        return STILL / float(self.judge.scale)

    @cached_property
    def views(self) -> LikeViews | None:
        """The clips' own pictures, to compare the detail of pictures like them with; None where they are few."""
        films = np.stack([clip.frames for clip in self.clips])
        return LikeViews(self.judge, films) if len(films) * len(films[0, ::TIME_STRIDE]) >= FEWEST else None

    @property
    def distances(self) -> dict[str, Distance]:
        """The learned distance and, where it is installed, LPIPS."""
        found = {"perceptual": partial(perceptual_distance, self.judge)}
        public = lpips_distance(self.judge.device)
        return found | ({"LPIPS (AlexNet)": public} if public else {})

    def steps(self, count: int) -> list[flow.FewStep]:
        return flow.few_steps(self.preset.flow.labels(count), self.preset.flow.shift)

    def play(self, starts: np.ndarray, keys: np.ndarray, seed: int | None = None) -> np.ndarray:
        """The student's films of keys [B, N, 8]."""
        seed = self.seed if seed is None else seed
        given = self.student, self.vae, self.context, self.preset, starts, keys
        return evaluation.play(*given, steps=self.steps(self.student_steps[0]), seed=seed, size=self.size)

    def play_by_sight(
        self, starts: np.ndarray, walkers: Sequence[evaluation.Walker], pixel_frames: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The student's films and keys of `walkers` who see them (`evaluation.play_by_sight`)."""
        given = self.student, self.vae, self.context, self.preset, starts, walkers, pixel_frames
        steps = self.steps(self.student_steps[0])
        return evaluation.play_by_sight(*given, steps=steps, seed=self.seed, size=self.size)

    def with_tokenizer(self, real: np.ndarray) -> dict[str, np.ndarray]:
        """The simulator's films and, if wanted, the best that any student could show of them."""
        return {"simulator": real} | ({"tokenizer": reconstruct(self.vae, real)} if self.reconstructs else {})

    def films(self, clips: Sequence[Clip], keys: np.ndarray) -> dict[str, np.ndarray]:
        """The same keys [N, 8] from the starts of `clips`, by the simulator and its reconstruction (if any), and by the
        student."""
        return self.films_and_poses(clips, keys)[0]

    def films_and_poses(
        self, clips: Sequence[Clip], keys: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
        """`films`, and the true poses [B, N, 4, 4] of the simulator's camera in map units; None without it."""
        rows = np.repeat(keys[None], len(clips), 0)
        made, poses = {}, None
        if self.simulate:
            real, poses = simulated([clip.seed for clip in clips], rows, clips[0].map)
            made = self.with_tokenizer(real)
        return made | {self.name: self.play(np.stack([clip.frames[0] for clip in clips]), rows)}, poses


@dataclass(frozen=True)
class Outcome:
    """A part's numbers, by label, and films to show: title -> label -> film [N, H, W, 3], chosen by rank."""

    scores: dict
    strips: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)


def steps_label(count: int) -> str:
    return f"student, {count} step" + ("s" if count > 1 else "")


# ---- films -----------------------------------------------------------------------------------------------------------


def simulated(seeds: Sequence[int], keys: np.ndarray, world: str) -> tuple[np.ndarray, np.ndarray]:
    """What ViZDoom shows under keys [B, N, 8] from the starts that `seeds` draw, u8 [B, N, 96, 160, 3], and the poses
    of its camera, f32 [B, N, 4, 4], in map units."""
    films, _, poses = simulated_by_sight(seeds, [*map(evaluation.Script, keys)], keys.shape[1], world)
    return films, poses


def simulated_by_sight(
    seeds: Sequence[int], walkers: Sequence[evaluation.Walker], pixel_frames: int, world: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where one walker a start goes in ViZDoom, shown a latent frame's pictures at a time: films as `simulated` gives
    them, the keys that were held, bool [B, N, 8], row 0 of no effect, and the poses."""
    from lingbot_nb.world.vizdoom import Simulator, SimulatorSettings

    walks = []
    with Simulator(SimulatorSettings(map=world)) as game:
        for seed, walker in zip(seeds, walkers, strict=True):
            frame, pose = game.reset(seed)
            frames, poses, keys = [frame], [pose], [*walker.keys(frame[None], 1)]
            while len(frames) < pixel_frames:
                rows = walker.keys(np.stack(frames[-TIME_STRIDE:]), min(TIME_STRIDE, pixel_frames - len(frames)))
                keys.extend(rows)
                for frame, pose in map(game.step, rows):
                    frames.append(frame)
                    poses.append(pose)
            walks.append((np.stack(frames), np.stack(keys), np.stack(poses)))
    return tuple(map(np.stack, zip(*walks, strict=True)))


@torch.no_grad()
def reconstruct(vae, films: np.ndarray) -> np.ndarray:
    """Films u8 [B, 4n + 1, H, W, 3] through the tokenizer and back."""
    device = next(vae.parameters()).device
    made = [vae.encode(from_uint8(torch.from_numpy(film.copy())[None].to(device))) for film in films]
    return np.concatenate([evaluation.decode_clips(vae, latents) for latents in made])


def script(text: str) -> np.ndarray:
    """Keys bool [1 + n, 8] of an action string: nothing leads into the first picture."""
    return np.concatenate([held("")[None], parse_keys(text)])


# ---- intervals -------------------------------------------------------------------------------------------------------


def interval(values) -> Interval | None:
    """[mean, low, high, n] of one value a walk."""
    values = np.asarray(values, float)
    if not values.size:
        return None
    found = metrics.bootstrap_mean(values)
    return [found.mean, found.low, found.high, found.n]


def ratio(parts, wholes, resamples: int = 2000) -> Interval | None:
    """Sum of `parts` over sum of `wholes`, one pair a walk, with the interval over walks: [ratio, low, high, sum of the
    wholes]. A walk with much to count weighs more; None where there is nothing to count."""
    parts, wholes = np.asarray(parts, float), np.asarray(wholes, float)
    if not wholes.sum() > 0:
        return None
    draws = np.random.default_rng(0).integers(0, len(parts), (resamples, len(parts)))
    sums = wholes[draws].sum(1)
    some = parts[draws].sum(1)[sums > 0] / sums[sums > 0]
    return [float(parts.sum() / wholes.sum()), *np.quantile(some, [0.025, 0.975]).tolist(), float(wholes.sum())]


def counted(right: np.ndarray, counts: np.ndarray) -> Interval | None:
    """`ratio` of chunks that are right among those that count, bool [B, C] each."""
    return ratio((right & counts).sum(1), counts.sum(1))


def counted_together(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> Interval | None:
    """`counted` of several pairs of right and counts [B, C], all from the same B starts."""
    return counted(*(np.concatenate(x, 1) for x in zip(*parts, strict=True)))


def ranked(scores: Sequence[float]) -> dict[str, int]:
    """Which one is best, median and worst, the rule by which films are shown; each film once, so two have no median."""
    order = np.argsort(-np.nan_to_num(np.asarray(scores, float), nan=-np.inf), kind="stable")
    picks = {"best": order[0], "median": order[(len(order) - 1) // 2], "worst": order[-1]}
    first = {int(place): name for name, place in reversed(picks.items())}
    return {name: int(place) for name, place in picks.items() if first[int(place)] == name}


def shown(
    films: Mapping[str, np.ndarray], scores: Sequence[float], form: str, notes: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Rows of a filmstrip: for the best, the median and the worst by `scores`, the film of every label. `notes` say
    something of each film beside its score."""
    rows = {}
    for rank, place in ranked(scores).items():
        about = f"{notes[place]}: " if notes else ""
        for label, some in films.items():
            rows[f"{rank} ({about}{form.format(scores[place])})\n{label}"] = some[place]
    return rows


# ---- against the simulator -------------------------------------------------------------------------------------------


def follow(exam: Exam, frames: int | None = None) -> Outcome:
    """Teacher and student beside the true continuation of every clip, over `frames` latent frames (None: all)."""
    clips = [cut(clip, frames) for clip in exam.clips]
    real = np.stack([clip.frames for clip in clips])
    seen, known = exam.judge.read(real), truth(clips, float(exam.judge.scale))
    scores = {"simulator": read_scores(exam, seen, known)}
    kept, began = {"simulator": real}, time.perf_counter()
    for label, films in followers(exam, clips):
        took, reading = (time.perf_counter() - began) / len(clips), exam.judge.read(films)
        scores[label] = against(exam, real, films, seen, reading) | read_scores(exam, reading, known)
        scores[label]["seconds_per_clip"] = took
        exam.say(f"  {label}: {psnr_line(scores[label])} ({took:.1f} s a clip)")
        kept[label], began = films, time.perf_counter()
    last = psnr(real[:, -TIME_STRIDE:], kept[exam.name][:, -TIME_STRIDE:]).mean(1)
    rule = f"by the PSNR of {exam.name} at {(real.shape[1] - 1) / FPS:g} s"
    ranks = ranked(last)
    median = ranks.get("median", ranks["best"])
    everyone = {label: films[median] for label, films in kept.items() if label != "first frame held"}
    some = shown({label: kept[label] for label in ("simulator", exam.name)}, last, "{:.1f} dB")
    words = f"{len(clips)} held-out walks, same keys"
    return Outcome(scores, {f"the median of {words}, {rule}": everyone, f"{words}, {rule}": some})


def cut(clip: Clip, frames: int | None) -> Clip:
    """A clip's first `frames` latent frames."""
    stop = None if frames is None else TIME_STRIDE * (frames - 1) + 1
    return Clip(clip.frames[:stop], clip.poses[:stop], clip.keys[:stop], clip.intrinsics, clip.seed, clip.map, clip.id)


def followers(exam: Exam, clips: Sequence[Clip]) -> Iterator[tuple[str, np.ndarray]]:
    """Label and films u8 [B, N, H, W, 3] of everyone who follows the clips, one after the other."""
    real = np.stack([clip.frames for clip in clips])
    held_still = np.repeat(real[:, :1], real.shape[1], 1)
    yield "first frame held", held_still
    yield "tokenizer", reconstruct(exam.vae, real)
    batches = latent_batches(exam, clips)
    if exam.teacher is not None:
        sample = partial(evaluation.teacher_clips, exam.teacher, steps=exam.teacher_steps)
        yield "teacher, poses", generated(exam, batches, partial(sample, shift=exam.preset.flow.shift), True)
    for label, make, with_poses in students(exam):
        yield label, generated(exam, batches, make, with_poses)


def students(exam: Exam) -> Iterator[tuple[str, Callable, bool]]:
    """The student's ways to walk: label, what makes clips of a batch, and whether it is told poses or keys."""
    stream = partial(evaluation.student_clips, exam.student, preset=exam.preset)
    yield "student, poses", partial(stream, steps=exam.steps(exam.student_steps[0])), True
    for count in exam.student_steps:
        yield steps_label(count), partial(stream, steps=exam.steps(count)), False


def latent_batches(exam: Exam, clips: Sequence[Clip]) -> list[LatentClips]:
    """The clips as latents, `size` at a time."""
    groups = [clips[i : i + exam.size] for i in range(0, len(clips), exam.size)]
    device = next(exam.vae.parameters()).device
    return [encode_walks(exam.vae, group, exam.context, exam.preset, starts=1, device=device) for group in groups]


def generated(exam: Exam, groups: Sequence[LatentClips], make: Callable, with_poses: bool) -> np.ndarray:
    """Films that `make(batch, generator=…)` gives for every group, under poses or keys."""
    films = []
    for number, group in enumerate(groups):
        rows = torch.arange(len(group), device=group.latents.device)
        modes = torch.full_like(rows, with_poses).bool()
        batch = group.batch(rows, torch.zeros_like(rows), group.latents.shape[1], modes)
        noise = torch.Generator(batch.latents.device).manual_seed(1000 * exam.seed + number)
        films.append(evaluation.decode_clips(exam.vae, make(batch=batch, generator=noise)))
    return np.concatenate(films)


def against(exam: Exam, real: np.ndarray, films: np.ndarray, seen: Reading, reading: Reading) -> dict:
    """How films compare with the true ones, picture by picture and as sets; `seen` and `reading`: what the judge reads
    off the true and the generated ones."""
    spans = evaluation.horizon_spans(real.shape[1])
    measures = {"psnr": psnr, "ssim": metrics.ssim, "ms_ssim": metrics.ms_ssim, **exam.distances}
    scores = {
        name: {at: interval(measure(real[:, span], films[:, span]).mean(1)) for at, span in spans.items()}
        for name, measure in measures.items()
    }
    ends = slice(TIME_STRIDE, None, TIME_STRIDE)
    pairs = list(zip(real[:, ends], films[:, ends], strict=True))
    curves = {name: np.stack([measures[name](*pair) for pair in pairs]) for name in ("psnr", "perceptual")}
    return scores | {
        "sharpness": ratio(fine_detail(films), fine_detail(real)),
        "frame_frechet": frechet_distance(*(x.frames[:, 1:].reshape(-1, x.frames.shape[-1]) for x in (seen, reading))),
        "second_frechet": second_distance(seen, reading),
        "seconds": [(i + 1) * TIME_STRIDE / FPS for i in range(curves["psnr"].shape[1])],
        "curves": {name: [interval(column) for column in values.T] for name, values in curves.items()},
    }


def second_distance(real: Reading, made: Reading) -> float | None:
    """The FVD-like distance; None for fewer than two whole seconds."""
    features = second_features(real), second_features(made)
    return frechet_distance(*features) if len(features[0]) > 1 else None


def read_scores(exam: Exam, reading: Reading, known: tuple[np.ndarray, np.ndarray]) -> dict:
    """What the judge reads off films whose keys and motion are known: errors of the pose, and keys told right."""
    keys, motion = known
    turn, walk = told(reading, keys, motion, exam.still)
    step = np.linalg.norm(reading.step - motion[..., 1:], axis=-1)
    return {
        "rotation": interval(np.abs(reading.yaw - motion[..., 0]).mean(1)),
        "translation": interval(step.mean(1)),
        "turn": counted(*turn),
        "direction": counted(*walk),
    }


def psnr_line(row: Mapping) -> str:
    return "PSNR " + ", ".join(f"{value[0]:.1f} at {at} s" for at, value in row["psnr"].items())


def redraw(exam: Exam, draws: int = 4) -> Outcome:
    """How much of `follow` is the luck of the noise: the student's walks under `draws` seeds. PSNR and sharpness are
    means over the seeds, a walk's own first, with the interval over walks, and each seed's beside them."""
    real = np.stack([clip.frames for clip in exam.clips])
    spans = evaluation.horizon_spans(real.shape[1])
    batches, detail = latent_batches(exam, exam.clips), fine_detail(real)
    scores = {}
    for label, make, with_poses in students(exam):
        psnrs, details = [], []
        for seed in range(exam.seed, exam.seed + draws):
            films = generated(replace(exam, seed=seed), batches, make, with_poses)
            psnrs.append([psnr(real[:, span], films[:, span]).mean(1) for span in spans.values()])
            details.append(fine_detail(films))
        by_walk, by_draw = np.mean(psnrs, 0), np.mean(psnrs, 2)
        scores[label] = {
            "psnr": {at: interval(row) for at, row in zip(spans, by_walk, strict=True)},
            "sharpness": ratio(np.mean(details, 0), detail),
            "psnr_by_draw": {at: row.tolist() for at, row in zip(spans, by_draw.T, strict=True)},
            "sharpness_by_draw": (np.sum(details, 1) / detail.sum()).tolist(),
            "draws": draws,
        }
        exam.say(f"  {label}: {psnr_line(scores[label])}, sharpness {scores[label]['sharpness'][0]:.2f}")
    return Outcome(scores)


def fine_detail(films: np.ndarray) -> np.ndarray:
    """Mean Laplacian variance of every film [B]."""
    return np.array([metrics.laplacian_variance(film).mean() for film in films])


# ---- control ---------------------------------------------------------------------------------------------------------


def control(exam: Exam, pairs: Sequence[str] = PAIRS) -> Outcome:
    """Each key held for a second from every start, then its opposite: is the direction right, and how soon. With the
    simulator also: is it right in those chunks in which the simulator's own camera went where it was asked to."""
    asked: dict[str, list[Asked]] = {}
    kept: dict[str, list[np.ndarray]] = {}
    for pair in pairs:
        keys = script(",".join(f"{key}-{HOLD}" for key in pair))
        films, poses = exam.films_and_poses(exam.clips, keys)
        moved = None if poses is None else truly_moved(exam, keys, poses)
        for label, some in films.items():
            asked.setdefault(label, []).append(answered(exam.judge, some, pair, moved))
            kept.setdefault(label, []).append(some)
        exam.say(f"  keys {pair}: {right_line(asked[exam.name][-1])}")
    focal = float(exam.clips[0].intrinsics[0])
    scores = {label: control_scores(parts, focal) for label, parts in asked.items()}
    mine = np.concatenate([part.certainty for part in asked[exam.name]])
    films = {label: np.concatenate(some) for label, some in kept.items() if label != "tokenizer"}
    notes = [" ".join(pair).upper() for pair in pairs for _ in exam.clips]
    title = "each key for a second, then its opposite; by the judge's certainty of the keys"
    return Outcome(scores, {title: shown(films, mine, "{:.2f}", notes)})


@dataclass(frozen=True)
class Asked:
    """One pair of keys from B starts: what was right [B, C], what showed motion [B, C], the image shift by chunk [B, C]
    in pixels towards where it should go, the PSNR in dB of the turning point and of the end to the first picture [B],
    the mean probability of the keys that were asked for [B], by which films are ranked, and where the simulator's
    camera truly moved as asked [B, C], whoever made the films; None without a simulator."""

    pair: str
    right: np.ndarray
    shows: np.ndarray
    shift: np.ndarray
    away: np.ndarray
    back: np.ndarray
    certainty: np.ndarray
    moved: np.ndarray | None = None

    @property
    def turns(self) -> bool:
        return self.pair[0] in "jl"

    @property
    def half(self) -> int:
        """Chunks that each key is held."""
        return self.right.shape[1] // 2

    @property
    def counts(self) -> np.ndarray:
        """Chunks that count for the direction: those that show motion, but for a walk the one after the change, in
        which momentum still carries the camera the old way."""
        counts = self.shows.copy()
        if not self.turns:
            counts[:, self.half] = False
        return counts


def truly_moved(exam: Exam, keys: np.ndarray, poses: np.ndarray) -> np.ndarray:
    """Chunks in which the camera of poses [B, N, 4, 4] walked as keys [N, 8] ask: bool [B, C]."""
    motion = np.stack([true_motion(path, float(exam.judge.scale)) for path in poses])
    return moved_as_asked(pressed(keys), motion, exam.still)


def answered(judge: Judge, films: np.ndarray, pair: str, moved: np.ndarray | None = None) -> Asked:
    """What films [B, 1 + 2 * HOLD, H, W, 3] of a pair of keys show; `moved` as in `Asked`."""
    reading = judge.read(films)
    half = reading.change.shape[1] // 2
    keys = np.repeat(list(pair), half)
    sign = np.array([{"j": -1, "l": 1}.get(key, 0) for key in keys])
    if pair[0] in "jl":
        right, sure = reading.side == sign, np.take(reading.turn, sign + 1, -1)[:, range(2 * half), range(2 * half)]
        shift = np.stack([chunk_shift(film) for film in films]) * -sign
    else:
        want = np.array([WALKS.index(key) for key in keys])
        right, sure = reading.direction == want, reading.walk[:, range(2 * half), want]
        shift = np.full(right.shape, np.nan)
    away, back = (psnr(films[:, 0], films[:, i]) for i in (HOLD, -1))
    certainty = np.where(reading.shows, sure, 0).sum(1) / np.maximum(reading.shows.sum(1), 1)
    return Asked(pair, right, reading.shows, shift, away, back, certainty, moved)


def chunk_shift(film: np.ndarray) -> np.ndarray:
    """Median pixels that the picture moves to the right in a pixel frame, for each chunk of a film: [C]."""
    return np.median(metrics.horizontal_shift(film).reshape(-1, TIME_STRIDE), 1)


def right_line(asked: Asked) -> str:
    counts = asked.counts
    return f"{int((asked.right & counts).sum())} of {int(counts.sum())} chunks with motion right"


def control_scores(parts: Sequence[Asked], focal: float) -> dict:
    """The numbers of all pairs together: turns, walks, and every key by itself."""
    kinds = {"turn": [p for p in parts if p.turns], "walk": [p for p in parts if not p.turns]}
    scores: dict = {"keys": by_key(parts)}
    for kind, some in kinds.items():
        if some:
            scores[kind] = counted_together((p.right, p.counts) for p in some)
            scores[f"{kind}_shows"] = float(np.mean([p.shows.mean() for p in some]))
            scores[f"{kind}_first"] = counted(*(np.stack(x, 1) for x in zip(*map(first_chunk, some), strict=True)))
            scores[f"{kind}_reaction"] = interval(np.concatenate([reactions(p, 0) for p in some]))
            scores[f"{kind}_reaction_to_change"] = interval(np.concatenate([reactions(p, p.half) for p in some]))
    known = [(p.right, p.counts & p.moved) for p in kinds["walk"] if p.moved is not None]
    if known:
        scores["walk_moved"] = counted_together(known)
    if kinds["turn"]:
        turned = kinds["turn"]
        moved = np.concatenate([p.shift for p in turned], 1)
        clear = np.abs(moved) >= 1
        expected = metrics.pinhole_shift(TINY_TURN, focal) * clear
        scores["shift_right"] = counted(moved > 0, clear)
        scores["shift_ratio"] = ratio(np.where(clear, moved, 0).sum(1), expected.sum(1))
        scores["turn_away"] = interval(np.mean([p.away for p in turned], 0))
        scores["turn_back"] = interval(np.mean([p.back for p in turned], 0))
    return scores


def by_key(parts: Sequence[Asked]) -> dict[str, Interval | None]:
    """Share of right chunks for each key, first or second of its pair."""
    found: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for part in parts:
        for key, at in zip(part.pair, (slice(None, part.half), slice(part.half, None)), strict=True):
            found.setdefault(key, []).append((part.right[:, at], part.counts[:, at]))
    return {key: counted_together(some) for key, some in sorted(found.items())}


def first_chunk(part: Asked) -> tuple[np.ndarray, np.ndarray]:
    """Right, and counts, of the first chunk of a key pressed at rest: bool [B] each."""
    return part.right[:, 0], part.shows[:, 0]


def reactions(part: Asked, begin: int) -> np.ndarray:
    """In which chunk, counted from 1, the picture first follows the key pressed in chunk `begin`: a value for each film
    that shows motion while it is held; one more than there are chunks where it never follows."""
    seen = (part.right & part.shows)[:, begin : begin + part.half]
    moves = part.shows[:, begin : begin + part.half].any(1)
    first = np.where(seen.any(1), seen.argmax(1) + 1, part.half + 1)
    return first[moves].astype(float)


# ---- standing, returning, walking ------------------------------------------------------------------------------------


def stand(exam: Exam, seconds: int = 8) -> Outcome:
    """No key for `seconds`: PSNR of every later latent frame's last picture to the last picture of the first second."""
    at = list(range(TIME_STRIDE, FPS * (seconds - 1) + 1, TIME_STRIDE))
    if not at:
        raise ValueError(f"standing for {seconds} s is compared with its own first second: use 2 or more")
    films = exam.films(exam.clips, script(f"none-{FPS * seconds}"))

    def kept_by(film: np.ndarray) -> np.ndarray:
        later = film[FPS:]
        return psnr(metrics.copy_first_frame(later), later)[at]

    kept = {label: np.stack([kept_by(film) for film in some]) for label, some in films.items()}
    scores = {
        label: {"seconds": [1 + i / FPS for i in at], "still": [interval(column) for column in values.T]}
        for label, values in kept.items()
    }
    last = kept[exam.name][:, -1]
    exam.say(f"  {last.mean():.1f} dB to its own first second after {seconds} s")
    title = f"no key, by PSNR after {seconds} s to the own first second"
    return Outcome(scores, {title: shown({exam.name: films[exam.name]}, last, "{:.1f} dB")})


def go_and_return(exam: Exam) -> Outcome:
    """A second forwards and a second back: PSNR of the last picture, and of the far end, to the first."""
    films = exam.films(exam.clips, script(GO_AND_RETURN))
    far = 1 + (films[exam.name].shape[1] - 1) // 2
    kept = {label: [psnr(some[:, 0], some[:, i]) for i in (far, -1)] for label, some in films.items()}
    scores = {label: {"away": interval(away), "back": interval(back)} for label, (away, back) in kept.items()}
    exam.say(f"  {kept[exam.name][0].mean():.1f} dB at the far end, {kept[exam.name][1].mean():.1f} dB when back")
    some = shown({n: film for n, film in films.items() if n != "tokenizer"}, kept[exam.name][1], "{:.1f} dB")
    return Outcome(scores, {f"{GO_AND_RETURN}, by PSNR to the first picture": some})


def free_walk(exam: Exam, seconds: int = 60, walks: int = 8) -> Outcome:
    """Walks of `seconds` from the first `walks` starts, under the keys of someone who walks there in the simulator
    (without it: random ones): what becomes of sharpness, saturation, motion, and of the distance to the corpus.

    That someone sees where they go; a student's rooms are soon others, and whoever walks by keys of elsewhere ends at
    walls, which have little detail. So the simulator walks once more, from every start by the next one's keys: `STRAY`.
    """
    everyone = walked(exam, exam.clips[:walks], FPS * seconds + 1)
    return lasting(exam, everyone, seconds, f"{seconds} s", hidden=("tokenizer", STRAY))


def lasting(
    exam: Exam, everyone: Iterable[tuple[str, np.ndarray, np.ndarray]], seconds: int, words: str, hidden=()
) -> Outcome:
    """`drift` of everyone who walks for `seconds`: label, films and the steps in which they should move, taken one
    after the other. All but the `hidden` are shown, under `words`."""
    if seconds < 2:
        raise ValueError(f"a walk of {seconds} s is compared with its own first second: use 2 or more")
    scores, kept = {}, {}
    for label, films, moving in everyone:
        scores[label] = drift(exam, films, moving)
        if label not in hidden:
            kept[label] = films
    mine = scores[exam.name]
    exam.say(f"  sharpness {mine['sharpness_last'][0]:.2f}, saturation {mine['saturation_last'][0]:.2f} of the first s")
    return Outcome(scores, long_strip(kept, exam.name, words))


def long_strip(films: Mapping[str, np.ndarray], mine: str, words: str) -> dict[str, dict[str, np.ndarray]]:
    """The long walks whose sharpness stays best, median and worst where `mine` walks, everyone's under each other."""
    detail = np.stack([per_second(metrics.laplacian_variance(film)) for film in films[mine]])
    stays = detail[:, ending(detail.shape[1])].mean(1) / np.maximum(detail[:, 0], 1e-9)
    worst_last = -np.abs(np.log(np.maximum(stays, 1e-9)))
    rows = {}
    for rank, place in ranked(worst_last).items():
        rows |= {f"{rank} ({stays[place]:.2f})\n{label}": some[place] for label, some in films.items()}
    return {f"{words}, by how near 1 the sharpness stays": rows}


def walked(exam: Exam, clips: Sequence[Clip], pixel_frames: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Label, films and the steps in which their pictures should move, bool [B, N - 1], of everyone who walks from the
    starts of `clips`. One after the other: 64 films of a minute are 3 GB."""
    if exam.simulate:
        keys, real, moving = roamed(clips, pixel_frames)
        for label, films in exam.with_tokenizer(real).items():
            yield label, films, moving
        if len(clips) > 1:
            others = np.roll(keys, -1, 0)
            films, poses = simulated([clip.seed for clip in clips], others, clips[0].map)
            yield STRAY, films, should_move(others, poses)
    else:
        draws = [wander(exam.seed + i) for i in range(len(clips))]
        keys = np.stack([[held(""), *(next(draw) for _ in range(pixel_frames - 1))] for draw in draws])
        moving = keys[:, 1:].any(-1)
    yield exam.name, exam.play(np.stack([clip.frames[0] for clip in clips]), keys), moving


def roamed(clips: Sequence[Clip], pixel_frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Someone walks in the simulator from every start: keys bool [B, N, 8], films, and the steps in which their
    pictures should move."""
    from lingbot_nb.world.vizdoom import Simulator, SimulatorSettings, record

    with Simulator(SimulatorSettings(map=clips[0].map)) as game:
        walks = [record(game, clip.seed, pixel_frames) for clip in clips]
    keys, films, poses = (np.stack([getattr(walk, name) for walk in walks]) for name in ("keys", "frames", "poses"))
    return keys, films, should_move(keys, poses)


def should_move(keys: np.ndarray, poses: np.ndarray) -> np.ndarray:
    """Steps in which a picture should move, bool [B, N - 1]: one turning key is held, or any and the camera of poses
    [B, N, 4, 4] went somewhere."""
    from lingbot_nb.world.vizdoom import STILL as UNMOVED

    moved = np.linalg.norm(np.diff(poses[:, :, :3, 3], axis=1), axis=-1) > UNMOVED
    return turning(keys) | (moved & keys[:, 1:].any(-1))


def turning(keys: np.ndarray) -> np.ndarray:
    """Steps in which one turning key of [B, N, 8] is held, bool [B, N - 1]."""
    return keys[:, 1:, KEYS.index("j")] ^ keys[:, 1:, KEYS.index("l")]


def drift(exam: Exam, films: np.ndarray, moving: np.ndarray) -> dict:
    """Second by second: sharpness and saturation over the first second's, sharpness over that of real views alike
    (where there are enough to compare with), change between pixel frames, distance to the corpus; the mean of the last
    seconds over the first; the share of steps that freeze where something should move."""
    frames = exam.judge.read(films).frames
    distance = corpus_distance(exam.judge, frames)
    changes = np.stack([metrics.frame_difference(film) for film in films])
    detail = np.stack([metrics.laplacian_variance(film) for film in films])
    parts = {
        "sharpness": np.stack([*map(per_second, detail)]),
        "saturation": np.stack([per_second(metrics.saturation(film)) for film in films]),
        "change": changes.reshape(len(films), -1, FPS).mean(2),
        "corpus": distance[:, 1:].reshape(len(films), -1, SECOND).mean(2),
    }
    first = {name: values[:, 0] for name, values in parts.items()}
    last = ending(parts["sharpness"].shape[1])
    scores = {"seconds": list(range(1, parts["sharpness"].shape[1] + 1))}
    for name in ("sharpness", "saturation"):
        scores[name] = [ratio(column, first[name]) for column in parts[name].T]
        scores[f"{name}_last"] = ratio(parts[name][:, last].mean(1), first[name])
    for name in ("change", "corpus"):
        scores[name] = [interval(column) for column in parts[name].T]
        scores[f"{name}_last"] = interval(parts[name][:, last].mean(1))
    if exam.views is not None:
        scores |= alike(detail[:, TIME_STRIDE::TIME_STRIDE], exam.views.expected(frames[:, 1:]), last)
    jump = float(np.mean([*map(metrics.boundary_jump, films)]))
    return scores | {"freeze": counted(changes < FROZEN, moving), "jump": jump}


def alike(detail_BC: np.ndarray, expected_BC: np.ndarray, last: slice) -> dict:
    """Fine detail of films over what real views like theirs have: by second, over the whole walk but its first second,
    and the last seconds' share over the first second's, [ratio, low, high, walks] over walks."""
    shown, due = (x.reshape(len(x), -1, SECOND).sum(2) for x in (detail_BC, expected_BC))
    ends = np.stack([x[:, at].sum(1) for at in (last, slice(1)) for x in (shown, due)])

    def kept(rows: np.ndarray) -> np.ndarray:
        detail, expected, at_first, expected_at_first = ends[:, rows].sum(-1)
        return detail / expected / (at_first / expected_at_first)

    draws = np.random.default_rng(0).integers(0, len(shown), (2000, len(shown)))
    bounds = np.quantile(kept(draws), [0.025, 0.975])
    return {
        "alike": [ratio(*columns) for columns in zip(shown.T, due.T, strict=True)],
        "alike_later": ratio(shown[:, 1:].sum(1), due[:, 1:].sum(1)),
        "alike_kept": [float(kept(np.arange(len(shown)))), *bounds.tolist(), len(shown)],
    }


def ending(seconds: int) -> slice:
    """The last seconds of a walk of `seconds`."""
    return slice(-max(1, min(LAST, seconds // 2)), None)


def per_second(values: np.ndarray) -> np.ndarray:
    """Means over whole seconds of a value a pixel frame, the first frame (which is given) left out."""
    return values[1 : 1 + (len(values) - 1) // FPS * FPS].reshape(-1, FPS).mean(1)


def variety(exam: Exam, seeds: int = 4, starts: int = 8, frames: int = 9) -> Outcome:
    """The same start and keys under several seeds: how far apart the films are, and how far from the true one."""
    clips = [cut(clip, frames) for clip in exam.clips[:starts]]
    first, keys = np.stack([clip.frames[0] for clip in clips]), np.stack([clip.keys for clip in clips])
    films = np.stack([exam.play(first, keys, seed) for seed in range(seeds)], 1)[:, :, 1:]
    distance = exam.distances["perceptual"]
    real = np.stack([clip.frames[1:] for clip in clips])
    apart = [diversity(distance, some) for some in films]
    off = [np.mean([distance(film, true).mean() for film in some]) for some, true in zip(films, real, strict=True)]
    exam.say(f"  {np.mean(apart):.4f} between seeds, {np.mean(off):.4f} to the true continuation")
    return Outcome({exam.name: {"diversity": interval(apart), "to_truth": interval(off), "seeds": seeds}})


def speed(exam: Exam, seconds: float = 3.0) -> Outcome:
    """Frames a second and milliseconds of a chunk on this machine: medians of at most `seconds` a stage."""
    stages = bench.student_stages(exam.preset, exam.student, exam.vae, seconds=seconds)
    chunk = exam.preset.stream.chunk
    exam.say(bench.stage_table(stages))
    exam.say(bench.speed_table(stages, chunk))
    rows = {
        steps_label(n): {"fps": bench.chunk_fps(stages, n, chunk), "chunk_ms": bench.chunk_ms(stages, n)}
        for n in exam.student_steps
    }
    return Outcome(rows)
