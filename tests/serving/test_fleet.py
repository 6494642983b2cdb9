"""The fleet before the first request: which shapes are warmed, how large batches may get."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest

from leanserve.contracts import Arrays, Backend, ModelSpec, Result, TensorSpec
from leanserve.runtime.costs import CostTable
from leanserve.runtime.device import Device
from leanserve.runtime.short_switches import ShortSwitches
from leanserve.runtime.warm_up import (
    GRID_SECONDS_PER_LENGTH,
    LEAST_ROUNDS,
    ROUNDS,
    compare_again,
    measure_grid,
    warm_up,
)
from leanserve.serving.fleet import Fleet
from leanserve.serving.opening import BatchLimits, VariantPlan, WarmFleet
from leanserve.serving.reload import LoadingThreads, open_again
from scripted import NoCodec

SPEC = ModelSpec((TensorSpec("x", "float32", (2,)),), (TensorSpec("y", "float32", (2,)),))


class CompiledBackend:
    """Runs only the shapes it was compiled for, and remembers them."""

    name = "compiled"
    self_contained = False
    device = "cpu"

    def __init__(self, row_buckets: tuple[int, ...]) -> None:
        self.row_buckets = row_buckets
        self.shapes: set[int] = set()

    def run(self, batch: Arrays) -> Result:
        assert len(batch[0]) in self.row_buckets
        self.shapes.add(len(batch[0]))
        return Result(batch)

    def close(self) -> None: ...


class AnyRowsBackend(CompiledBackend):
    """Runs any number of rows, and remembers them."""

    def __init__(self) -> None:
        super().__init__(())

    def run(self, batch: Arrays) -> Result:
        self.shapes.add(len(batch[0]))
        return Result(batch)


@pytest.fixture
def fleet() -> Iterator[WarmFleet]:
    opened = warm_fleet(Device("cpu", 1))
    yield opened
    opened.close()


def warm_fleet(device: Device, spec: ModelSpec = SPEC, max_rows: int = 32) -> WarmFleet:
    base = SimpleNamespace(name="fake", spec=spec, codec=NoCodec(), caveats=())
    return WarmFleet(base, [VariantPlan("a", batch=BatchLimits(max_rows))], device)


@pytest.mark.parametrize(("max_rows", "warmed"), [(32, (1, 8)), (6, (1,)), (8, (1, 8))])
def test_a_compiled_variant_is_warmed_in_its_own_shapes_only(max_rows: int, warmed: tuple[int, ...]) -> None:
    backend, fleet = CompiledBackend((1, 8)), warm_fleet(Device("cpu", 1), max_rows=max_rows)
    fleet.open("a", lambda threads: backend)
    fleet.close()
    variant = fleet.variants["a"]
    assert backend.shapes == set(warmed) == set(variant.running.costs.tables[0].buckets)
    assert variant.limits.max_rows <= max(warmed)


def test_a_shape_above_the_limit_is_filled_no_further_than_the_limit() -> None:
    fleet = warm_fleet(Device("cpu", 1), max_rows=4)
    fleet.open("a", lambda threads: CompiledBackend((16,)))
    fleet.close()
    assert fleet.variants["a"].running.costs.tables[0].buckets == (16,)
    assert fleet.variants["a"].limits.max_rows == 4


def test_a_base_whose_rows_share_no_batch_is_never_run_on_two_rows() -> None:
    spec, backend, threads = replace(SPEC, rows="one"), AnyRowsBackend(), LoadingThreads(ShortSwitches())
    fleet = warm_fleet(Device("cpu", 2, 2), spec)
    try:
        fleet.open("a", lambda threads: backend)
        variant = fleet.variants["a"]
        assert variant.limits.max_rows == 1
        asyncio.run(open_again(threads, variant.running, lambda: lambda threads: backend, spec))
    finally:
        threads.close()
        fleet.close()
    assert backend.shapes == {1}


class TextBackend:
    """Remembers the shapes that it ran."""

    name = "text"
    self_contained = False
    device = "cpu"
    row_buckets: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.shapes: set[tuple[int, ...]] = set()

    def run(self, batch: Arrays) -> Result:
        self.shapes.add(batch[0].shape)
        return Result(batch)

    def close(self) -> None: ...


TEXT = ModelSpec((TensorSpec("ids", "int64", (None,)),), (TensorSpec("y", "int64", (None,)),), max_length=100)


def test_a_variant_of_varying_length_is_warmed_on_a_sparse_grid() -> None:
    backend, device = TextBackend(), Device("cpu", 1)
    running = warm_up(device, lambda threads: backend, TEXT, 32)
    device.close()
    lengths = (16, 32, 64, 100)
    assert running.costs.lengths == lengths
    assert backend.shapes == {(rows, length) for rows in (1, 4, 16, 32) for length in lengths}
    assert [table.buckets for table in running.costs.tables] == [(1, 4, 16, 32)] * 4


def test_the_grid_leaves_out_what_takes_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("leanserve.runtime.warm_up.time.perf_counter", lambda: now[0])

    def seconds(rows: int, length: int) -> float:
        took = (rows + 0.01) * length / 1000
        now[0] += took
        return took

    grid = measure_grid(seconds, (1, 4, 16, 32), (16, 64, 200))
    assert [sorted(known) for known in grid] == [[1, 4, 16], [1, 4], [1]]
    assert grid[2] == {1: pytest.approx(1.01 * 0.2)}
    assert now[0] <= 3 * GRID_SECONDS_PER_LENGTH + 0.1


def test_a_size_that_seems_to_bring_nothing_rules_out_no_larger_one() -> None:
    rates = {1: 100, 2: 90, 4: 80, 8: 200, 16: 300, 32: 400}
    (measured,) = measure_grid(lambda rows, _: rows / rates[rows], tuple(rates), (0,))
    assert tuple(measured) == tuple(rates)


@pytest.mark.parametrize(("run_s", "rounds"), [(1e-3, ROUNDS), (1.0, LEAST_ROUNDS)])
def test_the_batches_in_question_are_measured_again_in_turns(
    monkeypatch: pytest.MonkeyPatch, run_s: float, rounds: int
) -> None:
    now, ran = [0.0], list[int]()
    monkeypatch.setattr("leanserve.runtime.warm_up.time.perf_counter", lambda: now[0])

    def once(rows: int) -> float:
        ran.append(rows)
        now[0] += run_s
        return true[rows]

    true = {2: 0.2, 4: 0.39, 8: 0.75, 16: 1.6}
    known = {1: 0.2, 2: 0.21, 4: 0.38, 8: 0.74, 16: 3.0}
    compare_again(once, known, seconds=0.5)
    assert ran == [2, 4, 8, 16] * rounds
    assert known == {1: 0.2, **true}


def test_a_disturbed_first_run_does_not_decide_the_knee() -> None:
    true = {1: 0.017, 2: 0.033, 4: 0.064, 8: 0.1265, 16: 0.252}
    known = true | {2: 0.036, 4: 0.073, 8: 0.16, 16: 0.29}
    assert CostTable(known).knee == 1
    compare_again(lambda rows: true[rows], known, seconds=10)
    assert CostTable(known).knee == 8


def test_every_lane_has_its_own_backend() -> None:
    fleet = warm_fleet(Device("cpu", 2, 2))
    made: list[tuple[CompiledBackend, threading.Thread]] = []
    closed: list[CompiledBackend] = []

    class Tracked(CompiledBackend):
        def close(self) -> None:
            closed.append(self)

    def load(threads: int) -> Backend:
        assert threads == 1
        made.append((Tracked((1, 8)), threading.current_thread()))
        return made[-1][0]

    fleet.open("a", load)
    running = fleet.variants["a"].running
    assert sorted(running.backends, key=id) == sorted((backend for backend, _ in made), key=id)
    assert running.wide is None
    assert all(backend.shapes == {1, 8} for backend, _ in made)
    fleet.close()
    assert len({thread for _, thread in made}) == 2
    assert sorted(closed, key=id) == sorted(running.backends, key=id)


class SelfContained:
    """Takes time per row, less with more threads, up to so many."""

    name = "self-contained"
    self_contained = True
    device = "cpu"
    row_buckets: tuple[int, ...] = ()

    def __init__(self, threads: int, helped_by: int) -> None:
        self.threads = threads
        self.row_s = 0.004 / min(threads, helped_by)
        self.ran: list[int] = []
        self.closed = 0

    def run(self, batch: Arrays) -> Result:
        self.ran.append(len(batch[0]))
        time.sleep(self.row_s * len(batch[0]))
        return Result(batch)

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize("helped_by", [4, 2])
def test_lanes_share_a_self_contained_backend_and_a_wide_one_is_kept_if_it_is_quicker(helped_by: int) -> None:
    fleet = warm_fleet(Device("cpu", 4, 2), max_rows=2)
    made: list[SelfContained] = []

    def load(threads: int) -> Backend:
        made.append(SelfContained(threads, helped_by))
        return made[-1]

    fleet.open("a", load)
    running = fleet.variants["a"].running
    narrow, wide = made
    assert (narrow.threads, wide.threads) == (2, 4)
    assert running.backends == (narrow, narrow)
    assert (running.wide is not None) == (helped_by == 4)
    assert wide.closed == (helped_by == 2)
    if running.wide:
        assert running.wide.costs.tables[0].seconds(1) < running.costs.tables[0].seconds(1) / 1.5
        assert running.opened == (narrow, wide)
    fleet.close()
    assert (narrow.closed, wide.closed) == (1, 1)


def test_the_split_is_worked_out_when_the_fleet_is_made(fleet: WarmFleet) -> None:
    fleet.open("a", lambda threads: CompiledBackend((1,)))

    async def body() -> None:
        served = Fleet(fleet)
        assert served.weights == {"a": 1.0}
        assert served.weights is served.weights
        assert served.choose(None, None) is served.variants["a"]

    asyncio.run(body())
