"""Who may look at whom, frame by frame: named factories, composition, and the forms attention kernels want."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

FLEX_BLOCK = 128
"""Tokens on a side of one FlexAttention tile."""


@dataclass(frozen=True, eq=False)
class FrameMask:
    """A rule at frame level: `keep[q, k]` is True where query frame q sees key frame k.

    `keep` is bool [query frames, key frames]. Equality and hash follow the contents, so that what is derived from a
    mask and remembered can never go stale.
    Compose with `&` and `|`. Raises ValueError for a query frame that sees nothing (its softmax would be NaN).
    """

    name: str
    keep: Tensor

    def __post_init__(self):
        if self.keep.dtype != torch.bool or self.keep.ndim != 2:
            raise ValueError(
                f"mask '{self.name}' is {self.keep.dtype} of shape {tuple(self.keep.shape)}: pass a 2-D bool tensor"
            )
        keep = self.keep.detach().to("cpu", copy=True).contiguous()
        blind = (~keep.any(dim=1)).nonzero().flatten().tolist()
        if blind:
            raise ValueError(f"in mask '{self.name}' query frame {blind[0]} sees no frame: let it see at least itself")
        object.__setattr__(self, "keep", keep)

    @property
    def _key(self) -> tuple[tuple[int, ...], bytes]:
        return tuple(self.keep.shape), self.keep.numpy().tobytes()

    def __eq__(self, other):
        return isinstance(other, FrameMask) and self._key == other._key

    def __hash__(self):
        return hash(self._key)

    def __and__(self, other: "FrameMask") -> "FrameMask":
        return FrameMask(f"({self.name} & {other.name})", self.keep & self._same_size(other).keep)

    def __or__(self, other: "FrameMask") -> "FrameMask":
        return FrameMask(f"({self.name} | {other.name})", self.keep | self._same_size(other).keep)

    def _same_size(self, other: "FrameMask") -> "FrameMask":
        if self.keep.shape != other.keep.shape:
            raise ValueError(
                f"masks '{self.name}' {tuple(self.keep.shape)} and '{other.name}' {tuple(other.keep.shape)} differ in "
                "frames: build both for the same clip"
            )
        return other

    @property
    def frames(self) -> tuple[int, int]:
        """(query frames, key frames)."""
        return tuple(self.keep.shape)

    @property
    def density(self) -> float:
        """Share of the query-key pairs that is computed, 0 to 1."""
        return self.keep.float().mean().item()

    def dense(self, tokens_per_frame: int, device: torch.device | str = "cpu") -> Tensor:
        """The same rule for tokens: bool [query frames * n, key frames * n]. Remembered: treat it as read-only."""
        return _dense(self, _positive(tokens_per_frame), torch.device(device))

    def block_mask(self, tokens_per_frame: int, device: torch.device | str = "cuda"):
        """FlexAttention's BlockMask of the same rule; lengths need not be multiples of its tiles."""
        return _block_mask(self, _positive(tokens_per_frame), torch.device(device))

    def ranges(self) -> list[tuple[tuple[int, int], list[tuple[int, int]]]]:
        """The rule without a mask: [((first query frame, end), [(first key frame, end), ...]), ...].

        Each group of neighbouring query frames that see the same frames can be one unmasked attention call over the
        named stretches of keys.
        """
        rows = self.keep.tolist()
        starts = [i for i in range(len(rows)) if i == 0 or rows[i] != rows[i - 1]]
        return [
            ((first, end), _stretches(rows[first])) for first, end in zip(starts, [*starts[1:], len(rows)], strict=True)
        ]


def _positive(tokens_per_frame: int) -> int:
    if tokens_per_frame < 1:
        raise ValueError(f"{tokens_per_frame} tokens per frame: a frame has at least one token")
    return int(tokens_per_frame)


