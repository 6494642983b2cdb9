"""What is reported of artifacts that were timed on different days beside the same anchor."""

from __future__ import annotations

import pytest

from leanserve.artifacts.benchmarks import BenchmarkResult, BenchmarkSet, RatioInterval, Speedup

ROWS = (1, 8, 32)


def result(key: str, ms: dict[int, float], anchor_ms: dict[int, float]) -> BenchmarkResult:
    common = sorted(ms.keys() & anchor_ms.keys())
    ratios = {rows: RatioInterval(median=ms[rows] / anchor_ms[rows], low=0.1, high=9.0) for rows in common}
    beside = {rows: anchor_ms[rows] for rows in common}
    return BenchmarkResult(
        key=key, anchor="base", cpu="x", threads=1, latency_ms=ms, anchor_ms=beside, ratios=ratios, rounds=7, waited=0.0
    )


BASE = {1: 10.0, 8: 40.0, 32: 160.0}


def found(*results: BenchmarkResult) -> BenchmarkSet:
    return BenchmarkSet("x", 1, "base", {item.key: item for item in results}, {})


def test_a_slow_day_slows_both_sides_and_changes_nothing() -> None:
    slow_day = result("b", {rows: ms / 2 * 3 for rows, ms in BASE.items()}, {rows: ms * 3 for rows, ms in BASE.items()})
    timed = found(result("base", BASE, BASE), slow_day)
    assert timed.latency_ms("b") == {1: 5.0, 8: 20.0, 32: 80.0}
    assert timed.latency_ms("base") == BASE
    assert timed.throughput("b") == pytest.approx(2 * timed.throughput("base")) == pytest.approx(400)


def test_for_a_batch_that_only_one_has_memory_for_the_day_is_corrected_by_the_next_smaller() -> None:
    small = {1: 10.0, 4: 40.0}
    other = result("b", {1: 10.0, 4: 20.0, 8: 30.0, 32: 100.0}, {1: 20.0, 4: 80.0})
    assert found(result("base", small, small), other).latency_ms("b") == {1: 5.0, 4: 10.0, 8: 15.0, 32: 50.0}


def test_what_is_covered() -> None:
    timed = found(result("base", BASE, BASE), result("b", BASE, BASE))
    assert timed.covers(["base", "b"], ["b"])
    assert not timed.covers(["base", "b", "c"], ["c"])
    assert not BenchmarkSet("x", 2, "base", timed.results, {}).covers(["base", "b"], ["b"]), "lanes were not measured"
    assert not found(result("b", BASE, BASE)).covers(["b"], ["b"]), "the base gives the milliseconds"


def test_a_speedup_has_the_range_of_its_rounds_and_two_are_compared_by_both() -> None:
    timed = found(result("base", BASE, BASE), result("a", {rows: ms / 4 for rows, ms in BASE.items()}, BASE))
    assert timed.speedup("a") == pytest.approx((4.0, 4.0 * 0.25 / 9.0, 4.0 * 0.25 / 0.1))
    one, other = Speedup(4.0, 3.6, 4.4), Speedup(2.0, 1.8, 2.2)
    quotient = one.over(other)
    assert quotient.median == 2.0
    assert one.low / other.high < quotient.low < 3.6 / 2.0
    assert 4.4 / 2.0 < quotient.high < one.high / other.low
    changes = [one.over(other).change, other.over(one).change, one.over(Speedup(3.9, 3.5, 4.3)).change]
    assert changes == ["faster", "slower", "no gain"]
    assert one.over(Speedup(1.0, 1.0, 1.0)) == pytest.approx(one)
