"""The streaming bench measures what it says it measures; how fast anything is, is not tested."""

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from lingbot_nb import presets
from lingbot_nb.cli import _parser, main
from lingbot_nb.model.fused import ALONE
from lingbot_nb.model.vae import MICRO_VAE, TinyVAE
from lingbot_nb.presets import LINGBOT, MICRO
from lingbot_nb.report import architecture, bench_stream
from lingbot_nb.report.bench_stream import Clock, Loop, Rate, Screen
from lingbot_nb.runs import PROJECT
from lingbot_nb.stream.engine import Plain, Speed, fast
from lingbot_nb.stream.engine_decoder import PlainPictures
from lingbot_nb.stream.engine_memory import GIB, needed, needed_plainly

CPU = torch.device("cpu")
STREAM = replace(MICRO.stream, chunk=2, window=5, image_first=False)
PRESET = replace(MICRO, stream=STREAM)


@pytest.fixture
def small_decoder(monkeypatch):
    """The micro tokenizer instead of the tiny world's."""
    monkeypatch.setattr(bench_stream, "TinyVAE", lambda size=None: TinyVAE(MICRO_VAE))


def loop(steps=2):
    dit = bench_stream.random_dit(PRESET.model, CPU, torch.float32)
    path = Plain(dit, PRESET.stream, PRESET.shape, bench_stream._schedule(PRESET, steps))
    return Loop(path, Screen(PlainPictures(TinyVAE(MICRO_VAE).eval()), CPU), PRESET, steps)


def test_every_chunk_ends_as_uint8_frames_on_the_host():
    player = loop()
    frames = [player.step()[1] for _ in range(3)]
    size = (PRESET.shape.height, PRESET.shape.width, 3)
    assert [f.shape for f in frames] == [(5, *size), (8, *size), (8, *size)]  # the first frame is one picture
    assert all(isinstance(f, np.ndarray) and f.dtype == np.uint8 for f in frames)
    player.reset()
    assert np.array_equal(player.step()[1], frames[0])


def test_a_steady_stream_has_its_window_full_and_its_sink_behind_it():
    player = loop()
    for _ in range(player.fills()):
        player.step()
    cache = player.engine.cache
    assert len(cache.visible()) == STREAM.window and cache.visible()[STREAM.sink] > STREAM.sink
    skipped = loop()
    skipped.step()
    skipped.skip_past()
    skipped.step()
    assert len(skipped.engine.cache.visible()) == STREAM.window


def test_row_adds_up():
    player = loop()
    row = bench_stream.time_stream(player, "plain", 3, floor=1.0)
    assert row.chunks == 3 and row.steps == 2 and row.chunk == 2 and row.peak_gib == 0
    assert row.fps == pytest.approx(8 * 3 * 1000 / (3 * row.period), rel=0.9) and row.latency <= row.p99
    assert set(row.stages) == {"keys", "camera", "steps", "hand over", "clean pass", "decode"}
    assert sum(ms for name, ms in row.stages.items() if name != "decode") < 3 * row.period
    assert "2+1 forwards" in str(row) and "n=3" in str(row)


def test_the_table_has_what_each_stream_reached_with_all_its_options(tmp_path):
    row = dict(steps=2, clean_pass=True, fps=1.25, floor=400.0, period=800.0, peak_gib=3.6)
    for picture, processes in (("720x1280", 2), ("96x160", 1)):
        parts = (f"lingbot · {picture}, 21 frames of 60 tokens · bfloat16 · NVIDIA H200 · torch 2.11 · chunk 3 · "
                 f"window 9 · sink 3 · processes {processes}")  # fmt: skip
        rows = [row | dict(name=name, steps=steps) for name, steps in (("plain", 4), ("all", 2), ("all", 1))]
        (tmp_path / f"{processes}.json").write_text(json.dumps(dict(conditions=parts, rows=rows)))
    lines = bench_stream.table([tmp_path / "2.json", tmp_path / "1.json"]).splitlines()[2:]
    assert [line.split(" | ")[3] for line in lines] == ["2 + 1", "1 + 1"] * 2
    assert lines[0] == "| 96x160, lingbot | 1 x NVIDIA H200 | 9, 3 | 2 + 1 | 1.2 | 50% | 800 | 4 | – |"
    assert lines[2].startswith("| 720x1280, lingbot | 2 x NVIDIA H200 |")


