"""How many requests does a decision take? Told before an experiment starts, and while it runs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from leanserve.experiments.evidence import LiveEvidence
from leanserve.experiments.latency_histogram import FINE_SECONDS, LatencyHistogram
from leanserve.experiments.proportion import median_rows
from leanserve.experiments.quantile import quantile_interval
from leanserve.experiments.verdict import Limits, judge

PRECISION = 1.01
"""Factor up to which an amount is searched."""
FARTHEST = 1e4
"""Times the traffic so far within which a decision is foreseen."""
MOST_REQUESTS = 1e7


def requests_to_decision(evidence: LiveEvidence, limits: Limits) -> float | None:
    """Requests, those so far included, after which a decision falls if everything goes on as it went.

    `None`: without a request, or if 10,000 times as many do not decide.
    """
    if not evidence.requests:
        return None
    free = limits.model_copy(update={"max_requests": None})
    factor = smallest_amount(
        lambda more: judge(evidence.scaled(more), free).state in {"promote", "reject"}, 1.0, FARTHEST
    )
    return None if factor is None else factor * evidence.requests


class Traffic(NamedTuple):
    """How requests are shared out."""

    share: float
    """Of the candidate."""
    shadowed: float
    """Rows per request that the candidate answers after the base."""


def requests_before_start(
    limits: Limits, traffic: Traffic, service_s: LatencyHistogram, agreement: float = 1.0
) -> dict[str, float | None]:
    """By question: the requests that a good candidate will need, told before an experiment starts.

    Good is: of this agreement, without a failure, as fast as the base, whose service times are `service_s`. `None`: not
    to be decided.
    """
    alpha, paired = limits.alpha, median_rows(agreement, limits.min_agreement, limits.alpha)
    answered = median_rows(1.0, 1 - limits.max_failures, alpha)
    timed = _requests_to_show_equal(service_s, limits)
    rarer = min(traffic.share, 1 - traffic.share)
    return {
        "agreement": _over(paired, traffic.shadowed),
        "failures": _over(answered, traffic.share),
        f"p{100 * limits.quantile:g} service time": _over(timed, rarer),
    }


def _requests_to_show_equal(service_s: LatencyHistogram, limits: Limits) -> float | None:
    """Of each of two variants with this distribution of service times."""
    if not service_s.count:
        return None

    def decides(count: float) -> bool:
        counts = service_s.scaled(count / service_s.count).counts
        low, high = quantile_interval(FINE_SECONDS, counts, limits.quantile, limits.alpha)
        return high <= limits.max_slowdown * low

    return smallest_amount(decides, 1.0, MOST_REQUESTS)


def _over(rows: float | None, share: float) -> float | None:
    return None if rows is None or share <= 0 else rows / share


def smallest_amount(decides: Callable[[float], bool], least: float, most: float) -> float | None:
    """The smallest amount from `least` to `most` that decides, supposing that more does not undo it.

    `None`: not even the most decides.
    """
    if decides(least):
        return least
    short, enough = least, least * 2
    while not decides(enough):
        if enough >= most:
            return None
        short, enough = enough, min(most, enough * 2)
    while enough > short * PRECISION:
        middle = math.sqrt(short * enough)
        short, enough = (short, middle) if decides(middle) else (middle, enough)
    return enough
