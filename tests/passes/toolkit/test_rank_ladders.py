"""Layers compete for a budget: what is measured, what is taken to lie between, and that the division is the best."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leanserve.passes.toolkit.rank_ladders import MEASURED, MOST_RUNGS, Ranks, Rung, ladder, least_loss


def rungs_of(costs_and_losses: Sequence[tuple[int, float]]) -> list[Rung]:
    """A ladder from a layer of cost 100 down."""
    return [Rung((), 100, 0.0), *(Rung((cost,), cost, loss) for cost, loss in costs_and_losses)]


def test_a_few_ranks_are_measured_and_the_rest_lie_on_an_exponential() -> None:
    asked: list[Ranks] = []

    def losses(ranks: Sequence[Ranks]) -> list[float]:
        asked.extend(ranks)
        return [2.0**-rank for (rank,) in ranks]

    dense, *rungs = ladder(
        [(rank,) for rank in range(1, 61)], lambda ranks: 10.0 * ranks[0] if ranks else 500.0, losses
    )
    assert dense == Rung((), 500.0, 0.0)
    assert len(asked) == MEASURED
    assert len(rungs) <= MOST_RUNGS
    assert asked[0] == (1,)
    assert max(rung.cost for rung in rungs) < 500
    for rung in rungs[: len(rungs) // 4]:  # further up the measured loss is rounding
        assert rung.loss == pytest.approx(2.0 ** -rung.ranks[0], rel=1e-6)


def test_a_layer_that_no_rank_makes_cheaper_stays_and_nobody_is_asked() -> None:
    def nobody(_: Sequence[Ranks]) -> list[float]:
        raise AssertionError

    assert ladder([(5,), (6,)], lambda ranks: 10.0 if ranks else 7.0, nobody) == [Rung((), 7.0, 0.0)]


def test_answers_that_are_no_numbers_are_the_worst() -> None:
    rungs = ladder([(1,), (2,)], lambda ranks: 10.0 * ranks[0] if ranks else 70.0, lambda _: [float("nan"), 0.5])
    assert [rung.loss for rung in rungs] == pytest.approx([0.0, 1e9, 0.5])
    assert least_loss({"a": rungs}, 60) == {"a": (2,)}


def test_the_layer_that_loses_least_pays() -> None:
    ladders = {"robust": rungs_of([(20, 0.01), (60, 0.001)]), "tender": rungs_of([(20, 5.0), (60, 2.0)])}
    assert least_loss(ladders, 160) == {"robust": (60,), "tender": ()}
    assert least_loss(ladders, 120) == {"robust": (20,), "tender": ()}
    assert least_loss(ladders, 40) == {"robust": (20,), "tender": (20,)}
    assert least_loss(ladders, 39) is None
    assert least_loss(ladders, 200) == {"robust": (), "tender": ()}


@given(
    st.lists(
        st.lists(
            st.tuples(st.integers(1, 99), st.floats(1e-3, 1)), min_size=1, max_size=4, unique_by=lambda rung: rung[0]
        ),
        min_size=1,
        max_size=4,
    ),
    st.floats(0.1, 1.0),
)
def test_whatever_can_fit_does_and_the_sum_is_within_one_rung_of_the_least(
    layers: list[list[tuple[int, float]]], share: float
) -> None:
    ladders = {str(place): rungs_of(layer) for place, layer in enumerate(layers)}
    budget = 100 * len(layers) * share
    fitting = [
        sum(rung.loss for rung in choice)
        for choice in product(*ladders.values())
        if sum(rung.cost for rung in choice) <= budget
    ]
    found = least_loss(ladders, budget)
    assert (found is None) == (not fitting)
    if found is not None:
        chosen = [next(rung for rung in ladders[name] if rung.ranks == ranks) for name, ranks in found.items()]
        assert sum(rung.cost for rung in chosen) <= budget
        dearest = max(rung.loss for rungs in ladders.values() for rung in rungs)
        assert sum(rung.loss for rung in chosen) <= min(fitting) + dearest
