"""Tokenizer training: losses against independent arithmetic, both stages, stopping and going on."""

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from lingbot_nb.distill import optim, parallel, tokenizer
from lingbot_nb.distill.tokenizer import TokenizerSettings, group_batches, random_groups, train_tokenizer
from lingbot_nb.model.vae import MICRO_VAE, TinyVAE, from_uint8

SETTINGS = TokenizerSettings(batch=2, lr=1e-2, warmup_steps=5, ema=0.8, discriminator_widths=(4, 8, 8))


def drifting_clips(clips: int = 4, length: int = 17, height: int = 16, width: int = 24) -> torch.Tensor:
    """uint8 [clips, length, H, W, 3]: a coarse picture with fine grain, sliding one pixel a pixel frame."""
    rng = np.random.default_rng(0)
    picture = 255 * np.kron(rng.uniform(0, 1, (height // 8, 12, 3)), np.ones((8, 8, 1)))
    picture = np.clip(picture + rng.normal(0, 6, picture.shape), 0, 255).astype(np.uint8)
    starts = rng.integers(0, 96, clips)
    return torch.from_numpy(
        np.stack([[np.roll(picture, -(s + n), axis=1)[:, :width] for n in range(length)] for s in starts])
    )


def train(vae, *, settings=SETTINGS, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    batches = group_batches(drifting_clips(), settings.batch, generator)
    return train_tokenizer(vae, batches, settings=settings, generator=generator, **kwargs)


def micro_vae() -> TinyVAE:
    torch.manual_seed(0)
    return TinyVAE(MICRO_VAE)


def videos(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.rand(2, 3, 5, 16, 24, generator=generator) * 2 - 1 for _ in range(2))


# --- data


def test_windows_are_pieces_of_clips():
    # Each pixel tells its clip and pixel frame.
    clips, length = 5, 12
    frames = torch.stack([torch.arange(clips)[:, None].expand(-1, length), torch.arange(length).expand(clips, -1)], -1)
    frames = torch.cat([frames, frames[..., :1]], -1)[:, :, None, None].expand(-1, -1, 2, 2, -1).byte()
    windows = random_groups(frames, 200, torch.Generator().manual_seed(0))
    assert windows.shape == (200, 9, 2, 2, 3)
    assert (windows[..., 0] == windows[:, :1, :1, :1, 0]).all()
    assert (windows[:, :, 0, 0, 1].int().diff(dim=1) == 1).all()
    drawn = {(int(w[0, 0, 0, 0]), int(w[0, 0, 0, 1])) for w in windows}
    assert drawn == set(itertools.product(range(clips), range(length - 9 + 1)))


def test_windows_repeat_with_the_generator():
    clips = drifting_clips()
    first, again = (group_batches(clips, 3, torch.Generator().manual_seed(7), 5) for _ in range(2))
    for _ in range(3):
        assert torch.equal(next(first), next(again))


def test_short_clips_are_refused():
    with pytest.raises(ValueError, match="8 pixel frames do not hold a window of 9"):
        random_groups(drifting_clips(length=8), 1, torch.Generator())


# --- losses


def test_edge_loss_by_hand():
    fake, real = videos()
    error = (fake - real).numpy()
    expected = np.abs(np.diff(error, axis=4)).mean() + np.abs(np.diff(error, axis=3)).mean()
    assert tokenizer.edge_loss(fake, real).item() == pytest.approx(expected, rel=1e-5)
    assert tokenizer.edge_loss(real + 0.3, real).item() == pytest.approx(0, abs=1e-6)


def test_a_decibel_has_its_price_beside_the_other_losses():
    draw = torch.Generator().manual_seed(0)
    real, off = (torch.rand(2, 3, 5, 8, 8, generator=draw) for _ in range(2))
    fake = (real + 0.1 * off).requires_grad_()
    plain, priced = (tokenizer.pixel_loss(fake, real, TokenizerSettings(decibel=price)) for price in (0.0, 0.05))
    assert (plain - priced).item() == pytest.approx(0.05 * tokenizer.psnr(fake, real).mean().item(), rel=1e-5)
    # An error half as large pulls twice as hard, which the halving in front of it halves again.
    only = TokenizerSettings(edge=0, coarse=0, decibel=1e3)
    (pull,) = torch.autograd.grad(tokenizer.pixel_loss(fake, real, only), fake)
    (near,) = torch.autograd.grad(tokenizer.pixel_loss((fake + real) / 2, real, only), fake)
    assert (near.norm() / pull.norm()).item() == pytest.approx(1, rel=0.01)


def test_coarse_loss_by_hand():
    fake, real = videos()
    error = (fake - real).numpy()
    half = error.reshape(2, 3, 5, 8, 2, 12, 2).mean(axis=(4, 6))
    quarter = error.reshape(2, 3, 5, 4, 4, 6, 4).mean(axis=(4, 6))
    assert tokenizer.coarse_loss(fake, real).item() == pytest.approx(
        np.abs(half).mean() + np.abs(quarter).mean(), rel=1e-5
    )


def test_kl_loss_is_the_divergence():
    mean, log_variance = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(tokenizer.kl_loss(mean, log_variance), expected)


def test_discriminator_loss_compares_pairs():
    logits = torch.randn(3, 1, 4, 4)
    assert tokenizer.discriminator_loss(logits, logits).item() == pytest.approx(math.log(2), rel=1e-5)
    assert tokenizer.discriminator_loss(logits + 50, logits).item() < 1e-6
    assert tokenizer.discriminator_loss(logits, logits + 50).item() == pytest.approx(50, rel=1e-5)


def test_smoothness_loss_is_the_squared_slope_of_a_linear_judge():
    slopes = torch.tensor([1.0, -2.0, 0.5])
    linear = torch.nn.Conv2d(3, 1, 1, bias=False)
    linear.weight.data = slopes.view(1, 3, 1, 1)
    seen = torch.randn(4, 3, 64, 64)
    noise = 0.1 * torch.randn(seen.shape, generator=torch.Generator().manual_seed(0))
    loss = tokenizer.smoothness_loss(lambda x: (linear(x), []), seen, linear(seen), noise)
    assert loss.item() == pytest.approx(float(slopes.square().sum()), rel=0.05)


def test_match_loss_is_relative():
    features = [torch.rand(2, 4, 3, 3) + 0.1, torch.rand(2, 8, 2, 2) + 0.1]
    assert tokenizer.match_loss(features, features).item() == 0
    doubled = [2 * feature for feature in features]
    assert tokenizer.match_loss(doubled, features).item() == pytest.approx(1, rel=1e-5)


# --- measures


def test_psnr_by_hand():
    fake, real = videos()
    error = ((fake - real).numpy() / 2) ** 2
    expected = -10 * np.log10(error.mean(axis=(1, 3, 4)))
    np.testing.assert_allclose(tokenizer.psnr(fake, real).numpy(), expected, rtol=1e-5)
    assert (tokenizer.psnr(real, real) == 100).all()


def test_laplacian_variance_by_hand():
    video, _ = videos()
    grey = (video.double().mean(dim=1).numpy() + 1) / 2
    kernel = np.array([[0, 1, 0], [1, -4, 1], [0, 1, 0]])
    windows = np.lib.stride_tricks.sliding_window_view(grey, (3, 3), axis=(2, 3))
    expected = (windows * kernel).sum(axis=(-1, -2)).var(axis=(2, 3), ddof=1)
    np.testing.assert_allclose(tokenizer.laplacian_variance(video).numpy(), expected, rtol=1e-4)


def test_sharpness_falls_with_blur():
    _, real = videos()
    blurred = tokenizer.video_shade(real)
    assert tokenizer.sharpness(real, real).item() == pytest.approx(1)
    assert tokenizer.sharpness(blurred, real) < 0.05
    assert tokenizer.sharpness(1.5 * real, real).item() == pytest.approx(2.25, rel=1e-4)


# --- discriminator


def test_low_pass_by_hand():
    pictures = torch.rand(2, 3, 9, 11)
    taps = np.array([1, 4, 6, 4, 1]) / 16
    padded = np.pad(pictures.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(2, 3))
    expected = (windows * np.outer(taps, taps)).sum(axis=(-1, -2))
    np.testing.assert_allclose(tokenizer.low_pass(pictures).numpy(), expected, atol=1e-6)


def test_detail_holds_neighbouring_frames_and_their_shade():
    video, _ = videos()
    shade = tokenizer.video_shade(video)
    seen = tokenizer.detail(video, shade).unflatten(0, (2, 4))
    assert seen.shape == (2, 4, 9, 16, 24)
    fine = 4 * (video - shade)
    assert torch.equal(seen[1, 2, :3], fine[1, :, 3])
    assert torch.equal(seen[1, 2, 3:6], fine[1, :, 2])
    assert torch.equal(seen[1, 2, 6:], shade[1, :, 3])


def test_patches_see_twenty_pixels():
    judge = tokenizer.PatchDiscriminator((4, 4, 4))
    seen = torch.randn(1, 9, 48, 48, requires_grad=True)
    logits, features = judge(seen)
    assert logits.shape == (1, 1, 12, 12)
    assert len(features) == 4
    logits[0, 0, 6, 6].backward()
    rows = seen.grad.abs().sum(dim=(0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 20


# --- optimiser


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_orthogonalised_keeps_directions_and_evens_their_sizes(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    evened = optim.orthogonalised(matrices, steps=8)
    along = torch.diagonal(u.mT @ evened @ vh.mT, dim1=1, dim2=2)
    assert along.min() > 0.6 and along.max() < 1.3
    torch.testing.assert_close(optim.orthogonalised(1000 * matrices, steps=8), evened, rtol=1e-3, atol=1e-3)


def test_muon_treats_kernels_of_one_shape_as_it_would_each():
    torch.manual_seed(0)
    start = [torch.randn(6, 4, 3, 3) for _ in range(2)]
    grads = [torch.randn(6, 4, 3, 3) for _ in range(2)]
    together = [torch.nn.Parameter(kernel.clone()) for kernel in start]
    apart = [torch.nn.Parameter(kernel.clone()) for kernel in start]
    optimizers = [optim.Muon(together, lr=0.1)] + [optim.Muon([kernel], lr=0.1) for kernel in apart]
    for _ in range(3):
        for kernel, grad in zip(together + apart, grads + grads, strict=True):
            kernel.grad = grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for kernel, alone, before in zip(together, apart, start, strict=True):
        torch.testing.assert_close(kernel, alone)
        # 0.2 sqrt(36) lr times an orthogonal matrix: every step has Adam's root mean square, 0.2 lr.
        step = (kernel - before) / 3
        assert step.square().mean().sqrt().item() == pytest.approx(0.2 * 0.1 * 1.0, rel=0.35)


def test_every_weight_has_one_optimizer():
    vae = micro_vae()
    owned = [
        parameter
        for optimizer in tokenizer.make_optimizers(vae, SETTINGS)
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    assert len(owned) == len({id(parameter) for parameter in owned}) == len(list(vae.parameters()))


# --- schedule and training


def test_learning_rate_warms_up_stays_and_falls():
    s = TokenizerSettings(lr=1.0, warmup_steps=10, decay_from=0.5, last_lr=0.1)
    assert s.learning_rate(0, 0.0) == pytest.approx(0.1)
    assert s.learning_rate(99, 0.3) == s.learning_rate(99, 0.5) == pytest.approx(1)
    assert s.learning_rate(99, 0.75) == pytest.approx(0.55)
    assert s.learning_rate(99, 1.0) == pytest.approx(0.1)


def test_texture_push_waits_and_ramps():
    s = TokenizerSettings(texture_from=0.5, texture_ramp=0.1, texture=0.4)
    assert s.texture_push(0.55) == s.texture_push(0.6) == 0
    assert s.texture_push(0.65) == pytest.approx(0.2)
    assert s.texture_push(0.9) == pytest.approx(0.4)


def test_both_stages_learn_and_leave_a_calibrated_average():
    vae = micro_vae()
    held_out = drifting_clips(clips=2, length=9)
    before = tokenizer.evaluate_tokenizer(vae, held_out)
    reports = list(train(vae, steps=50, held_out=held_out, report_every=10))
    assert [report["step"] for report in reports] == [10, 20, 30, 40, 50, 50]
    assert reports[4]["pixel"] < 0.9 * reports[0]["pixel"]
    assert reports[-1]["psnr"] > before["psnr"] + 1
    assert "told" not in reports[2] and "told" in reports[3] and reports[4]["fooled"] > 0
    assert json.loads(json.dumps(reports)) == reports
    assert tokenizer.evaluate_tokenizer(vae, held_out)["psnr"] == pytest.approx(reports[-1]["psnr"], abs=0.01)
    latents = vae.encode(from_uint8(random_groups(drifting_clips(), 32, torch.Generator().manual_seed(5))))
    assert 0.7 < latents.std() < 1.3 and latents.mean().abs() < 0.3
    assert all(parameter.requires_grad for parameter in vae.parameters())


def test_training_on_leaves_latents_where_they_were_if_asked():
    """A few windows' statistics in place of thousands' would move the latents under the networks that live in them."""
    kept, moved = micro_vae(), micro_vae()
    before = kept.latent_mean.clone(), kept.latent_std.clone()
    list(train(kept, steps=2, calibrate=False))
    list(train(moved, steps=2))
    assert torch.equal(kept.latent_mean, before[0]) and torch.equal(kept.latent_std, before[1])
    assert not torch.equal(moved.latent_mean, before[0])


def test_texture_stage_moves_the_decoder_only():
    vae = micro_vae()
    watched = {}
    for report in train(vae, steps=20, report_every=1):
        watched[report["step"]] = {name: value.clone() for name, value in vae.state_dict().items()}
    early, late = watched[13], watched[19]
    assert all(torch.equal(early[name], late[name]) for name in early if name.startswith("encoder"))
    assert not torch.equal(early["decoder.0.weight"], late["decoder.0.weight"])
    assert not torch.equal(watched[5]["encoder.1.weight"], watched[6]["encoder.1.weight"])


def test_a_decoder_alone_learns_for_latents_that_stay():
    vae = micro_vae()
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    settings = TokenizerSettings(batch=2, warmup_steps=2, decoder_only=True)
    first, *_, last, _ = train(vae, settings=settings, steps=20, report_every=1)
    after = vae.state_dict()
    rests = [name for name in before if name.startswith(("encoder", "latent_"))]
    assert all(torch.equal(before[name], after[name]) for name in rests) and len(rests) > 10
    assert not torch.equal(before["decoder.0.weight"], after["decoder.0.weight"])
    assert last["pixel"] < first["pixel"] and "told" in last


def test_a_run_can_do_without_texture():
    settings = TokenizerSettings(batch=2, warmup_steps=2, texture=0.0)
    assert not any("told" in report for report in train(micro_vae(), settings=settings, steps=6, report_every=1))


@pytest.mark.parametrize("stopped_at", [4, 10])  # before and after texture starts at 0.6 of 12
def test_a_stopped_run_goes_on_as_if_nothing_happened(tmp_path, stopped_at):
    straight = micro_vae()
    list(train(straight, steps=12))
    path = tmp_path / "run" / "tokenizer.pt"
    stopped = micro_vae()
    kept = dict(steps=12, checkpoint=path, checkpoint_every=stopped_at, report_every=1)
    for report in train(stopped, **kept):
        if report["step"] == stopped_at + 1:
            break
    assert [file.name for file in path.parent.iterdir()] == ["tokenizer.pt"]
    resumed = micro_vae()
    steps = [report["step"] for report in train(resumed, seed=99, **kept)]
    assert steps[0] == stopped_at + 1
    for name, value in straight.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_of_several_ranks_the_first_keeps_and_the_others_go_on_from_it_with_draws_of_their_own(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.pt"
    monkeypatch.setattr(parallel, "place", lambda: (1, 2))
    list(train(micro_vae(), steps=2, checkpoint=path))
    assert not path.exists(), "the second rank writes nothing"
    monkeypatch.setattr(parallel, "place", lambda: (0, 2))
    first = torch.Generator().manual_seed(5)
    batches = group_batches(drifting_clips(), SETTINGS.batch, first)
    list(train_tokenizer(micro_vae(), batches, settings=SETTINGS, generator=first, steps=2, checkpoint=path))
    weights, drawn = {}, {}
    for rank in (0, 1):
        monkeypatch.setattr(parallel, "place", lambda rank=rank: (rank, 2))
        vae, own = micro_vae(), torch.Generator().manual_seed(5 + rank)
        options = dict(settings=SETTINGS, generator=own, steps=2, checkpoint=path, calibrate=False)
        made = train_tokenizer(vae, iter(()), **options)
        assert next(made)["step"] == 2
        weights[rank], drawn[rank] = vae.state_dict(), own.get_state()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    fresh = [torch.Generator().manual_seed(seed).get_state() for seed in (5, 6)]
    assert not any(torch.equal(drawn[1], other) for other in (drawn[0], *fresh))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    path = tmp_path / "tokenizer.pt"
    list(train(micro_vae(), steps=2, checkpoint=path))
    other = replace(SETTINGS, kl=0.5)
    with pytest.raises(ValueError, match="kl 0.0001 -> 0.5"):
        next(train(micro_vae(), settings=other, steps=4, checkpoint=path))


def test_a_finished_run_only_reports_again(tmp_path):
    path = tmp_path / "tokenizer.pt"
    list(train(micro_vae(), steps=3, checkpoint=path))
    (report,) = train(micro_vae(), steps=3, checkpoint=path)
    assert report["step"] == 3 and report["fraction"] == 1


def test_a_budget_of_seconds_ends_at_the_last_learning_rate():
    last = list(train(micro_vae(), seconds=0.5, report_every=1))[-1]
    assert last["fraction"] == 1
    assert last["seconds"] >= 0.5
    assert last["lr"] <= SETTINGS.lr * SETTINGS.last_lr * 1.001


def test_the_length_is_given_once():
    for lengths in ({}, {"steps": 1, "seconds": 1.0}):
        with pytest.raises(ValueError, match="exactly one"):
            next(train(micro_vae(), **lengths))


def test_a_blown_up_run_says_so():
    vae = micro_vae()
    with torch.no_grad():
        next(vae.decoder.parameters()).fill_(float("nan"))
    with pytest.raises(RuntimeError, match="blew up at step 1.*learning rate below"):
        list(train(vae, steps=3, report_every=1))
