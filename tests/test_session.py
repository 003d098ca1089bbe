"""Session with random weights of the micro preset: causality, determinism, changes, state, recording, bad input."""

import gc
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from lingbot_nb.control.keys import KEYS, held, parse_keys
from lingbot_nb.distill.flow import few_steps
from lingbot_nb.distill.rollout import Conditions, rollout, start_chunk
from lingbot_nb.distill.train import TrainState, save_checkpoint
from lingbot_nb.model import checkpoint
from lingbot_nb.model.dit import DiT
from lingbot_nb.model.kv_cache import KVCache
from lingbot_nb.model.vae import MICRO_VAE, TinyVAE, from_uint8, to_uint8
from lingbot_nb.presets import MICRO
from lingbot_nb.stream import session as session_module
from lingbot_nb.stream.engine import Plain, Speed, StreamingDiT
from lingbot_nb.stream.follow import Newest
from lingbot_nb.stream.playback import play_script
from lingbot_nb.stream.session import (
    Recording,
    Session,
    choose_dtype,
    fit_image,
    live_path,
    replay,
    steps_within,
    with_chunk,
)


class Words:
    """Prompts as seeded noise: one word, one row."""

    def encode(self, prompt):
        rows = [torch.randn(MICRO.model.text_dim, generator=torch.Generator().manual_seed(sum(map(ord, word))))
                for word in prompt.split()]  # fmt: skip
        return torch.stack(rows)


@pytest.fixture(scope="module")
def dit():
    torch.manual_seed(0)
    model = DiT(MICRO.model).eval()
    for parameter in model.parameters():  # the zero layers of a fresh model would hide what reaches them
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(1)
    return TinyVAE(MICRO_VAE).eval()


def picture(seed=0):
    y, x = np.mgrid[0 : MICRO.shape.height, 0 : MICRO.shape.width]
    channels = [x * 5, y * 7, (x + y) * 3 + 40 * seed]
    return np.stack(channels, axis=-1).astype(np.uint8)


@pytest.fixture
def make(dit, vae):
    def session(preset=MICRO, **changes):
        options = dict(start_image=picture(), prompt="a corridor", steps=2, seed=3)
        return Session(preset, dit, vae, Words(), **{**options, **changes})

    return session


def walk(session, *chunks):
    return np.concatenate([session.step(keys) for keys in chunks])


@pytest.mark.parametrize("chunk", [1, 3])
def test_same_seed_and_keys_give_the_same_frames(make, chunk):
    preset = with_chunk(MICRO, chunk)
    first = walk(make(preset), "w", "wl", "", "s")
    assert first.shape == (4 * 4 * chunk, MICRO.shape.height, MICRO.shape.width, 3) and first.dtype == np.uint8
    session = make(preset)
    assert np.array_equal(walk(session, "w", "wl", "", "s"), first)
    session.reset()
    assert np.array_equal(walk(session, "w", "wl", "", "s"), first)
    session.reset(seed=4)
    assert not np.array_equal(walk(session, "w"), first[: 4 * chunk])


def test_play_is_the_rollout_of_training(make, dit, vae):
    """The session's frames are those of `rollout` and a whole-clip decode, given the same noise."""
    frames = 4
    rows = parse_keys("w-6,jl-2,d-4")
    session = make()
    played = np.concatenate([session.first_frame[None], *(session.step(rows[i : i + 4]) for i in range(0, 12, 4))])

    shape = MICRO.shape.with_frames(frames)
    image = from_uint8(torch.from_numpy(picture())[None, None])
    path = live_path(MICRO)
    control = path.push(np.concatenate([np.zeros((1, 8), bool), rows]))[None]
    # One draw for the chunk's noise, then one for each step but the last: two a chunk here.
    generator = torch.Generator().manual_seed(3)
    size = (1, 16, 1, shape.latent_height, shape.latent_width)
    draws = [[torch.randn(size, generator=generator) for _ in range(2)] for _ in range(frames - 1)]
    noise = torch.cat([torch.zeros(size), *(draw[0] for draw in draws)], dim=2)
    later = iter([draw[1] for draw in draws])
    with torch.no_grad():
        conditions = Conditions(dit.text(Words().encode("a corridor")[None]), control,
                                vae.image_condition(image[:, :, 0], frames))  # fmt: skip
        cache = KVCache(MICRO.model, MICRO.stream, shape)
        steps = few_steps(MICRO.flow.labels(2), MICRO.flow.shift)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lingbot_nb.distill.rollout.gaussian", lambda like, _: next(later))
            chunks = list(rollout(dit, noise, steps, conditions=conditions, cache=cache, settings=MICRO.stream,
                                  generator=generator, start=vae.encode(image)))  # fmt: skip
        whole = to_uint8(vae.decode(torch.cat(chunks, dim=2)))[0].numpy()
    assert whole.shape == played.shape == (13, 32, 48, 3)
    assert np.abs(whole.astype(int) - played).max() <= 1


def test_keys_change_the_future_and_never_the_past(make):
    a, b = make(), make()
    assert np.array_equal(walk(a, "w", "w"), walk(b, "w", "w"))
    assert not np.array_equal(a.step("j"), b.step("l"))
    assert not np.array_equal(a.step(""), b.step(""))  # the past differs now, so the same keys do not meet again


def test_keys_may_change_inside_a_chunk(make):
    rows = np.repeat(held("w")[None], 4, axis=0)
    assert np.array_equal(make().step("w"), make().step(rows))
    assert np.array_equal(make().step({"w"}), make().step(held("w")))
    rows[2:] = held("l")
    assert not np.array_equal(make().step("w"), make().step(rows))


