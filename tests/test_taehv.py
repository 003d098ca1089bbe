"""The tiny autoencoder: against one written as plain loops over frames, and against itself in pieces."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from lingbot_nb.model.taehv import TAEHV, Paired

SMALL = (16, 12, 8, 8)


@pytest.fixture(scope="module")
def vae() -> TAEHV:
    torch.manual_seed(0)
    vae = TAEHV(SMALL, 8).eval().requires_grad_(False)
    for parameter in vae.parameters():
        parameter.mul_(1.7 if parameter.ndim > 1 else 1)  # fresh weights fade out, layer by layer
    vae.decoder[22].bias.fill_(0.5)
    return vae


def latents(frames=4, seed=0, batch=1) -> torch.Tensor:
    return 2 * torch.randn(batch, 16, frames, 2, 3, generator=torch.Generator().manual_seed(seed))


class Loops:
    """The public layout, frame by frame and layer by layer, from a state dict alone."""

    def __init__(self, state, half):
        self.state = {name.removeprefix(f"{half}."): t for name, t in state.items() if name.startswith(half)}

    def conv(self, name, x, **options):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), **options)

    def memory(self, index, frames):
        out = []
        for i, x in enumerate(frames):
            h = torch.cat([x, frames[i - 1] if i else torch.zeros_like(x)], dim=1)
            for place in (0, 2, 4):
                h = self.conv(f"{index}.conv.{place}", F.relu(h) if place else h, padding=1)
            out.append(F.relu(h + x))
        return out

    def decode(self, frames):
        frames = [F.relu(self.conv(1, 3 * torch.tanh(x / 3), padding=1)) for x in frames]
        for start, stride in ((3, 1), (9, 2), (15, 2)):
            for index in range(start, start + 3):
                frames = self.memory(index, frames)
            frames = [F.interpolate(x, scale_factor=2) for x in frames]
            frames = [part for x in frames for part in self.conv(f"{start + 4}.conv", x).chunk(stride, dim=1)]
            frames = [self.conv(start + 5, x, padding=1) for x in frames]
        return [self.conv(22, F.relu(x), padding=1).clamp(0, 1) for x in frames]

    def encode(self, frames):
        frames = [F.relu(self.conv(0, x, padding=1)) for x in frames]
        for start, stride in ((2, 2), (7, 2), (12, 1)):
            groups = [torch.cat(frames[i : i + stride], dim=1) for i in range(0, len(frames), stride)]
            frames = [self.conv(start + 1, self.conv(f"{start}.conv", x), padding=1, stride=2) for x in groups]
            for index in range(start + 2, start + 5):
                frames = self.memory(index, frames)
        return [self.conv(17, x, padding=1) for x in frames]


def test_decoding_is_the_loops(vae):
    clip = latents(5, batch=2)
    frames = Loops(vae.state_dict(), "decoder").decode(list(clip.unbind(2)))
    video = vae.decode(clip)
    assert video.shape == (2, 3, 17, 16, 24)
    torch.testing.assert_close(video, torch.stack(frames[3:], dim=2) * 2 - 1)
    assert video.std() > 0.01


def test_encoding_is_the_loops(vae):
    video = torch.rand(1, 3, 9, 16, 24) * 2 - 1
    frames = [(video[:, :, min(i, 8)] + 1) / 2 for i in range(12)]
    expected = torch.stack(Loops(vae.state_dict(), "encoder").encode(frames), dim=2)
    torch.testing.assert_close(vae.encode(video), expected)
    assert expected.shape == (1, 16, 3, 2, 3)
    with pytest.raises(ValueError, match="8 pixel frames are not 4n . 1"):
        vae.encode(video[:, :, :8])


@pytest.mark.parametrize("pieces", [(1,) * 6, (6,), (1, 2, 3), (4, 2)])
def test_streaming_equals_the_whole_clip(vae, pieces):
    clip, stream = latents(6), vae.decoder_stream()
    parts = [stream.decode(part) for part in clip.split(pieces, dim=2)]
    assert [part.shape[2] for part in parts] == [4 * n - 3 * (i == 0) for i, n in enumerate(pieces)]
    assert torch.equal(torch.cat(parts, dim=2), vae.decode(clip))
    stream.reset()
    torch.testing.assert_close(stream.decode(clip[:, :, :1]), vae.decode(clip[:, :, :1]))


def test_a_stream_is_restored_from_the_latents_it_saw(vae):
    clip, stream, other = latents(20), vae.decoder_stream(), vae.decoder_stream()
    stream.decode(clip[:, :, :-3])
    assert stream.state_dict()["past"].shape[2] == 8
    other.load_state_dict(stream.state_dict())
    torch.testing.assert_close(other.decode(clip[:, :, -3:]), stream.decode(clip[:, :, -3:]))


def test_a_pair_encodes_with_one_and_decodes_with_the_other(vae):
    torch.manual_seed(1)
    pair = Paired(TAEHV(SMALL, 8), vae)
    video = torch.rand(1, 3, 5, 16, 24)
    assert torch.equal(pair.encode(video), pair.encoder.encode(video))
    assert torch.equal(pair.decoder_stream().decode(latents()), vae.decode(latents()))
    assert torch.equal(pair.decode(latents()), vae.decode(latents()))


def test_true_size():
    with torch.device("meta"):
        vae = TAEHV()
    assert sum(p.numel() for p in vae.decoder.parameters()) == pytest.approx(9.9e6, rel=0.01)
    assert vae.decoder[3].conv[0].weight.shape == (256, 512, 3, 3)
    assert {name.split(".")[1] for name in vae.state_dict() if name.startswith("decoder")} == {
        str(i) for i in (1, 3, 4, 5, 7, 8, 9, 10, 11, 13, 14, 15, 16, 17, 19, 20, 22)
    }


def test_files_load(vae, tmp_path):
    state = vae.state_dict()
    torch.save(state, tmp_path / "taew2_1.pth")
    save_file(state, tmp_path / "taew2_1.safetensors")
    for path in tmp_path.iterdir():
        assert torch.equal(TAEHV.from_file(path).decode(latents()), vae.decode(latents()))
    assert TAEHV.from_file(path, dtype=torch.bfloat16).decode(latents()).dtype == torch.float32


def test_layers_that_grow_too_much_are_cut_to_the_last_frames(vae, tmp_path):
    state = vae.state_dict()
    state["decoder.7.conv.weight"] = torch.cat([torch.zeros(16, 16, 1, 1), state["decoder.7.conv.weight"]])
    torch.save(state, tmp_path / "x.pth")
    assert torch.equal(TAEHV.from_file(tmp_path / "x.pth").decode(latents()), vae.decode(latents()))


def test_other_names_need_a_table(vae, tmp_path):
    names = {f"tae.{name}": name for name in vae.state_dict()}
    save_file({theirs: vae.state_dict()[ours] for theirs, ours in names.items()}, tmp_path / "x.safetensors")
    assert torch.equal(
        TAEHV.from_file(tmp_path / "x.safetensors", names=names).decode(latents()), vae.decode(latents())
    )
    with pytest.raises(ValueError, match="give taew2_1 weights, or a table of names"):
        TAEHV.from_file(tmp_path / "x.safetensors")
    state = vae.state_dict()
    del state["decoder.22.bias"]
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="1 tensors differ, first decoder.22.bias"):
        TAEHV.from_file(tmp_path / "x.pth")
    with pytest.raises(FileNotFoundError, match="nothing.pth does not exist"):
        TAEHV.from_file(tmp_path / "nothing.pth")
