"""Speed: the chunk-by-chunk rollout of play with everything done once that can be done once, recorded and compiled.

    net = fast(dit, Speed())
    engine = Engine(net, preset.stream, preset.shape, few_steps((1, 0.75, 0.5, 0.25), preset.flow.shift))
    engine.prompt(states)
    x0 = engine.denoise(noise, fresh, control, condition)    # shown at once ...
    engine.finish()                                          # ... while the clean pass writes the cache

`Plain` is the same interface over the plain network: the reference that the engine is tested and measured against.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from lingbot_nb.distill.flow import FewStep
from lingbot_nb.distill.rollout import camera_of, denoise_chunk, pass_clean
from lingbot_nb.model import turn_kernel
from lingbot_nb.model.attention import Attend
from lingbot_nb.model.dit import DiT
from lingbot_nb.model.fp8 import quantise_layer
from lingbot_nb.model.fp8_attention import attend_fp8, emulated_attend, usable
from lingbot_nb.model.fused import (
    ALONE,
    Alone,
    FusedDiT,
    Given,
    Moment,
    as_it_is,
    eight_bits,
    exponential_gelu,
    join_projections,
)
from lingbot_nb.model.graph import Compile, Compiler, Recorder
from lingbot_nb.model.kv_cache import KVCache, Sight
from lingbot_nb.presets import LATENT_CHANNELS, MASK_CHANNELS, SPACE_STRIDE, StreamSettings, VideoShape

T_CLEAN = 0.0

Mark = Callable[[str], None]


def _unmarked(stage: str) -> None:
    pass


@dataclass(frozen=True)
class Speed:
    """What the engine may do to be fast; nothing here changes which frames attend to which.

    compile: torch.compile of each piece between attentions. graph: a chunk's passes as CUDA graphs (ignored on a CPU).
    join: q, k and v as one matrix product, and weights laid out as a CPU likes them. fp8: the layers' products in 8-bit
    floating point (approximate). fp8_attention: self-attention and its cache too, where there is a kernel for it.
    kernel: norm, rotation and cache write of queries and keys by a kernel of our own, where it runs (a GPU, bf16).
    merge: the clean pass and the next chunk's first step as one pass (more frames a second, but later ones: each waits
    for a pass that could have run after it was shown). first: recorded passes before whatever else wants the GPU, which
    is the decoder.
    """

    compile: bool = True
    graph: bool = True
    join: bool = True
    fp8: bool = False
    merge: bool = False
    fp8_attention: bool = False
    kernel: bool = True
    first: bool = False


SMALL = Speed(compile=False, graph=False)
"""For small networks on a CPU: nothing that takes long to get ready."""


def lay_rows_inside(layer: nn.Module) -> None:
    """Weights stored input by input instead of output by output, in place: for the few rows of a small stream a CPU's
    products are then up to half faster (140 against 88 GFLOP/s on one core for 60 rows, 256 to 768)."""
    for part in layer.modules():
        if isinstance(part, nn.Linear):
            part.weight = nn.Parameter(part.weight.detach().t().contiguous().t(), requires_grad=False)


def _attend_in_fp8(device: torch.device, head_dim: int) -> Attend | None:
    if device.type != "cuda":
        return emulated_attend
    return attend_fp8 if usable(device, head_dim) else None


def fast(
    dit: DiT,
    speed: Speed,
    *,
    share: Alone = ALONE,
    compile: Compile | None = None,
    to: Callable[[Tensor], Tensor] = as_it_is,
) -> FusedDiT:
    """The network that an Engine runs; its tensors are the DiT's except for those that `speed` rebuilds.

    `compile`, where speed asks for it: `graph.Compiler` by default. `to` brings tensors to the device, layer by layer:
    with fp8, a GPU then never holds the network in its full size.
    """
    sample = to(dit.head.modulation.detach())
    device = sample.device
    on_cpu = device.type == "cpu"
    wanted = {
        join_projections: speed.join,
        quantise_layer: speed.fp8,
        exponential_gelu: speed.compile,
        lay_rows_inside: speed.join and on_cpu,
    }
    prepare = [change for change, wished in wanted.items() if wished]
    compile = (compile or Compiler()) if speed.compile else as_it_is
    if speed.fp8_attention and (attend := _attend_in_fp8(device, dit.size.head_dim)):
        share = share.using(eight_bits(attend))
    if speed.kernel and turn_kernel.usable(device, dit.size.heads, dit.size.head_dim, sample.dtype):
        share = share.using(kernel=turn_kernel.norm_turn_write)
    return FusedDiT(dit, compile=compile, prepare=prepare, share=share, to=to)


class Chunk:
    """Where a chunk of `frames` frames keeps its inputs and its outcome: always the same memory, as recordings need.

    noise and x0 [1, 16, f, h, w]; fresh [steps - 1, 1, 16, f, h, w], the noise of every step but the first; condition
    [1, 20, f, h, w]; control [1, C, f, h, w] or None.
    """

    def __init__(self, frames: int, steps: int, control_channels: int, shape: VideoShape, device: torch.device):
        self._cells, self._device = (frames, shape.latent_height, shape.latent_width), device
        self.noise, self.x0 = self._empty(1, LATENT_CHANNELS), self._empty(1, LATENT_CHANNELS)
        self.condition = self._empty(1, MASK_CHANNELS + LATENT_CHANNELS)
        self.control = self._empty(1, control_channels * SPACE_STRIDE**2) if control_channels else None
        self.make_room(steps)

    def _empty(self, *sizes: int) -> Tensor:
        with torch.inference_mode(False):
            return torch.zeros(*sizes, *self._cells, device=self._device)

    def make_room(self, steps: int) -> None:
        """Room for the fresh noise of so many steps."""
        self.fresh = self._empty(steps - 1, 1, LATENT_CHANNELS)

    def tell(self, control: Tensor | None, condition: Tensor) -> None:
        """Copy in what the chunk is told."""
        self.condition.copy_(condition, non_blocking=True)
        if self.control is not None:
            self.control.copy_(control, non_blocking=True)


class _Scheduled:
    """The network for one chunk, whose noise levels are known beforehand: each call is the next pass of the list, a
    noise level and the chunks that run along in front."""

    def __init__(self, net: FusedDiT, passes: Iterable[tuple[Moment, Sequence[Given]]]):
        self._net = net
        self._passes = iter(passes)

    def __call__(self, x: Tensor, t: Tensor, *, condition_BCFHW, text, camera, cache, checkpoint: bool = False):
        moment, before = next(self._passes)
        return self._net(moment, text, *before, Given(x, condition_BCFHW, camera, cache.sight))


def _kept_writable(method: Callable) -> Callable:
    """Without gradient, yet never in inference mode: whoever calls, any later call can write to what is kept."""

    @wraps(method)
    def call(*arguments, **options):
        with torch.inference_mode(False), torch.no_grad():
            return method(*arguments, **options)

    return call


class Engine:
    """Streams one world fast. Use: `prompt`, then for every chunk `denoise` and `finish`; `reset` starts anew.

    The chunk's arithmetic is `rollout.denoise_chunk` and the clean pass of `rollout.write_clean`. With `merge` the
    clean pass runs together with the next chunk's first step, as one pass with twice the rows; without `clean_pass`
    there is none, and the past is what the last step wrote (for students trained so). `mark` is called with a stage's
    name when all its work has been handed to the device.
    """

    def __init__(
        self,
        net: FusedDiT,
        settings: StreamSettings,
        shape: VideoShape,
        steps: Sequence[FewStep],
        *,
        graph: bool = True,
        merge: bool = False,
        first: bool = False,
        clean_pass: bool = True,
        mark: Mark = _unmarked,
        cache: KVCache | None = None,
    ):
        self.device = net.device
        self.mark = mark
        self._net, self._shape, self._steps = net, shape, tuple(steps)
        self._merges, self._cleans = merge and clean_pass, clean_pass
        dtype = net.share.format.dtype or net.dtype
        self.cache = cache or KVCache(net.share.size(net.size), settings, shape, device=net.device, dtype=dtype)
        self._chunks: dict[int, Chunk] = {}
        self._moments: dict[tuple[float, ...], Moment] = {}
        self._holds: dict[int, Given] = {}
        self._held: Given | None = None
        self._text = None
        self._repeated = Recorder(first=first).repeated if graph and net.device.type == "cuda" else _by_any_key
        self._make_films, self._denoise, self._clean = (
            self._repeated(stage) for stage in (self._films_now, self._denoise_now, self._clean_now)
        )

    @property
    def steps(self) -> tuple[FewStep, ...]:
        """The noise levels of a chunk; others count from the next chunk on, which records its passes anew."""
        return self._steps

    @steps.setter
    def steps(self, steps: Sequence[FewStep]) -> None:
        self._steps = tuple(steps)
        for chunk in self._chunks.values():
            chunk.make_room(len(self._steps))
        self._denoise = self._repeated(self._denoise_now)

    @_kept_writable
    def prompt(self, states_BLC: Tensor) -> None:
        """Take text states [1, L, text_dim]; counts from the next chunk on. What is cached keeps the old prompt."""
        self.settle()
        text = self._net.text(states_BLC)
        if self._text is None:
            self._text = text
        for old, new in zip(self._text.layers, text.layers, strict=True):
            for place, part in zip(old, new, strict=True):
                place.copy_(part)

    def reset(self) -> None:
        """Forget the stream; the prompt and everything recorded stay."""
        self.cache.reset()
        self._held = None

    @_kept_writable
    def denoise(self, noise: Tensor, fresh: Iterable[Tensor], control: Tensor | None, condition: Tensor) -> Tensor:
        """x0 of the next chunk, a tensor of its own: arguments as `Chunk` holds them, all of `fresh` drawn before the
        first pass. Its clean pass is `finish`'s."""
        if self._held and self._held.sight.frames != noise.shape[2]:
            self.settle()
        chunk = self._open(noise.shape[2], control, condition)
        chunk.noise.copy_(noise, non_blocking=True)
        for place, drawn in zip(chunk.fresh, fresh, strict=True):
            place.copy_(drawn, non_blocking=True)
        self._denoise((self._held and self._held.sight.phase, self.cache.sight.phase))
        self._held = None
        self.mark("steps")
        return chunk.x0.clone()

    @_kept_writable
    def finish(self) -> None:
        """The clean pass of the running chunk, or what is put in its place: its keys and values become the past."""
        if self.cache.sight is None:
            raise RuntimeError("no chunk is running: call denoise before finish")
        if self._merges:
            self._held = self._hold()
        elif self._cleans:
            self._clean(self.cache.sight.phase)
        self.cache.commit()
        self.mark("clean pass")

    @_kept_writable
    def settle(self) -> None:
        """The clean pass that `merge` has put off, if there is one: to be called before the cache is read or kept."""
        if self._held:
            self._net.write(self._moment(T_CLEAN), self._text, self._held)
            self._held = None

    @_kept_writable
    def write(self, x0: Tensor, control: Tensor | None, condition: Tensor) -> None:
        """Take known clean latents [1, 16, f, h, w] as the next chunk (a start image)."""
        self.settle()
        chunk = self._open(x0.shape[2], control, condition)
        chunk.x0.copy_(x0)
        self._net.move_sinks(self.cache.sight)
        self._clean(self.cache.sight.phase)
        self.cache.commit()

    def _open(self, frames: int, control: Tensor | None, condition: Tensor) -> Chunk:
        if self._text is None:
            raise RuntimeError("the engine has no prompt yet: call prompt(states) first")
        if frames not in self._chunks:
            sizes = len(self._steps), self._net.size.control_channels
            self._chunks[frames] = Chunk(frames, *sizes, self._shape, self.device)
        self.cache.begin(frames, move_sink=False)
        self._chunk = self._chunks[frames]
        self._chunk.tell(control, condition)
        self._films = None  # before the next ones are made: they are the largest thing beside weights and cache
        self._films = self._make_films(frames)
        self.mark("camera")
        return self._chunk

    def _moment(self, *t: float) -> Moment:
        if t not in self._moments:
            self._moments[t] = self._net.moment(*t)
        return self._moments[t]

    def _films_now(self):
        return None if self._chunk.control is None else self._net.film(self._chunk.control)

    def _denoise_now(self) -> None:
        chunk, passes = self._chunk, [(self._moment(step.t), ()) for step in self._steps]
        if self._held:
            passes[0] = self._moment(T_CLEAN, self._steps[0].t), (self._held,)
        else:
            self._net.move_sinks(self.cache.sight)
        fresh = iter(chunk.fresh)
        told = dict(condition=chunk.condition, text=self._text, camera=self._films, cache=self.cache)
        net = _Scheduled(self._net, passes)
        chunk.x0.copy_(denoise_chunk(net, chunk.noise, self._steps, renoise=lambda _: next(fresh), **told))

    def _clean_now(self) -> None:
        # The chunk is committed by the caller: Python that counts would stand still in a recording.
        self._net.write(self._moment(T_CLEAN), self._text, self._clean_chunk())

    def _clean_chunk(self) -> Given:
        return Given(self._chunk.x0, self._chunk.condition, self._films, self.cache.sight)

    def _hold(self) -> Given:
        """A copy of all that the running chunk's clean pass needs, always in the same memory."""
        now = self._clean_chunk()
        old = self._holds.get(now.sight.frames)
        if old is None:
            old = self._holds[now.sight.frames] = _cloned(now)
        torch._foreach_copy_(_tensors(old), _tensors(now))
        return old._replace(sight=now.sight.held(old.sight))


