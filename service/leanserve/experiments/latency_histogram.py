"""Latencies of one variant in buckets so fine that they hardly widen an interval: 0.2 % apart, from 10 us to 100 s.

Adding counts up is exact, in any order, over processes and restarts; 8,070 numbers are kept, however long an
experiment lasts.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from typing import Self

import numpy as np
from numpy.typing import NDArray

from leanserve.contracts import Json

RATIO = 1.002
LEAST_S = 1e-5
FINE_SECONDS = tuple(LEAST_S * RATIO**step for step in range(8069))
"""Upper bounds of the buckets; a last one is open."""


class LatencyHistogram:
    """Counts per bucket of `FINE_SECONDS`. One thread writes; sums and copies are new histograms."""

    __slots__ = ("counts",)

    def __init__(self, counts: NDArray[np.float64] | None = None) -> None:
        """`counts` [len(FINE_SECONDS) + 1], none by default."""
        self.counts = np.zeros(len(FINE_SECONDS) + 1) if counts is None else counts

    def add(self, seconds: float, times: int = 1) -> None:
        """Count one latency, `times` times; a bucket includes its upper bound."""
        self.counts[bisect_left(FINE_SECONDS, seconds)] += times

    def merged(self, other: LatencyHistogram) -> Self:
        """The counts of both."""
        return type(self)(self.counts + other.counts)

    def scaled(self, factor: float) -> Self:
        """The counts of `factor` times as many latencies of the same kind."""
        return type(self)(self.counts * factor)

    @property
    def count(self) -> float:
        """Latencies so far."""
        return float(self.counts.sum())

    def quantile(self, share: float) -> float:
        """Upper edge (seconds) of the bucket of the latency that `share` of all are at or below; 0 without any."""
        if not self.count:
            return 0.0
        rank = math.ceil(share * self.count)
        bucket = int(np.searchsorted(np.cumsum(self.counts), max(rank, 1)))
        return FINE_SECONDS[bucket] if bucket < len(FINE_SECONDS) else math.inf

    def to_json(self) -> Json:
        """Occupied buckets by their position."""
        return {str(index): float(self.counts[index]) for index in np.flatnonzero(self.counts)}

    @classmethod
    def from_json(cls, stored: Mapping[str, float]) -> Self:
        """Of what `to_json` made."""
        histogram = cls()
        for index, count in stored.items():
            histogram.counts[int(index)] = count
        return histogram
