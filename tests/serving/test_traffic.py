"""Traffic split: proportions, stickiness, and what a change of weights moves."""

from __future__ import annotations

from collections import Counter

import pytest

from leanserve.serving.traffic import sticky_point, weighted_choice


def test_shares_follow_the_weights_and_zero_gets_nothing() -> None:
    weights = {"a": 1.0, "b": 0.0, "c": 3.0}
    counts = Counter(weighted_choice(weights, (i + 0.5) / 1000) for i in range(1000))
    assert counts == {"a": 250, "c": 750}


@pytest.mark.parametrize("point", [0.0, 0.5, 1 - 2**-53])
def test_every_point_has_a_variant(point: float) -> None:
    assert weighted_choice({"a": 0.1, "b": 0.2, "zero": 0.0}, point) in {"a", "b"}


def test_sticky_keys_are_stable_spread_evenly_and_salted() -> None:
    points = [sticky_point(f"user-{i}", "digits") for i in range(4000)]
    assert points == [sticky_point(f"user-{i}", "digits") for i in range(4000)]
    assert all(0 <= point < 1 for point in points)
    counts = Counter(int(point * 4) for point in points)
    assert all(900 < counts[quarter] < 1100 for quarter in range(4))
    assert sticky_point("user-1", "digits") != sticky_point("user-1", "other")


def test_shifting_weight_moves_only_the_callers_it_must() -> None:
    before, after = {"a": 9.0, "b": 1.0}, {"a": 8.0, "b": 2.0}
    moved = sum(weighted_choice(before, i / 1000) != weighted_choice(after, i / 1000) for i in range(1000))
    assert moved == pytest.approx(100, abs=2)
