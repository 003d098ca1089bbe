"""Every score of a student on held-out walks, trial by trial: a file of numbers, one table, one figure.

    python -m lingbot_nb.report.scores --weights data/weights --clips 104 --out data/scores.json

Trials are kept as they are finished: a command that was killed goes on with the first that is not in the file.
`film_scores` needs generated films and their keys alone, so that it works where there is no simulator.
"""

import argparse
import importlib.util
import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from lingbot_nb.control.camera import TINY_TURN
from lingbot_nb.control.keys import KEYS
from lingbot_nb.model import checkpoint, growth
from lingbot_nb.model.dit import DiT
from lingbot_nb.model.text import TinyText
from lingbot_nb.model.vae import TinyVAE
from lingbot_nb.presets import TIME_STRIDE, Preset, by_name
from lingbot_nb.report import metrics, trials
from lingbot_nb.report.features import corpus_distance, corpus_frechet, export_films
from lingbot_nb.report.judge import JUDGE, Judge, key_direction, load_judge, pressed, rounded
from lingbot_nb.report.stroll import stroll
from lingbot_nb.report.trials import Exam, Outcome, chunk_shift, counted, followers, interval, per_second, ratio
from lingbot_nb.runs import first_with, shipped_folders, write_json
from lingbot_nb.stream.endless import FROZEN
from lingbot_nb.world.clips import HELD_OUT_SEED, Clip, ClipStore

# ---- generated films alone -------------------------------------------------------------------------------------------


def film_scores(
    films: np.ndarray, keys: np.ndarray, *, judge: Judge | None = None, focal: float | None = None,
    turn: float = TINY_TURN,
) -> dict:  # fmt: skip
    """Scores that need no simulator: films u8 [B, 4n + 1, H, W, 3] and the keys bool [B, 4n + 1, 8] they were made of.

    Drift over the films' seconds, freezing while keys are held, seams between chunks; `focal` (pixels) and `turn`
    (degrees a pixel frame) add the image shift of chunks in which nothing but j or l is held. A `judge` of this world
    adds keys told right and the distances to its corpus; one of another world would read nonsense.
    """
    if keys.shape[:2] != films.shape[:2]:
        raise ValueError(f"keys {keys.shape} for films {films.shape}: give one row of keys for each pixel frame")
    detail, tint = (np.stack([per_second(measure(f)) for f in films]) for measure in (metrics.laplacian_variance,
                                                                                      metrics.saturation))  # fmt: skip
    frozen = np.stack([metrics.frame_difference(film) < FROZEN for film in films])
    scores = {
        "sharpness": [ratio(column, detail[:, 0]) for column in detail.T],
        "saturation": [ratio(column, tint[:, 0]) for column in tint.T],
        "freeze": counted(frozen, keys[:, 1:].any(-1)),
        "jump": float(np.mean([*map(metrics.boundary_jump, films)])),
    }
    if focal is not None:
        scores |= shift_scores(films, keys, metrics.pinhole_shift(turn, focal))
    return scores | (judged(judge, films, keys) if judge is not None else {})


def shift_scores(films: np.ndarray, keys: np.ndarray, expected: float) -> dict:
    """Whether pictures move the right way, and how far against `expected` pixels, where nothing but j or l is held."""
    asked = np.stack([pressed(rows)[:, 2] for rows in keys])
    others = np.delete(keys[:, 1:], [KEYS.index("j"), KEYS.index("l")], -1)
    alone = ~others.reshape(len(keys), -1, TIME_STRIDE * others.shape[-1]).any(-1)
    moved = np.stack([chunk_shift(film) for film in films]) * -np.sign(asked)
    clear = alone & (np.abs(asked) == 1) & (np.abs(moved) >= 1)
    return {
        "shift_right": counted(moved > 0, clear),
        "shift_ratio": ratio(np.where(clear, moved, 0).sum(1), expected * clear.sum(1)),
    }


