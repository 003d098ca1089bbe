"""The bench of the released size, at micro size: every row is there, and what it counts is right."""

from dataclasses import replace

import pytest
import torch

from lingbot_nb.presets import LINGBOT, MICRO
from lingbot_nb.report import bench_large as bench

ORDER = bench.Order(MICRO, frames=3, rank=2, guidance=2.0)
CPU = torch.device("cpu")


def test_every_update_is_measured_and_said_at_once():
    lines = []
    rows = []
    for row in bench.run(ORDER, CPU, torch.float32, lines.append):
        rows.append(row)
        assert any(str(row) in line for line in lines)
    assert [(row.stage, row.cold) for row in rows] == [
        ("pretrain", True),
        ("pretrain", False),
        ("generator, exit 1", True),
        ("critic, exit 1", True),
        ("generator, exit 4", False),
        ("critic, exit 4", False),
        ("generator, exit 1", False),
        ("critic, exit 1", False),
    ]
    for row in rows:
        assert row.tokens * row.seconds == pytest.approx(ORDER.frames * MICRO.shape.tokens_per_frame)
        assert row.peak_gib == [0.0]
    work = bench.forward_backward(bench.forced_flops(ORDER))
    assert rows[1].tflops * rows[1].seconds * 1e12 == pytest.approx(work.model)
    assert rows[1].computed / rows[1].mfu == pytest.approx(1 + work.repeated / work.model)
    said = "\n".join(lines)
    assert "generator, mean over exits" in said and "| critic, exit 4 |" in said and "highest peak 0.0" in said


def test_no_step_begins_after_the_time():
    lines = []
    assert list(bench.run(replace(ORDER, seconds=0.0), CPU, torch.float32, lines.append)) == []
    assert sum("no time left" in line for line in lines) == 5


def test_counted_flops_are_those_that_torch_counts():
    """The linear part to a few percent: adapters, embeddings, text and head are left out of the count."""
    from torch.utils.flop_counter import FlopCounterMode

    from lingbot_nb.distill import train
    from lingbot_nb.model.lora import Adapted

    size = replace(MICRO.model, dim=192, heads=2, ffn_dim=512, layers=3, control_channels=1)
    order = bench.Order(replace(MICRO, model=size), frames=5, rank=1, guidance=1.0)
    student = Adapted(bench.random_base(size, CPU, torch.float32), rank=1)
    state = train.TrainState.of({"student": student}, {"student": 1e-4})
    batches = iter([bench.random_batch(order, CPU, 0)])
    step = train.forcing_step(student, batches, MICRO.stream, shift=3.0, checkpoint=True)
    with FlopCounterMode(display=False) as counter:
        step(state)
    products = sum(
        flops
        for op, flops in counter.get_flop_counts()["Global"].items()
        if "mm" in str(op) and "attention" not in str(op)
    )
    forced = bench.forced_flops(order)
    without_attention = bench.forward_backward(replace(forced, attention=0))
    assert products == pytest.approx(without_attention.model + without_attention.repeated, rel=0.12)


def test_the_work_of_an_exit_step_is_one_round_of_chunks():
    chunks = sum(chunk.total for chunk in bench.chunk_flops(ORDER))
    last = bench.chunk_flops(ORDER)[-1].total
    first, second = (bench.generator_work(ORDER, exit_step) for exit_step in (0, 1))
    assert second.model - first.model == pytest.approx(chunks) and second.repeated == first.repeated
    unguided = bench.generator_work(replace(ORDER, guidance=1.0), 0)
    whole = bench.forward_flops(MICRO.model, ORDER.shape, ORDER.frames, ORDER.frames).total
    assert first.model - unguided.model == pytest.approx(whole)
    # A forward of each chunk with its way back, the clean passes of all but the last, and three scores.
    there_and_back = sum(bench.forward_backward(chunk).model for chunk in bench.chunk_flops(ORDER))
    assert first.model == pytest.approx(there_and_back + chunks - last + 3 * whole)


def test_the_budget_of_the_released_model_is_the_docstrings():
    order = bench.Order(LINGBOT)
    adapters = 119_808 * 64 * 40
    parts = {name: round(size / 1e9, 1) for name, size in bench.budget(order, adapters).items()}
    assert parts == {"base": 37.1, "adapters": 9.8, "layer inputs": 11.5, "pasts": 17.3}
    assert sum(bench.budget(order, adapters).values()) / 2**30 == pytest.approx(70.5, abs=0.05)
    for value in parts.values():
        assert f"{value}" in bench.__doc__


def test_a_held_exit_draws_nothing_and_is_the_rollouts_own():
    seen = []
    held = bench.HeldExit(lambda batch, generator, drawn: seen.append(drawn), exit_step=2)
    assert held.draw(None) == 2
    held(None, None, held.draw(None))
    assert seen == [2]


def test_all_weights_are_measured_sharded():
    rows = list(bench.run(ORDER, CPU, torch.float32, lambda line: None, bench.WholeBench))
    torch.distributed.destroy_process_group()
    assert [(row.stage, row.cold) for row in rows] == [("pretrain", True), ("pretrain", False)]
    flops = bench.forced_flops(ORDER)
    assert rows[1].tflops * rows[1].seconds * 1e12 == pytest.approx(3 * flops.total)
    assert rows[1].computed == pytest.approx(4 / 3 * rows[1].mfu)
