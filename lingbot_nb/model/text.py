"""Prompts to text embeddings: a fixed table of words for the tiny world, umT5 for the released weights.

Both sides answer `.encode(prompt) -> [L, text_dim]`, float32, ready for `DiT.text`.
"""

import hashlib
import html
import re
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

PROMPTS = {
    "my_way_home": "a walk through the maze of my_way_home",
    "deathmatch": "a walk through the arena of deathmatch",
    "deadly_corridor": "a walk along the corridor of deadly_corridor",
    "defend_the_center": "a walk around the hall of defend_the_center",
    "health_gathering": "a walk across the floor of health_gathering",
    "health_gathering_supreme": "a walk through the rooms of health_gathering_supreme",
    "multi_deathmatch": "a walk through the arena of multi_deathmatch",
}
"""The prompt of each map that the tiny world knows; `map_prompt` answers for the others too."""

NO_PROMPT = ""
"""The unconditional side of guidance."""

_END = "</s>"


def map_prompt(name: str) -> str:
    """The prompt that clips of the map `name` are trained and played with."""
    return PROMPTS.get(name, f"a walk through {name}")


def word_embedding(word: str, dim: int) -> Tensor:
    """A word's fixed embedding [dim], float32: uniform with mean 0 and variance 1, drawn by a hash of its letters.

    SHAKE-256 is a standard, so the numbers are the same on every machine and with every library version.
    """
    drawn = hashlib.shake_256(word.encode()).digest(4 * dim)
    whole = torch.tensor([int.from_bytes(drawn[4 * i : 4 * i + 4], "little") for i in range(dim)], dtype=torch.float64)
    return ((whole + 0.5) / 2**32 * 2 - 1).mul(3**0.5).float()


class TinyText:
    """Prompts as rows of fixed word embeddings, one per word and one that ends the prompt.

    Case, punctuation and spaces don't count; every word has an embedding, also one never seen in training. The empty
    prompt is the ending row alone.
    """

    def __init__(self, text_dim: int, text_len: int):
        if text_dim < 1 or text_len < 1:
            raise ValueError(f"text size {text_len}x{text_dim} holds no word: use 1 or more")
        self.text_dim = text_dim
        self.text_len = text_len

    def encode(self, prompt: str) -> Tensor:
        """Prompt to [words + 1, text_dim], float32. Raises ValueError for more than text_len - 1 words."""
        words = re.findall(r"\w+", prompt.lower())
        if len(words) + 1 > self.text_len:
            raise ValueError(
                f"prompt of {len(words)} words is too long for {self.text_len} text tokens, the ending one included: "
                f"use at most {self.text_len - 1} words"
            )
        return torch.stack([word_embedding(word, self.text_dim) for word in (*words, _END)])


class WanText:
    """umT5-XXL behind the same call, loaded when the first prompt comes; needs transformers and 11 GB in bfloat16.

    `folder` is a released LingBot folder (models_t5_umt5-xxl-enc-bf16.pth and google/umt5-xxl/) or one in diffusers'
    layout (text_encoder/ and tokenizer/).
    """

    text_dim = 4096

    def __init__(self, folder: Path | str, *, text_len: int = 512, device="cpu", dtype=torch.bfloat16):
        self.folder = Path(folder)
        self.text_len = text_len
        self.device = device
        self.dtype = dtype
        self.weights, self.tokenizer = _umt5_files(self.folder)

    @cached_property
    def _parts(self):
        try:
            from transformers import AutoTokenizer, UMT5EncoderModel
        except ImportError as missing:
            raise RuntimeError(
                "umT5 needs the transformers package: pip install transformers sentencepiece"
            ) from missing
        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        if self.weights.is_dir():
            model = UMT5EncoderModel.from_pretrained(self.weights, torch_dtype=self.dtype)
            return tokenizer, model.eval().requires_grad_(False).to(self.device)
        return tokenizer, load_umt5(self.weights, device=self.device, dtype=self.dtype)

    @torch.no_grad()
    def encode(self, prompt: str) -> Tensor:
        """Prompt to [L, 4096], float32 on the CPU, L <= text_len tokens; longer prompts are cut as upstream does, with
        a warning."""
        tokenizer, model = self._parts
        prompt = clean_prompt(prompt)
        tokens = tokenizer(prompt, max_length=self.text_len, padding="max_length", truncation=True, return_tensors="pt")
        if tokens.attention_mask.all() and (count := len(tokenizer(prompt).input_ids)) > self.text_len:
            warnings.warn(
                f"prompt of {count} tokens is longer than the {self.text_len} that the model reads: its end was cut "
                "off, say the important part first",
                stacklevel=2,
            )
        ids, mask = tokens.input_ids.to(self.device), tokens.attention_mask.to(self.device)
        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden[0, : int(mask.sum())].float().cpu()


