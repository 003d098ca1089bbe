"""Fake releases in every layout: what is read, what is written, and one clear sentence for everything that is wrong."""

import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Event
from time import sleep

import pytest
import torch
from safetensors.torch import load_file, save_file

from lingbot_nb import cli
from lingbot_nb.distill import flow, teacher
from lingbot_nb.distill.forcing import gaussian
from lingbot_nb.model import released, shards
from lingbot_nb.model.dit import DiT
from lingbot_nb.presets import LINGBOT, LINGBOT_1B, LINGBOT_ACT, MICRO, FlowSettings
from lingbot_nb.world.latents import Batch

CAM = replace(MICRO.model, control_channels=6)
ACT = replace(MICRO.model, control_channels=7)


def state(size=CAM, seed=0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        shapes = released.tensor_shapes(DiT(size))
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def shard(tensors: dict, folder: Path, count=3, *, name="model", index=True, config=None, dtype=torch.float32) -> Path:
    """A folder of shards; tensors are dealt out in turn, so that every layer is spread over all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    names, weight_map = sorted(tensors), {}
    for i in range(count):
        file = f"{name}-{i + 1:05}-of-{count:05}.safetensors"
        save_file({n: tensors[n].to(dtype) for n in names[i::count]}, folder / file)
        weight_map |= dict.fromkeys(names[i::count], file)
    if index:
        text = json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
        (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def diffusers_name(name: str) -> str:
    """diffusers' own conversion, one name at a time."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    return next(iter(convert_wan_transformer_to_diffusers({name: torch.zeros(1)})))


def base(path: Path) -> Path:
    for seed, part in enumerate(("high_noise_model", "low_noise_model")):
        shard(state(seed=seed), path / part, config={"num_heads": 2, "num_layers": 2, "text_len": 16})
    for other in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
        (path / other).write_bytes(b"x")
    return path


def fast(path: Path) -> Path:
    return shard(state(), path, 16, config={})


def act(path: Path) -> Path:
    return shard(state(ACT), path, config={"control_type": "act"})


def v2(path: Path) -> Path:
    return shard(state(), path / "transformers", dtype=torch.bfloat16).parent


def causal(path: Path) -> Path:
    return shard(state(), path / "transformer_causal", 2, index=False).parent


def root_shards(path: Path) -> Path:
    shard(state(), path, 6, index=False, dtype=torch.bfloat16)
    torch.save({"conv1.weight": torch.zeros(2)}, path / "Wan2.1_VAE.pth")
    save_file({"conv1.weight": torch.zeros(2)}, path / "vae.safetensors")
    return path


def renamed(path: Path) -> Path:
    pytest.importorskip("diffusers")
    tensors = {diffusers_name(name): tensor for name, tensor in state().items()}
    return shard(tensors, path / "transformer", config={"num_attention_heads": 2}).parent


def wrapped(path: Path) -> Path:
    return shard({f"model.diffusion_model.{name}": tensor for name, tensor in state().items()}, path)


def pickled(path: Path) -> Path:
    path.mkdir()
    tensors = state()
    for i, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        torch.save({name: tensors[name] for name in names}, path / f"pytorch_model-{i:05}-of-00002.bin")
    return path


LAYOUTS = (base, fast, act, v2, causal, root_shards, renamed, wrapped, pickled)


@pytest.fixture(params=LAYOUTS, ids=lambda make: make.__name__)
def release(request, tmp_path) -> Path:
    return request.param(tmp_path / "release")


def expected(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Part -> tensors, read by safetensors or torch and told apart by diffusers' own table."""
    if any(folder.glob("*.bin")):
        return {"": state()}
    names = {diffusers_name(name): name for name in state()} if (folder / "transformer").exists() else {}
    found = {}
    for file in folder.rglob("*-of-*.safetensors"):
        for name, tensor in load_file(file).items():
            ours = names.get(name, name.removeprefix("model.diffusion_model."))
            part = "" if file.parent == folder else file.parent.name
            found.setdefault(part, {})[ours] = tensor
    return found


# -- reading -------------------------------------------------------------------------------------------------------


def test_every_layout_is_found_and_matches(release):
    reports = released.inspect(release)
    wanted = expected(release)
    assert {report.weights.part for report in reports} == wanted.keys()
    for report in reports:
        assert report.ok and report.matched == tuple(sorted(wanted[report.weights.part]))
        assert report.size == (ACT if released.control_name(report.size) == "act" else CAM)
        assert report.parameters == sum(t.numel() for t in wanted[report.weights.part].values())
    assert not any(report.problems() for report in reports)


def test_every_layout_loads_to_the_last_tensor(release):
    for part, wanted in expected(release).items():
        size = ACT if wanted["patch_embedding_wancamctrl.weight"].shape[1] == 7 * 256 else CAM
        dit = DiT(size, device="meta")
        released.load_released(release, dit, part=part)
        for name, tensor in dit.state_dict().items():
            assert torch.equal(tensor, wanted[name].bfloat16()), name
        assert all(p.requires_grad for p in dit.parameters())


def test_every_layout_converts_to_one_that_loads_the_same(release, tmp_path):
    out = tmp_path / "ours"
    reports = released.convert(release, out)
    for part, wanted in expected(release).items():
        written = {k: v for f in sorted((out / part).glob("*.safetensors")) for k, v in load_file(f).items()}
        assert written.keys() == wanted.keys()
        assert all(torch.equal(written[name], wanted[name].bfloat16()) for name in wanted)
    assert all(report.renamed == 0 and report.ok for report in reports)
    assert all(verified.ok for verified in released.verify(out))
    assert not list(out.rglob("*.partial"))


def test_loading_keeps_the_stored_type_when_asked(tmp_path):
    folder, dit = fast(tmp_path / "fast"), DiT(CAM, device="meta")
    released.load_released(folder, dit, dtype=None)
    assert all(torch.equal(tensor, state()[name]) for name, tensor in dit.state_dict().items())
    released.load_released(folder, DiT(CAM))  # onto weights that are there already


def test_a_loaded_dit_runs(tmp_path):
    dit = DiT(CAM, device="meta")
    released.load_released(causal(tmp_path / "x"), dit, dtype=torch.float32)
    clip = torch.randn(1, 16, 1, 4, 6)
    v = dit(
        clip, torch.tensor(500.0), condition_BCFHW=torch.zeros(1, 20, 1, 4, 6), text=dit.text(torch.zeros(1, 3, 64))
    )
    assert v.shape == clip.shape and v.isfinite().all()


def test_a_teacher_is_two_experts_that_meet_at_the_boundary(tmp_path):
    """The base release in one call, sampled with guidance and a negative prompt; by hand it is the same clip."""
    pytest.importorskip("diffusers")
    folder = base(tmp_path / "base")
    experts = released.load_experts(folder, dtype=torch.float32)
    inputs = torch.Generator().manual_seed(0)
    noise, condition, control = (torch.randn(1, c, 1, 4, 6, generator=inputs) for c in (16, 20, 384))
    prompts = [torch.randn(1, 3, 64, generator=inputs) for _ in range(2)]
    batch, settings = Batch(noise, condition, control, prompts[0]), FlowSettings(shift=10.0, teacher_steps=4)
    start, scales = gaussian(noise, torch.Generator().manual_seed(1)), (5.0, 3.0)
    options = dict(guidance=scales, generator=torch.Generator().manual_seed(1))
    clip = teacher.teacher_clip(*experts, batch, prompts[1], settings, **options)

    by_hand = DiT(CAM)
    asked = []

    @torch.no_grad()
    def one_step(x, t):
        asked.append(t)
        part, w = ("high_noise_model", 5.0) if t >= 947 else ("low_noise_model", 3.0)
        by_hand.load_state_dict(expected(folder)[part])
        given = dict(condition_BCFHW=condition, camera=by_hand.film(control))
        wanted, unwanted = (by_hand(x, torch.tensor(t), text=by_hand.text(prompt), **given) for prompt in prompts)
        return unwanted + w * (wanted - unwanted)

    states = [x for _, x in flow.unipc(one_step, start, 4, shift=10.0)]
    assert asked[0] >= 947 > asked[-1]
    assert torch.equal(clip, states[-1]) and not torch.equal(clip, start)
    assert not any(p.requires_grad for dit in experts for p in dit.parameters())
    with pytest.raises(ValueError, match="guidance w = 5.0 needs an unconditional velocity"):
        teacher.teacher_velocity(*experts, batch)
    alone = teacher.teacher_clip(experts[0], None, batch, None, settings, **{**options, "guidance": (1.0, 1.0)})
    assert alone.isfinite().all() and not torch.equal(alone, clip)


def test_a_release_of_one_dit_is_no_teacher(tmp_path):
    folder = v2(tmp_path / "v2")
    with pytest.raises(ValueError, match="holds transformers: a teacher has two experts, high_noise_model and low"):
        released.load_experts(folder)
    assert released.load_dit(folder).size == CAM


def test_the_names_are_diffusers_own_both_ways():
    pytest.importorskip("diffusers")
    for name in state():
        assert released.released_name(diffusers_name(name)) == name
        assert released.released_name(name) == name


@pytest.mark.parametrize("preset, tensors", [(LINGBOT, 1421), (LINGBOT_ACT, 1421), (LINGBOT_1B, 1071)])
def test_true_sizes_are_recognised_from_shapes_alone(preset, tensors):
    shapes = released.tensor_shapes(DiT(preset.model, device="meta"))
    assert len(shapes) == tensors
    assert released.recognise(shapes) == preset.model
    assert released.preset_of(released.recognise(shapes)) is preset
    # A missing last layer does not make it a smaller model.
    cut = {name: shape for name, shape in shapes.items() if not name.startswith(f"blocks.{preset.model.layers - 1}.")}
    assert released.recognise(cut) == preset.model


def test_plain_wan_has_no_control():
    shapes = released.tensor_shapes(DiT(replace(MICRO.model, control_channels=0), device="meta"))
    assert released.recognise(shapes).control_channels == 0


def test_a_config_speaks_for_unknown_widths():
    size = replace(CAM, dim=60, heads=3, ffn_dim=100, layers=1)
    shapes = released.tensor_shapes(DiT(size, device="meta"))
    assert released.recognise(shapes, {"num_heads": 3, "text_len": 16}) == size
    with pytest.raises(ValueError, match="width 60 .* heads cannot be told from shapes: put a config.json"):
        released.recognise(shapes)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the process's peak memory")
def test_memory_stays_at_a_few_tensors(tmp_path):
    """8 shards of 9 MB, two at a time; the source never sits in memory, and loading costs the model and little more."""
    size = replace(CAM, dim=384, heads=8, ffn_dim=768, layers=8, text_dim=64)
    with torch.device("meta"):
        shapes = released.tensor_shapes(DiT(size))
    folder = tmp_path / "big"
    folder.mkdir()
    names = sorted(shapes, key=lambda name: [int(n) for n in re.findall(r"blocks\.(\d+)", name)])
    for i in range(8):
        part = {name: torch.full(shapes[name], 0.5) for name in names[i * len(names) // 8 : (i + 1) * len(names) // 8]}
        save_file(part, folder / f"model-{i + 1:05}-of-00008.safetensors")
    (folder / "config.json").write_text('{"num_heads": 8, "text_len": 16}')
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    code = f"""
import re
from pathlib import Path
from lingbot_nb.model import released
from lingbot_nb.model.dit import DiT
peak = lambda: 1024 * int(re.search(r"VmHWM: *(\\d+)", Path("/proc/self/status").read_text().replace("\\t", " "))[1])
released.THREADS = 2
report, = released.inspect({str(folder)!r})
before = peak()
released.convert({str(folder)!r}, {str(tmp_path / "out")!r})
converted = peak()
released.verify({str(tmp_path / "out")!r})
verified = peak()
dit = DiT(report.size, device="meta")
released.load_released({str(folder)!r}, dit)
print(converted - before, verified - before, peak() - before)
"""
    # Every tensor in pages of its own: what malloc keeps of freed ones differs by 10 MB from run to run.
    around = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=around)
    print(done.stdout, total)
    converted, verified, loaded = map(int, done.stdout.split())
    shard_bytes = total / 8
    assert total > 70e6
    assert converted < 2 * shard_bytes and verified < 2 * shard_bytes
    assert loaded < total / 2 + 2 * 2 * shard_bytes


# -- writing -------------------------------------------------------------------------------------------------------


def test_conversion_goes_on_where_it_stopped(tmp_path, monkeypatch):
    folder, out = fast(tmp_path / "fast"), tmp_path / "out"
    written, write = [], shards.write
    monkeypatch.setattr(released, "THREADS", 1)  # so that it stops at the fifth and not around it

    def stop_at_the_fifth(path, *arguments, **options):
        if len(written) == 4:
            raise KeyboardInterrupt
        written.append(Path(path).name)
        return write(path, *arguments, **options)

    monkeypatch.setattr(shards, "write", stop_at_the_fifth)
    with pytest.raises(KeyboardInterrupt):
        released.convert(folder, out)
    assert len(list(out.glob("*.safetensors"))) == 4 and not list(out.glob("*.json"))
    with pytest.raises(FileNotFoundError, match="shard 5 of 16 is missing .*12 in all.*conversion that was stop"):
        released.inspect(out)
    monkeypatch.setattr(
        shards, "write", lambda path, *a, **o: (written.append(Path(path).name), write(path, *a, **o))[1]
    )
    released.convert(folder, out)
    assert len(written) == len(set(written)) == 16
    assert released.verify(out)[0].ok
    before = {file: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}
    released.convert(folder, out)
    assert before == {file: file.stat().st_mtime_ns for file in out.glob("*.safetensors")}


def test_an_error_ends_the_other_shards_too(tmp_path, monkeypatch):
    """Two shards are under way; one fails, and the other, which waits for that, stops at its next tensor."""
    folder, out = fast(tmp_path / "fast"), tmp_path / "out"
    monkeypatch.setattr(released, "THREADS", 2)
    first_failed = Event()
    tensors = released.Weights.tensors

    def failing(self, file):
        if "00001" in file.name:
            first_failed.set()
            raise OSError("the disk is gone")
        for named in tensors(self, file):
            first_failed.wait(10)
            sleep(0.05)
            yield named

    monkeypatch.setattr(released.Weights, "tensors", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        released.convert(folder, out)
    assert not [*out.glob("*.safetensors"), *out.glob("*.json")]


def test_another_source_or_type_is_written_again(tmp_path):
    folder, out = base(tmp_path / "base"), tmp_path / "out"
    released.convert(folder / "high_noise_model", out)
    released.convert(folder / "low_noise_model", out)
    dit = DiT(CAM, device="meta")
    released.load_released(out, dit)
    assert torch.equal(dit.head.modulation, state(seed=1)["head.modulation"].bfloat16())
    released.convert(folder / "low_noise_model", out, dtype=torch.float32)
    released.load_released(out, dit, dtype=None)
    assert torch.equal(dit.head.modulation, state(seed=1)["head.modulation"])


def test_a_shard_cut_short_leaves_nothing_under_its_name(tmp_path):
    entries = {"a": shards.Entry((2, 2), "F32"), "b": shards.Entry((3,), "F32")}

    def data():
        yield "a", torch.zeros(2, 2)
        raise OSError("no space left on device")

    with pytest.raises(OSError):
        shards.write(tmp_path / "x.safetensors", entries, data())
    assert not (tmp_path / "x.safetensors").exists()


def test_written_files_are_safetensors_to_the_library_and_hash_right(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"scalar": torch.tensor(2.0), "b": torch.randn(3, 5).bfloat16(), "empty": torch.zeros(0, 4)}
    names = {torch.float32: "F32", torch.bfloat16: "BF16"}
    entries = {name: shards.Entry(tuple(t.shape), names[t.dtype]) for name, t in tensors.items()}
    digest = shards.write(path, entries, tensors.items(), source="here")
    assert digest == shards.sha256(path)
    read = load_file(path)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert shards.metadata(path) == {"source": "here"}
    assert all(torch.equal(tensors[name], tensor) for name, tensor in shards.tensors(path, tensors))
    with pytest.raises(ValueError, match="b .* was announced"):
        shards.write(path, entries, [("scalar", torch.tensor(1.0)), ("b", torch.zeros(3, 5))])


# -- what is wrong --------------------------------------------------------------------------------------------------


def test_missing_unexpected_and_wrong_tensors_are_named(tmp_path, capsys):
    tensors = state()
    del tensors["blocks.1.cam_scale_layer.bias"]
    tensors["blocks.0.extra"] = torch.zeros(3)
    tensors["head.modulation"] = torch.zeros(1, 3, 48)
    folder = shard(tensors, tmp_path / "x")
    (report,) = released.inspect(folder)
    assert report.missing == ("blocks.1.cam_scale_layer.bias",) and report.unexpected == ("blocks.0.extra",)
    assert report.wrong_shape == (("head.modulation", (1, 3, 48), (1, 2, 48)),)
    sentence = "1 missing: blocks.1.cam_scale_layer.bias; 1 unexpected: blocks.0.extra; 1 of another shape: head.modul"
    dit = DiT(CAM)
    before = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(sentence)):
        released.load_released(folder, dit)
    assert all(torch.equal(before[name], tensor) for name, tensor in dit.state_dict().items())
    with pytest.raises(ValueError, match=re.escape(sentence)):
        released.convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert cli.main(["weights", "inspect", str(folder)]) == 1
    assert "1 missing: blocks.1.cam_scale_layer.bias" in capsys.readouterr().out


def test_a_dit_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="1 of another shape: patch_embedding_wancamctrl.weight .48, 1792., wanted"):
        released.load_released(act(tmp_path / "x"), DiT(CAM, device="meta"))


def damage_missing_shard(folder):
    (folder / "model-00007-of-00016.safetensors").unlink()


def damage_header(folder):
    path = folder / "model-00003-of-00016.safetensors"
    data = bytearray(path.read_bytes())
    data[8:20] = b"#" * 12
    path.write_bytes(data)


def damage_no_header(folder):
    (folder / "model-00003-of-00016.safetensors").write_bytes(b"\xff" * 64)


def damage_offsets(folder):
    path = folder / "model-00003-of-00016.safetensors"
    path.write_bytes(path.read_bytes().replace(b'"F32"', b'"F64"', 1))


def damage_length(folder):
    path = folder / "model-00003-of-00016.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def damage_pointer(folder):
    (folder / "model-00003-of-00016.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256")


def damage_index(folder):
    (folder / released.INDEX).write_text("{")


def damage_index_place(folder):
    path = folder / released.INDEX
    index = json.loads(path.read_text())
    index["weight_map"]["head.modulation"] = "model-00016-of-00016.safetensors"
    index["weight_map"]["head.head.bias"] = "model-00016-of-00016.safetensors"
    path.write_text(json.dumps(index))


def damage_two_indexes(folder):
    (folder / "model.safetensors.index.json").write_text("{}")


def damage_config(folder):
    (folder / "config.json").write_text("no")


def damage_twice_the_same(folder):
    (folder / released.INDEX).unlink()
    save_file({"head.modulation": torch.zeros(1, 2, 48)}, folder / "other-00001-of-00001.safetensors")


def damage_quantised(folder):
    (folder / released.INDEX).unlink()
    for file in folder.glob("*.safetensors"):
        save_file({n: t.flatten().to(torch.uint8) for n, t in load_file(file).items()}, file)


DAMAGES = {
    damage_missing_shard: (
        FileNotFoundError,
        "names model-00007-of-00016.safetensors, which is not there .1 of 16 shard",
    ),
    damage_header: (ValueError, "model-00003-of-00016.safetensors has a damaged safetensors header: download it again"),
    damage_no_header: (ValueError, "has no whole safetensors header in 64 bytes"),
    damage_offsets: (ValueError, r"damaged header .\d+ bytes for F64"),
    damage_length: (ValueError, "ends 5 bytes early"),
    damage_pointer: (ValueError, "is a Git LFS pointer, not the weights: run `git lfs pull`"),
    damage_index: (ValueError, "has no weight_map that can be read"),
    damage_index_place: (ValueError, "where it is not .* the index and the shards are of different downloads"),
    damage_two_indexes: (ValueError, "has two indexes"),
    damage_config: (ValueError, "config.json is no JSON"),
    damage_twice_the_same: (ValueError, "head.modulation lies in .* and in .*: remove one"),
    damage_quantised: (ValueError, "quantised weights cannot be used"),
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_one_clear_sentence(damage, tmp_path, capsys):
    folder = fast(tmp_path / "fast")
    damage(folder)
    kind, sentence = DAMAGES[damage]
    with pytest.raises(kind, match=sentence):
        released.load_released(folder, DiT(CAM, device="meta"))
    assert cli.main(["weights", "convert", str(folder), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_wrong_folders_are_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere"):
        released.inspect(tmp_path / "nowhere")
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(FileNotFoundError, match="holds no DiT weights, .*high_noise_model/.* .it holds holiday.jpg.:"):
        released.inspect(tmp_path)
    save_file({"a": torch.zeros(2)}, tmp_path / "vae.safetensors")
    with pytest.raises(
        ValueError, match="no patch_embedding.weight among 1 tensors: these are not the weights of a Li"
    ):
        released.inspect(tmp_path)


def test_an_expert_must_be_chosen(tmp_path):
    folder = base(tmp_path / "base")
    with pytest.raises(ValueError, match="holds high_noise_model, low_noise_model, part=None"):
        released.load_released(folder, DiT(CAM, device="meta"))
    with pytest.raises(ValueError, match="part='middle'"):
        released.load_released(folder, DiT(CAM, device="meta"), part="middle")
    assert set(released.companions(folder)) == {"VAE", "text encoder"}


def test_source_and_target_must_differ(tmp_path):
    folder = fast(tmp_path / "fast")
    with pytest.raises(ValueError, match="is where the weights lie"):
        released.convert(folder, folder)


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    folder = fast(tmp_path / "fast")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(released.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RuntimeError, match=r"needs \d.\d GiB in .*out, and 0.0 GiB are free"):
        released.convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Bomb:
    def __reduce__(self):
        return Path.touch, (Path("bomb-went-off"),)


def test_a_pickle_of_more_than_tensors_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"patch_embedding.weight": Bomb()}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="holds more than tensors.*ask for a safetensors file"):
        released.inspect(tmp_path / "model.pt")
    (tmp_path / "old.pth").write_bytes(pickle.dumps(Bomb(), protocol=2))
    with pytest.raises(ValueError, match="old.pth"):
        shards.load_pickle(tmp_path / "old.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="is no dict of tensors"):
        shards.load_pickle(tmp_path / "list.pt")
    assert not (tmp_path / "bomb-went-off").exists()


def test_one_pickled_file_of_tensors_loads(tmp_path):
    torch.save({"state_dict": state()}, tmp_path / "student.pt")
    dit = DiT(CAM, device="meta")
    released.load_released(tmp_path / "student.pt", dit)
    assert torch.equal(dit.head.modulation, state()["head.modulation"].bfloat16())


def test_verify_finds_what_headers_hide(tmp_path, capsys):
    tensors = state()
    tensors["blocks.0.norm3.bias"][3] = float("nan")
    tensors["blocks.1.ffn.0.weight"][5, 5] = float("-inf")
    folder, out = shard(tensors, tmp_path / "x"), tmp_path / "out"
    (verified,) = released.verify(folder)
    assert sorted(verified.not_finite) == ["blocks.0.norm3.bias", "blocks.1.ffn.0.weight"] and not verified.ok
    assert cli.main(["weights", "verify", str(folder)]) == 1
    assert "2 tensors with NaN or infinity: " in capsys.readouterr().out

    released.convert(fast(tmp_path / "fast"), out)
    file = sorted(out.glob("*.safetensors"))[2]
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert released.verify(out)[0].changed == (file.name,)


# -- the command line -------------------------------------------------------------------------------------------------


def test_the_commands_say_what_they_found(tmp_path, capsys):
    folder, out = base(tmp_path / "base"), tmp_path / "out"
    assert cli.main(["weights", "inspect", str(folder)]) == 0
    told = capsys.readouterr().out
    assert "high_noise_model: 3 files, 91 tensors" in told and "low_noise_model: 3 files" in told
    assert "2 layers, 2 heads, control cam" in told and "91 tensors match" in told and "VAE: " in told
    assert cli.main(["weights", "convert", str(folder)]) == 2
    assert "name it with --out FOLDER" in capsys.readouterr().err
    assert cli.main(["weights", "convert", str(folder), "--out", str(out)]) == 0
    assert "91 BF16" in capsys.readouterr().out
    assert cli.main(["weights", "verify", str(out)]) == 0
    assert capsys.readouterr().out.count("all well") == 2
    assert cli.main(["weights", "inspect", str(folder), "--preset", "lingbot"]) == 1
