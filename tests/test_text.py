"""Prompt embeddings: fixed numbers, word by word, and clear answers to prompts that don't fit."""

import hashlib
import math
import struct
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lingbot_nb.model.text import (
    NO_PROMPT,
    PROMPTS,
    UMT5_FILE,
    UMT5_TOKENIZER,
    TinyText,
    WanText,
    clean_prompt,
    load_umt5,
    map_prompt,
    umt5_name,
    word_embedding,
)
from lingbot_nb.presets import TINY


def test_embedding_is_the_hash_whatever_the_machine():
    bits = struct.unpack("<3I", hashlib.shake_256(b"maze").digest(12))
    expected = [((value + 0.5) / 2**31 - 1) * 3**0.5 for value in bits]
    torch.testing.assert_close(word_embedding("maze", 3).double(), torch.tensor(expected, dtype=torch.float64))
    # Numbers written down once: a change here orphans every trained checkpoint.
    torch.testing.assert_close(word_embedding("maze", 3), torch.tensor([-1.0227119, 0.7466588, 1.2251985]))


def test_embeddings_are_centred_unit_variance_and_unrelated():
    words = torch.stack([word_embedding(f"word{i}", 256) for i in range(64)])
    assert abs(words.mean()) < 0.03
    assert abs(words.var() - 1) < 0.03
    cosine = torch.corrcoef(words) - torch.eye(64)
    assert cosine.abs().max() < 0.35


def test_same_word_same_row_and_order_kept():
    text = TinyText(32, 16)
    rows = text.encode("walk the walk")
    assert rows.shape == (4, 32)
    assert rows.dtype == torch.float32
    assert torch.equal(rows[0], rows[2])
    assert not torch.equal(rows[0], rows[1])
    assert torch.equal(text.encode("the walk")[0], rows[1])


def test_case_punctuation_and_spaces_do_not_count():
    text = TinyText(8, 16)
    assert torch.equal(text.encode("  A walk,  through\nthe MAZE! "), text.encode("a walk through the maze"))


def test_empty_prompt_is_the_ending_row_of_every_prompt():
    text = TinyText(16, 8)
    empty = text.encode(NO_PROMPT)
    assert empty.shape == (1, 16)
    assert torch.equal(empty[0], text.encode("anything else")[-1])


def test_map_prompts_fit_the_preset_and_differ():
    text = TinyText(TINY.model.text_dim, TINY.model.text_len)
    encoded = [text.encode(map_prompt(name)) for name in (*PROMPTS, "a_map_of_yours")]
    assert all(rows.shape[0] <= TINY.model.text_len for rows in encoded)
    means = torch.stack([rows.mean(dim=0) for rows in encoded])
    distances = torch.cdist(means, means) + 100 * torch.eye(len(means))
    assert distances.min() > 0.5


@settings(max_examples=50, deadline=None)
@given(st.text(max_size=60))
def test_any_text_is_encoded_or_refused_clearly(prompt):
    text = TinyText(4, 6)
    try:
        rows = text.encode(prompt)
    except ValueError as error:
        assert "at most 5 words" in str(error)
    else:
        assert 1 <= rows.shape[0] <= 6
        assert torch.isfinite(rows).all()


def test_longest_prompt_fits_and_one_word_more_is_refused():
    text = TinyText(4, 4)
    assert text.encode("one two three").shape == (4, 4)
    with pytest.raises(ValueError, match="4 words is too long for 4 text tokens.*at most 3"):
        text.encode("one two three four")


def test_sizes_without_room_are_refused():
    with pytest.raises(ValueError, match="holds no word"):
        TinyText(0, 4)


def test_umt5_names_the_folder_it_misses(tmp_path):
    with pytest.raises(FileNotFoundError, match="text_encoder"):
        WanText(tmp_path)
    (tmp_path / UMT5_FILE).touch()
    with pytest.raises(FileNotFoundError, match=UMT5_TOKENIZER):
        WanText(tmp_path)


# -- umT5 at a tiny size --------------------------------------------------------------------------------------------

VOCABULARY, DIM, FFN, HEADS, HEAD_DIM, LAYERS, BUCKETS = 40, 12, 20, 4, 5, 3, 32


def umt5_state(seed=0) -> dict[str, torch.Tensor]:
    """The released file's tensors, by its own names, at a tiny size and filled with noise."""
    generator = torch.Generator().manual_seed(seed)
    inner = HEADS * HEAD_DIM
    shapes = {"token_embedding": (VOCABULARY, DIM), "norm": (DIM,)}
    for i in range(LAYERS):
        layer = {"norm1": (DIM,), "norm2": (DIM,), "attn.o": (DIM, inner)}
        layer |= {f"attn.{name}": (inner, DIM) for name in "qkv"}
        layer |= {"ffn.gate.0": (FFN, DIM), "ffn.fc1": (FFN, DIM), "ffn.fc2": (DIM, FFN)}
        layer |= {"pos_embedding.embedding": (BUCKETS, HEADS)}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in layer.items()}
    return {f"{name}.weight": torch.randn(shape, generator=generator) / 2 for name, shape in shapes.items()}