def test_clock_gives_each_stage_from_the_point_before_it():
    clock = Clock(CPU)
    clock._points = [("begin", 0.0), ("a", 0.001), ("b", 0.004), ("begin", 0.1), ("a", 0.102)]
    spans = clock.stages("begin")
    assert spans["a"] == pytest.approx([1, 2]) and spans["b"] == pytest.approx([3]) and "begin" not in spans


def test_floor_counts_every_product_and_attention_of_a_chunk(monkeypatch):
    """At one TFLOP/s for everything the floor is the chunk's arithmetic, as the architecture chapter counts it."""

    def product(rows, inside, columns, device, dtype):
        return 2 * rows * inside * columns

    def attention(queries, keys, size, device, dtype, format):
        return 4 * queries * keys * size.dim

    monkeypatch.setattr(bench_stream, "_attention", attention)
    monkeypatch.setattr(bench_stream, "_alone", lambda work, device: work / 1e9)
    rates = [*bench_stream.linear_rates(LINGBOT, CPU, torch.float32, product)]
    rates += bench_stream.attention_rates(LINGBOT, CPU, torch.float32)
    expected = architecture.chunk_flops(LINGBOT.model, LINGBOT.shape, 3, 9, forwards=5)
    assert bench_stream.floor_ms(rates, LINGBOT.model.layers, 5) == pytest.approx(expected / 1e9)
    assert all(rate.tflops == pytest.approx(1.0) for rate in rates)


def test_floor_of_work_done_once_does_not_grow_with_the_forwards():
    rates = [Rate("each pass", 2, 3.0, 1.0), Rate("once", 4, 5.0, 1.0, once=True)]
    assert bench_stream.floor_ms(rates, layers=10, forwards=1) == 10 * (2 * 3 + 4 * 5)
    assert bench_stream.floor_ms(rates, layers=10, forwards=5) == 10 * (5 * 2 * 3 + 4 * 5)


