"""Released LingBot-World folders in, our folders out; strict, with a report that names every tensor that is off.

Layouts read: two experts (high_noise_model/, low_noise_model/), one DiT in the folder itself with or without an index
and a config.json, v2's transformers/ and transformer_causal/, and the transformer/ folders of diffusers pipelines,
whose tensors may carry diffusers' names. Shards may be fp32, fp16 or bf16; nothing is unpickled but plain tensors.
Memory holds one tensor of each shard at work, whatever the size of the model; a few shards are worked on side by side,
because one core can neither hash nor copy as fast as a disk reads.
"""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from threading import Event
from typing import TypeVar

import torch
from torch import Tensor, nn

from lingbot_nb import presets
from lingbot_nb.model import shards
from lingbot_nb.model.dit import DiT
from lingbot_nb.model.shards import Entry
from lingbot_nb.presets import PATCH, SPACE_STRIDE, ModelSize, Preset

PARTS = (
    "high_noise_model",
    "low_noise_model",
    "lingbot_world_fast",
    "transformers",
    "transformer_causal",
    "transformer",
    "transformer_2",
)
"""Folders that hold a DiT inside a release."""
EXPERTS = (("high_noise_model", "low_noise_model"), ("transformer", "transformer_2"))
"""Parts of a teacher: the high-noise expert, then the low-noise one."""
CARD = "weights.json"
"""Says what a converted folder was made from, with each shard's sha256."""
INDEX = "diffusion_pytorch_model.safetensors.index.json"

COMPANIONS = {
    "VAE": "Wan2.1_VAE.pth",
    "text encoder": "models_t5_umt5-xxl-enc-bf16.pth",
    "tokenizer": "google/umt5-xxl",
}
"""What else a release holds, for `WanVAE` and `WanText`."""

THREADS = min(8, os.cpu_count() or 1)
"""Shards that are read or written side by side."""

Shape = tuple[int, ...]
Progress = Callable[[str], object]
Item, Result = TypeVar("Item"), TypeVar("Result")

_GIB = 2**30
_TOLD = 5
"""Names of each kind that an error spells out; `weights inspect` lists them all."""

# Where diffusers' WanTransformer3DModel keeps a tensor -> where the release does. LingBot's camera tensors have the
# same names in both, as have patch_embedding and the two norms inside an attention.
_RENAMES = tuple(
    (re.compile(pattern), ours)
    for pattern, ours in (
        (r"^condition_embedder\.time_embedder\.linear_1\.", "time_embedding.0."),
        (r"^condition_embedder\.time_embedder\.linear_2\.", "time_embedding.2."),
        (r"^condition_embedder\.text_embedder\.linear_1\.", "text_embedding.0."),
        (r"^condition_embedder\.text_embedder\.linear_2\.", "text_embedding.2."),
        (r"^condition_embedder\.time_proj\.", "time_projection.1."),
        (r"^scale_shift_table$", "head.modulation"),
        (r"^proj_out\.", "head.head."),
        (r"^(blocks\.\d+\.)scale_shift_table$", r"\1modulation"),
        (r"^(blocks\.\d+\.)norm2\.", r"\1norm3."),
        (r"^(blocks\.\d+\.)ffn\.net\.0\.proj\.", r"\1ffn.0."),
        (r"^(blocks\.\d+\.)ffn\.net\.2\.", r"\1ffn.2."),
        (r"^(blocks\.\d+\.)attn1\.", r"\1self_attn."),
        (r"^(blocks\.\d+\.)attn2\.", r"\1cross_attn."),
        (r"^(blocks\.\d+\.\w+_attn\.)to_([qkv])\.", r"\1\2."),
        (r"^(blocks\.\d+\.\w+_attn\.)to_out\.0\.", r"\1o."),
    )
)


def released_name(name: str) -> str:
    """The release's name of a tensor that diffusers renamed; any other name as it is."""
    for pattern, ours in _RENAMES:
        name = pattern.sub(ours, name)
    return name


