"""The rollout against a cache-free oracle, itself under other exits, and autograd."""

from dataclasses import replace

import pytest
import torch
from micro_world import SHAPE, SIZE, gradients, random_batch, random_dit, rng

from lingbot_nb.distill.flow import FewStep, few_steps
from lingbot_nb.distill.rollout import Conditions, denoise_chunk, draw_exit, rollout
from lingbot_nb.model.kv_cache import GradCache, KVCache
from lingbot_nb.presets import MICRO, StreamSettings

STEPS = few_steps((1, 0.5, 0.25), 3.0)
WINDOW = replace(MICRO.stream, window=3)
ENDLESS = StreamSettings(chunk=2, window=None, sink=0, image_first=True)


def play(dit, settings=WINDOW, cache=GradCache, model=None, seed=1, **options):
    """The chunks of a rollout over `random_batch()`, started from its first frame when image_first."""
    batch = random_batch()
    conditions = Conditions(dit.text(batch.context), batch.control, batch.condition)
    noise = torch.randn(batch.latents.shape, generator=rng(seed))
    start = batch.latents[:, :, :1] if settings.image_first else None
    return rollout(
        model or dit,
        noise,
        STEPS,
        conditions=conditions,
        cache=cache(SIZE, settings, SHAPE, batch=2),
        settings=settings,
        generator=rng(seed + 1),
        **{"start": start, **options},
    )


def without_cache(dit, settings, exit_step, seed=1):
    """The same walk with no cache: every forward sees [clean past | noisy chunk] in one full pass under a mask."""
    from lingbot_nb.model import masks

    batch, renoise = random_batch(), rng(seed + 1)
    noise = torch.randn(batch.latents.shape, generator=rng(seed))
    text, lengths = dit.text(batch.context), settings.chunk_lengths(noise.shape[2])
    done, first = [batch.latents[:, :, :1]], 1
    for i, length in enumerate(lengths[1:], 2):
        stop, x = first + length, noise[:, :, first : first + length]
        for k, step in enumerate(STEPS[: exit_step + 1]):
            t = torch.zeros(2, stop)
            t[:, first:] = step.t
            inputs = dict(condition_BCFHW=batch.condition[:, :, :stop], text=text)
            inputs |= dict(camera=dit.camera_tokens(batch.control[:, :, :stop]), mask=masks.block_causal(lengths[:i]))
            v = dit(torch.cat([*done, x], 2), t, **inputs)[:, :, first:]
            x0 = x - step.sigma * v
            if k < exit_step:
                sigma = STEPS[k + 1].sigma
                x = (1 - sigma) * x0 + sigma * torch.randn(x0.shape, generator=renoise)
        done.append(x0)
        first = stop
    return torch.cat(done, 2)


@pytest.mark.parametrize("exit_step", [0, 1, 2])
def test_rollout_equals_the_walk_without_a_cache(exit_step):
    dit = random_dit()
    with torch.no_grad():
        chunks = list(play(dit, ENDLESS, KVCache, exit_step=exit_step))
        expected = without_cache(dit, ENDLESS, exit_step)
    assert [chunk.shape[2] for chunk in chunks] == [1, 2, 2]
    torch.testing.assert_close(torch.cat(chunks, 2), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [WINDOW, ENDLESS, replace(WINDOW, image_first=False)])
