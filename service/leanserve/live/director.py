"""The one who runs experiments: starts them, looks at their evidence, moves the traffic, keeps what was done.

All methods belong to the event loop's thread; judging, comparing and SQLite have a thread of their own. A step of the
traffic is taken at once and kept a moment later, so that a slow disk delays no rollback; what an admin asks for is
kept first. After a restart it goes on where it was, if both variants are still the same models.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from leanserve.config.experiment_section import MIB, ExperimentConfig
from leanserve.config.traffic_section import TrafficConfig, traffic_fault
from leanserve.contracts import Json
from leanserve.errors import BadInput, Conflict, NotReady, ServiceError
from leanserve.experiments.answer_pairs import AgreementRule
from leanserve.experiments.disagreements import DisagreementRing
from leanserve.experiments.ramp import RampPolicy, RampState, Rules, aborted, promoted
from leanserve.experiments.store import AuditEntry, ExperimentStore
from leanserve.experiments.verdict import Limits
from leanserve.live.asked import EndWish, StartWish, TrafficWish
from leanserve.live.comparing import Comparison
from leanserve.live.looking import Look, LookedAt, look
from leanserve.live.plain import plain
from leanserve.live.record import Arms, ExperimentRecord, ExperimentState
from leanserve.live.shadows import AnsweredAgain, ShadowLimits, Shadows
from leanserve.serving.batch_runner import CompletedBatch
from leanserve.serving.fleet import Fleet
from leanserve.serving.traffic import TrafficRules

logger = logging.getLogger(__name__)

HEADER = b"x-experiment"
ITSELF = "leanserve"
"""Who moves an experiment when nobody asks."""
LOOK_S, REST = 1.0, 100
"""How often the evidence is looked at; and how many times as long as a look takes passes between two, at least."""
FORESEE_S, KEEP_S = 10.0, 5.0
"""How often it is foreseen when a decision falls, and how often grown evidence is kept."""
TOGETHER = 32
"""Batches that are compared at a time; fewer once a look is due."""
_MEMORY = Path(":memory:")
_Result = TypeVar("_Result")
WriteTraffic = Callable[[Mapping[str, float], Mapping[str, float]], None]
"""Writes weights and caps into the config file."""


class Director:
    """Of one fleet. `headers` are those that every prediction gets while an experiment runs."""

    def __init__(self, fleet: Fleet, config: ExperimentConfig, store: Path | None, write: WriteTraffic) -> None:
        """On the running loop. `store` is the SQLite file; `None`: the state is lost with the process.

        Raises:
            StartupError: the file is no store of experiments, or cannot be written.
        """
        self.fleet = fleet
        self.config = config
        self.record: ExperimentRecord | None = None
        self.headers: tuple[tuple[bytes, bytes], ...] = ()
        self.shadows: Shadows | None = None
        self.last: Look | None = None
        self.looked_at = 0.0
        self.foreseen: float | None = None
        self._write = write
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="experiment")
        self._store, stored = self._thread.submit(_opened, store or _MEMORY).result()
        self._comparison: Comparison | None = None
        self._answered: list[AnsweredAgain] = []
        self._comparing = False
        self._foreseen_at = self._kept_at = 0.0
        self._changing = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._told_of_failure = False
        self._configured = dict(fleet.split.rules.weights)
        self.metrics = fleet.metrics.experiment
        if stored is not None:
            self._go_on(ExperimentRecord.from_json(stored))
        fleet.on_change(self._follow_fleet)
        self._tell()

    @property
    def running(self) -> ExperimentRecord | None:
        """The experiment that runs, if one does."""
        return self.record if self.record is not None and self.record.state == "running" else None

    @property
    def default_base(self) -> str:
        """Who has the traffic where nothing is split: who was promoted last, else the first variant."""
        weights = self.record.weights if self.record is not None and self.running is None else None
        return next(iter(weights)) if weights else self.fleet.split.base

    def unfit(self) -> dict[str, str]:
        """Variants that cannot be candidates now, and why."""
        base, reasons = self.default_base, {}
        for name in self.fleet.plans:
            if name == base:
                reasons[name] = "is the base"
            elif reason := self._unfit(name, base):
                reasons[name] = reason
        return reasons

    def disagreements(self) -> list[Json]:
        """Of the last experiment since the process started, the newest first."""
        return [] if self._comparison is None else self._comparison.disagreements()

    async def direct(self, wish: TrafficWish) -> None:
        """Share traffic out by other weights or caps.

        Raises:
            Conflict: an experiment runs. BadInput: they name no variant. ServiceError: the file cannot be written.
        """
        async with self._changing:
            self._refuse_running("the traffic is its to share out")
            rules = self.fleet.split.rules
            weights = rules.weights if wish.weights is None else wish.weights
            caps = rules.caps if wish.caps is None else wish.caps
            if fault := traffic_fault(TrafficConfig(weights=dict(weights), caps=dict(caps)), list(self.fleet.plans)):
                raise BadInput(fault)
            if wish.write:
                await self._written(weights, caps)
            if wish.write:
                self._configured = dict(weights)
            if wish.weights is not None and self.record is not None and self.record.holds:
                self.record.holds = False
                await self._keep()
            self.fleet.direct(TrafficRules(weights, caps))
            self._apply()

    async def start(self, wish: StartWish, who: str) -> None:
        """Begin to compare a candidate with the base.

        Raises:
            Conflict: another experiment runs. BadInput: the candidate or the rules are not as they must be.
            NotReady: the service is draining.
        """
        async with self._changing:
            self._refuse_running("abort or promote it first")
            if self.fleet.draining:
                raise NotReady("draining: no experiment is started")
            base = wish.base or self.default_base
            for name in (base, wish.candidate):
                if name not in self.fleet.plans:
                    raise BadInput(f"no variant '{name}'; there are {', '.join(self.fleet.plans)}")
            if reason := self._unfit(wish.candidate, base):
                raise BadInput(f"'{wish.candidate}' cannot be compared with '{base}': it {reason}")
            record = self._made(wish, base, time.time())
            entry = record.move(record.ramp, "running", who, record.ramp.started_at, "start")
            await self._save(record, entry, None)
            self._adopt(record, Comparison(*self._comparing_by(base), keep_payloads=self.config.keep_payloads))
            self._moved(entry)

    async def promote(self, wish: EndWish, who: str) -> None:
        """Give the candidate all traffic, whatever the evidence says. Raises `Conflict` if no experiment runs."""
        async with self._changing:
            record = self._needed()
            if wish.write:
                weights = {record.arms.candidate: 1.0}
                await self._written(weights, self.fleet.split.rules.caps)
                self._configured = weights
            ramp = promoted(record.ramp, time.time(), wish.reason or "promoted by hand")
            await self._end(record, ramp, "promoted", who)

    async def abort(self, wish: EndWish, who: str) -> None:
        """Give the candidate no traffic any more. Raises `Conflict` if no experiment runs."""
        async with self._changing:
            record = self._needed()
            await self._end(record, aborted(record.ramp, time.time(), wish.reason or "aborted by hand"), "aborted", who)

    def reconfigure(self, config: ExperimentConfig) -> None:
        """Experiments start with what this config says from now on, and the fleet has what it says of traffic."""
        self.config = config
        self._configured = dict(self.fleet.split.rules.weights)
        self._follow_config()

    def _follow_config(self) -> None:
        """A promotion holds until the config shares the traffic out otherwise."""
        record = self.record
        if record is not None and record.state != "running" and record.holds and record.configured != self._configured:
            logger.warning("traffic goes by the config again, and no longer by the experiment %s", record.name)
            record.holds = False
            self._keep_task(self._keep())
            self._apply()

    async def close(self) -> None:
        """Keep what there is; an experiment that runs goes on with the next process."""
        if self._timer is not None:
            self._timer.cancel()
        if self.shadows is not None:
            self.shadows.close()
        async with self._changing:
            if self.record is not None:
                if self.running is not None and self._comparison is not None:
                    self.record.pairs, self.record.repeated = self._comparison.pairs, self._comparison.repeated
                await self._keep()
            await self._apart(self._store.close)
        self._thread.shutdown(wait=False)

    def _unfit(self, name: str, base: str) -> str:
        """Why a variant cannot be compared with a base, in words that follow its name; empty if it can."""
        ours, theirs = self.fleet.variants.get(name), self.fleet.variants.get(base)
        if name == base:
            return "is the base"
        if ours is None or theirs is None:
            away = name if ours is None else base
            state, reason = self.fleet.status_of[away]
            return f"is {state}{f': {reason}' if reason else ''}" if ours is None else f"has a base that is {state}"
        if ours.spec != theirs.spec:
            return "takes or gives other tensors than the base"
        if any(field.next_from for field in ours.spec.inputs):
            return "keeps a state between requests, which answering again would change"
        return ""

    def _made(self, wish: StartWish, base: str, now: float) -> ExperimentRecord:
        given = {key: getattr(wish, key) for key in ("stages", "min_stage_s", "on_inconclusive")}
        try:
            policy = RampPolicy(**self.config.ramp.model_dump() | {k: v for k, v in given.items() if v is not None})
            limits = Limits(**self.config.limits.model_dump() | wish.limits)
        except (ValidationError, TypeError) as error:
            told = "; ".join(item["msg"] for item in error.errors()) if isinstance(error, ValidationError) else error
            raise BadInput(f"limits or stages: {told}") from None
        share = self.config.shadow_share if wish.shadow_share is None else wish.shadow_share
        if not share and len(policy.stages) == 1:
            raise BadInput("shadow_share 0 and a single stage: the candidate would answer nothing; give it one of both")
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(now))
        contents = self.fleet.plans[base].content, self.fleet.plans[wish.candidate].content
        back_to = base if base != self.fleet.split.base and base == self.default_base else ""
        return ExperimentRecord(
            wish.name or f"{wish.candidate}-{stamp}"[:63],
            Arms(base, wish.candidate, contents),
            Rules(limits, policy),
            share,
            wish.shadow_time or self.config.shadow_time,
            RampState.start(policy, now),
            back_to,
        )

    def _comparing_by(self, base: str) -> tuple[Any, AgreementRule, DisagreementRing]:
        rule = AgreementRule(self.config.min_cosine, self.config.max_error)
        kept = self.config.payload_mb * MIB if self.config.keep_payloads else 0
        return self.fleet.opened[base].spec, rule, DisagreementRing(payload_bytes=kept)

    def _go_on(self, record: ExperimentRecord) -> None:
        """After a restart."""
        comparison = None
        if record.state == "running" and not self._changed(record):
            comparison = Comparison(*self._comparing_by(record.arms.base), keep_payloads=self.config.keep_payloads)
            comparison.pairs, comparison.repeated = record.pairs, record.repeated
        self._adopt(record, comparison)
        self._follow_fleet()
        self._follow_config()

    def _adopt(self, record: ExperimentRecord, comparison: Comparison | None) -> None:
        """Make it the experiment of the fleet."""
        self.record, self._comparison = record, comparison
        self.last, self.foreseen, self._foreseen_at, self._answered = None, None, 0.0, []
        self._told_of_failure = False
        if comparison is not None:
            limits = ShadowLimits(
                record.shadow_share, record.shadow_time, self.config.shadow_rows, self.config.shadow_mb * MIB
            )
            arms = record.arms.base, record.arms.candidate
            self.shadows = Shadows(self.fleet, arms, limits, self._ran_again) if record.shadow_share else None
            self._count_requests(record)
            self._look_soon()
        self._apply()

    def _apply(self) -> None:
        """Do to the fleet what the experiment asks for, in one step."""
        record = self.record
        self.fleet.override(record.weights if record else None, record.name if record else "")
        running = self.running
        self.headers = ((HEADER, running.name.encode()),) if running else ()
        for name, variant in self.fleet.opened.items():
            variant.observer = self._observer(name) if running else None
        self._tell()

    def _observer(self, name: str) -> Callable[[Any], None] | None:
        record = self.record
        assert record is not None
        if self.shadows is not None:
            return self.shadows.offer if name == record.arms.base else None
        arms = {record.arms.base: record.feed.base, record.arms.candidate: record.feed.candidate}
        return partial(self._saw, record, arms[name]) if name in arms else None

    def _saw(self, record: ExperimentRecord, arm: Any, batches: list[CompletedBatch]) -> None:
        record.feed.saw(arm, batches, len(self.fleet.device.lanes))

    def _ran_again(self, answered: AnsweredAgain) -> None:
        """Both variants have run a batch in idle time."""
        record = self.running
        if record is None:
            return
        error = answered.candidate.error
        if error is not None and not self._told_of_failure:
            self._told_of_failure = True
            text = "experiment %s: '%s' fails on requests that it answers again; the first time: %s"
            logger.warning(text, record.name, record.arms.candidate, error, exc_info=error)
        record.feed.reran(answered.base, answered.candidate, len(self.fleet.device.lanes))
        self._answered.append(answered)
        if len(self._answered) >= TOGETHER:
            self._compare()

    def _compare(self) -> None:
        if self._answered and not self._comparing and self._comparison is not None:
            self._comparing = True
            answered, self._answered = self._answered[:TOGETHER], self._answered[TOGETHER:]
            self._keep_task(self._compared(self._comparison, answered))

    async def _compared(self, comparison: Comparison, answered: list[AnsweredAgain]) -> None:
        try:
            await self._apart(partial(comparison.add, answered))
        except Exception:
            logger.exception("answers of an experiment could not be compared")
        self._comparing = False
        if len(self._answered) >= TOGETHER:
            self._compare()

    def _look_soon(self, after_s: float = LOOK_S) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(after_s, lambda: self._keep_task(self._look()))

    async def _look(self) -> None:
        """Look at the evidence, and go where it leads."""
        self._timer = None
        record, comparison = self.running, self._comparison
        if record is None or comparison is None:
            return
        self._compare()
        self._count_requests(record)
        record.pairs, record.repeated = comparison.pairs, comparison.repeated
        now = time.monotonic()
        foresee = now - self._foreseen_at >= FORESEE_S or not self._foreseen_at
        halves = record.feed.halves[0].sums(), record.feed.halves[1].sums()
        at = LookedAt(record.ramp, record.feed.evidence(record.pairs), halves, record.repeated, record.rules, foresee)
        found = None
        try:
            found = await self._apart(partial(look, at))
        except Exception:
            logger.exception("the evidence of experiment %s could not be judged", record.name)
        if found is not None and self.running is record and record.ramp is at.state:
            self._looked(record, found, now if foresee else None)
        if self.running is not None:
            self._look_soon(max(LOOK_S, REST * found.seconds if found and not foresee else LOOK_S))

    def _count_requests(self, record: ExperimentRecord) -> None:
        """Those of users that ended since it was done last."""
        for arm, name in ((record.feed.base, record.arms.base), (record.feed.candidate, record.arms.candidate)):
            if (metrics := self.fleet.metrics.variants.get(name)) is not None:
                arm.look(metrics)

    def _looked(self, record: ExperimentRecord, found: Look, foreseen_at: float | None) -> None:
        self.last, self.looked_at = found, time.time()
        if foreseen_at is not None:
            self.foreseen, self._foreseen_at = found.foreseen, foreseen_at
        record.remember(self.looked_at, found.judgement.requests, found.judgement.findings)
        if found.state.status != record.ramp.status or found.state.stage != record.ramp.stage:
            before = record.history[-1]
            entry = record.move(found.state, _state_of(found), ITSELF, self.looked_at)
            self._ended_or_stepped(entry)
            self._keep_task(self._save_late(record, entry, before))
        else:
            record.ramp = found.state
            if time.monotonic() - self._kept_at >= KEEP_S:
                self._keep_task(self._keep())
        self._tell()

    def _ended_or_stepped(self, entry: Json) -> None:
        """After a move: the traffic goes as it says, and what is over is let go of."""
        if self.record is not None:
            self.record.configured = dict(self._configured)
        if self.running is None and self.shadows is not None:
            self.shadows.close()
        self._apply()
        self._moved(entry)

    async def _end(self, record: ExperimentRecord, ramp: RampState, state: ExperimentState, who: str) -> None:
        before = record.history[-1]
        entry = record.move(ramp, state, who, ramp.moved_at)
        self._ended_or_stepped(entry)
        await self._save(record, entry, before)

    def _moved(self, entry: Json) -> None:
        record, action = self.record, entry["action"]
        assert record is not None
        self.metrics.moves[action] = self.metrics.moves.get(action, 0) + 1
        text = "experiment %s of '%s' beside '%s': %s by %s, %.4g %% of the traffic: %s"
        arms = record.arms
        share = 100 * entry["share"]
        logger.warning(text, record.name, arms.candidate, arms.base, action, entry["who"], share, entry["reason"])
        self._tell()

    def _follow_fleet(self) -> None:
        """Variants have come, gone or changed: an experiment of other models than it began with is over."""
        record = self.record
        if record is None:
            return
        if record.state == "running" and (reason := self._changed(record)):
            before, now = record.history[-1], time.time()
            entry = record.move(aborted(record.ramp, now, reason), "aborted", ITSELF, now)
            self._ended_or_stepped(entry)
            self._keep_task(self._save_late(record, entry, before))
        elif record.state == "promoted" and record.holds and record.arms.candidate not in self.fleet.plans:
            logger.warning(
                "'%s', which was promoted, is no variant any more: the traffic is the base's", record.arms.candidate
            )
            record.holds = False
            self._apply()
        elif self.running is not None:
            for name, variant in self.fleet.opened.items():
                variant.observer = self._observer(name)
        self._tell()

    def _changed(self, record: ExperimentRecord) -> str:
        """What of its variants is no longer as it was at the start."""
        for name, content in zip((record.arms.base, record.arms.candidate), record.arms.contents, strict=True):
            plan = self.fleet.plans.get(name)
            if plan is None or name not in self.fleet.opened:
                return f"the variant '{name}' is not there any more"
            if plan.content != content:
                return f"the variant '{name}' is another model now"
        return ""

    def _needed(self) -> ExperimentRecord:
        record = self.running
        if record is None:
            raise Conflict("no experiment runs; POST /v1/experiment/start begins one")
        return record

    def _refuse_running(self, why: str) -> None:
        if self.running is not None:
            raise Conflict(f"the experiment '{self.running.name}' runs: {why}")

    def _tell(self) -> None:
        """Write what Prometheus is told."""
        told, record = self.metrics, self.record
        told.capped = self.fleet.split.capped
        if record is None:
            return
        told.name, told.base, told.candidate = record.name, record.arms.base, record.arms.candidate
        told.state, told.share = record.state, record.ramp.share
        pairs = record.pairs
        told.pairs = {"agreed": pairs.agreed, "differed": pairs.rows - pairs.agreed, "broken": pairs.broken}
        if self.shadows is not None:
            told.shadows = dict(self.shadows.outcomes)
        if self.last is not None:
            told.questions = {
                item.question: {
                    "estimate": item.effect,
                    "low": item.interval.low,
                    "high": item.interval.high,
                    "limit": item.limit,
                }
                for item in self.last.judgement.findings
            }

    async def _written(self, weights: Mapping[str, float], caps: Mapping[str, float]) -> None:
        try:
            await self._apart(partial(self._write, weights, caps))
        except (OSError, ValueError) as error:
            raise ServiceError(f"the config file is not written, and nothing has changed: {error}") from error

    async def _save(self, record: ExperimentRecord, entry: Json, before: Json | None) -> None:
        """Keep a move. Raises `ServiceError` if it cannot be."""
        audit = AuditEntry(entry["at"], entry["who"], entry["action"], before or {}, entry)
        state = record.to_json()
        try:
            await self._apart(lambda: self._store.save(record.name, plain(state), audit))
        except Exception as error:
            raise ServiceError(f"the state of the experiment could not be kept: {error}") from error
        self._kept_at = time.monotonic()

    async def _save_late(self, record: ExperimentRecord, entry: Json, before: Json | None) -> None:
        try:
            await self._save(record, entry, before)
        except ServiceError as error:
            logger.error("%s", error)

    async def _keep(self) -> None:
        record = self.record
        assert record is not None
        self._kept_at = time.monotonic()
        try:
            state, at = record.to_json(), time.time()
            await self._apart(lambda: self._store.keep(record.name, plain(state), at))
        except Exception as error:
            logger.error("the state of experiment %s could not be kept: %s", record.name, error)

    def _apart(self, work: Callable[[], _Result]) -> Awaitable[_Result]:
        """On the thread beside the loop."""
        executor: Executor = self._thread
        return self._loop.run_in_executor(executor, work)

    def _keep_task(self, work: Any) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _opened(path: Path) -> tuple[ExperimentStore, Json | None]:
    store = ExperimentStore(path)
    return store, store.load(store.names[0]) if store.names else None


def _state_of(found: Look) -> ExperimentState:
    if found.state.status == "rolled_back":
        return "inconclusive" if found.judgement.state == "inconclusive" else "rejected"
    return {"ramping": "running", "promoted": "promoted", "aborted": "aborted"}[found.state.status]  # type: ignore[return-value]