def test_the_image_is_shown_first(make, vae):
    session = make()
    image = from_uint8(torch.from_numpy(picture())[None, None])
    with torch.no_grad():
        seen = to_uint8(vae.decode(vae.encode(image)))[0, 0].numpy()
    assert np.array_equal(session.first_frame, seen)
    assert np.array_equal(session.last_frame, seen)
    frames = session.step("")
    assert np.array_equal(session.last_frame, frames[-1])


@pytest.mark.parametrize("chunk", [1, 3])
def test_without_image_first_the_first_chunk_is_shorter_by_the_image(make, chunk):
    preset = with_chunk(MICRO, chunk)
    preset = replace(preset, stream=replace(preset.stream, image_first=False))
    session = make(preset)
    assert session.next_frames == 4 * chunk - 3
    assert len(session.step("w")) == 4 * chunk - 3
    assert session.next_frames == 4 * chunk
    assert len(session.step("w")) == 4 * chunk


def test_finish_may_wait_until_the_next_chunk(make):
    session = make()
    frames = [session.generate("w"), session.generate("l")]
    assert "clean pass" not in session.last_timings
    session.finish()
    session.finish()
    assert set(session.last_timings) == {"control", "denoise", "decode", "clean pass"}
    assert np.array_equal(np.concatenate(frames), walk(make(), "w", "l"))


def test_a_long_stream_stays_finite_and_holds_still_in_memory(make):
    session = make(steps=1)
    before = session._cache.occupancy().bytes
    frames = walk(session, *["w"] * 40)
    assert len(frames) == 160 and session.pixel_frames == 161
    assert session._cache.occupancy().bytes == before
    assert session._cache.frames_seen == 41
    assert frames[-4:].std() > 0


def test_prompt_and_steps_change_from_the_next_chunk(make):
    plain, changed = make(), make()
    assert np.array_equal(plain.step("w"), changed.step("w"))
    changed.prompt = "a burning forest"
    assert not np.array_equal(plain.step("w"), changed.step("w"))
    plain.reset()
    changed.reset()
    assert changed.prompt == "a burning forest"
    more = make(prompt="a burning forest")
    assert np.array_equal(more.step("w"), changed.step("w"))
    more.steps = 4
    assert not np.array_equal(more.step("w"), changed.step("w"))


def test_a_new_prompt_reads_the_chunks_in_sight_again_and_the_same_one_changes_nothing(make):
    plain, same, other = make(), make(), make()
    for session in (plain, same, other):
        walk(session, "w", "l")
    before = other._cache.ordered(1)[0]
    same.prompt, other.prompt = same.prompt, "a burning forest"
    after = other._cache.ordered(1)[0]
    assert before.shape == after.shape and not torch.allclose(before, after)
    torch.testing.assert_close(same._cache.ordered(1)[0], before, rtol=0, atol=1e-5)
    # Rounding may move a pixel by one level where a chunk was read again.
    assert np.abs(plain.step("w").astype(int) - same.step("w").astype(int)).max() <= 1


def test_a_new_start_image_starts_anew(make):
    session = make()
    walk(session, "w", "l")
    session.start_image = picture(1)
    assert session.pixel_frames == 1
    assert np.array_equal(walk(session, "w", "d"), walk(make(start_image=picture(1)), "w", "d"))


def test_another_student_goes_on_with_the_same_cache(make, dit):
    torch.manual_seed(5)
    other = DiT(MICRO.model).eval()
    same, swapped = make(), make()
    walk(same, "w")
    walk(swapped, "w")
    swapped.use(dit)
    assert np.array_equal(same.step("w"), swapped.step("w"))
    swapped.use(other)
    assert not np.array_equal(same.step("w"), swapped.step("w"))


@pytest.mark.parametrize("chunk", [1, 3])
def test_state_through_a_file(make, tmp_path, chunk):
    preset = with_chunk(MICRO, chunk)
    session = make(preset)
    walk(session, "w", "wl", "", "i", "w")
    session.prompt = "a burning forest"
    session.steps = 3
    session.generate("a")
    file = session.save(tmp_path / "state.safetensors")
    expected = walk(session, "w", "j", "l")
    fresh = make(preset, start_image=picture(2), seed=9)
    fresh.step("s")
    fresh.load(file)
    assert (fresh.prompt, fresh.steps, fresh.seed) == ("a burning forest", 3, 3)
    assert np.array_equal(fresh.start_image, picture())
    assert np.array_equal(walk(fresh, "w", "j", "l"), expected)
    assert np.array_equal(fresh.poses, session.poses)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]
    fresh.reset()
    session.reset()
    assert np.array_equal(fresh.step("w"), session.step("w"))


def test_a_state_of_another_stream_is_refused_and_changes_nothing(make):
    session = make()
    session.step("w")
    state = make(replace(MICRO, stream=replace(MICRO.stream, relative=False))).state_dict()
    with pytest.raises(ValueError, match="stream"):
        session.load_state_dict(state)
    twin = make()
    twin.step("w")
    assert np.array_equal(session.step("l"), twin.step("l"))


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_recording_plays_again_to_the_same_frames(make, tmp_path, chunk):
    preset = with_chunk(MICRO, chunk)
    session = make(preset)
    frames = [session.first_frame[None], session.step("w")]
    session.prompt = "a burning forest"
    frames += [session.step("wl")]
    session.steps = 1
    frames += [session.step("j")]
    file = session.recording().save(tmp_path / "walk.safetensors")
    recording = Recording.load(file)
    assert recording.keys.shape == (12 * chunk, 8) and recording.poses.shape == (12 * chunk + 1, 4, 4)
    again = list(replay(make(preset, start_image=picture(2), prompt="else", steps=4, seed=8), recording))
    assert np.array_equal(np.concatenate(again), np.concatenate(frames))


