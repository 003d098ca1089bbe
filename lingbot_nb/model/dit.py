"""LingBot-World's diffusion transformer: teacher, student and critic are this one class.

No mask and no cache is the teacher, a mask is training, a cache is streaming. Parameters carry the released
checkpoint's own names, so its state dict loads as it is.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recompute

from lingbot_nb.model.attention import attend, kernel_mask, kernels
from lingbot_nb.model.kv_cache import GradCache, KVCache
from lingbot_nb.model.masks import FrameMask
from lingbot_nb.model.rope import RopeTable, apply_rope, rope_table
from lingbot_nb.presets import PATCH, ModelSize

Film = tuple[Tensor, Tensor]
"""Camera scale and shift of one layer, each [B, L, D]."""


Pick = Callable[[Tensor], Tensor]
"""[B, L, C] -> some of the tokens, or more."""


def everything(x_BLC: Tensor) -> Tensor:
    """All tokens, as they are."""
    return x_BLC


class Time(NamedTuple):
    """Embedding of the noise level, fp32: `head` [B, f, D] and `layers` [B, f, 6, D]; f is 1 or the frames."""

    head: Tensor
    layers: Tensor


class Text(NamedTuple):
    """What cross-attention needs of a prompt: per layer, keys and values [B, text_len, N, D]. Good for any chunk."""

    layers: tuple[tuple[Tensor, Tensor], ...]


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """Cosines, then sines of t at dim / 2 frequencies 10000^(-2j / dim): [...] -> [..., dim] fp32, by way of fp64."""
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float64, device=t.device)
    angles = t.to(torch.float64).unsqueeze(-1) * 10_000.0 ** (-steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


class Linear(nn.Linear):
    """A linear map that takes its input in any type and works in its weight's."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)


def _linear_fp32(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight.float(), layer.bias.float())


def _layer_norm(x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:], eps=eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the whole vector (before heads are split), in fp32, back in the input's dtype."""

    def __init__(self, dim: int, eps: float, **kwargs):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim, **kwargs))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype == torch.float32:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight.to(x.dtype)


class Attention(nn.Module):
    """Projections of one attention; self- and cross-attention hold the same ten tensors."""

    def __init__(self, dim: int, heads: int, eps: float, **kwargs):
        super().__init__()
        self.heads = heads
        self.q = Linear(dim, dim, **kwargs)
        self.k = Linear(dim, dim, **kwargs)
        self.v = Linear(dim, dim, **kwargs)
        self.o = Linear(dim, dim, **kwargs)
        self.norm_q = RMSNorm(dim, eps, **kwargs)
        self.norm_k = RMSNorm(dim, eps, **kwargs)

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], self.heads, -1)

    def queries(self, x: Tensor) -> Tensor:
        return self._heads(self.norm_q(self.q(x)))

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads(self.norm_k(self.k(x))), self._heads(self.v(x))

    def projections(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, L, D], before norms and heads."""
        return self.q(x), self.k(x), self.v(x)

    def normed(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`projections` with their norms, split into heads [B, L, N, D]."""
        return self._heads(self.norm_q(q)), self._heads(self.norm_k(k)), self._heads(v)

    def out(self, y_BLND: Tensor) -> Tensor:
        return self.o(y_BLND.flatten(2))


