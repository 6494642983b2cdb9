"""What comes of reruns and of users' requests, added up for a verdict. On the event loop only."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

from leanserve.contracts import Json
from leanserve.errors import BackendFailed, OutOfMemory, ServiceError, WorkerLost
from leanserve.experiments.answer_pairs import AnswerPairs
from leanserve.experiments.cost import CostSums
from leanserve.experiments.evidence import ArmSums, LiveEvidence
from leanserve.experiments.latency_histogram import LatencyHistogram
from leanserve.live.rerun import Rerun
from leanserve.serving.batch_runner import CompletedBatch
from leanserve.telemetry.observations import VariantMetrics

BLAMED: Final = (ServiceError.code, BackendFailed.code, OutOfMemory.code, WorkerLost.code)
"""Outcomes of requests that a variant is to blame for. Waiting too long is not among them: variants share a device."""


@dataclass(slots=True)
class ArmFeed:
    """One variant: users' requests are read from its metrics, which count them anyway."""

    requests: float = 0
    failures: float = 0
    shadows: float = 0
    shadow_failures: float = 0
    """Of the failures, those of shadows; since the process started."""
    service_s: LatencyHistogram = field(default_factory=LatencyHistogram)
    cost: CostSums = field(default_factory=CostSums)
    _seen: tuple[int, int] | None = None

    def look(self, metrics: VariantMetrics) -> None:
        """Add the requests that ended since the last look."""
        failures = sum(metrics.requests[code].count for code in BLAMED)
        now = metrics.requests["ok"].count + failures, failures
        before = self._seen
        if before is not None and now[0] >= before[0] and now[1] >= before[1]:
            self.requests += now[0] - before[0]
            self.failures += now[1] - before[1]
        self._seen = now

    def time(self, rows: int, seconds: float, lanes: float) -> None:
        """Add a batch that took so long on a lane, one of so many."""
        self.service_s.add(seconds)
        self.cost = self.cost.merged(CostSums.of_batch(rows, seconds / lanes))

    def sums(self) -> ArmSums:
        """All of it, for another thread."""
        service_s = LatencyHistogram(self.service_s.counts.copy())
        return ArmSums(self.requests, self.failures, service_s, self.cost, self.shadows)

    @classmethod
    def of(cls, sums: ArmSums) -> Self:
        """Go on from there."""
        return cls(sums.requests, sums.failures, sums.shadows, service_s=sums.service_s, cost=sums.cost)


@dataclass(slots=True)
class EvidenceFeed:
    """Base, candidate, and the base's batches halved at random, for the self-check."""

    base: ArmFeed = field(default_factory=ArmFeed)
    candidate: ArmFeed = field(default_factory=ArmFeed)
    halves: tuple[ArmFeed, ArmFeed] = field(default_factory=lambda: (ArmFeed(), ArmFeed()))

    def reran(self, base: Rerun, candidate: Rerun, lanes: int) -> None:
        """Add a batch that both variants ran in idle time; its times only where both have them."""
        failed, tried = sum(answer is None for answer in candidate.answers), len(candidate.answers)
        self.candidate.requests += tried
        self.candidate.shadows += tried
        self.candidate.failures += failed
        self.candidate.shadow_failures += failed
        half = random.choice(self.halves)
        half.requests += tried
        half.failures += sum(answer is None for answer in base.answers)
        if base.seconds and candidate.seconds:
            for arm in (self.base, half):
                arm.time(base.rows, base.seconds, lanes)
            self.candidate.time(candidate.rows, candidate.seconds, lanes)

    def saw(self, arm: ArmFeed, batches: Sequence[CompletedBatch], lanes: int) -> None:
        """Add batches of users' requests, where nothing is answered again."""
        for batch in batches:
            if batch.timed is not None:
                fed = [arm, random.choice(self.halves)] if arm is self.base else [arm]
                for each in fed:
                    each.time(batch.rows, batch.infer_s, lanes / batch.timed.lanes)

    def evidence(self, pairs: AnswerPairs) -> LiveEvidence:
        """All of it, with what was compared, for another thread."""
        return LiveEvidence(self.base.sums(), self.candidate.sums(), pairs)

    def to_json(self) -> Json:
        """As plain values."""
        arms = {"base": self.base, "candidate": self.candidate, "one": self.halves[0], "other": self.halves[1]}
        return {name: arm.sums().to_json() for name, arm in arms.items()}

    @classmethod
    def from_json(cls, stored: Mapping[str, Json]) -> Self:
        """Of what `to_json` made."""
        base, candidate, one, other = (
            ArmFeed.of(ArmSums.from_json(stored[name])) for name in ("base", "candidate", "one", "other")
        )
        return cls(base, candidate, (one, other))