# -- what lies in a folder ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a tensor lies: the file, its name there, its shape and type."""

    file: Path
    name: str
    entry: Entry


@dataclass(frozen=True)
class Weights:
    """The files of one DiT: `part` is its folder inside the release ("" for the folder itself), `places` goes from the
    release's tensor names to where they lie."""

    part: str
    folder: Path
    files: tuple[Path, ...]
    places: Mapping[str, Place]
    config: Mapping

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: place.entry.shape for name, place in self.places.items()}

    @property
    def bytes(self) -> int:
        return sum(place.entry.bytes for place in self.places.values())

    def of_file(self, file: Path) -> dict[str, str]:
        """Names in the file -> names of the release."""
        return {place.name: ours for ours, place in self.places.items() if place.file == file}

    def tensors(self, file: Path) -> Iterator[tuple[str, Tensor]]:
        """The file's tensors under the release's names, as stored, one at a time."""
        names = self.of_file(file)
        return ((names[name], tensor) for name, tensor in shards.tensors(file, names))


def find(path: Path | str) -> list[Weights]:
    """The DiTs of a released folder (or of one weight file): two for the base release, one for the others.

    Reads headers only. Raises FileNotFoundError for a missing folder or shard, ValueError for damaged files.
    """
    path = Path(path)
    if path.is_file():
        return [_weights("", path.parent, (path,), {})]
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}: give the folder of a downloaded release")
    folders = {"": path} | {part: path / part for part in PARTS}
    found = [_in_folder(part, folder) for part, folder in folders.items() if _holds_weights(folder)]
    if len(found) > 1:
        # Beside its experts a release may keep other weights, such as a VAE.
        found = [weights for weights in found if weights.part or "patch_embedding.weight" in weights.places]
    if not found:
        there = ", ".join(sorted(entry.name for entry in path.iterdir())[:_TOLD]) or "nothing"
        raise FileNotFoundError(
            f"{path} holds no DiT weights, neither in itself nor in {'/, '.join(PARTS)}/ (it holds {there}): "
            "give the folder of a downloaded release"
        )
    return found


def find_one(path: Path | str, part: str | None = None) -> Weights:
    """The DiT called `part` of a release, or its only one. Raises ValueError when that is not clear."""
    found = find(path)
    chosen = [weights for weights in found if part is None or weights.part == part]
    if len(chosen) != 1:
        names = ", ".join(weights.part or "the folder itself" for weights in found)
        raise ValueError(f"{path} holds {names}, part={part!r} was asked for: name one of them")
    return chosen[0]


def companions(path: Path | str) -> dict[str, Path]:
    """Which of VAE, text encoder and tokenizer lie in a release's folder, and where."""
    return {what: Path(path) / name for what, name in COMPANIONS.items() if (Path(path) / name).exists()}


def _holds_weights(folder: Path) -> bool:
    return folder.is_dir() and bool(_indexes(folder) or _shard_files(folder))


def _indexes(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.index.json"))


def _shard_files(folder: Path) -> list[Path]:
    """Numbered safetensors, else the others, else numbered pickles: a VAE and a text encoder may lie beside them."""
    files = sorted(f for f in folder.iterdir() if f.suffix in (shards.SAFETENSORS, *shards.PICKLES))
    safe = [f for f in files if f.suffix == shards.SAFETENSORS]
    return [f for f in safe if _NUMBERED.match(f.stem)] or safe or [f for f in files if _NUMBERED.match(f.stem)]


_NUMBERED = re.compile(r"^(.*?)-?(\d+)-of-(\d+)$")


def _in_folder(part: str, folder: Path) -> Weights:
    indexes = _indexes(folder)
    if len(indexes) > 1:
        raise ValueError(f"{folder} has two indexes, {indexes[0].name} and {indexes[1].name}: remove the stale one")
    files = _indexed(indexes[0]) if indexes else _unindexed(folder)
    weights = _weights(part, folder, files, _config(folder))
    if indexes:
        _check_index(indexes[0], weights)
    return weights


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"index {index} has no weight_map that can be read: download it again") from error


