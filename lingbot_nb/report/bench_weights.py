"""Released weights at true size: a random release is written, inspected, converted, verified, loaded and run.

    python -m lingbot_nb.report.bench_weights --device cuda
    python -m lingbot_nb.report.bench_weights --preset lingbot-1.3b --out /other/disk --json proof.json

The release has one expert: the second would be the same work again. Values are random, names, shapes, types and files
are a release's. Rows are printed as they become known, so a run that is cut short leaves what it had measured.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Event

import torch
from torch import Tensor

from lingbot_nb import presets
from lingbot_nb.model import attention, masks, released, shards
from lingbot_nb.model.dit import DiT
from lingbot_nb.model.kv_cache import KVCache
from lingbot_nb.presets import LATENT_CHANNELS, MASK_CHANNELS, Preset
from lingbot_nb.report.architecture import markdown_table
from lingbot_nb.report.bench import T_NOISY, RandomStream, Timing, measure, synchroniser

DTYPE = torch.bfloat16
PART = "high_noise_model"
SHARD_BYTES = 5_000_000_000
TOLERANCE = 0.02
"""Largest relative difference between stream and masked pass that counts as bf16's rounding. On a narrow DiT of 40
layers it is 0.002 (in fp32 6e-7)."""

HEAD = ("stage", "seconds", "GB", "GB/s", "peak CPU GB", "peak GPU GB", "found")


@dataclass
class Stage:
    """One row: wall seconds (of a forward: the median of several), bytes that went through, peaks in bytes, and what
    was found. CPU peak: resident memory of the process, libraries included, page cache not."""

    name: str
    seconds: float = 0.0
    bytes: int = 0
    cpu_peak: int = 0
    gpu_peak: int = 0
    found: str = ""
    ok: bool = True

    def take(self, timing: Timing) -> None:
        """The row's time is one run's, not the measurement's."""
        self.seconds = timing.median / 1000
        self.found = f"median of {timing.n}: {timing.median:.1f} ms [{timing.p10:.1f} – {timing.p90:.1f}]"

    def check(self, ok: bool, found: str) -> None:
        """Adds a finding; one that is not ok fails the whole proof, which goes on."""
        self.ok = self.ok and ok
        self.found = "; ".join(part for part in (self.found, found if ok else f"FAILED: {found}") if part)


@contextmanager
def stage(name: str, device: torch.device, bytes: int = 0) -> Iterator[Stage]:
    """Times what happens inside and takes its peaks; a GPU without room for it is a finding, not the end."""
    gpu, sync, row = device.type == "cuda", synchroniser(device), Stage(name, bytes=bytes)
    if gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    _forget_cpu_peak()
    sync()
    began = time.perf_counter()
    try:
        yield row
        sync()
    except torch.OutOfMemoryError:
        row.check(False, "the GPU has too little memory for it: try fewer --frames or a smaller --preset")
    row.seconds = row.seconds or time.perf_counter() - began
    row.cpu_peak = _cpu_peak()
    row.gpu_peak = torch.cuda.max_memory_allocated(device) if gpu else 0


def _forget_cpu_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # peaks are then those since the start


def _cpu_peak() -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


# -- a random release ----------------------------------------------------------------------------------------------


def random_tensor(name: str, shape: Sequence[int], seed: int, device: torch.device) -> Tensor:
    """bf16 values on `device` under which signals neither fade nor explode over 40 layers.

    Matrices keep the size of what goes through them, and modulations open the gates. Queries are scaled up, or
    attention would average over thousands of tokens and no wrong mask or cache could be told from a right one.
    """
    if name.endswith((".norm_q.weight", ".norm_k.weight", ".norm3.weight")):
        return torch.full(shape, 2.0 if name.endswith("norm_q.weight") else 1.0, device=device, dtype=DTYPE)
    fan_in = torch.Size(shape[1:]).numel() if len(shape) > 1 else 2500
    scale = 0.5 if name.endswith("modulation") else fan_in**-0.5
    # The camera multiplies the residual stream once a layer.
    scale *= 0.1 if ".cam_scale_layer." in name else 1.0
    make = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=make, device=device, dtype=DTYPE).mul_(scale)


