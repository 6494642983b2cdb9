"""Cost: padding is shared by rows, the batch is the observation, money follows from seconds."""

from __future__ import annotations

import json
from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leanserve.experiments.cost import CostSums, price_per_million

BATCHES = st.lists(st.tuples(st.integers(1, 32), st.floats(1e-5, 1.0), st.none() | st.floats(0, 10.0)), max_size=8)


def test_a_batch_costs_the_same_whoever_filled_it_up() -> None:
    """8 compiled rows, 3 of them real: the three pay for all."""
    sums = CostSums.of_batch(rows=3, device_s=0.012).merged(CostSums.of_batch(rows=5, device_s=0.012))
    assert sums.device_s.per_row == pytest.approx(0.024 / 8)
    assert sums.joules.rows == 0


def test_joules_are_of_the_rows_whose_energy_was_measured() -> None:
    sums = CostSums.of_batch(4, 0.01, joules=2.0).merged(CostSums.of_batch(100, 0.1))
    assert sums.joules.per_row == 0.5


def test_a_million_rows_of_a_millisecond_cost_a_third_of_an_hour_less_a_bit() -> None:
    sums = reduce(CostSums.merged, [CostSums.of_batch(10, 0.01)] * 60)
    price = price_per_million(sums.device_s, price_per_hour=3.6)
    assert price is not None
    assert price.per_million == pytest.approx(1.0)
    assert price.interval == pytest.approx((1.0, 1.0))  # all batches alike
    half = price_per_million(sums.device_s, price_per_hour=3.6, utilisation=0.5)
    assert half is not None
    assert half.per_million == pytest.approx(2.0)


def test_the_price_is_within_its_interval_which_narrows() -> None:
    random = np.random.default_rng(0)
    sums, widths = CostSums(), []
    for batch in range(1, 2001):
        sums = sums.merged(CostSums.of_batch(8, float(0.008 * np.exp(0.3 * random.standard_normal()))))
        if batch in (100, 2000):
            price = price_per_million(sums.device_s, 1.0)
            assert price is not None
            assert price.interval.low < price.per_million < price.interval.high
            widths.append(price.interval.high - price.interval.low)
    assert widths[1] < widths[0] / 3


def test_nothing_is_said_before_the_first_batch() -> None:
    assert price_per_million(CostSums().device_s, 1.0) is None


@given(BATCHES, st.randoms())
def test_costs_add_up_in_any_order_and_survive_json(
    batches: list[tuple[int, float, float | None]], random: object
) -> None:
    parts = [CostSums.of_batch(*batch) for batch in batches]
    forwards, backwards = (reduce(CostSums.merged, order, CostSums()) for order in (parts, parts[::-1]))
    for one, other in ((forwards.device_s, backwards.device_s), (forwards.joules, backwards.joules)):
        assert (one.batches, one.rows, one.rows_squares) == (other.batches, other.rows, other.rows_squares)
        assert [one.value, one.products] == pytest.approx([other.value, other.products])
    assert CostSums.from_json(json.loads(json.dumps(forwards.to_json()))) == forwards
