"""The network as a stream wants it: the DiT's own layers, cut at self-attention, each piece compiled once for all.

What does not depend on the step is handed in ready: text keys and values, the camera's films, each noise level's
modulations. Nothing in here waits for the device.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lingbot_nb.model.attention import Attend, attend
from lingbot_nb.model.dit import Attention, DiT, Film, Layer, Linear, Text, Time
from lingbot_nb.model.fp8 import E4M3
from lingbot_nb.model.fp8_attention import SCALE, lifted, lowered
from lingbot_nb.model.graph import Compile
from lingbot_nb.model.kv_cache import Place, Sight, put
from lingbot_nb.model.rope import RopeTable, apply_rope
from lingbot_nb.presets import ModelSize

Prepare = Callable[[Layer], object]
"""Changes a layer of a copied network in place: other linears, joined projections."""


@cache
def opaque(attend: Attend) -> Attend:
    """An attention without a mask as one call that a compiler does not look into."""

    def call(q_BLND: Tensor, k_BLND: Tensor, v_BLND: Tensor) -> Tensor:
        return attend(q_BLND, k_BLND, v_BLND).contiguous()

    whole = torch.library.custom_op(f"lingbot_nb::{attend.__name__}", call, mutates_args=())
    whole.register_fake(lambda q_BLND, k_BLND, v_BLND: v_BLND.new_empty(q_BLND.shape))
    return whole


class Moment(NamedTuple):
    """The noise level of a pass: its embedding, and per layer shift, scale and gate of self-attention, then of the
    feed-forward, each [1, 1, D] fp32; [1, 2, 1, D] for a pass over two chunks."""

    time: Time
    layers: tuple[tuple[Tensor, ...], ...]


def as_it_is(thing: Any) -> Any:
    """No compiler, no other place."""
    return thing


def moved(module: nn.Module, to: Callable[[Tensor], Tensor]) -> None:
    """Exchange every tensor of a copied module for `to(tensor)`; the original keeps its own."""
    for part in module.modules():
        for name, tensor in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(to(tensor.detach()), requires_grad=False))
        for name, tensor in part.named_buffers(recurse=False):
            setattr(part, name, to(tensor))


def sharing_copy(module: nn.Module) -> nn.Module:
    """A copy that can be rebuilt without touching the original; the tensors are the same ones."""
    tensors = (*module.parameters(), *module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


class JoinedAttention(Attention):
    """Self-attention whose q, k and v come out of one matrix product, which runs nearer to the GPU's best rate."""

    def __init__(self, attention: Attention):
        nn.Module.__init__(self)
        self.heads = attention.heads
        self.norm_q, self.norm_k, self.o = attention.norm_q, attention.norm_k, attention.o
        self.qkv = _joined(attention.q, attention.k, attention.v)

    def projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.qkv(x).chunk(3, dim=-1)


def _joined(*parts: Linear) -> Linear:
    rows, columns = sum(part.out_features for part in parts), parts[0].in_features
    whole = Linear(columns, rows, device="meta")
    for name in ("weight", "bias"):
        tensor = torch.cat([getattr(part, name).detach() for part in parts])
        setattr(whole, name, nn.Parameter(tensor, requires_grad=False))
    return whole


def join_projections(layer: Layer) -> None:
    """q, k and v of self-attention as one product, in place."""
    layer.self_attn = JoinedAttention(layer.self_attn)


def turn(x_BLND: Tensor, table: RopeTable) -> Tensor:
    """`apply_rope`; compiled, in a form that reads every number twice at most and writes it once."""
    if not torch.compiler.is_compiling():
        return apply_rope(x_BLND, table)
    pairs = x_BLND.float().unflatten(-1, (-1, 2))
    cos, sin = (part[None, :, None, :, None] for part in table)
    sign = 2 * torch.arange(2, device=pairs.device) - 1
    return (pairs * cos + pairs.flip(-1) * (sin * sign)).flatten(-2).to(x_BLND.dtype)


class SigmoidGELU(nn.Module):
    """GELU's tanh form by way of the exponential, which a GPU has in hardware: 0.5 (1 + tanh u) = sigmoid(2 u). To be
    compiled: then it is computed in fp32 inside one kernel."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (y + 0.044715 * y**3))).to(x.dtype)


def exponential_gelu(layer: Layer) -> None:
    """The feed-forward's activation in another spelling, in place."""
    layer.ffn[1] = SigmoidGELU()


