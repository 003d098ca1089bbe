"""The whole recipe in miniature: every stage for a step or two, on real clips, with a small network."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from lingbot_nb import presets
from lingbot_nb.distill import decoder, recipe, train
from lingbot_nb.distill.recipe import Bench, Budget, Recipe
from lingbot_nb.model import checkpoint
from lingbot_nb.model.vae import MICRO_VAE, TinyVAE, VAESize
from lingbot_nb.runs import PROJECT
from lingbot_nb.world.clips import ClipStore, write_manifest, write_shard

SMALL = replace(presets.TINY, model=presets.MICRO.model)
BLINK = Budget(1e-3, 1, 1e-3)
BUDGETS = ("tokenizer", "teacher", "causal", "ode", "student", "still")


@pytest.fixture
def bench(tmp_path):
    """One training clip and one held out, a tokenizer of micro widths, stages that end after their first step."""
    clips = ClipStore(PROJECT / "data" / "clips")
    data = tmp_path / "clips"
    data.mkdir()
    lines = []
    for split, clip in (("train", replace(clips[0], seed=7)), ("held-out", clips[1])):
        digest = write_shard(data / f"{split}.safetensors", [clip])
        lines.append({"shard": f"{split}.safetensors", "split": split, "sha256": digest, "seeds": [clip.seed]})
    write_manifest(data, lines)
    budgets = {name: BLINK for name in BUDGETS}
    options = dict(preset=SMALL, vae_size=MICRO_VAE, compile=False, pair_batches=1, solver_steps=4)
    return Bench(Recipe(**options, **budgets), data, tmp_path / "weights", seed=0)


def test_a_rank_that_got_fewer_clips_than_another_counts_them_all(bench, monkeypatch):
    """Three clips on two ranks are two and one."""
    clip = ClipStore(PROJECT / "data" / "clips")[0]
    some = [replace(clip, seed=seed, id=f"walk-{seed}") for seed in range(3)]
    digest = write_shard(bench.data / "three.safetensors", some)
    write_manifest(bench.data, [{"shard": "three.safetensors", "split": "train", "sha256": digest, "seeds": [0, 1, 2]}])
    for rank, mine in ((0, 2), (1, 1)):
        monkeypatch.setattr(recipe.parallel, "start", lambda rank=rank: (rank, 2, torch.device("cpu")))
        monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
        there = Bench(bench.recipe, bench.data, bench.out, seed=0)
        assert (len(there.train), there.train_clips) == (mine, 3)


def test_every_stage_leaves_weights_with_a_card_and_a_second_start_does_nothing(bench):
    files = list(recipe.run(bench))
    assert files == [file for file, _ in recipe.STAGES]
    for file in files[1:]:
        card = checkpoint.load_into(bench.out / file, recipe.DiT(SMALL.model))
        assert card["steps"] >= 1 and card["train_clips"] == 1
    before = {file: (bench.out / file).stat().st_mtime_ns for file in files}
    assert list(recipe.run(bench)) == files
    assert before == {file: (bench.out / file).stat().st_mtime_ns for file in files}
    stages = [json.loads(line)["stage"] for line in (bench.out / "log.jsonl").read_text().splitlines()]
    assert stages[0] == "data" and stages.count("done") == len(files)


class Killed(Exception):
    pass


def killed_at(bench, monkeypatch, stage: str, step: int) -> list[dict]:
    """Runs the recipe until `stage` tells of `step`; the rows of that stage so far."""
    rows, say = [], bench.say

    def told(name, **row):
        say(name, **row)
        if name == stage and "step" in row:
            rows.append(row)
            if row["step"] >= step:
                raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(bench, "say", told)
        with pytest.raises(Killed):
            list(recipe.run(bench))
    return rows


def rows_of(bench, stage: str) -> list[dict]:
    lines = [json.loads(line) for line in (bench.out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["stage"] == stage and "step" in line]


def test_a_tokenizer_that_was_killed_goes_on_from_its_checkpoint(bench, monkeypatch):
    monkeypatch.setattr(recipe, "REPORT_EVERY", 1)
    monkeypatch.setattr(recipe, "KEEP_EVERY", 2)
    bench.recipe = replace(bench.recipe, tokenizer=Budget(3600, 1, 1e-3))
    killed_at(bench, monkeypatch, "tokenizer", 5)
    assert not bench.has("vae.safetensors")
    bench.recipe = replace(bench.recipe, tokenizer=Budget(0.1, 1, 1e-3))
    assert list(recipe.run(bench, "vae.safetensors")) == ["vae.safetensors"]
    assert checkpoint.read_card(bench.out / "vae.safetensors")["steps"] >= 4
    steps = [row["step"] for row in rows_of(bench, "tokenizer")]
    assert steps[:5] == [1, 2, 3, 4, 5] and min(steps[5:]) >= 4, "the fourth step was kept, the fifth made again"
    assert not bench.unfinished.exists()


@pytest.mark.parametrize("stage, file", [("ode", "ode"), ("student", "matched"), ("steady", "student")])
def test_a_stage_of_counted_steps_that_was_killed_goes_on_from_its_checkpoint(bench, monkeypatch, stage, file):
    budget = {"still" if stage == "steady" else stage: Budget(3600, 2, 1e-3, steps=8)}
    bench.recipe = replace(bench.recipe, still_frames=8, **budget)
    monkeypatch.setattr(recipe, "LOG_EVERY", 1)
    killed_at(bench, monkeypatch, stage, 5)
    *_, last = recipe.run(bench, f"{file}.safetensors")
    assert last == f"{file}.safetensors" and checkpoint.read_card(bench.out / last)["steps"] == 8
    again = [row["step"] for row in rows_of(bench, stage)][5:]
    assert again[0] in (5, 6) and again[-1] == 8, (
        "on from the fourth step, or from the fifth where the kill was noticed"
    )
    assert not bench.unfinished.exists()


def test_a_teacher_that_was_killed_goes_on_from_its_checkpoint(bench, monkeypatch):
    """A stage that goes by time counts the seconds before."""
    monkeypatch.setattr(recipe, "KEEP_EVERY", 5)
    monkeypatch.setattr(recipe, "LOG_EVERY", 1)
    bench.recipe = replace(bench.recipe, teacher=Budget(3600, 1, 1e-3))
    before = killed_at(bench, monkeypatch, "teacher", 10)[-1]
    bench.recipe = replace(bench.recipe, teacher=Budget(before["seconds"] - 1e-4, 1, 1e-3))
    *_, last = recipe.run(bench, "teacher.safetensors")
    assert checkpoint.read_card(bench.out / last)["steps"] == 10 and len(rows_of(bench, "teacher")) == 2


def test_what_begins_otherwise_does_not_go_on_from_anothers_checkpoint(bench, monkeypatch):
    """Of another seed: a tokenizer begins anew, a teacher, whose latents are there already, is refused."""
    monkeypatch.setattr(recipe, "REPORT_EVERY", 1)
    monkeypatch.setattr(recipe, "KEEP_EVERY", 1)
    monkeypatch.setattr(recipe, "LOG_EVERY", 1)
    bench.recipe = replace(bench.recipe, tokenizer=Budget(3600, 1, 1e-3), teacher=Budget(3600, 1, 1e-3))
    killed_at(bench, monkeypatch, "tokenizer", 3)
    bench.seed, bench.recipe = 1, replace(bench.recipe, tokenizer=BLINK)
    list(recipe.run(bench, "vae.safetensors"))
    assert [row["step"] for row in rows_of(bench, "tokenizer")][:4] == [1, 2, 3, 1]
    killed_at(bench, monkeypatch, "teacher", 1)
    bench.seed = 2
    with pytest.raises(ValueError, match="was made with seed 1 instead of 2"):
        list(recipe.run(bench))


def test_the_recipe_goes_on_from_the_stage_that_git_keeps():
    """`papermill_runs/from-nothing` is the out folder of a command that has come through its first stage: its tokenizer
    is the one that today's recipe would make."""
    folder = PROJECT / "papermill_runs" / "from-nothing"
    card, wanted = checkpoint.read_card(folder / "vae.safetensors"), Recipe()
    assert TinyVAE.from_file(folder / "vae.safetensors").size == wanted.vae_size
    made = {name: card[name] for name in ("seconds", "batch", "lr", "kl", "decibel", "texture", "map")}
    budget = {name: getattr(wanted.tokenizer, name) for name in ("seconds", "batch", "lr")}
    assert made == budget | {name: getattr(wanted, name) for name in ("kl", "decibel", "texture", "map")}
    assert "made_from" not in card and "--until vae.safetensors" in card["command"]