def _tensors(given: Given) -> list[Tensor]:
    return [given.latent, given.condition, *(part for film in given.films or () for part in film)]


def _cloned(given: Given) -> Given:
    films = given.films and [tuple(part.clone() for part in film) for film in given.films]
    return Given(given.latent.clone(), given.condition.clone(), films, given.sight.held())


def _by_any_key(stage: Callable[[], Any]) -> Callable[[Hashable], Any]:
    return lambda key: stage()


class StreamingDiT(nn.Module):
    """The engine's network behind the calls of a DiT that `Session` and the rollout make: speed without recordings, for
    CPUs above all. Forward only, with a KVCache, one noise level for all clips and frames; reading that level makes the
    host wait for the device. `dit` must already be on its device, in its type.
    """

    def __init__(self, dit: DiT, speed: Speed = SMALL):
        super().__init__()
        self.dit = dit
        self.size = dit.size
        self._net = fast(dit, speed)
        self._moments: dict[float, Moment] = {}
        self.text, self.film = self._net.text, self._net.film

    def forward(self, latent_BCFHW: Tensor, t: Tensor, *, condition_BCFHW, text, camera, cache, checkpoint=False):
        """Velocity of the running chunk, as `DiT.forward` with a cache."""
        sight = cache.begin(latent_BCFHW.shape[2]).sight
        return self._net(self._moment(t), text, Given(latent_BCFHW, condition_BCFHW, camera, sight))

    def write(self, latent_BCFHW: Tensor, t: Tensor, *, condition_BCFHW, text, camera, cache) -> None:
        """Only the keys and values that `forward` leaves in the cache."""
        sight = cache.begin(latent_BCFHW.shape[2]).sight
        self._net.write(self._moment(t), text, Given(latent_BCFHW, condition_BCFHW, camera, sight))

    def _moment(self, t: Tensor) -> Moment:
        level = float(t.flatten()[0])
        if level not in self._moments:
            self._moments[level] = self._net.moment(level)
        return self._moments[level]


