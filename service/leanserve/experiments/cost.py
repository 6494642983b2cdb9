"""What does an answer cost? Device seconds and joules per row, and money per million rows.

A batch costs the device the time that it runs, whatever it was filled up with, and its real rows share that: so padding
is paid by the answers that needed it. A lane that has a share of a device costs that share of its seconds. What an idle
device costs is not part of an answer's cost, unless the utilisation is said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import NamedTuple, Self

from leanserve.contracts import Json
from leanserve.experiments.interval import Interval
from leanserve.experiments.mean import RatioSums

MILLION = 1e6
SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class CostSums:
    """Sums over batches. `joules` counts those batches alone whose energy was measured."""

    device_s: RatioSums = field(default_factory=RatioSums)
    joules: RatioSums = field(default_factory=RatioSums)

    @classmethod
    def of_batch(cls, rows: int, device_s: float, joules: float | None = None) -> Self:
        """Those of one batch of `rows` real rows that had a device for itself for `device_s` seconds.

        On a lane that is one of n, a batch of t seconds has t / n device seconds.
        """
        return cls(RatioSums.of(device_s, rows), RatioSums() if joules is None else RatioSums.of(joules, rows))

    def merged(self, other: CostSums) -> CostSums:
        """Those of both together."""
        return CostSums(self.device_s.merged(other.device_s), self.joules.merged(other.joules))

    def scaled(self, factor: float) -> CostSums:
        """Those of `factor` times as many batches of the same kind."""
        return CostSums(self.device_s.scaled(factor), self.joules.scaled(factor))

    def to_json(self) -> Json:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Json]) -> Self:
        """Of what `to_json` made."""
        return cls(RatioSums(**stored["device_s"]), RatioSums(**stored["joules"]))


class Price(NamedTuple):
    """Of a million answered rows, in the currency of the price per hour."""

    per_million: float
    interval: Interval


def price_per_million(
    device_s: RatioSums, price_per_hour: float, alpha: float = 0.05, utilisation: float = 1.0
) -> Price | None:
    """Price of a million rows on a device that costs `price_per_hour`; its interval holds at any look at level alpha.

    `utilisation` (0..1, not 0) is the share of the hour for which the device is at work: at 1 only the work is paid
    for, at the measured one also the waiting. `None` before the first batch.
    """
    if not device_s.rows:
        return None
    factor = price_per_hour / SECONDS_PER_HOUR * MILLION / utilisation
    low, high = device_s.interval(alpha)
    return Price(device_s.per_row * factor, Interval(low * factor, high * factor))