class Layer(nn.Module):
    """One transformer layer: self-attention, camera, text, feed-forward. `attend_text` is the call that reads the text,
    for those who need it in another form."""

    attend_text = staticmethod(attend)

    def __init__(self, size: ModelSize, **kwargs):
        super().__init__()
        dim = size.dim
        self.eps = size.eps
        self.self_attn = Attention(dim, size.heads, size.eps, **kwargs)
        self.cross_attn = Attention(dim, size.heads, size.eps, **kwargs)
        self.norm3 = nn.LayerNorm(dim, size.eps, **kwargs)
        self.ffn = nn.Sequential(
            Linear(dim, size.ffn_dim, **kwargs), nn.GELU("tanh"), Linear(size.ffn_dim, dim, **kwargs)
        )
        self.modulation = nn.Parameter(torch.empty(1, 6, dim, **kwargs))
        if size.control_channels:
            self.cam_injector_layer1 = Linear(dim, dim, **kwargs)
            self.cam_injector_layer2 = Linear(dim, dim, **kwargs)
            self.cam_scale_layer = Linear(dim, dim, **kwargs)
            self.cam_shift_layer = Linear(dim, dim, **kwargs)

    def film(self, camera_BLD: Tensor) -> Film:
        """Scale and shift that the camera tokens give to this layer's residual stream."""
        hidden = F.silu(self.cam_injector_layer1(camera_BLD))
        hidden = self.cam_injector_layer2(hidden) + camera_BLD
        return self.cam_scale_layer(hidden), self.cam_shift_layer(hidden)

    def modulations(self, time_BF6D: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale, gate of self-attention, then of the feed-forward, fp32: see `_spread`."""
        return _spread(self.modulation.float() + time_BF6D)

    def projections(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, L, D] of self-attention, before norms and heads."""
        return self.self_attn.projections(_modulate(x, self.eps, shift, scale))

    def before(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unturned q, k, v [B, L, N, D] of self-attention."""
        return self.self_attn.normed(*self.projections(x, shift, scale))

    def after(self, x: Tensor, y_BLND: Tensor, gates: tuple[Tensor, ...], text, camera) -> Tensor:
        """Everything that follows self-attention's softmax."""
        gate_attention, shift, scale, gate = gates
        x = _gated(x, gate_attention, self.self_attn.out(y_BLND))
        if camera is not None:
            scale_BLD, shift_BLD = camera if isinstance(camera, tuple) else self.film(camera)
            x = torch.addcmul(x + shift_BLD, x, scale_BLD.to(x.dtype))
        x = x + self._read(F.layer_norm(x, x.shape[-1:], *self._norm3(), self.eps), text)
        return _gated(x, gate, self.ffn(_modulate(x, self.eps, shift, scale)))

    def _norm3(self) -> tuple[Tensor, Tensor]:
        return self.norm3.weight.float(), self.norm3.bias.float()

    def _read(self, x: Tensor, text) -> Tensor:
        k, v = text if isinstance(text, tuple) else self.cross_attn.keys_values(text)
        return self.cross_attn.out(self.attend_text(self.cross_attn.queries(x), *_batched(k, v, len(x))))

    def forward(self, x: Tensor, time_BF6D: Tensor, rope: RopeTable | None, text, camera, mask, kv=None) -> Tensor:
        """x [B, L, D] fp32 -> the same. `kv`, a cache and this layer's number in it, replaces `rope`."""
        shift, scale, *gates = self.modulations(time_BF6D)
        q, k, v = self.before(x, shift, scale)
        if kv is None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
        else:
            cache, index = kv
            q, k, v = cache.update(index, q, k, v)
        return self.after(x, attend(q, k, v, mask), tuple(gates), text, camera)


def _batched(k: Tensor, v: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    return (k, v) if len(k) == batch else (k.expand(batch, -1, -1, -1), v.expand(batch, -1, -1, -1))


def _spread(per_frame_BFnD: Tensor) -> tuple[Tensor, ...]:
    """n modulations that meet tokens: [B, 1, D] when all frames share them, else [B, F, 1, D] (see `_by_frame`)."""
    if per_frame_BFnD.shape[1] == 1:
        return per_frame_BFnD.transpose(1, 2).unbind(1)
    return per_frame_BFnD.unsqueeze(3).unbind(2)


def _by_frame(x_BLD: Tensor, modulation: Tensor) -> Tensor:
    if modulation.ndim == 3:
        return x_BLD
    batch, length, dim = x_BLD.shape
    return x_BLD.view(batch, modulation.shape[1], length // modulation.shape[1], dim)


def _modulate(x: Tensor, eps: float, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, _by_frame(_layer_norm(x, eps), scale), 1 + scale).view(x.shape)


def _gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return torch.addcmul(_by_frame(x, gate), gate, _by_frame(y.float(), gate)).view(x.shape)


class Head(nn.Module):
    """Last norm and projection to patches, in fp32."""

    def __init__(self, size: ModelSize, **kwargs):
        super().__init__()
        self.eps = size.eps
        self.head = nn.Linear(size.dim, PATCH[0] * PATCH[1] * PATCH[2] * size.out_channels, **kwargs)
        self.modulation = nn.Parameter(torch.empty(1, 2, size.dim, **kwargs))

    def forward(self, x: Tensor, time_BFD: Tensor) -> Tensor:
        shift, scale = _spread(self.modulation.float() + time_BFD.unsqueeze(2))
        return _linear_fp32(self.head, _modulate(x, self.eps, shift, scale))


def _patches(x_BCFHW: Tensor) -> Tensor:
    """[B, C, F, H, W] -> [B, F*h*w, C*4]: 2x2 patches, channel slowest, tokens in (frame, row, column) order."""
    batch, channels, frames, height, width = x_BCFHW.shape
    x = x_BCFHW.reshape(batch, channels, frames, height // PATCH[1], PATCH[1], width // PATCH[2], PATCH[2])
    return x.permute(0, 2, 3, 5, 1, 4, 6).reshape(batch, -1, channels * PATCH[1] * PATCH[2])


def _unpatch(x_BLC: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """[B, F*h*w, 4*C] -> [B, C, F, H, W]: inside a patch rows, then columns, channel fastest."""
    frames, rows, columns = grid
    x = x_BLC.reshape(len(x_BLC), frames, rows, columns, PATCH[1], PATCH[2], -1)
    return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(len(x), -1, frames, rows * PATCH[1], columns * PATCH[2])


class DiT(nn.Module):
    """LingBot-World's transformer: predicts velocity v = eps - x0 (lingbot-world, arXiv 2601.20540).

    `size.control_channels` 0 leaves the camera tensors out (plain Wan2.2).
    """

    def __init__(self, size: ModelSize, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        kwargs = {"device": device, "dtype": dtype}
        dim = size.dim
        self.size = size
        self.patch_embedding = nn.Conv3d(size.in_channels, dim, PATCH, PATCH, **kwargs)
        self.text_embedding = nn.Sequential(
            Linear(size.text_dim, dim, **kwargs), nn.GELU("tanh"), Linear(dim, dim, **kwargs)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(size.freq_dim, dim, **kwargs), nn.SiLU(), nn.Linear(dim, dim, **kwargs)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim, **kwargs))
        if size.control_channels:
            self.patch_embedding_wancamctrl = Linear(size.control_features, dim, **kwargs)
            self.c2ws_hidden_states_layer1 = Linear(dim, dim, **kwargs)
            self.c2ws_hidden_states_layer2 = Linear(dim, dim, **kwargs)
        self.blocks = nn.ModuleList(Layer(size, **kwargs) for _ in range(size.layers))
        self.head = Head(size, **kwargs)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Fresh weights: Xavier linears without bias, normal(0.02) text and time, head zero, modulation ~ 1/sqrt(D)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in (*self.text_embedding, *self.time_embedding):
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        nn.init.zeros_(self.patch_embedding.bias)
        for table in (*(layer.modulation for layer in self.blocks), self.head.modulation):
            nn.init.normal_(table, std=self.size.dim**-0.5)
        nn.init.zeros_(self.head.head.weight)

    def text(self, context: Tensor | list[Tensor]) -> Text:
        """Per-layer cross-attention keys and values of a prompt: once a prompt, good for every forward.

        `context`: text states [B, L, text_dim], or a list of [L_i, text_dim]; L <= text_len. Padding to text_len with
        zeros is part of the model: the padded positions are attended to.
        """
        tokens = self.text_tokens(context)
        return Text(tuple(layer.cross_attn.keys_values(tokens) for layer in self.blocks))

    def text_tokens(self, context: Tensor | list[Tensor]) -> Tensor:
        """Embedded prompt [B, text_len, D]; `forward` takes it too, and then every layer makes its own K and V."""
        rows = [
            F.pad(self._checked(row), (0, 0, 0, self.size.text_len - len(row)))
            for row in (context if isinstance(context, list) else context.unbind(0))
        ]
        return self.text_embedding(torch.stack(rows))

    def _checked(self, row: Tensor) -> Tensor:
        if row.ndim != 2 or row.shape[1] != self.size.text_dim or len(row) > self.size.text_len:
            raise ValueError(
                f"text states of shape {tuple(row.shape)}: expected at most {self.size.text_len} rows of "
                f"{self.size.text_dim}"
            )
        return row

    def camera_tokens(self, control_BCFHW: Tensor, part: Pick = everything) -> Tensor:
        """Camera tokens [B, L, D] of control channels [B, 64 * control_channels, F, H, W]; shared by all layers. Of
        `part` of the tokens only, if it is given."""
        expected = self.size.control_features // (PATCH[1] * PATCH[2])
        if not expected or control_BCFHW.shape[1] != expected:
            raise ValueError(
                f"control has {control_BCFHW.shape[1]} channels, this model takes {expected}: build it for "
                f"{self.size.control_channels} channels a pixel"
            )
        tokens = self.patch_embedding_wancamctrl(part(_patches(control_BCFHW)))
        hidden = F.silu(self.c2ws_hidden_states_layer1(tokens))
        return tokens + self.c2ws_hidden_states_layer2(hidden)

    def film(self, control_BCFHW: Tensor) -> list[Film]:
        """Per layer, the camera's scale and shift [B, L, D]: once a chunk, good for all its forwards."""
        camera = self.camera_tokens(control_BCFHW)
        return [layer.film(camera) for layer in self.blocks]

    def time(self, t: Tensor) -> Time:
        """Embedding of t ([] or [B] or [B, F], 0..1000), fp32 whatever the weights; once per distinct t."""
        if t.ndim > 2:
            raise ValueError(f"t has shape {tuple(t.shape)}: give one value, one per clip [B], or one per frame [B, F]")
        t = t.reshape(-1, 1) if t.ndim < 2 else t
        with torch.autocast(t.device.type, enabled=False):
            hidden = F.silu(_linear_fp32(self.time_embedding[0], sinusoid(t, self.size.freq_dim)))
            head = _linear_fp32(self.time_embedding[2], hidden)
            layers = _linear_fp32(self.time_projection[1], F.silu(head))
        return Time(head, layers.unflatten(-1, (6, -1)))

    def forward(
        self,
        latent_BCFHW: Tensor,
        t: Tensor | Time,
        *,
        condition_BCFHW: Tensor,
        text: Text | Tensor,
        camera: Tensor | Sequence[Film] | None = None,
        mask: FrameMask | None = None,
        cache: KVCache | GradCache | None = None,
        positions: Sequence[int] | None = None,
        checkpoint: bool = False,
    ) -> Tensor:
        """Velocity v = eps - x0 of noisy latents [B, 16, F, H, W], same shape, fp32.

        t: noise level 0..1000, one value, [B] or [B, F] (or `time(t)`). condition [B, 20, F, H, W]: 4 mask and 16 image
        channels. text: `text(...)` (or `text_tokens(...)`). camera: None, `camera_tokens(...)` (every layer computes
        scale and shift; for training) or `film(...)` (for streaming). mask: frames x frames. cache: the frames are the
        running chunk of a stream; `commit()` is the caller's. positions: F frame numbers instead of 0..F-1.
        checkpoint: recompute layers in backward instead of keeping their activations.
        """
        latent = torch.cat([latent_BCFHW.float(), condition_BCFHW.float()], dim=1)
        frames, height, width = latent.shape[2:]
        grid = frames, height // PATCH[1], width // PATCH[2]
        self._check(latent, mask, cache, positions)
        x = self.tokens(latent)
        time = t if isinstance(t, Time) else self.time(t.to(x.device))
        _check_time(time, len(latent), frames)
        rope = stream = None
        if cache is None:
            rope = rope_table(range(frames) if positions is None else positions, grid[1:], self.size.head_dim, x.device)
        else:
            stream = cache.begin(frames)
        kernels()  # looks for attention kernels outside what may be compiled
        mask = mask and kernel_mask(mask, grid[1] * grid[2], x.device)
        for index, layer in enumerate(self.blocks):
            words = text.layers[index] if isinstance(text, Text) else text
            film = camera if camera is None or isinstance(camera, Tensor) else camera[index]
            inputs = x, time.layers, rope, words, film, mask, stream and (stream, index)
            x = recompute(layer, *inputs, use_reentrant=False) if checkpoint else layer(*inputs)
        return self.velocity(x, time, grid)

    def tokens(self, latent_BCFHW: Tensor, part: Pick = everything) -> Tensor:
        """Latent and condition channels together [B, 36, F, H, W] as tokens [B, L, D], fp32: what the layers turn. Of
        `part` of the tokens only, if it is given."""
        return _linear_patch(self.patch_embedding, part(_patches(latent_BCFHW))).float()

    def velocity(self, x_BLD: Tensor, time: Time, grid: tuple[int, int, int], whole: Pick = everything) -> Tensor:
        """What the last layer left, as velocity [B, 16, F, H, W], fp32. `grid`: tokens as (frames, height, width).
        `whole` makes all tokens' of a part's: of the 64 numbers that a token ends in, not of its D."""
        with torch.autocast(x_BLD.device.type, enabled=False):
            return _unpatch(whole(self.head(x_BLD, time.head)), grid)

    def _check(self, latent: Tensor, mask: FrameMask | None, cache, positions) -> None:
        frames, height, width = latent.shape[2:]
        if latent.shape[1] != self.size.in_channels:
            raise ValueError(
                f"latent and condition have {latent.shape[1]} channels together, this model takes "
                f"{self.size.in_channels}"
            )
        if height % PATCH[1] or width % PATCH[2]:
            raise ValueError(f"latent of {height}x{width} does not divide into {PATCH[1]}x{PATCH[2]} patches")
        if positions is not None and (cache is not None or len(positions) != frames):
            raise ValueError(f"{len(positions)} positions for {frames} frames: give one each, and none with a cache")
        if mask is not None and mask.frames != (frames, frames):
            raise ValueError(f"mask '{mask.name}' is for {mask.frames} frames, the latent has {frames}")
        if mask is not None and cache is not None and cache.frames_seen:
            raise ValueError("a mask with a cache only makes sense for its first chunk (to fill it in one pass)")


def _check_time(time: Time, batch: int, frames: int) -> None:
    rows, columns = time.head.shape[:2]
    # Any divisor of the token count would broadcast, and give tokens another frame's noise level.
    if rows not in (1, batch) or columns not in (1, frames):
        raise ValueError(
            f"t has {rows} x {columns} values for a batch of {batch} and {frames} frames: give one, one per clip [B], "
            "or one per frame [B, F]"
        )


def _linear_patch(conv: nn.Conv3d, patches_BLC: Tensor) -> Tensor:
    # A convolution whose kernel is its stride is a matrix product, which every backend does faster.
    return F.linear(patches_BLC.to(conv.weight.dtype), conv.weight.flatten(1), conv.bias)
