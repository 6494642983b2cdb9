"""The one who runs experiments: starts them, looks at their evidence, moves the traffic, keeps what was done.

All methods belong to the event loop's thread; judging, comparing and SQLite have a thread of their own. A step of the
traffic is taken at once and kept a moment later, so that a slow disk delays no rollback; what an admin asks for is
kept first. After a restart it goes on where it was, if both variants are still the same models.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from contextvars import Context
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from leanserve.config.experiment_section import ExperimentConfig
from leanserve.config.traffic_section import TrafficConfig, traffic_fault
from leanserve.contracts import Json
from leanserve.errors import BadInput, Conflict, NotReady
from leanserve.experiments.ramp import RampPolicy, RampState, Rules, aborted, promoted
from leanserve.experiments.verdict import Limits
from leanserve.live.asked import EndWish, StartWish, TrafficWish
from leanserve.live.exporting import write_metrics
from leanserve.live.fitness import why_over, why_unfit
from leanserve.live.gathering import Gathering
from leanserve.live.keeping import Keeper
from leanserve.live.looking import Look, look
from leanserve.live.record import Arms, ExperimentRecord, ExperimentState
from leanserve.live.shadows import Shadows
from leanserve.serving.fleet import Fleet
from leanserve.serving.traffic import TrafficRules

logger = logging.getLogger(__name__)

HEADER = b"x-experiment"
ITSELF = "leanserve"
"""Who moves an experiment when nobody asks."""
LOOK_S, REST = 1.0, 200
"""How often the evidence is looked at; and how many times as long as a look takes passes between two, at least."""
FORESEE_S, KEEP_S = 30.0, 5.0
"""How often it is foreseen when a decision falls, and how often grown evidence is kept."""
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
        self.last: Look | None = None
        self.looked_at = 0.0
        self.foreseen: float | None = None
        self._write = write
        self._loop = asyncio.get_running_loop()
        self._keeper = Keeper(store)
        self._gathering: Gathering | None = None
        self._foreseen_at = 0.0
        self._changing = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._configured = dict(fleet.split.rules.weights)
        if (record := self._keeper.last()) is not None:
            self._adopt(record)
            self._follow_fleet()
            self._follow_config()
        fleet.on_change(self._follow_fleet)
        self._tell()

    @property
    def running(self) -> ExperimentRecord | None:
        """The experiment that runs, if one does."""
        return self.record if self.record is not None and self.record.state == "running" else None

    @property
    def shadows(self) -> Shadows | None:
        """What is answered again for the last experiment since the process started."""
        return None if self._gathering is None else self._gathering.shadows

    @property
    def default_base(self) -> str:
        """Who has the traffic where nothing is split: who was promoted last, else the first variant."""
        weights = self.record.weights if self.record is not None and self.running is None else None
        return next(iter(weights)) if weights else self.fleet.split.base

    def unfit(self) -> dict[str, str]:
        """Variants that cannot be candidates now, and why."""
        reasons = {name: why_unfit(self.fleet, name, self.default_base) for name in self.fleet.plans}
        return {name: reason for name, reason in reasons.items() if reason}

    def disagreements(self) -> list[Json]:
        """Of the last experiment since the process started, the newest first."""
        return [] if self._gathering is None else self._gathering.disagreements()

    async def direct(self, wish: TrafficWish) -> None:
        """Share traffic out by other weights or caps.

        Raises:
            Conflict: an experiment runs, or the file cannot be written. BadInput: they name no variant.
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
                self._configured = dict(weights)
            if wish.weights is not None and self.record is not None and self.record.holds:
                self.record.holds = False
                await self._keeper.keep(self.record)
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
            if reason := why_unfit(self.fleet, wish.candidate, base):
                raise BadInput(f"'{wish.candidate}' cannot be compared with '{base}': it {reason}")
            record = self._made(wish, base, time.time())
            entry = record.move(record.ramp, "running", who, record.ramp.started_at, "start")
            await self._keeper.save(record, entry, None)
            self._adopt(record)
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
            self._keeper.begin(self._keeper.keep(record))
            self._apply()

    async def close(self) -> None:
        """Keep what there is; an experiment that runs goes on with the next process."""
        if self._timer is not None:
            self._timer.cancel()
        if self._gathering is not None:
            self._gathering.close()
        async with self._changing:
            if self.record is not None:
                if self.running is not None and self._gathering is not None:
                    self._gathering.catch_up()
                await self._keeper.keep(self.record)
            await self._keeper.close()

    def _made(self, wish: StartWish, base: str, now: float) -> ExperimentRecord:
        given = {key: getattr(wish, key) for key in ("stages", "min_stage_s", "on_inconclusive")}
        try:
            policy = RampPolicy(**self.config.ramp.model_dump() | {k: v for k, v in given.items() if v is not None})
            limits = Limits(**self.config.limits.model_dump() | wish.limits)
        except (ValidationError, TypeError) as error:
            raise BadInput(f"limits or stages: {_what_is_wrong(error)}") from None
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

    def _adopt(self, record: ExperimentRecord) -> None:
        """Make it the experiment of the fleet; one that runs is observed, if its variants are there."""
        self.record, self._gathering = record, None
        self.last, self.foreseen, self._foreseen_at = None, None, 0.0
        if self.running is not None and not why_over(self.fleet, record.arms):
            self._gathering = Gathering(self.fleet, record, self.config, self._keeper)
            self._look_soon()
        self._apply()

    def _apply(self) -> None:
        """Do to the fleet what the experiment asks for, in one step."""
        record = self.record
        self.fleet.override(record.weights if record else None, record.name if record else "")
        running = self.running
        self.headers = ((HEADER, running.name.encode()),) if running else ()
        if running and self._gathering is not None:
            self._gathering.observe()
        self._tell()

    def _look_soon(self, after_s: float = LOOK_S) -> None:
        if self._timer is not None:
            self._timer.cancel()
        # In a context of its own: what it logs is about no request, least of all the one that started it.
        self._timer = self._loop.call_later(after_s, lambda: self._keeper.begin(self._look()), context=Context())

    async def _look(self) -> None:
        """Look at the evidence, and go where it leads."""
        self._timer = None
        record, gathering = self.running, self._gathering
        if record is None or gathering is None:
            return
        gathering.catch_up()
        now = time.monotonic()
        foresee = now - self._foreseen_at >= FORESEE_S or not self._foreseen_at
        at = gathering.to_look_at(foresee=foresee)
        found = None
        try:
            with self.fleet.switches:
                found = await self._keeper.apart(partial(look, at))
        except Exception:
            logger.exception("the evidence of experiment %s could not be judged", record.name)
        if found is not None and self.running is record and record.ramp is at.state:
            self._looked(record, found, now if foresee else None)
        if self.running is not None:
            self._look_soon(max(LOOK_S, REST * found.seconds if found and not foresee else LOOK_S))

    def _looked(self, record: ExperimentRecord, found: Look, foreseen_at: float | None) -> None:
        self.last, self.looked_at = found, time.time()
        if foreseen_at is not None:
            self.foreseen, self._foreseen_at = found.foreseen, foreseen_at
        record.remember(self.looked_at, found.judgement.requests, found.judgement.findings)
        if found.state.status != record.ramp.status or found.state.stage != record.ramp.stage:
            before = record.history[-1]
            entry = record.move(found.state, _state_of(found), ITSELF, self.looked_at)
            self._ended_or_stepped(entry)
            self._keeper.begin(self._keeper.save_late(record, entry, before))
        else:
            record.ramp = found.state
            if time.monotonic() - self._keeper.kept_at >= KEEP_S:
                self._keeper.begin(self._keeper.keep(record))
        self._tell()

    def _ended_or_stepped(self, entry: Json) -> None:
        """After a move: the traffic goes as it says, and what is over is let go of."""
        if self.record is not None:
            self.record.configured = dict(self._configured)
        if self.running is None and self._gathering is not None:
            self._gathering.close()
        self._apply()
        self._moved(entry)

    async def _end(self, record: ExperimentRecord, ramp: RampState, state: ExperimentState, who: str) -> None:
        before = record.history[-1]
        entry = record.move(ramp, state, who, ramp.moved_at)
        self._ended_or_stepped(entry)
        await self._keeper.save(record, entry, before)

    def _moved(self, entry: Json) -> None:
        record, action = self.record, entry["action"]
        assert record is not None
        moves = self.fleet.metrics.experiment.moves
        moves[action] = moves.get(action, 0) + 1
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
        if record.state == "running" and (reason := why_over(self.fleet, record.arms)):
            before, now = record.history[-1], time.time()
            entry = record.move(aborted(record.ramp, now, reason), "aborted", ITSELF, now)
            self._ended_or_stepped(entry)
            self._keeper.begin(self._keeper.save_late(record, entry, before))
        elif record.state == "promoted" and record.holds and record.arms.candidate not in self.fleet.plans:
            logger.warning(
                "'%s', which was promoted, is no variant any more: the traffic is the base's", record.arms.candidate
            )
            record.holds = False
            self._apply()
        elif self._gathering is not None and record.state == "running":
            self._gathering.observe()
        self._tell()

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
        metrics = self.fleet.metrics.experiment
        metrics.capped = self.fleet.split.capped
        if self.record is not None:
            write_metrics(metrics, self.record, self.shadows, self.last)

    async def _written(self, weights: Mapping[str, float], caps: Mapping[str, float]) -> None:
        try:
            await self._keeper.apart(partial(self._write, weights, caps))
        except (OSError, ValueError) as error:
            raise Conflict(f"the config file cannot be written, and nothing has changed: {error}") from error


def _what_is_wrong(error: ValidationError | TypeError) -> str:
    if isinstance(error, TypeError):
        return str(error)
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())


def _state_of(found: Look) -> ExperimentState:
    match found.state.status:
        case "ramping":
            return "running"
        case "rolled_back":
            return "inconclusive" if found.judgement.state == "inconclusive" else "rejected"
        case ended:
            return ended
