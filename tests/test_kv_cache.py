import random
from dataclasses import replace

import pytest
import torch

from lingbot_nb.model.dit import DiT
from lingbot_nb.model.kv_cache import GradCache, KVCache, Place, bits, put, put_words
from lingbot_nb.model.masks import block_causal, teacher_forcing
from lingbot_nb.model.rope import axis_dims
from lingbot_nb.presets import MICRO, ModelSize, StreamSettings, VideoShape

SIZE = ModelSize(
    dim=24, heads=2, layers=2, ffn_dim=48, text_dim=8, text_len=4, control_channels=3, freq_dim=16
)  # heads of 12: the three axes get 4 channels each
SHAPE = VideoShape(32, 48, 5)
CONTROL = SIZE.control_channels * 64


def model(seed=0):
    torch.manual_seed(seed)
    dit = DiT(SIZE)
    # A zero head would make every output equal.
    torch.nn.init.normal_(dit.head.head.weight, std=0.3)
    return dit


class Clip:
    """Random inputs of a clip, cut into chunks; one noise level per frame."""

    def __init__(self, dit, lengths, seed=0, batch=1):
        generator = torch.Generator().manual_seed(seed)
        frames = sum(lengths)
        size = (frames, SHAPE.latent_height, SHAPE.latent_width)
        self.latent = torch.randn(batch, 16, *size, generator=generator)
        self.condition = torch.randn(batch, 20, *size, generator=generator)
        self.control = torch.randn(batch, CONTROL, *size, generator=generator)
        self.t = torch.rand(batch, frames, generator=generator) * 1000
        self.text = dit.text(torch.randn(batch, 3, SIZE.text_dim, generator=generator))
        ends = torch.tensor(lengths).cumsum(0).tolist()
        self.spans = [slice(end - length, end) for end, length in zip(ends, lengths, strict=True)]

    def run(self, dit, span=slice(None), latent=None, t=None, **kwargs):
        latent = self.latent[:, :, span] if latent is None else latent
        return dit(
            latent,
            self.t[:, span] if t is None else t,
            condition_BCFHW=self.condition[:, :, span],
            text=self.text,
            camera=dit.camera_tokens(self.control[:, :, span]),
            **kwargs,
        )

    def stream(self, dit, cache):
        outputs = []
        for span in self.spans:
            outputs.append(self.run(dit, span, cache=cache))
            cache.commit()
        return torch.cat(outputs, dim=2)


def random_settings(rng, **fixed):
    chunk, sink = rng.randint(1, 4), rng.randint(0, 3)
    window = rng.choice([None, *[sink + chunk + extra for extra in range(5)]])
    return StreamSettings(chunk=chunk, window=window, sink=sink, image_first=rng.random() < 0.5, **fixed)


def close(got, expected, tolerance=1e-5):
    assert ((got - expected).abs().max() / expected.abs().max()).item() < tolerance


@pytest.mark.parametrize("seed", range(36))
def test_stream_equals_masked_pass(seed):
    rng = random.Random(seed)
    settings, frames, batch = random_settings(rng, relative=False), rng.randint(1, 14), rng.choice([1, 1, 2])
    lengths = settings.chunk_lengths(frames)
    dit = model(seed).requires_grad_(False)
    clip = Clip(dit, lengths, seed, batch)
    mask = block_causal(lengths, settings.window, settings.sink if settings.window else 0)
    whole = clip.run(dit, mask=mask)
    cache = KVCache(SIZE, settings, SHAPE, batch=batch, capacity=frames)
    streamed = clip.stream(dit, cache)
    close(streamed, whole)
    close(clip.stream(dit, GradCache(SIZE, settings, SHAPE, capacity=frames)), whole)
    assert cache.frames_seen == frames
    # Causality, to the bit: a later chunk may be anything.
    changed = clip.spans[rng.randrange(len(lengths))].start
    clip.latent[:, :, changed:] += 1
    clip.control[:, :, changed:] -= 1
    clip.t[:, changed:] = 0
    cache.reset()
    for again, before in ((clip.run(dit, mask=mask), whole), (clip.stream(dit, cache), streamed)):
        assert torch.equal(again[:, :, :changed], before[:, :, :changed])
        assert not torch.equal(again[:, :, changed:], before[:, :, changed:])


