"""The accounting against published counts, torch's own FLOP counter and an independent list of tensor names."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from lingbot_nb.model import masks, packing
from lingbot_nb.model.dit import DiT
from lingbot_nb.model.vae import MICRO_VAE, TinyVAE
from lingbot_nb.presets import LINGBOT, LINGBOT_1B, LINGBOT_ACT, MICRO, TINY, StreamSettings
from lingbot_nb.report import architecture as arch
from lingbot_nb.report import bench

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.mark.parametrize(
    ("preset", "tensors", "parameters"),
    [(LINGBOT, 1421, 18_544_332_864), (LINGBOT_ACT, 1421, 18_545_643_584), (LINGBOT_1B, 1071, 1_709_502_016)],
)
def test_released_sizes(preset, tensors, parameters):
    assert arch.total(arch.tensor_shapes(preset.model)) == arch.Count(tensors, parameters)


def test_lingbot_adds_326_tensors_to_wan():
    lingbot = arch.tensor_shapes(LINGBOT.model)
    wan = arch.tensor_shapes(arch.without_camera(LINGBOT.model))
    found = arch.diff(wan, lingbot)
    assert (len(found.same), len(found.only_first), len(found.only_second), found.reshaped) == (1095, 0, 326, ())
    assert {arch.part_of(name) for name in found.only_second} == {"camera"}
    parts = arch.count_parts(lingbot)
    assert parts["camera"].tensors == 326 and round(parts["camera"].parameters / 1e9, 3) == 4.255
    assert sum(part.parameters for part in parts.values()) == 18_544_332_864
    folded = arch.fold_layers(found.only_second)
    assert len(folded) == 14 and sorted(set(folded.values())) == [1, 40]


def test_every_name_of_the_reference_has_a_part():
    with safe_open(FIXTURES / "lingbot_cam_tiny.safetensors", "np") as file:
        names = [key.removeprefix("weights/") for key in file.keys() if key.startswith("weights/")]
    by_hand = {name: arch.part_of(name) for name in names}
    assert by_hand["blocks.0.norm3.weight"] == "cross-attention"
    assert by_hand["blocks.1.cam_scale_layer.bias"] == by_hand["patch_embedding_wancamctrl.weight"] == "camera"
    assert by_hand["patch_embedding.weight"] == by_hand["head.head.bias"] == "patch and head"
    assert by_hand["head.modulation"] == by_hand["blocks.0.modulation"] == "modulation"
    assert set(by_hand.values()) == set(arch.PARTS)
    with pytest.raises(ValueError, match="lora_up"):
        arch.part_of("lora_up.weight")


@pytest.mark.parametrize(("visible", "milliseconds"), [(6, 997), (9, 1111), (12, 1224)])
def test_chunk_flops_give_the_known_floor(visible, milliseconds):
    """14B with camera, 3 frames, 4 + 1 forwards at 790 TFLOP/s: a count made outside this project."""
    flops = arch.chunk_flops(LINGBOT.model, LINGBOT.shape, 3, visible, forwards=5)
    assert flops / 790e12 * 1000 == pytest.approx(milliseconds, abs=1)


def test_flops_agree_with_torch_counting():
    """The layers' share of what torch counts in a real forward of a small DiT with a whole clip in sight."""
    size, shape = TINY.model, TINY.shape.with_frames(3)
    dit = DiT(size)
    cells = (3, shape.latent_height, shape.latent_width)
    text = dit.text(torch.zeros(1, size.text_len, size.text_dim))
    films = dit.film(torch.zeros(1, size.control_channels * 64, *cells))
    latent, condition = torch.zeros(1, 16, *cells), torch.zeros(1, 20, *cells)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), counter:
        dit(latent, torch.tensor(500.0), condition_BCFHW=condition, text=text, camera=films)
    mine = arch.forward_flops(size, shape, 3, 3)
    counted = counter.get_total_flops()
    outside = 2 * shape.tokens * size.dim * (36 * 4 + 64) + 2 * size.dim * (size.freq_dim + 7 * size.dim)
    assert counted == pytest.approx(mine.linear + mine.attention + outside, rel=1e-6)