def test_command_prints_rows_compares_and_writes_numbers_and_picture(small_decoder, tmp_path, capsys):
    out = tmp_path / "bench.json"
    words = "bench stream --preset micro --steps 2,1 --chunk 2 --window 5 --chunks 2 --plain-chunks 1 --dtype fp32"
    words += " --no-compile"  # compiled streams are test_engine's
    assert main([*words.split(), "--check", "4", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert [(row["name"], row["steps"]) for row in found["rows"]] == [("plain", 2), ("engine", 2), ("engine", 1)]
    assert found["check"]["engine"] and max(found["check"]["engine"]) < 1e-5 and max(found["layers"]) < 1e-5
    assert "chunk 2 · window 5 · sink 1" in found["conditions"] and len(found["rates"]) == 7
    assert out.with_suffix(".png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert printed.count("FPS") >= 3 and "x0 differs by" in printed and "compared 1 of 4 chunks" in printed
    assert [row["host"] > 0 for row in found["rows"]] == [False, True, True] and "Python and calls" in printed


def test_the_table_tells_ways_with_the_clean_pass_apart_and_the_hosts_share(tmp_path):
    row = dict(steps=2, clean_pass=True, fps=1.0, floor=1.0, period=2.0, peak_gib=0.0)
    rows = [row | dict(name=name) for name in ("plain", "+ a", "+ b", "engine merged")]
    rows += [row | dict(name="engine", clean_pass=False, host=3.14)]
    parts = "tiny · 96x160, 21 frames of 60 tokens · float32 · cpu · window 7 · sink 1 · processes 1"
    (tmp_path / "a.json").write_text(
        json.dumps(dict(conditions=parts.replace(" · window", " · torch 2 · window"), rows=rows))
    )
    lines = [line.split(" | ") for line in bench_stream.table([tmp_path / "a.json"]).splitlines()[2:]]
    assert [line[3] for line in lines] == ["2 + 1", "2 + 1, merged", "2 + 0"]
    assert [line[-1] for line in lines] == ["– |", "– |", "3.1 |"]


def test_each_way_with_the_clean_pass_is_measured_against_a_floor_of_its_own(small_decoder):
    speed = Speed(compile=False, graph=False)
    order = bench_stream.Order(PRESET, (2, 1), speed, chunks=2, plain_chunks=0, each_clean_pass=True)
    rows = bench_stream.run(order, CPU, torch.float32, lambda line: None)["rows"]
    told = [(row["name"], row["steps"], row["clean_pass"]) for row in rows]
    assert told == [
        *(("engine", count, True) for count in (2, 1)),
        *(("engine merged", count, True) for count in (2, 1)),
        *(("engine", count, False) for count in (2, 1)),
    ]
    assert rows[0]["floor"] == rows[2]["floor"] > rows[4]["floor"] and rows[1]["floor"] > rows[5]["floor"]
    assert all("clean pass" in row["stages"] for row in rows) and rows[0]["cold"] and not rows[2]["cold"]
    ways = bench_stream.clean_passes(replace(order, speed=replace(speed, merge=True)))
    assert [(way.speed.merge, way.clean_pass) for way in ways] == [(True, True), (False, True), (False, False)]


def test_flags_become_what_is_measured():
    words = "bench stream --preset lingbot --layers 1 --decoder wan-plain --each-clean-pass --first --no-join"
    order = bench_stream.order_of(_parser().parse_args(words.split()))
    assert order.decoder is bench_stream.plain_wan_decoder and order.each_clean_pass and order.speed.first
    assert order.preset.model.layers == 1 and not order.speed.join and not order.speed.merge
    plain = bench_stream.order_of(_parser().parse_args(["bench", "stream"]))
    assert plain.decoder is None and not plain.each_clean_pass and plain.speed == Speed()


def test_a_wan_vae_can_be_the_decoder_in_either_layout(monkeypatch):
    pytest.importorskip("diffusers")
    narrow = bench_stream.WanVAE.build
    monkeypatch.setattr(bench_stream.WanVAE, "build", lambda device=None: narrow(base_dim=4, device=device))
    for name in ("wan", "wan-plain"):
        order = bench_stream.Order(PRESET, (1,), Speed(compile=False), 1, 0, decoder=bench_stream.DECODERS[name])
        found = bench_stream.run(order, CPU, torch.float32, lambda line: None)
        assert (
            "decoder WanVAE" in found["conditions"] and found["decoder_ms"] > 0 < found["rows"][0]["stages"]["decode"]
        )


def test_one_call_of_many_in_a_row_is_timed():
    calls = []

    def run():
        calls.append(1)
        time.sleep(2e-3)

    assert 2 <= bench_stream._alone(run, CPU, calls=5) < 4 and len(calls) % 5 == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")
def test_small_products_are_timed_without_the_host():
    """A product of a few microseconds: recorded, it is not slower than when it is launched by itself."""
    gpu = torch.device("cuda")
    run = bench_stream._product(256, 256, 256, gpu, torch.bfloat16)
    assert bench_stream._alone(run, gpu) < bench_stream._median_ms(run, gpu)


def test_what_python_takes_is_measured_on_every_layer_and_next_to_no_arithmetic(monkeypatch):
    """What is timed, and not how long it took: a busy machine would decide that."""
    made, kept = [], bench_stream._loop
    monkeypatch.setattr(bench_stream, "_loop", lambda net, order, *rest: made.append(order) or kept(net, order, *rest))
    for layers in (2, 5):
        preset = replace(PRESET, model=replace(PRESET.model, layers=layers), shape=presets.VideoShape(256, 256, 21))
        order = bench_stream.Order(preset, (2,), Speed(compile=False), chunks=5)
        assert bench_stream.host_ms(order, 2, torch.float32) > 0
    assert [order.preset.model.layers for order in made] == [2, 5]
    assert all(order.preset.model.dim == 16 and order.preset.shape.tokens_per_frame == 1 for order in made)
    assert all(order.preset.stream == PRESET.stream for order in made)


def test_fp8_rows_are_named_and_their_error_is_told(small_decoder):
    said = []
    speed = Speed(compile=False, graph=False, fp8=True)
    order = bench_stream.Order(PRESET, (1,), speed, chunks=1, plain_chunks=0, check=3)
    found = bench_stream.run(order, CPU, torch.float32, said.append)
    assert [row["name"] for row in found["rows"]] == ["engine fp8"]
    assert 1e-3 < max(found["check"]["engine"]) < 0.15 and any("x0 differs" in line for line in said)
    assert len(found["layers"]) == PRESET.model.layers and 0.01 < min(found["layers"]) < max(found["layers"]) < 0.15


def test_the_error_of_layers_is_that_of_the_engines_own_pieces():
    """Both kinds of 8-bit numbers count, and so does a kernel that is wrong."""
    dit, said = bench_stream.random_dit(PRESET.model, CPU, torch.float32), []
    for name, values in dit.named_parameters():
        if "self_attn.v." in name or "self_attn.o." in name or "modulation" in name:
            torch.nn.init.normal_(values, std=0.3)  # so that attention is a large part of what a layer adds

    def errors(**options):
        speed = Speed(**dict(compile=False, graph=False) | options)
        return bench_stream.layer_errors(dit, fast(dit, speed), bench_stream.Order(PRESET, speed=speed), said.append)

    exact, attention, both = errors(), errors(fp8_attention=True), errors(fp8=True, fp8_attention=True)
    assert max(exact) < 1e-5 and max(errors(compile=True)) < 1e-5
    assert 1e-3 < min(attention) and max(attention) < max(both) < 0.2 and len(said) == 4

    def wrong(raw, table, to, slots):  # one that writes nothing leaves what memory held, at times nan
        for part in to:
            part.zero_()

    net = fast(dit, Speed(compile=False), share=ALONE.using(kernel=wrong))
    assert min(bench_stream.layer_errors(dit, net, bench_stream.Order(PRESET), said.append)) > 0.01


def measured_rows():
    """(file, row, what it must have needed) of the numbers in data/speed. Rungs but the last run beside the plain
    network; one file is of a run that kept it for its comparison, whose numbers lie in another."""
    everything = Speed(fp8=True, fp8_attention=True)
    climbed = {f"+ {name}": speed for name, speed in bench_stream.rungs(everything, torch.device("cuda"))}
    known = climbed | {"engine fp8 + fp8 attention": everything}
    for path in sorted((PROJECT / "data/speed").glob("*.json")):
        found = json.loads(path.read_text())
        name, picture, _, _, *rest = found["conditions"].split(" · ")
        told = dict(part.split(" ", 1) for part in rest)
        preset, (height, width) = presets.by_name(name), map(int, picture.split(",")[0].split("x"))
        stream = replace(preset.stream, window=int(told["window"]), sink=int(told["sink"]))
        preset = replace(preset, shape=presets.VideoShape(height, width, 81), stream=stream)
        kept = "check" in found or path.stem == "lingbot-480p-1xH200"
        # A file with every kind of clean pass has the plain kind first; later rows hold what earlier ones left.
        firsts = {(row["name"], row["steps"]): row for row in reversed(found["rows"])}.values()
        for row in firsts if int(told["layers"]) == preset.model.layers and "decoder" not in told else ():
            if speed := known.get(row["name"]):
                beside = kept or row["name"] in [*climbed][:-1]
                yield path.stem, row, needed(preset, speed, ranks=int(told["processes"]), beside=beside)
            elif row["name"] == "plain":
                yield path.stem, row, needed_plainly(preset)


def test_needed_memory_is_what_was_measured():
    """To 3 % or half a GiB, whichever is more (recorded rates of the bench may stay in memory), and on the safe side
    with what no allocator counts."""
    seen = list(measured_rows())
    assert len(seen) > 30
    for name, row, need in seen:
        told = name, row["name"]
        assert need.tensors / GIB == pytest.approx(row["peak_gib"], rel=0.03, abs=0.5), told
        assert need.total / GIB > row["peak_gib"], told


def test_a_bench_is_told_which_flag_asks_for_more_than_a_gpu_holds():
    everything = Speed(fp8=True, fp8_attention=True)
    order = bench_stream.Order(LINGBOT, speed=everything, plain_chunks=0)
    bench_stream.check_fits(order, 36 * GIB)
    for flags, gib, told in (
        (dict(plain_chunks=2), 57, "the plain path needs 59 GiB"),
        (dict(ladder=True), 65, "--ladder needs 70 GiB"),
        (dict(check=40), 75, "--check needs 85 GiB"),
        (dict(each_clean_pass=True), 37, "--each-clean-pass needs 39 GiB"),
    ):
        with pytest.raises(RuntimeError, match=f"{told}.*{gib} GiB are free: the engine alone would fit"):
            bench_stream.check_fits(replace(order, **flags), gib * GIB)
        bench_stream.check_fits(replace(order, **flags), 90 * GIB)
    with pytest.raises(RuntimeError, match="what would fit is"):
        bench_stream.check_fits(order, 30 * GIB)


@pytest.mark.parametrize("decoder", [bench_stream.wan_decoder, bench_stream.plain_wan_decoder])
@pytest.mark.parametrize("flags", [dict(plain_chunks=2), dict(ladder=True), dict(check=40), dict(each_clean_pass=True)])
def test_a_bench_counts_the_decoder_that_it_plays_with(flags, decoder):
    """With each flag, too: a GPU that just holds it beside a TAEHV does not hold it beside the Wan VAE."""
    order = replace(bench_stream.Order(LINGBOT, plain_chunks=0), **flags)
    most = max(need.total for _, need in bench_stream.beyond_the_engine(order))
    bench_stream.check_fits(order, most)
    with pytest.raises(RuntimeError, match="the engine alone would fit"):
        bench_stream.check_fits(replace(order, decoder=decoder), most)


def test_the_shipped_ladder_has_all_rungs_next_to_a_floor_of_their_own():
    found = json.loads((PROJECT / "data/speed/lingbot-480p-1xH200.json").read_text())
    rows = [row for row in found["rows"] if row["steps"] == 4]
    names = [f"+ {name}" for name, _ in bench_stream.rungs(Speed(fp8=True, fp8_attention=True), torch.device("cuda"))]
    assert [row["name"] for row in rows] == ["plain", *names] and all(row["floor"] > 0 for row in rows)
    table = bench_stream.table(sorted((PROJECT / "data/speed").glob("*.json")))
    assert table.count("1 x NVIDIA H200") >= 8 and "check" not in table


def test_a_ladder_adds_one_option_at_a_time_and_ends_at_what_was_asked_for(small_decoder):
    wanted = Speed(compile=False, graph=True, fp8=True, kernel=False)
    names, options = zip(*bench_stream.rungs(wanted, torch.device("cuda")), strict=True)
    assert (
        options[0] == Speed(False, False, False, kernel=False)
        and options[-1] == wanted
        and len(set(names)) == len(names)
    )
    for before, after in zip(options, options[1:], strict=False):
        assert sum(before.__dict__[name] != after.__dict__[name] for name in before.__dict__) == 1
    said = []
    order = bench_stream.Order(PRESET, (1,), wanted, chunks=1, plain_chunks=1, ladder=True)
    rows = bench_stream.run(order, CPU, torch.float32, said.append)["rows"]
    # A CPU has no graphs.
    assert [row["name"] for row in rows] == [
        "plain",
        "+ work that no step changes, once",
        "+ q, k, v as one product",
        "+ fp8 products",
    ]
    assert all(row["floor"] > 0 for row in rows)


def test_forty_chunks_in_bf16_are_compared_with_a_finer_path_and_tell_how_far_they_are(monkeypatch):
    """The yardstick alone computes with 11 bits, while it computes, and in no other way than the plain path in fp32."""
    dit, said, finer = bench_stream.random_dit(PRESET.model, CPU, torch.bfloat16), [], []
    usual = bench_stream.Plain.denoise

    def denoise(path, *given):
        finer.append((isinstance(path, bench_stream.Yardstick), torch.backends.cuda.matmul.allow_tf32))
        return usual(path, *given)

    monkeypatch.setattr(bench_stream.Plain, "denoise", denoise)
    before = torch.backends.cuda.matmul.allow_tf32
    speed = Speed(compile=False, graph=False)
    order = bench_stream.Order(PRESET, (2,), speed, check=12)
    errors = bench_stream.compare(dit, fast(dit, speed), order, said.append)
    assert [*errors] == ["plain", "engine"] and all(len(found) == 12 for found in errors.values())
    assert 1e-3 < np.median(errors["engine"]) < 1.1 * np.median(errors["plain"]) < 0.1
    assert finer == [(True, True), (False, before)] * 12 and torch.backends.cuda.matmul.allow_tf32 == before
    assert [line.split(" chunks")[0] for line in said[:3]] == [f"compared {n} of 12" for n in (1, 6, 11)]
