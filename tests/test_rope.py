import cmath

import pytest
import torch

from lingbot_nb.model import rope
from lingbot_nb.model.rope import apply_rope, axis_dims, fresh_rope_table, rope_table


def by_hand(x_BLND, positions, grid_hw):
    """Every pair of every token turned with Python's complex numbers."""
    out = x_BLND.double().clone()
    dims = axis_dims(x_BLND.shape[-1])
    tokens = [(p, r, c) for p in positions for r in range(grid_hw[0]) for c in range(grid_hw[1])]
    for token, place in enumerate(tokens):
        angles = [at * 10_000.0 ** (-2 * j / dim) for at, dim in zip(place, dims, strict=True) for j in range(dim // 2)]
        for pair, angle in enumerate(angles):
            turn = cmath.exp(1j * angle)
            real, imaginary = out[:, token, :, 2 * pair].clone(), out[:, token, :, 2 * pair + 1].clone()
            out[:, token, :, 2 * pair] = real * turn.real - imaginary * turn.imag
            out[:, token, :, 2 * pair + 1] = real * turn.imag + imaginary * turn.real
    return out


def test_released_head_splits_44_42_42():
    assert axis_dims(128) == (44, 42, 42)


@pytest.mark.parametrize("head_dim", [24, 32, 64, 10])
@pytest.mark.parametrize("positions", [range(3), [5, 1023, 1024], [0, 1, 0, 1]])
def test_matches_complex_arithmetic(head_dim, positions):
    x = torch.randn(2, len(positions) * 6, 2, head_dim)
    turned = apply_rope(x, rope_table(positions, (2, 3), head_dim))
    torch.testing.assert_close(turned.double(), by_hand(x, positions, (2, 3)), atol=2e-6, rtol=0)


def test_compiled_form_equals_eager_form(monkeypatch):
    x, table = torch.randn(1, 12, 2, 24), rope_table([7, 900], (2, 3), 24)
    eager = apply_rope(x, table)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(apply_rope(x, table), eager, atol=1e-6, rtol=0)


def test_scores_depend_on_distance_only_even_far_out():
    q, k = torch.randn(1, 6, 1, 24, dtype=torch.float64), torch.randn(1, 6, 1, 24, dtype=torch.float64)

    def scores(q_at, k_at):
        turned = (apply_rope(x.float(), rope_table([at], (2, 3), 24)) for x, at in ((q, q_at), (k, k_at)))
        return torch.einsum("blnd,bmnd->blm", *turned)

    torch.testing.assert_close(scores(1_000_006, 1_000_000), scores(6, 0), atol=2e-5, rtol=0)


def test_streams_and_clips_share_the_numbers():
    for one, other in zip(rope_table([3, 4, 5], (2, 2), 24), fresh_rope_table(range(3, 6), (2, 2), 24), strict=True):
        assert torch.equal(one, other)


def test_table_remembered_under_inference_mode_can_train():
    rope._table.cache_clear()
    with torch.inference_mode():
        rope_table(range(2), (2, 2), 24)
    x = torch.randn(1, 8, 1, 24, requires_grad=True)
    apply_rope(x, rope_table(range(2), (2, 2), 24)).square().sum().backward()
    # A rotation keeps lengths, so the gradient of the squared length is 2x.
    torch.testing.assert_close(x.grad, 2 * x.detach())


def test_keeps_half_precision():
    x = torch.randn(1, 4, 1, 24, dtype=torch.bfloat16)
    turned = apply_rope(x, rope_table([9], (2, 2), 24))
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned.double(), by_hand(x, [9], (2, 2)), atol=0.02, rtol=0.01)


def test_refuses_wrong_sizes():
    with pytest.raises(ValueError, match="5 tokens do not match a rotary table of 4"):
        apply_rope(torch.randn(1, 5, 1, 24), rope_table([0], (2, 2), 24))
    with pytest.raises(ValueError, match="head_dim 7 is odd"):
        rope_table([0], (2, 2), 7)