def judged(judge: Judge, films: np.ndarray, keys: np.ndarray) -> dict:
    """Keys told right where the scene shows motion and one key, or one turn, is held; distances to the corpus."""
    reading, asked = judge.read(films), np.stack([pressed(rows) for rows in keys])
    walking = (np.abs(asked[..., :2]) == 1).sum(-1) == 1
    walking &= (asked[..., :2] != 0).sum(-1) == 1
    frames = reading.frames[:, 1:]
    return {
        "turn": counted(reading.side == np.sign(asked[..., 2]), reading.shows & (np.abs(asked[..., 2]) == 1)),
        "direction": counted(reading.direction == key_direction(asked), reading.shows & walking),
        "corpus": interval(corpus_distance(judge, frames).mean(1)),
        "corpus_frechet": corpus_frechet(judge, frames.reshape(-1, frames.shape[-1])),
    }


# ---- the whole -------------------------------------------------------------------------------------------------------

Trial = Callable[[Exam], Outcome]
TRIALS: dict[str, Trial] = {
    "follow": trials.follow,
    "draws": trials.redraw,
    "control": trials.control,
    "stand": trials.stand,
    "go_and_return": trials.go_and_return,
    "free_walk": trials.free_walk,
    "stroll": stroll,
    "variety": trials.variety,
    "speed": trials.speed,
}


def examine(
    exam: Exam, parts: Mapping[str, Trial] = TRIALS, *, file: Path | None = None, about: Mapping | None = None
) -> dict:
    """All trials' scores: {"about": …, "parts": {name: {label: …}}}; those already in `file` are not made again.

    "where" and "seconds" tell of each trial the machine that held it and how long it took: another machine may go on
    with a file. It is replaced after every trial, and the filmstrips of the best, median and worst are drawn beside it.
    Raises ValueError when the file holds scores of something else.
    """
    found, here = started(file, dict(about or {})), (about or {}).get("conditions", "")
    for name, part in parts.items():
        if name in found["parts"]:
            exam.say(f"{name}: in {file} already")
            continue
        exam.say(f"{name} …")
        began = time.perf_counter()
        outcome = part(exam)
        found["parts"][name] = rounded(outcome.scores)
        found.setdefault("seconds", {})[name] = round(time.perf_counter() - began, 1)
        found.setdefault("where", {})[name] = here
        if file is not None:
            draw_strips(file, name, outcome)
            write_json(file, found)
    return found


def started(file: Path | None, about: dict) -> dict:
    """What a scores file holds; empty without one."""
    if file is None or not file.exists():
        return {"about": about, "parts": {}}
    found = json.loads(file.read_text())
    told_again = {k: v for k, v in json.loads(json.dumps(about)).items() if k != "conditions"}
    if {k: v for k, v in found["about"].items() if k != "conditions"} != told_again:
        raise ValueError(f"{file} holds scores of {found['about']}, not of {about}: name another file or delete it")
    return found


def pictures_of(file: Path) -> Path:
    """The folder of a scores file's pictures: its own name without the ending."""
    return file.with_suffix("")


def draw_strips(file: Path, name: str, outcome: Outcome) -> None:
    """A trial's filmstrips as JPEGs: follow-1.jpg, follow-2.jpg, control-1.jpg, …"""
    from lingbot_nb.report import score_view

    for number, (title, rows) in enumerate(outcome.strips.items(), start=1):
        score_view.save(score_view.strip(rows, title), pictures_of(file) / f"{name.replace('_', '-')}-{number}.jpg")


def weights_file(weights: Path | None, preset: Preset, file: str) -> Path:
    """`file` in a folder of weights, else among the shipped ones."""
    folders = ((weights,) if weights else ()) + shipped_folders(preset)
    return first_with(file, folders) or folders[0] / file