def test_a_wider_window_in_mid_stream_is_as_if_it_had_always_been(make):
    """While neither window has lost a frame yet, the rebuilt cache must equal the one that was wide from the start."""
    changed, wide = make(), make(replace(MICRO, stream=replace(MICRO.stream, window=7, sink=2)))
    for session in (changed, wide):
        walk(session, "w", "l")
    changed.window = 7
    changed.sink = 2
    assert (changed.window, changed.sink, changed.pixel_frames) == (7, 2, 9)
    assert np.array_equal(walk(changed, *"wwjwww"), walk(wide, *"wwjwww"))
    changed.reset()
    wide.reset()
    assert np.array_equal(changed.step("w"), wide.step("w"))


@pytest.mark.parametrize("chunk", [1, 3])
def test_window_and_sink_change_far_out_and_are_recorded(make, chunk):
    session = make(with_chunk(MICRO, chunk), steps=1)
    frames = [session.first_frame[None], walk(session, *["w"] * 24)]
    session.window = 3 + 2 * chunk
    frames.append(walk(session, "w", "l"))
    session.sink = 0
    frames.append(walk(session, "w"))
    assert session._cache.frames_seen <= session.window + 2 * chunk
    again = list(replay(make(with_chunk(MICRO, chunk)), session.recording()))
    assert np.array_equal(np.concatenate(again), np.concatenate(frames))
    with pytest.raises(ValueError, match="at most 21"):
        session.window = 40
    with pytest.raises(ValueError, match="cannot hold sink"):
        session.window = chunk - 1
    assert session.window == 3 + 2 * chunk


def test_the_chunk_changes_in_mid_stream_and_the_past_stays(make, tmp_path):
    session = make(steps=1)
    frames = [session.first_frame[None], walk(session, "w", "l")]
    past = session._cache.ordered(1)[0]
    session.chunk = 3
    assert (session.chunk, session.next_frames, session.window) == (3, 12, 4)
    assert "3 frames a chunk" in session.about
    assert torch.equal(session._cache.ordered(1)[0], past)
    frames.append(walk(session, "w", "j"))
    state = session.save(tmp_path / "state.safetensors")
    session.chunk = 1
    session.window = 2  # a past of longer chunks than the window holds is read in pieces
    frames.append(walk(session, "d"))
    again = list(replay(make(), Recording.load(session.recording().save(tmp_path / "walk.safetensors"))))
    assert np.array_equal(np.concatenate(again), np.concatenate(frames))
    loaded = make()
    loaded.load(state)
    assert loaded.chunk == 3
    loaded.chunk, loaded.window = 1, 2
    assert np.array_equal(walk(loaded, "d"), frames[-1])
    with pytest.raises(ValueError, match="chunk 0"):
        session.chunk = 0


def test_a_chunk_that_the_window_cannot_hold_widens_it(make):
    session = make(replace(MICRO, stream=replace(MICRO.stream, window=2)))
    walk(session, "w", "l")
    session.chunk = 3
    assert session.window == 4
    assert len(walk(session, "w")) == 12


def clip(pixel_frames=9):
    return np.stack([np.roll(picture(), 3 * number, axis=1) for number in range(pixel_frames)])


def test_a_clip_is_where_play_begins(make, dit, vae):
    """The cache after a clip is the one that the same latents, written chunk by chunk by hand, leave, up to rounding:
    a session's weights lie otherwise in memory."""
    keys = np.concatenate([np.zeros((1, 8), bool), parse_keys("w-5,l-3")])
    session = make()
    session.start_clip(clip(), keys)
    video = from_uint8(torch.from_numpy(clip())[None])
    cache = KVCache(MICRO.model, MICRO.stream, MICRO.shape)
    with torch.no_grad():
        x0, control = vae.encode(video), live_path(MICRO).push(keys)[None]
        conditions = Conditions(dit.text(Words().encode("a corridor")[None]), control,
                                vae.image_condition(video[:, :, 0], 3))  # fmt: skip
        for i in range(3):
            part = conditions.frames(i, i + 1)
            start_chunk(dit, x0[:, :, i : i + 1], conditions=part, cache=cache)
        seen = to_uint8(vae.decode(x0))[0].numpy()
    mine = session._cache.state_dict()
    for name, part in cache.state_dict().items():
        torch.testing.assert_close(mine[name], part, atol=1e-5, rtol=1e-5)
    assert np.array_equal(session.first_frame, seen[-1])
    assert session.pixel_frames == 9 and len(session.poses) == 9
    frames = walk(session, "w", "j")
    assert not np.array_equal(frames, walk(make(), "w", "j"))
    session.reset()
    assert np.array_equal(walk(session, "w", "j"), frames)
    recorded = np.concatenate(list(replay(make(), session.recording())))
    assert np.array_equal(recorded[1:], frames)


