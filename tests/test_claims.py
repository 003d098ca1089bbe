"""The sweep over claims: every arm trains on a micro world, results are kept, shared out and compared in pairs."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from lingbot_nb.model.dit import DiT
from lingbot_nb.presets import MICRO
from lingbot_nb.report import claim_view, claims, metrics
from lingbot_nb.report.bench_training import random_clips

PRESET = replace(MICRO, shape=MICRO.shape.with_frames(5))
SIZES = claims.Sizes(
    batch=2, pair_batches=1, solver_steps=4, regression=2, consistency=2, forcing=2, dmd=3, dmd_batch=2, critic_first=1
)
HORIZONS = ("0.25", "1")
"""Seconds that five latent frames last."""


class Decoder:
    """Latents to pixel frames of the right number and size."""

    def decode(self, latents):
        count = 4 * (latents.shape[2] - 1) + 1
        spread = latents[:, :3].repeat_interleave(8, 3).repeat_interleave(8, 4)
        return spread.repeat_interleave(4, 2)[:, :, :count]


def pixels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.fixture(scope="module")
def place():
    torch.manual_seed(0)
    causal, teacher = (DiT(PRESET.model).requires_grad_(False) for _ in range(2))
    for dit in (causal, teacher):
        torch.nn.init.normal_(dit.head.head.weight, std=0.05)
    clips = random_clips(PRESET, 3, torch.device("cpu"))
    lab = claims.Lab(PRESET, causal, teacher, clips, SIZES)
    return lab, claims.Exam(clips, pixels(3, 17, 32, 48, 3), Decoder(), counts=(4, 1), walks=2, joins=2)


@pytest.fixture(scope="module")
def swept(place, tmp_path_factory):
    folder = tmp_path_factory.mktemp("claims")
    return folder, list(claims.Sweep(*place, folder, seeds=1).run())


def test_every_arm_leaves_a_result(place, swept):
    folder, lines = swept
    assert len(lines) == len(claims.ARMS)
    found = claims.results(folder)
    assert set(found) == {arm.name for arm in claims.ARMS}
    for by_seed in found.values():
        marks = by_seed[0]
        assert {"poses, 4", "poses, 1", "keys, 4", "long walk"} <= set(marks)
        assert all(len(values) == 3 and np.isfinite(values).all() for values in marks["poses, 4"].values())
    assert "window 4, sink 1, long walk" in found[claims.REFERENCE][0]
    kept = {path.stem for path in (folder / "students").glob("*.safetensors")}
    assert kept == {claims.result_file(folder, arm, 0).stem for arm in claims.ARMS}


def test_arms_differ_only_where_they_should(place, swept):
    folder, _ = swept
    weights = {path.stem: claims.checkpoint.card_path(path) for path in (folder / "starts").glob("*.safetensors")}
    assert sorted(weights) == [
        *("bidirectional_ode-1-0", "causal_ode-1-0", "consistency-1-0", "forced-1-0", "forced-3-0")
    ]
    digests = [json.loads(card.read_text())["sha256"] for card in weights.values()]
    assert len(set(digests)) == len(digests)


def test_what_is_there_is_not_made_again(place, swept):
    folder, _ = swept
    claims.result_file(folder, claims.ARMS[0], 0).unlink()
    (line,) = claims.Sweep(*place, folder, seeds=1).run()
    assert line.startswith(claims.ARMS[0].name)
    assert not list(claims.Sweep(*place, folder, seeds=1).run())


def test_a_held_result_is_left_to_its_holder(place, tmp_path):
    arm = claims.ARMS[0]
    with claims._held(claims.result_file(tmp_path, arm, 0).with_suffix(".lock")) as mine:
        assert mine
        assert not list(claims.Sweep(*place, tmp_path, seeds=1, arms=(arm,)).run())
    assert len(list(claims.Sweep(*place, tmp_path, seeds=1, arms=(arm,)).run())) == 1


def test_the_summary_pairs_walks_with_the_reference(swept):
    found = claims.summary(swept[0])
    own = found[claims.REFERENCE]["poses, 4"]["1"]
    assert own["to_reference"] == [0, 0, 0]
    other, marks = found["causal ODE"]["poses, 4"]["1"], claims.results(swept[0])
    pairs = [np.array(marks[name][0]["poses, 4"]["1"]) for name in ("causal ODE", claims.REFERENCE)]
    assert other["to_reference"][0] == pytest.approx((pairs[0] - pairs[1]).mean(), abs=2e-3)
    shown = claims.table(found, ["causal ODE", claims.REFERENCE]).splitlines()
    assert len(shown) == 4 and shown[2].startswith("| causal ODE | 1 |")


def test_the_views_show_every_arm_and_every_window(swept):
    found = claims.summary(swept[0])
    pairs = claim_view.paired(found, horizons=HORIZONS).splitlines()[2:]
    assert [row.split(" | ")[0].strip("| ") for row in pairs] == [arm.name for arm in claims.ARMS]
    seen = claim_view.windows(found, HORIZONS).splitlines()[2:]
    assert len(seen) == 1 + len(claims.WINDOWS)
    other = found[claims.REFERENCE]["window 4, sink 1"]["1"]["db"]
    assert seen[1].startswith("| window 4, sink 1 |") and claims.told(other) in seen[1]
    drawn = claim_view.figure(found, "1")
    told = [text.get_text() for ax in drawn.axes for text in ax.get_legend().get_texts()]
    assert set(claim_view.LENGTHS) <= set(told) and "causal ODE, then DMD" in told
    plt.close(drawn)


def test_seeds_stand_beside_each_other_where_there_are_several():
    told = {"poses, 4": {at: {"by_seed": [20.0, 20.44]} for at in ("1", "4")}}
    found = {"causal ODE": {"seeds": [0, 2], **told}, "causal model": {"seeds": [0], **told}}
    assert claim_view.by_seed(found).splitlines()[2:] == ["| causal ODE | 20.0, 20.4 | 20.0, 20.4 |"]


def test_an_equal_start_with_other_pairs_ends_elsewhere(place):
    lab, _ = place
    draws = torch.Generator().manual_seed(0)
    schedule = claims._schedule(lab)
    whole, own = (
        claims.trajectories.pairs_in_memory(
            lab.clips, make, batch=lab.sizes.batch, batches=lab.sizes.pair_batches, generator=draws
        )
        for make in (
            claims.train.bidirectional_teacher(lab.teacher, schedule),
            claims.train.causal_teacher(lab.causal, lab.settings, schedule),
        )
    )
    pair = next(own)
    assert pair.states.shape == (2, 5, *pair.batch.latents.shape[1:])
    # The causal teacher never moves the start image; the bidirectional one denoises it like all others.
    assert torch.equal(pair.states[:, -1, :, 0], pair.batch.latents[:, :, 0])
    assert not torch.equal((pair := next(whole)).states[:, -1, :, 0], pair.batch.latents[:, :, 0])


def test_standing_keeps_turns_and_drops_steps_and_keys():
    clips = random_clips(PRESET, 3, torch.device("cpu"))
    rows = torch.arange(3)
    clips.keys = torch.rand(clips.keys.shape)
    clips.steps[..., :3, 3] = 0.1
    still = clips.steps.clone()
    still[..., :3, 3] = 0
    for with_poses in (True, False):
        batch = clips.batch(rows, rows * 0, 5, torch.full((3,), with_poses))
        wanted = clips.control(still, clips.keys * 0, torch.ones(3).bool())
        assert torch.equal(claims.standing(batch).control, wanted) and not torch.equal(batch.control, wanted)


def test_numbers_on_the_device_are_those_of_the_metrics():
    real, made = pixels(2, 4, 32, 48, 3), pixels(2, 4, 32, 48, 3, seed=1)
    pairs = (
        (claims.psnr(real, made), metrics.psnr(real.numpy(), made.numpy())),
        (claims.detail(made), metrics.laplacian_variance(made.numpy())),
        (claims.saturation(made), metrics.saturation(made.numpy())),
    )
    for mine, known in pairs:
        assert mine.numpy() == pytest.approx(known.mean(1), rel=1e-4)


def test_clips_of_one_split_alone_are_refused(tmp_path):
    from lingbot_nb.parts import SHIPPED_CLIPS

    with pytest.raises(ValueError, match="collect both splits"):
        claims.prepared(SHIPPED_CLIPS, tmp_path, train_clips=1, held_out=1)