def _indexed(index: Path) -> tuple[Path, ...]:
    names = sorted(set(_weight_map(index).values()))
    absent = [name for name in names if not (index.parent / name).is_file()]
    if absent:
        raise FileNotFoundError(
            f"index {index} names {absent[0]}, which is not there ({len(absent)} of {len(names)} shards are missing): "
            "finish the download"
        )
    return tuple(index.parent / name for name in names)


def _unindexed(folder: Path) -> tuple[Path, ...]:
    files = _shard_files(folder)
    numbers = {f: match for f in files if (match := _NUMBERED.match(f.stem))}
    for match in numbers.values():
        stem, total = match[1], int(match[3])
        have = {int(m[2]) for m in numbers.values() if (m[1], int(m[3])) == (stem, total)}
        absent = sorted(set(range(1, total + 1)) - have)
        if absent:
            raise FileNotFoundError(
                f"shard {absent[0]} of {total} is missing from {folder} ({len(absent)} in all): finish the download, "
                "or the conversion that was stopped"
            )
    return tuple(files)


def _check_index(index: Path, weights: Weights) -> None:
    there = {(place.name, place.file.name) for place in weights.places.values()}
    lost = sorted(set(_weight_map(index).items()) - there)
    if lost:
        raise ValueError(
            f"index {index} says that {lost[0][0]} lies in {lost[0][1]}, where it is not ({len(lost)} such tensors): "
            "the index and the shards are of different downloads"
        )


def _config(folder: Path) -> dict:
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON ({error}): download it again, or remove it") from error
    return config if isinstance(config, dict) else {}


def _weights(part: str, folder: Path, files: tuple[Path, ...], config: dict) -> Weights:
    headers = {file: shards.header(file) for file in files}
    prefix = _wrapper({name for entries in headers.values() for name in entries})
    places: dict[str, Place] = {}
    for file, entries in headers.items():
        for name, entry in entries.items():
            ours = released_name(name.removeprefix(prefix))
            if ours in places:
                raise ValueError(f"{ours} lies in {places[ours].file.name} and in {file.name} of {folder}: remove one")
            places[ours] = Place(file, name, entry)
    return Weights(part, folder, files, places, config)


def _wrapper(names: set[str]) -> str:
    """What a wrapping module put before every name ("model.diffusion_model.", "_orig_mod.", …)."""
    first = "patch_embedding.weight"
    wrapped = [name for name in names if name.endswith("." + first)]
    return wrapped[0].removesuffix(first) if first not in names and wrapped else ""


# -- which model it is --------------------------------------------------------------------------------------------


def recognise(shapes: Mapping[str, Shape], config: Mapping | None = None) -> ModelSize:
    """The model that tensors of these shapes belong to; control cam, act or none follows from the camera embedding.

    Heads and text length leave no trace in shapes: they come from `config` (a config.json), else from the preset of
    the same width; layers likewise before they are counted. Raises ValueError for what is no LingBot DiT.
    """
    config = config or {}
    dim, channels = _shape(shapes, "patch_embedding.weight", 5)[:2]
    ffn_dim = _shape(shapes, "blocks.0.ffn.0.weight", 2)[0]
    known = next((p.model for p in presets.ALL if (p.model.dim, p.model.ffn_dim) == (dim, ffn_dim)), None)
    heads = config.get("num_heads") or config.get("num_attention_heads") or (known and known.heads)
    if not heads:
        raise ValueError(
            f"a DiT of width {dim} and feed-forward {ffn_dim} is of no known size, and its heads cannot be told from "
            "shapes: put a config.json with num_heads beside it, or name a preset"
        )
    counted = 1 + max(int(name.split(".")[1]) for name in shapes if re.match(r"blocks\.\d+\.", name))
    return ModelSize(
        dim=dim,
        heads=int(heads),
        layers=int(config.get("num_layers") or (known and known.layers) or counted),
        ffn_dim=ffn_dim,
        text_dim=_shape(shapes, "text_embedding.0.weight", 2)[1],
        text_len=int(config.get("text_len") or (known and known.text_len) or presets.LINGBOT.model.text_len),
        control_channels=_control_channels(shapes),
        in_channels=channels,
        out_channels=_shape(shapes, "head.head.weight", 2)[0] // (PATCH[1] * PATCH[2]),
        freq_dim=_shape(shapes, "time_embedding.0.weight", 2)[1],
    )