def load_exam(weights: Path | None, clips: Sequence[Clip], *, preset: Preset, judge: Path = JUDGE, **options) -> Exam:
    """An exam of the weights in a folder (a run's; what it lacks, or None, are the shipped ones), on the first GPU if
    there is one."""
    from lingbot_nb.parts import PROMPT, device

    found = partial(weights_file, weights, preset)

    def dit(file: str) -> DiT:
        made = DiT(preset.model)
        growth.load_into(found(file), made)
        return made.to(device()).eval().requires_grad_(False)

    vae = TinyVAE.from_file(found("vae.safetensors"), device()).requires_grad_(False)
    student = dit("student.safetensors")
    teacher = dit("teacher.safetensors") if options.get("teacher_steps", 50) else None
    context = TinyText(preset.model.text_dim, preset.model.text_len).encode(PROMPT).to(device())
    here = load_judge(judge, device())
    simulate = importlib.util.find_spec("vizdoom") is not None
    return Exam(preset, vae, student, here, context, clips, teacher, simulate=simulate, **options)


def held_out_clips(count: int, data: Path | None) -> list[Clip]:
    """`count` held-out walks: from `data`, else walked into memory by the simulator, else the shipped ones."""
    from lingbot_nb.parts import MAP, shipped_clips

    if data is not None:
        return list(ClipStore(data, split="held-out"))[:count]
    if importlib.util.find_spec("vizdoom") is None:
        return shipped_clips(count)
    from lingbot_nb.world.vizdoom import Simulator, SimulatorSettings, flaw, record

    clips, seed = [], HELD_OUT_SEED
    with Simulator(SimulatorSettings(map=MAP)) as game:
        while len(clips) < count:
            clip = record(game, seed)
            clips += [] if flaw(clip) else [clip]
            seed += 1
    return clips


def main() -> None:
    from lingbot_nb.report import figures, score_view

    parser = argparse.ArgumentParser(prog="lingbot_nb.report.scores", description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, help="folder of vae, teacher, student (default: the shipped ones)")
    parser.add_argument("--data", type=Path, help="folder with held-out clips; default: walk them now")
    parser.add_argument("--clips", type=int, default=104)
    parser.add_argument("--out", type=Path, required=True, help="JSON; pictures go into a folder of its name")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--judge", type=Path, default=JUDGE)
    parser.add_argument("--teacher-steps", type=int, default=50, help="0 leaves the teacher out")
    parser.add_argument("--walks", type=int, default=8, help="free walks")
    parser.add_argument("--walk-seconds", type=int, default=60)
    parser.add_argument("--size", type=int, default=8, help="films side by side")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=list(TRIALS), choices=list(TRIALS))
    parser.add_argument("--films", type=Path, help="write the compared films as mp4s there, for VBench and FVD")
    args = parser.parse_args()
    clips = held_out_clips(args.clips, args.data)
    options = dict(teacher_steps=args.teacher_steps, seed=args.seed, size=args.size, say=partial(print, flush=True))
    exam = load_exam(args.weights, clips, preset=by_name(args.preset), judge=args.judge, **options)
    parts = {name: TRIALS[name] for name in args.only}
    for name in {"free_walk", "stroll"} & set(parts):
        parts[name] = partial(TRIALS[name], seconds=args.walk_seconds, walks=args.walks)
    where = next(exam.student.parameters())
    about = {
        "conditions": figures.conditions(exam.preset, where.device, where.dtype),
        "weights": checkpoint.read_card(weights_file(args.weights, exam.preset, "student.safetensors"))["sha256"],
        "judge": checkpoint.read_card(args.judge)["sha256"],
        "clips": len(clips), "seeds": [clips[0].seed, clips[-1].seed], "simulator": exam.simulate,
        "teacher_steps": args.teacher_steps, "walks": args.walks, "walk_seconds": args.walk_seconds, "seed": args.seed,
    }  # fmt: skip
    found = examine(exam, parts, file=args.out, about=about)
    score_view.save(score_view.figure(found), pictures_of(args.out) / "figure.png")
    if args.films:
        export_films(args.films, {"simulator": np.stack([c.frames for c in clips])} | dict(followers(exam, clips)))
    print(score_view.table(found))
    print(score_view.conditions(found))


if __name__ == "__main__":
    main()
