"""The streaming engine against the plain path: the same frames, however it gets there."""

import copy
import random
import warnings
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from micro_world import SIZE, random_dit
from torch import nn

from lingbot_nb.distill.flow import few_steps
from lingbot_nb.distill.launch import launch
from lingbot_nb.model import fp8, fp8_attention, turn_kernel
from lingbot_nb.model.attention import attend, attend_reference
from lingbot_nb.model.dit import DiT
from lingbot_nb.model.fp8 import E4M3
from lingbot_nb.model.fp8_attention import SCALE, emulated_attend, lifted, lowered, usable
from lingbot_nb.model.fused import ALONE, Alone, Raw, SigmoidGELU
from lingbot_nb.model.graph import Compiler, Recorder
from lingbot_nb.model.kv_cache import Sight
from lingbot_nb.model.rope import apply_rope, fresh_rope_table
from lingbot_nb.model.taehv import TAEHV
from lingbot_nb.model.vae import MICRO_VAE, TinyVAE, to_uint8
from lingbot_nb.presets import LINGBOT, MICRO, StreamSettings
from lingbot_nb.stream.engine import Engine, Plain, Speed, StreamingDiT, fast
from lingbot_nb.stream.engine_decoder import PictureStream, PlainPictures, picture_stream
from lingbot_nb.stream.engine_memory import GIB, check_memory, needed, needed_plainly, taehv_maps, wan_maps
from lingbot_nb.stream.session import Session

SHAPE = MICRO.shape
STEPS = few_steps((1, 0.5), 3.0)
SLOW = Speed(compile=False, graph=False, join=False)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors this small only make threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class World:
    """A stream's inputs, the same for every path that plays it; `start` frames are known and written, not denoised."""

    clean_pass = True

    def __init__(self, settings, chunks, seed=0, dtype=torch.float32, device="cpu", size=SIZE):
        self.settings, self.chunks, self.seed, self.device, self.size = settings, chunks, seed, device, size
        self.dit = random_dit(seed, size).to(device, dtype).eval().requires_grad_(False)

    def _draw(self, *sizes):
        return torch.randn(*sizes, generator=self._make).to(self.device)

    def play(self, path):
        """Plays one stream; returns its chunks. The first is written where the settings begin with an image."""
        self._make = torch.Generator().manual_seed(self.seed)
        path.reset()
        path.prompt(self._draw(1, 5, self.size.text_dim))
        lengths = self.settings.chunk_lengths(self.settings.chunk * self.chunks)
        return [
            self._chunk(path, length, known=i == 0 and self.settings.image_first) for i, length in enumerate(lengths)
        ]

    def _chunk(self, path, frames, known):
        cells = (frames, SHAPE.latent_height, SHAPE.latent_width)
        noise, fresh = self._draw(1, 16, *cells), self._draw(len(STEPS) - 1, 1, 16, *cells)
        told = self._draw(1, self.size.control_channels * 64, *cells), self._draw(1, 20, *cells)
        if known:
            path.write(noise, *told)
            return noise
        x0 = path.denoise(noise, fresh, *told)
        path.finish()
        return x0

    def plain(self):
        return Plain(self.dit, self.settings, SHAPE, STEPS)

    def engine(self, speed=SLOW, **options):
        net = fast(self.dit, speed, **options)
        return Engine(
            net, self.settings, SHAPE, STEPS, graph=speed.graph, merge=speed.merge, clean_pass=self.clean_pass
        )


def far(chunks, others):
    """Largest relative difference between two streams' chunks."""
    return max(((a - b).norm() / a.norm()).item() for a, b in zip(chunks, others, strict=True))


def random_settings(seed):
    rng = random.Random(seed)
    chunk, sink = rng.randint(1, 3), rng.randint(0, 3)
    return StreamSettings(chunk, sink + chunk + rng.randint(0, 4), sink, rng.random() < 0.7, rng.random() < 0.5)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uncompiled_engine_is_the_plain_path_to_the_bit(seed, dtype):
    world = World(random_settings(seed), 9, seed, dtype)
    plain, engine = world.plain(), world.engine()
    once, other = world.play(plain), world.play(engine)
    assert all(torch.equal(a, b) for a, b in zip(once, other, strict=True))
    assert engine.cache.visible() == plain.cache.visible()
    assert all(torch.equal(a, b) for a, b in zip(once, world.play(engine), strict=True))  # after a reset


