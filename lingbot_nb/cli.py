"""The command line: run the notebooks, look at runs, collect clips, look at released weights.

Exit codes: 0 all well, 1 a notebook failed or weights do not fit, 2 a mistake in the command or its surroundings, 130
stopped with Ctrl-C.
"""

import argparse
import re
import shlex
import signal
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from lingbot_nb import runs

AGAIN_S = 10
"""Whole seconds after which a stop that was not heeded is repeated; shutting a kernel down takes five at most."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out one command and return its exit code; a mistake is one sentence on stderr."""
    options = _parser().parse_args(arguments)
    # A polite kill leaves a run in the same order as Ctrl-C, and Ctrl-C also works for a command that a script started
    # in the background, where Python would ignore it.
    for stop in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(stop, _interrupt)
    try:
        return options.command(options)
    except (ValueError, FileNotFoundError, RuntimeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    finally:
        signal.alarm(0)


def _interrupt(*_: object) -> None:
    """KeyboardInterrupt, and again some seconds later unless the command has ended by then: Python drops what a signal
    raises inside a finaliser or a C library's callback, and the kernel's shutdown may hang."""
    signal.alarm(AGAIN_S)
    raise KeyboardInterrupt


def run(options: argparse.Namespace) -> int:
    """Execute notebooks with papermill, then print the table and the run's folder."""
    from lingbot_nb import execution

    root = runs.runs_root()
    order = execution.Order(
        name=options.name or execution.default_name(options.preset, root),
        preset=options.preset,
        notebooks=tuple(name for name in options.notebooks.split(",") if name),
        given={name: execution.literal(value) for name, value in options.parameter},
        gpus=options.gpus,
        cell_seconds=options.timeout,
        source=options.source,
        root=root,
    )
    steps = execution.plan(order)
    print(f"run {order.name}: {len(steps)} notebooks, preset {order.preset}, into {_short(order.folder)}", flush=True)
    width = max(len(step.notebook) for step in steps)
    try:
        failed = _report_outcomes(execution.execute(order), width)
    except KeyboardInterrupt:
        signal.alarm(0)
        _write_page(order.folder)
        print(f"\nstopped; continue with: {_again(options, order.name)}", file=sys.stderr)
        return 130
    page = _write_page(order.folder)
    if failed:
        print(f"{failed.notebook} failed: {failed.error}")
        print(f"what it did: {_short(failed.path)}")
        print(f"continue with: {_again(options, order.name)}")
        return 1
    _print_run(order.folder)
    print(f"\nrun folder: {_short(order.folder)}\npictures:   {_short(page)}")
    return 0


def list_runs(options: argparse.Namespace) -> int:
    """Print every run with its preset, how it stands and how long it took."""
    from lingbot_nb import execution
    from lingbot_nb.report.page import text_table

    rows = [("run", "preset", "minutes", "state")]
    for folder in sorted(path.parent for path in runs.runs_root().glob("*/run.json")):
        try:
            card, state = runs.read_card(folder), execution.status(folder)
        except ValueError:
            rows.append((folder.name, "?", "?", "run.json is damaged"))
            continue
        seconds = sum(entry["seconds"] for entry in card.get("notebooks", {}).values())
        rows.append((folder.name, card["preset"], f"{seconds / 60:.1f}", state))
    print(text_table(rows) if len(rows) > 1 else f"no runs in {_short(runs.runs_root())}: start one with `make run`")
    return 0


def show(options: argparse.Namespace) -> int:
    """Print a run's notebooks and its table again."""
    folder = runs.runs_root() / options.name
    if runs.read_card(folder) is None:
        raise FileNotFoundError(
            f"there is no run '{options.name}' in {_short(folder.parent)}: `list` names those there"
        )
    _print_run(folder, notebooks=True)
    print(f"\nrun folder: {_short(folder)}")
    return 0


def collect(options: argparse.Namespace) -> int:
    """Collect clips from the simulator, printing a line per shard."""
    from lingbot_nb.world.vizdoom import SimulatorSettings, collect

    report = collect(
        options.out,
        clips=options.clips,
        processes=options.processes,
        seed=options.seed,
        settings=SimulatorSettings(map=options.map),
        compress=options.compress,
        progress=lambda state: print(state, flush=True),
    )
    if not report.kept:
        raise RuntimeError(f"no clip of {report.tried} was worth keeping: try another --map or --seed")
    return 0


def play(options: argparse.Namespace) -> int:
    """Play a key string and write what was seen as mp4."""
    from lingbot_nb.stream import commands

    return commands.play(options)


def bench(options: argparse.Namespace) -> int:
    """Measure live play: its latency in a browser, or its quality and cost over many minutes."""
    from lingbot_nb.stream import commands

    return {"play": commands.bench_play, "endless": commands.bench_endless}[options.what](options)


def bench_stream(options: argparse.Namespace) -> int:
    """Measure the streaming engine with random weights, any size, beside the plain path and the floor."""
    from lingbot_nb.report import bench_stream

    return bench_stream.command(options)


def weights(options: argparse.Namespace) -> int:
    """Inspect, convert or verify a released folder; prints what fits and what does not."""
    from lingbot_nb import presets
    from lingbot_nb.model import released

    size = presets.by_name(options.preset).model if options.preset else None
    say = partial(print, flush=True)
    if options.action == "convert":
        if options.out is None:
            raise ValueError("convert writes into another folder: name it with --out FOLDER")
        dtype = released.shards.DTYPES[options.dtype.upper().replace("FP", "F")]
        found = released.convert(options.path, options.out, dtype=dtype, size=size, progress=say)
    elif options.action == "verify":
        found = released.verify(options.path, size=size, progress=say)
    else:
        found = released.inspect(options.path, size=size)
    for report in found:
        print(report)
    for what, path in released.companions(options.path).items():
        print(f"{what}: {path}")
    return 0 if all(report.ok for report in found) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lingbot_nb", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("run", help="execute the notebooks and keep everything in a run folder")
    command.add_argument("--preset", default="tiny", help="scale of the workbook (default: tiny)")
    command.add_argument("--notebooks", default="", metavar="00,03", help="numbers or names (default: all)")
    command.add_argument("--name", help="run folder; an earlier run of that name continues (default: date-time-preset)")
    command.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    command.add_argument("--gpus", type=int, help="processes with a GPU each, handed to the notebooks")
    command.add_argument("--timeout", type=_positive, metavar="SECONDS", help="the longest that one cell may take")
    command.add_argument("--source", type=Path, default=runs.NOTEBOOKS, help="folder of the notebooks")
    command.set_defaults(command=run)

    command = commands.add_parser("list", help="all runs and how they stand")
    command.set_defaults(command=list_runs)

    command = commands.add_parser("show", help="one run's table again")
    command.add_argument("name")
    command.set_defaults(command=show)

    command = commands.add_parser("collect", help="collect clips from the simulator")
    command.add_argument("--out", type=Path, required=True, help="folder of the clips; collecting into it continues")
    command.add_argument("--clips", type=_positive, default=64)
    command.add_argument("--processes", type=_positive, default=2)
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--map", default="my_way_home", help="a scenario of ViZDoom, or a Freedoom level such as map01"
    )
    command.add_argument("--compress", action="store_true", help="store lossless WebP: a third of the space, slower")
    command.set_defaults(command=collect)

    _add_play(commands)
    _add_weights(commands)
    return parser