def _shape(shapes: Mapping[str, Shape], name: str, dims: int) -> Shape:
    if name not in shapes:
        raise ValueError(f"there is no {name} among {len(shapes)} tensors: these are not the weights of a LingBot DiT")
    if len(shapes[name]) != dims:
        raise ValueError(
            f"{name} has shape {list(shapes[name])} instead of {dims} dimensions: quantised weights cannot be used"
        )
    return shapes[name]


def _control_channels(shapes: Mapping[str, Shape]) -> int:
    if "patch_embedding_wancamctrl.weight" not in shapes:
        return 0
    features = _shape(shapes, "patch_embedding_wancamctrl.weight", 2)[1]
    channels, rest = divmod(features, SPACE_STRIDE**2 * PATCH[1] * PATCH[2])
    if rest:
        raise ValueError(f"patch_embedding_wancamctrl takes {features} features, which are no whole channels a pixel")
    return channels


def control_name(size: ModelSize) -> str:
    """How people call the model's control."""
    return {0: "none (plain Wan)", 6: "cam", 7: "act"}.get(size.control_channels, f"{size.control_channels} channels")


def preset_of(size: ModelSize) -> Preset | None:
    """The preset of exactly this model, if there is one."""
    return next((preset for preset in presets.ALL if preset.model == size), None)


@dataclass(frozen=True)
class Report:
    """How a DiT's files fit a model of `size`: names that match, are missing, unexpected, or of another shape."""

    weights: Weights
    size: ModelSize
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    wrong_shape: tuple[tuple[str, Shape, Shape], ...]
    """(name, shape found, shape wanted)"""

    @property
    def ok(self) -> bool:
        return not (self.missing or self.unexpected or self.wrong_shape)

    @property
    def parameters(self) -> int:
        return sum(torch.Size(self.weights.shapes[name]).numel() for name in self.matched)

    @property
    def renamed(self) -> int:
        """Tensors that lie in the files under another name than the release's."""
        return sum(place.name != ours for ours, place in self.weights.places.items())

    def problems(self, limit: int | None = None) -> list[str]:
        """One line per kind of trouble, with up to `limit` names."""
        shapes = [f"{name} {list(found)}, wanted {list(wanted)}" for name, found, wanted in self.wrong_shape]
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "of another shape": shapes}
        return [f"{len(names)} {kind}: {_listed(names, limit)}" for kind, names in kinds.items() if names]

    def check(self) -> "Report":
        """Itself; a ValueError that names the first tensors of each trouble when it is not ok."""
        foreign = {n: p.entry.dtype for n, p in self.weights.places.items() if p.entry.dtype not in shards.DTYPES}
        if foreign:
            raise ValueError(
                f"{len(foreign)} tensors in {self.weights.folder} such as {min(foreign)} are "
                f"{foreign[min(foreign)]}: quantised weights cannot be used, get the fp32 or bf16 ones"
            )
        if not self.ok:
            told = "; ".join(self.problems(_TOLD))
            raise ValueError(f"weights in {self.weights.folder} do not fit a DiT of width {self.size.dim}: {told}")
        return self

    def __str__(self) -> str:
        weights, preset = self.weights, preset_of(self.size)
        types = Counter(place.entry.dtype for place in weights.places.values())
        config = "config.json" if weights.config else "no config.json"
        told = [
            f"{weights.part or weights.folder}: {len(weights.files)} files, {len(weights.places)} tensors, "
            f"{weights.bytes / _GIB:.2f} GiB, {', '.join(f'{n} {t}' for t, n in types.items())}, {config}",
            f"  {preset.name if preset else 'no preset'}: width {self.size.dim}, {self.size.layers} layers, "
            f"{self.size.heads} heads, control {control_name(self.size)}",
            f"  {len(self.matched)} tensors match, {self.parameters:,} parameters"
            + (f", {self.renamed} of them renamed" if self.renamed else ""),
        ]
        return "\n".join([*told, *(f"  {problem}" for problem in self.problems())])