def test_training_with_the_last_exit_is_inference_bit_for_bit(settings):
    dit = random_dit()
    trained = torch.cat(list(play(dit, settings, exit_step=len(STEPS) - 1)), 2)
    assert trained.requires_grad
    with torch.no_grad():
        played = torch.cat(list(play(dit, settings)), 2)
        streamed = torch.cat(list(play(dit, settings, KVCache)), 2)
    assert torch.equal(trained, played)
    # The streaming cache holds its frames in ring order, so sums may round differently once the ring has turned.
    torch.testing.assert_close(streamed, played, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cache", [GradCache, KVCache])
def test_a_walk_that_ends_saves_its_last_clean_pass_and_nothing_else(cache):
    dit, caches, calls = random_dit(), [], []

    class Counting(cache):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            caches.append(self)

    def counting(x, t, **inputs):
        calls.append(t[0].item())
        return dit(x, t, **inputs)

    counting.camera_tokens, counting.film = dit.camera_tokens, dit.film
    with torch.no_grad():
        kept, left = (
            list(play(dit, cache=Counting, model=counting, write_last=write_last)) for write_last in (True, False)
        )
    assert torch.equal(torch.cat(kept, 2), torch.cat(left, 2))
    frames = sum(chunk.shape[2] for chunk in kept)
    assert [made.frames_seen for made in caches] == [frames, frames - kept[-1].shape[2]]
    assert calls.count(0.0) == 2 * len(kept) - 1
    caches[1].begin(1)  # the chunk that was left out is no longer running


def test_start_is_written_and_yielded_as_it_is():
    dit, batch = random_dit(), random_batch()
    with torch.no_grad():
        first, second, *_ = play(dit)
        other, moved, *_ = play(dit, start=batch.latents[:, :, :1] + 1)
    assert torch.equal(first, batch.latents[:, :, :1]) and torch.equal(other, first + 1)
    assert not torch.allclose(second, moved)


def test_only_the_exit_forward_of_each_chunk_has_a_gradient():
    dit, calls = random_dit(), []

    class Spy:
        camera_tokens, film = dit.camera_tokens, dit.film

        def __call__(self, x, t, **inputs):
            calls.append((t[0].item(), torch.is_grad_enabled()))
            return dit(x, t, **inputs)

    list(play(dit, model=Spy(), exit_step=1, grad_from=3))
    steps = [STEPS[0].t, STEPS[1].t, 0.0]
    assert [t for t, _ in calls] == pytest.approx([0.0, *steps * 4])
    # Frames 1 and 2 come before grad_from = 3.
    assert [grad for _, grad in calls] == [False] * 7 + [False, True, False] * 2


def loss_of_last(chunks):
    return chunks[-1].square().mean()


def test_no_gradient_leaks_into_earlier_chunks():
    dit = random_dit()
    chunks = list(play(dit, exit_step=1))
    assert chunks[0].grad_fn is None
    leaks = torch.autograd.grad(loss_of_last(chunks), chunks[1:-1], retain_graph=True, allow_unused=True)
    assert leaks == (None,) * len(leaks) and len(leaks) == 3
    loss_of_last(chunks).backward()
    full = gradients(dit)
    dit.zero_grad()
    loss_of_last(list(play(dit, exit_step=1, grad_from=4))).backward()
    alone = gradients(dit)
    assert full.keys() == alone.keys()
    for name in full:
        assert torch.equal(full[name], alone[name]), name


def test_every_parameter_learns_through_the_rollout():
    dit = random_dit()
    torch.cat(list(play(dit, exit_step=1)), 2).square().mean().backward()
    assert {name for name, _ in dit.named_parameters()} == gradients(dit).keys()


@pytest.mark.parametrize("exit_step", [0, 2])
def test_checkpointing_gives_the_same_gradients(exit_step):
    dit, found = random_dit(), []
    for checkpoint in (False, True):
        dit.zero_grad()
        torch.cat(list(play(dit, exit_step=exit_step, checkpoint=checkpoint)), 2).square().mean().backward()
        found.append(gradients(dit))
    assert found[0].keys() == found[1].keys()
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-5, atol=1e-7, msg=name)


def test_gradient_of_the_last_chunk_against_finite_differences():
    dit, at, step = random_dit(), 3, 1e-2
    bias = dit.head.head.bias
    loss_of_last(list(play(dit, exit_step=0))).backward()

    @torch.no_grad()
    def moved(by: float) -> float:
        # Only the last chunk's forward is moved: its past is what the unmoved model wrote.
        walk = play(dit, exit_step=0)
        past = [next(walk) for _ in range(4)]
        bias[at] += by
        loss = loss_of_last([*past, next(walk)]).item()
        bias[at] -= by
        return loss

    slope = (moved(step) - moved(-step)) / (2 * step)
    assert slope == pytest.approx(bias.grad[at].item(), rel=1e-2)


def test_renoising_uses_the_noise_level_of_the_next_step():
    """With v = 0 a forward returns its input as x0: what arrives at step 2 shows the level it was noised to."""
    seen = []

    def model(x, t, **inputs):
        seen.append(x)
        return torch.zeros_like(x)

    class Cache:
        def begin(self, frames):
            return self

    steps = [FewStep(999, 0.9999, 1.0), FewStep(700, 0.7, 0.6)]
    noise, fresh = torch.randn(1, 16, 1, 4, 4, generator=rng()), torch.randn(1, 16, 1, 4, 4, generator=rng(1))
    shared = dict(condition=None, text=None, camera=None, cache=Cache(), renoise=lambda x0: fresh)
    denoise_chunk(model, noise, steps, **shared)
    torch.testing.assert_close(seen[1], 0.4 * noise + 0.6 * fresh)


def test_autocast_keeps_every_gradient():
    from lingbot_nb.distill.train import autocast

    dit = random_dit()
    with autocast("cpu")():
        clip = torch.cat(list(play(dit, exit_step=2)), 2)
    clip.square().mean().backward()
    assert {name for name, _ in dit.named_parameters()} == gradients(dit).keys()


def test_exit_is_drawn_over_all_steps():
    generator = rng()
    draws = [draw_exit(STEPS, generator) for _ in range(200)]
    assert set(draws) == {0, 1, 2} and min(draws.count(k) for k in range(3)) > 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exit_step": 3}, "exit step 3 is outside the 3 steps"),
        ({"start": torch.zeros(2, 16, 2, 4, 6)}, "start has 2 frames"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_runs(options, message):
    with pytest.raises(ValueError, match=message):
        next(play(random_dit(), ENDLESS, **options))


def test_conditions_must_cover_the_clip():
    dit, batch = random_dit(), random_batch()
    conditions = Conditions(dit.text(batch.context), batch.control[:, :, :3], batch.condition)
    cache = GradCache(SIZE, WINDOW, SHAPE, batch=2)
    with pytest.raises(ValueError, match="control_BCFHW has 3 frames, the noise 5"):
        options = dict(conditions=conditions, cache=cache, settings=WINDOW, generator=rng())
        next(rollout(dit, batch.latents, STEPS, **options))