def test_training_stops_at_the_stage_that_was_asked_for(bench):
    assert list(recipe.run(bench, "teacher.safetensors")) == ["vae.safetensors", "teacher.safetensors"]
    assert not bench.has("causal.safetensors")


def test_scaling_a_recipe_scales_every_stage():
    half = recipe.scaled(Recipe(), 0.5)
    for name in BUDGETS:
        assert getattr(half, name).seconds == 0.5 * getattr(Recipe(), name).seconds
    assert half.preset == Recipe().preset


def test_the_student_stops_at_its_steps_however_much_time_is_left(bench):
    bench.recipe = replace(bench.recipe, student=Budget(3600, 1, 1e-3, steps=12))
    *_, last = recipe.run(bench, "matched.safetensors")
    assert checkpoint.read_card(bench.out / last)["steps"] == 12


def test_the_student_that_stands_comes_from_the_one_that_walks(bench):
    bench.recipe = replace(bench.recipe, still=Budget(3600, 2, 1e-3, steps=3), still_frames=8)
    *_, last = recipe.run(bench)
    card = checkpoint.read_card(bench.out / last)
    matched = checkpoint.read_card(bench.out / "matched.safetensors")
    assert card["steps"] == 3 and card["kind"] == "student" and card["made_from"]["sha256"] == matched["sha256"]
    rows = [json.loads(line) for line in (bench.out / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["stage"] == "steady"]
    assert rows[0]["halts"] >= 1 and [row["step"] for row in rows[1:]] == [1, 2, 3]
    assert all(row["student_loss"] > 0 for row in rows[1:])


def test_evaluation_measures_the_weights_at_hand_and_writes_it_into_their_cards(bench):
    vae, student = TinyVAE(MICRO_VAE), recipe.DiT(SMALL.model)
    bench.keep("vae.safetensors", vae, BLINK, kind="tokenizer", size=asdict(vae.size))
    bench.keep("student.safetensors", student, BLINK, kind="student")
    recipe.evaluate(bench)
    card = checkpoint.load_into(bench.out / "student.safetensors", student)
    assert [*card["held_out"]] == [f"{n} steps, {mode}" for mode in ("poses", "keys") for n in (4, 2, 1)]
    row = card["held_out"]["4 steps, poses"]
    assert row["clips"] == 1 and 0 < row["psnr"]["1"][0] < 60 and row["sharpness"] >= 0
    assert [*checkpoint.read_card(bench.out / "vae.safetensors")["held_out"]] == ["reconstruction, poses"]


def redone(bench, monkeypatch, *options: str) -> tuple[TinyVAE, TinyVAE, dict]:
    """A tokenizer, what a blink of `distill.decoder` makes of it from the command line, and that one's card."""
    torch.manual_seed(1)
    old, out = TinyVAE(MICRO_VAE), bench.out / "redone"
    old.latent_std.fill_(0.5)
    bench.keep("vae.safetensors", old, BLINK, kind="tokenizer", size=asdict(old.size))
    told = ["decoder", "--data", str(bench.out.parent / "clips"), "--vae", str(bench.out / "vae.safetensors")]
    told += ["--out", str(out), *options, "--seconds", "0.001", "--batch", "1", "--no-compile"]
    monkeypatch.setattr("sys.argv", told)
    decoder.main()
    kept, made = (TinyVAE.from_file(folder / "vae.safetensors") for folder in (bench.out, out))
    return kept, made, checkpoint.read_card(out / "vae.safetensors")


def test_a_new_decoder_leaves_the_latents_alone(bench, monkeypatch):
    """From the command line: another size of decoder, the same encoder, and weights that load with their own size."""
    kept, made, card = redone(bench, monkeypatch, "--widths", "24", "8", "4", "--depths", "1", "2", "1")
    assert made.size == VAESize((8, 12, 16), (1, 1, 1), (24, 8, 4), (1, 2, 1)) and not made.training
    for name, value in kept.encoder.state_dict().items():
        assert torch.equal(value, made.encoder.state_dict()[name]), name
    assert torch.equal(made.latent_std, kept.latent_std) and torch.equal(made.latent_mean, kept.latent_mean)
    before = checkpoint.read_card(bench.out / "vae.safetensors")
    assert card["steps"] >= 1 and card["decoder_of"] == before["sha256"] and "made_from" not in card


def test_a_decoder_can_go_on_as_it_is_with_another_push_of_its_discriminator(bench, monkeypatch):
    told = ("--go-on", "--texture", "0.25", "--lr", "1e-5")
    kept, made, card = redone(bench, monkeypatch, *told)
    moved = {n: (v - made.state_dict()[n]).abs().max().item() for n, v in kept.state_dict().items()}
    assert max(moved.values()) < 1e-2, "a blink of a step from where it was"
    assert all(v == 0 for n, v in moved.items() if not n.startswith("decoder"))
    assert any(v > 0 for n, v in moved.items() if n.startswith("decoder"))
    assert card["texture"] == 0.25
    assert card["decoder_of"] == card["made_from"]["sha256"] and card["made_from"]["kind"] == "tokenizer"


def test_a_whole_tokenizer_can_go_on_under_another_kl(bench, monkeypatch):
    told = ("--go-on", "--whole", "--kl", "5e-6", "--texture", "0", "--decibel", "0.05", "--lr", "1e-5")
    kept, made, card = redone(bench, monkeypatch, *told)
    assert any(not torch.equal(v, made.encoder.state_dict()[n]) for n, v in kept.encoder.state_dict().items())
    assert not torch.equal(made.latent_std, kept.latent_std), "calibrated for the latents as they are now"
    assert card["kl"] == 5e-6 and card["decibel"] == 0.05 and "decoder_of" not in card
    assert card["made_from"]["sha256"] == checkpoint.read_card(bench.out / "vae.safetensors")["sha256"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--go-on", "--depths", "1", "1", "1"], "--go-on keeps the decoder's own widths and depths"),
        (["--whole"], "add --go-on"),
        (["--go-on", "--kl", "5e-6"], "--kl 5e-06 weighs the latents of an encoder that learns: add --whole"),
    ],
)
def test_options_of_a_decoder_that_exclude_each_other_are_named(monkeypatch, capsys, options, words):
    monkeypatch.setattr("sys.argv", ["decoder", "--data", "clips", "--vae", "vae.safetensors", "--out", "on", *options])
    with pytest.raises(SystemExit):
        decoder.main()
    assert words in capsys.readouterr().err


