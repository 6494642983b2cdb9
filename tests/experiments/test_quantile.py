"""Quantiles of latencies: right at every look, from samples or buckets, and never from too few."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from leanserve.experiments.interval import Interval
from leanserve.experiments.latency_histogram import FINE_SECONDS, RATIO, LatencyHistogram
from leanserve.experiments.quantile import quantile_bounds, quantile_interval, rank_bounds
from leanserve.telemetry.observations import SECONDS

ALPHA, STREAMS = 0.05, 2000
MOST_CROSSINGS = 0.065
LOOKS = np.unique(np.geomspace(20, 5000, 100).round().astype(np.int64))


def exact(sample: NDArray[np.float64], quantile: float, alpha: float = ALPHA) -> Interval:
    """The interval between the observations themselves."""
    low, high = rank_bounds(len(sample), quantile, alpha)
    ordered = np.sort(sample)
    return Interval(
        float(ordered[int(low) - 1]) if low >= 1 else 0.0,
        float(ordered[int(high) - 1]) if high <= len(sample) else math.inf,
    )


@pytest.mark.parametrize("quantile", [0.5, 0.95, 0.99])
def test_the_ranks_seldom_ever_miss_the_quantile(quantile: float) -> None:
    below = np.random.default_rng(0).binomial(np.diff(LOOKS, prepend=0), quantile, (STREAMS, len(LOOKS))).cumsum(axis=1)
    low, high = rank_bounds(LOOKS, quantile, ALPHA)
    assert ((below < low) | (below >= high)).any(axis=1).mean() <= MOST_CROSSINGS


def test_too_few_have_no_upper_end() -> None:
    """The maximum of a sample is no bound: as one it would be missed in 8.5 % of streams."""
    assert rank_bounds([100, 300], 0.95, ALPHA)[1].tolist() == [math.inf, 296]
    assert rank_bounds([300, 1000], 0.99, ALPHA)[1].tolist() == [math.inf, 998]
    assert [float(rank) for rank in rank_bounds(0, 0.95, ALPHA)] == [0.0, math.inf]


@pytest.mark.parametrize("bounds", [SECONDS, FINE_SECONDS])
@given(seed=st.integers(0, 1000), observations=st.integers(0, 800))
def test_buckets_are_never_narrower_than_samples(bounds: tuple[float, ...], seed: int, observations: int) -> None:
    sample = 0.01 * np.exp(np.random.default_rng(seed).standard_normal(observations))
    counts = np.bincount(np.searchsorted(bounds, sample), minlength=len(bounds) + 1)
    low, high = quantile_interval(bounds, counts, 0.9, ALPHA)
    kept = exact(sample, 0.9)
    assert low <= kept.low <= kept.high <= high
    if bounds is FINE_SECONDS and math.isfinite(kept.high):
        assert high <= kept.high * RATIO * 1.0001
        assert low >= kept.low / RATIO * 0.9999


def lognormal_cells(ratio: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bounds of fine buckets around a lognormal latency (sigma 0.3) that is `ratio` times 10 ms, and their chances."""
    from scipy.special import ndtr

    edges = np.log(np.array(FINE_SECONDS) / (0.01 * ratio)) / 0.3
    held = slice(int(np.searchsorted(edges, -5.0)), int(np.searchsorted(edges, 5.0)), 10)  # every tenth, for time
    return np.array(FINE_SECONDS)[held], np.diff(ndtr(edges[held]), prepend=0.0, append=1.0)


def test_latencies_exactly_at_the_margin_are_seldom_ever_said_to_be_within_or_beyond() -> None:
    """Buckets of arm B lie exactly the margin above those of arm A: the boundary null of both questions."""
    bounds, chances = lognormal_cells(1.0)
    random = np.random.default_rng(1)
    arms = np.zeros((2, STREAMS, len(chances)))
    within, beyond = np.zeros(STREAMS, bool), np.zeros(STREAMS, bool)
    for fresh in (300, 200, 250, 250, 500, 500):
        arms += random.multinomial(fresh, chances, (2, STREAMS))
        low, high = quantile_bounds(bounds, arms, 0.95, ALPHA)
        within |= high[1] <= low[0]  # with the margin on both sides
        beyond |= low[1] > high[0]
    assert within.mean() <= MOST_CROSSINGS
    assert beyond.mean() <= MOST_CROSSINGS


@pytest.mark.parametrize(
    ("ratio", "margin", "rows"), [(1.0, 1.1, 1960), (1.0, 1.2, 650), (1 / 1.3, 1.1, 312), (0.5, 1.1, 276)]
)
def test_no_more_rows_are_needed_than_predicted(ratio: float, margin: float, rows: float) -> None:
    random, looks = np.random.default_rng(2), np.arange(100, 3001, 20)
    ranks = zip(looks, *rank_bounds(looks, 0.95, ALPHA), strict=True)
    known = [(int(n), int(low), int(high)) for n, low, high in ranks if low >= 1 and high <= n]
    stops: list[int] = []
    for _ in range(40):
        base, candidate = (np.exp(0.3 * random.standard_normal(3000)) * factor for factor in (1.0, ratio))
        within = (n for n, low, high in known if nth(candidate[:n], high) <= margin * nth(base[:n], low))
        stops.append(next(within, 10**9))
    assert np.median(stops) <= rows * 1.15


def nth(sample: NDArray[np.float64], rank: int) -> float:
    return float(np.partition(sample, rank - 1)[rank - 1])


@given(st.lists(st.floats(0, 1000), max_size=30), st.lists(st.floats(0, 1000), max_size=30))
def test_histograms_add_up_exactly_and_survive_json(one: list[float], other: list[float]) -> None:
    whole, parts = histogram([*other, *one]), histogram(one).merged(histogram(other))
    assert (whole.counts == parts.counts).all()
    stored = json.loads(json.dumps(whole.to_json()))
    assert (LatencyHistogram.from_json(stored).counts == whole.counts).all()


def histogram(values: list[float]) -> LatencyHistogram:
    found = LatencyHistogram()
    for value in values:
        found.add(value)
    return found


def test_a_quantile_of_a_histogram_is_within_its_bucket() -> None:
    values = [0.001 * step for step in range(1, 101)]
    for share in (0.01, 0.5, 0.95, 1.0):
        assert histogram(values).quantile(share) == pytest.approx(0.1 * share, rel=RATIO - 1)
    assert histogram([]).quantile(0.5) == 0.0
    assert histogram([1e6]).quantile(0.5) == math.inf


def test_bucket_edges_are_even_and_reach_from_microseconds_to_minutes() -> None:
    assert FINE_SECONDS[0] == 1e-5
    assert FINE_SECONDS[-1] >= 100.0
    assert max(np.diff(np.log(FINE_SECONDS))) == pytest.approx(math.log(RATIO))
