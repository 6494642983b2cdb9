"""Do two halves of the base look alike? If not, the measurement is at fault, and no verdict of it is to be trusted.

Requests of the base are halved at random. Differences then come from how traffic is shared out and timed: a cache that
one half warms for the other, rows whose answers depend on their batch, latencies that hang together.
"""

from __future__ import annotations

import math

from leanserve.experiments.evidence import ArmSums
from leanserve.experiments.latency_histogram import FINE_SECONDS
from leanserve.experiments.proportion import log_evidence_below, share_interval
from leanserve.experiments.quantile import quantile_interval
from leanserve.experiments.verdict import Limits

CHECKS = 4


def self_check(one: ArmSums, other: ArmSums, limits: Limits, agreed: float = 0, rows: float = 0) -> tuple[str, ...]:
    """What is wrong if two halves of the base's own traffic look different; nothing, with probability 1 - alpha.

    `agreed` of `rows` were answered alike when the base answered them twice.
    """
    level = limits.alpha / CHECKS
    shares = [share_interval(arm.requests - arm.failures, arm.failures, level / 2) for arm in (one, other)]
    times = [quantile_interval(FINE_SECONDS, arm.service_s.counts, limits.quantile, level / 2) for arm in (one, other)]
    costs = [arm.cost.device_s.interval(level / 2) for arm in (one, other)]
    compared = {"failures": shares, f"p{100 * limits.quantile:g} service time": times, "cost per row": costs}
    found = [f"{name} of the base and the base differ" for name, pair in compared.items() if pair[0].apart(pair[1])]
    if log_evidence_below(agreed, rows - agreed, limits.min_agreement) >= -math.log(level):
        found.append(f"the base agrees with itself in only {agreed:,.0f} of {rows:,.0f} rows")
    return tuple(found)