def test_the_student_starts_from_pairs_of_the_causal_model(bench):
    bench.recipe = replace(bench.recipe, ode=Budget(3600, 2, 1e-3, steps=3), pair_batches=2)
    list(recipe.run(bench, "matched.safetensors"))
    card = checkpoint.read_card(bench.out / "ode.safetensors")
    assert card["steps"] == 3 and card["pairs"] == 4 and card["kind"] == "causal student"
    matched = checkpoint.read_card(bench.out / "matched.safetensors")
    assert matched["made_from"]["sha256"] == card["sha256"]


def test_matching_can_look_at_the_ends_of_longer_walks(bench):
    frames = bench.preset.shape.frames
    bench.recipe = replace(bench.recipe, walks=(2 * frames - 1,), student=Budget(3600, 1, 1e-3, steps=11))
    list(recipe.run(bench, "matched.safetensors"))
    rows = [json.loads(line) for line in (bench.out / "log.jsonl").read_text().splitlines()]
    assert [row["student_g"] > 0 for row in rows if row["stage"] == "student" and "student_g" in row] == [True]
    clips = train.OwnRollout(None, bench.preset.stream, (), None)
    make_clip, batches = recipe.to_be_judged(bench, clips, bench.generator())
    assert make_clip.walks == (2 * frames - 1,) and make_clip.frames == frames
    assert next(batches).latents.shape[2] == 2 * frames - 1
    bench.recipe = replace(bench.recipe, walks=())
    make_clip, batches = recipe.to_be_judged(bench, clips, bench.generator())
    assert make_clip is clips and next(batches).latents.shape[2] == frames