def test_a_picture_is_a_clip_of_one_frame(make):
    session = make(start_image=picture(1))
    session.start_clip(picture()[None])
    assert np.array_equal(walk(session, "w", "d"), walk(make(), "w", "d"))
    with pytest.raises(ValueError, match="give uint8 .4n . 1, 32, 48, 3"):
        session.start_clip(clip(8))
    with pytest.raises(ValueError, match="3 rows of keys for a clip of 9"):
        session.start_clip(clip(), np.zeros((3, 8), bool))
    assert session.pixel_frames == 9


def test_state_brings_window_clip_and_memory_along(make, tmp_path):
    session = make()
    session.start_clip(clip())
    walk(session, "w", "l", "w", "w")
    session.window = 6
    walk(session, "w")
    file = session.save(tmp_path / "state.safetensors")
    fresh = make()
    fresh.load(file)
    for other in (session, fresh):
        other.window = 5
    assert np.array_equal(walk(session, "w", "j"), walk(fresh, "w", "j"))
    assert fresh.window == 5 and np.array_equal(fresh.poses, session.poses)


def test_poses_follow_the_keys(make):
    session = make()
    walk(session, "l", "")
    turned = np.degrees(np.arctan2(session.poses[-1][0, 2], session.poses[-1][2, 2]))
    assert len(session.poses) == session.pixel_frames == 9
    assert turned == pytest.approx(16)  # 4 degrees a pixel frame, to the right
    session.reset()
    assert np.array_equal(session.poses, np.eye(4)[None])


def test_play_script_without_a_widget(make):
    frames = play_script(make(), "w-4,l-3")
    assert frames.shape == (9, 32, 48, 3)
    rows = np.concatenate([parse_keys("w-4,l-3"), np.zeros((1, len(KEYS)), bool)])
    session = make()
    assert np.array_equal(frames[1:], walk(session, rows[:4], rows[4:]))


def test_another_dtype_is_a_copy(make, dit):
    session = make(dtype=torch.bfloat16)
    assert session.step("w").std() > 0
    assert next(dit.parameters()).dtype == torch.float32
    assert make().dit is dit
    assert "bf16" in session.about and "fp32" in make().about


def test_pictures_are_fitted_and_told(tmp_path):
    from PIL import Image

    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 48:144] = 200  # the middle 96 columns are what 2:3 keeps
    with pytest.warns(UserWarning, match="192x64 resized to 48x32, 50% of it cut off"):
        fitted = fit_image(wide, MICRO.shape)
    assert fitted.shape == (32, 48, 3) and fitted[:, 3:-3].min() >= 195
    file = tmp_path / "start.png"
    Image.fromarray(picture()).save(file)
    assert np.array_equal(fit_image(file, MICRO.shape), picture())


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "gif"])
def test_a_picture_that_was_cut_off_is_told_by_name(tmp_path, kind):
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole", kind)
    file = tmp_path / f"half.{kind}"
    file.write_bytes((tmp_path / "whole").read_bytes()[:2000])
    with pytest.raises(ValueError, match=f"half.{kind} is not a picture"):
        fit_image(file, MICRO.shape)