def test_forty_chunks_compiled_and_joined_stay_within_rounding():
    world = World(StreamSettings(2, 7, 2, image_first=False), 40)
    assert far(world.play(world.plain()), world.play(world.engine(Speed()))) < 2e-6


def test_forty_chunks_in_bf16_stay_within_the_rounding_of_bf16():
    """Compiled and joined, the engine is as far from fp32 as the plain path in bf16 is, and no further at the end."""
    world = World(StreamSettings(2, 7, 2, image_first=False), 40, dtype=torch.bfloat16)
    plain, engine = world.play(world.plain()), world.play(world.engine(Speed()))
    world.dit = copy.deepcopy(world.dit).float()
    exact = world.play(world.plain())
    rounding, own = ([far([a], [b]) for a, b in zip(exact, played, strict=True)] for played in (plain, engine))
    assert 1e-3 < np.median(own) < 1.1 * np.median(rounding) and max(own) < 1.5 * max(rounding)
    assert np.median(own[-10:]) < 1.5 * np.median(own[:10])


@pytest.mark.parametrize("relative", [True, False])
def test_no_option_changes_which_frames_are_seen(relative, monkeypatch):
    """Chunk by chunk, layer by layer: as many keys read, and the same frames in the cache afterwards."""
    world = World(StreamSettings(2, 7, 2, relative), 9)
    usual, seen = Sight.keys_values, {}
    for name in (None, *(field.name for field in fields(Speed))):
        speed = replace(SLOW, **({name: True} if name else {}))
        share = ALONE.using(kernel=written_plainly) if name == "kernel" else ALONE
        net = fast(world.dit, speed, share=share, compile=Compiler("eager"))
        engine = Engine(net, world.settings, SHAPE, STEPS, merge=speed.merge)
        here = seen[name] = set()

        def noted(sight, layer, here=here):
            keys, values = usual(sight, layer)
            here.add((sight.start, layer, keys.shape[1]))
            return keys, values

        def mark(stage, here=here, engine=engine):
            if stage == "clean pass":
                here.add(tuple(engine.cache.visible()))

        monkeypatch.setattr(Sight, "keys_values", noted)
        engine.mark = mark
        world.play(engine)
    assert len(seen[None]) > 9 * SIZE.layers and all(frames == seen[None] for frames in seen.values())


def test_one_compilation_serves_all_layers_and_chunks():
    """Three layers, a sink that fills, a window that fills: two forms of each piece, with and without sink keys."""
    made = []

    def counting(graph, inputs):
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    world = World(StreamSettings(2, 6, 2, image_first=False), 8)
    torch.manual_seed(0)
    world.dit.blocks.append(type(world.dit.blocks[0])(SIZE))
    for parameter in world.dit.blocks[-1].parameters():
        nn.init.normal_(parameter, std=0.1)
    world.dit.requires_grad_(False)
    world.dit.size = replace(SIZE, layers=3)
    once = world.play(world.plain())
    assert far(once, world.play(world.engine(Speed(join=False), compile=Compiler(counting)))) < 2e-6
    assert len(made) == 7  # enter and pass on (each with and without keys for the sink), leave, film, the sink's turn


def test_a_new_prompt_counts_from_the_next_chunk():
    world = World(StreamSettings(1, 4, 1, image_first=False), 3)
    for path in (world.plain(), world.engine()):
        first = world.play(path)
        path.prompt(torch.ones(1, 5, SIZE.text_dim))
        later = world._chunk(path, 1, known=False)
        if isinstance(path, Plain):
            expected = later
    assert torch.equal(later, expected) and len(first) == 3


