"""The proof at true size, at the smallest size: what it says is what lies on the disk, and a fault does not pass."""

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lingbot_nb.model import masks, released
from lingbot_nb.model.dit import DiT
from lingbot_nb.presets import LINGBOT, MICRO
from lingbot_nb.report import bench_weights

CPU = torch.device("cpu")
STAGES = [
    "before anything",
    "write a random release",
    "weights inspect",
    "weights convert",
    "weights verify",
    "load",
    "compare with what was drawn",
    "bidirectional forward, 2 frames",
    "fill the window",
    "streamed forward, a chunk of 1",
    "stream = masked pass",
]


@dataclass
class Proof:
    """One run of the whole command with --keep."""

    code: int
    printed: list[str]
    rows: dict[str, dict]
    folder: Path


def run(folder: Path, *more: str) -> tuple[int, list[str]]:
    words = ["--preset", "micro", "--device", "cpu", "--frames", "2", "--repeats", "2", "--folder", str(folder), *more]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = bench_weights.main(words)
    return code, printed.getvalue().splitlines()


@pytest.fixture(scope="module")
def proof(tmp_path_factory) -> Proof:
    folder = tmp_path_factory.mktemp("proof")
    code, printed = run(folder, "--keep", "--json", str(folder / "proof.json"))
    rows = json.loads((folder / "proof.json").read_text())["rows"]
    return Proof(code, printed, {row["name"]: row for row in rows}, folder)


def test_every_stage_is_a_row_in_the_table_and_in_the_json(proof):
    assert proof.code == 0 and all(row["ok"] for row in proof.rows.values())
    assert list(proof.rows) == STAGES
    assert proof.printed[0].startswith("no GPU") and "attention SDPA" in proof.printed[0]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in proof.printed[2:]]
    assert [line[0] for line in table] == ["stage", "---", *STAGES]
    assert {len(line) for line in table} == {len(bench_weights.HEAD)}
    assert [line[-1] for line in table[2:]] == [row["found"] for row in proof.rows.values()]


def test_what_it_says_is_what_is_there(proof):
    shapes = released.tensor_shapes(DiT(MICRO.model, device="meta"))
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    fit = f"{len(shapes)} tensors match, 0 do not, {parameters:,} parameters"
    assert [proof.rows[f"weights {step}"]["found"] for step in ("inspect", "convert")] == [fit, fit]
    assert (
        proof.rows["compare with what was drawn"]["found"]
        == f"{len(shapes)} of {len(shapes)} tensors equal, bit by bit"
    )
    for stage in ("write a random release", "weights convert", "weights verify", "load"):
        assert proof.rows[stage]["bytes"] == 2 * parameters and proof.rows[stage]["seconds"] > 0
    for stage in STAGES[-4:]:
        assert "finite" in proof.rows[stage]["found"] or stage in ("fill the window", "stream = masked pass")
    assert "sees 4 of 4 frames" in proof.rows["streamed forward, a chunk of 1"]["found"]


def test_the_release_on_the_disk_is_one(proof):
    (release,) = proof.folder.glob("release-*")
    (converted,) = proof.folder.glob("converted-*")
    tensors = [load_file(next(path.glob("*/*.safetensors"))) for path in (release, converted)]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    (verified,) = released.verify(release)
    assert verified.ok and verified.report.weights.part == "high_noise_model"
    assert verified.report.size == MICRO.model


def test_nothing_stays_on_the_disk_unless_asked(tmp_path):
    code, _ = run(tmp_path / "a", "--out", str(tmp_path / "b"))
    assert code == 0 and not [*(tmp_path / "a").iterdir(), *(tmp_path / "b").iterdir()]


def test_shards_are_as_large_as_asked(tmp_path):
    total = bench_weights.write_release(tmp_path, MICRO, CPU, shard_bytes=60_000)
    (weights,) = released.find(tmp_path)
    sizes = [[x.nbytes for x in load_file(file).values()] for file in weights.files]
    assert len(sizes) > 4
    assert all(sum(shard) <= 60_000 or len(shard) == 1 for shard in sizes)
    assert total == weights.bytes == json.loads((weights.folder / released.INDEX).read_text())["metadata"]["total_size"]


def test_a_cache_that_forgets_would_be_caught(tmp_path, monkeypatch):
    """The masked pass sees all frames here, as if the stream had lost some: far more than rounding."""
    monkeypatch.setattr(bench_weights.masks, "block_causal", lambda lengths, window, sink: masks.full(sum(lengths)))
    code, printed = run(tmp_path)
    assert code == 1
    assert [line.split("|")[1].strip() for line in printed if "FAILED" in line] == ["stream = masked pass"]


def test_a_tensor_that_changed_on_its_way_is_caught(tmp_path, monkeypatch):
    load = released.load_dit

    def one_off(*path, **options):
        dit = load(*path, **options)
        dit.head.head.bias[3] += 1
        return dit

    monkeypatch.setattr(released, "load_dit", one_off)
    code, printed = run(tmp_path)
    assert code == 1 and any("FAILED: 90 of 91 tensors equal" in line for line in printed)


def test_too_small_a_disk_is_told_before_anything_is_written(tmp_path, monkeypatch, capsys):
    usage = type("Usage", (), {"free": 50_000_000_000})
    monkeypatch.setattr(bench_weights.shutil, "disk_usage", lambda path: usage)
    assert bench_weights.main(["--device", "cpu", "--folder", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "2 copies of the weights take 74.3 GB" in error and "50.0 GB are free: name a larger disk" in error
    assert error.startswith("error: ") and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_too_little_memory_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_weights, "free_memory", lambda device: 24_000_000_000)
    monkeypatch.setattr(bench_weights.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10**12}))
    with pytest.raises(RuntimeError, match="take 37.1 GB, and the memory left on cpu is 24.0 GB"):
        bench_weights.check_room(LINGBOT, tmp_path, tmp_path, CPU)


def test_a_gpu_that_is_not_there_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench_weights.main(["--preset", "micro", "--device", "cuda", "--folder", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: torch sees no GPU here: use --device cpu\n"


def test_a_stage_without_room_on_the_gpu_is_a_finding():
    with bench_weights.stage("large", CPU) as row:
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert not row.ok and "try fewer --frames" in row.found and row.seconds > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="counts what only a GPU has")
def test_waits_for_the_gpu_are_counted():
    x = torch.ones(3, device="cuda")
    assert bench_weights.host_waits(lambda: x + 1) == 0
    assert bench_weights.host_waits(lambda: (x.sum().item(), x.cpu())) == 2


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the process's peak memory")
def test_a_stage_has_its_own_memory_peak():
    with bench_weights.stage("large", CPU) as large:
        torch.ones(100_000_000)
    with bench_weights.stage("small", CPU) as small:
        pass
    assert large.cpu_peak - small.cpu_peak > 350_000_000