def test_bad_input_is_told_and_changes_nothing(make, tmp_path):
    session = make()
    with pytest.raises(ValueError, match="uint8"):
        session.start_image = np.zeros((32, 48), np.float32)
    with pytest.raises(FileNotFoundError):
        session.start_image = tmp_path / "none.png"
    (tmp_path / "bad.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="bad.png is not a picture"):
        session.start_image = tmp_path / "bad.png"
    for none in (None, ""):
        with pytest.raises(ValueError, match="no start image"):
            session.start_image = none
    with pytest.raises(ValueError, match="0 student steps"):
        session.steps = 0
    with pytest.raises(ValueError, match="text states"):
        session.prompt = "word " * 40
    with pytest.raises(ValueError, match="3 rows of keys for a chunk of 4"):
        session.step(np.zeros((3, 8), bool))
    with pytest.raises(ValueError, match="key 'q'"):
        session.step("q")
    assert np.array_equal(session.step("w"), make().step("w"))
    file = tmp_path / "half.safetensors"
    file.write_bytes(session.save(tmp_path / "whole.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match="half.safetensors is not a whole"):
        session.load(file)


def test_the_fastest_dtype_is_chosen():
    now = [0.0]
    cost = {torch.float32: 1.0, torch.bfloat16: 0.5}

    def make(dtype):
        def run():
            now[0] += cost[dtype] / (1 if torch.get_num_threads() == 1 else 0.9)

        return run

    threads = torch.get_num_threads()
    choice = choose_dtype(make, clock=lambda: now[0], threads=(1, 2))
    assert (choice.dtype, choice.threads) == (torch.bfloat16, 1)
    assert choice.milliseconds[torch.float32, 1] == pytest.approx(1000)
    assert torch.get_num_threads() == threads
    cost[torch.bfloat16] = 0.98
    assert choose_dtype(make, clock=lambda: now[0], threads=(1, 2)).dtype == torch.float32


@pytest.mark.parametrize(("enough", "threads"), [(0.9, 2), (1.1, 1), (0.1, 2)])
def test_the_fewest_threads_that_are_enough_are_chosen(enough, threads):
    """One thread takes a second, two take 0.6: two only where one is too slow, and then also where both are."""
    now = [0.0]

    def run():
        now[0] += {1: 1.0, 2: 0.6}[torch.get_num_threads()]

    choice = choose_dtype(lambda dtype: run, clock=lambda: now[0], threads=(1, 2), enough=enough)
    assert choice.threads == threads


def test_tuning_leaves_the_world_and_torch_as_they_were(make):
    tuned, plain = make(), make()
    walk(tuned, "w"), walk(plain, "w")
    threads = torch.get_num_threads()
    choice = tuned.tune(seconds=0.05)
    assert tuned.threads == choice.threads and tuned.dtype == choice.dtype
    assert torch.get_num_threads() == threads
    assert f"{choice.threads} thread" in tuned.about
    if choice.dtype == plain.dtype:
        assert np.array_equal(walk(tuned, "w", "l"), walk(plain, "w", "l"))


@pytest.mark.parametrize(("budget", "steps"), [(0.25, 4), (0.21, 3), (0.16, 2), (0.11, 1), (0.01, 1)])
def test_steps_are_lowered_until_a_chunk_fits(budget, steps):
    """One step takes 0.1 s, each more 0.05 s."""
    assert steps_within(budget, 0.1, 0.25, 4) == steps
    assert steps_within(budget, 0.1, 0.1, 1) == 1


def test_tuning_lowers_steps_only_if_asked_and_not_too_far(make, monkeypatch):
    monkeypatch.setattr(session_module, "ROOM", 0.0)  # no chunk is quick enough
    session = make(steps=4)
    session.tune(seconds=0.02)
    assert session.steps == 4
    session.tune(seconds=0.02, fewest_steps=2)
    assert session.steps == 2
    assert session.recording().changes == ((1, {"steps": 2}),)


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_stream_hands_out_each_latent_frame(make, chunk):
    streamed, whole = (make(with_chunk(MICRO, chunk)) for _ in range(2))
    for keys in ("w", "l"):
        parts = list(streamed.stream(keys))
        assert [len(part) for part in parts] == [4] * chunk
        assert np.array_equal(np.concatenate(parts), whole.generate(keys))
    assert np.array_equal(streamed.last_frame, whole.last_frame)
    assert streamed.pixel_frames == whole.pixel_frames == 1 + 8 * chunk


@pytest.mark.parametrize(("chunk", "asked"), [(1, 0), (3, 0), (1, 1), (1, 2)])
def test_a_chunk_begins_again_under_newer_keys(make, chunk, asked):
    """As if it had been asked for them at once, whichever step had been done: frames, keys, and what follows."""
    hasty, calm = (make(with_chunk(MICRO, chunk), steps=3) for _ in range(2))
    walk(hasty, "w"), walk(calm, "w")
    answers = iter([*[None] * asked, "l", *[None] * 3])
    assert np.array_equal(np.concatenate(list(hasty.stream("w", lambda: next(answers)))), calm.generate("l"))
    assert next(answers, "all asked") == "all asked"
    assert np.array_equal(hasty.recording().keys, calm.recording().keys)
    assert np.array_equal(walk(hasty, "w"), walk(calm, "w"))
    with pytest.raises(ValueError, match="key 'q'"):
        list(hasty.stream("w", lambda: "q"))
    assert np.array_equal(walk(hasty, "w"), walk(calm, "w"))


def test_on_a_cpu_the_streaming_network_plays(make, dit):
    session = make()
    assert session.dit is dit and isinstance(session._net, StreamingDiT)
    other = DiT(MICRO.model).eval()
    session.use(other)
    assert session.dit is other and session._net.dit is other


def played(session):
    """A stretch of play in which everything is changed once, on the way and from outside the stream."""
    films = [walk(session, "w", "wl")]
    session.steps = 3
    films.append(walk(session, "w"))
    session.prompt = "a burning forest"
    films.append(walk(session, "j"))
    session.window = 3
    films.append(walk(session, "w", "d"))
    session.chunk = 2
    films.append(walk(session, "w", "w"))
    saved = session.state_dict()
    films.append(walk(session, "a"))
    session.load_state_dict(saved)
    films.append(walk(session, "a", "s"))
    session.prompt = "a corridor"
    session.use(session.dit)
    films.append(walk(session, "w"))
    session.reset(seed=4)
    films.append(walk(session, "w", "l"))
    return np.concatenate(films)


def levels_apart(film: np.ndarray, other: np.ndarray) -> int:
    """Largest difference of two films: threads share a product out otherwise where its weights lie otherwise in memory,
    and its last bit may move a pixel by one of 255 levels."""
    return int(np.abs(film.astype(int) - other).max())


BARE = Speed(compile=False, graph=False, join=False)


@pytest.mark.parametrize("image_first", [True, False])
def test_the_engine_plays_the_same_film(make, image_first):
    preset = replace(MICRO, stream=replace(MICRO.stream, image_first=image_first))
    assert levels_apart(played(make(preset, speed=BARE)), played(make(preset))) <= 1


def test_merged_passes_play_the_same_film_within_a_level(make):
    assert levels_apart(played(make(speed=replace(BARE, merge=True))), played(make())) <= 1


def test_newer_keys_reach_the_engine_when_its_chunk_is_made(make):
    hasty, calm = make(speed=BARE), make(speed=BARE)
    asked = iter([None, "l"])
    frames = np.concatenate(list(hasty.stream("w", lambda: next(asked, None))))
    assert np.array_equal(frames, calm.step("l"))
    hasty.finish()
    assert np.array_equal(walk(hasty, "w"), walk(calm, "w"))


def test_a_world_on_the_engine_is_not_tuned(make):
    assert make(speed=BARE).tune() is None


def test_a_session_computes_on_its_own_threads(make, monkeypatch):
    session, seen = make(), []
    session.threads = 1
    decode = session._pictures._stream.decode
    monkeypatch.setattr(
        session._pictures._stream, "decode", lambda x0: seen.append(torch.get_num_threads()) or decode(x0)
    )
    before = torch.get_num_threads()
    session.step("w")
    assert seen == [1] and torch.get_num_threads() == before


@pytest.fixture
def passes(monkeypatch):
    """Names of the threads that clean passes ran in; each takes a moment, so that whoever does not wait is seen."""
    clean, names = Plain.clean, []

    def slow(stream):
        if "clean-pass" in threading.current_thread().name:
            time.sleep(0.02)
        clean(stream)
        names.append(threading.current_thread().name)

    monkeypatch.setattr(Plain, "clean", slow)
    return names


def on_cores(monkeypatch, session, cores):
    """The session on one thread where `cores` may be used: with three of them it cleans ahead."""
    monkeypatch.setattr(session_module, "usable_cores", lambda: cores)
    session.threads = 1
    return session


def remembered(session):
    """The session's state, of the cache only what is in sight: slots that nothing has been committed to may differ."""
    state = {name: x for name, x in session.state_dict().items() if not name.startswith("cache.")}
    layers = [session._cache.ordered(layer) for layer in range(MICRO.model.layers)]
    return {**state, "past": torch.stack([torch.cat([*pair]) for pair in layers])}


def ahead(names):
    return sum("clean-pass" in name for name in names)


@pytest.mark.parametrize("image_first", [True, False])
def test_clean_passes_beside_the_decoder_play_the_same_film(make, monkeypatch, passes, image_first):
    preset = replace(MICRO, stream=replace(MICRO.stream, image_first=image_first))
    alone = on_cores(monkeypatch, make(preset), 1)
    film = played(alone)
    assert passes and not ahead(passes)
    beside = on_cores(monkeypatch, make(preset), 3)
    assert np.array_equal(played(beside), film)
    assert ahead(passes) == 14  # every chunk that was played; those read again after a change have no pictures
    mine, theirs = beside.state_dict(), alone.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_clean_pass_runs_while_pictures_are_decoded(make, monkeypatch):
    session, cleaned = on_cores(monkeypatch, make(), 3), threading.Event()
    clean, decode = Plain.clean, session._pictures._stream.decode
    monkeypatch.setattr(Plain, "clean", lambda stream: clean(stream) or cleaned.set())

    def waiting(x0):
        assert cleaned.wait(10)
        return decode(x0)

    session._pictures._stream.decode = waiting
    assert np.array_equal(session.step("w"), make().step("w"))


@pytest.mark.parametrize("chunk", [1, 3])
def test_newer_keys_come_before_a_clean_pass_is_begun(make, monkeypatch, passes, chunk):
    hasty = on_cores(monkeypatch, make(with_chunk(MICRO, chunk), steps=3), 3)
    calm = make(with_chunk(MICRO, chunk), steps=3)
    answers = iter([None, None, "l", None, None, None])
    frames = np.concatenate(list(hasty.stream("w", lambda: next(answers))))
    hasty.finish()
    assert ahead(passes) == 1
    assert np.array_equal(frames, calm.step("l"))
    assert np.array_equal(walk(hasty, "w"), walk(calm, "w"))


AFTERWARDS = {
    "the next chunk": lambda session: None,
    "a prompt": lambda session: setattr(session, "prompt", "a burning forest"),
    "a window": lambda session: setattr(session, "window", 5),
    "a chunk": lambda session: setattr(session, "chunk", 2),
    "steps": lambda session: setattr(session, "steps", 1),
    "a student": lambda session: session.use(session.dit),
    "a reset": lambda session: session.reset(),
    "a clip": lambda session: session.start_clip(clip()),
    "a finish": lambda session: session.finish(),
}


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "left open"])
@pytest.mark.parametrize("change", AFTERWARDS.values(), ids=AFTERWARDS.keys())
@pytest.mark.parametrize("chunk", [1, 3])
def test_a_chunk_given_up_leaves_no_trace_of_its_clean_pass(make, monkeypatch, passes, chunk, change, closed):
    films, states = [], []
    for cores in (1, 3):
        session = on_cores(monkeypatch, make(with_chunk(MICRO, chunk)), cores)
        walk(session, "w", "l")
        parts = session.stream("j")
        next(parts)
        if closed:
            parts.close()
        assert session._cache.frames_seen == 1 + 2 * chunk and session.pixel_frames == 1 + 8 * chunk
        change(session)
        films.append(walk(session, "w", "d"))
        states.append(remembered(session))
    assert ahead(passes) == 5
    assert np.array_equal(*films)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_clean_pass_of_a_chunk_given_up_is_not_taken_for_the_next_ones(make, monkeypatch, passes):
    session, calm = on_cores(monkeypatch, make(), 3), make()
    for given_up in (session.stream("j"), calm.stream("j")):
        next(given_up)
        given_up.close()
    session.threads = None  # the next chunks are not cleaned ahead
    assert np.array_equal(walk(session, "l", "w"), walk(calm, "l", "w"))
    assert ahead(passes) == 1


def failing_once(monkeypatch, error):
    """Have the next clean pass that is begun ahead raise `error` before it is through."""
    clean, errors = Plain.clean, [error]

    def failing(stream):
        clean(stream)
        if errors and "clean-pass" in threading.current_thread().name:
            stream._cleaned = None
            raise errors.pop()

    monkeypatch.setattr(Plain, "clean", failing)


@pytest.mark.parametrize("again", [Session.finish, Session.state_dict, lambda session: session.generate("l")])
def test_what_a_clean_pass_raises_is_raised_by_the_next_call_and_the_pass_done_anew(make, monkeypatch, again):
    session, calm = on_cores(monkeypatch, make(), 3), make()
    walk(session, "w"), walk(calm, "w")
    failing_once(monkeypatch, MemoryError("the machine is full"))
    assert np.array_equal(session.generate("j"), calm.generate("j"))
    with pytest.raises(MemoryError, match="the machine is full"):
        again(session)
    assert session.pixel_frames == 9
    assert np.array_equal(walk(session, "l", "w"), walk(calm, "l", "w"))


def test_the_failed_clean_pass_of_a_chunk_given_up_is_nobodys(make, monkeypatch):
    session, calm = on_cores(monkeypatch, make(), 3), make()
    failing_once(monkeypatch, MemoryError("the machine is full"))
    for given_up in (session.stream("j"), calm.stream("j")):
        next(given_up)
        given_up.close()
    assert np.array_equal(walk(session, "l", "w"), walk(calm, "l", "w"))


def test_a_decoder_that_fails_beside_a_clean_pass_loses_nothing(make, monkeypatch, passes):
    session, short = on_cores(monkeypatch, make(), 3), make()
    walk(session, "w", "w"), walk(short, "w", "w")
    session.shrinks = True
    frames = full(session, 1).step("l")
    short.window = short.sink + short.preset.stream.chunk
    assert np.array_equal(frames, short.step("l"))
    with pytest.raises(RuntimeError, match="cannot be shorter"):
        full(session, 1).step("l")
    assert np.array_equal(session.step("j"), short.step("j"))


def test_a_clean_pass_ahead_is_told_by_its_own_time(make, monkeypatch, passes):
    session = on_cores(monkeypatch, make(), 3)
    session.generate("w")
    assert "clean pass" not in session.last_timings
    time.sleep(0.1)  # nothing of it is left
    session.finish()
    assert session.last_timings["clean pass"] >= 20
    assert set(session.last_timings) == {"control", "denoise", "decode", "clean pass"}


@pytest.mark.parametrize("threads", [1, 2])
def test_a_clean_pass_ahead_computes_on_the_sessions_threads(make, monkeypatch, threads):
    """Also when torch's own number is back before the pass has computed anything."""
    clean, before, made, seen = Plain.clean, torch.get_num_threads(), threading.Event(), []

    def late(stream):
        assert made.wait(10)
        clean(stream)
        seen.append((torch.get_num_threads(), torch.is_inference_mode_enabled()))

    session = on_cores(monkeypatch, make(), 2 * threads + 1)
    session.threads = threads
    monkeypatch.setattr(Plain, "clean", late)
    torch.set_num_threads(3)
    try:
        session.generate("w")
        made.set()
        session.finish()
        newborn = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        newborn.start()
        newborn.join()
        assert seen == [(threads, True), 3] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("threads", "cores"), [(None, 8), (1, 1), (1, 2), (2, 3), (2, 4)])