def clean_prompt(prompt: str) -> str:
    """A prompt as umT5's tokenizer is given it: HTML entities undone, runs of white space made one space.

    ftfy, where installed, mends broken encodings first, as upstream does; a prompt of plain text is the same without.
    """
    try:
        from ftfy import fix_text
    except ImportError:
        fix_text = str
    return " ".join(html.unescape(html.unescape(fix_text(prompt))).split())


def _umt5_files(folder: Path) -> tuple[Path, Path]:
    """Weights (a file, or a folder of transformers') and tokenizer."""
    if (folder / UMT5_FILE).is_file():
        layout = folder / UMT5_FILE, folder / UMT5_TOKENIZER
    else:
        layout = folder / "text_encoder", folder / "tokenizer"
    for part in layout:
        if not part.exists():
            raise FileNotFoundError(
                f"no '{part}': point WanText at a released LingBot folder ({UMT5_FILE} and {UMT5_TOKENIZER}/) or at "
                "one in the diffusers layout (text_encoder/ and tokenizer/)"
            )
    return layout


# -- umT5 from the released file ----------------------------------------------------------------------------------

UMT5_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
UMT5_TOKENIZER = "google/umt5-xxl"

_LAYER_NAMES = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
"""Modules of one encoder layer: the released file's name -> transformers'."""


def umt5_name(name: str) -> str:
    """Where transformers' UMT5EncoderModel keeps a tensor of the released text encoder. ValueError for another name."""
    module = name.removesuffix(".weight")
    whole = {"token_embedding": "shared.weight", "norm": "encoder.final_layer_norm.weight"}
    if module in whole:
        return whole[module]
    layer = re.fullmatch(r"blocks\.(\d+)\.(.+)", module)
    if layer and layer[2] in _LAYER_NAMES and module != name:
        return f"encoder.block.{layer[1]}.{_LAYER_NAMES[layer[2]]}.weight"
    raise ValueError(f"{name} is no tensor of the umT5 encoder: give {UMT5_FILE}")


def load_umt5(path: Path | str, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16):
    """transformers' UMT5EncoderModel with the weights of the released file, opened weights-only; its size is told
    from their shapes. Raises FileNotFoundError, or ValueError that names what does not fit."""
    from lingbot_nb.model import shards

    state = {umt5_name(name): tensor.to(device, dtype) for name, tensor in shards.tensors(path, shards.header(path))}
    from transformers import UMT5EncoderModel

    with torch.device("meta"):
        model = UMT5EncoderModel(_umt5_config(path, state))
    tied = "encoder.embed_tokens.weight"
    wrong = _umt5_problems({**state, tied: state["shared.weight"]}, model.state_dict())
    if wrong:
        raise ValueError(f"{path} does not fit a umT5 encoder: {wrong}")
    model.load_state_dict({**state, tied: state["shared.weight"]}, strict=True, assign=True)
    # One embedding under two names, as transformers ties them.
    model.encoder.embed_tokens = model.shared
    return model.eval().requires_grad_(False)


def _umt5_config(path: Path | str, state: Mapping[str, Tensor]):
    from transformers import UMT5Config

    attention = "encoder.block.0.layer.0.SelfAttention"
    needed = ("shared.weight", f"{attention}.q.weight", f"{attention}.relative_attention_bias.weight",
              "encoder.block.0.layer.1.DenseReluDense.wi_0.weight")  # fmt: skip
    if absent := [name for name in needed if name not in state]:
        raise ValueError(f"{path} lacks {absent[0]}: it is not the whole umT5 encoder, download it again")
    (vocabulary, dim), (inner, _), (buckets, heads), (ffn_dim, _) = (tuple(state[name].shape) for name in needed)
    return UMT5Config(
        vocab_size=vocabulary,
        d_model=dim,
        d_kv=inner // heads,
        d_ff=ffn_dim,
        num_heads=heads,
        num_layers=1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.block.")),
        relative_attention_num_buckets=buckets,
        layer_norm_epsilon=1e-6,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
    )


def _umt5_problems(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    off = [n for n in wanted if n not in found or found[n].shape != wanted[n].shape]
    extra = sorted(found.keys() - wanted.keys())
    told = [f"{len(names)} {what}, first {names[0]}" for what, names in
            (("missing or of another shape", off), ("unexpected", extra)) if names]  # fmt: skip
    return "; ".join(told)
