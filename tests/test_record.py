"""Recorded steps: the same curves as steps run anew, for every stage; and what recordings read stays where it is."""

import pytest
import torch

from lingbot_nb import presets
from lingbot_nb.distill import train
from lingbot_nb.distill.record import Recorded, fresh
from lingbot_nb.report import bench_training
from lingbot_nb.report.bench_training import Workplace
from lingbot_nb.world.latents import Batch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")


def batch(value):
    return Batch(*(torch.full((1, 2, 2, 2, 2), float(value + i)) for i in range(4)))


def test_fresh_gradients_are_the_mean_of_the_accumulated_losses():
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), 100.0)
    factors = iter([1.0, 3.0])

    def loss():
        factor = next(factors)
        return factor * weight.sum(), {"factor": weight.sum() * 0 + factor}

    total, info = fresh([weight], loss, 2)
    assert total == 4 and not total.requires_grad and weight.grad.tolist() == [2, 2]
    assert info["factor"] == 3 and not info["factor"].requires_grad


def test_last_clips_stay_in_the_same_tensors():
    last = train.LastClips()
    assert not last
    clips = torch.zeros(1, 2, requires_grad=True)
    last.put(batch(1), clips + 1)
    kept, x = last.get()
    places = [t.data_ptr() for t in (*kept.tensors, x)]
    assert last and not x.requires_grad
    last.put(batch(5), clips + 7)
    kept, x = last.get()
    assert [t.data_ptr() for t in (*kept.tensors, x)] == places
    assert x.eq(7).all() and [t.unique().item() for t in kept.tensors] == [5, 6, 7, 8]


def test_accumulated_clips_are_kept_one_by_one_and_read_in_turn():
    last = train.LastClips(2)
    last.put(batch(1), torch.full((1, 2), 10.0))
    assert not last
    last.put(batch(2), torch.full((1, 2), 20.0))
    assert last and [last.get()[1][0, 0].item() for _ in range(3)] == [10, 20, 10]
    last.put(batch(3), torch.full((1, 2), 30.0))
    assert [last.get()[1][0, 0].item() for _ in range(2)] == [20, 30]


def curve(stage, recorded, steps=9):
    device = torch.device("cuda")
    torch.manual_seed(0)
    place = Workplace(
        presets.MICRO, device, bench_training.random_clips(presets.MICRO, 4, device), 2, recorded=recorded
    )
    step, state = stage(place)
    rows = list(train.fit(step, state, steps=steps, log_every=3))
    return rows, state


@needs_gpu
@pytest.mark.parametrize("stage", bench_training.STAGES, ids=lambda stage: stage.__name__)
def test_recorded_curves_are_the_plain_ones(stage):
    (plain, one), (replayed, other) = curve(stage, False), curve(stage, True)
    for row, again in zip(plain, replayed, strict=True):
        assert row.keys() == again.keys()
        for name in row.keys() - {"seconds", "lr"}:
            assert again[name] == pytest.approx(row[name], rel=2e-3, abs=1e-6), (row["step"], name)
    assert torch.equal(one.generator.get_state(), other.generator.get_state())


@needs_gpu
def test_a_loss_that_waits_for_the_device_cannot_be_recorded():
    weight = torch.nn.Parameter(torch.ones(2, device="cuda"))
    gradients = Recorded()
    for _ in range(2):
        gradients([weight], lambda: (weight.sum() * weight.sum().item(), {}), 1)
    with pytest.raises(RuntimeError):
        gradients([weight], lambda: (weight.sum() * weight.sum().item(), {}), 1)
