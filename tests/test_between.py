"""The mean of two decoders: exact at its ends and half way, from the command line, and only of one encoder's."""

import pytest
import torch

from lingbot_nb.distill import between
from lingbot_nb.model import checkpoint
from lingbot_nb.model.vae import TinyVAE, VAESize

SIZE = VAESize((8, 12, 16), (1, 1, 1), (16, 8, 4), (1, 1, 1))


def two() -> tuple[TinyVAE, TinyVAE]:
    """Tokenizers of one encoder whose decoders differ everywhere."""
    torch.manual_seed(0)
    first, second = TinyVAE(SIZE), TinyVAE(SIZE)
    second.encoder.load_state_dict(first.encoder.state_dict())
    with torch.no_grad():
        for value in second.decoder.parameters():
            value.add_(1)
    return first, second


@pytest.mark.parametrize("part", (0.0, 0.25, 1.0))
def test_a_decoder_lies_as_far_between_as_was_said(part):
    first, second = two()
    made, ours, theirs = (vae.state_dict() for vae in (between.between(first, second, part), first, second))
    for name, value in made.items():
        wanted = ours[name] if not name.startswith("decoder.") else (1 - part) * ours[name] + part * theirs[name]
        assert torch.allclose(value, wanted, atol=1e-6), name


def test_from_the_command_line_the_card_tells_of_both(tmp_path, monkeypatch, capsys):
    files = []
    for name, vae in zip("ab", two(), strict=True):
        card = dict(preset="tiny", kind="tokenizer", size=SIZE.__dict__, seconds=3.0)
        files.append(str(checkpoint.save(tmp_path / name / "vae.safetensors", vae, **card)))
    monkeypatch.setattr("sys.argv", ["between", *files, "--part", "0.75", "--out", str(tmp_path / "c")])
    between.main()
    file = tmp_path / "c" / "vae.safetensors"
    card, made = checkpoint.read_card(file), TinyVAE.from_file(file)
    assert [told["sha256"] for told in card["between"]] == [checkpoint.read_card(f)["sha256"] for f in files]
    assert card["part"] == 0.75 and card["kind"] == "tokenizer" and "--part 0.75" in card["command"]
    assert "seconds" not in card, "nothing was trained"
    ours, theirs = (TinyVAE.from_file(f).state_dict() for f in files)
    for name, value in made.state_dict().items():
        wanted = 0.25 * ours[name] + 0.75 * theirs[name] if name.startswith("decoder.") else ours[name]
        assert torch.allclose(value, wanted, atol=1e-2), name
    assert "0.75 of the way" in capsys.readouterr().out


def test_what_has_no_mean_is_refused():
    first, second = two()
    with pytest.raises(ValueError, match="part 1.5 lies beyond"):
        between.between(first, second, 1.5)
    with pytest.raises(ValueError, match="different latents .*latent_std differs"):
        second.latent_std.fill_(0.5)
        between.between(first, second, 0.5)
    with pytest.raises(ValueError, match="two sizes"):
        between.between(first, TinyVAE(VAESize((8, 12, 16), (1, 1, 1), (24, 8, 4), (1, 1, 1))), 0.5)