def write_release(folder: Path, preset: Preset, device: torch.device, shard_bytes: int = SHARD_BYTES) -> int:
    """Writes one expert of random weights as a release has it (config, index, shards); the bytes of its tensors.

    Tensors are drawn on `device` and reach CPU memory one by one.
    """
    seeds = _seeds(preset)
    shapes = {name: shape for name, (shape, _) in seeds.items()}
    entries = {name: shards.Entry(shape, "BF16") for name, shape in shapes.items()}
    groups = _groups(entries, shard_bytes)
    files = [f"diffusion_pytorch_model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]

    def write(numbered: tuple[str, list[str]], stop: Event) -> None:
        file, names = numbered
        drawn = ((name, random_tensor(name, *seeds[name], device).cpu()) for name in names if not stop.is_set())
        shards.write(folder / PART / file, {name: entries[name] for name in names}, drawn, format="pt")

    released.shardwise(write, zip(files, groups, strict=True))
    total = sum(entry.bytes for entry in entries.values())
    config = {"_class_name": "WanModel", "model_type": "i2v", **released.config_of(preset.model)}
    weight_map = {name: file for file, names in zip(files, groups, strict=True) for name in names}
    (folder / PART / "config.json").write_text(json.dumps(config, indent=1))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / PART / released.INDEX).write_text(json.dumps(index, indent=1))
    return total


def _seeds(preset: Preset) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and seed of every tensor of a preset's model."""
    shapes = released.tensor_shapes(DiT(preset.model, device="meta"))
    return {name: (shape, number) for number, (name, shape) in enumerate(shapes.items())}


def weight_bytes(preset: Preset) -> int:
    """Bytes of one copy of the model."""
    return sum(DTYPE.itemsize * torch.Size(shape).numel() for shape, _ in _seeds(preset).values())


def _groups(entries: dict[str, shards.Entry], shard_bytes: int) -> list[list[str]]:
    groups, room = [[]], shard_bytes
    for name, entry in entries.items():
        if entry.bytes > room and groups[-1]:
            groups.append([])
            room = shard_bytes
        groups[-1].append(name)
        room -= entry.bytes
    return groups


def check_room(preset: Preset, folder: Path, out: Path, device: torch.device) -> None:
    """Raises RuntimeError when a disk or the device's memory cannot hold the weights."""
    total = weight_bytes(preset)
    same = folder.stat().st_dev == out.stat().st_dev
    for disk, copies in ((folder, 2),) if same else ((folder, 1), (out, 1)):
        needed, free = copies * total * 1.001, shutil.disk_usage(disk).free
        if needed > free:
            raise RuntimeError(
                f"{copies} copies of the weights take {needed / 1e9:.1f} GB in {disk}, and {free / 1e9:.1f} GB are "
                "free: name a larger disk with --folder, or one for the converted copy with --out"
            )
    if total > (free := free_memory(device)):
        raise RuntimeError(
            f"the weights take {total / 1e9:.1f} GB, and the memory left on {device} is {free / 1e9:.1f} GB: use a "
            "smaller --preset"
        )


def free_memory(device: torch.device) -> int:
    """Bytes that the device can still take; for a CPU all that the machine has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# -- forwards ------------------------------------------------------------------------------------------------------


class RandomClip:
    """Random inputs of `frames` frames for whole passes; the camera goes in as tokens, since films of all layers at
    once would take more memory than the weights."""

    def __init__(self, preset: Preset, dit: DiT, frames: int):
        device, shape = next(dit.parameters()).device, preset.shape
        make = torch.Generator(device).manual_seed(1)
        size, cells = preset.model, (frames, shape.latent_height, shape.latent_width)

        def noise(*extents: int) -> Tensor:
            return torch.randn(1, *extents, generator=make, device=device)

        self.dit = dit
        self.latent = noise(LATENT_CHANNELS, *cells)
        self.condition = noise(MASK_CHANNELS + LATENT_CHANNELS, *cells)
        self.control = noise(size.control_channels * 64, *cells) if size.control_channels else None
        self.text = dit.text(noise(size.text_len, size.text_dim))
        self.t = torch.tensor(T_NOISY, device=device)

    def velocity(self, first: int = 0, end: int | None = None, **how) -> Tensor:
        """The DiT's answer for frames [first, end) under a mask or cache."""
        latent, condition = self.latent[:, :, first:end], self.condition[:, :, first:end]
        camera = None if self.control is None else self.dit.camera_tokens(self.control[:, :, first:end])
        return self.dit(latent, self.t, condition_BCFHW=condition, text=self.text, camera=camera, **how)


def host_waits(run: Callable[[], object]) -> int:
    """How often `run()` makes the host wait for the GPU, as torch counts it."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in told)


def relative(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|, over all elements."""
    return ((found - wanted).norm() / wanted.norm()).item()