def _listed(names, limit: int | None) -> str:
    names = list(names)
    rest = 0 if limit is None else len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def compare(weights: Weights, wanted: Mapping[str, Shape], size: ModelSize) -> Report:
    """How the files fit the tensors that are wanted."""
    found = weights.shapes
    both = sorted(found.keys() & wanted.keys())
    return Report(
        weights,
        size,
        matched=tuple(name for name in both if found[name] == wanted[name]),
        missing=tuple(sorted(wanted.keys() - found.keys())),
        unexpected=tuple(sorted(found.keys() - wanted.keys())),
        wrong_shape=tuple((name, found[name], wanted[name]) for name in both if found[name] != wanted[name]),
    )


def tensor_shapes(module: nn.Module) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def inspect(path: Path | str, *, size: ModelSize | None = None) -> list[Report]:
    """A report for each DiT of a release, from its headers alone. `size` replaces what `recognise` makes of it."""
    return [_report(weights, size) for weights in find(path)]


def _report(weights: Weights, size: ModelSize | None) -> Report:
    size = size or recognise(weights.shapes, weights.config)
    return compare(weights, tensor_shapes(DiT(size, device="meta")), size)


# -- reading and writing ------------------------------------------------------------------------------------------


def shardwise(work: Callable[[Item, Event], Result], items: Iterable[Item]) -> list[Result]:
    """`work(item, stop)` of every item in order, THREADS at a time; an error or Ctrl-C sets `stop` for the others."""
    stop = Event()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            return list(pool.map(lambda item: work(item, stop), items))
        except BaseException:
            stop.set()
            raise


def _tensors(weights: Weights, file: Path, stop: Event) -> Iterator[tuple[str, Tensor]]:
    return takewhile(lambda _: not stop.is_set(), weights.tensors(file))


def load_released(
    path: Path | str,
    dit: DiT,
    *,
    part: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.bfloat16,
) -> Report:
    """Fills a DiT from a release, strictly, shard by shard; build it with `DiT(size, device="meta")` first.

    Tensors are assigned, so the DiT then lies on `device` in `dtype` (None: as stored) and never exists twice. `part`
    names the expert of a release with two. Raises ValueError before anything is loaded when a name or shape is off.
    """
    weights = find_one(path, part)
    report = compare(weights, tensor_shapes(dit), dit.size).check()
    _fill(dit, weights, device, dtype)
    return report


def load_dit(
    path: Path | str,
    *,
    part: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.bfloat16,
) -> DiT:
    """The DiT of a release, its size told from the weights, filled as by `load_released` and frozen for inference."""
    weights = find_one(path, part)
    report = _report(weights, None).check()
    dit = DiT(report.size, device="meta")
    _fill(dit, weights, device, dtype)
    return dit.eval().requires_grad_(False)


