"""Released weights, played: imitations of a release through the engine, alone and on two processes."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from test_released import CAM, base, shard, state

from lingbot_nb.control.keys import KEYS
from lingbot_nb.model.dit import DiT
from lingbot_nb.model.released import COMPANIONS
from lingbot_nb.model.taehv import TAEHV
from lingbot_nb.model.wan_vae import WanVAE
from lingbot_nb.presets import LINGBOT, StreamSettings
from lingbot_nb.stream import lingbot
from lingbot_nb.stream.engine import SMALL
from lingbot_nb.stream.playback import play_script
from lingbot_nb.stream.remote import RemoteSession
from lingbot_nb.stream.session import Session

pytest.importorskip("diffusers")
STREAM = StreamSettings(chunk=1, window=4, sink=1, image_first=False)
PICTURE = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)


class Words:
    """Prompts as seeded noise: one word, one row."""

    def encode(self, prompt):
        draws = (torch.Generator().manual_seed(len(word)) for word in prompt.split())
        return torch.stack([torch.randn(CAM.text_dim, generator=draw) for draw in draws])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One DiT of small numbers, a narrow Wan VAE and a TAEHV."""
    place = tmp_path_factory.mktemp("release")
    dit = {name: 0.05 * tensor for name, tensor in state(CAM).items()}
    shard(dit, place, config={"num_heads": 2, "num_layers": 2, "text_len": 16})
    torch.manual_seed(0)
    torch.save(WanVAE.build(base_dim=4).model.state_dict(), place / COMPANIONS["VAE"])
    save_file(TAEHV((16, 8, 8, 8), 8).state_dict(), place / "taehv.safetensors")
    return place


def options(folder, **changes):
    given = dict(start_image=PICTURE, prompt="a harbour at dawn", height=32, width=48, stream=STREAM, steps=2, seed=3)
    given |= dict(decoder=folder / "taehv.safetensors", speed=SMALL, dtype=torch.float32, text=Words())
    return given | changes


def test_a_release_plays_as_its_dit_does(folder):
    session = lingbot.open_release(folder, **options(folder))
    assert session.keys == KEYS and session.preset.model == CAM and session.next_frames == 1
    film = play_script(session, "w-5,l-8")
    assert film.shape == (14, 32, 48, 3) and film.std() > 1

    dit = DiT(CAM)
    dit.load_state_dict({name: 0.05 * tensor for name, tensor in state(CAM).items()})
    preset = lingbot.preset_for(CAM, 32, 48, STREAM)
    told = dict(start_image=PICTURE, prompt="a harbour at dawn", steps=2, seed=3)
    plain = play_script(Session(preset, dit, session.vae, Words(), **told), "w-5,l-8")
    assert np.abs(plain.astype(int) - film).max() <= 1


def test_a_release_starts_again_and_goes_on_from_a_saved_state(folder, tmp_path):
    session = lingbot.open_release(folder, **options(folder))
    film = play_script(session, "w-5,l-4")
    session.save(tmp_path / "state.safetensors")
    rest = play_script(session, "l-4")
    session.reset()
    assert np.array_equal(play_script(session, "w-5,l-4"), film)
    session.load(tmp_path / "state.safetensors")
    assert np.array_equal(play_script(session, "l-4"), rest)


def test_two_processes_play_a_release(folder):
    build = partial(lingbot.rank_release, folder=folder, **options(folder))
    with RemoteSession(build, 2) as away:
        film = play_script(away, "w-5,l-8")
    assert np.abs(play_script(build(0, 1), "w-5,l-8").astype(int) - film).max() <= 1


def test_without_a_fast_decoder_the_wan_vae_decodes(folder):
    session = lingbot.open_release(folder, **options(folder, decoder=None))
    assert isinstance(session.vae, WanVAE) and play_script(session, "w-5").shape == (6, 32, 48, 3)
    weight = session.vae.model.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last_3d) and not weight.is_contiguous()


def test_a_size_without_a_preset_takes_lingbots_schedule():
    preset = lingbot.preset_for(CAM, 32, 48)
    assert preset.model == CAM and preset.flow == LINGBOT.flow and preset.stream == LINGBOT.stream
    assert lingbot.preset_for(LINGBOT.model, 720, 1280) == replace(
        LINGBOT, shape=replace(LINGBOT.shape, height=720, width=1280)
    )


def test_what_is_missing_is_told_before_weights_are_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(lingbot.released, "load_dit", lambda *_, **__: pytest.fail("weights were read"))
    two = base(tmp_path / "two")
    with pytest.raises(ValueError, match="high_noise_model, low_noise_model.*name one"):
        lingbot.open_release(two, **options(folder))
    bare = shard(state(CAM), tmp_path / "bare", config={"num_heads": 2, "num_layers": 2, "text_len": 16})
    with pytest.raises(FileNotFoundError, match="has no Wan2.1_VAE.pth"):
        lingbot.open_release(bare, **options(folder))
    with pytest.raises(FileNotFoundError, match="start"):
        lingbot.open_release(folder, **options(folder, start_image=tmp_path / "start.png"))