def _add_play(commands) -> None:
    command = commands.add_parser("play", help="play a key string without Jupyter and write an mp4")
    command.add_argument("--keys", required=True, help="for example w-40,l-20,w-40: letters, hyphen, pixel frames")
    command.add_argument("--out", type=Path, required=True, help="the mp4")
    command.add_argument("--image", type=Path, help="start picture (default: the first shipped clip's)")
    _add_session(command)
    group = command.add_argument_group("LingBot-World's own size")
    group.add_argument("--weights", type=Path, metavar="FOLDER", help="a released or converted folder plays, not a run")
    group.add_argument("--part", help="which of its networks, where it has several")
    group.add_argument("--decoder", type=Path, metavar="FILE", help="TAEHV weights, to decode at a stream's pace")
    group.add_argument("--size", type=_size, default=(480, 832), metavar="480x832", help="height and width in pixels")
    group.add_argument("--prompt", default="", help="what the world is like")
    group.add_argument("--gpus", type=_positive, default=1, help="GPUs that share the world")
    command.set_defaults(command=play)

    benches = commands.add_parser("bench", help="measure live play")
    benches.set_defaults(command=bench)
    benches = benches.add_subparsers(required=True, metavar="WHAT", dest="what")
    command = benches.add_parser("play", help="latency from key to pixel in a real browser")
    command.add_argument("--seconds", type=_positive, default=60, help="how long, for each chunk length (default: 60)")
    command.add_argument("--chunk", type=_numbers, default=(1, 3), metavar="1,3", help="chunk lengths in frames")
    _add_session(command)

    _add_bench_stream(benches)

    command = benches.add_parser("endless", help="picture quality, time and memory over minutes of play")
    command.add_argument("--minutes", type=float, default=30, help="minutes of world time (default: 30)")
    command.add_argument("--chunk", type=_positive, default=1, help="chunk length in frames")
    _add_session(command)


