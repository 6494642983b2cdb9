"""Is a share of rows above or below its limit? Evidence that may be looked at after every row.

An e-value is the factor by which a gambler who bets against the null hypothesis has multiplied the stake. If the null
is true it exceeds 1/alpha at *any* time with a probability of at most alpha (Ville 1939), so looking often costs
nothing. Here the bets follow a Beta prior that is truncated to the side of the limit on which the null is false: the
null is then a whole side ("the share is at most the limit") and not one point. Rows need not be independent, as long
as the share, given everything before, stays on the null's side.

The prior leans towards shares near 1, where agreements and good answers are: that speeds up the rejection of shares
below, and costs nothing above.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from leanserve.experiments.interval import Interval

Numbers = NDArray[np.float64]
Prior = tuple[ArrayLike, ArrayLike]
PRIOR: Prior = (20.0, 1.0)
"""Of the Beta distribution: as if 19 good rows had been seen."""
HALVINGS = 52
"""Of a range in which an end is searched: as many as a double has bits."""
MOST_ROWS = 10**6
"""Beyond as many no decision is foreseen."""
LOOKS = 350
"""At as many rows, evenly apart in their logarithm."""


def log_evidence_above(good: ArrayLike, bad: ArrayLike, limit: float, prior: Prior = PRIOR) -> Numbers:
    """Logarithm of the e-value against "the share of good rows is at most `limit`" (0..1, both excluded).

    `good` and `bad` are counts, of any shape. From log(1/alpha) on, the share is above the limit at level alpha.
    """
    from scipy.special import betaincc

    return _log_evidence(good, bad, limit, prior, betaincc)


def log_evidence_below(good: ArrayLike, bad: ArrayLike, limit: float, prior: Prior = PRIOR) -> Numbers:
    """Logarithm of the e-value against "the share of good rows is at least `limit`"; else as `log_evidence_above`."""
    from scipy.special import betainc

    return _log_evidence(good, bad, limit, prior, betainc)


def _log_evidence(
    good: ArrayLike, bad: ArrayLike, limit: float, prior: Prior, mass: Callable[[ArrayLike, ArrayLike, float], Numbers]
) -> Numbers:
    """Likelihood averaged over the prior on the side whose `mass` is given, over the likelihood at the limit."""
    passes, failures = np.asarray(good, np.float64), np.asarray(bad, np.float64)
    a, b = (np.asarray(each, np.float64) for each in prior)
    with np.errstate(divide="ignore"):  # no mass is left on that side: no evidence
        kept = np.log(mass(a + passes, b + failures, limit)) - np.log(mass(a, b, limit))
    return np.asarray(_log_predictive(passes, failures, prior) - _log_likelihood(passes, failures, limit) + kept)


def _log_predictive(good: Numbers, bad: Numbers, prior: Prior) -> Numbers:
    """Likelihood of the counts, averaged over the whole prior."""
    from scipy.special import betaln

    a, b = (np.asarray(each, np.float64) for each in prior)
    return np.asarray(betaln(a + good, b + bad) - betaln(a, b))


def _log_likelihood(good: Numbers, bad: Numbers, share: ArrayLike) -> Numbers:
    """Of the counts, where the share of good rows is `share`."""
    from scipy.special import xlog1py, xlogy

    return np.asarray(xlogy(good, share) + xlog1py(bad, -np.asarray(share)))


def share_bounds(good: ArrayLike, bad: ArrayLike, alpha: float, prior: Prior = PRIOR) -> tuple[Numbers, Numbers]:
    """Least and greatest share of good rows that the counts leave possible, at all times at once, at level alpha.

    All shares against which the evidence stays below 1/alpha (Robbins 1970; Howard et al. 2021). No rows: 0 and 1.
    """
    passes, failures = np.broadcast_arrays(np.asarray(good, np.float64), np.asarray(bad, np.float64))
    rows, least = passes + failures, _log_predictive(passes, failures, prior) + math.log(alpha)
    outside = np.stack([np.zeros_like(rows), np.ones_like(rows)])
    inside = np.where(rows > 0, passes / np.maximum(rows, 1.0), outside)
    for _ in range(HALVINGS):
        middle = (outside + inside) / 2
        refuted = _log_likelihood(passes, failures, middle) <= least
        outside, inside = np.where(refuted, middle, outside), np.where(refuted, inside, middle)
    return outside[0], outside[1]


def share_interval(good: float, bad: float, alpha: float) -> Interval:
    """`share_bounds` of one pair of counts."""
    low, high = share_bounds(good, bad, alpha)
    return Interval(float(low), float(high))


def median_rows(share: float, limit: float, alpha: float, streams: int = 400) -> float | None:
    """Rows after which half of random streams with this share of good rows are known to be above or below `limit`.

    Simulated with a fixed seed, looked at every 4 %, which is good to 10 %. `None`: a million rows do not decide, as at
    the limit itself.
    """
    evidence = log_evidence_above if share > limit else log_evidence_below
    looks = np.unique(np.geomspace(1, MOST_ROWS, LOOKS).round().astype(np.int64))
    drawn = np.random.default_rng(0).binomial(np.diff(looks, prepend=0)[:, None], share, (len(looks), streams))
    good = np.cumsum(drawn, axis=0)
    decided = (evidence(good, looks[:, None] - good, limit) >= -math.log(alpha)).cumsum(axis=0) > 0
    half = np.flatnonzero(decided.mean(axis=1) >= 0.5)
    return float(looks[half[0]]) if len(half) else None