@pytest.mark.parametrize("seed", range(6))
def test_only_the_last_pass_over_a_chunk_counts(seed):
    rng = random.Random(seed)
    settings = random_settings(rng)
    lengths = settings.chunk_lengths(9)
    dit = model().requires_grad_(False)
    clip = Clip(dit, lengths)
    caches = [kind(SIZE, settings, SHAPE, capacity=9) for kind in (KVCache, KVCache, GradCache)]
    once = clip.stream(dit, caches[0])
    for cache in caches[1:]:
        for span in clip.spans:
            for t in (999.0, 400.0):
                noise = torch.randn_like(clip.latent[:, :, span])
                clip.run(dit, span, latent=noise, t=torch.tensor(t), cache=cache)
            close(clip.run(dit, span, cache=cache), once[:, :, span])
            cache.commit()


class SlowRelativeCache:
    """What `relative` means, spelled out: unturned keys and values of every frame in lists, evicted by hand, joined
    and turned at positions 0, 1, 2, ... in every pass."""

    def __init__(self, settings):
        self.settings, self.frames_seen, self.past, self.now = settings, 0, {}, {}

    def begin(self, frames):
        self.frames = frames
        return self

    def update(self, layer, q, k, v):
        new = list(zip(k.chunk(self.frames, 1), v.chunk(self.frames, 1), strict=True))
        frames = [*self.past.get(layer, []), *new]
        while self.settings.window is not None and len(frames) > self.settings.window:
            frames.pop(self.settings.sink)
        self.now[layer] = frames
        keys, values = (torch.cat([frame[i] for frame in frames], 1) for i in range(2))
        last = range(len(frames) - self.frames, len(frames))
        return self.turn(q, last), self.turn(keys, range(len(frames))), values

    def commit(self):
        self.past, self.now = self.now, {}

    @staticmethod
    def turn(x, positions):
        _, rows, columns = SHAPE.grid
        places = torch.cartesian_prod(torch.tensor(positions), torch.arange(rows), torch.arange(columns))
        angles = torch.cat(
            [
                places[:, axis, None].double() * 10_000.0 ** (-torch.arange(0, dim, 2).double() / dim)
                for axis, dim in enumerate(axis_dims(SIZE.head_dim))
            ],
            dim=1,
        )
        turns = torch.polar(torch.ones_like(angles), angles)[None, :, None]
        pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * turns).flatten(-2).float()


@pytest.mark.parametrize("seed", range(30))
def test_relative_stream_equals_slow_reference(seed):
    rng = random.Random(seed)
    settings, frames = random_settings(rng, relative=True), rng.randint(6, 20)
    dit = model(seed).requires_grad_(False)
    clip = Clip(dit, settings.chunk_lengths(frames), seed)
    expected = clip.stream(dit, SlowRelativeCache(settings))
    close(clip.stream(dit, KVCache(SIZE, settings, SHAPE, capacity=frames)), expected)
    close(clip.stream(dit, GradCache(SIZE, settings, SHAPE, capacity=frames)), expected)


def test_relative_differs_from_absolute_only_once_the_sink_is_left_behind():
    dit = model().requires_grad_(False)
    clip = Clip(dit, [1] * 8)
    streams = [clip.stream(dit, KVCache(SIZE, StreamSettings(1, 4, 1, relative), SHAPE)) for relative in (False, True)]
    close(streams[1][:, :, :4], streams[0][:, :, :4])
    assert (streams[1][:, :, 5:] - streams[0][:, :, 5:]).abs().max() > 1e-4