def test_kv_bytes_and_visible_frames_by_hand():
    assert arch.kv_bytes(LINGBOT.model, LINGBOT.shape) == 1_277_952_000
    assert arch.kv_bytes(TINY.model, TINY.shape, frames=7, value_bytes=4) == 2 * 8 * 7 * 60 * 256 * 4
    lengths = [1, 3, 3, 3]
    assert arch.visible_frames(StreamSettings(chunk=3, window=6, sink=1), lengths) == [1, 4, 6, 6]
    assert arch.visible_frames(StreamSettings(chunk=3, window=None), lengths) == [1, 4, 7, 10]


def test_shapes_come_from_headers_alone(tmp_path):
    first = {"a": torch.zeros(2, 3), "b": torch.zeros(4)}
    second = {"b": torch.zeros(5), "c": torch.zeros((), dtype=torch.bfloat16)}
    save_file(first, tmp_path / "one.safetensors", metadata={"note": "x"})
    (tmp_path / "shards").mkdir()
    save_file({"b": second["b"]}, tmp_path / "shards" / "model-1.safetensors")
    save_file({"c": second["c"]}, tmp_path / "shards" / "model-2.safetensors")
    found = arch.diff(arch.read_shapes(tmp_path / "one.safetensors"), arch.read_shapes(tmp_path / "shards"))
    assert found == arch.Diff((), ("a",), ("c",), (("b", (4,), (5,)),))


def test_damaged_headers_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no DiT weights"):
        arch.read_shapes(tmp_path)
    file = tmp_path / "weights.safetensors"
    for content in (b"", b"abc", struct.pack("<Q", 1 << 60) + b"{}", struct.pack("<Q", 4) + b"\xff\xfe{}"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="weights.safetensors"):
            arch.read_shapes(file)
    body = json.dumps({"a": 3}).encode()
    file.write_bytes(struct.pack("<Q", len(body)) + body)
    with pytest.raises(ValueError, match="damaged"):
        arch.read_shapes(file)


