"""Means: mergeable sums, and intervals that hold the truth at any look."""

from __future__ import annotations

import math

import numpy as np
import pytest
import ville
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from leanserve.experiments.mean import FEWEST, MeanSums, RatioSums, mean_interval, radius_of_mean

ALPHA, STREAMS, ROWS = 0.05, 2000, 3000
FEW = st.lists(st.floats(-1e6, 1e6), max_size=20)


@pytest.mark.parametrize("kind", ["normal", "difference of lognormals"])
def test_the_mean_is_seldom_ever_missed(kind: str) -> None:
    random = np.random.default_rng(0)
    crossed = 0
    for _ in range(10):  # pieces of 200 streams, for memory
        drawn = random.standard_normal((STREAMS // 10, ROWS))
        values = drawn if kind == "normal" else np.exp(drawn) - np.exp(random.standard_normal(drawn.shape))
        counts = np.arange(1, ROWS + 1)
        means = values.cumsum(axis=1) / counts
        deviations = np.sqrt(np.maximum(0.0, np.square(values).cumsum(axis=1) / counts - means**2))
        crossed += int((np.abs(means) > radius_of_mean(counts, deviations, ALPHA)).any(axis=1).sum())
    assert crossed / STREAMS <= 0.065


def test_the_radius_is_that_of_ville() -> None:
    counts, twice = np.arange(FEWEST, 5000), -2 * math.log(ALPHA)
    spread = (twice + math.log(twice) + 1) / 1000
    theirs = 3.0 / counts * ville.normal_mixture(counts, ALPHA, 1 / spread)
    np.testing.assert_allclose(radius_of_mean(counts, 3.0, ALPHA), theirs, rtol=1e-9)


def test_few_numbers_say_nothing() -> None:
    assert not mean_interval(MeanSums.of([1.0] * (FEWEST - 1)), ALPHA).known
    assert mean_interval(MeanSums.of([1.0] * FEWEST), ALPHA).known
    assert not mean_interval(MeanSums(), ALPHA).known


def near(one: MeanSums, other: MeanSums) -> bool:
    return (
        one.count == other.count
        and np.allclose(one.mean, other.mean)
        and np.allclose(one.squares, other.squares, atol=1e-3)
    )


@given(FEW, FEW, FEW)
def test_moments_merge_in_any_order(one: list[float], other: list[float], third: list[float]) -> None:
    parts = [MeanSums.of(values) for values in (one, other, third)]
    whole = MeanSums.of([*one, *other, *third])
    assert near(parts[0].merged(parts[1]).merged(parts[2]), whole)
    assert near(parts[2].merged(parts[0].merged(parts[1])), whole)


def batches(random: np.random.Generator, count: int) -> tuple[NDArray[np.int64], NDArray[np.floating]]:
    """Rows and seconds of batches: 2 ms and 1 ms per row, noisy; the truth is 1.25 ms per row at 8 rows on average."""
    rows = random.integers(1, 16, count)
    return rows, (0.002 + 0.001 * rows) * np.exp(0.2 * random.standard_normal(count) - 0.02)


def test_the_cost_per_row_is_seldom_ever_missed() -> None:
    random, missed = np.random.default_rng(1), 0
    for _ in range(400):
        rows, seconds = batches(random, 1500)
        sums = np.cumsum([np.ones(1500), seconds, rows, seconds**2, seconds * rows, rows**2], axis=1)
        looks = (RatioSums(*column).interval(ALPHA) for column in sums[:, 50::50].T)
        missed += any(not look.low <= 0.00125 <= look.high for look in looks)
    assert missed / 400 <= 0.083  # alpha and three standard errors


def test_the_interval_of_a_ratio_narrows_around_it() -> None:
    rows, seconds = batches(np.random.default_rng(2), 4000)
    whole = RatioSums()
    for value, row in zip(seconds, rows, strict=True):
        whole = whole.merged(RatioSums.of(float(value), float(row)))
    low, high = whole.interval(ALPHA)
    assert low < whole.per_row < high < low * 1.05
    assert whole.scaled(4).interval(ALPHA).high < high
    assert RatioSums().interval(ALPHA) == (0.0, math.inf)


def test_rows_of_one_batch_are_one_observation() -> None:
    assert not RatioSums.of(0.01, 1000).interval(ALPHA).known
