"""Training the tiny tokenizer: reconstruction first, then texture.

Two stages in one schedule. First the whole VAE learns to reconstruct (L1 on pixels, edges and coarse pictures, a small
KL). Then the encoder is frozen, latents stand still, and the decoder alone goes on, with a patch discriminator beside
the same losses. The discriminator judges *fine detail only*: its pictures are high-passed, so that it cannot buy
realism with wrong shading, which is what PSNR would punish.
"""

import copy
import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lingbot_nb.distill import parallel
from lingbot_nb.distill.optim import Muon
from lingbot_nb.model.vae import RGB, TinyVAE, from_uint8

GROUP_WINDOW = 9
"""Pixel frames of a training window: three latent frames, so one has its full decoder memory and one starts a clip."""

CALIBRATION_BATCHES = 16
SMOOTHNESS_NOISE = 0.1
"""Step of the finite difference in `detail` units, where a high-passed pixel of 0.025 counts 0.1."""


@dataclass(frozen=True)
class TokenizerSettings:
    """Everything a tokenizer's training depends on beside its data.

    `lr` is Muon's; AdamW's few tensors learn at `adam_share` of it. Weights are relative to an L1 of 1: `edge` for
    picture gradients, `coarse` for half and quarter size, `kl` per latent element, in nats, `decibel` for a dB of PSNR,
    which every pixel frame counts alike: an L1 and its edges are not what a dB measures. The discriminator starts at
    the elapsed fraction `texture_from`; for `texture_ramp` of the run it learns alone, then its push on the decoder's
    pixels grows, over as long again, to `texture` times the reconstruction's own. texture=0 leaves this stage out.
    In that push, feature matching counts `match` times the realism. With `decoder_only` the encoder and the latents'
    scale stay as they are from the first step on: a new decoder for latents in which networks live already.
    """

    batch: int = 24
    lr: float = 2e-3
    adam_share: float = 0.3
    warmup_steps: int = 200
    decay_from: float = 0.4
    last_lr: float = 0.02
    clip: float = 1.0
    ema: float = 0.999
    edge: float = 0.5
    coarse: float = 0.5
    kl: float = 1e-4
    decibel: float = 0.0
    texture_from: float = 0.6
    texture_ramp: float = 0.05
    texture: float = 1.5
    match: float = 1.0
    smoothness: float = 0.2
    discriminator_lr: float = 3e-4
    discriminator_widths: tuple[int, int, int] = (32, 64, 128)
    decoder_only: bool = False

    def learning_rate(self, step: int, fraction: float) -> float:
        """Warm-up by steps, then flat, then linear in the elapsed fraction from `decay_from` to `last_lr` of lr."""
        warm = min(1.0, (step + 1) / self.warmup_steps)
        left = min(1.0, (1 - fraction) / (1 - self.decay_from))
        return self.lr * warm * (self.last_lr + (1 - self.last_lr) * max(0.0, left))

    def texture_push(self, fraction: float) -> float:
        """The discriminator's share: 0 while it learns alone, then a linear ramp to `texture`."""
        begins = self.texture_from + self.texture_ramp
        return self.texture * min(1.0, max(0.0, (fraction - begins) / max(self.texture_ramp, 1e-9)))


# --- data ---------------------------------------------------------------------------------------------------------


def random_groups(
    frames_CNHW3: Tensor, batch: int, generator: torch.Generator, pixel_frames: int = GROUP_WINDOW
) -> Tensor:
    """Random windows [batch, pixel_frames, H, W, 3] of uint8 clips [clips, N, H, W, 3], drawn where the clips lie.

    Raises ValueError when the clips are shorter than the window.
    """
    clips, length = frames_CNHW3.shape[:2]
    if length < pixel_frames:
        raise ValueError(f"clips of {length} pixel frames do not hold a window of {pixel_frames}: use longer clips")
    draw = dict(generator=generator, device=frames_CNHW3.device)
    clip = torch.randint(clips, (batch, 1), **draw)
    start = torch.randint(length - pixel_frames + 1, (batch, 1), **draw)
    return frames_CNHW3[clip, start + torch.arange(pixel_frames, device=frames_CNHW3.device)]