def test_a_twenty_minute_stream_keeps_its_memory():
    """4,800 frames at the micro size: the same buffers throughout, and the last chunk is still right."""
    size, settings, shape = MICRO.model, MICRO.stream, VideoShape(16, 16, 1)
    cache = KVCache(size, settings, shape)
    held = {x.data_ptr() for x in (*cache._k, *cache._v, *cache._sink_k)}
    generator = torch.Generator().manual_seed(0)
    frames = [
        [torch.randn(1, 1, size.heads, size.head_dim, generator=generator) for _ in range(3)] for _ in range(4800)
    ]
    for step, (q, k, v) in enumerate(frames):
        cache.begin(1)
        for layer in range(size.layers):
            turned, keys, values = cache.update(layer, q, k, v)
        if step == 10:
            tables, bytes_held = len(cache._tables), cache.occupancy().bytes
        cache.commit()
    assert {x.data_ptr() for x in (*cache._k, *cache._v, *cache._sink_k)} == held
    assert (len(cache._tables), cache.occupancy().bytes) == (tables, bytes_held)
    assert cache.visible() == [0, 4797, 4798, 4799] and keys.shape[1] == values.shape[1] == 4
    # A fresh cache that saw only the frames still in sight stands at positions 0, 1, 2, 3 and must score the same.
    fresh = KVCache(size, settings, shape)
    for frame in cache.visible():
        fresh.begin(1)
        for layer in range(size.layers):
            young = fresh.update(layer, *frames[frame])
        fresh.commit()
    scores = [
        torch.einsum("blnd,bmnd->bnlm", q, cache_.ordered(1)[0]) for q, cache_ in ((turned, cache), (young[0], fresh))
    ]
    torch.testing.assert_close(*scores, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "settings", [StreamSettings(1, 4, 1), StreamSettings(2, None, 0), StreamSettings(2, 5, 2, False)]
)
def test_gradients_are_those_of_detached_past(settings):
    """Rollout losses by GradCache equal, chunk by chunk, attention over a past computed without gradient."""
    lengths = settings.chunk_lengths(7)
    rollouts = {}
    for checkpoint in (False, True):
        dit = model()
        clip = Clip(dit, lengths)
        cache, losses = GradCache(SIZE, settings, SHAPE, capacity=7), []
        for span in clip.spans:
            noisy = clip.run(dit, span, t=torch.tensor(700.0), cache=cache, checkpoint=checkpoint)
            losses.append(noisy.square().mean())
            with torch.no_grad():
                clip.run(dit, span, latent=clip.latent[:, :, span] - noisy, t=torch.tensor(0.0), cache=cache)
            cache.commit()
        # All chunks back-propagate at the end: the past has long moved on when the first is recomputed.
        sum(losses).backward()
        rollouts[checkpoint] = (torch.stack(losses).detach(), [p.grad for p in dit.parameters()])
    assert torch.equal(rollouts[False][0], rollouts[True][0])
    for plain, recomputed in zip(rollouts[False][1], rollouts[True][1], strict=True):
        assert (plain is None) == (recomputed is None)
        assert plain is None or torch.equal(plain, recomputed)


def test_recomputing_late_cannot_spoil_what_is_committed():
    """Backward of the noisy pass after the clean pass, before commit: the clean entry must survive."""
    dit, settings = model(), StreamSettings(1, 4, 1)
    clip = Clip(dit, [1, 1])
    outputs = []
    for backward_first in (True, False):
        cache = GradCache(SIZE, settings, SHAPE)
        loss = clip.run(dit, clip.spans[0], t=torch.tensor(700.0), cache=cache, checkpoint=True).square().mean()
        if backward_first:
            loss.backward(retain_graph=True)
        with torch.no_grad():
            clip.run(dit, clip.spans[0], t=torch.tensor(0.0), cache=cache)
            if not backward_first:
                with torch.enable_grad():
                    loss.backward(retain_graph=True)
            cache.commit()
            outputs.append(clip.run(dit, clip.spans[1], cache=cache))
    assert torch.equal(*outputs)


def test_no_gradient_reaches_an_earlier_chunk():
    dit, settings = model(), StreamSettings(1, 4, 1)
    clip = Clip(dit, [1, 1, 1])
    cache = GradCache(SIZE, settings, SHAPE)
    latents = [clip.latent[:, :, span].clone().requires_grad_() for span in clip.spans]
    for span, latent in zip(clip.spans, latents, strict=True):
        last = clip.run(dit, span, latent=latent, cache=cache)
        cache.commit()
    last.square().mean().backward()
    assert latents[0].grad is None and latents[1].grad is None and latents[2].grad.abs().max() > 0