@pytest.mark.parametrize("seed", range(8))
def test_clean_pass_beside_the_next_first_step_changes_nothing(seed):
    world = World(random_settings(seed), 9, seed)
    plain, engine = world.plain(), world.engine(replace(SLOW, merge=True))
    assert far(world.play(plain), world.play(engine)) < 2e-6
    assert engine._held and engine.cache.visible() == plain.cache.visible()
    states = torch.ones(1, 5, SIZE.text_dim)
    later = []
    for path in (plain, engine):  # the pass put off is still the old prompt's
        path.prompt(states)
        world._make.manual_seed(5)
        later.append(world._chunk(path, world.settings.chunk, known=False))
    assert far(later[:1], later[1:]) < 2e-6
    engine.settle()
    for layer in range(SIZE.layers):
        for mine, theirs in zip(engine.cache.ordered(layer), plain.cache.ordered(layer), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_merged_passes_stay_within_rounding_over_forty_compiled_chunks():
    world = World(StreamSettings(2, 7, 2, image_first=False), 40)
    assert far(world.play(world.plain()), world.play(world.engine(Speed(merge=True)))) < 2e-6


def test_without_a_clean_pass_the_past_is_what_the_last_step_wrote():
    class Unclean(Plain):
        def finish(self):
            self.cache.commit()

    world = World(StreamSettings(2, 7, 2, image_first=False), 9)
    world.clean_pass = False
    unclean = world.play(Unclean(world.dit, world.settings, SHAPE, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(unclean, world.play(world.engine()), strict=True))
    assert far(world.play(world.plain()), unclean) > 1e-3


def test_calls_out_of_order_are_told():
    world = World(StreamSettings(1, 4, 1), 1)
    engine = world.engine()
    with pytest.raises(RuntimeError, match="no prompt yet"):
        world._make = torch.Generator().manual_seed(0)
        world._chunk(engine, 1, known=False)
    with pytest.raises(RuntimeError, match="no chunk is running"):
        engine.finish()


def test_failing_compilation_warns_once_and_goes_on_plainly():
    def broken(graph, inputs):
        raise RuntimeError("no compiler here")

    world = World(StreamSettings(1, 4, 1, image_first=False), 6)
    engine = world.engine(Speed(join=False), compile=Compiler(backend=broken))
    with pytest.warns(UserWarning, match="'_film' failed.*no compiler here") as seen:
        played = world.play(engine)
    assert sum("uncompiled" in str(w.message) for w in seen) == 1
    assert far(world.play(world.plain()), played) < 2e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        world.play(engine)


def test_a_recording_that_fails_warns_once_and_all_go_on_plainly(monkeypatch):
    """Half recorded would be worst: what one graph leaves where another finds it must all be made alike."""

    class Broken:
        def __init__(self, *given, **options):
            pass

        def __enter__(self):
            raise RuntimeError("no recording here")

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Broken)
    recorder = Recorder.__new__(Recorder)  # of a machine without a GPU
    recorder.pool, recorder.failed, recorder.aside = None, False, lambda run: run()
    recorder.recording_stream = None
    world = World(StreamSettings(2, 7, 2), 9)
    engine = world.engine()
    stages = engine._films_now, engine._denoise_now, engine._clean_now
    engine._make_films, engine._denoise, engine._clean = map(recorder.repeated, stages)
    with pytest.warns(UserWarning, match="no CUDA graph could be recorded.*no recording here") as told:
        played = world.play(engine)
    assert sum("recorded" in str(warning.message) for warning in told) == 1 and recorder.failed
    assert all(torch.equal(a, b) for a, b in zip(world.play(world.plain()), played, strict=True))


def test_a_mistake_in_the_arguments_is_raised_and_not_hidden_by_the_fallback():
    add = Compiler(backend="eager")(lambda a, b: a + b)
    with pytest.warns(UserWarning, match="uncompiled"), pytest.raises(RuntimeError, match="size of tensor"):
        add(torch.zeros(2), torch.zeros(3))


# -- 8-bit floating point ---------------------------------------------------------------------------------------------


def test_quantised_rows_come_back_within_half_a_step_of_the_format():
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 50)[:, None]
    x[3] = 0
    rows, scales = fp8.quantised(x)
    assert rows.dtype == torch.float8_e4m3fn and scales.shape == (50, 1) and rows.float().isfinite().all()
    error = (rows.float() * scales - x).abs()
    assert (error <= x.abs() / 16 + scales * 2**-10).all()
    assert (rows[:3].float().abs().amax(1) == fp8.LARGEST).all() and not rows[3].float().any()


def test_fp8_linear_is_the_product_of_what_was_quantised():
    torch.manual_seed(0)
    linear = nn.Linear(64, 48)
    x = torch.randn(2, 5, 64)
    rows, scales = fp8.quantised(x)
    weight, weight_scales = fp8.quantised(linear.weight)
    expected = (rows.float() * scales) @ (weight.float() * weight_scales).T + linear.bias
    torch.testing.assert_close(fp8.Fp8Linear(linear)(x), expected, atol=1e-5, rtol=1e-5)
    relative = (fp8.Fp8Linear(linear)(x) - linear(x)).norm() / linear(x).norm()
    assert 0.01 < relative < 0.06  # 3 bits of mantissa on either side