class Format(NamedTuple):
    """The numbers of attention: what makes them of q and k, and of v, what computes with them, what makes usual ones of
    its output, and the type they are cached in (None: the network's)."""

    lower_qk: Callable[[Tensor], Tensor]
    lower_v: Callable[[Tensor], Tensor]
    attend: Attend
    lift: Callable[[Tensor], Tensor]
    dtype: torch.dtype | None = None

    def reading(self, q: Tensor, k: Tensor, v: Tensor, attend: Attend) -> Tensor:
        """Attention of usual numbers by `attend`, which computes with this format's."""
        return self.lift(attend(self.lower_qk(q), self.lower_qk(k), self.lower_v(v)))


USUAL = Format(as_it_is, as_it_is, attend, as_it_is)


def eight_bits(attend: Attend) -> Format:
    """Attention in 8-bit floating point by `attend` (see `fp8_attention`)."""
    return Format(lowered, partial(lowered, scale=SCALE), attend, lifted, E4M3)


class Raw(NamedTuple):
    """A layer's q, k, v [1, L, D] as the products made them, and the norms' weights [D] and eps: a kernel's input."""

    q: Tensor
    k: Tensor
    v: Tensor
    norm_q: Tensor
    norm_k: Tensor
    eps: float


Kernel = Callable[..., None]
"""Norm, rotation and writing of a `Raw` in one go: see `turn_kernel.norm_turn_write`."""


class Alone:
    """All of a chunk's tokens and all heads on one device; what `stream.engine_parallel` does otherwise, it says there.

    `hand_over`, `carry` and `taken` run inside compiled pieces, the readings between them. With a `kernel` they hand
    q, k and v over as they are, and the reading begins with it.
    """

    ranks = 1
    """Devices that share a stream."""

    def __init__(self, format: Format = USUAL, kernel: Kernel | None = None):
        self.format, self.kernel = format, kernel

    def using(self, format: Format | None = None, kernel: Kernel | None = None) -> "Alone":
        """The same share in another number format, or with a kernel."""
        return Alone(format or self.format, kernel or self.kernel)

    def size(self, size: ModelSize) -> ModelSize:
        """What a cache of this device's heads is built for."""
        return size

    def part(self, x_BLD: Tensor) -> Tensor:
        """This device's tokens of all tokens."""
        return x_BLD

    def whole(self, x_BLD: Tensor) -> Tensor:
        """All tokens of every device's."""
        return x_BLD

    def hand_over(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, place: Place, keep: bool):
        """A layer's `projections` [B, L, D] on their way to `read`; unturned keys go along if `keep`."""
        carried = self.carry(attention, q, k, v, place, keep)
        if isinstance(carried, Raw):
            return carried
        q, turned_k, v, unturned_k = carried
        put(place, turned_k, v)
        return q, unturned_k

    def carry(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, place: Place, keep: bool):
        """The same on their way to `read_carried`: the cache is left alone until then."""
        if self.kernel and not keep:
            return raw_of(attention, q, k, v)
        q, k, v = attention.normed(q, k, v)
        q, turned_k = (self.format.lower_qk(turn(x, place.table)) for x in (q, k))
        return q, turned_k, self.format.lower_v(v), k if keep else None

    def arrive(self, handed, layer: int, sight: Sight) -> Tensor:
        """What `hand_over` left to do: keys and values are in the cache, and q turned is returned."""
        if isinstance(handed, Raw):
            return self._written(handed, sight.place(layer))
        q, unturned_k = handed
        if unturned_k is not None:
            sight.keep_sink(layer, unturned_k)
        return q

    def read(self, handed, layer: int, sight: Sight):
        """Attention of a layer, and before it `arrive`."""
        return self.format.attend(self.arrive(handed, layer, sight), *sight.keys_values(layer))

    def read_carried(self, carried, layer: int, sight: Sight):
        """Attention of a layer, and before it what `carry` left to do."""
        if isinstance(carried, Raw):
            return self.read(carried, layer, sight)
        q, k, v, unturned_k = carried
        put(sight.place(layer), k, v)
        return self.read((q, unturned_k), layer, sight)

    def _written(self, raw: Raw, place: Place) -> Tensor:
        """q turned [1, L, N, D], when keys and values are where they belong."""
        keys, values = place.keys[0], place.values[0]
        q = torch.empty(raw.q.shape[1], *keys.shape[1:], dtype=keys.dtype, device=keys.device)
        self.kernel(raw, place.table, (q[None], keys[None], values[None]), place.slots)
        return q[None].view(self.format.dtype or q.dtype)

    def taken(self, y: Tensor) -> Tensor:
        """What a reading returned, as this device's tokens with all heads [B, L, N, D] in the usual numbers."""
        return self.format.lift(y)


