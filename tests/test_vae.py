"""The tiny tokenizer's geometry, causality and streaming."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lingbot_nb.model.vae import MICRO_VAE, TinyVAE, VAESize, from_uint8, to_uint8
from lingbot_nb.presets import MICRO, TINY


def random_vae(size: VAESize = MICRO_VAE, seed: int = 0) -> TinyVAE:
    """Weights without the identity start, so that every path carries something."""
    torch.manual_seed(seed)
    vae = TinyVAE(size).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.normal_(0, 0.15)
        vae.latent_mean.normal_()
        vae.latent_std.uniform_(0.5, 2)
    return vae


def random_video(shape=MICRO.shape, batch: int = 1, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, shape.pixel_frames, shape.height, shape.width, generator=generator) * 2 - 1


@pytest.fixture(scope="module")
def vae():
    return random_vae()


@pytest.mark.parametrize("pixel_frames", [1, 5, 21])
def test_sizes_follow_the_video_shape(vae, pixel_frames):
    shape = MICRO.shape.with_frames((pixel_frames - 1) // 4 + 1)
    latents = vae.encode(random_video(shape, batch=2))
    assert latents.shape == (2, 16, shape.frames, shape.latent_height, shape.latent_width)
    assert vae.decode(latents).shape == (2, 3, pixel_frames, shape.height, shape.width)


def test_default_size_ships_small():
    parameters = sum(parameter.numel() for parameter in TinyVAE().parameters())
    assert 2 * parameters <= 12e6  # bytes in bfloat16
    assert TinyVAE().encode(random_video(TINY.shape.with_frames(1))).shape == (1, 16, 1, 12, 20)


def test_encoder_sees_one_group_at_a_time(vae):
    video = random_video()
    latents = vae.encode(video)
    for frame in range(1, MICRO.shape.frames):
        group = video[:, :, 4 * frame - 3 : 4 * frame + 1]
        alone = vae.encode(torch.cat([torch.zeros_like(group[:, :, :1]), group], dim=2))[:, :, 1]
        assert torch.equal(alone, latents[:, :, frame])
    still = video[:, :, :1].expand(-1, -1, 5, -1, -1)
    assert torch.equal(vae.encode(still)[:, :, 0], vae.encode(still)[:, :, 1])


def test_channels_of_a_group_are_frames_then_colours(vae):
    video = random_video(MICRO.shape.with_frames(2))
    stacked = np.concatenate([video.numpy()[0, :, n] for n in (1, 2, 3, 4)])
    mean = vae.encoder(torch.from_numpy(stacked)[None])[:, :16]
    expected = (mean - vae.latent_mean[:, None, None]) / vae.latent_std[:, None, None]
    torch.testing.assert_close(vae.encode(video)[:, :, 1], expected.detach(), rtol=1e-4, atol=1e-5)


def test_encode_is_deterministic_and_carries_no_gradient(vae):
    video = random_video()
    assert torch.equal(vae.encode(video), vae.encode(video))
    assert not vae.encode(video).requires_grad


@pytest.mark.parametrize("memory", [0, 1, 2])
def test_decoder_looks_back_as_far_as_its_memory(memory):
    vae = random_vae(VAESize((8, 12, 16), (1, 1, 1), (16, 12, 8), (1, 1, 1), memory=memory))
    latents = torch.randn(1, 16, 6, 4, 6, generator=torch.Generator().manual_seed(2))
    changed = latents.clone()
    changed[:, :, 2] += 1
    moved = (vae.decode(latents) - vae.decode(changed)).abs().amax(dim=(0, 1, 3, 4))
    touched = {(n + 3) // 4 for n in range(21) if moved[n] > 0}
    assert touched == set(range(2, 2 + memory + 1))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4), st.integers(0, 2))
def test_streaming_is_whole_clip_decoding_bit_for_bit(pieces, memory):
    vae = random_vae(VAESize((8, 12, 16), (1, 1, 1), (16, 12, 8), (1, 1, 1), memory=memory))
    latents = torch.randn(2, 16, sum(pieces), 2, 3, generator=torch.Generator().manual_seed(3))
    whole = vae.decode(latents)
    stream = vae.decoder_stream()
    parts = [stream.decode(piece) for piece in latents.split(pieces, dim=2)]
    assert [part.shape[2] for part in parts] == [4 * n - 3 * (i == 0) for i, n in enumerate(pieces)]
    assert torch.equal(torch.cat(parts, dim=2), whole)
    stream.reset()
    assert torch.equal(stream.decode(latents), whole)


def test_decode_is_the_training_pass_without_the_start_copies(vae):
    latents = torch.randn(2, 16, 5, 4, 6, generator=torch.Generator().manual_seed(4))
    together = vae.decode_groups(vae.unscale(latents))[:, :, 3:].clamp(-1, 1)
    assert together.shape[2] == 17
    torch.testing.assert_close(vae.decode(latents), together.detach(), rtol=0, atol=1e-5)


def test_the_default_size_streams_bit_for_bit_too():
    vae = random_vae(VAESize())
    latents = 0.1 * torch.randn(1, 16, 3, 12, 20, generator=torch.Generator().manual_seed(5))
    stream = vae.decoder_stream()
    parts = torch.cat([stream.decode(piece) for piece in latents.split(1, dim=2)], dim=2)
    assert torch.equal(parts, vae.decode(latents))
    assert parts.std() > 0.01


def test_a_stream_refuses_another_picture_size_until_reset(vae):
    stream = vae.decoder_stream()
    stream.decode(torch.zeros(1, 16, 1, 4, 6))
    with pytest.raises(ValueError, match="do not continue a stream.*reset"):
        stream.decode(torch.zeros(1, 16, 1, 4, 8))
    with pytest.raises(ValueError, match="do not continue a stream"):
        stream.decode(torch.zeros(2, 16, 1, 4, 6))
    stream.reset()
    assert stream.decode(torch.zeros(1, 16, 1, 4, 8)).shape == (1, 3, 1, 32, 64)


def test_calibration_scales_latents_and_leaves_pictures_alone():
    vae = random_vae()
    video = random_video(batch=3)
    before = vae.decode(vae.encode(video))
    vae.calibrate(vae.encode(video))
    latents = vae.encode(video).transpose(0, 1).flatten(1)
    torch.testing.assert_close(latents.mean(dim=1), torch.zeros(16), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(dim=1), torch.ones(16), atol=1e-3, rtol=0)
    torch.testing.assert_close(vae.decode(vae.encode(video)), before, atol=1e-4, rtol=0)
    scale = vae.latent_std.clone()
    vae.calibrate(vae.encode(video))
    torch.testing.assert_close(vae.latent_std, scale, rtol=1e-4, atol=0)


def test_calibration_refuses_a_dead_channel(vae):
    latents = torch.randn(2, 16, 3, 2, 2)
    latents[:, 5] = 1
    with pytest.raises(ValueError, match="channel 5 is constant"):
        vae.calibrate(latents)


def test_scale_travels_with_the_weights(vae):
    copy = TinyVAE(MICRO_VAE)
    copy.load_state_dict(vae.state_dict())
    video = random_video()
    assert torch.equal(copy.encode(video), vae.encode(video))


def test_image_condition_is_the_encoded_image_and_grey_clip(vae):
    image = random_video(batch=2)[:, :, 0]
    grey = torch.zeros(2, 3, 16, *image.shape[2:])
    clip = torch.cat([image[:, :, None], grey], dim=2)
    condition = vae.image_condition(image, frames=5)
    assert condition.shape == (2, 20, 5, 4, 6)
    assert torch.equal(condition[:, :4, 0], torch.ones(2, 4, 4, 6))
    assert torch.equal(condition[:, :4, 1:], torch.zeros(2, 4, 4, 4, 6))
    torch.testing.assert_close(condition[:, 4:], vae.encode(clip), rtol=0, atol=1e-5)
    assert torch.equal(vae.image_condition(image, frames=1), condition[:, :, :1])


def test_half_precision_weights_answer_in_float(vae):
    half = random_vae().bfloat16()
    video = random_video()
    latents = half.encode(video)
    assert latents.dtype == torch.float32
    decoded = half.decode(latents)
    assert decoded.dtype == torch.float32
    assert (decoded - vae.decode(vae.encode(video))).abs().mean() < 0.05


def test_pixels_survive_the_float_range():
    frames = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 2, 8, 16, 3)
    video = from_uint8(frames)
    assert video.shape == (1, 3, 2, 8, 16)
    assert video.min() == -1 and video.max() == 1
    assert torch.equal(to_uint8(video), frames)
    assert to_uint8(torch.tensor([-9.0, 9.0, 0.0]).view(1, 3, 1, 1, 1)).flatten().tolist() == [0, 255, 128]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 4, 32, 48), "4 pixel frames are not 4n"),
        ((1, 3, 5, 30, 48), "30x48 do not divide"),
        ((1, 1, 5, 32, 48), "not \\[batch, 3"),
        ((3, 5, 32, 48), "not \\[batch, 3"),
    ],
)
def test_videos_that_do_not_fit_are_refused(vae, shape, message):
    with pytest.raises(ValueError, match=message):
        vae.encode(torch.zeros(shape))


def test_latents_that_do_not_fit_are_refused(vae):
    with pytest.raises(ValueError, match="not \\[batch, 16"):
        vae.decode(torch.zeros(1, 8, 1, 4, 6))
    with pytest.raises(ValueError, match="frames >= 1"):
        vae.decode(torch.zeros(1, 16, 0, 4, 6))
    with pytest.raises(ValueError, match="0 latent frames"):
        vae.image_condition(torch.zeros(1, 3, 32, 48), 0)


def test_a_card_tells_the_size_and_one_that_does_not_is_older_than_the_default():
    size = VAESize((8, 12, 16), (1, 1, 1), (24, 8, 4), (1, 2, 1), memory=2)
    assert VAESize.of_card(json.loads(json.dumps({"size": asdict(size)}))) == size
    old = VAESize.of_card({"kind": "tokenizer"})
    assert old.decoder_widths == (192, 128, 96) and old.decoder_depths == (3, 2, 3) and old != VAESize()


def test_sizes_need_three_resolutions():
    with pytest.raises(ValueError, match="three numbers each"):
        VAESize(decoder_widths=(8, 8))
    with pytest.raises(ValueError, match="negative"):
        VAESize(memory=-1)
