"""The Wan VAE at a tiny width: diffusers' own network and name table are the oracles."""

import copy
import re
import weakref

import pytest
import torch
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

pytest.importorskip("diffusers")

from lingbot_nb.model.wan_vae import (
    LATENT_MEAN,
    LATENT_STD,
    WanVAE,
    diffusers_name,
    released_size,
    start_picture,
)
from lingbot_nb.presets import VideoShape
from lingbot_nb.stream.engine_memory import wan_maps

SECONDS = {"0": "norm1", "2": "conv1", "3": "norm2", "6": "conv2"}


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    torch.manual_seed(0)
    vae = WanVAE.build(base_dim=4)
    for parameter in vae.parameters():
        if parameter.ndim > 2:
            parameter.data.mul_(2)  # fresh weights fade out before they reach the far past
    return vae


# What is left in fp32 is the order of adding up, by processor: 1.1e-5 on one, less on those before it. fp64 has none.
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-7), (torch.float32, 2e-5), (torch.bfloat16, 0.05)])
def test_channels_last_decodes_to_the_same_pictures(vae, dtype, most):
    plain, turned = copy.deepcopy(vae).to(dtype), copy.deepcopy(vae).to(dtype).channels_last()
    conv = turned.model.decoder.conv_in.weight
    assert conv.is_contiguous(memory_format=torch.channels_last_3d) and not conv.is_contiguous()
    one, other = plain.decoder_stream(), turned.decoder_stream()
    for seed, frames in enumerate((1, 3, 2)):
        wanted, got = (stream.decode(latents(frames, seed)) for stream in (one, other))
        assert wanted.std() > 0.05 and (wanted - got).abs().max() < most


def test_channels_last_goes_through_the_decoder_without_being_turned_round(vae):
    """A GPU's convolutions answer in their weight's layout, and all that lies between them keeps it: but for the first
    one, and where pictures become twice as many."""
    turned, met = copy.deepcopy(vae).channels_last(), {}

    def answer(name, layout):
        def hook(conv, given, out):
            met[name] = given[0].is_contiguous(memory_format=layout)
            return out.contiguous(memory_format=layout)

        return hook

    for name, part in turned.model.decoder.named_modules():
        if isinstance(part, torch.nn.Conv2d | torch.nn.Conv3d):
            three = isinstance(part, torch.nn.Conv3d)
            part.register_forward_hook(answer(name, torch.channels_last_3d if three else torch.channels_last))
    turned.decode(latents(3))
    others = {name for name, kept in met.items() if not kept}
    assert len(met) > 30
    assert others == {"conv_in", "up_blocks.0.upsamplers.0.resample.1", "up_blocks.1.upsamplers.0.resample.1"}


def video(frames=9, seed=0, batch=1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, 3, frames, 16, 24, generator=generator) * 2 - 1


def latents(frames=4, seed=0, batch=1) -> torch.Tensor:
    return torch.randn(batch, 16, frames, 2, 3, generator=torch.Generator().manual_seed(seed))


