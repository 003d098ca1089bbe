import json

import numpy as np
import pytest

from lingbot_nb.world.clips import (
    HELD_OUT_SEED,
    MANIFEST,
    Clip,
    ClipStore,
    read_shard,
    sha256,
    split_of,
    write_manifest,
    write_shard,
)


def make_clip(seed=3, count=5, height=16, width=24):
    rng = np.random.default_rng(seed)
    return Clip(
        frames=rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8),
        poses=rng.standard_normal((count, 4, 4)).astype(np.float32),
        keys=rng.random((count, 8)) < 0.5,
        intrinsics=np.array([10, 12, width / 2, height / 2], np.float32),
        seed=seed,
        map="somewhere",
        id=f"somewhere-{seed}",
    )


def fill(folder, seeds_of_shards, compress=False):
    lines = []
    for number, seeds in enumerate(seeds_of_shards):
        name = f"shard-{number}.safetensors"
        digest = write_shard(folder / name, [make_clip(seed) for seed in seeds], compress=compress)
        line = {"shard": name, "sha256": digest, "seeds": seeds, "split": split_of(seeds[0]), "compress": compress}
        lines.append(line)
    write_manifest(folder, lines)


def same(one: Clip, other: Clip) -> bool:
    parts = ("frames", "poses", "keys", "intrinsics")
    named = (one.seed, one.map, one.id) == (other.seed, other.map, other.id)
    return named and all(np.array_equal(getattr(one, name), getattr(other, name)) for name in parts)


@pytest.mark.parametrize("compress", [False, True])
def test_a_shard_gives_back_every_byte(tmp_path, compress):
    clips = [make_clip(seed) for seed in (1, 2, 3)]
    digest = write_shard(tmp_path / "a.safetensors", clips, compress=compress)
    assert digest == sha256(tmp_path / "a.safetensors")
    assert all(same(*pair) for pair in zip(clips, read_shard(tmp_path / "a.safetensors"), strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_raw_shards_are_plain_safetensors(tmp_path):
    from safetensors.numpy import load_file

    clips = [make_clip(seed) for seed in (1, 2)]
    write_shard(tmp_path / "a.safetensors", clips)
    tensors = load_file(tmp_path / "a.safetensors")
    assert np.array_equal(tensors["frames"][1], clips[1].frames)
    assert np.array_equal(tensors["keys"][0], clips[0].keys)


def test_an_empty_shard_holds_no_clips(tmp_path):
    write_shard(tmp_path / "a.safetensors", [])
    assert read_shard(tmp_path / "a.safetensors") == []


def test_repeated_pictures_cost_little_when_compressed(tmp_path):
    moving = make_clip(count=9)
    standing = Clip(np.repeat(moving.frames[:1], 9, 0), moving.poses, moving.keys, moving.intrinsics, 3, "m", "m-3")
    write_shard(tmp_path / "moving", [moving], compress=True)
    write_shard(tmp_path / "standing", [standing], compress=True)
    assert (tmp_path / "standing").stat().st_size < 0.4 * (tmp_path / "moving").stat().st_size


@pytest.mark.parametrize("compress", [False, True])
def test_the_store_orders_clips_by_seed_and_splits_them(tmp_path, compress):
    fill(tmp_path, [[7, 9], [HELD_OUT_SEED, HELD_OUT_SEED + 2], [1]], compress)
    store = ClipStore(tmp_path)
    assert store.seeds == [1, 7, 9, HELD_OUT_SEED, HELD_OUT_SEED + 2]
    assert all(same(store[i], make_clip(seed)) for i, seed in enumerate(store.seeds))
    assert same(store[-1], make_clip(HELD_OUT_SEED + 2))
    assert [clip.seed for clip in store[1:3]] == [7, 9]
    assert [clip.seed for clip in ClipStore(tmp_path, split="train")] == [1, 7, 9]
    held_out = ClipStore(tmp_path, split="held-out")
    assert len(held_out) == 2 and all(clip.split == "held-out" for clip in held_out)


def test_raw_clips_are_mapped_not_copied(tmp_path):
    fill(tmp_path, [[1, 2]])
    frames = ClipStore(tmp_path)[1].frames
    assert not frames.flags.owndata and not frames.flags.writeable


@pytest.mark.parametrize("where", [0.02, 0.5, 0.99])
def test_a_flipped_byte_is_found_and_named(tmp_path, where):
    fill(tmp_path, [[1], [2]])
    path = tmp_path / "shard-1.safetensors"
    data = bytearray(path.read_bytes())
    data[int(where * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(RuntimeError, match=r"shard-1\.safetensors' is damaged .* delete it and collect"):
        ClipStore(tmp_path)


def test_missing_and_cut_shards_are_named(tmp_path):
    fill(tmp_path, [[1], [2]])
    path = tmp_path / "shard-0.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RuntimeError, match=r"shard-0\.safetensors' cannot be read .* delete it and collect"):
        read_shard(path)
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(RuntimeError, match=r"shard-0\.safetensors' cannot be read \(it is cut short\)"):
        read_shard(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-0\.safetensors' is not there"):
        ClipStore(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"shard-0\.safetensors' is not there"):
        read_shard(path)


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(FileNotFoundError, match="collect some there first"):
        ClipStore(tmp_path)
    with pytest.raises(ValueError, match="several sizes"):
        write_shard(tmp_path / "a", [make_clip(count=5), make_clip(count=9)])
    with pytest.raises(ValueError, match="WebP"):
        write_shard(tmp_path / "a", [make_clip(count=1025)], compress=True)
    assert list(tmp_path.iterdir()) == []
    fill(tmp_path, [[1]])
    with pytest.raises(ValueError, match="unknown split 'test'"):
        ClipStore(tmp_path, split="test")
    good = make_clip()
    with pytest.raises(ValueError, match="keys are bool"):
        Clip(good.frames, good.poses, good.keys[:-1], good.intrinsics, 3, "m", "m-3")
    with pytest.raises(ValueError, match="poses are float64"):
        Clip(good.frames, good.poses.astype(float), good.keys, good.intrinsics, 3, "m", "m-3")


def test_the_manifest_is_one_json_object_a_line(tmp_path):
    fill(tmp_path, [[1], [2]])
    lines = [json.loads(line) for line in (tmp_path / MANIFEST).read_text().splitlines()]
    assert [line["seeds"] for line in lines] == [[1], [2]]
    assert not list(tmp_path.glob("*.partial"))