@pytest.mark.parametrize("seed", range(12))
def test_teacher_forcing_equals_chunks_over_a_clean_cache(seed):
    rng = random.Random(seed)
    settings, frames = random_settings(rng, relative=False), rng.randint(2, 8)
    lengths = settings.chunk_lengths(frames)
    dit = model(seed).requires_grad_(False)
    clip = Clip(dit, lengths, seed)
    clean = torch.randn_like(clip.latent)
    cache, outputs = KVCache(SIZE, settings, SHAPE, capacity=frames), []
    for span in clip.spans:
        outputs.append(clip.run(dit, span, cache=cache))
        clip.run(dit, span, latent=clean[:, :, span], t=torch.tensor(0.0), cache=cache)
        cache.commit()
    mask = teacher_forcing(lengths, settings.window, settings.sink if settings.window else 0)
    both = dit(
        torch.cat([clean, clip.latent], 2),
        torch.cat([torch.zeros_like(clip.t), clip.t], 1),
        condition_BCFHW=clip.condition.repeat(1, 1, 2, 1, 1),
        text=clip.text,
        camera=dit.camera_tokens(clip.control).repeat(1, 2, 1),
        mask=mask,
        positions=[*range(frames), *range(frames)],
    )
    close(both[:, :, frames:], torch.cat(outputs, 2))


def test_first_chunk_may_be_filled_in_one_masked_pass():
    settings, lengths = StreamSettings(2, 7, 1), [1, 2, 2]
    dit = model().requires_grad_(False)
    clip = Clip(dit, [*lengths, 2])
    chunked, filled = (KVCache(SIZE, settings, SHAPE) for _ in range(2))
    expected = clip.stream(dit, chunked)[:, :, 5:]
    clip.run(dit, slice(0, 5), cache=filled, mask=block_causal(lengths))
    filled.commit()
    close(clip.run(dit, slice(5, 7), cache=filled), expected)


def test_buffers_survive_inference_mode_and_reset():
    dit, settings = model().requires_grad_(False), StreamSettings(1, 4, 1)
    clip = Clip(dit, [1] * 6)
    with torch.inference_mode():
        cache = KVCache(SIZE, settings, SHAPE)
        first = clip.stream(dit, cache)
    cache.reset()
    assert cache.frames_seen == 0 and cache.visible() == []
    with torch.no_grad():
        assert torch.equal(clip.stream(dit, cache), first)


def test_occupancy_and_order():
    cache = KVCache(SIZE, StreamSettings(2, 5, 1, image_first=False), SHAPE)
    tokens = SHAPE.tokens_per_frame
    held = []
    for chunk in range(4):
        cache.begin(2)
        marks = torch.arange(2 * chunk, 2 * chunk + 2).repeat_interleave(tokens).float()
        v = marks[None, :, None, None].expand(1, -1, SIZE.heads, SIZE.head_dim)
        for layer in range(SIZE.layers):
            cache.update(layer, v, v, v)
        cache.commit()
        held.append(cache.occupancy().frames)
        in_order = cache.ordered(1)[1][0, ::tokens, 0, 0]
        assert in_order.tolist() == cache.visible()
    assert held == [2, 4, 5, 5] and cache.visible() == [0, 4, 5, 6, 7]
    assert cache.occupancy().capacity == 5


