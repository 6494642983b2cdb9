"""All that a verdict needs to know: sums of two variants, and of the rows that both answered.

Sums only, so that the evidence of several processes adds up, and that of before a restart with that of after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from leanserve.contracts import Json
from leanserve.experiments.answer_pairs import AnswerPairs
from leanserve.experiments.cost import CostSums
from leanserve.experiments.latency_histogram import LatencyHistogram


@dataclass(frozen=True, slots=True)
class ArmSums:
    """What one variant did in an experiment."""

    requests: float = 0
    """That it answered, or should have; those of users and those that it answered again."""
    failures: float = 0
    """Of these, which it is to blame for (5xx). A client's mistakes are no requests of it."""
    service_s: LatencyHistogram = field(default_factory=LatencyHistogram)
    """Seconds on the device per request, without waiting: variants share a device, so that one makes others wait."""
    cost: CostSums = field(default_factory=CostSums)
    shadows: float = 0
    """Of the requests, those that were no user's: the variant answered them again after another one."""

    def merged(self, other: ArmSums) -> ArmSums:
        """Those of both together."""
        return ArmSums(
            self.requests + other.requests,
            self.failures + other.failures,
            self.service_s.merged(other.service_s),
            self.cost.merged(other.cost),
            self.shadows + other.shadows,
        )

    def scaled(self, factor: float) -> ArmSums:
        """Those of `factor` times as many requests of the same kind."""
        return ArmSums(
            self.requests * factor,
            self.failures * factor,
            self.service_s.scaled(factor),
            self.cost.scaled(factor),
            self.shadows * factor,
        )

    def to_json(self) -> Json:
        """As plain values."""
        return {
            "requests": self.requests,
            "failures": self.failures,
            "service_s": self.service_s.to_json(),
            "cost": self.cost.to_json(),
            "shadows": self.shadows,
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Json]) -> Self:
        """Of what `to_json` made."""
        histogram, cost = LatencyHistogram.from_json(stored["service_s"]), CostSums.from_json(stored["cost"])
        return cls(stored["requests"], stored["failures"], histogram, cost, stored["shadows"])


@dataclass(frozen=True, slots=True)
class LiveEvidence:
    """Of one experiment so far."""

    base: ArmSums = field(default_factory=ArmSums)
    candidate: ArmSums = field(default_factory=ArmSums)
    pairs: AnswerPairs = field(default_factory=AnswerPairs)

    @property
    def requests(self) -> float:
        """Requests of users, to either variant."""
        return sum(arm.requests - arm.shadows for arm in (self.base, self.candidate))

    def merged(self, other: LiveEvidence) -> LiveEvidence:
        """That of both together."""
        return LiveEvidence(
            self.base.merged(other.base), self.candidate.merged(other.candidate), self.pairs.merged(other.pairs)
        )

    def scaled(self, factor: float) -> LiveEvidence:
        """That of `factor` times as much traffic, if it goes on alike; of the pairs only the counts of rows."""
        return LiveEvidence(self.base.scaled(factor), self.candidate.scaled(factor), self.pairs.scaled(factor))

    def to_json(self) -> Json:
        """As plain values."""
        return {name: getattr(self, name).to_json() for name in ("base", "candidate", "pairs")}

    @classmethod
    def from_json(cls, stored: Mapping[str, Json]) -> Self:
        """Of what `to_json` made."""
        base, candidate = (ArmSums.from_json(stored[name]) for name in ("base", "candidate"))
        return cls(base, candidate, AnswerPairs.from_json(stored["pairs"]))
