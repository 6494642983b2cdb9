"""What is the 95th percentile of a latency? An answer at any look, whatever the distribution, from bucket counts.

The number of observations at or below the true quantile is a sum of coin throws of known probability, whatever the
latencies look like. A boundary that this count crosses with probability alpha at most, ever, turns into two ranks, and
the observations at these ranks enclose the quantile (Howard & Ramdas 2022, "Sequential estimation of quantiles", with
their beta-binomial mixture, which is the e-value of `proportion`). Of a histogram we know in which bucket a rank falls:
its lower edge is taken for the lower end, its upper edge for the upper end. So the interval holds that of the samples,
and no sample is kept.

A histogram answers no question that is finer than its buckets. Those of /metrics are up to 1.67 apart: two equal
variants never differ by less than that. `latency_histogram` has finer ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from leanserve.experiments.interval import Interval
from leanserve.experiments.proportion import Numbers, Prior, log_evidence_above

EXPECTED = 1000
"""Observations at which the ranks are nearest to each other; they are valid at all numbers."""


def quantile_interval(bounds: Sequence[float], counts: ArrayLike, quantile: float, alpha: float) -> Interval:
    """`quantile_bounds` of one histogram."""
    low, high = quantile_bounds(bounds, counts, quantile, alpha)
    return Interval(float(low), float(high))


def quantile_bounds(
    bounds: Sequence[float] | Numbers, counts: ArrayLike, quantile: float, alpha: ArrayLike
) -> tuple[Numbers, Numbers]:
    """Ends of the confidence sequence of a quantile (0..1), each missed at some time with probability alpha/2 at most.

    `counts` [..., len(bounds) + 1] are those of the buckets (0, b0], (b0, b1] ... (b_last, inf), not cumulative;
    `alpha` is one level, or of a shape that fits the other axes. An end without enough observations yet is 0 or
    infinite: never the least or greatest of what was seen.
    """
    cumulative = np.cumsum(np.asarray(counts, np.float64), axis=-1)
    low_rank, high_rank = rank_bounds(cumulative[..., -1], quantile, alpha)
    edges = np.concatenate(([0.0], np.asarray(bounds, np.float64), [math.inf]))
    first = np.sum(cumulative < low_rank[..., None], axis=-1)
    last = np.sum(cumulative < high_rank[..., None], axis=-1)
    return edges[first], edges[np.minimum(last + 1, len(edges) - 1)]


def rank_bounds(observations: ArrayLike, quantile: float, alpha: ArrayLike) -> tuple[Numbers, Numbers]:
    """Ranks (from 1, ascending) of the observations that enclose the quantile; 0 and infinity stand for none yet."""
    n, half = np.broadcast_arrays(np.floor(np.asarray(observations, np.float64)), np.asarray(alpha, np.float64) / 2)
    above = n - _too_many(n, 1 - quantile, half) + 1
    return np.where(np.isfinite(above), above, 0.0), _too_many(n, quantile, half)


def _too_many(n: Numbers, share: float, alpha: Numbers) -> Numbers:
    """The least number of successes among n throws that is evidence against their having a chance of `share`.

    With a probability of at most alpha it is ever reached; infinite where even n successes are no such evidence yet.
    """
    prior, crossing = _prior(share, alpha), -np.log(alpha)

    def refuted(successes: Numbers) -> NDArray[np.bool_]:
        return np.asarray(log_evidence_above(successes, n - successes, share, prior) >= crossing)

    few, many = np.floor(n * share), n
    reached = refuted(many)
    for _ in range(int(n.max(initial=1.0)).bit_length()):
        middle = np.floor((few + many) / 2)
        beyond = refuted(middle)
        few, many = np.where(beyond, few, middle), np.where(beyond, middle, many)
    return np.where(reached, many, np.inf)


def _prior(share: float, alpha: Numbers) -> Prior:
    """The Beta prior that makes the boundary tightest at `EXPECTED` observations (Howard et al. 2021)."""
    twice = 2 * np.log(1 / (2 * alpha))
    variance = share * (1 - share)
    weight = np.maximum(variance * EXPECTED / (twice + np.log1p(twice)) - variance, 1e-3 * variance)
    return weight / (1 - share), weight / share