def stream_errors(preset: Preset, dit: DiT) -> tuple[list[float], float]:
    """Relative difference of each streamed chunk from one masked pass, and of the unmasked pass from the masked one.

    Chunks reach past the window. The second number says how far off a wrong mask would be. Sink keys stay at their
    absolute positions here: in the masked pass nothing moves.
    """
    settings = replace(preset.stream, relative=False)
    lengths = settings.chunk_lengths((settings.window or preset.shape.frames) + settings.chunk)
    clip = RandomClip(preset, dit, sum(lengths))
    masked = clip.velocity(mask=masks.block_causal(lengths, settings.window, settings.sink))
    cache = KVCache(
        preset.model,
        settings,
        preset.shape,
        device=masked.device,
        dtype=dit.head.head.weight.dtype,
        capacity=sum(lengths),
    )
    errors = []
    for length in lengths:
        first, end = cache.frames_seen, cache.frames_seen + length
        errors.append(relative(clip.velocity(first, end, cache=cache), masked[:, :, first:end]))
        cache.commit()
    return errors, relative(clip.velocity(), masked)


# -- the proof -----------------------------------------------------------------------------------------------------


def prove(
    preset: Preset,
    folder: Path,
    out: Path,
    *,
    device: torch.device | str = "cpu",
    frames: int | None = None,
    repeats: int = 5,
    shard_bytes: int = SHARD_BYTES,
) -> Iterator[Stage]:
    """Yields each stage when it is over. `folder` takes the release, `out` what it is converted to; both exist.

    `frames` of the bidirectional forward: the preset's clip unless given. Raises RuntimeError when a disk or the GPU is
    too small for the weights.
    """
    device = torch.device(device)
    with stage("before anything", device) as row:
        check_room(preset, folder, out, device)
        row.found = "Python, torch and the device's libraries"
    yield row
    yield from _files(preset, folder, out, device, shard_bytes)
    total = weight_bytes(preset)
    with stage("load", device, total) as row:
        dit = released.load_dit(out, part=PART, device=device, dtype=DTYPE)
        row.found = f"{len(dit.state_dict())} tensors on {device}"
    yield row
    with stage("compare with what was drawn", device, total) as row:
        state, seeds = dit.state_dict(), _seeds(preset)
        off = [name for name, seed in seeds.items() if not torch.equal(state[name], random_tensor(name, *seed, device))]
        row.check(not off, f"{len(seeds) - len(off)} of {len(seeds)} tensors equal, bit by bit")
    yield row
    yield from _forwards(preset, dit, device, frames or preset.shape.frames, repeats)


def _files(preset: Preset, folder: Path, out: Path, device: torch.device, shard_bytes: int) -> Iterator[Stage]:
    with stage("write a random release", device) as row:
        row.bytes = write_release(folder, preset, device, shard_bytes)
        row.found = f"{len(list((folder / PART).glob('*.safetensors')))} shards of bf16, one expert"
    total = row.bytes
    yield row
    with stage("weights inspect", device) as row:
        (report,) = released.inspect(folder)
        row.check(report.ok and report.size == preset.model, _fit(report))
    yield row
    with stage("weights convert", device, total) as row:
        (report,) = released.convert(folder, out, dtype=DTYPE)
        row.check(report.ok, _fit(report))
    yield row
    with stage("weights verify", device, total) as row:
        (verified,) = released.verify(out)
        row.check(verified.ok, f"{_fit(verified.report)}; all finite, sha256 equal" if verified.ok else str(verified))
    yield row


def _fit(report: released.Report) -> str:
    off = len(report.missing) + len(report.unexpected) + len(report.wrong_shape)
    return f"{len(report.matched)} tensors match, {off} do not, {report.parameters:,} parameters"


@torch.inference_mode()
def _bidirectional(row: Stage, preset: Preset, dit: DiT, device: torch.device, frames: int, repeats: int) -> None:
    clip = RandomClip(preset, dit, frames)
    row.take(measure(clip.velocity, warmup=1, repeats=repeats, sync=synchroniser(device)))
    row.check(clip.velocity().isfinite().all().item(), f"finite, {frames * preset.shape.tokens_per_frame} tokens")


@torch.inference_mode()
def _streamed(row: Stage, stream: RandomStream, device: torch.device, repeats: int) -> None:
    row.take(measure(stream.forward, warmup=1, repeats=repeats, sync=synchroniser(device)))
    held = stream.cache.occupancy()
    ok = stream.forward().isfinite().all().item()
    row.check(ok, f"finite, sees {held.frames} of {held.capacity} frames in a cache of {held.bytes / 1e9:.1f} GB")
    if device.type != "cuda":
        return
    t = torch.zeros(1, device=device)
    _next_chunk(stream, t)  # ends the running one, so that the next holds all of a chunk's bookkeeping
    waits = host_waits(lambda: _next_chunk(stream, t))
    row.check(waits == 0, f"the host waits for the device {waits} times a chunk")