def raw_of(attention: Attention, q: Tensor, k: Tensor, v: Tensor) -> Raw:
    """`projections` of an attention beside its norms."""
    return Raw(q, k, v, attention.norm_q.weight, attention.norm_k.weight, attention.norm_q.eps)


ALONE = Alone()


class Given(NamedTuple):
    """One chunk of a pass: noisy or clean latent [B, 16, f, h, w], condition [B, 20, f, h, w], its films if there is a
    camera, and what it sees."""

    latent: Tensor
    condition: Tensor
    films: Sequence[Film] | None
    sight: Sight


def _enter(share: Alone, layer: Layer, x: Tensor, shift: Tensor, scale: Tensor, starts):
    parts = zip(*(t.chunk(len(starts), dim=1) for t in layer.projections(x, shift, scale)), strict=True)
    # A later chunk's place may be where the frames are that an earlier one still has to see.
    ways = share.hand_over, share.carry
    given = zip(ways, parts, starts, strict=False)
    return tuple(way(layer.self_attn, *part, *start) for way, part, start in given)


def _leave(share: Alone, layer: Layer, x: Tensor, ys, gates, words, films) -> Tensor:
    film = None if films[0] is None else tuple(_joint(parts) for parts in zip(*films, strict=True))
    return layer.after(x, _joint([share.taken(y) for y in ys]), gates, words, film)


def _pass_on(share: Alone, layer: Layer, next_layer: Layer, x: Tensor, ys, gates, words, films, shift, scale, starts):
    # One piece from attention to attention: what ends a layer and begins the next shares its trips to memory.
    x = _leave(share, layer, x, ys, gates, words, films)
    return x, _enter(share, next_layer, x, shift, scale, starts)


