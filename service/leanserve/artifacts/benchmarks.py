"""How fast artifacts are: stored one by one, each beside an anchor, so that one more variant times nothing else anew.

What is stored of an artifact is the ratio of its latencies to those of the anchor (the base), taken in turns within one
process. Ratios last: they hold whatever else the machine did that day, and may be compared with those of artifacts that
were timed with the same anchor another day. Milliseconds of one day do not; those that are reported are the ratio times
the latency of the anchor when that was timed first.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

LANE_GAIN = 1.1
"""Several lanes must answer this many times the rows per second of one: a request is slower on fewer threads."""
PAIR_GAIN = 0.97
"""The same for two lanes where a lone request has both threads nevertheless. What is measured is bare: served, a lane
of two threads loses more to all else on its cores, for a thread that is interrupted makes the other wait."""


QUIET = 0.25
"""Time that our threads may wait for a processor, over that of a turn, in a round that counts as undisturbed: beside
busy processes it is 0.5 and more, and on an idle machine a few hundredths."""
Change = Literal["faster", "no gain", "slower"]


class RatioInterval(BaseModel):
    """Latency over that of the anchor: the median of the rounds, and the least and the largest of them.

    Of seven rounds these hold the true median with 98 %: it is missed only where all seven fall on one side of it. Of
    three it is 75 %.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    median: float
    low: float
    high: float


class Speedup(NamedTuple):
    """How many times the throughput of something else, and the interval of it."""

    median: float
    low: float
    high: float

    def over(self, other: Speedup) -> Speedup:
        """Of two that are relative to the same: how many times the other's this is.

        The logarithms' distances to their ends are added as squares (MOVER; Zou & Donner 2008, Statistics in Medicine
        27:1693), for both are not at their ends at once.
        """
        median = self.median / other.median
        low = math.hypot(math.log(self.median / self.low), math.log(other.high / other.median))
        high = math.hypot(math.log(self.high / self.median), math.log(other.median / other.low))
        return Speedup(median, median / math.exp(low), median * math.exp(high))

    @property
    def change(self) -> Change:
        """What can be said of it: `no gain` where the interval holds 1."""
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "no gain"


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
    rounds: int
    """Behind every median and interval."""
    waited: float
    """Time that threads waited for a processor over that of a turn, in the worst turn of these rounds."""

    @property
    def disturbed(self) -> bool:
        """Whether other work on the machine may have changed its speed."""
        return self.waited > QUIET

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
    """Lanes (1, and one per thread; of a GPU 1, 2 and 4) -> rows per second; 0 where there is no memory for so many."""

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

    @property
    def disturbed(self) -> bool:
        """Whether any of it is."""
        return any(result.disturbed for result in self.results.values())

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

    def speedup(self, key: str) -> Speedup:
        """Throughput over the anchor's, each at the best of its batch sizes.

        The interval is that of the ratio at the artifact's best size, or at the largest that the anchor has memory for.
        """
        latency, result = self.latency_ms(key), self.results[key]
        rows = max(latency, key=lambda rows: rows / latency[rows])
        measured = result.ratios.get(rows) or result.ratios[max(result.ratios)]
        gain = self.throughput(key) / self.throughput(self.anchor)
        return Speedup(gain, gain * measured.median / measured.high, gain * measured.median / measured.low)

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

    def best_streams(self, keys: Sequence[str]) -> int:
        """The lanes of a GPU: as many as bring `LANE_GAIN` over fewer, on the geometric mean over these artifacts."""
        best, best_gain = 1, 1.0
        measured = [self.lane_rates[key].rates for key in keys if key in self.lane_rates]
        for lanes in sorted(set.intersection(*map(set, measured))) if measured else ():
            gains = [rates[lanes] / rates[1] for rates in measured]
            gain = statistics.geometric_mean(gains) if all(gains) else 0.0
            if gain >= LANE_GAIN * best_gain:
                best, best_gain = lanes, gain
        return best


def best_rate(latency_ms: Mapping[int, float]) -> float:
    """Rows per second at the best of these batch sizes."""
    return max(rows / ms * 1000 for rows, ms in latency_ms.items())
