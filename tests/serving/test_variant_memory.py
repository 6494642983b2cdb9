"""A model that has memory for few rows only: what is warmed, what a batch may have, and what happens at run time."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace

import numpy as np
import pytest

from leanserve.contracts import Arrays, ModelSpec, Result, TensorSpec
from leanserve.errors import BackendFailed, OutOfMemory, StartupError
from leanserve.runtime.device import Device
from leanserve.runtime.warm_up import compare_again, measure_grid, warm_up
from leanserve.serving.batcher import QueueLimits
from leanserve.serving.fleet import Fleet
from leanserve.serving.opening import BatchLimits, MeasuredLimits, VariantPlan, WarmFleet
from leanserve.serving.variant import Variant
from scripted import SPEC, NoCodec, ScriptedBackend, play, sample, stay

OUT = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
TEXT = ModelSpec((TensorSpec("ids", "int64", (None,)),), (TensorSpec("y", "int64", (None,)),), max_length=100)


POISON = 1e6


class Small(ScriptedBackend):
    """Doubles as many elements as it has memory for, and no poison; lanes may share it, and it may be compiled."""

    def __init__(self, elements: int, row_buckets: tuple[int, ...] = (), *, self_contained: bool = False) -> None:
        super().__init__(row_buckets)
        self.elements = elements
        self.self_contained = self_contained
        self.shapes: list[tuple[int, ...]] = []

    def run(self, batch: Arrays) -> Result:
        self.shapes.append(batch[0].shape)
        self.started.set()
        assert self.gate.wait(10)
        if batch[0].size > self.elements:
            raise RuntimeError(OUT)
        if (batch[0] == POISON).any():
            raise ValueError("poison")
        return Result((batch[0] * 2,))


@pytest.mark.parametrize("lanes", [1, 2])
def test_warm_up_steps_back_to_what_fits(lanes: int) -> None:
    device, backend = Device("cpu", lanes, lanes), Small(2 * 8)
    running = warm_up(device, lambda threads: backend, SPEC, 32)
    device.close()
    assert running.memory_rows == 8
    assert running.costs.tables[0].buckets == (1, 2, 4, 8)
    assert max(rows for rows, _ in backend.shapes) == 16, "32 rows need not be tried where 16 do not fit"


def test_what_fits_has_no_limit_to_tell() -> None:
    device = Device("cpu", 1)
    running = warm_up(device, lambda threads: Small(2 * 32), SPEC, 32)
    device.close()
    assert running.memory_rows is None


def test_of_long_rows_fewer_fit() -> None:
    device, backend = Device("cpu", 1), Small(64 * 16)
    running = warm_up(device, lambda threads: backend, TEXT, 32)
    device.close()
    assert running.costs.lengths == (16, 32, 64, 100)
    assert [table.buckets[-1] for table in running.costs.tables] == [32, 32, 16, 4]
    assert running.memory_rows == 4


def test_a_model_compiled_for_more_than_fits_uses_its_smaller_shapes() -> None:
    device, backend = Device("cpu", 1), Small(2 * 8, (1, 8, 32))
    running = warm_up(device, lambda threads: backend, SPEC, 32)
    device.close()
    assert running.costs.tables[0].buckets == (1, 8)
    assert running.memory_rows == 8
    assert [rows for rows, _ in backend.shapes].count(32) == 1


def test_lanes_do_without_a_wide_backend_for_which_there_is_no_memory() -> None:
    def load(threads: int) -> Small:
        if threads == 2:
            raise MemoryError
        return Small(2 * 64, self_contained=True)

    device = Device("cpu", 2, 2)
    running = warm_up(device, load, SPEC, 4)
    device.close()
    assert running.wide is None
    assert running.memory_rows is None


def test_a_size_for_which_memory_runs_out_later_is_left_out() -> None:
    known = {1: 0.2, 2: 0.21, 4: 0.41}
    compare_again(lambda rows: None if rows == 4 else known[rows], known, seconds=0.1)
    assert set(known) == {1, 2}
    (grid,) = measure_grid(lambda rows, _: None if rows > 4 else 0.001, (1, 2, 4, 8, 16), (0,))
    assert set(grid) == {1, 2, 4}


def fleet(max_rows: int = 32, measured: MeasuredLimits = MeasuredLimits()) -> WarmFleet:  # noqa: B008 - frozen
    base = SimpleNamespace(name="fake", spec=SPEC, codec=NoCodec(), caveats=())
    plan = VariantPlan("a", batch=BatchLimits(max_rows), measured=measured)
    return WarmFleet(base, [plan], Device("cpu", 1))


@pytest.mark.parametrize(
    ("elements", "measured", "max_rows", "told"), [(2 * 8, None, 32, 8), (2 * 64, 4, 32, 4), (2 * 64, 16, 8, None)]
)
def test_a_batch_is_bound_by_the_config_by_what_was_measured_and_by_what_fits_here(
    elements: int, measured: int | None, max_rows: int, told: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    opened = fleet(max_rows, MeasuredLimits(memory_rows=measured))
    with caplog.at_level(logging.WARNING):
        opened.open("a", lambda threads: Small(elements))
    opened.close()
    variant = opened.variants["a"]
    assert variant.running.memory_rows == told
    assert variant.limits.max_rows <= (told or max_rows)
    said = [f"variant 'a': there is memory for batches of at most {told} rows; batch.max_rows is {max_rows}"]
    assert [record.getMessage() for record in caplog.records] == (said if told else [])


def test_a_model_for_which_a_single_row_is_too_much_is_refused() -> None:
    refusing = fleet()
    with pytest.raises(StartupError, match=r"variant 'a' cannot be .*can't allocate .*; fewer variants, or lanes"):
        refusing.open("a", lambda threads: Small(0))
    refusing.close()


LIMITS = QueueLimits(max_rows=8, queue_rows=64, max_delay_s=0, timeout_s=5)


def test_a_batch_for_which_memory_runs_out_is_halved_and_everybody_is_answered() -> None:
    backend = Small(2 * 2)

    async def scenario(variant: Variant, _: ScriptedBackend) -> None:
        backend.gate.clear()
        first = asyncio.create_task(variant.predict(sample(100), stay))
        await asyncio.to_thread(backend.started.wait, 5)
        others = [asyncio.create_task(variant.predict(sample(value), stay)) for value in range(8)]
        await asyncio.sleep(0.01)
        backend.gate.set()
        answers = await asyncio.gather(first, *others)
        assert [answer.outputs[0][0, 0] for answer in answers] == [200, *range(0, 16, 2)]

    play(scenario, LIMITS, backend, seconds=0.01)
    assert [rows for rows, _ in backend.shapes] == [1, 8, 4, 2, 2, 4, 2, 2]


def test_a_request_of_several_rows_for_which_memory_runs_out_is_answered_in_parts() -> None:
    backend = Small(2 * 2)

    async def scenario(variant: Variant, _: ScriptedBackend) -> None:
        answer = await variant.predict((np.arange(16, dtype=np.float32).reshape(8, 2),), stay)
        assert np.array_equal(answer.outputs[0], 2 * np.arange(16).reshape(8, 2))

    play(scenario, LIMITS, backend, seconds=0.01)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_request_for_which_there_is_no_memory_is_told_to_come_again_and_the_next_is_answered(rows: int) -> None:
    backend = Small(0)

    async def scenario(variant: Variant, _: ScriptedBackend) -> None:
        with pytest.raises(OutOfMemory, match="variant 'v' ran out of memory on this request; try again") as refused:
            await variant.predict(sample(1, rows), stay)
        assert (refused.value.status, refused.value.code, refused.value.retry_after_s) == (503, "out_of_memory", 1)
        backend.elements = 100
        answer = await variant.predict(sample(1, rows), stay)
        assert answer.outputs[0].shape == (rows, 2)

    play(scenario, LIMITS, backend, seconds=0.01)


def test_what_fails_otherwise_in_a_part_is_no_lack_of_memory() -> None:
    backend = Small(2 * 2)

    async def scenario(variant: Variant, _: ScriptedBackend) -> None:
        with pytest.raises(BackendFailed):
            await variant.predict(sample(POISON, 4), stay)

    play(scenario, LIMITS, backend, seconds=0.01)


def test_a_variant_that_cannot_be_loaded_again_for_lack_of_memory_is_a_503() -> None:
    warm, full = fleet(), [False]

    def load(threads: int) -> Small:
        if full[0]:
            raise MemoryError("Unable to allocate 8.00 GiB")
        return Small(2 * 32)

    async def scenario() -> None:
        opened = Fleet(warm)
        await opened.unload()
        full[0] = True
        with pytest.raises(OutOfMemory, match=r"no memory to load variant 'a': Unable to allocate 8.00 GiB"):
            await opened.load("a")
        full[0] = False
        await opened.load("a")
        assert "a" in opened.variants

    warm.open("a", load)
    try:
        asyncio.run(scenario())
    finally:
        warm.close()