def test_walks_that_are_no_whole_chunks_are_refused_before_anything_is_trained():
    with pytest.raises(ValueError, match="the last 21 frames of a walk of 5 are not one frame and whole chunks"):
        Recipe(walks=(21, 5))


def test_a_teacher_can_go_on_from_weights(bench, tmp_path):
    """Its average has forgotten nothing after one blink of a step; from nothing it would be a fresh network."""
    torch.manual_seed(5)
    known = recipe.DiT(SMALL.model)
    checkpoint.save(tmp_path / "known.safetensors", known)
    bench.recipe = replace(bench.recipe, teacher_from=tmp_path / "known.safetensors")
    list(recipe.run(bench, "teacher.safetensors"))
    learnt = bench.dit("teacher.safetensors")
    near = [(a - b).abs().max().item() for a, b in zip(known.parameters(), learnt.parameters(), strict=True)]
    assert max(near) < 0.05
    fresh = [(a - b).abs().max().item() for a, b in zip(bench.dit().parameters(), learnt.parameters(), strict=True)]
    assert max(fresh) > 0.2


def test_another_map_is_walked_and_prompted(monkeypatch, bench):
    walked = []
    monkeypatch.setattr(recipe, "collect", lambda folder, **options: walked.append(options["settings"].map))
    recipe.collect_walks(bench.out, 4, "map01")
    assert walked == ["map01", "map01"]
    bench.recipe = replace(bench.recipe, map="map01")
    list(recipe.run(bench, "vae.safetensors"))
    assert torch.equal(bench.encoded(bench.held_out).context, bench.text.encode("a walk through map01"))
    assert checkpoint.read_card(bench.out / "vae.safetensors")["map"] == "map01"