def group_batches(
    frames_CNHW3: Tensor, batch: int, generator: torch.Generator, pixel_frames: int = GROUP_WINDOW
) -> Iterator[Tensor]:
    """`random_groups` without end: the `batches` of `train_tokenizer`."""
    while True:
        yield random_groups(frames_CNHW3, batch, generator, pixel_frames)


# --- losses: pure functions of video [B, 3, N, H, W] in [-1, 1] ----------------------------------------------------


def edge_loss(fake: Tensor, real: Tensor) -> Tensor:
    """Mean |difference of picture gradients| along height and width, summed."""
    error = fake - real
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def coarse_loss(fake: Tensor, real: Tensor) -> Tensor:
    """Mean |difference| at half and at quarter size, summed."""
    half = F.avg_pool2d((fake - real).transpose(1, 2).flatten(0, 1), 2)
    return half.abs().mean() + F.avg_pool2d(half, 2).abs().mean()


def kl_loss(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(0, 1)) in nats, averaged over latent elements (Kingma & Welling 2014, appendix B)."""
    return 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()


def pixel_loss(fake: Tensor, real: Tensor, settings: TokenizerSettings) -> Tensor:
    """L1 on pixels plus the weighted edge and coarse losses, less the weighted PSNR."""
    loss = (fake - real).abs().mean()
    loss = loss + settings.edge * edge_loss(fake, real) + settings.coarse * coarse_loss(fake, real)
    return loss - settings.decibel * psnr(fake, real).mean() if settings.decibel else loss


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Relativistic, patch by patch against the reconstruction of the same patch: softplus(fake - real).

    Jolicoeur-Martineau 2019, eq. 3 in its softplus form; the generator's loss is the same with the sides exchanged.
    """
    return F.softplus(fake_logits - real_logits).mean()


def smoothness_loss(discriminator: nn.Module, seen: Tensor, logits: Tensor, noise: Tensor) -> Tensor:
    """Finite-difference stand-in for the R1 penalty, E |D(x + noise) - D(x)|^2 / noise variance: no double backward."""
    moved, _ = discriminator(seen + noise)
    return (moved - logits).square().mean() / noise.square().mean()


def match_loss(fake_features: list[Tensor], real_features: list[Tensor]) -> Tensor:
    """Mean |difference| of discriminator features relative to their size, averaged over layers: learnt perception."""
    terms = [
        (fake.float() - real.float()).abs().mean() / real.float().abs().mean().clamp_min(1e-6)
        for fake, real in zip(fake_features, real_features, strict=True)
    ]
    return torch.stack(terms).mean()


# --- measures -----------------------------------------------------------------------------------------------------