def _add_bench_stream(benches) -> None:
    command = benches.add_parser("stream", help="speed of the streaming engine at any size, random weights")
    command.set_defaults(command=bench_stream)
    add = command.add_argument
    add("--preset", default="tiny", help="scale (default: tiny)")
    add("--height", type=_positive, help="pixels (default: the preset's)")
    add("--width", type=_positive, help="pixels (default: the preset's)")
    add("--layers", type=_positive, help="transformer layers (default: the preset's)")
    add("--steps", type=_numbers, default=(4,), metavar="4,2", help="denoising steps; a row for each (default: 4)")
    add("--chunk", type=_positive, help="latent frames denoised together")
    add("--window", type=_positive, help="latent frames in sight, sink and chunk included")
    add("--sink", type=int, help="first latent frames that stay in sight")
    add("--chunks", type=_positive, default=20, help="chunks that are timed (default: 20)")
    add("--plain-chunks", type=int, default=2, help="chunks of the plain path that are timed; 0 leaves it out")
    add("--dtype", choices=("bf16", "fp32"), help="default: bf16 on a GPU, the faster one on a CPU")
    without = {"compile": "torch.compile", "graph": "CUDA graphs", "join": "q, k and v as one product"}
    for name, what in {**without, "kernel": "our own kernel for norm, rotation and cache write"}.items():
        add(f"--no-{name}", action="store_true", help=f"without {what}")
    add("--fp8", action="store_true", help="products in 8-bit floating point")
    add("--fp8-attention", action="store_true", help="self-attention and its cache in 8-bit floating point as well")
    add("--merge", action="store_true", help="the clean pass and the next chunk's first step as one pass")
    add("--first", action="store_true", help="recorded passes before the decoder where both want the GPU")
    add("--no-clean-pass", action="store_true", help="the past is what the last step wrote")
    add("--each-clean-pass", action="store_true", help="rows also with it merged, and without it")
    add("--decoder", choices=("taehv", "wan", "wan-plain"), help="default: the tiny world's own, else a TAEHV")
    add("--ladder", action="store_true", help="a row for each option, added one by one")
    add("--check", type=int, default=0, nargs="?", const=40, metavar="CHUNKS", help="compare with the plain path (40)")
    add("--profile", action="store_true", help="list the kernels of one chunk; GPU only")
    add("--out", type=Path, help="JSON of all numbers; a picture comes beside it")


def _add_weights(commands) -> None:
    command = commands.add_parser("weights", help="inspect, convert or verify a folder of released weights")
    command.add_argument("action", choices=("inspect", "convert", "verify"))
    command.add_argument("path", type=Path, help="a downloaded release, or one weight file")
    command.add_argument("--out", type=Path, help="where convert writes; writing into it again continues")
    command.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="what convert casts to")
    command.add_argument("--preset", help="the model it must be (default: told from the shapes)")
    command.set_defaults(command=weights)


def _add_session(command: argparse.ArgumentParser) -> None:
    command.add_argument("--run", metavar="NAME", help="run whose student plays, or tiny-large (default: the shipped)")
    command.add_argument("--student", default="student.safetensors", metavar="FILE", help="weights, by name")
    command.add_argument("--steps", type=_positive, default=4, help="denoising steps a chunk")
    command.add_argument("--seed", type=int, default=0)


def _size(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"'{text}' is no picture size: write it like 480x832, height first")
    return int(found[1]), int(found[2])


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def _report_outcomes(outcomes, width: int):
    """Print one line per notebook; the outcome that failed, or None."""
    for outcome in outcomes:
        minutes = f"{outcome.seconds / 60:5.1f} min"
        if outcome.status == "running":
            print(f"{outcome.notebook:{width}}  ", end="", flush=True)
        elif outcome.status == "skipped":
            print(f"{outcome.notebook:{width}}  {minutes}  OK, finished earlier", flush=True)
        else:
            print(f"{minutes}  {'OK' if outcome.status == 'finished' else 'failed'}", flush=True)
        if outcome.status == "failed":
            return outcome
    return None


def _print_run(folder: Path, *, notebooks: bool = False) -> None:
    from lingbot_nb.report import page

    if notebooks:
        print(page.text_table(page.notebook_rows(folder)) + "\n")
    results = runs.all_results(folder)
    print(page.text_table(page.model_rows(results)))
    if conditions := page.conditions(folder):
        print(f"({conditions})")


def _write_page(folder: Path) -> Path | None:
    from lingbot_nb.report import page

    return page.write(folder) if (folder / "run.json").exists() else None


def _again(options: argparse.Namespace, name: str) -> str:
    """The command that continues this run."""
    words = ["python", "-m", "lingbot_nb", "run", "--name", name, "--preset", options.preset]
    words[0] = _short(Path(sys.prefix) / "bin" / "python") if sys.prefix != sys.base_prefix else words[0]
    words += ["--notebooks", options.notebooks] if options.notebooks else []
    words += ["--gpus", str(options.gpus)] if options.gpus is not None else []
    words += ["--timeout", str(options.timeout)] if options.timeout else []
    words += ["--source", str(options.source)] if options.source != runs.NOTEBOOKS else []
    for name_value in options.parameter:
        words += ["-p", *name_value]
    return shlex.join(words)


def _short(path: Path) -> str:
    """`path` as seen from the working directory where it lies below that."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