class Plain:
    """The engine's interface over the plain network or a `StreamingDiT`: nothing recorded, and noise drawn when it is
    needed, so that a chunk can be given up between two steps."""

    def __init__(
        self,
        dit: nn.Module,
        settings: StreamSettings,
        shape: VideoShape,
        steps: Sequence[FewStep],
        *,
        mark: Mark = _unmarked,
        cache: KVCache | None = None,
    ):
        self._dit, self.steps, self.mark = dit, tuple(steps), mark
        weight = next(dit.parameters())
        self.device = weight.device
        self.cache = cache or KVCache(dit.size, settings, shape, device=weight.device, dtype=weight.dtype)
        self._filmed: tuple[Tensor, Any] | None = None
        self._cleaned: Sight | None = None

    @torch.no_grad()
    def prompt(self, states_BLC: Tensor) -> None:
        self._text = self._dit.text(states_BLC)

    def reset(self) -> None:
        self.cache.reset()

    @torch.no_grad()
    def denoise(self, noise: Tensor, fresh: Iterable[Tensor], control: Tensor | None, condition: Tensor) -> Tensor:
        self._tell(control, condition)
        draws: Iterator[Tensor] = iter(fresh)
        self._x0 = denoise_chunk(self._dit, noise, self.steps, renoise=lambda _: next(draws), **self._told)
        self.mark("steps")
        return self._x0

    @torch.no_grad()
    def clean(self) -> None:
        """The clean pass alone, after which `finish` only commits. Until then the chunk can be given up as if nothing
        had been written: one that is as long, denoised in its place, overwrites all of it before reading."""
        pass_clean(self._dit, self._x0, **self._told)
        self._cleaned = self.cache.sight

    @torch.no_grad()
    def finish(self) -> None:
        if self._cleaned is None or self._cleaned is not self.cache.sight:
            self.clean()
        self.cache.commit()
        self.mark("clean pass")

    def settle(self) -> None:
        """Nothing is ever put off."""

    @torch.no_grad()
    def write(self, x0: Tensor, control: Tensor | None, condition: Tensor) -> None:
        self._tell(control, condition)
        self._x0 = x0
        self.finish()

    def _tell(self, control: Tensor | None, condition: Tensor) -> None:
        camera = self._film(control)
        self.mark("camera")
        self._told = dict(condition=condition, text=self._text, camera=camera, cache=self.cache)
        self._cleaned = None

    def _film(self, control: Tensor | None):
        """What the layers take from the camera. While the keys stay as they are it is that of the chunk before."""
        if control is None or self.device.type != "cpu":  # comparing would make the host wait for a GPU
            return camera_of(self._dit, control)
        if self._filmed is None or not torch.equal(self._filmed[0], control):
            self._filmed = control, camera_of(self._dit, control)
        return self._filmed[1]