def _next_chunk(stream: RandomStream, t: Tensor) -> None:
    """One forward and the cache's commit; `t` lies on the device already."""
    given = dict(condition_BCFHW=stream.condition, text=stream.text, camera=stream.films, cache=stream.cache)
    stream.dit(stream.latent, t, **given)
    stream.cache.commit()


@torch.inference_mode()
def _parity(row: Stage, preset: Preset, dit: DiT) -> None:
    errors, unmasked = stream_errors(preset, dit)
    told = ", ".join(f"{error:.2g}" for error in errors)
    row.check(max(errors) < TOLERANCE, f"relative difference of chunks {told}")
    row.check(3 * max(errors) < unmasked, f"without the mask it would be {unmasked:.2g}")


def _forwards(preset: Preset, dit: DiT, device: torch.device, frames: int, repeats: int) -> Iterator[Stage]:
    with stage(f"bidirectional forward, {frames} frames", device) as row:
        _bidirectional(row, preset, dit, device, frames, repeats)
    yield row
    chunk = preset.stream.chunk
    with stage("fill the window", device) as row, torch.inference_mode():
        stream = RandomStream(preset, dit)
        for _ in range(-(-(preset.stream.window or preset.shape.frames) // chunk)):
            stream.clean()
        row.found = f"{stream.cache.frames_seen} frames, cameras' scale and shift kept for a chunk"
    yield row
    if row.ok:
        with stage(f"streamed forward, a chunk of {chunk}", device) as row:
            _streamed(row, stream, device, repeats)
        yield row
        del stream
    with stage("stream = masked pass", device) as row:
        _parity(row, preset, dit)
    yield row


# -- the command ---------------------------------------------------------------------------------------------------


def table_line(row: Stage) -> str:
    """The row in Markdown, without the head."""
    speed = f"{row.bytes / row.seconds / 1e9:.2f}" if row.bytes else ""
    size = f"{row.bytes / 1e9:.2f}" if row.bytes else ""
    peaks = (f"{row.cpu_peak / 1e9:.2f}", f"{row.gpu_peak / 1e9:.2f}")
    return markdown_table(HEAD, [(row.name, f"{row.seconds:.3g}", size, speed, *peaks, row.found)]).splitlines()[-1]


def conditions(preset: Preset, device: torch.device) -> str:
    """What the numbers hold for: machine, versions, attention kernel, model and picture size."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    shape, size = preset.shape, preset.model
    kernel = attention.backend(device, DTYPE, size.head_dim)
    return " · ".join(
        (
            f"{gpu}, {os.cpu_count()} CPU cores ({platform.machine()})",
            f"torch {torch.__version__}, Python {platform.python_version()}",
            f"attention {kernel}",
            f"preset {preset.name}, bf16, {shape.height}x{shape.width}, {shape.tokens_per_frame} tokens a frame, text "
            f"of {size.text_len} tokens",
            f"chunk {preset.stream.chunk}, window {preset.stream.window}, sink {preset.stream.sink}",
            f"{released.THREADS} shards side by side",
            "GB are 10^9 bytes; CPU peaks leave the page cache out",
        )
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0 when all went well, 1 when a stage failed, 2 for a mistake in the command or too small a machine."""
    parser = argparse.ArgumentParser(prog="lingbot_nb.report.bench_weights", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="lingbot")
    parser.add_argument("--folder", type=Path, help="disk for the release (default: the system's temporary folder)")
    parser.add_argument("--out", type=Path, help="disk for the converted copy (default: that of --folder)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--frames", type=int, help="of the bidirectional forward (default: the preset's clip)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each forward, after one untimed")
    parser.add_argument("--json", type=Path, help="write the rows here too, after every stage")
    parser.add_argument("--keep", action="store_true", help="leave the weights on the disk")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    preset, device = presets.by_name(options.preset), torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU here: use --device cpu")
    told = conditions(preset, device)
    folder = _new_folder(options.folder, "release-")
    out = _new_folder(options.out or options.folder, "converted-")
    rows: list[Stage] = []
    try:
        print(f"{told}\n\n{markdown_table(HEAD, [])}", flush=True)
        for row in prove(preset, folder, out, device=device, frames=options.frames, repeats=options.repeats):
            rows.append(row)
            print(table_line(row), flush=True)
            if options.json:
                options.json.write_text(
                    json.dumps({"conditions": told, "rows": [asdict(row) for row in rows]}, indent=1)
                )
    finally:
        if not options.keep:
            shutil.rmtree(folder)
            shutil.rmtree(out)
    return 0 if all(row.ok for row in rows) else 1


def _new_folder(parent: Path | None, prefix: str) -> Path:
    if parent is not None:
        parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=prefix, dir=parent))


if __name__ == "__main__":
    sys.exit(main())