def psnr(fake: Tensor, real: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of video in [-1, 1], per pixel frame [B, N]."""
    error = ((fake.float() - real.float()) / 2).square().mean(dim=(1, 3, 4))
    return -10 * error.clamp_min(1e-10).log10()


def laplacian_variance(video: Tensor) -> Tensor:
    """Variance over each pixel frame of the 3x3 Laplacian of grey in [0, 1], [B, N]: how much fine detail it has."""
    grey = (video.float().mean(dim=1) + 1) / 2
    inner = grey[..., 1:-1, 1:-1]
    around = grey[..., :-2, 1:-1] + grey[..., 2:, 1:-1] + grey[..., 1:-1, :-2] + grey[..., 1:-1, 2:]
    return (around - 4 * inner).var(dim=(-2, -1))


def sharpness(fake: Tensor, real: Tensor) -> Tensor:
    """Laplacian variance of all of `fake` over that of all of `real`: 1 is as much fine detail, whatever it shows."""
    return laplacian_variance(fake).mean() / laplacian_variance(real).mean()


# --- discriminator ------------------------------------------------------------------------------------------------


def low_pass(pictures: Tensor) -> Tensor:
    """A 5x5 binomial blur of [G, C, H, W], edges repeated."""
    taps = pictures.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16
    channels = pictures.shape[1]
    padded = F.pad(pictures, (2, 2, 2, 2), mode="replicate")
    rows = F.conv2d(padded, taps.view(1, 1, 5, 1).expand(channels, 1, 5, 1), groups=channels)
    return F.conv2d(rows, taps.view(1, 1, 1, 5).expand(channels, 1, 1, 5), groups=channels)


def detail(video: Tensor, shade: Tensor) -> Tensor:
    """What the discriminator sees of video [B, 3, N, H, W]: [B (N - 1), 9, H, W].

    The high-passed pictures of each two neighbouring pixel frames, so that flicker shows, and `shade`, the real
    low-passed picture they belong to, so that it can tell which texture is due.
    """
    fine = 4 * (video - shade)
    pairs = torch.cat([fine[:, :, 1:], fine[:, :, :-1], shade[:, :, 1:]], dim=1)
    return pairs.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)


def video_shade(video: Tensor) -> Tensor:
    """`low_pass` of every pixel frame of [B, 3, N, H, W]."""
    batch = video.shape[0]
    return low_pass(video.transpose(1, 2).flatten(0, 1)).unflatten(0, (batch, -1)).transpose(1, 2)


class PatchDiscriminator(nn.Module):
    """Logits [G, 1, H/4, W/4] of `detail` pictures [G, 9, H, W], each about a patch of 20 pixels, and the features."""

    def __init__(self, widths: tuple[int, int, int]):
        super().__init__()
        fine, middle, coarse = widths
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(3 * RGB, fine, 3, padding=1),
                nn.Conv2d(fine, middle, 4, stride=2, padding=1),
                nn.Conv2d(middle, coarse, 4, stride=2, padding=1),
                nn.Conv2d(coarse, coarse, 3, padding=1),
            ]
        )
        self.head = nn.Conv2d(coarse, 1, 1)
        self.to(memory_format=torch.channels_last)

    def forward(self, seen: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        for layer in self.layers:
            seen = F.leaky_relu(layer(seen), 0.2)
            features.append(seen)
        return self.head(seen).float(), features


# --- optimiser ----------------------------------------------------------------------------------------------------


def make_optimizers(vae: TinyVAE, settings: TokenizerSettings) -> list[torch.optim.Optimizer]:
    """Muon for the hidden convolutions; AdamW for biases and for each half's first and last convolution."""
    hidden, rest = [], []
    for half in (vae.encoder, vae.decoder):
        convolutions = [module for module in half.modules() if isinstance(module, nn.Conv2d)]
        hidden += [module.weight for module in convolutions[1:-1]]
        rest += [convolutions[0].weight, convolutions[-1].weight] + [module.bias for module in convolutions]
    fused = next(vae.parameters()).is_cuda
    adam = torch.optim.AdamW(
        [dict(params=rest, share=settings.adam_share)], betas=(0.9, 0.99), weight_decay=0.0, fused=fused
    )
    return [Muon(hidden, settings.lr), adam]


# --- training -----------------------------------------------------------------------------------------------------


class _Training:
    """All that changes while a tokenizer is trained; what a checkpoint holds."""

    def __init__(self, vae: TinyVAE, settings: TokenizerSettings, generator: torch.Generator, compile: bool):
        device = next(vae.parameters()).device
        self.vae, self.settings, self.generator, self.device = vae, settings, generator, device
        vae.encoder.requires_grad_(not settings.decoder_only)
        self.average = copy.deepcopy(vae).requires_grad_(False)
        self.discriminator = PatchDiscriminator(settings.discriminator_widths).to(device)
        parallel.same_start(self.discriminator)
        self.optimizers = make_optimizers(vae, settings)
        self.critic_optimizer = torch.optim.AdamW(
            self.discriminator.parameters(), lr=settings.discriminator_lr, betas=(0.0, 0.99), weight_decay=0.0
        )
        self.step, self.seconds, self.texture_stage = 0, 0.0, False
        wrap: Callable = (lambda f: torch.compile(f, dynamic=False)) if compile else (lambda f: f)
        self.encode, self.decode, self.judge = wrap(vae.moments), wrap(vae.decode_groups), wrap(self.discriminator)
        self.pixel_loss = wrap(lambda fake, real: pixel_loss(fake, real, settings))

    # Whole state, nothing but tensors and plain values, so that it loads with weights_only.
    def state(self) -> dict:
        return {
            "settings": asdict(self.settings),
            "vae": self.vae.state_dict(),
            "average": self.average.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "optimizers": [o.state_dict() for o in (*self.optimizers, self.critic_optimizer)],
            "generator": self.generator.get_state(),
            "step": self.step,
            "seconds": self.seconds,
            "texture_stage": self.texture_stage,
        }

    def restore(self, state: dict) -> None:
        self.vae.load_state_dict(state["vae"])
        self.average.load_state_dict(state["average"])
        self.discriminator.load_state_dict(state["discriminator"])
        for optimizer, saved in zip((*self.optimizers, self.critic_optimizer), state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.generator.set_state(state["generator"].cpu())
        self.step, self.seconds = state["step"], state["seconds"]
        self.texture_stage = state["texture_stage"]
        self.vae.encoder.requires_grad_(not self.encoder_rests)

    @property
    def encoder_rests(self) -> bool:
        return self.texture_stage or self.settings.decoder_only

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def randn(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, device=like.device, generator=self.generator)

    def start_texture(self) -> None:
        """Freeze the averaged encoder and go on from the averaged decoder: as good as having annealed both."""
        self.vae.load_state_dict(self.average.state_dict())
        self.vae.encoder.requires_grad_(False)
        self.texture_stage = True

    def reconstruct(self, real: Tensor) -> tuple[Tensor, Tensor]:
        """The decoded video from a sample of the posterior, and its KL."""
        with self.autocast(), torch.set_grad_enabled(not self.encoder_rests):
            mean, log_variance = (moment.float() for moment in self.encode(real))
        latents = mean + (0.5 * log_variance).exp() * self.randn(mean)
        with self.autocast():
            groups = self.decode(latents)
        return groups[:, :, -real.shape[2] :].float(), kl_loss(mean, log_variance)

    def advance(self, real: Tensor, fraction: float) -> dict[str, Tensor]:
        """One step on video [B, 3, N, H, W]; metrics as tensors, so that nothing waits for the device."""
        if not self.texture_stage and self.settings.texture > 0 and fraction >= self.settings.texture_from:
            self.start_texture()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group.get("share", 1.0) * self.settings.learning_rate(self.step, fraction)
        fake, kl = self.reconstruct(real)
        if self.texture_stage:
            metrics = self.texture_backward(fake, real, self.settings.texture_push(fraction))
        else:
            pixel = self.pixel_loss(fake, real)
            (pixel + self.settings.kl * kl).backward()
            metrics = {"pixel": pixel.detach()}
        parallel.average_gradients(self.vae.parameters())
        metrics |= {"kl": kl.detach(), "gradient": nn.utils.clip_grad_norm_(self.vae.parameters(), self.settings.clip)}
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.update_average()
        return metrics

    def texture_backward(self, fake: Tensor, real: Tensor, push: float) -> dict[str, Tensor]:
        """Train the discriminator, then send its pull and the reconstruction's through the decoder at a fixed ratio.

        The ratio is taken between the two gradients at the pixels, so one number works at any stage of training.
        """
        leaf = fake.detach().requires_grad_()
        pixel = self.pixel_loss(leaf, real)
        (pull,) = torch.autograd.grad(pixel, leaf)
        shade = video_shade(real)
        seen_real = detail(real, shade)
        metrics = self.train_discriminator(seen_real, detail(fake.detach(), shade)) | {"pixel": pixel.detach()}
        if push > 0:
            judged, from_judge = self.judge_gradient(leaf, shade, seen_real)
            pull = pull + push * pull.norm() / from_judge.norm().clamp_min(1e-12) * from_judge
            metrics |= judged
        fake.backward(pull)
        return metrics

    def judge_gradient(self, leaf: Tensor, shade: Tensor, seen_real: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Which way the discriminator wants the pixels `leaf` to go, with its losses."""
        with self.autocast():
            with torch.no_grad():
                real_logits, real_features = self.judge(seen_real)
            fake_logits, fake_features = self.judge(detail(leaf, shade))
        fooled = discriminator_loss(fake_logits, real_logits)
        match = match_loss(fake_features, real_features)
        (gradient,) = torch.autograd.grad(fooled + self.settings.match * match, leaf)
        return {"fooled": fooled.detach(), "match": match.detach()}, gradient

    def train_discriminator(self, seen_real: Tensor, seen_fake: Tensor) -> dict[str, Tensor]:
        with self.autocast():
            real_logits, _ = self.judge(seen_real)
            fake_logits, _ = self.judge(seen_fake)
            told = discriminator_loss(real_logits, fake_logits)
            rough = self.roughness(seen_real, real_logits) + self.roughness(seen_fake, fake_logits)
        (told + self.settings.smoothness * rough).backward()
        parallel.average_gradients(self.discriminator.parameters())
        self.critic_optimizer.step()
        self.critic_optimizer.zero_grad(set_to_none=True)
        right = (real_logits > fake_logits).float().mean()
        return {"told": told.detach(), "rough": rough.detach(), "told_apart": right}

    def roughness(self, seen: Tensor, logits: Tensor) -> Tensor:
        """`smoothness_loss` of every third picture: a penalty can do with a sample, and costs a forward each."""
        seen, logits = seen[::3], logits[::3]
        return smoothness_loss(self.judge, seen, logits, SMOOTHNESS_NOISE * self.randn(seen))

    @torch.no_grad()
    def update_average(self) -> None:
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.parameters()), list(self.vae.parameters()), 1 - decay)


def train_tokenizer(
    vae: TinyVAE,
    batches: Iterator[Tensor],
    *,
    steps: int | None = None,
    seconds: float | None = None,
    settings: TokenizerSettings | None = None,
    generator: torch.Generator | None = None,
    held_out: Tensor | None = None,
    report_every: int = 100,
    checkpoint: Path | None = None,
    checkpoint_every: int = 1000,
    compile: bool = False,
    calibrate: bool = True,
) -> Iterator[dict]:
    """Train `vae` in place, yielding JSON-able metrics every `report_every` steps and at the end.

    `batches` yields uint8 windows [B, 4n + 1, H, W, 3] on the VAE's device; `held_out` is one more such batch, for PSNR
    and sharpness of the averaged weights. The length is `steps` or `seconds` (exactly one). When the generator ends,
    `vae` holds the averaged weights, calibrated; `calibrate=False` keeps the latents' mean and deviation as they were,
    for a tokenizer in whose latents networks live already. With `checkpoint`, everything is kept there every
    `checkpoint_every` steps and a second call goes on from it; for the same draws again, hand the sampler's `generator`
    over too. Of several ranks the first writes, and all go on from that.

    Raises ValueError for two lengths or none, or a checkpoint of other settings; RuntimeError when a loss blows up.
    """
    settings = settings or TokenizerSettings()
    if (steps is None) == (seconds is None):
        raise ValueError(f"steps {steps} and seconds {seconds}: give exactly one of them")
    device = next(vae.parameters()).device
    generator = generator or torch.Generator(device).manual_seed(0)
    state = _Training(vae, settings, generator, compile)
    if checkpoint is not None and Path(checkpoint).exists():
        _resume(state, Path(checkpoint))
    meter, before, began = _Meter(), state.seconds, time.monotonic()
    while (fraction := state.step / steps if steps is not None else state.seconds / seconds) < 1:
        meter.add(state.advance(from_uint8(next(batches)), fraction))
        state.seconds = parallel.agree(before + time.monotonic() - began, device)
        if state.step % report_every == 0:
            yield _report(state, meter, fraction, held_out)
        if checkpoint is not None and state.step % checkpoint_every == 0:
            _keep(state.state(), Path(checkpoint))
    _finish(state, batches, calibrate and not settings.decoder_only)
    if checkpoint is not None:
        _keep(state.state(), Path(checkpoint))
    yield _report(state, meter, 1.0, held_out)


class _Meter:
    """Averages metrics on the device between two reports."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.steps, self.began = 0, time.monotonic()

    def add(self, metrics: dict[str, Tensor]) -> None:
        self.steps += 1
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0) + value
            self.counts[name] = self.counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        if self.steps:
            means["steps_per_second"] = self.steps / (time.monotonic() - self.began)
        return {name: float(f"{value:.6g}") for name, value in means.items()}


def _report(state: _Training, meter: _Meter, fraction: float, held_out: Tensor | None) -> dict:
    report = {"step": state.step, "seconds": round(state.seconds, 2), "fraction": round(fraction, 4)} | meter.read()
    broken = [name for name, value in report.items() if not math.isfinite(value)]
    if broken:
        raise RuntimeError(
            f"tokenizer training blew up at step {state.step}: {', '.join(broken)} not finite; "
            f"use a learning rate below {state.settings.lr}"
        )
    report["lr"] = state.settings.learning_rate(state.step, fraction)
    if held_out is not None:
        with state.autocast():
            report |= evaluate_tokenizer(state.average, held_out)
    meter.clear()
    return report


@torch.no_grad()
def evaluate_tokenizer(vae: TinyVAE, frames_BNHW3: Tensor) -> dict[str, float]:
    """PSNR in dB (mean over pixel frames) and sharpness of uint8 windows [B, 4n + 1, H, W, 3] after `vae` and back."""
    real = from_uint8(frames_BNHW3)
    fake = vae.decode(vae.encode(real))
    return {"psnr": round(float(psnr(fake, real).mean()), 3), "sharpness": round(float(sharpness(fake, real)), 4)}


@torch.no_grad()
def _finish(state: _Training, batches: Iterator[Tensor], calibrate: bool) -> None:
    """Leave the averaged weights in the VAE, with latents of unit variance over a few hundred windows if wanted."""
    if calibrate:
        seen = [state.average.encode(from_uint8(batch)) for batch in itertools.islice(batches, CALIBRATION_BATCHES)]
        state.average.calibrate(torch.cat(seen))
    state.vae.load_state_dict(state.average.state_dict())
    state.vae.encoder.requires_grad_(True)


def _keep(state: dict, path: Path) -> None:
    if parallel.place()[0]:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".tmp")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def _resume(training: _Training, path: Path) -> None:
    state = torch.load(path, map_location=training.device, weights_only=True)
    wanted, found = asdict(training.settings), state["settings"]
    differing = [name for name in wanted if wanted[name] != found.get(name)]
    if differing:
        changes = ", ".join(f"{name} {found.get(name)} -> {wanted[name]}" for name in differing)
        raise ValueError(f"checkpoint '{path}' was made with other settings ({changes}): use them, or another path")
    own = training.generator.initial_seed()
    training.restore(state)
    if parallel.place()[0]:
        parallel.draw_on(training.generator, own, training.step)  # the file has the first rank's draws
