"""What `play` and `bench` do on the command line, and what the bench's notebook runs."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from lingbot_nb import parts, presets, runs
from lingbot_nb.control.keys import parse_keys
from lingbot_nb.model.fused import ALONE
from lingbot_nb.report.figures import conditions
from lingbot_nb.report.page import text_table
from lingbot_nb.runs import Run
from lingbot_nb.stream import endless, lab, latency, lingbot
from lingbot_nb.stream.engine import Speed
from lingbot_nb.stream.engine_parallel import HeadShare
from lingbot_nb.stream.playback import play_script
from lingbot_nb.stream.player import record
from lingbot_nb.stream.remote import RemoteSession
from lingbot_nb.stream.session import Session, fit_image

SHIPPED = "live-play"
"""The run of those who name none: nothing is trained in it, so its weights are the shipped ones."""


def play(options: argparse.Namespace) -> int:
    """Play a key string; write what was seen as mp4, and its keys beside it."""
    keys = parse_keys(options.keys)
    chosen = dict(steps=options.steps, seed=options.seed)
    if options.weights is None:
        run = open_run(options.run)
        image = None if options.image is None else fit_image(options.image, run.preset.shape)
        session = parts.session(run, options.student, start_image=image, **chosen)
    else:
        session = _release(options, **chosen)
    frames = play_script(session, keys)
    path = record(session, frames, keys, options.out)
    print(f"{path}: {len(frames)} pixel frames, {len(frames) / session.fps:.1f} s, {session.about}")
    return 0


def _release(options: argparse.Namespace, **chosen) -> Session | RemoteSession:
    if options.image is None:
        raise ValueError("LingBot-World starts from a picture: name one with --image")
    height, width = options.size
    told = dict(start_image=options.image.resolve(), prompt=options.prompt, part=options.part, decoder=options.decoder)
    return lingbot.play_on(options.gpus, options.weights, height=height, width=width, **told, **chosen)


def bench_play(options: argparse.Namespace) -> int:
    """Measure a player in a real browser, once for each chunk length, and print one table."""
    lab.check_browser()
    run = open_run(options.run)
    run.find(options.student)
    rows = [_bench_chunk(options, chunk) for chunk in options.chunk]
    print(latency.table([cells for cells, _ in rows]))
    print("\nlatencies: ms, p50 / p95 / p99 over presses and releases, both clocks those of this machine")
    print(f"browser, JupyterLab and kernel together on {os.cpu_count()} cores, {options.seconds} s a row")
    for cells, said in rows:
        print(f"{cells[0]}: {said}")
    return 0


def _bench_chunk(options: argparse.Namespace, chunk: int) -> tuple[tuple[str, ...], str]:
    print(f"chunks of {chunk}: starting JupyterLab and Chromium", file=sys.stderr, flush=True)
    arguments = dict(run=options.run, student=options.student, steps=options.steps, seed=options.seed, chunk=chunk)
    cell = f"from lingbot_nb.stream.commands import bench_cell\nbench_cell(**{arguments!r})"
    busy = os.getloadavg()[0]
    with TemporaryDirectory() as place, _playing(Path(place), cell) as page:
        latency.watch(page)
        latency.press_keys(page, options.seconds, seed=options.seed)
        page_log, kernel_log = latency.seen(page), latency.read_log(Path(place) / "events.jsonl")
        about = (Path(place) / "about.txt").read_text()
    pictures = latency.delivery(page_log["pictures"], Session.fps)
    followed = list(latency.changes(page_log, kernel_log))
    return latency.row(chunk, options.steps, pictures, followed), f"{about} · load average {busy:.1f} at the start"


@contextmanager
def _playing(place: Path, cell: str) -> Iterator:
    """The page of a notebook whose only cell shows a player, once its pictures come."""
    lab.choose(place)
    lab.write_notebook(place / "bench.ipynb", cell)
    with lab.jupyterlab(place) as server, lab.chromium() as context:
        page = lab.open_notebook(context, server, "bench.ipynb")
        lab.run_all(page)
        page.wait_for_selector(".lb-stage img, .jp-RenderedText[data-mime-type*=error]", timeout=120_000)
        if error := page.query_selector(".jp-RenderedText[data-mime-type*=error]"):
            raise RuntimeError(f"the player did not start: {error.inner_text().splitlines()[-1]}")
        page.wait_for_timeout(3000)
        yield page


def bench_cell(run: str, student: str, steps: int, seed: int, chunk: int):
    """The notebook cell of `bench play`: a player whose frames carry markers and whose events go to files beside it."""
    from lingbot_nb.stream.player import play as show

    note = latency.Log("events.jsonl")
    session = tuned(live_session(open_run(run), student, chunk=chunk, steps=steps, seed=seed))
    widget = show(latency.mark(session, note))
    latency.log_keys(widget.player.held, note)
    Path("about.txt").write_text(_conditions(session))
    return widget


def bench_endless(options: argparse.Namespace) -> int:
    """Play for many minutes of world time as fast as it goes; draw quality, time and memory; print a table."""
    run = open_run(options.run)
    session = tuned(live_session(run, options.student, chunk=options.chunk, steps=options.steps, seed=options.seed))
    pixel_frames = round(60 * options.minutes * session.fps)
    said = _conditions(session, steps=options.steps, chunk=options.chunk)
    stretches = []
    for stretch in endless.play_on(session, endless.wander(options.seed), pixel_frames):
        stretches.append(stretch)
        print(f"\r{stretch.second / 60:.1f} of {options.minutes:g} min", end="", file=sys.stderr, flush=True)
        # Every time, so that a run which is stopped leaves what it has seen.
        runs.write_json(run.path("endless.json"), {"conditions": said, "stretches": [asdict(s) for s in stretches]})
    print(file=sys.stderr)
    picture = endless.draw(stretches, run.figures / "endless.png", title=f"{options.minutes:g} minutes of play")
    print(text_table(endless.summary(stretches)))
    print(f"\n{said}\npicture: {picture}")
    return 0


def open_run(name: str | None) -> Run:
    """The run called `name` with the preset it was made with. Without a name one that has the shipped weights only, and
    for the name of a preset that has shipped weights of its own ("tiny-large") one that has those."""
    if not name:
        return Run(SHIPPED)
    folder = runs.runs_root() / name
    card = runs.read_card(folder)
    if card is None and name in {preset.name for preset in presets.ALL if (runs.WEIGHTS / preset.name).is_dir()}:
        return Run(f"{SHIPPED}-{name}", name)
    if card is None:
        raise FileNotFoundError(f"there is no run '{name}' in {runs.runs_root()}: `list` names those there")
    return Run(folder, card["preset"])


def live_session(run: Run, student: str, *, chunk: int | None = None, **options) -> Session:
    """A session of the run's student with another chunk length."""
    session = parts.session(run, student, **options)
    if chunk is not None:
        session.chunk = chunk
        session.reset()
    return session


def rank_session(
    rank: int, world: int, *, run: str, student: str = "student.safetensors", speed: Speed | None = None, **options
) -> Session:
    """What each process of a `RemoteSession` builds: the session, on its own GPU where there are several.

    Use with functools.partial: `RemoteSession(partial(rank_session, run="mine"))`. With `speed` (`engine.Speed`) the
    processes share one world, each with its part of the heads; without it every process plays the whole of it.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(rank % torch.cuda.device_count())
    share = ALONE if speed is None else HeadShare.of_session(rank, world)
    return live_session(open_run(run), student, speed=speed, share=share, **options)


def tuned(session: Session) -> Session:
    """The session in the dtype, and with the threads, that a one-second probe chose; its steps stay what was asked."""
    session.tune()
    return session


def _conditions(session: Session, **extra) -> str:
    with session.on_threads():
        return conditions(session.preset, session.device, session.dtype, **extra)