def _joint(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _film(layer: Layer, camera_BLD: Tensor) -> Film:
    return layer.film(camera_BLD)


class FusedDiT:
    """A DiT for streaming only, without gradients: same weights, same arithmetic, fewer and larger steps.

    `compile` wraps the pieces (see `graph.Compiler`); `prepare` may rebuild each copied layer; `share` says which
    tokens and heads are this device's; `to` brings a tensor to where it is used, one layer at a time, each before it
    is prepared. The original is left as it is, and its tensors are shared where none of these changes them. Uncompiled,
    it computes what `DiT.forward` with a cache computes, to the bit where `prepare` changes nothing.
    """

    def __init__(
        self,
        dit: DiT,
        *,
        compile: Compile = as_it_is,
        prepare: Sequence[Prepare] = (),
        share: Alone = ALONE,
        to: Callable[[Tensor], Tensor] = as_it_is,
    ):
        self.size, self.share = dit.size, share
        self._dit = sharing_copy(dit).eval()
        self.layers = self._dit.blocks
        for part in self._dit.children():
            if part is not self.layers:
                moved(part, to)
        for layer in self.layers:
            # A piece that is compiled as a whole must not look into the kernels of the text's attention.
            kernel = share.format.attend if compile is as_it_is else opaque(share.format.attend)
            layer.attend_text = partial(share.format.reading, attend=kernel)
            moved(layer, to)
            for change in prepare:
                change(layer)
        self._enter, self._pass_on, self._leave = compile(_enter), compile(_pass_on), compile(_leave)
        self._film, self._turn = compile(_film), compile(turn)

    @property
    def dtype(self) -> torch.dtype:
        return self._dit.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self._dit.patch_embedding.weight.device

    @torch.no_grad()
    def text(self, states_BLC: Tensor) -> Text:
        """Keys and values of a prompt: see DiT.text."""
        return self._dit.text(states_BLC)

    @torch.no_grad()
    def film(self, control_BCFHW: Tensor) -> list[Film]:
        """Per layer, the camera's scale and shift [B, L, D]: see DiT.film."""
        camera = self._dit.camera_tokens(control_BCFHW, self.share.part)
        return [self._film(layer, camera) for layer in self.layers]

    @torch.no_grad()
    def moment(self, *t: float) -> Moment:
        """All that the layers need of a noise level, 0 to 1000, once per distinct one; of several for a pass over as
        many chunks."""
        time = self._dit.time(torch.tensor([t], dtype=torch.float32).to(self.device))
        return Moment(time, tuple(layer.modulations(time.layers) for layer in self.layers))

    @torch.no_grad()
    def __call__(self, moment: Moment, text: Text, *chunks: Given) -> Tensor:
        """Velocity of the last of one or two chunks of equal length, as DiT.forward: [B, 16, F, H, W], fp32.

        With two, the first is the one before the second, which reads the keys and values that the first writes in this
        very pass. Nothing else can tell the pass from two: each chunk sees what it would have seen.
        """
        x, handed = self._before_last(moment, text, chunks)
        last = len(self.layers) - 1
        x = self._leave(self.share, self.layers[last], x, *self._given(last, handed, moment, text, chunks))
        time = Time(moment.time.head[:, -1:], moment.time.layers)
        x = x.chunk(len(chunks), dim=1)[-1]
        return self._dit.velocity(x, time, self._grid(chunks[-1].latent), self.share.whole)

    @torch.no_grad()
    def write(self, moment: Moment, text: Text, chunk: Given) -> None:
        """Only the keys and values of a pass over one chunk: the last layer ends where it has written them."""
        _, handed = self._before_last(moment, text, [chunk])
        self.share.arrive(handed[0], len(self.layers) - 1, chunk.sight)

    @torch.no_grad()
    def one_layer(self, index: int, x: Tensor, moment: Moment, text: Text, films: Sequence[Film] | None, sight: Sight):
        """What layer `index` makes of a residual stream [1, L, D], by the pieces and kernels that a stream runs on."""
        layer, chunk = self.layers[index], [Given(x, x, films, sight)]
        handed = self._enter(self.share, layer, x, *self._start(index, moment, chunk))
        return self._leave(self.share, layer, x, *self._given(index, handed, moment, text, chunk))

    def _before_last(self, moment: Moment, text: Text, chunks: Sequence[Given]) -> tuple[Tensor, tuple]:
        """All layers but the last: the residual stream, and what the last one hands over to its attention."""
        x = _joint([self._tokens(chunk) for chunk in chunks])
        handed = self._enter(self.share, self.layers[0], x, *self._start(0, moment, chunks))
        for index, (layer, following) in enumerate(pairwise(self.layers)):
            given = self._given(index, handed, moment, text, chunks)
            x, handed = self._pass_on(self.share, layer, following, x, *given, *self._start(index + 1, moment, chunks))
        return x, handed

    def _given(self, index: int, handed: tuple, moment: Moment, text: Text, chunks: Sequence[Given]) -> tuple:
        """What a layer needs to end: its attention's outputs, gates, text and films."""
        ys = tuple(self._readings(index, handed, chunks))
        films = tuple(chunk.films and chunk.films[index] for chunk in chunks)
        return ys, moment.layers[index][2:], text.layers[index], films

    def _tokens(self, chunk: Given) -> Tensor:
        latent = torch.cat([chunk.latent.float(), chunk.condition.float()], dim=1)
        return self._dit.tokens(latent, self.share.part)

    @staticmethod
    def _start(index: int, moment: Moment, chunks: Sequence[Given]) -> tuple:
        """What a layer needs to begin: shift, scale, and per chunk its place and whether its keys are kept."""
        shift, scale, *_ = moment.layers[index]
        return shift, scale, tuple((chunk.sight.place(index), chunk.sight.fills_sink) for chunk in chunks)

    def _readings(self, index: int, handed: tuple, chunks: Sequence[Given]) -> Iterator:
        """Each chunk's attention. Between the two of them the sink moves on, and the second one's keys are written."""
        yield self.share.read(handed[0], index, chunks[0].sight)
        for part, chunk in zip(handed[1:], chunks[1:], strict=True):
            chunk.sight.move_sink(index, self._turn)
            yield self.share.read_carried(part, index, chunk.sight)

    def move_sinks(self, sight: Sight) -> None:
        """Before a chunk's first pass, unless that is one over two: stand the sink where the chunk wants it."""
        for index in range(len(self.layers)):
            sight.move_sink(index, self._turn)

    def _grid(self, latent_BCFHW: Tensor) -> tuple[int, int, int]:
        frames, height, width = latent_BCFHW.shape[2:]
        rows, columns = self._dit.patch_embedding.kernel_size[1:]
        return frames, height // rows, width // columns
