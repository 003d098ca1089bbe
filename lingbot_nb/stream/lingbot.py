"""LingBot-World's own weights, played: a released or converted folder in, a session out, on one GPU or several.

    world = dict(start_image="harbour.png", prompt="a walk along a harbour at dawn", decoder="taew2_1.safetensors")
    session = play_on(2, "student", height=720, width=1280, **world)

Nothing here knows whether the weights are a few-step student's: those of the 50-step teacher play too, and look it.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from lingbot_nb import presets
from lingbot_nb.model import released
from lingbot_nb.model.fused import ALONE, Alone
from lingbot_nb.model.taehv import TAEHV, Paired
from lingbot_nb.model.text import WanText
from lingbot_nb.model.wan_vae import WanVAE
from lingbot_nb.presets import ModelSize, Preset, StreamSettings, VideoShape
from lingbot_nb.stream.engine import Speed
from lingbot_nb.stream.engine_memory import check_memory, taehv_maps, wan_maps
from lingbot_nb.stream.engine_parallel import HeadShare
from lingbot_nb.stream.remote import RemoteSession
from lingbot_nb.stream.session import Session, fit_image

FULL = Speed(fp8=True, fp8_attention=True)
"""Everything that makes the large network fast; `bench stream` shows what each part gains, `report.precision` what the
8-bit numbers cost."""
CHUNK_SECONDS = 300.0
"""After which processes that make a chunk count as hung: their first chunks compile for most of a minute."""


def open_release(
    folder: str | Path,
    *,
    start_image,
    prompt: str,
    part: str | None = None,
    decoder: str | Path | None = None,
    height: int = 480,
    width: int = 832,
    stream: StreamSettings | None = None,
    steps: int = 4,
    seed: int = 0,
    speed: Speed = FULL,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    share: Alone = ALONE,
    text=None,
    vae=None,
) -> Session:
    """A session of the DiT that `folder` holds, with the VAE and the text encoder that lie beside it.

    `part` names one of several DiTs. `decoder` is a file of TAEHV weights, which decodes at a stream's pace; without it
    the Wan VAE does, several times slower. `stream` are chunk, window and sink, by default the preset's. `text` and
    `vae` take the place of what lies in the folder. Raises, before the large weights are read, FileNotFoundError for
    what is missing, ValueError for what does not fit, and RuntimeError that says what would where the GPU is too small.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    chosen = released.find_one(folder, part).part
    (report,) = (report for report in released.inspect(folder) if report.weights.part == chosen)
    preset = preset_for(report.check().size, height, width, stream)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        decoding = wan_maps if decoder is None else taehv_maps
        check_memory(preset, free, speed, ranks=share.ranks, value_bytes=dtype.itemsize, decoder=decoding)
    image = fit_image(start_image, preset.shape)
    vae = vae or _vae(folder, device, dtype)
    if decoder is not None:
        vae = Paired(vae, TAEHV.from_file(decoder, device=device, dtype=dtype))
    text = text or WanText(folder, text_len=preset.model.text_len)
    # In 8-bit numbers the network comes to the GPU layer by layer: both forms of it need not fit there.
    dit = released.load_dit(folder, part=part, device="cpu" if speed.fp8 else device, dtype=dtype)
    options = dict(start_image=image, prompt=prompt, steps=steps, seed=seed)
    return Session(preset, dit, vae, text, device=device, dtype=dtype, speed=speed, share=share, **options)


def play_on(gpus: int, folder: str | Path, **options) -> Session | RemoteSession:
    """`open_release` on one GPU in this process, or shared by several in processes of their own."""
    if gpus <= 1:
        return open_release(folder, **options)
    return RemoteSession(partial(rank_release, folder=folder, **options), gpus, seconds=CHUNK_SECONDS)


def rank_release(rank: int, world: int, *, folder: str | Path, **options) -> Session:
    """What each process of a `RemoteSession` builds: `open_release` on its own GPU, with its share of the heads."""
    if torch.cuda.is_available():
        options.setdefault("device", torch.device("cuda", rank % torch.cuda.device_count()))
        torch.cuda.set_device(options["device"])
    return open_release(folder, share=HeadShare.of_session(rank, world), **options)


def preset_for(size: ModelSize, height: int, width: int, stream: StreamSettings | None = None) -> Preset:
    """The preset of a model of this size at another picture size; LingBot's schedule where none has that size."""
    near = released.preset_of(size) or replace(presets.LINGBOT, model=size)
    return replace(near, shape=VideoShape(height, width, near.shape.pixel_frames), stream=stream or near.stream)


def _vae(folder: str | Path, device: torch.device, dtype: torch.dtype) -> WanVAE:
    file = released.companions(folder).get("VAE")
    if file is None:
        raise FileNotFoundError(
            f"{folder} has no {released.COMPANIONS['VAE']}: put the release's file there, or pass a VAE as vae="
        )
    return WanVAE.from_file(file, device=device, dtype=dtype).channels_last()
