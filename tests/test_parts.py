import pytest
import torch

from lingbot_nb import parts
from lingbot_nb.runs import Run


@pytest.fixture
def loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("LINGBOT_RUNS", str(tmp_path))
    return {preset: parts.load_dit(Run(preset, preset), "teacher.safetensors") for preset in ("tiny", "tiny-large")}


@torch.no_grad()
def test_the_large_preset_begins_where_the_tiny_one_ended(loaded):
    """Of the large preset no teacher is shipped: it is the tiny one's, deepened, and computes the same."""
    tiny, large = loaded["tiny"], loaded["tiny-large"]
    assert len(large.blocks) > len(tiny.blocks)
    draws = torch.Generator().manual_seed(0)
    latent, image, control = (torch.randn(1, c, 3, 4, 6, generator=draws) for c in (16, 20, 640))
    context = torch.randn(1, 9, tiny.size.text_dim, generator=draws)
    one, two = (
        dit(latent, torch.tensor([700.0]), condition_BCFHW=image, text=dit.text(context), camera=dit.film(control))
        for dit in (tiny, large)
    )
    assert one.std() > 0.1
    torch.testing.assert_close(two, one, rtol=0, atol=1e-5)
