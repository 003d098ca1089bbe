"""What test_engine starts on other processes."""

from dataclasses import replace
from itertools import product

import torch
from micro_world import SIZE
from test_engine import SLOW, World, far, written_plainly

from lingbot_nb.distill import parallel
from lingbot_nb.presets import StreamSettings
from lingbot_nb.stream.engine_parallel import HeadShare


def distances(heads=SIZE.heads):
    """How far a stream shared by all processes is from one process's: for a sink that moves and for one that stays,
    clean passes alone and merged, usual numbers and 8-bit attention, with and without a kernel before attention."""
    assert parallel.several()
    for relative, merge, small, kernel in product((True, False), (True, False), (True, False), (None, written_plainly)):
        world = World(StreamSettings(2, 6, 2, relative, image_first=False), 8, size=replace(SIZE, heads=heads))
        speed = replace(SLOW, merge=merge, fp8_attention=small)
        shared = world.engine(speed, share=HeadShare.here().using(kernel=kernel))
        apart = far(world.play(world.engine(speed)), world.play(shared))
        worst = torch.tensor(apart)
        torch.distributed.all_reduce(worst, torch.distributed.ReduceOp.MAX)
        yield {"far": worst.item(), "heads": shared.cache.ordered(0)[0].shape[2], "small": small}