@pytest.mark.parametrize("join", [False, True])
def test_fp8_replaces_the_products_of_every_pass_and_nothing_else(join):
    dit = random_dit()
    kept = {name: value.clone() for name, value in dit.state_dict().items()}
    net = fast(dit, replace(SLOW, join=join, fp8=True))
    names = {name for name, part in net.layers[0].named_modules() if isinstance(part, fp8.Fp8Linear)}
    self_attention = {"qkv"} if join else {"q", "k", "v"}
    assert names == {
        *(f"self_attn.{name}" for name in (*self_attention, "o")),
        *("cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2"),
        *fp8.CAMERA,
    }
    assert all(torch.equal(value, kept[name]) for name, value in dit.state_dict().items())


def test_fp8_stream_stays_near_the_plain_one():
    world = World(StreamSettings(2, 7, 2, image_first=False), 12)
    plain = world.play(world.plain())
    assert 1e-3 < far(plain, world.play(world.engine(replace(SLOW, fp8=True)))) < 0.1


def test_emulated_fp8_attention_is_attention_within_rounding():
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 32, generator=make) for n in (40, 300, 300))
    got = lifted(emulated_attend(lowered(q), lowered(k), lowered(v, SCALE))).float()
    error = (got - attend_reference(q, k, v)).norm() / attend_reference(q, k, v).norm()
    assert 0.01 < error < 0.1  # outputs are small means of values, whose rounding does not shrink with them
    huge = lowered(torch.tensor([1e9, -1e9, 1.0]), SCALE).float()
    assert huge.tolist() == [fp8.LARGEST, -fp8.LARGEST, SCALE]


@pytest.mark.parametrize("relative", [True, False])
def test_fp8_attention_keeps_an_8_bit_cache_and_stays_near(relative):
    world = World(StreamSettings(2, 7, 2, relative, image_first=False), 12)
    engine = world.engine(replace(SLOW, fp8_attention=True))
    assert 1e-4 < far(world.play(world.plain()), world.play(engine)) < 0.05
    assert engine.cache.ordered(0)[0].dtype == torch.float8_e4m3fn


def test_where_fp8_attention_cannot_be_had_there_is_one_warning():
    with pytest.warns(UserWarning, match="attention stays in bf16"):
        assert not usable(torch.device("cpu"), 128)


def test_a_kernel_that_is_wrong_is_not_believed(monkeypatch):
    monkeypatch.setattr(fp8_attention, "attend_fp8", lambda q, k, v: q)
    with pytest.warns(UserWarning, match="is wrong by"):
        assert not usable(torch.device("cpu"), 128)
    monkeypatch.setattr(fp8_attention, "attend_fp8", emulated_attend)
    assert usable(torch.device("cpu"), 128)


# -- pictures ---------------------------------------------------------------------------------------------------------