def bucket(distance: int) -> int:
    """T5's: key minus query; 16 buckets each way, the first 8 exact, then logarithmic up to 128."""
    side = 16 if distance > 0 else 0
    distance = abs(distance)
    if distance < 8:
        return side + distance
    return side + min(15, 8 + int(math.log(distance / 8) / math.log(128 / 8) * 8))


def umt5_reference(state, ids, length):
    """The encoder by hand: pre-norm, unscaled attention with each layer's own distance bias, gated tanh GELU."""

    def w(name):
        return state[f"{name}.weight"]

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    x = w("token_embedding")[ids]
    buckets = torch.tensor([[bucket(k - q) for k in range(len(ids))] for q in range(len(ids))])
    for i in range(LAYERS):
        h = norm(x, w(f"blocks.{i}.norm1"))
        q, k, v = ((h @ w(f"blocks.{i}.attn.{name}").T).view(-1, HEADS, HEAD_DIM).transpose(0, 1) for name in "qkv")
        scores = q @ k.transpose(1, 2) + w(f"blocks.{i}.pos_embedding.embedding")[buckets].permute(2, 0, 1)
        scores[:, :, length:] = -torch.inf
        x = x + (scores.softmax(-1) @ v).transpose(0, 1).flatten(1) @ w(f"blocks.{i}.attn.o").T
        h = norm(x, w(f"blocks.{i}.norm2"))
        gate = torch.nn.functional.gelu(h @ w(f"blocks.{i}.ffn.gate.0").T, approximate="tanh")
        x = x + (gate * (h @ w(f"blocks.{i}.ffn.fc1").T)) @ w(f"blocks.{i}.ffn.fc2").T
    return norm(x, w("norm"))


def test_umt5_is_the_encoder_by_hand(tmp_path):
    pytest.importorskip("transformers")
    state = umt5_state()
    torch.save(state, tmp_path / UMT5_FILE)
    model = load_umt5(tmp_path / UMT5_FILE, dtype=torch.float32)
    length, ids = 150, torch.arange(170) * 7 % VOCABULARY
    mask = (torch.arange(170) < length).long()
    hidden = model(input_ids=ids[None], attention_mask=mask[None]).last_hidden_state[0]
    torch.testing.assert_close(hidden[:length], umt5_reference(state, ids, length)[:length], atol=2e-4, rtol=1e-3)
    assert hidden.std() > 0.1


def test_umt5_names_cover_the_model_once(tmp_path):
    pytest.importorskip("transformers")
    torch.save(umt5_state(), tmp_path / UMT5_FILE)
    model = load_umt5(tmp_path / UMT5_FILE)
    names = [umt5_name(name) for name in umt5_state()]
    assert len(names) == 10 * LAYERS + 2 == len(set(names))
    assert set(names) == {name for name, _ in model.named_parameters()}
    assert model.encoder.embed_tokens.weight is model.shared.weight
    assert model.shared.weight.dtype == torch.bfloat16 and not model.shared.weight.requires_grad
    # True size: 24 layers of 10 tensors, an embedding and a norm.
    assert umt5_name("blocks.23.ffn.gate.0.weight") == "encoder.block.23.layer.1.DenseReluDense.wi_0.weight"


def test_umt5_says_what_does_not_fit(tmp_path):
    pytest.importorskip("transformers")
    state = umt5_state()
    torch.save({**state, "blocks.0.attn.extra.weight": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="blocks.0.attn.extra.weight is no tensor of the umT5 encoder"):
        load_umt5(tmp_path / "x.pth")
    del state["blocks.1.norm2.weight"]
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="1 missing or of another shape, first encoder.block.1.layer.1.layer_norm"):
        load_umt5(tmp_path / "x.pth")
    torch.save({"token_embedding.weight": torch.zeros(2, 2)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match="lacks encoder.block.0.*not the whole umT5 encoder"):
        load_umt5(tmp_path / "x.pth")
    with pytest.raises(FileNotFoundError, match="nothing.pth does not exist"):
        load_umt5(tmp_path / "nothing.pth")


def test_prompts_are_cleaned_as_upstream_does():
    assert clean_prompt("  a  maze,\n\tlit &amp;amp; wet ") == "a maze, lit & wet"


def test_wan_text_trims_to_the_true_length(tmp_path):
    """The released layout end to end, with a tokenizer of whole words."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "walk", "through", "mud"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(tmp_path / UMT5_TOKENIZER)
    state = umt5_state()
    torch.save(state, tmp_path / UMT5_FILE)
    text = WanText(tmp_path, text_len=8, dtype=torch.float32)
    ids = torch.tensor([3, 4, 5, 6, 0, 0, 0, 0])
    rows = text.encode(" a walk  through\nmud")
    assert rows.shape == (4, DIM) and rows.dtype == torch.float32
    torch.testing.assert_close(rows, umt5_reference(state, ids, 4)[:4], atol=2e-4, rtol=1e-3)
    with pytest.warns(UserWarning, match="prompt of 30 tokens is longer than the 8 that the model reads"):
        assert text.encode("mud " * 30).shape == (8, DIM)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text.encode("mud " * 8)
