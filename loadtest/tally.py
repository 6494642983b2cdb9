"""What one variant answered under load: counts, right answers and latencies that can be added up.

Locust rounds response times to whole milliseconds, too coarse to compare variants that answer in two; here latencies
are counted in buckets 1 % apart, which add up over users, worker processes and rounds in a few hundred numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_STEP = math.log(1.01)


@dataclass(slots=True)
class Tally:
    """Answers and errors of one variant; `began` and `ended` (epoch seconds) span its first to its last request."""

    right: int = 0
    judged: int = 0
    """Answers to rows whose true label is known."""
    errors: int = 0
    began: float = math.inf
    ended: float = -math.inf
    latencies: Counter[int] = field(default_factory=Counter)
    """Bucket -> answers; bucket b stands for 1.01 ** b milliseconds."""

    def answer(self, began: float, milliseconds: float, *, right: bool | None) -> None:
        """Count an answer to a request that was sent at `began` (epoch seconds); `right`: `None` if nobody knows."""
        self.latencies[round(math.log(max(milliseconds, 1e-3)) / _STEP)] += 1
        self.right += right is True
        self.judged += right is not None
        self._span(began, began + milliseconds / 1e3)

    def error(self, began: float) -> None:
        """Count a request without a usable answer."""
        self.errors += 1
        self._span(began, began)

    def _span(self, began: float, ended: float) -> None:
        self.began, self.ended = min(self.began, began), max(self.ended, ended)

    def add(self, other: Tally) -> None:
        """Count what the other one counted, too."""
        self.latencies.update(other.latencies)
        self.right += other.right
        self.judged += other.judged
        self.errors += other.errors
        self._span(other.began, other.ended)

    @property
    def answers(self) -> int:
        """Requests that got an answer."""
        return self.latencies.total()

    @property
    def rate(self) -> float:
        """Answers per second between the first request and the last answer; 0 without any."""
        return self.answers / (self.ended - self.began) if self.ended > self.began else 0.0

    @property
    def right_share(self) -> float:
        """Share (0-1) of the answers that name the true label; NaN where none is known."""
        return self.right / self.judged if self.judged else math.nan

    @property
    def right_percent(self) -> str:
        """That share for a table."""
        return f"{100 * self.right_share:.2f}" if self.judged else "-"

    def percentile(self, share: float) -> float:
        """Milliseconds within which `share` (0-1) of the answers came, to 0.5 %; NaN without answers."""
        wanted, seen = share * self.answers, 0
        for bucket in sorted(self.latencies):
            seen += self.latencies[bucket]
            if seen >= wanted:
                return math.exp(bucket * _STEP)
        return math.nan

    def to_json(self) -> dict[str, Any]:
        """The numbers as JSON-able values."""
        latencies = {str(bucket): count for bucket, count in self.latencies.items()}
        span = [self.began, self.ended] if self.ended >= self.began else None
        return {"right": self.right, "judged": self.judged, "errors": self.errors, "span": span, "latencies": latencies}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Tally:
        """The inverse of `to_json`."""
        began, ended = data["span"] or (math.inf, -math.inf)
        latencies = Counter({int(bucket): count for bucket, count in data["latencies"].items()})
        return cls(data["right"], data["judged"], data["errors"], began, ended, latencies)
