import sys
from types import ModuleType

import pytest
import torch

from lingbot_nb.model import attention
from lingbot_nb.model.attention import (
    Ranges,
    attend,
    attend_reference,
    backend,
    flex,
    kernel_mask,
    kernels,
    sdpa,
    token_ranges,
)
from lingbot_nb.model.masks import block_causal, full, teacher_forcing

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


def qkv(length_q, length_k, heads=2, head_dim=24, device="cpu", dtype=torch.float32, grad=False):
    generator = torch.Generator().manual_seed(length_q * 1000 + length_k)
    sizes = (length_q, length_k, length_k)
    parts = [torch.randn(2, length, heads, head_dim, generator=generator) for length in sizes]
    return [part.to(device, dtype).requires_grad_(grad) for part in parts]


def gradients(call, tensors):
    out = call(*tensors)
    weight = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    return out.detach(), torch.autograd.grad((out.float() * weight).sum(), tensors)


def assert_same(call, reference, tensors):
    """Values and gradients agree with the reference run in fp32, relative to its largest entry."""
    tolerance = TOLERANCE[tensors[0].dtype]
    exact = [x.detach().float().requires_grad_() for x in tensors]
    (out, grads), (want, want_grads) = gradients(call, tensors), gradients(reference, exact)
    pairs = zip((out, *grads), (want, *want_grads), strict=True)
    far = [((got.float() - expected).abs().max() / expected.abs().max()).item() for got, expected in pairs]
    print("output and gradients of q, k, v are off by", *(f"{value:.1e}" for value in far))  # for `pytest -rP`
    assert max(far) < tolerance


def test_plain_attention():
    assert_same(attend, attend_reference, qkv(12, 30, grad=True))


@pytest.mark.parametrize("mask", [block_causal([1, 2, 2]), block_causal([1] * 5, 3, 1), teacher_forcing([2, 2])])
def test_masked_attention(mask):
    length = 4 * mask.frames[0]
    keep = mask.dense(4)
    tensors = qkv(length, length, grad=True)
    assert_same(lambda q, k, v: attend(q, k, v, mask), lambda *x: attend_reference(*x, keep), tensors)
    assert_same(lambda q, k, v: attend(q, k, v, token_ranges(mask, 4)), lambda *x: attend_reference(*x, keep), tensors)


def test_mask_changes_with_the_length():
    mask = block_causal([1] * 4)
    for tokens in (3, 8, 5, 32):
        q, k, v = qkv(4 * tokens, 4 * tokens)
        torch.testing.assert_close(attend(q, k, v, mask), attend_reference(q, k, v, mask.dense(tokens)))


def test_mask_of_another_clip_is_refused():
    with pytest.raises(ValueError, match="does not fit 10 queries"):
        attend(*qkv(10, 10), full(3))


def test_mixed_dtypes_follow_the_values():
    q, k, v = qkv(4, 4)
    assert attend(q, k, v.bfloat16()).dtype == torch.bfloat16


def test_a_missing_kernel_is_left_out():
    def load():
        raise ImportError("no module named flash_attn")

    assert attention._imported("flash-attn-9", load, (64,)) == []
    assert attention._imported("plain", lambda: sdpa, (64,))[0].name == "plain"


FLASH = {"flash_attn": "flash-attn-2", "flash_attn_interface": "flash-attn-3", "flash_attn.cute": "flash-attn-4"}
"""Packages -> kernels that come with them, oldest first."""


