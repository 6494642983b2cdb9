"""Taking turns: in order, round by round, without what gives nothing any more; and what a turn measures."""

from __future__ import annotations

import time
from itertools import islice

import pytest

from leanserve.passes.toolkit.timing import LEAST_ROUNDS, seconds_per_call
from leanserve.timing import median_seconds, runs_per_second, take_turns, timed


def test_turns_are_taken_in_order_and_one_that_gives_nothing_is_left_out() -> None:
    asked: list[str] = []
    left = {"a": 3, "b": 1}

    def turn(name: str) -> float | None:
        asked.append(name)
        left[name] -= 1
        return None if left[name] < 0 else float(left[name])

    rounds = list(islice(take_turns({"a": lambda: turn("a"), "b": lambda: turn("b")}), 3))
    assert rounds == [{"a": 2.0, "b": 0.0}, {"a": 1.0}, {"a": 0.0}]
    assert asked == ["a", "b", "a", "b", "a"]


def test_the_first_run_of_a_turn_does_not_count() -> None:
    waits = iter([0.05, *[0.002] * 100])
    assert median_seconds(lambda: time.sleep(next(waits)), 0.01) == pytest.approx(0.002, rel=0.5)
    waits = iter([0.05, *[0.002] * 100])
    assert runs_per_second(lambda: time.sleep(next(waits)), 0.02) == pytest.approx(500, rel=0.4)
    ran: list[int] = []
    median_seconds(lambda: ran.append(1), 0.0)
    assert len(ran) == 2, "one run counts however little time there is"
    assert timed(lambda: time.sleep(0.01)) == pytest.approx(0.01, rel=0.5)


def test_passes_compare_ways_in_turns() -> None:
    calls: list[str] = []

    def way(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    found = seconds_per_call({"slow": lambda: way("slow", 0.004), "fast": lambda: way("fast", 0.001)}, 0.0)
    assert found["slow"] > 2 * found["fast"]
    assert calls == ["slow", "fast"] * (2 + LEAST_ROUNDS)