def test_without_cores_to_spare_clean_passes_wait_for_the_pictures(make, monkeypatch, passes, threads, cores):
    session = on_cores(monkeypatch, make(), cores)
    session.threads = threads
    walk(session, "w", "l")
    assert passes and not ahead(passes) and session._helper is None


def test_the_thread_of_clean_passes_ends_with_its_session(make, monkeypatch, passes):
    before = set(threading.enumerate())
    sessions = [on_cores(monkeypatch, make(), 3) for _ in range(3)]
    for session in sessions:
        walk(session, "w", "l")
    helpers = set(threading.enumerate()) - before
    assert len(helpers) == 3
    sessions[0].generate("w")  # one is left in the middle of a pass
    del session
    sessions.clear()
    gc.collect()
    for helper in helpers:
        helper.join(10)
    assert not any(helper.is_alive() for helper in helpers)


def full(session, times: int):
    """Make the session's decoder run out of memory `times` times, after the chunk has drawn its noise."""
    decode, left = session._pictures._stream.decode, [times]

    def pretended(x0):
        if left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(x0)

    session._pictures._stream.decode = pretended
    return session


def test_a_full_gpu_says_what_would_fit_and_loses_nothing(make):
    session, plain = make(), make()
    walk(session, "w"), walk(plain, "w")
    full(session, 1)
    shortest = session.sink + session.preset.stream.chunk
    with pytest.raises(RuntimeError, match=rf"a window of {shortest} instead of {session.window} frames frees \d+ MiB"):
        session.step("l")
    assert np.array_equal(session.step("l"), plain.step("l"))