def pretend(monkeypatch, generation, packages):
    """A GPU of that generation with these packages; their kernels answer 2, 3 and 4, the last with a log-sum-exp."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (generation, 0))
    for number, name in enumerate(FLASH, 2):
        module, out = ModuleType(name), torch.tensor(number)
        module.flash_attn_func = lambda q, k, v, out=out: (out, None) if out == 4 else out
        monkeypatch.setitem(sys.modules, name, module if name in packages else None)


@pytest.mark.parametrize(
    "generation, packages, expected",
    [
        (9, FLASH, ["flash-attn-4", "flash-attn-3", "cuDNN", "flash-attn-2"]),
        (10, FLASH, ["flash-attn-4", "cuDNN", "flash-attn-2"]),
        (12, FLASH, ["cuDNN", "flash-attn-2"]),
        (8, FLASH, ["flash-attn-2"]),
        (7, FLASH, []),
        (9, ["flash_attn"], ["cuDNN", "flash-attn-2"]),
        (9, ["flash_attn_interface"], ["flash-attn-3", "cuDNN"]),
        (9, [], ["cuDNN"]),
    ],
)
def test_a_kernel_is_chosen_that_this_gpu_can_run(generation, packages, expected, monkeypatch):
    """Flash-attn 4 refuses consumer Blackwell (12) and 3 all but Hopper (9) at the first call, long after import."""
    pretend(monkeypatch, generation, packages)
    assert [kernel.name for kernel in attention._search()] == expected


def test_every_version_gives_its_output_alone(monkeypatch):
    pretend(monkeypatch, 9, FLASH)
    given = {kernel.name: kernel.attend for kernel in attention._search()}
    assert [given[name](*qkv(4, 4)).item() for name in FLASH.values()] == [2, 3, 4]


def test_nothing_learns_through_cudnn(monkeypatch):
    pretend(monkeypatch, 9, ["flash_attn"])
    monkeypatch.setattr(attention, "_found", attention._search())
    named = [backend("cuda", head_dim=64, learns=learns) for learns in (False, True)]
    assert named == ["cuDNN", "flash-attn-2"]
    pretend(monkeypatch, 9, [])
    monkeypatch.setattr(attention, "_found", attention._search())
    assert attention._kernel("cuda", torch.bfloat16, 64, True).attend is attention.without_cudnn
    asked = []
    monkeypatch.setattr(attention, "_kernel", lambda *key: asked.append(key[-1]) or attention._PLAIN)
    for grad in (False, True):
        attend(*qkv(4, 4, grad=grad))
    with torch.no_grad():
        attend(*qkv(4, 4, grad=True))
    assert asked == [False, True, False]


def test_the_kernels_of_training_agree():
    assert_same(attention.without_cudnn, attend_reference, qkv(12, 30, grad=True))


def test_backend_without_a_gpu():
    assert backend("cpu") == "SDPA"
    if not torch.cuda.is_available():
        assert kernels() == () and backend() == "SDPA"


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_here_agrees(dtype):
    assert backend() == kernels()[0].name
    plain = attention.Kernel("SDPA", sdpa, frozenset({32, 64, 128}))
    for kernel in (plain,) if dtype == torch.float32 else (*kernels(), plain):
        for head_dim in sorted(kernel.head_dims & {32, 64, 128}):
            for lengths in ((180, 420), (128, 128), (7, 300)):
                print(kernel.name, dtype, head_dim, lengths)
                tensors = qkv(*lengths, head_dim=head_dim, device="cuda", dtype=dtype, grad=True)
                assert_same(kernel.attend, attend_reference, tensors)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens,head_dim", [(5, 32), (64, 64), (60, 32), (128, 128)])
def test_flex_agrees(tokens, head_dim, dtype):
    for mask in (block_causal([1] + [3] * 5, 7, 1), teacher_forcing([1] * 8, 4, 1)):
        length = tokens * mask.frames[0]
        tensors = qkv(length, length, head_dim=head_dim, device="cuda", dtype=dtype, grad=True)
        keep = mask.dense(tokens, "cuda")
        block = mask.block_mask(tokens, "cuda")
        assert_same(lambda *x, b=block: flex(*x, b), lambda *x, k=keep: attend_reference(*x, k), tensors)


@needs_gpu
def test_long_groups_go_without_a_mask_kernel():
    mask, tokens = block_causal([2, 2]), 600
    assert isinstance(kernel_mask(mask, tokens, torch.device("cuda")), Ranges)
    tensors = qkv(4 * tokens, 4 * tokens, head_dim=64, device="cuda", dtype=torch.bfloat16, grad=True)
    keep = mask.dense(tokens, "cuda")
    assert_same(lambda *x: attend(*x, mask), lambda *x: attend_reference(*x, keep), tensors)