def test_clear_errors():
    cache = KVCache(SIZE, StreamSettings(1, 4, 1), SHAPE)
    x = torch.zeros(1, SHAPE.tokens_per_frame, SIZE.heads, SIZE.head_dim)
    for call in (cache.commit, lambda: cache.update(0, x, x, x)):
        with pytest.raises(RuntimeError, match="no chunk is running"):
            call()
    with pytest.raises(ValueError, match="does not fit window 4 with sink 1"):
        cache.begin(5)
    cache.begin(1)
    cache.begin(1)
    with pytest.raises(RuntimeError, match="a chunk of 1 frames is running, not 2"):
        cache.begin(2)
    with pytest.raises(RuntimeError, match="use GradCache"):
        cache.update(0, x, x.clone().requires_grad_(), x)
    with pytest.raises(ValueError, match="batch 2 does not match"):
        cache.update(0, *[x.repeat(2, 1, 1, 1)] * 3)
    full = KVCache(SIZE, StreamSettings(1, None, 0), SHAPE, capacity=1)
    full.begin(1)
    full.commit()
    with pytest.raises(RuntimeError, match="pass a larger capacity"):
        full.begin(1)
    unrun = GradCache(SIZE, StreamSettings(), SHAPE)
    unrun.begin(1)
    with pytest.raises(RuntimeError, match="wrote 0 of 2 layers"):
        unrun.commit()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")
def test_one_cuda_graph_serves_every_chunk_of_a_full_window():
    settings, dit = StreamSettings(1, 4, 1), model().requires_grad_(False).cuda()
    shape = (1, SHAPE.latent_height, SHAPE.latent_width)
    latent, condition, control = (torch.randn(1, c, *shape, device="cuda") for c in (16, 20, CONTROL))
    text, t = dit.text(torch.randn(1, 3, SIZE.text_dim, device="cuda")), torch.tensor(500.0, device="cuda")
    caches = [KVCache(SIZE, settings, SHAPE, device="cuda") for _ in range(2)]
    with torch.inference_mode():
        film = dit.film(control)

        def run(cache):
            return dit(latent, t, condition_BCFHW=condition, text=text, camera=film, cache=cache)

        for cache in caches * 6:
            run(cache)
            cache.commit()
        caches[0].begin(1)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(caches[0])
        for _ in range(5):
            latent.normal_()
            caches[0].begin(1)
            graph.replay()
            torch.testing.assert_close(captured, run(caches[1]), atol=1e-6, rtol=1e-5)
            for cache in caches:
                cache.commit()


@pytest.mark.parametrize("relative", [True, False])
def test_state_goes_on_in_another_cache(relative):
    settings = replace(MICRO.stream, relative=relative)
    make = torch.Generator().manual_seed(0)
    tokens, size = MICRO.shape.tokens_per_frame, MICRO.model

    def play(cache, inputs):
        out = []
        for q, k, v in inputs:
            cache.begin(1)
            out.append([x.clone() for layer in range(size.layers) for x in cache.update(layer, q, k, v)])
            cache.commit()
        return out

    inputs = [torch.randn(3, 1, tokens, size.heads, size.head_dim, generator=make) for _ in range(9)]
    one, other = (KVCache(size, settings, MICRO.shape) for _ in range(2))
    play(one, inputs[:6])
    other.load_state_dict(one.state_dict())
    assert other.frames_seen == 6
    for mine, theirs in zip(play(one, inputs[6:]), play(other, inputs[6:]), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    wide = KVCache(size, replace(settings, window=5), MICRO.shape)
    with pytest.raises(ValueError, match="of another model, window or batch"):
        wide.load_state_dict(one.state_dict())
    assert wide.frames_seen == 0
    one.begin(1)
    with pytest.raises(RuntimeError, match="is running"):
        one.state_dict()


@pytest.mark.parametrize("head_dim", [16, 6])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32])
def test_words_are_put_where_numbers_are(head_dim, dtype):
    """Strided ones too, as they come out of an exchange; heads that fill no words as single numbers."""
    make = torch.Generator().manual_seed(0)
    packed = torch.randn(1, 5, 3, 2, head_dim, generator=make).to(dtype)
    _, k, v = packed.unbind(2)
    slots, table = torch.tensor([6, 1, 2, 7, 0]), None
    whole, words = (
        Place(*(bits(torch.zeros(1, 8, 2, head_dim, dtype=dtype)) for _ in "kv"), slots, table) for _ in "ab"
    )
    put(whole, k, v)
    put_words(words, k, v)
    assert torch.equal(whole.keys, words.keys) and torch.equal(whole.values, words.values)
    assert torch.equal(words.keys[0, 6], bits(k)[0, 0]) and not words.keys[0, 3].any()
