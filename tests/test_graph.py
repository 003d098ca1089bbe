"""What is prepared once stays prepared: for the next process, and without a host that waits for the device."""

import os
import subprocess
import sys

import pytest
import torch
from micro_world import SIZE
from test_engine import GPU, SHAPE, SLOW, STEPS, World, written_plainly
from torch.utils._python_dispatch import TorchDispatchMode

from lingbot_nb.model.fused import ALONE
from lingbot_nb.model.graph import compile_often, keep_what_is_compiled
from lingbot_nb.presets import StreamSettings
from lingbot_nb.runs import PROJECT
from lingbot_nb.stream.engine import Engine, Speed, StreamingDiT

COMPILES = """
import torch
from torch._dynamo.utils import counters  # with it torch has chosen a temporary folder
from lingbot_nb.model.graph import Compiler

compiler = Compiler()
compiler(lambda x: torch.nn.functional.rms_norm(x, (16,)) * 2 + x.sin())(torch.ones(8, 16))
print(compiler.failed, *(counters["inductor"][f"fxgraph_cache_{what}"] for what in ("miss", "hit")))
"""


@pytest.mark.parametrize(("limit", "then"), [(8, 64), (500, 500)])
def test_compiling_often_raises_the_compilers_limit_and_never_lowers_it(limit, then):
    with torch._dynamo.config.patch(recompile_limit=limit):
        compile_often()
        assert torch._dynamo.config.recompile_limit == then


def test_a_second_process_finds_what_the_first_one_compiled(tmp_path):
    around = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    around |= {"HOME": str(tmp_path), "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    told = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", COMPILES], env=around, capture_output=True, text=True, check=True)
        told.append(done.stdout.split()[-3:])
    assert told == [["False", "1", "0"], ["False", "0", "1"]]
    assert any((tmp_path / ".cache/lingbot_nb/inductor").iterdir())


def test_a_chosen_place_for_compiled_code_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    keep_what_is_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)


class Waits(TorchDispatchMode):
    """Notes every operator that makes the host wait until a number is there."""

    ops = {
        torch.ops.aten._local_scalar_dense.default,
        torch.ops.aten.is_nonzero.default,
        torch.ops.aten.equal.default,
        torch.ops.aten.nonzero.default,
    }

    def __init__(self):
        super().__init__()
        self.met = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.ops:
            self.met.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("speed", [SLOW, Speed(False, False, fp8=True, fp8_attention=True), Speed(False, merge=True)])
@pytest.mark.parametrize("share", [ALONE, ALONE.using(kernel=written_plainly)])
def test_no_chunk_makes_the_host_wait(speed, share):
    """While the window fills, when it is full, and with a start image."""
    for image_first in (False, True):
        world = World(StreamSettings(2, 7, 2, image_first=image_first), 6)
        with Waits() as waits:
            world.play(world.engine(speed, share=share))
        assert waits.met == []


def test_a_host_that_waits_is_noticed():
    """A network that reads its noise level back from a tensor does."""
    world = World(StreamSettings(1, 4, 1, image_first=False), 1)
    world.dit = StreamingDiT(world.dit)
    with Waits() as waits:
        world.play(world.plain())
    assert waits.met


@GPU
@pytest.mark.parametrize("recorded", [False, True])
def test_no_chunk_makes_the_host_wait_for_a_gpu(recorded):
    settings, device = StreamSettings(2, 7, 2, image_first=False), torch.device("cuda")
    world = World(settings, 6, device="cuda")
    engine = Engine(StreamingDiT(world.dit, SLOW)._net, settings, SHAPE, STEPS, graph=recorded)
    for _ in range(2):  # compiles, warms up and records
        world.play(engine)

    def draw(*sizes):
        return torch.randn(*sizes, SHAPE.latent_height, SHAPE.latent_width, device=device)

    given = draw(1, 16, 2), draw(1, 1, 16, 2), draw(1, SIZE.control_channels * 64, 2), draw(1, 20, 2)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            engine.denoise(*given)
            engine.finish()
    finally:
        torch.cuda.set_sync_debug_mode("default")