def load_experts(path: Path | str, **options) -> tuple[DiT, DiT]:
    """The teacher's high-noise and low-noise DiT; `options` are `load_dit`'s. ValueError for a release with one DiT."""
    found = {weights.part for weights in find(path)}
    pair = next((parts for parts in EXPERTS if found.issuperset(parts)), None)
    if pair is None:
        names = ", ".join(sorted(part or "the folder itself" for part in found))
        raise ValueError(f"{path} holds {names}: a teacher has two experts, {' and '.join(EXPERTS[0])}")
    high, low = (load_dit(path, part=part, **options) for part in pair)
    return high, low


def _fill(dit: DiT, weights: Weights, device: torch.device | str, dtype: torch.dtype | None) -> None:
    # With its number: a thread would take another "cuda" than its caller's.
    device = torch.empty(0, device=device).device

    def load(file: Path, stop: Event) -> dict[str, Tensor]:
        return {name: x.to(dtype or x.dtype).to(device) for name, x in _tensors(weights, file, stop)}

    for state in shardwise(load, weights.files):
        dit.load_state_dict(state, strict=False, assign=True)


def convert(
    path: Path | str,
    out: Path | str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    size: ModelSize | None = None,
    progress: Progress = lambda line: None,
) -> list[Report]:
    """Writes a release again in `dtype`, with the release's names, one shard for each of its shards; returns reports.

    Everything is checked before the first byte is written. Each shard appears under its name when it is whole, the
    index last; a conversion that was stopped goes on where it was. Raises ValueError for weights that do not fit or an
    `out` that is the source, RuntimeError when the disk is too full.
    """
    out = Path(out)
    reports = [report.check() for report in inspect(path, size=size)]
    for report in reports:
        if (out / report.weights.part).resolve() == report.weights.folder.resolve():
            raise ValueError(f"{out} is where the weights lie: convert into another folder")
    jobs = [job for report in reports for job in _jobs(report.weights, out / report.weights.part, dtype)]
    _check_disk(out, jobs)
    for report in reports:
        mine = [job for job in jobs if job.weights is report.weights]
        digests = dict(shardwise(lambda job, stop: (job.target.name, _carry_out(job, progress, stop)), mine))
        _close(out / report.weights.part, mine, digests, report)
    return [_report(find_one(out, report.weights.part), report.size).check() for report in reports]


@dataclass(frozen=True)
class _Job:
    """One shard to write: `entries` in the order of the source's tensors."""

    weights: Weights
    source: Path
    target: Path
    entries: Mapping[str, Entry]

    @property
    def stamp(self) -> str:
        """Tells whether a shard that is there already was made from this very file."""
        stat = self.source.stat()
        return json.dumps([str(self.source.resolve()), stat.st_size, stat.st_mtime_ns])

    @property
    def done(self) -> bool:
        if not self.target.is_file():
            return False
        try:
            there, stamp = shards.header(self.target), shards.metadata(self.target).get("source")
        except ValueError:
            return False
        announced = {name: (entry.shape, entry.dtype) for name, entry in self.entries.items()}
        return stamp == self.stamp and {name: (e.shape, e.dtype) for name, e in there.items()} == announced


def _jobs(weights: Weights, folder: Path, dtype: torch.dtype) -> list[_Job]:
    kind = next(name for name, value in shards.DTYPES.items() if value == dtype)
    files = [file for file in weights.files if weights.of_file(file)]
    jobs = []
    for number, file in enumerate(files, 1):
        # The order in which the source is read: by position in the file.
        places = sorted(weights.of_file(file).values(), key=lambda ours: weights.places[ours].entry.start)
        entries = {ours: replace(weights.places[ours].entry, dtype=kind) for ours in places}
        target = folder / f"diffusion_pytorch_model-{number:05}-of-{len(files):05}{shards.SAFETENSORS}"
        jobs.append(_Job(weights, file, target, entries))
    return jobs


