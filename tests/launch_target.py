"""What test_launch starts on other processes."""

import os
import signal

import torch
from micro_world import random_batch, random_dit

from lingbot_nb.distill import parallel, train
from lingbot_nb.distill.still import Halts
from lingbot_nb.presets import MICRO, StreamSettings
from lingbot_nb.world.latents import Batch

GLOBAL_BATCH = 4


def device():
    """This rank's: its GPU where there are any, so that ranks meet through NCCL there and through gloo on CPUs."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def global_batches():
    """This rank's rows of batches 0, 1, 2, …"""
    rank, ranks = parallel.place()
    rows = slice(rank * GLOBAL_BATCH // ranks, (rank + 1) * GLOBAL_BATCH // ranks)
    number = 0
    while True:
        whole = random_batch(number, GLOBAL_BATCH)
        yield Batch(*(tensor[rows].to(device()) for tensor in whole.tensors))
        number += 1


def curve(steps, checkpoint=None, log_every=1):
    """Teacher forcing with context noise, EMA and AdamW: every kind of draw, on shared noise."""
    dit = random_dit().to(device())
    stream = train.Stream(global_batches())
    state = train.TrainState.of(
        {"student": dit}, {"student": 1e-3}, seed=3, average={"student": 0.9}, streams={"batches": stream}
    )
    step = train.forcing_step(dit, stream, MICRO.stream, shift=MICRO.flow.shift, context_noise=0.1)
    yield from train.fit(step, state, steps=steps, checkpoint=checkpoint, every=1000, log_every=log_every)


def say(line):
    """One write with its newline: two ranks share a pipe, and print would send the newline by itself."""
    print(line + "\n", end="")


def failing(how):
    """Two rows, then rank 1 goes."""
    rank, _ = parallel.place()
    for step in range(100):
        if step == 2 and rank == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ArithmeticError("rank one cannot count")
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(torch.zeros(1, device=device()))
        yield {"step": step, "loss": float("nan"), "chatter": say(f"hello from {rank}")}


def histories(count):
    """Of halts drawn on ranks of which one has seen nobody walk for longer than two frames."""
    rank, ranks = parallel.place()
    latest, frames = (6, 2)[rank] if ranks > 1 else 6, 8
    places = torch.tensor([[0, at] for at in range(latest)], device=device())
    halts = Halts(None, places, torch.zeros(latest, 1, device=device()))
    object.__setattr__(halts, "batch", lambda rows, history, *_: int(places[rows, 1].min()) >= history - 1)
    settings = StreamSettings(chunk=1, image_first=True)
    drawn = halts.batches(3, torch.Generator(device()).manual_seed(rank), frames, settings)
    for _, (fits, history) in zip(range(count), drawn, strict=False):
        everyone = parallel.gathered(torch.tensor([[history, fits]], device=device()))
        yield {
            "least": int(everyone[:, 0].min()),
            "most": int(everyone[:, 0].max()),
            "fits": bool(everyone[:, 1].all()),
        }