def test_a_full_gpu_shortens_the_window_if_asked(make):
    session, short = make(), make()
    walk(session, "w", "w"), walk(short, "w", "w")
    session.shrinks = True
    frames = full(session, 1).step("l")
    short.window = short.sink + short.preset.stream.chunk
    assert session.window == short.window and session.shrunk
    assert np.array_equal(frames, short.step("l"))
    with pytest.raises(RuntimeError, match="cannot be shorter"):
        full(session, 1).step("l")
    session.chunk = 2  # the chunk that failed had another length
    assert len(session.step("l")) == 8


def test_the_player_plays_and_records_a_real_session(make, tmp_path):
    pytest.importorskip("ipyevents")
    pytest.importorskip("av")
    from lingbot_nb.stream.player import play, stop

    session = make(steps=1)
    session.threads = 1  # not to be tuned: the dtype must be that of the session which plays the recording again
    player = play(session, folder=tmp_path, script="w-12", fps=200, scenes=[picture(), picture(1)]).player
    show = player._show

    def answering(number, frame):
        show(number, frame)
        player.playback.acknowledge(number)

    try:
        player.playback._show = answering
        player.playback.acknowledge(player.playback.credit.sent)
        player.panel.record.click()
        for _ in range(500):
            if player._shown > 24:
                break
            threading.Event().wait(0.01)
    finally:
        stop()
    assert player.playback.read_out().message == ""
    (file,) = tmp_path.glob("*.safetensors")
    recording = Recording.load(file)
    assert (recording.keys[:12] == held("w")).all() and len(recording.keys) >= 24
    assert np.array_equal(list(replay(make(steps=1), recording))[-1][-1], session.last_frame)


