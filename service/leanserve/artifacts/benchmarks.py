"""How fast artifacts are: stored one by one, each beside an anchor, so that one more variant times nothing else anew.

What is stored of an artifact is the ratio of its latencies to those of the anchor (the base), taken in turns within one
process. Ratios last: they hold whatever else the machine did that day, and may be compared with those of artifacts that
were timed with the same anchor another day. Milliseconds of one day do not; those that are reported are the ratio times
the latency of the anchor when that was timed first.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

LANE_GAIN = 1.1
"""Several lanes must answer this many times the rows per second of one: a request is slower on fewer threads."""
PAIR_GAIN = 0.97
"""The same for two lanes where a lone request has both threads nevertheless. What is measured is bare: served, a lane
of two threads loses more to all else on its cores, for a thread that is interrupted makes the other wait."""


class RatioInterval(BaseModel):
    """Latency over that of the anchor: the median of the rounds, and the least and the largest of them.

    Of seven rounds these hold the true median with 98 %: it is missed only where all seven fall on one side of it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    median: float
    low: float
    high: float


class BenchmarkResult(BaseModel):
    """Speed of one artifact, timed in turns with the anchor on one machine; all by rows in the batch."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    anchor: str
    """Key of the artifact that it was timed with; its own where it is the anchor."""
    cpu: str
    threads: int
    latency_ms: dict[int, float]
    """Median milliseconds per batch."""
    anchor_ms: dict[int, float]
    """Those of the anchor in the same rounds."""
    ratios: dict[int, RatioInterval]
    """For the batches that both have memory for."""

    @property
    def throughput(self) -> float:
        """Rows per second at the best of its batch sizes, as timed."""
        return best_rate(self.latency_ms)


class LaneRates(BaseModel):
    """Rows per second of one artifact with one lane and with a lane per thread, in turns on one machine."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    key: str
    cpu: str
    threads: int
    rates: dict[int, float]
    """Lanes (1, and one per thread) -> rows per second; 0 where there is no memory for that many lanes."""

    @property
    def gain(self) -> float:
        """Rows per second with a lane per thread over those with one lane."""
        return self.rates[self.threads] / self.rates[1]


@dataclass(frozen=True)
class BenchmarkSet:
    """All that was timed of some artifacts on one machine, beside one anchor."""

    cpu: str
    threads: int
    anchor: str
    results: Mapping[str, BenchmarkResult]
    """By key."""
    lane_rates: Mapping[str, LaneRates]
    """By key; none on a single thread."""

    def covers(self, keys: Sequence[str], served: Sequence[str]) -> bool:
        """Whether all of these artifacts were timed, and those that are served with lanes if there can be several."""
        lanes = self.threads == 1 or set(served) <= self.lane_rates.keys()
        return lanes and {self.anchor, *keys} <= self.results.keys()

    def latency_ms(self, key: str) -> dict[int, float]:
        """Milliseconds per batch by its rows, as if it had been timed together with the anchor's own.

        For a batch that the anchor has no memory for, they are corrected by what the anchor took on that day for the
        next smaller one.
        """
        result, anchor = self.results[key], self.results[self.anchor].latency_ms
        day = {rows: anchor[rows] / ms for rows, ms in result.anchor_ms.items() if rows in anchor}
        found = {}
        for rows, ms in result.latency_ms.items():
            if rows in result.ratios and rows in anchor:
                found[rows] = result.ratios[rows].median * anchor[rows]
            else:
                found[rows] = ms * day[max(known for known in day if known <= rows)]
        return found

    def throughput(self, key: str) -> float:
        """Rows per second at the best of the batch sizes of `latency_ms`."""
        return best_rate(self.latency_ms(key))

    def lane_gain(self, keys: Sequence[str]) -> float:
        """Rows per second with a lane per thread over those with one lane: the geometric mean over artifacts."""
        gains = [self.lane_rates[key].gain for key in keys if self.threads > 1]
        if 0.0 in gains:
            return 0.0
        return statistics.geometric_mean(gains) if gains else 1.0

    def best_lanes(self, keys: Sequence[str], threads: int, *, self_contained: bool) -> int:
        """A lane for each of so many threads if that pays for these artifacts, else one lane.

        `self_contained` is what all their backends are. `threads` differs from the measured number only where another
        machine measured.
        """
        enough = PAIR_GAIN if self_contained and threads == 2 else LANE_GAIN
        return threads if self.lane_gain(keys) >= enough else 1


def best_rate(latency_ms: Mapping[int, float]) -> float:
    """Rows per second at the best of these batch sizes."""
    return max(rows / ms * 1000 for rows, ms in latency_ms.items())