def _check_disk(out: Path, jobs: list[_Job]) -> None:
    needed = sum(entry.bytes for job in jobs if not job.done for entry in job.entries.values())
    there = next(folder for folder in (out, *out.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise RuntimeError(
            f"converting needs {needed / _GIB:.1f} GiB in {out}, and {free / _GIB:.1f} GiB are free: "
            "make room or choose another disk"
        )


def _carry_out(job: _Job, progress: Progress, stop: Event) -> str:
    """Write the shard unless it is there; its sha256."""
    if job.done:
        progress(f"{job.target.name}: there already")
        return shards.sha256(job.target)
    dtype = shards.DTYPES[next(iter(job.entries.values())).dtype]
    data = ((name, tensor.to(dtype)) for name, tensor in _tensors(job.weights, job.source, stop))
    digest = shards.write(job.target, job.entries, data, source=job.stamp)
    progress(f"{job.target.name}: {len(job.entries)} tensors from {job.source.name}")
    return digest


def _close(folder: Path, jobs: list[_Job], digests: dict[str, str], report: Report) -> None:
    """The small files, the index last: an index on disk means whole weights."""
    weight_map = {name: job.target.name for job in jobs for name in job.entries}
    total = sum(entry.bytes for job in jobs for entry in job.entries.values())
    config = {**report.weights.config, **config_of(report.size)}
    _write_json(folder / "config.json", config)
    _write_json(folder / CARD, {"source": str(report.weights.folder.resolve()), "sha256": digests})
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def config_of(size: ModelSize) -> dict:
    """A release's config.json, as far as it follows from the model's size."""
    return {
        "dim": size.dim,
        "num_heads": size.heads,
        "num_layers": size.layers,
        "ffn_dim": size.ffn_dim,
        "text_len": size.text_len,
        "in_dim": size.in_channels,
        "out_dim": size.out_channels,
        "freq_dim": size.freq_dim,
        "eps": size.eps,
    }


def _write_json(path: Path, content: dict) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


@dataclass(frozen=True)
class Verified:
    """What a full read of a DiT's files found: tensors with a NaN or infinity, files that changed since converted."""

    report: Report
    not_finite: tuple[str, ...]
    changed: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return self.report.ok and not self.not_finite and not self.changed

    def __str__(self) -> str:
        kinds = {"tensors with NaN or infinity": self.not_finite, "files changed since conversion": self.changed}
        told = [f"  {len(names)} {kind}: {_listed(names, None)}" for kind, names in kinds.items() if names]
        return "\n".join([str(self.report), *told, "  all well" if self.ok else "  NOT usable as it is"])


def verify(
    path: Path | str, *, size: ModelSize | None = None, progress: Progress = lambda line: None
) -> list[Verified]:
    """Reads every tensor of a release or of a converted folder: names, shapes, finite values and, where a card has
    them, checksums."""
    return [_verify(report, progress) for report in inspect(path, size=size)]


def _verify(report: Report, progress: Progress) -> Verified:
    weights = report.weights

    def read(file: Path, stop: Event) -> list[str]:
        not_finite = [name for name, tensor in _tensors(weights, file, stop) if not _finite(tensor)]
        progress(f"{file.name}: read")
        return not_finite

    not_finite = [name for names in shardwise(read, weights.files) for name in names]
    return Verified(report, tuple(not_finite), tuple(_changed(weights.folder)))


def _finite(tensor: Tensor) -> bool:
    # The extremes are finite only if all values are, and finding them needs no second tensor of that size.
    return tensor.numel() == 0 or all(value.isfinite().item() for value in torch.aminmax(tensor))


def _changed(folder: Path) -> list[str]:
    card = folder / CARD
    if not card.is_file():
        return []
    try:
        digests = dict(json.loads(card.read_text())["sha256"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"card {card} is unreadable: convert again") from error

    def same(name: str, stop: Event) -> bool:
        return (folder / name).is_file() and shards.sha256(folder / name) == digests[name]

    return [name for name, equal in zip(digests, shardwise(same, digests), strict=True) if not equal]
