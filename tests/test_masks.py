import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention.flex_attention import create_mask

from lingbot_nb.model.masks import (
    FrameMask,
    block_causal,
    diffusion_forcing,
    full,
    teacher_forcing,
)
from lingbot_nb.presets import StreamSettings

REFERENCE = np.load(Path(__file__).parent / "fixtures" / "masks.npz")


@pytest.mark.parametrize("key", REFERENCE.files)
def test_equals_reference(key):
    kind, spec, _ = key.split("/")
    frames, tokens, chunk, window = (int(part.strip("abcdefghijklmnopqrstuvwxyz")) for part in spec.split("_"))
    lengths = StreamSettings(chunk=chunk, window=None, image_first=kind == "i2v").chunk_lengths(frames)
    factory = teacher_forcing if kind == "teacher" else block_causal
    mask = factory(lengths, None if window < 0 else window)
    assert np.array_equal(mask.dense(tokens).numpy(), REFERENCE[key])


def random_clip(rng):
    """Chunk lengths, window and sink of a random legal stream."""
    chunk, sink = rng.randint(1, 4), rng.randint(0, 3)
    window = rng.choice([None, sink + chunk + rng.randint(0, 4)])
    settings = StreamSettings(chunk=chunk, window=window, sink=sink, image_first=rng.random() < 0.5)
    return settings.chunk_lengths(rng.randint(1, 14)), window, sink


def walked(lengths, window, sink):
    """What each chunk sees, by walking the stream and evicting the oldest frame behind the sink."""
    seen, rows, first = [], [], 0
    for length in lengths:
        seen = [*seen, *range(first, first + length)]
        while window is not None and len(seen) > window:
            seen.pop(sink)
        rows += [set(seen)] * length
        first += length
    return rows


@pytest.mark.parametrize("seed", range(40))
def test_block_causal_is_what_a_stream_sees(seed):
    lengths, window, sink = random_clip(random.Random(seed))
    expected = walked(lengths, window, sink)
    keep = block_causal(lengths, window, sink).keep
    assert [set(row.nonzero().flatten().tolist()) for row in keep] == expected
    assert torch.equal(diffusion_forcing(lengths, window, sink).keep, keep)


@pytest.mark.parametrize("seed", range(40))
def test_teacher_forcing_is_clean_past_and_own_noisy_chunk(seed):
    lengths, window, sink = random_clip(random.Random(seed))
    expected, frames = walked(lengths, window, sink), sum(lengths)
    chunk_of = [i for i, length in enumerate(lengths) for _ in range(length)]
    keep = teacher_forcing(lengths, window, sink).keep
    for frame in range(frames):
        own = {other for other in range(frames) if chunk_of[other] == chunk_of[frame]}
        noisy = {other for other in expected[frame] if other not in own} | {frames + other for other in own}
        assert set(keep[frame].nonzero().flatten().tolist()) == expected[frame]
        assert set(keep[frames + frame].nonzero().flatten().tolist()) == noisy


@pytest.mark.parametrize("seed", range(40))
def test_ranges_rebuild_the_mask(seed):
    mask = teacher_forcing(*random_clip(random.Random(seed)))
    rebuilt = torch.zeros_like(mask.keep)
    for (first, end), stretches in mask.ranges():
        for start, stop in stretches:
            rebuilt[first:end, start:stop] = True
    assert torch.equal(rebuilt, mask.keep)


# 16 frames of 8 and 64 tokens fill FlexAttention's tiles exactly; 5, 60 and 100 tokens never do.
@pytest.mark.parametrize("frames,tokens", [(16, 8), (16, 64), (4, 128), (7, 5), (21, 60), (9, 100), (1, 1), (3, 300)])
@pytest.mark.parametrize("chunk,window,sink", [(1, None, 0), (3, None, 0), (1, 4, 1), (2, 5, 2)])
def test_block_mask_is_the_same_rule(frames, tokens, chunk, window, sink):
    lengths = StreamSettings(chunk=chunk, window=window, sink=sink).chunk_lengths(frames)
    for mask in (block_causal(lengths, window, sink), teacher_forcing(lengths, window, sink)):
        dense, block = mask.dense(tokens), mask.block_mask(tokens, "cpu")
        size = mask.frames[0] * tokens
        assert torch.equal(create_mask(block.mask_mod, 1, 1, size, size, device="cpu")[0, 0], dense)
        assert_tiles(block, dense)


def assert_tiles(block, dense):
    """Every tile with a kept pair is listed; a tile listed as whole has nothing but kept pairs."""
    side, rows = 128, -(-len(dense) // 128)
    padded = torch.zeros(rows * side, rows * side, dtype=torch.bool)
    padded[: len(dense), : len(dense)] = dense
    tiles = padded.view(rows, side, rows, side).transpose(1, 2).flatten(2)
    some, every = tiles.any(-1), tiles.all(-1)
    for row in range(rows):
        partial = block.kv_indices[0, 0, row, : block.kv_num_blocks[0, 0, row]].tolist()
        whole = block.full_kv_indices[0, 0, row, : block.full_kv_num_blocks[0, 0, row]].tolist()
        assert set(whole) == set(every[row].nonzero().flatten().tolist())
        assert set(partial) == set((some[row] & ~every[row]).nonzero().flatten().tolist())


def test_masks_never_go_stale():
    mask, twin = block_causal([1, 1, 1]), block_causal([1, 1, 1])
    assert mask == twin and hash(mask) == hash(twin) and mask.dense(2) is twin.dense(2)
    assert mask.dense(3).shape == (9, 9) and mask.dense(2).shape == (6, 6)
    assert mask != block_causal([1, 2])
    mask.keep[0, 2] = True
    assert mask.dense(2)[0, 4] and not twin.dense(2)[0, 4]
    source = torch.ones(2, 2, dtype=torch.bool)
    copied = FrameMask("mine", source)
    source[0, 1] = False
    assert copied.keep.all()


def test_composition():
    causal, window = block_causal([1] * 5), block_causal([1] * 5, window=2)
    assert torch.equal((causal & window).keep, window.keep)
    assert torch.equal((causal | full(5)).keep, full(5).keep)
    assert (causal & window).name == "(block-causal & block-causal, window 2, sink 0)"
    assert full(4).density == 1 and block_causal([1] * 4).density == 10 / 16


def test_clear_errors():
    with pytest.raises(ValueError, match="window 3 cannot hold sink 2 \\+ chunk 2"):
        block_causal([2, 2], window=3, sink=2)
    with pytest.raises(ValueError, match="at least 1 frame"):
        block_causal([])
    with pytest.raises(ValueError, match="differ in frames"):
        full(2) & full(3)
    with pytest.raises(ValueError, match="sees no frame"):
        FrameMask("blind", torch.zeros(2, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="2-D bool"):
        FrameMask("float", torch.ones(2, 2))
    with pytest.raises(ValueError, match="0 tokens per frame"):
        full(2).dense(0)
