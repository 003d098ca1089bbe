"""Our own weight files: safetensors beside a JSON card that says how they were made and carries their sha256.

Released LingBot folders are another matter; this file knows only what the workbook itself writes.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load, save_file
from torch import nn

from lingbot_nb.model.packing import unpacked

State = dict[str, torch.Tensor]


def card_path(path: Path) -> Path:
    return Path(path).with_suffix(".json")


def save(path: Path | str, module: nn.Module, *, dtype: torch.dtype | None = None, **card) -> Path:
    """Writes a module's parameters and buffers, floating ones cast to `dtype`, and a card with `card`'s entries.

    A card on disk means whole weights: see `write`.
    """
    state = {name: _cast(tensor, dtype) for name, tensor in module.state_dict().items()}
    return write(path, state, {**card, "parameters": sum(p.numel() for p in module.parameters())})


def write(path: Path | str, state: State, card: Mapping) -> Path:
    """Writes tensors and a card with their sha256, each to a temporary name and renamed, the card last."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(state, partial)
    digest = hashlib.sha256(partial.read_bytes()).hexdigest()
    card_path(path).unlink(missing_ok=True)
    os.replace(partial, path)
    partial.write_text(json.dumps({**card, "sha256": digest}, indent=1) + "\n")
    os.replace(partial, card_path(path))
    return path


def annotate(path: Path | str, **entries) -> None:
    """Adds entries to the card of weights that stay as they are: what was measured on them later."""
    path = Path(path)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({**read_card(path), **entries}, indent=1) + "\n")
    os.replace(partial, card_path(path))


def load_into(path: Path | str, module: nn.Module, fit: Callable[[State], State] = lambda state: state) -> dict:
    """Fills `module` strictly from `path`, packed or not, whose tensors `fit` may change first; returns the card.

    Raises FileNotFoundError, or ValueError when the bytes do not match the card's sha256 or names or shapes differ.
    """
    state, card = read(path)
    state = fit(state)
    _check_names(path, state, module.state_dict())
    module.load_state_dict(state)
    return card


def read(path: Path | str) -> tuple[State, dict]:
    """Floating tensors of a file, packed or not, and its card.

    Raises FileNotFoundError, or ValueError when the bytes do not match the card's sha256.
    """
    path = Path(path)
    card = read_card(path)
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != card["sha256"]:
        raise ValueError(f"weights {path} do not match the sha256 in {card_path(path).name}: fetch or train them again")
    return unpacked(load(data)), card


def read_card(path: Path | str) -> dict:
    path = Path(path)
    for file in (path, card_path(path)):
        if not file.exists():
            raise FileNotFoundError(f"weights file {file} does not exist: train it or name another")
    try:
        card = json.loads(card_path(path).read_text())
        card["sha256"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"card {card_path(path)} is unreadable: write the weights again") from error
    return card


def _cast(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    tensor = tensor.detach().cpu()
    # Statistics and tables (0- and 1-D buffers) keep their precision: they cost nothing and scale everything.
    if dtype is not None and tensor.is_floating_point() and tensor.dim() > 1:
        tensor = tensor.to(dtype)
    return tensor.contiguous()


def _check_names(path: Path, found: dict, wanted: dict) -> None:
    problems = {
        "tensors missing": wanted.keys() - found.keys(),
        "unexpected tensors": found.keys() - wanted.keys(),
        "wrong shapes": {n for n in wanted.keys() & found.keys() if found[n].shape != wanted[n].shape},
    }
    said = [f"{len(names)} {what} (first: {min(names)})" for what, names in problems.items() if names]
    if said:
        raise ValueError(f"weights {path} are for another model size: {', '.join(said)}")
