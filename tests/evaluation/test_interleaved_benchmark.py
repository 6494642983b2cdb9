"""Artifacts are timed beside an anchor, a few at a time, and their ratios come from the same rounds."""

from __future__ import annotations

import time

import numpy as np
import pytest

from leanserve.contracts import Arrays, ModelSpec, Result, TensorSpec
from leanserve.evaluation import interleaved_benchmark
from leanserve.evaluation.interleaved_benchmark import ROUNDS, beside_anchor

SPEC = ModelSpec((TensorSpec("x", "float32", (1,)),), (TensorSpec("y", "float32", (1,)),))


class Timed:
    """Takes so many seconds per batch; notes who is open beside it."""

    name = "timed"
    self_contained = False
    device = "cpu"
    row_buckets: tuple[int, ...] = ()
    open: set[str] = set()  # noqa: RUF012
    together: list[set[str]] = []  # noqa: RUF012

    def __init__(self, key: str, seconds: float, limit: int = 32) -> None:
        self.key, self.seconds, self.limit = key, seconds, limit
        self.open.add(key)

    def run(self, batch: Arrays) -> Result:
        if len(batch[0]) > self.limit:
            raise MemoryError
        if set(self.open) not in self.together:
            self.together.append(set(self.open))
        time.sleep(self.seconds)
        return Result((np.zeros((len(batch[0]), 1), np.float32),))

    def close(self) -> None:
        self.open.remove(self.key)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleaved_benchmark, "ROUND_S", 0.0)
    monkeypatch.setattr(Timed, "open", set())
    monkeypatch.setattr(Timed, "together", [])


def test_a_few_at_a_time_join_the_anchor() -> None:
    limits = dict.fromkeys(["base", "a", "b", "c"], 8)
    found = beside_anchor(lambda key: Timed(key, 0.004 if key == "base" else 0.002), lambda _: SPEC, limits, 2)
    assert Timed.together == [{"base", "a", "b"}, {"base", "c"}]
    assert Timed.open == set()
    assert list(found) == ["base", "a", "b", "c"]
    median, low, high = np.array(found["c"][8]["ratio"])
    assert low <= median <= high
    assert median == pytest.approx(0.5, rel=0.3)
    assert found["base"][1]["ratio"] == [1.0, 1.0, 1.0]
    assert found["c"][1]["anchor_ms"] == pytest.approx(4, rel=0.5)


def test_what_the_anchor_has_no_memory_for_has_no_ratio() -> None:
    limits = {"base": 32, "a": 32}
    found = beside_anchor(lambda key: Timed(key, 0.0, 4 if key == "base" else 32), lambda _: SPEC, limits, 3)
    assert (sorted(found["base"]), sorted(found["a"])) == ([1], [1, 8, 32])
    assert [rows for rows, measured in found["a"].items() if "ratio" in measured] == [1]
    assert ROUNDS >= 6, "fewer rounds do not hold the median with 95 % between the least and the largest"


def test_a_base_alone_is_its_own_anchor() -> None:
    found = beside_anchor(lambda key: Timed(key, 0.0), lambda _: SPEC, {"base": 1}, 3)
    assert list(found) == ["base"]
    assert list(found["base"]) == [1]