class Watched:
    """A player without a browser: every frame is answered at once; `wait` lets it run until something is so."""

    def __init__(self, session, **options):
        from lingbot_nb.stream.player import play

        session.threads = 1  # not to be tuned: that may replace the model by one of another dtype
        self.player = play(session, fps=200, **options).player
        show = self.player._show

        def answering(number, frame):
            show(number, frame)
            self.player.playback.acknowledge(number)

        self.player.playback._show = answering
        self.player.playback.acknowledge(self.player.playback.credit.sent)

    def wait(self, so):
        for _ in range(1000):
            if so():
                return
            threading.Event().wait(0.01)
        raise AssertionError(f"it never came: {self.player.playback.read_out().message}")


@pytest.fixture
def watched():
    pytest.importorskip("ipyevents")
    from lingbot_nb.stream.player import stop

    yield Watched
    stop()


def train_state(seed, average=True):
    torch.manual_seed(seed)
    dit = DiT(MICRO.model)
    return TrainState.of({"student": dit}, {"student": 1e-3}, average={"student": 0.9} if average else None)


def test_the_newest_whole_student_is_found(tmp_path):
    newest = Newest(tmp_path, MICRO.model)
    assert newest.poll() is None
    folder = tmp_path / "checkpoints" / "student"
    state = train_state(1)
    state.step = 7
    file = save_checkpoint(folder, state)
    found = newest.poll()
    assert (found.step, found.file) == (7, file)
    mine = state.averages["student"].module.state_dict()
    assert all(torch.equal(mine[name], tensor) for name, tensor in found.dit.state_dict().items())
    assert newest.poll() is None
    (folder / "step-00000008.pt").write_bytes(file.read_bytes()[:1000])  # no card yet: it does not exist
    assert newest.poll() is None
    weights = checkpoint.save(tmp_path / "student.safetensors", train_state(2).models["student"], steps=9)
    assert newest.poll().step == 9
    weights.write_bytes(weights.read_bytes()[:-64])  # a copy that is still running, under an old card
    checkpoint.card_path(weights).touch()
    assert newest.poll() is None


def test_weights_of_another_model_are_told_once(tmp_path):
    torch.manual_seed(0)
    other = DiT(replace(MICRO.model, layers=1))
    checkpoint.save(tmp_path / "student.safetensors", other)
    newest = Newest(tmp_path, MICRO.model)
    with pytest.raises(ValueError, match="another model size"):
        newest.poll()
    assert newest.poll() is None
    save_checkpoint(tmp_path, TrainState.of({"critic": other}, {}))
    with pytest.raises(ValueError, match="holds no student, only critic"):
        newest.poll()


def test_a_player_follows_a_run(make, watched, tmp_path):
    session = make(steps=1)
    first = session.dit
    player = watched(session, follow=Newest(tmp_path, MICRO.model))
    player.wait(lambda: player.player._shown > 8)
    assert session.dit is first and "step" not in player.player.panel.header.value
    state = train_state(3)
    state.step = 1200
    save_checkpoint(tmp_path / "checkpoints", state)
    player.wait(lambda: "step 1,200" in player.player.panel.header.value)
    assert session.dit is not first
    seen = player.player._shown
    player.wait(lambda: player.player._shown > seen + 8)


def test_sliders_and_clips_reach_the_session(make, watched):
    session = make(steps=1)
    player = watched(session, scenes=[picture(), clip()])
    panel = player.player.panel
    assert (panel.window.min, panel.window.value, panel.sink.max) == (4, 4, 3)
    panel.window.value = 9
    panel.sink.value = 2
    panel.chunk.value = 2
    player.wait(lambda: (session.window, session.sink, session.chunk) == (9, 2, 2))
    assert "9" in panel.window_label.value
    panel.scenes[1].click()
    player.wait(lambda: len(session.recording().start) == 9 and session.pixel_frames > 20)
    assert player.player.playback.read_out().message == ""


def test_a_prompt_that_is_too_long_is_told_and_the_next_one_plays_on(make, watched):
    session = make(steps=1)
    player = watched(session)
    panel = player.player.panel
    player.wait(lambda: player.player._shown > 8)
    panel.prompt.value = "word " * 40
    player.wait(lambda: "text states" in panel.veil.value and 'role="alert"' in panel.veil.value)
    stood, prompt = session.pixel_frames, session.prompt
    panel.prompt.value = "a burning forest"
    player.wait(lambda: session.pixel_frames > stood + 8)
    assert prompt != session.prompt == "a burning forest"
    player.wait(lambda: 'role="alert"' not in panel.veil.value)
