"""Artifacts are timed beside an anchor, a few at a time, and their ratios come from the same rounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count, repeat

import numpy as np
import pytest

from leanserve.artifacts.benchmarks import QUIET
from leanserve.contracts import Arrays, ModelSpec, Result, TensorSpec
from leanserve.evaluation import interleaved_benchmark
from leanserve.evaluation.interleaved_benchmark import (
    FEWEST_ROUNDS,
    MOST_ROUNDS,
    ROUNDS,
    InterleavedBenchmark,
    TimedArtifact,
)

SPEC = ModelSpec((TensorSpec("x", "float32", (1,)),), (TensorSpec("y", "float32", (1,)),))


class Sleeper:
    """Says to take so many seconds per batch; notes who is open beside it."""

    name = "timed"
    self_contained = False
    device = "cpu"
    row_buckets: tuple[int, ...] = ()
    open: set[str] = set()  # noqa: RUF012
    together: list[set[str]] = []  # noqa: RUF012
    took = 0.0

    def __init__(self, key: str, seconds: float, limit: int = 32) -> None:
        self.key, self.seconds, self.limit = key, seconds, limit
        self.open.add(key)

    def run(self, batch: Arrays) -> Result:
        if len(batch[0]) > self.limit:
            raise MemoryError
        if set(self.open) not in self.together:
            self.together.append(set(self.open))
        Sleeper.took = self.seconds
        return Result((np.zeros((len(batch[0]), 1), np.float32),))

    def close(self) -> None:
        self.open.remove(self.key)


def instantly(run: Callable[[], object], _: float) -> float:
    """What the last run would have taken; two of them, as where one brings the caches back."""
    run()
    run()
    return max(Sleeper.took, 1e-6)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleaved_benchmark, "median_seconds", instantly)
    monkeypatch.setattr(Sleeper, "open", set())
    monkeypatch.setattr(Sleeper, "together", [])


class Disturbed:
    """Tells of every turn how long threads waited, in seconds that are made up."""

    def __init__(self, waits: Iterator[float]) -> None:
        self.waits = waits
        self.asked = 0

    def waited_s(self) -> float:
        self.asked += 1
        return next(self.waits) if self.asked % 2 == 0 else 0.0


def beside_anchor(
    load: Callable[[str], Sleeper], limits: dict[str, int], group: int = 3, seconds: float = 60.0
) -> dict[str, TimedArtifact]:
    return InterleavedBenchmark(load, lambda _: SPEC, group, seconds).beside_anchor(limits)


def test_a_few_at_a_time_join_the_anchor() -> None:
    limits = dict.fromkeys(["base", "a", "b", "c"], 8)
    found = beside_anchor(lambda key: Sleeper(key, 0.004 if key == "base" else 0.002), limits, 2)
    assert Sleeper.together == [{"base", "a", "b"}, {"base", "c"}]
    assert Sleeper.open == set()
    assert list(found) == ["base", "a", "b", "c"]
    median, low, high = np.array(found["c"].by_rows[8]["ratio"])
    assert low <= median <= high
    assert median == pytest.approx(0.5)
    assert found["base"].by_rows[1]["ratio"] == [1.0, 1.0, 1.0]
    assert found["c"].by_rows[1]["anchor_ms"] == pytest.approx(4)
    assert ROUNDS >= 6, "fewer rounds do not hold the median with 95 % between the least and the largest"


def test_what_the_anchor_has_no_memory_for_has_no_ratio() -> None:
    limits = {"base": 32, "a": 32}
    found = beside_anchor(lambda key: Sleeper(key, 0.0, 4 if key == "base" else 32), limits)
    assert (sorted(found["base"].by_rows), sorted(found["a"].by_rows)) == ([1], [1, 8, 32])
    assert [rows for rows, measured in found["a"].by_rows.items() if "ratio" in measured] == [1]


def test_a_base_alone_is_its_own_anchor() -> None:
    found = beside_anchor(lambda key: Sleeper(key, 0.0), {"base": 1})
    assert list(found) == ["base"]
    assert list(found["base"].by_rows) == [1]


@pytest.mark.parametrize(
    ("busy", "rounds", "waited"),
    [(0, ROUNDS, 0.0), (4, ROUNDS + 4, 0.0), (MOST_ROUNDS, MOST_ROUNDS, 1.0)],
    ids=["quiet", "for four rounds", "all the time"],
)
def test_rounds_beside_other_work_are_repeated_and_those_that_stay_so_are_marked(
    monkeypatch: pytest.MonkeyPatch, busy: int, rounds: int, waited: float
) -> None:
    turns = 2 * len((1, 8, 32))
    made = Disturbed(1e3 if turn < busy * turns else 0.0 for turn in count())
    monkeypatch.setattr(interleaved_benchmark, "Contention", lambda: made)
    ran: list[int] = []

    class Counted(Sleeper):
        def run(self, batch: Arrays) -> Result:
            ran.append(len(batch[0]))
            return super().run(batch)

    found = beside_anchor(lambda key: Counted(key, 0.0), {"base": 32, "a": 32})
    looked = 2 * 2  # a row of each, twice
    assert (len(ran) - looked) / (2 * turns) == rounds, "two runs in each turn: one brings the caches back"
    assert found["a"].rounds == ROUNDS
    assert (found["a"].waited > QUIET) == bool(waited)


@pytest.mark.parametrize(
    ("of_a_row", "seconds", "sizes"),
    [
        (0.02, 60.0, [1, 8, 32]),
        (0.2, 60.0, [1, 8, 32]),
        (0.4, 60.0, [1, 8]),
        (2.0, 60.0, [1]),
        (0.4, 1.0, [1, 8]),
        (0.0, 0.0, [1]),
    ],
)
def test_batches_for_which_there_is_no_time_are_left_out(
    monkeypatch: pytest.MonkeyPatch, of_a_row: float, seconds: float, sizes: list[int]
) -> None:
    monkeypatch.setattr(interleaved_benchmark, "timed", lambda run: (run(), of_a_row)[1])
    found = beside_anchor(lambda key: Sleeper(key, 0.001), {"base": 32, "a": 32}, seconds=seconds)
    assert list(found["a"].by_rows) == list(found["base"].by_rows) == sizes


def test_timing_takes_no_longer_than_it_may_and_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleaved_benchmark, "Contention", lambda: Disturbed(repeat(1e3)))
    told: list[tuple[float, str]] = []

    def tell(done: float, total: float, note: str = "") -> None:
        told.append((done / total, note))

    found = InterleavedBenchmark(lambda key: Sleeper(key, 0.0), lambda _: SPEC, 3, 0.0, tell).beside_anchor(
        {"base": 1, "a": 1}
    )
    assert found["a"].rounds == FEWEST_ROUNDS
    assert len(told) == 2 * FEWEST_ROUNDS
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][1] == "batches of 1 rows, 2 rounds disturbed by other work"