def latents(frames, seed=0):
    return torch.randn(1, 16, frames, 3, 4, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def taehv():
    torch.manual_seed(2)
    vae = TAEHV(widths=(24, 16, 8, 8), encoder_width=8).eval().requires_grad_(False)
    return vae.to(memory_format=torch.channels_last)


def test_pictures_of_a_stream_are_the_plain_decoders(taehv):
    plain, fast_pictures = PlainPictures(taehv), picture_stream(taehv)
    assert isinstance(fast_pictures, PictureStream)
    for _ in range(2):  # and again after a reset
        for seed, frames in enumerate((1, 3, 3, 2)):
            wanted, got = (stream(latents(frames, seed)) for stream in (plain, fast_pictures))
            assert got.shape == wanted.shape and got.dtype == torch.uint8 and got.float().std() > 1
            assert (got.int() - wanted.int()).abs().max() <= 1
        plain.reset()
        fast_pictures.reset()


def test_other_decoders_are_used_as_they_are():
    vae = TinyVAE(MICRO_VAE).eval()
    assert torch.equal(picture_stream(vae)(latents(2)), to_uint8(vae.decode(latents(2)))[0])


@GPU
def test_recorded_pictures_are_the_plain_ones(taehv):
    vae = copy.deepcopy(taehv).cuda()
    plain, fast_pictures = PlainPictures(vae), picture_stream(vae)
    for seed in range(5):
        wanted, got = (stream(latents(3, seed).cuda()) for stream in (plain, fast_pictures))
        assert (got.int() - wanted.int()).abs().max() <= 1


def test_gelu_by_the_exponential_is_gelu():
    x = torch.linspace(-12, 12, 1001)
    torch.testing.assert_close(SigmoidGELU()(x), nn.functional.gelu(x, approximate="tanh"), atol=2e-6, rtol=1e-5)


# -- in a session, in little memory ------------------------------------------------------------------------------------


def test_a_session_plays_the_same_frames_with_the_fast_network():
    torch.manual_seed(1)
    dit, vae = DiT(MICRO.model).eval(), TinyVAE(MICRO_VAE).eval()
    for parameter in dit.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    picture = np.random.default_rng(0).integers(0, 256, (SHAPE.height, SHAPE.width, 3), dtype=np.uint8)

    class Words:
        def encode(self, prompt):
            return torch.ones(3, MICRO.model.text_dim) * len(prompt)

    played = []
    for network in (dit, StreamingDiT(dit)):
        session = Session(MICRO, network, vae, Words(), start_image=picture, prompt="a corridor", steps=2)
        chunks = [session.step(keys) for keys in ("w", "wl", "")]
        session.window, session.prompt = 3, "a cave"  # the cache is built anew
        played.append(np.concatenate([*chunks, session.step("j")]).astype(int))
    assert played[0].std() > 1 and np.abs(played[0] - played[1]).max() <= 1


def test_a_meta_network_is_filled_layer_by_layer_and_the_original_stays_empty():
    dit = DiT(SIZE, device="meta")
    net = fast(dit, replace(SLOW, fp8=True), to=lambda tensor: torch.ones(tensor.shape))
    assert all(p.is_meta for p in dit.parameters()) and net.device.type == "cpu"
    assert net.layers[0].ffn[0].weight.dtype == torch.float8_e4m3fn
    assert torch.equal(net.layers[1].modulation, torch.ones(1, 6, SIZE.dim))


def test_needed_memory_counts_what_lies_in_it():
    need = needed(LINGBOT)
    assert need.weights == 2 * 18_544_332_864
    assert need.cache == 2 * 2 * 40 * 10.5 * 1560 * 5120  # window 9 and once more the keys of 3 sink frames
    assert need.camera == 2 * 2 * 40 * 3 * 1560 * 5120
    halved = needed(LINGBOT, Speed(fp8=True), ranks=2)
    products = 40 * (10 * 5120**2 + 2 * 5120 * 13824)
    assert halved.weights == need.weights - products and halved.cache == need.cache / 2
    merged = needed(LINGBOT, Speed(merge=True))
    assert merged.camera == 2 * need.camera and merged.work == 2 * need.work and merged.cache == need.cache
    with pytest.raises(ValueError, match="without a window"):
        needed(replace(LINGBOT, stream=StreamSettings(window=None)))


@pytest.mark.parametrize("speed", [Speed(), Speed(fp8_attention=True)])
def test_the_cache_takes_what_was_counted(speed):
    """In 8 bits too, where the sink's second copy is not in 8 bits."""
    world = World(MICRO.stream, 1, dtype=torch.bfloat16, size=MICRO.model)
    engine = world.engine(replace(SLOW, fp8_attention=speed.fp8_attention))
    assert engine.cache.occupancy().bytes == needed(MICRO, speed).cache


@pytest.mark.parametrize("speed", [Speed(join=False), Speed(), Speed(fp8=True)])
def test_the_weights_take_what_was_counted_beside_a_plain_network_and_alone(speed, monkeypatch):
    monkeypatch.setattr("lingbot_nb.stream.engine.lay_rows_inside", lambda layer: None)  # a CPU's alone
    dit = random_dit(0, MICRO.model).bfloat16().requires_grad_(False)
    net = fast(dit, replace(speed, compile=False))
    own, plain = ({t.data_ptr(): t.nbytes for t in (*m.parameters(), *m.buffers())} for m in (net._dit, dit))
    alone, beside = (needed(MICRO, speed, beside=beside).weights for beside in (False, True))
    # Scales of the 8-bit numbers and joined biases are left out of the count: much here, nothing at full size.
    assert sum(own.values()) == pytest.approx(alone, rel=0.05)
    assert sum({**own, **plain}.values()) == pytest.approx(beside, rel=0.05)


@pytest.mark.parametrize(("gib", "fits"), [(44, "in fp8: 35 GiB"), (24, "lingbot-1.3b at 480x832"), (1, "tiny preset")])
def test_a_small_gpu_is_told_what_would_fit(gib, fits):
    with pytest.raises(RuntimeError, match=rf"needs 55 GiB .*{gib} GiB are free.*{fits}"):
        check_memory(LINGBOT, gib * GIB)


def test_a_large_gpu_is_not_told_anything():
    assert check_memory(LINGBOT, 80 * GIB).total < 60 * GIB


def test_the_decoder_that_plays_is_the_one_that_is_counted():
    fast, wan = (needed(LINGBOT, decoder=decoder) for decoder in (taehv_maps, wan_maps))
    between = (fast.total + wan.total) / 2
    assert fast.decoder < wan.decoder and check_memory(LINGBOT, between, decoder=taehv_maps) == fast
    with pytest.raises(RuntimeError, match="on each GPU.*are free: what would fit is"):
        check_memory(LINGBOT, between, decoder=wan_maps)
    for decoder, small in ((taehv_maps, fast), (wan_maps, wan)):
        for count in (needed, needed_plainly):
            assert count(LINGBOT, value_bytes=4, decoder=decoder).decoder == 2 * small.decoder


# -- several processes, GPUs ------------------------------------------------------------------------------------------


def test_tokens_are_shared_out_before_they_are_wide_and_gathered_when_they_are_narrow():
    met = {"part": set(), "whole": set()}

    class Noting(Alone):
        def part(self, x):
            met["part"].add(x.shape[-1])
            return x

        def whole(self, x):
            met["whole"].add(x.shape[-1])
            return x

    world = World(StreamSettings(1, 4, 1, image_first=False), 2)
    world.play(world.engine(share=Noting()))
    assert met == {"part": {4 * 36, 4 * 64 * SIZE.control_channels}, "whole": {4 * 16}}


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_with_a_share_of_the_heads_each_play_the_same_stream(tmp_path, processes):
    rows = list(launch("engine_target:distances", {"heads": processes}, processes=processes, folder=tmp_path))
    # Keys of the sink cross over as 8 bits where attention has 8 bits.
    assert len(rows) == 16 and all(row["far"] < (0.02 if row["small"] else 2e-6) for row in rows)
    assert all(row["heads"] == 1 for row in rows)


@GPU
@pytest.mark.parametrize("settings", [StreamSettings(1, 4, 1), StreamSettings(2, 7, 2, image_first=False)])
def test_recorded_engine_is_the_plain_path(settings):
    world = World(settings, 12, device="cuda")
    engine = world.engine(Speed(compile=False, join=False))
    once = world.play(world.plain())
    for _ in range(3):  # plain, recorded, replayed
        assert far(once, world.play(engine)) < 1e-5
    assert engine._denoise._recordings


def written_plainly(raw, table, to, slots=None):
    """What `turn_kernel.norm_turn_write` does, step by step."""
    parts, _, heads, head_dim = to[0].shape
    q, k, v = (x[0].float() for x in (raw.q, raw.k, raw.v))
    q, k = (
        (F.rms_norm(x, x.shape[-1:], eps=raw.eps).to(raw.q.dtype) * norm)
        for x, norm in ((q, raw.norm_q), (k, raw.norm_k))
    )
    q, k, v = (x.to(raw.q.dtype).unflatten(1, (parts * heads, head_dim)) for x in (q, k, v))
    rows = torch.arange(len(q), device=q.device)
    for x, place, at in ((q, to[0], rows), (k, to[1], slots), (v, to[2], slots)):
        x = x if x is v else apply_rope(x[None], table)[0]
        if place.dtype == torch.uint8:
            x = lowered(x, SCALE if place is to[2] else 1.0).view(torch.uint8)
        place[:, rows if at is None else at] = x.unflatten(1, (parts, heads)).transpose(0, 1)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("merge", [False, True])
def test_a_kernel_gets_all_it_needs_to_take_the_place_of_norm_rotation_and_write(fp8, merge):
    world = World(StreamSettings(2, 7, 1, relative=True, image_first=False), 9, dtype=torch.bfloat16)
    speed = replace(SLOW, merge=merge, fp8_attention=fp8)
    calls = []

    def kernel(*given):
        calls.append(given)
        written_plainly(*given)

    once, other = world.play(world.engine(speed)), world.play(world.engine(speed, share=ALONE.using(kernel=kernel)))
    assert calls and far(once, other) < 1e-2
    # fp32 norms of bf16 numbers may round another way; all else is the same arithmetic.
    assert far(once, other) < 1e-6 or fp8


@GPU
@pytest.mark.parametrize(("heads", "head_dim"), [(40, 128), (12, 128), (2, 16)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_the_kernel_of_norm_rotation_and_write_is_the_plain_one(heads, head_dim, dtype):
    make = torch.Generator("cuda").manual_seed(0)
    tokens, dim = 3 * 20, heads * head_dim
    qkv = torch.randn(1, tokens, 3 * dim, generator=make, device="cuda").to(torch.bfloat16)
    norms = [torch.randn(dim, generator=make, device="cuda").to(torch.bfloat16) for _ in range(2)]
    raw = Raw(*qkv.chunk(3, -1), *norms, 1e-6)
    table = fresh_rope_table(range(7, 10), (4, 5), head_dim, "cuda")
    slots = torch.randperm(100, generator=make, device="cuda")[:tokens]
    for parts, at in ((1, slots), (2, None)):
        got, wanted = (
            tuple(torch.zeros(parts, 100, heads // parts, head_dim, dtype=dtype, device="cuda") for _ in range(3))
            for _ in range(2)
        )
        turn_kernel.norm_turn_write(raw, table, got, at)
        written_plainly(raw, table, wanted, at)
        for mine, its in zip(got, wanted, strict=True):
            mine, its = ((x.view(E4M3) if dtype == torch.uint8 else x).float() for x in (mine, its))
            assert ((mine - its).norm() / its.norm()).item() < (0.02 if dtype == torch.uint8 else 0.004)


@GPU
def test_the_gpus_fp8_attention_is_the_emulated_one():
    if not usable(torch.device("cuda"), 128):
        pytest.skip("no fp8 attention here")
    make = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, n, 4, 128, generator=make, device="cuda") for n in (500, 1300, 1300))
    given = lowered(q), lowered(k), lowered(v, SCALE)
    here, emulated = (lifted(run(*given)).float() for run in (fp8_attention.attend_fp8, emulated_attend))
    # The kernel rounds a weight relative to the largest score it has met so far, the emulation to the row's largest:
    # 0.035 apart on an H100, where each is about 0.04 from the exact result.
    assert (here - emulated).norm() / emulated.norm() < 0.05


@GPU
def test_the_gpus_fp8_product_is_the_emulated_one():
    torch.manual_seed(0)
    linear = nn.Linear(256, 512, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(33, 256, device="cuda")
    here, emulated = (fp8.Fp8Linear(linear, product)(x) for product in (fp8.scaled_product, fp8.emulated_product))
    torch.testing.assert_close(here, emulated, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("speed", [SLOW, replace(SLOW, join=True, fp8=True, fp8_attention=True)])
def test_a_clean_pass_that_ends_at_the_last_keys_writes_what_a_whole_one_does(speed):
    """The cache is equal to the bit, and the last layer's feed-forward is never run."""
    world = World(StreamSettings(2, 6, 2, image_first=False), 1)
    caches, runs = [], []
    for write in (True, False):
        engine = world.engine(speed)
        net = engine._net
        net.layers[-1].ffn[0].register_forward_hook(lambda *_, write=write: runs.append(write))
        if not write:
            net.write = lambda *given, net=net: net(*given)
        world.play(engine)
        caches.append([part.float() for layer in range(SIZE.layers) for part in engine.cache.ordered(layer)])
    assert all(torch.equal(a, b) for a, b in zip(*caches, strict=True))
    assert runs.count(True) == len(STEPS) and runs.count(False) == len(STEPS) + 1


def test_text_is_read_in_eight_bits_where_attention_is():
    world = World(StreamSettings(2, 6, 2, image_first=False), 1)
    plain, eight = (world.engine(replace(SLOW, fp8_attention=on))._net for on in (False, True))
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 16, generator=make).to(torch.bfloat16) for n in (9, 5, 5))
    exact, rounded = (net.layers[0].attend_text(q, k, v).float() for net in (plain, eight))
    assert torch.equal(exact, attend(q, k, v).float())
    assert rounded.dtype == exact.dtype and 0.01 < ((rounded - exact).norm() / exact.norm()) < 0.1
