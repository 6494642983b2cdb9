"""Traffic split: proportions, stickiness, and what a change of weights moves."""

from __future__ import annotations

from collections import Counter

import pytest

from leanserve.serving.traffic import TrafficRules, TrafficSplit, sticky_point, weighted_choice


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


def shared_out(rules: TrafficRules, serving: str = "abc") -> TrafficSplit:
    """Of the variants a, b and c, of which some serve."""
    split = TrafficSplit("digits")
    split.give(rules)
    split.share_out("abc", serving)
    return split


def chosen(split: TrafficSplit, keys: int = 400) -> Counter[str]:
    return Counter(split.choose(str(key)) for key in range(keys))


def test_without_weights_the_base_answers_everything_and_another_only_while_it_is_away() -> None:
    split = shared_out(TrafficRules())
    assert {split.choose(None), split.choose("user")} == {"a"}
    assert split.shares == {"a": 1.0, "b": 0.0, "c": 0.0}
    split.share_out("abc", "bc")
    assert {split.choose(None), split.choose("user")} == {"b"}
    split.share_out("abc", "")
    assert split.choose(None) == ""
    assert set(split.shares.values()) == {0.0}


def test_weights_of_none_that_is_there_are_the_bases() -> None:
    assert chosen(shared_out(TrafficRules({"gone": 1.0}))) == {"a": 400}


def test_what_is_beyond_a_cap_goes_to_the_base_and_is_counted() -> None:
    split = shared_out(TrafficRules({"b": 1.0}, {"b": 1e-9}))
    assert chosen(split) == {"b": 1, "a": 399}
    assert split.capped == {"b": 399}
    split.share_out("abc", "bc")
    assert chosen(split) == {"b": 400}  # a cap refuses nobody
    split.give(TrafficRules({"b": 1.0}))
    split.share_out("abc", "abc")
    assert chosen(split) == {"b": 400}


def test_an_override_goes_before_the_rules_and_sorts_callers_anew_and_they_stay_as_its_share_grows() -> None:
    split = shared_out(TrafficRules({"c": 1.0}))
    fewer = {"a": 0.75, "b": 0.25}
    split.override(fewer, "experiment")
    split.share_out("abc", "abc")
    first = {key for key in map(str, range(400)) if split.choose(key) == "b"}
    assert 70 < len(first) < 130
    split.override({"a": 0.5, "b": 0.5}, "experiment")
    split.share_out("abc", "abc")
    assert first < {key for key in map(str, range(400)) if split.choose(key) == "b"}
    split.override(fewer, "another")
    split.share_out("abc", "abc")
    assert first != {key for key in map(str, range(400)) if split.choose(key) == "b"}
    split.override(None)
    split.share_out("abc", "abc")
    assert chosen(split) == {"c": 400}