def _stretches(row: list[bool]) -> list[tuple[int, int]]:
    edges = [i for i in range(len(row) + 1) if (i < len(row) and row[i]) != (i > 0 and row[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


@lru_cache(maxsize=16)
def _dense(mask: FrameMask, tokens: int, device: torch.device) -> Tensor:
    # Never an inference tensor: a training pass may find it remembered here.
    with torch.inference_mode(False):
        return mask.keep.to(device).repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)


def _tile_frames(frames: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """First frame, end frame and wholeness of every tile of a token axis."""
    length = frames * tokens
    first = torch.arange(0, length, FLEX_BLOCK)
    last = (first + FLEX_BLOCK).clamp(max=length)
    return first // tokens, (last - 1) // tokens + 1, last - first == FLEX_BLOCK


def _kept_pairs(keep: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """For every pair of tiles: does any frame pair in it count, and do all (padding makes a tile partial)."""
    queries, keys = keep.shape
    q_first, q_end, q_whole = _tile_frames(queries, tokens)
    k_first, k_end, k_whole = _tile_frames(keys, tokens)
    total = torch.zeros(queries + 1, keys + 1, dtype=torch.long)
    total[1:, 1:] = keep.long().cumsum(0).cumsum(1)
    count = total[q_end][:, k_end] - total[q_first][:, k_end] - total[q_end][:, k_first] + total[q_first][:, k_first]
    area = (q_end - q_first)[:, None] * (k_end - k_first)[None, :]
    whole = q_whole[:, None] & k_whole[None, :]
    return count > 0, (count == area) & whole


def _tile_lists(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles each row keeps, and which, kept ones first: int32 [1, 1, rows], [1, 1, rows, columns]."""
    order = tiles.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    return tiles.sum(1).to(torch.int32)[None, None], order.to(torch.int32)[None, None].contiguous()


def _token_rule(mask: FrameMask, tokens: int, device: torch.device):
    # Frame numbers by table and not by division: the rule then holds no number that a compiler would freeze.
    keep = mask.keep.to(device, copy=True)
    q_frame, k_frame = (
        torch.arange(count, device=device, dtype=torch.int32).repeat_interleave(tokens) for count in mask.frames
    )

    def rule(batch, head, q, k):
        return keep[q_frame[q], k_frame[k]]

    return rule


@lru_cache(maxsize=16)
def _block_mask(mask: FrameMask, tokens: int, device: torch.device):
    from torch.nn.attention.flex_attention import BlockMask

    with torch.inference_mode(False):
        some, every = _kept_pairs(mask.keep, tokens)
        # Tiles come from the frame rule directly: testing every token pair would take gigabytes at 480x832.
        lists = (*_tile_lists(some & ~every), *_tile_lists(every))
        return BlockMask.from_kv_blocks(
            *(part.to(device) for part in lists),
            BLOCK_SIZE=FLEX_BLOCK,
            mask_mod=_token_rule(mask, tokens, device),
            seq_lengths=(mask.frames[0] * tokens, mask.frames[1] * tokens),
        )


def _chunks(lengths: Sequence[int], window: int | None, sink: int) -> tuple[Tensor, Tensor]:
    """Start and end of the chunk that every frame belongs to."""
    if not lengths or min(lengths) < 1:
        raise ValueError(f"chunk lengths {list(lengths)}: give at least one, each at least 1 frame")
    if sink < 0:
        raise ValueError(f"sink {sink} is negative: use 0 for no sink")
    if window is not None and window < sink + max(lengths):
        raise ValueError(f"window {window} cannot hold sink {sink} + chunk {max(lengths)}: widen it")
    ends = torch.tensor(lengths).cumsum(0)
    spread = torch.tensor(lengths)
    return (ends - spread).repeat_interleave(spread), ends.repeat_interleave(spread)


def _in_window(ends: Tensor, frames: int, window: int | None, sink: int) -> Tensor:
    key = torch.arange(frames)[None, :]
    if window is None:
        return torch.ones(len(ends), frames, dtype=torch.bool)
    return (key >= ends[:, None] - (window - sink)) | (key < sink)


def block_causal(lengths: Sequence[int], window: int | None = None, sink: int = 0) -> FrameMask:
    """A frame sees its own chunk and every earlier one; with a window, only `window` frames back from its chunk's end.

    `lengths`: frames of each chunk (`StreamSettings.chunk_lengths`; an image-first clip starts with 1). The window
    counts the sink and the current chunk; the first `sink` frames never leave it.
    """
    _, ends = _chunks(lengths, window, sink)
    frames = len(ends)
    past = torch.arange(frames)[None, :] < ends[:, None]
    name = "block-causal" if window is None else f"block-causal, window {window}, sink {sink}"
    return FrameMask(name, past & _in_window(ends, frames, window, sink))


def diffusion_forcing(lengths: Sequence[int], window: int | None = None, sink: int = 0) -> FrameMask:
    """Block-causal: in diffusion forcing every chunk carries its own noise level and the past stays noisy."""
    return FrameMask("diffusion forcing", block_causal(lengths, window, sink).keep)


def teacher_forcing(lengths: Sequence[int], window: int | None = None, sink: int = 0) -> FrameMask:
    """Sequence [clean | noisy], 2F x 2F: a noisy chunk sees itself and the clean chunks before it.

    Clean frames are block-causal among themselves and never see a noisy one.
    """
    starts, ends = _chunks(lengths, window, sink)
    frames = len(ends)
    clean = block_causal(lengths, window, sink).keep
    earlier = (torch.arange(frames)[None, :] < starts[:, None]) & _in_window(ends, frames, window, sink)
    own = starts[:, None] == starts[None, :]
    nothing = torch.zeros(frames, frames, dtype=torch.bool)
    return FrameMask("teacher forcing", torch.cat([torch.cat([clean, nothing], 1), torch.cat([earlier, own], 1)]))


def full(frames: int) -> FrameMask:
    """Every frame sees every frame: the teacher."""
    return FrameMask("full", torch.ones(frames, frames, dtype=torch.bool))
