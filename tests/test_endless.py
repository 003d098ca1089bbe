"""Endless play: a thousand chunks at micro size cost what the first ones cost, and what is measured of them."""

import gc
from itertools import islice

import numpy as np
import pytest
import torch
from fake_session import FakeSession
from far_session import micro
from torch.utils.flop_counter import FlopCounterMode

from lingbot_nb.presets import FPS
from lingbot_nb.stream import endless

CHUNKS = 1000


def flops(session) -> int:
    with FlopCounterMode(display=False) as counter:
        session.step("w")
    return counter.get_total_flops()


def live_bytes() -> int:
    gc.collect()
    return sum(x.nbytes for x in gc.get_objects() if issubclass(type(x), torch.Tensor))


def test_a_thousand_chunks_cost_what_the_first_did():
    """Arithmetic, tensors and resident memory of a stream that has long left every clip length behind."""
    session = micro()
    session.steps = 1
    keys = endless.wander(0)
    stretches = list(endless.play_on(session, keys, 4 * 40, every=80))
    work, tensors, resident = flops(session), live_bytes(), endless.memory()
    stretches += endless.play_on(session, keys, 4 * CHUNKS, every=80)
    assert flops(session) == work
    assert live_bytes() == tensors
    assert endless.memory() - resident < 8e6  # the keys of 4000 pixel frames are 32 kB
    assert session.pixel_frames == 1 + 4 * (40 + CHUNKS + 2)
    assert len(stretches) == 2 + CHUNKS // 20
    assert all(np.isfinite([s.sharpness, s.saturation, s.frozen, s.chunk_ms]).all() for s in stretches)
    assert len(session.recording().keys) == session.pixel_frames - 1


def test_stretches_measure_the_pictures():
    """A painted world moves under every key but the ones it does not know: then it counts as frozen."""
    moving = list(endless.play_on(FakeSession(), endless.wander(1), 64, every=32))
    assert [stretch.second for stretch in moving] == [32 / FPS, 64 / FPS]
    assert moving[-1].frozen == 0 and moving[-1].sharpness == pytest.approx(1, abs=0.5)

    class Frozen(FakeSession):
        def _next(self, row):
            return self.first_frame

    standing = next(endless.play_on(Frozen(), endless.wander(1), 32, every=32))
    assert standing.frozen == 1 and standing.sharpness == pytest.approx(1)


def test_a_picture_that_has_run_away_is_told():
    class Flat(FakeSession):
        def generate(self, keys):
            return np.zeros_like(super().generate(keys))

    with pytest.raises(RuntimeError, match="flat after 16 pixel frames"):
        list(endless.play_on(Flat(), endless.wander(0), 64, every=16))


def test_the_walk_is_seeded_and_never_ends():
    one, same, other = (np.array(list(islice(endless.wander(seed), 500))) for seed in (0, 0, 1))
    assert np.array_equal(one, same) and not np.array_equal(one, other)
    changes = np.flatnonzero((one[1:] != one[:-1]).any(axis=1))
    assert np.diff(changes).min() >= 8
    assert one.any(axis=1).all()


def test_the_curve_and_the_table(tmp_path):
    stretches = [endless.Stretch(10.0 * i, 1 - 0.01 * i, 0.3, 0.0, 50.0, 200_000_000) for i in range(1, 21)]
    assert endless.draw(stretches, tmp_path / "endless.png").read_bytes().startswith(b"\x89PNG")
    table = endless.summary(stretches)
    assert table[1] == ("sharpness ÷ start", "0.98", "0.89", "0.81")
    assert table[-1][0] == "memory, MB" and table[-1][3] == "200"
