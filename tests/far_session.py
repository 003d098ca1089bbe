"""Sessions for other processes to build: a painted one, and a micro one with seeded random weights."""

import os
import time
from functools import partial
from pathlib import Path

from fake_session import FakeSession


def painted(rank: int, world: int, *, folder: str = "", seconds: float = 0.0) -> FakeSession:
    return FakeSession(seconds=seconds, log=os.path.join(folder, f"rank-{rank}.jsonl") if folder else None)


class Refusing(FakeSession):
    """Does not know the key i, and one rank of it does not know k."""

    rank = 0

    def generate(self, keys):
        if "i" in keys or ("k" in keys and self.rank):
            raise ValueError("that key is not known here")
        return super().generate(keys)


def refusing(rank: int, world: int) -> Refusing:
    session = Refusing()
    session.rank = rank
    return session


class Waiting(FakeSession):
    """Its first rank fails at the key k, and the others wait for it as in a collective."""

    rank = 0

    def generate(self, keys):
        if "k" in keys and self.rank == 0:
            raise RuntimeError("cuda:0 is full")
        if "k" in keys:
            time.sleep(60)
        return super().generate(keys)


def waiting(rank: int, world: int) -> Waiting:
    session = Waiting()
    session.rank = rank
    return session


def broken(rank: int, world: int):
    raise FileNotFoundError(f"weights of rank {rank} are missing")


def micro(rank: int = 0, world: int = 1, **options):
    """The same weights in every process."""
    import numpy as np
    import torch

    from lingbot_nb.model.dit import DiT
    from lingbot_nb.model.text import TinyText
    from lingbot_nb.model.vae import MICRO_VAE, TinyVAE
    from lingbot_nb.presets import MICRO
    from lingbot_nb.stream.session import Session

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dit, vae = DiT(MICRO.model), TinyVAE(MICRO_VAE)
    torch.nn.init.normal_(dit.head.head.weight, std=0.1)
    image = np.arange(MICRO.shape.height * MICRO.shape.width * 3, dtype=np.uint8)
    image = image.reshape(MICRO.shape.height, MICRO.shape.width, 3)
    text = TinyText(MICRO.model.text_dim, MICRO.model.text_len)
    return Session(MICRO, dit, vae, text, start_image=image, prompt="a corridor", steps=2, seed=3, **options)


def shared(rank: int, world: int):
    """One world on the engine, each process with its share of the heads."""
    from lingbot_nb.stream.engine import SMALL
    from lingbot_nb.stream.engine_parallel import HeadShare

    return micro(speed=SMALL, share=HeadShare.of_session(rank, world))


def in_folder(folder: Path, **options):
    return partial(painted, folder=str(folder), **options)