def test_a_folder_with_two_models_is_refused(tmp_path):
    for name in ("one", "two"):
        save_file({"a": torch.zeros(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="a lies in one.safetensors and in two.safetensors"):
        arch.read_shapes(tmp_path)


def test_checkpoints_under_other_names_are_the_same_network(tmp_path):
    theirs = {"condition_embedder.time_proj.weight": torch.zeros(6, 2), "blocks.0.attn2.to_out.0.bias": torch.zeros(2)}
    ours = {"model.patch_embedding.weight": torch.zeros(2), "model.time_projection.1.weight": torch.zeros(6, 2)}
    save_file(theirs, tmp_path / "theirs.safetensors")
    save_file(ours, tmp_path / "ours.safetensors")
    found = arch.diff(*(arch.read_shapes(tmp_path / f"{name}.safetensors") for name in ("theirs", "ours")))
    assert found.same == ("time_projection.1.weight",)
    assert (found.only_first, found.only_second) == (("blocks.0.cross_attn.o.bias",), ("patch_embedding.weight",))


def test_changes_are_relative_and_by_part(tmp_path):
    names = ("blocks.0.ffn.0.weight", "blocks.1.ffn.2.bias", "blocks.0.self_attn.q.weight", "head.modulation")
    before = {name: torch.randn(5, 7) for name in names}
    after = {name: tensor.clone() for name, tensor in before.items()}
    after[names[0]] += 0.25
    after[names[3]] = torch.zeros(2)
    after["patch_embedding_wancamctrl.bias"] = torch.ones(3)
    folder = tmp_path / "shards"
    folder.mkdir()
    save_file({name: before[name] for name in names[:2]}, folder / "model-00001-of-00002.safetensors")
    save_file({name: before[name] for name in names[2:]}, folder / "model-00002-of-00002.safetensors")
    save_file(after, tmp_path / "after.safetensors")
    found = arch.changes(folder, tmp_path / "after.safetensors")
    size = torch.cat([before[name] for name in names[:2]]).norm().item()
    assert found.keys() == {"feed-forward", "self-attention"}
    assert found["feed-forward"].parameters == 70 and found["self-attention"] == arch.Change(35, 0.0)
    assert found["feed-forward"].relative == pytest.approx(0.25 * 35**0.5 / size, rel=1e-5)


def test_changes_of_packed_weights_are_those_of_what_they_unpack_to(tmp_path):
    name = "blocks.0.ffn.0.weight"
    before = {name: torch.randn(256, 256), "head.modulation": torch.randn(1, 2, 48)}
    after = {part: 1.5 * tensor for part, tensor in before.items()}
    for file, state in (("before", before), ("after", after)):
        save_file(packing.packed(state), tmp_path / f"{file}.safetensors")
    found = arch.changes(*(tmp_path / f"{file}.safetensors" for file in ("before", "after")))
    assert found["feed-forward"].parameters == 256**2
    assert found["feed-forward"].relative == pytest.approx(0.5, abs=0.01)
    assert arch.read_shapes(tmp_path / "after.safetensors") == {part: tuple(t.shape) for part, t in before.items()}


def test_measure_counts_runs_and_orders_percentiles():
    calls, waits = [], []
    timing = bench.measure(lambda: calls.append(1), warmup=3, repeats=7, sync=lambda: waits.append(1))
    assert len(calls) == 10 and len(waits) == 14 and timing.n == 7
    assert 0 <= timing.p10 <= timing.median <= timing.p90
    with pytest.raises(ValueError, match="at least once"):
        bench.measure(lambda: None, repeats=0)


def test_measure_stops_when_its_time_is_up():
    assert bench.measure(lambda: None, repeats=5, seconds=1e-9).n == 1


def test_chunk_time_adds_up():
    stages = {
        name: bench.Timing(ms, ms, ms, 1)
        for name, ms in (("camera", 5), ("forward", 20), ("clean pass", 25), ("decode", 10))
    }
    assert bench.chunk_ms(stages, 4) == 120
    assert bench.chunk_ms(stages, 2, clean_pass=False) == 55
    assert bench.chunk_fps(stages, 4, chunk=3) == pytest.approx(100)
    assert "| 4+1 | 120 | 33.3 | 2.08× |" in bench.speed_table(stages, chunk=1)
    assert bench.stage_table(stages).splitlines()[2] == "| camera | 5.0 | 5.0 – 5.0 | 1 |"


def test_student_stages_run_in_a_full_window():
    stages = bench.student_stages(MICRO, DiT(MICRO.model), TinyVAE(MICRO_VAE), warmup=1, repeats=2)
    assert list(stages) == ["camera", "forward", "clean pass", "decode"]
    assert all(timing.median > 0 and timing.n == 2 for timing in stages.values())


@pytest.mark.parametrize("sink", [0, 1])
def test_ranges_compute_what_the_mask_says(sink):
    mask = masks.block_causal([1, 2, 2, 2], window=4, sink=sink)
    q, k, v = torch.randn(3, 2, 7 * 5, 2, 8, generator=torch.Generator().manual_seed(0))
    scores = np.einsum("bqnd,bknd->bnqk", q, k) / np.sqrt(8)
    keep = np.kron(mask.keep.numpy(), np.ones((5, 5))) > 0
    scores = np.where(keep, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    want = np.einsum("bnqk,bknd->bqnd", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(bench.attend_ranges(q, k, v, mask, 5), want, atol=1e-5)


def test_attention_times_names_three_ways():
    times = bench.attention_times(MICRO.model, masks.block_causal([1] * 4), 6, repeats=2)
    assert list(times) == ["no mask", "dense mask", "ranges"]
