"""How sure is what was measured on the gate split? 95 % intervals; of two models, of the differences on the same rows.

Two models that answer 98 % right may differ by chance in a point or in none: what tells is on which rows they differ.
So a loss is never taken from two scores with an interval each, but from the pairs of answers to the same rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from leanserve.contracts import Array
from leanserve.experiments.interval import Interval

RESAMPLES = 1000
FEWEST_RESAMPLES = 100
"""A percentile at 2.5 % has two draws below it then."""
SCORING_S = 20.0
"""How long all draws of one score may take; a slow score is drawn less often."""
AT_A_TIME = 100
"""Draws whose counts of rows are in memory together."""
ENDS = (2.5, 97.5)


def sampled_share(hits: int, rows: int) -> Interval:
    """Wilson's interval of a proportion (Wilson 1927), sound even at shares of 0 and 1; without rows 0 to 1."""
    from scipy.stats import binomtest

    if rows == 0:
        return Interval(0.0, 1.0)
    found = binomtest(hits, rows).proportion_ci(method="wilson")
    return Interval(float(found.low), float(found.high))


def paired_difference(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> Interval:
    """Of the share of hits in `one` minus that in `other`, both of the same rows, at least one.

    Newcombe's square-and-add interval for paired proportions (Newcombe 1998, Statistics in Medicine 17:2635, method
    10): it stays open where no row differs, as far as the number of rows leaves it open.
    """
    rows = len(one)
    both, first, second = int((one & other).sum()), int((one & ~other).sum()), int((~one & other).sum())
    shares = (both + first) / rows, (both + second) / rows
    low, high = zip(*(sampled_share(round(share * rows), rows) for share in shares), strict=True)
    phi = _correlation(both, first, second, rows - both - first - second)
    down, up = ([abs(share - end) for share, end in zip(shares, ends, strict=True)] for ends in (low, high))
    difference = shares[0] - shares[1]
    below = math.sqrt(max(0.0, down[0] ** 2 - 2 * phi * down[0] * up[1] + up[1] ** 2))
    above = math.sqrt(max(0.0, up[0] ** 2 - 2 * phi * up[0] * down[1] + down[1] ** 2))
    return Interval(difference - below, difference + above)


def _correlation(both: int, first: int, second: int, neither: int) -> float:
    """Phi of the table of pairs, corrected for continuity where it is positive; 0 where a margin is empty."""
    rows = both + first + second + neither
    margins = math.prod((both + first, second + neither, both + second, first + neither))
    product = both * neither - first * second
    corrected = max(0.0, product - rows / 2) if product > 0 else float(product)
    return corrected / math.sqrt(margins) if margins else 0.0


def resampled_means(rows: Array, value: Callable[[Array], Array]) -> Interval:
    """Percentile bootstrap over rows (Efron 1979), seeded, of what `value` makes of their mean.

    `rows` [rows, k]; `value` takes means of drawn rows [draws, k] and gives one number per draw.
    """
    random, count = np.random.default_rng(0), len(rows)
    chances = np.full(count, 1 / count)
    drawn = [
        value(random.multinomial(count, chances, size=AT_A_TIME) @ rows / count) for _ in range(RESAMPLES // AT_A_TIME)
    ]
    low, high = np.percentile(np.concatenate(drawn), ENDS)
    return Interval(float(low), float(high))


def resampled_score(score: Callable[[Array], float], units: int) -> Interval:
    """Percentile bootstrap of a score of units drawn by their number, seeded; in `SCORING_S` seconds where possible.

    A draw without a score (NaN, as of labels that are all alike) has no say; without any that has, nothing is known.
    """
    random = np.random.default_rng(0)
    found: list[float] = []
    end = time.perf_counter() + SCORING_S
    while len(found) < RESAMPLES and (len(found) < FEWEST_RESAMPLES or time.perf_counter() < end):
        found.append(score(random.integers(0, units, units)))
    known = np.asarray(found)[~np.isnan(found)]
    if not len(known):
        return Interval(-math.inf, math.inf)
    low, high = np.percentile(known, ENDS)
    return Interval(float(low), float(high))
