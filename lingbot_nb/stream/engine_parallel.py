"""One stream on several GPUs (Ulysses, arXiv 2309.14509): tokens are split for everything but attention, heads for it.

Every rank holds all weights, its share of a chunk's tokens, and all frames' keys and values of its share of the heads.
So the past never moves: only the running chunk's q, k, v go out, packed into one exchange, and attention's output comes
back in another.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from lingbot_nb.distill import parallel
from lingbot_nb.model.dit import Attention
from lingbot_nb.model.fused import ALONE, USUAL, Alone, Format, Kernel, Raw, raw_of, turn
from lingbot_nb.model.kv_cache import Place, Sight, bits, put_words
from lingbot_nb.model.rope import RopeTable
from lingbot_nb.presets import ModelSize


class HeadShare(Alone):
    """The share of rank `rank` of `ranks`, all processes of the group. One stream, batch 1.

    Raises ValueError, when used, for heads or tokens of a chunk that do not divide by the ranks.
    """

    def __init__(self, rank: int, ranks: int, format: Format = USUAL, kernel: Kernel | None = None):
        super().__init__(format, kernel)
        self.rank, self.ranks = rank, ranks

    def using(self, format: Format | None = None, kernel: Kernel | None = None) -> "HeadShare":
        return HeadShare(self.rank, self.ranks, format or self.format, kernel or self.kernel)

    @classmethod
    def here(cls) -> Alone:
        """This process's share of all that torchrun started; alone, everything."""
        return cls(*parallel.place()) if parallel.several() else ALONE

    @classmethod
    def of_session(cls, rank: int, ranks: int) -> Alone:
        """The share of one process of a `remote.RemoteSession`, which waits here for the others."""
        if ranks == 1:
            return ALONE
        parallel.meet(rank, ranks)
        return cls(rank, ranks)

    def size(self, size: ModelSize) -> ModelSize:
        self._divides(size.heads, "heads")
        return replace(size, heads=size.heads // self.ranks, dim=size.dim // self.ranks)

    def _divides(self, count: int, what: str) -> int:
        if count % self.ranks:
            raise ValueError(f"{count} {what} do not divide by {self.ranks} processes: use another number of GPUs")
        return count // self.ranks

    def part(self, x_BLD: Tensor) -> Tensor:
        count = self._divides(x_BLD.shape[1], "tokens of a chunk")
        return x_BLD[:, self.rank * count : (self.rank + 1) * count].contiguous()

    def whole(self, x_BLD: Tensor) -> Tensor:
        return parallel.gathered(x_BLD[0])[None]

    def hand_over(
        self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, place: Place, keep: bool
    ) -> Tensor | Raw:
        """[ranks, L, 3 or 4, N / ranks, D]: what each rank is to get of q and k turned, v, and k if it is kept."""
        if self.kernel and not keep:
            return raw_of(attention, q, k, v)
        q, k, v = attention.normed(q, k, v)
        table = self._own_angles(q.shape[1], place)
        lower = self.format.lower_qk
        parts = [lower(turn(q, table)), lower(turn(k, table)), self.format.lower_v(v)]
        parts += [lower(k)] if keep else []
        packed = torch.stack([bits(part)[0].unflatten(1, (self.ranks, -1)) for part in parts], dim=1)
        return packed.permute(2, 0, 1, 3, 4).contiguous().view(parts[0].dtype)

    carry = hand_over

    def _own_angles(self, count: int, place: Place) -> RopeTable:
        return RopeTable(*(part[self.rank * count : (self.rank + 1) * count] for part in place.table))

    def _packed(self, raw: Raw, place: Place) -> Tensor:
        """What `hand_over` returns without a kernel."""
        heads, dim = place.keys.shape[2:]
        count = raw.q.shape[1]
        packed = torch.empty(self.ranks, count, 3, heads, dim, dtype=place.keys.dtype, device=raw.q.device)
        self.kernel(raw, self._own_angles(count, place), packed.unbind(2))
        return packed.view(self.format.dtype or packed.dtype)

    def arrive(self, handed: Tensor | Raw, layer: int, sight: Sight) -> Tensor:
        """q turned of all tokens and this rank's heads, when their keys and values are in the cache."""
        if isinstance(handed, Raw):
            handed = self._packed(handed, sight.place(layer))
        q, k, v, *unturned_k = self._exchanged(handed).flatten(0, 1).unsqueeze(0).unbind(2)
        put_words(sight.place(layer), k, v)
        if unturned_k:
            sight.keep_sink(layer, *unturned_k)
        return q

    def read(self, handed: Tensor | Raw, layer: int, sight: Sight) -> Tensor:
        """[ranks, L, N / ranks, D]: from every rank its heads' outputs for this rank's tokens."""
        y = self.format.attend(self.arrive(handed, layer, sight), *sight.keys_values(layer))
        return self._exchanged(y[0].unflatten(0, (self.ranks, -1)))

    read_carried = read

    def taken(self, y: Tensor) -> Tensor:
        return self.format.lift(y.transpose(0, 1).flatten(1, 2)[None])

    def _exchanged(self, parts: Tensor) -> Tensor:
        """Row r goes to rank r; row r of what comes back is from rank r."""
        received = torch.empty_like(parts)
        dist.all_to_all_single(bits(received), bits(parts))
        return received
