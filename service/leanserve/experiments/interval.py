"""A range of values that holds the truth, with the probability promised by whoever made it."""

from __future__ import annotations

import math
from typing import NamedTuple


class Interval(NamedTuple):
    """From `low` to `high`, both included; an end that nothing is known about yet is infinite."""

    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether both ends are finite."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    def apart(self, other: Interval) -> bool:
        """Whether the two have no value in common."""
        return self.low > other.high or other.low > self.high

    def over(self, other: Interval) -> Interval:
        """What the ratio of a value in here to one in `other` can be, for values that are not negative."""
        low = self.low / other.high if math.isfinite(other.high) and other.high > 0 else 0.0
        high = self.high / other.low if other.low > 0 else math.inf
        return Interval(max(0.0, low), high)
