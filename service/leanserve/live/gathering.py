"""The evidence of an experiment that runs, gathered from batches and requests as they come."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from leanserve.config.experiment_section import MIB, ExperimentConfig
from leanserve.experiments.answer_pairs import AgreementRule
from leanserve.experiments.disagreements import DisagreementRing
from leanserve.live.comparing import Comparison
from leanserve.live.evidence_feed import ArmFeed
from leanserve.live.keeping import Keeper
from leanserve.live.looking import LookedAt
from leanserve.live.record import ExperimentRecord
from leanserve.live.shadows import AnsweredAgain, ShadowLimits, Shadows
from leanserve.serving.batch_runner import CompletedBatch
from leanserve.serving.fleet import Fleet

logger = logging.getLogger(__name__)

TOGETHER = 32
"""Batches that are compared at a time; fewer once a look is due."""


class Gathering:
    """What one record's variants are observed for, from now on. On the event loop only.

    `shadows` is `None` where nothing is answered again; then users' batches are timed.
    """

    def __init__(self, fleet: Fleet, record: ExperimentRecord, config: ExperimentConfig, keeper: Keeper) -> None:
        self.shadows: Shadows | None = None
        self._fleet = fleet
        self._record = record
        self._keeper = keeper
        self._lanes = len(fleet.device.lanes)
        self._answered: list[AnsweredAgain] = []
        self._comparing = self._told_of_failure = False
        kept = config.payload_mb * MIB if config.keep_payloads else 0
        self._comparison = Comparison(
            fleet.opened[record.arms.base].spec,
            AgreementRule(config.min_cosine, config.min_places, config.max_error),
            DisagreementRing(payload_bytes=kept),
            keep_payloads=config.keep_payloads,
        )
        self._comparison.pairs, self._comparison.repeated = record.pairs, record.repeated
        self.disagreements = self._comparison.disagreements
        if record.shadow_share:
            limits = ShadowLimits(record.shadow_share, record.shadow_time, config.shadow_rows, config.shadow_mb * MIB)
            self.shadows = Shadows(fleet, (record.arms.base, record.arms.candidate), limits, self._ran_again)
        self._count_requests()

    def observe(self) -> None:
        """Hear of the batches of those variants that it is about; after every change of the fleet."""
        for name, variant in self._fleet.opened.items():
            variant.observer = self._observer(name)

    def close(self) -> None:
        """Hear of nothing any more."""
        for variant in self._fleet.opened.values():
            variant.observer = None
        if self.shadows is not None:
            self.shadows.close()

    def catch_up(self) -> None:
        """Have the record hold what is known by now, and begin to compare what waits for that."""
        self._compare()
        self._count_requests()
        self._record.pairs, self._record.repeated = self._comparison.pairs, self._comparison.repeated

    def to_look_at(self, *, foresee: bool) -> LookedAt:
        """All of it, for another thread."""
        record = self._record
        one, other = record.feed.halves
        halves = one.sums(), other.sums()
        return LookedAt(record.ramp, record.feed.evidence(record.pairs), halves, record.repeated, record.rules, foresee)

    def _observer(self, name: str) -> Callable[[Sequence[CompletedBatch]], None] | None:
        record = self._record
        if self.shadows is not None:
            return self.shadows.offer if name == record.arms.base else None
        arms = {record.arms.base: record.feed.base, record.arms.candidate: record.feed.candidate}
        return partial(self._saw, arms[name]) if name in arms else None

    def _saw(self, arm: ArmFeed, batches: Sequence[CompletedBatch]) -> None:
        self._record.feed.saw(arm, batches, self._lanes)

    def _ran_again(self, answered: AnsweredAgain) -> None:
        """Both variants have run a batch in idle time."""
        error, record = answered.candidate.error, self._record
        if error is not None and not self._told_of_failure:
            self._told_of_failure = True
            text = "experiment %s: '%s' fails on requests that it answers again; the first time: %s"
            logger.warning(text, record.name, record.arms.candidate, error, exc_info=error)
        record.feed.reran(answered.base, answered.candidate, self._lanes)
        self._answered.append(answered)
        if len(self._answered) >= TOGETHER:
            self._compare()

    def _compare(self) -> None:
        if self._answered and not self._comparing:
            self._comparing = True
            answered, self._answered = self._answered[:TOGETHER], self._answered[TOGETHER:]
            self._keeper.begin(self._compared(answered))

    async def _compared(self, answered: list[AnsweredAgain]) -> None:
        try:
            await self._keeper.apart(partial(self._comparison.add, answered))
        except Exception:
            logger.exception("answers of an experiment could not be compared")
        self._comparing = False
        if len(self._answered) >= TOGETHER:
            self._compare()

    def _count_requests(self) -> None:
        """Those of users that ended since it was done last."""
        record = self._record
        for arm, name in ((record.feed.base, record.arms.base), (record.feed.candidate, record.arms.candidate)):
            if (metrics := self._fleet.metrics.variants.get(name)) is not None:
                arm.look(metrics)