def released_names(base_dim=4) -> dict[str, tuple[int, ...]]:
    """Tensors of the original file, written down from its architecture, with their shapes."""

    def conv(name, out, into, *kernel):
        found[f"{name}.weight"], found[f"{name}.bias"] = (out, into, *kernel), (out,)

    def residual(name, into, out):
        for norm, width in (("0", into), ("3", out)):
            found[f"{name}.residual.{norm}.gamma"] = (width, 1, 1, 1)
        conv(f"{name}.residual.2", out, into, 3, 3, 3)
        conv(f"{name}.residual.6", out, out, 3, 3, 3)
        if into != out:
            conv(f"{name}.shortcut", out, into, 1, 1, 1)

    def middle(name, width):
        residual(f"{name}.0", width, width)
        found[f"{name}.1.norm.gamma"] = (width, 1, 1)
        conv(f"{name}.1.to_qkv", 3 * width, width, 1, 1)
        conv(f"{name}.1.proj", width, width, 1, 1)
        residual(f"{name}.2", width, width)

    found: dict[str, tuple[int, ...]] = {}
    d = base_dim
    conv("encoder.conv1", d, 3, 3, 3, 3)
    into, index = d, 0
    for level, width in enumerate((d, 2 * d, 4 * d, 4 * d)):
        for _ in range(2):
            residual(f"encoder.downsamples.{index}", into, width)
            into, index = width, index + 1
        if level < 3:
            conv(f"encoder.downsamples.{index}.resample.1", width, width, 3, 3)
            if level:
                conv(f"encoder.downsamples.{index}.time_conv", width, width, 3, 1, 1)
            index += 1
    middle("encoder.middle", 4 * d)
    found["encoder.head.0.gamma"] = (4 * d, 1, 1, 1)
    conv("encoder.head.2", 32, 4 * d, 3, 3, 3)
    conv("conv1", 32, 32, 1, 1, 1)
    conv("conv2", 16, 16, 1, 1, 1)
    conv("decoder.conv1", 4 * d, 16, 3, 3, 3)
    middle("decoder.middle", 4 * d)
    into, index = 4 * d, 0
    for level, width in enumerate((4 * d, 4 * d, 2 * d, d)):
        for _ in range(3):
            residual(f"decoder.upsamples.{index}", into, width)
            into, index = width, index + 1
        if level < 3:
            conv(f"decoder.upsamples.{index}.resample.1", width // 2, width, 3, 3)
            if level < 2:
                conv(f"decoder.upsamples.{index}.time_conv", 2 * width, width, 3, 1, 1)
            into, index = width // 2, index + 1
    found["decoder.head.0.gamma"] = (d, 1, 1, 1)
    conv("decoder.head.2", 3, d, 3, 3, 3)
    return found


def released_state(vae: WanVAE) -> dict[str, torch.Tensor]:
    there = vae.model.state_dict()
    return {name: there[diffusers_name(name)].clone() for name in released_names()}


def test_names_and_shapes_cover_the_network(vae):
    there = {name: tuple(tensor.shape) for name, tensor in vae.model.state_dict().items()}
    assert {diffusers_name(name): shape for name, shape in released_names().items()} == there
    assert len(there) == 194
    assert all(diffusers_name(name) == name for name in there)


def test_names_are_diffusers_own_conversion():
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    for name in released_names():
        assert next(iter(convert_wan_vae_to_diffusers({name: 0}))) == diffusers_name(name)


def test_scale_is_the_networks_own(vae):
    assert (tuple(vae.model.config.latents_mean), tuple(vae.model.config.latents_std)) == (LATENT_MEAN, LATENT_STD)
    mean, std = torch.tensor(LATENT_MEAN).view(16, 1, 1, 1), torch.tensor(LATENT_STD).view(16, 1, 1, 1)
    expected = (vae.model.encode(video()).latent_dist.mean - mean) / std
    torch.testing.assert_close(vae.encode(video()), expected)
    torch.testing.assert_close(vae.unscale(vae.encode(video())), vae.model.encode(video()).latent_dist.mean)


@pytest.mark.parametrize("pieces", [(1,) * 6, (6,), (1, 2, 3), (4, 2)])
def test_streaming_equals_the_whole_clip(vae, pieces):
    clip = latents(6, batch=2)
    whole = vae.model.decode(vae.unscale(clip)).sample
    stream = vae.decoder_stream()
    parts = [stream.decode(part) for part in clip.split(pieces, dim=2)]
    assert [part.shape[2] for part in parts] == [4 * n - 3 * (i == 0) for i, n in enumerate(pieces)]
    ours = vae.decode(clip)
    assert torch.equal(torch.cat(parts, dim=2), ours)
    # diffusers multiplies the whole clip at once before it goes frame by frame: on some processors that rounds anew.
    torch.testing.assert_close(ours, whole, atol=1e-4, rtol=0)
    assert whole.std() > 0.01
    stream.reset()
    assert torch.equal(stream.decode(clip[:, :, :2]), ours[:, :, :5])


def test_two_streams_do_not_meet(vae):
    one, two = latents(3, seed=1), latents(3, seed=2)
    first, second = vae.decoder_stream(), vae.decoder_stream()
    pairs = [(first.decode(a), second.decode(b)) for a, b in zip(one.split(1, 2), two.split(1, 2), strict=True)]
    assert torch.equal(torch.cat([a for a, _ in pairs], 2), vae.decode(one))
    assert torch.equal(torch.cat([b for _, b in pairs], 2), vae.decode(two))


def test_a_stream_is_restored_from_the_latents_it_saw(vae):
    clip = latents(vae.decoder_reach + 12)
    stream = vae.decoder_stream()
    stream.decode(clip[:, :, :-4])
    other = vae.decoder_stream()
    other.load_state_dict(stream.state_dict())
    assert stream.state_dict()["past"].shape[2] == vae.decoder_reach == 41
    assert torch.equal(other.decode(clip[:, :, -4:]), stream.decode(clip[:, :, -4:]))
    other.load_state_dict(vae.decoder_stream().state_dict())
    assert other.decode(clip[:, :, :1]).shape[2] == 1


def test_the_image_condition_is_the_whole_clip_encoded(vae):
    assert vae.encoder_reach == 28
    image, frames = video(1)[:, :, 0], 33
    clip = torch.cat([image[:, :, None], torch.zeros(1, 3, 4 * (frames - 1), 16, 24)], dim=2)
    condition = vae.image_condition(image, frames)
    assert condition.shape == (1, 20, frames, 2, 3)
    torch.testing.assert_close(condition[:, 4:], vae.encode(clip))
    assert condition[:, :4, 0].eq(1).all() and condition[:, :4, 1:].eq(0).all()
    torch.testing.assert_close(vae.image_condition(image, 3)[:, 4:], vae.encode(clip[:, :, :9]))


@pytest.mark.parametrize(
    ("image", "area", "latent"),
    [
        ((480, 832), 480 * 832, (58, 104)),
        ((720, 1280), 480 * 832, (58, 104)),
        ((2894, 5145), 480 * 832, (58, 104)),
        ((720, 1280), 720 * 1280, (90, 160)),
        ((3648, 5472), 480 * 832, (64, 96)),
        ((1280, 720), 480 * 832, (104, 58)),
        ((512, 512), 480 * 832, (78, 78)),
    ],
)
def test_clips_are_laid_out_as_released(image, area, latent):
    height, width = released_size(*image, area)
    assert (height // 8, width // 8) == latent
    shape = VideoShape(height, width, 81)
    assert shape.tokens_per_frame == latent[0] * latent[1] // 4


def test_a_start_picture_is_resized_and_not_cropped():
    image = torch.arange(0, 250, 2, dtype=torch.uint8)[:, None, None].expand(-1, 80, 3)
    picture = start_picture(image, 64 * 48)
    assert picture.shape == (1, 3, *released_size(125, 80, 64 * 48)) and picture.dtype == torch.float32
    assert picture[0, 0, 0, 0] == pytest.approx(-1, abs=0.02) and picture[0, 0, -1, 0] == pytest.approx(0.945, abs=0.02)
    grey = torch.full((37, 53, 3), 255, dtype=torch.uint8)
    torch.testing.assert_close(start_picture(grey, 32 * 32), torch.ones(1, 3, *released_size(37, 53, 32 * 32)))
    with pytest.raises(ValueError, match="give uint8 .height, width, 3"):
        start_picture(image.float())
    with pytest.raises(ValueError, match="hold no whole token"):
        released_size(10, 1000, 16 * 16)
    with pytest.raises(ValueError, match="use sizes above 0"):
        released_size(0, 10)


def test_released_and_diffusers_files_load(vae, tmp_path):
    torch.save(released_state(vae), tmp_path / "Wan2.1_VAE.pth")
    (tmp_path / "repo/vae").mkdir(parents=True)
    save_file(vae.model.state_dict(), tmp_path / "repo/vae/diffusion_pytorch_model.safetensors")
    for path in (tmp_path, tmp_path / "Wan2.1_VAE.pth", tmp_path / "repo"):
        loaded = WanVAE.from_file(path)
        assert torch.equal(loaded.decode(latents()), vae.decode(latents()))
        assert torch.equal(loaded.encode(video()), vae.encode(video()))
        assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_bfloat16_stays_near(vae, tmp_path):
    torch.save(released_state(vae), tmp_path / "Wan2.1_VAE.pth")
    half = WanVAE.from_file(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.decode(latents()).dtype == torch.float32
    assert (half.decode(latents()) - vae.decode(latents())).abs().mean() < 0.02


def test_what_does_not_fit_is_told(vae, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds none of Wan2.1_VAE.pth, .*: give the VAE's file"):
        WanVAE.from_file(tmp_path)
    state = released_state(vae)
    state["decoder.extra"] = torch.zeros(1)
    del state["decoder.head.0.gamma"]
    torch.save(state, tmp_path / "Wan2.1_VAE.pth")
    sentence = "1 missing, first decoder.norm_out.gamma; 1 unexpected, first decoder.extra"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        WanVAE.from_file(tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(ValueError, match="not the weights of the Wan 2.1 VAE"):
        WanVAE.from_file(tmp_path)
    with pytest.raises(ValueError, match="6 pixel frames are not 4n . 1"):
        vae.encode(video(6))
    stream = vae.decoder_stream()
    stream.decode(latents())
    with pytest.raises(ValueError, match=r"do not continue a stream .* reset\(\) before"):
        stream.decode(latents(batch=2))
    with pytest.raises(ValueError, match="are not .batch, 16, frames"):
        stream.decode(torch.zeros(1, 4, 1, 2, 3))


class Watched(TorchDispatchMode):
    """Bytes of all tensors that were made and still live, and the most there ever were."""

    def __init__(self):
        super().__init__()
        self.sizes, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, call, types, args=(), kwargs=None):
        made = call(*args, **(kwargs or {}))
        for tensor in (part for part in tree_iter(made) if isinstance(part, torch.Tensor)):
            storage = tensor.untyped_storage()
            place = storage.data_ptr()
            if place and place not in self.sizes:
                self.sizes[place] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, place)
        self.most = max(self.most, self.now)
        return made

    def _freed(self, place):
        self.now -= self.sizes.pop(place, 0)


@torch.no_grad()
def test_what_decoding_is_said_to_hold_is_what_it_holds():
    """At the released width, in 32-bit numbers."""
    shape = VideoShape(64, 96, 9)
    stream = WanVAE.build().channels_last().decoder_stream()
    latent = torch.randn(1, 16, 1, 8, 12)
    with Watched() as watched:
        for _ in range(3):
            stream.advance(latent)
    assert watched.most == pytest.approx(wan_maps(shape, 4), rel=0.04)
    kept = sum(part.numel() for part in stream._features if isinstance(part, torch.Tensor))
    assert watched.now == pytest.approx(4 * kept, rel=0.02)
