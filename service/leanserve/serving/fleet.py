"""All variants of one base at work: chosen per request, unloaded and loaded again, drained.

The fleet is what sessions and the API see. It knows neither the config file nor the artifact store; the composition
root plans and opens what it serves (`opening.py`). While it serves, variants can be unloaded and loaded again, and all
of it can be planned anew; what that takes is in `reload.py` and `replanning.py`, and here only who answers meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from leanserve.errors import BadInput, NotFound, NotReady, OutOfMemory, ServiceError
from leanserve.memory import is_out_of_memory
from leanserve.runtime.device import BatchOnLane, Device, Lane
from leanserve.runtime.isolation.workers import WorkerEvent
from leanserve.runtime.linux.denormals import flush_denormals
from leanserve.runtime.short_switches import ShortSwitches
from leanserve.serving.decoding import Decoders
from leanserve.serving.opening import VariantPlan, WarmFleet, WarmVariant
from leanserve.serving.reload import LoadingThreads, close_all, open_again
from leanserve.serving.replanning import FleetPlan, FleetSite, Serving, open_new
from leanserve.serving.sequences import Sequences
from leanserve.serving.traffic import TrafficRules, TrafficSplit
from leanserve.serving.variant import Variant
from leanserve.serving.watchdog import Watchdog, WatchdogLimits
from leanserve.telemetry.hardware_metrics import Sources
from leanserve.telemetry.metrics import Metrics
from leanserve.telemetry.nvml import initialised_nvml
from leanserve.telemetry.observations import VariantFacts, VariantState, WorkerCounts, no_workers

logger = logging.getLogger(__name__)

GRACE_S = 2.0
"""How long a variant that has no part in a new plan still answers requests that were chosen for it, but not yet read
or decoded."""


class VariantStatus(NamedTuple):
    """Whether a variant serves, and if not, why."""

    state: VariantState
    reason: str = ""


class Fleet:
    """The variants that serve, those that do not and why, and the traffic split among them."""

    def __init__(self, warm: WarmFleet, watched: WatchdogLimits | None = None) -> None:
        """Serve what was opened, on the running loop; all methods but `close` belong to its thread.

        With `watched` neither a batch that hangs nor a loop that does is waited for any longer.
        """
        flush_denormals()  # as on the lanes: the loop runs short batches itself
        self.name = warm.base.name
        self.plans: Mapping[str, VariantPlan] = warm.plans
        self.report = warm.report
        self.device = warm.device
        self.sticky_header = warm.traffic.sticky_header.lower().encode()
        self._base = warm.base
        self.draining = False
        sources = Sources(nvml=initialised_nvml(), cuda_visible=warm.cuda_visible)
        self.metrics = Metrics(
            self.name, sources, caveats=warm.base.caveats, ready=self.is_ready, threads=warm.device.threads
        )
        self.opened: dict[str, Variant] = {}
        """All that passed their gate, whether they serve now or not."""
        self._lanes_only = watched is not None and watched.on_stuck == "isolate"
        for name, plan in warm.plans.items():
            metrics = self.metrics.add(name, _facts(plan, warm.device, warm.variants.get(name)))
            if name in warm.variants:
                self.opened[name] = Variant(warm.variants[name], metrics, lanes_only=self._lanes_only)
        self.variants = dict(self.opened)
        """Those that serve now."""
        self.status_of = {name: VariantStatus(plan.facts.state, plan.facts.reason) for name, plan in warm.plans.items()}
        self.sequences = Sequences(warm.traffic.sequences)
        self._warm = dict(warm.variants)
        """As what those were opened; what they have now they know themselves."""
        self._retiring: list[Variant] = []
        """Those that have no part in the newest plan and still answer whom they were chosen for."""
        self.split = TrafficSplit(self.name)
        self.split.give(warm.traffic.rules)
        self.switches = ShortSwitches()
        """For whatever runs Python for long beside the loop."""
        self.decoders = Decoders(self.switches, warm.decode_memory)
        self.threads = LoadingThreads(self.switches)
        """What is read and loaded beside the lanes is done there."""
        self._turn = asyncio.Lock()
        self._swaps: set[asyncio.Task[None]] = set()
        self._listeners: list[Callable[[], None]] = []
        self._find_serving()
        for name in self.opened:
            self._listen_to(name)
        self._watchdog = Watchdog(self.device, watched, self.isolate) if watched else None

    def choose(self, name: str | None, caller_key: str | None) -> Variant:
        """Explicit name, then sticky key, then weights.

        Raises:
            NotFound: no such variant. NotReady: it was excluded by its gate, or is not loaded; or none is.
        """
        if name is None:
            name = self.split.choose(caller_key)
        variant = self.variants.get(name)
        if variant is None:
            raise self._absence(name)
        return variant

    def confirm(self, variant: Variant, name: str | None, caller_key: str | None) -> Variant:
        """The variant that was chosen before the loop turned to others; another choice if it was unloaded since."""
        if self.variants.get(variant.name) is variant or variant in self._retiring:
            return variant
        return self.choose(name, caller_key)

    @property
    def longest_wait_s(self) -> float:
        """Seconds that a request may wait whose variant is not known yet."""
        return max((variant.batcher.limits.timeout_s for variant in self.opened.values()), default=1.0)

    @property
    def weights(self) -> Mapping[str, float]:
        """The split among the variants that serve now."""
        return self.split.weights

    def direct(self, rules: TrafficRules) -> None:
        """Share requests that name no variant out by these rules, in one step."""
        self.split.give(rules)
        self.split.share_out(self.opened, self.variants)

    def override(self, weights: Mapping[str, float] | None, salt: str = "") -> None:
        """Share them out by these weights, whatever the rules say; `None`: by the rules again."""
        self.split.override(weights, salt)
        self.split.share_out(self.opened, self.variants)

    def on_change(self, listener: Callable[[], None]) -> None:
        """Have `listener` called on the loop whenever what `is_ready` says may have changed."""
        self._listeners.append(listener)

    def drain(self) -> None:
        """Be no longer ready; requests go on being answered. On the loop only."""
        self.draining = True
        self._tell()

    def _tell(self) -> None:
        for listener in self._listeners:
            listener()

    def is_ready(self) -> bool:
        """Whether requests are answered, and will be for a while."""
        return not self.draining and bool(self.variants)

    def is_live(self) -> bool:
        """Whether requests may be answered again without a new process: not if every variant has failed."""
        return not self.opened or any(self.status_of[name].state != "failed" for name in self.opened)

    def check_live(self) -> None:
        """Raise `NotReady` where only a new process can help."""
        if not self.is_live():
            raise NotReady("every variant has failed; the process has to be started again")

    def isolate(self, lane: Lane, batch: BatchOnLane) -> None:
        """Give up a lane and the variant whose batch hangs there, unless it has ended meanwhile; all others go on."""
        if lane.is_given_up or lane.batch is not batch:
            return
        name = batch.share.name
        self.metrics.variants[name].stuck_batches += 1
        self._enter(name, "failed", "a batch of it did not end")
        self.opened[name].fail(batch.formed, f"variant '{name}' has failed: a batch of it did not end")
        self.device.give_up(lane)  # last, or the new lane would run what waits

    def check_ready(self) -> None:
        """Raise `NotReady` while draining, and while no variant is loaded."""
        if self.draining:
            raise NotReady("draining: the service is shutting down")
        if not self.variants:
            raise self._absence("")

    async def load(self, name: str | None = None) -> None:
        """Serve an unloaded variant again (all by default); one that serves is left as it is.

        Raises:
            NotFound, NotReady: no such variant, it was excluded, or the service is draining.
            ServiceError: it cannot be loaded; it stays unloaded, with the reason.
        """
        await self._swap(self._load, name)

    async def unload(self, name: str | None = None) -> None:
        """Give a variant no more requests, let it finish those it has, and give its memory back.

        Its traffic goes to the others, so the last one is not unloaded by its name. Without a name all are, and until
        one is loaded nothing is answered.

        Raises:
            NotFound, NotReady: no such variant, it was excluded, or the service is draining.
            BadInput: no other variant serves.
        """
        await self._swap(partial(self._unload, last_too=name is None), name)

    async def replan(self, planned: FleetPlan, adopt: Callable[[], None]) -> None:
        """Serve what is planned, once all of it is open and warm: then, in one step, with whatever `adopt` does.

        What has no part in it any more answers those for whom it was chosen, and is closed.

        Raises:
            NotReady: the service is draining. Exception: something cannot be opened. Nothing has changed then.
        """
        async with self._turn:
            there = {
                name: Serving(self.plans[name], self._warm[name]._replace(running=variant.running))
                for name, variant in self.opened.items()
            }
            opened = await open_new(FleetSite(self._base, self.device, self.threads, there), planned)
            if self.draining:
                self.check_ready()
            retiring = [
                variant
                for name, variant in self.opened.items()
                if self._is_loaded(name) and (name in opened or name not in planned.sources)
            ]
            self._adopt(planned, opened)
            adopt()
        self._retiring += retiring
        for variant in retiring:
            self._keep(self._retire(variant))

    def _adopt(self, planned: FleetPlan, opened: Mapping[str, WarmVariant]) -> None:
        before, states = self.opened, self.status_of
        for name in before.keys() - {plan.name for plan in planned.plans}:
            if not self._is_loaded(name):
                self.metrics.remove(name)  # the others', when they are closed
        self.plans = {plan.name: plan for plan in planned.plans}
        self.report = planned.report
        self.sticky_header = planned.traffic.sticky_header.lower().encode()
        self._warm = {name: opened.get(name) or self._warm[name] for name in self.plans if name in planned.sources}
        self.opened, self.status_of = {}, {}
        for name, plan in self.plans.items():
            facts = _facts(plan, self.device, self._warm.get(name))
            metrics = self.metrics.variants.get(name) or self.metrics.add(name, facts)
            self.status_of[name] = VariantStatus(plan.facts.state, plan.facts.reason)
            if name in opened:
                self.opened[name] = Variant(opened[name], metrics, lanes_only=self._lanes_only)
            elif name in planned.sources:
                self.opened[name], self.status_of[name] = before[name], states[name]
            metrics.facts = replace(facts, state=self.status_of[name].state, reason=self.status_of[name].reason)
        self.split.give(planned.traffic.rules)
        for name in opened:
            self._listen_to(name)
        self._find_serving()

    async def _retire(self, variant: Variant) -> None:
        """Close a variant once nobody is on the way to it any more."""
        await asyncio.sleep(GRACE_S)
        self._retiring.remove(variant)
        self.sequences.forget(variant)
        await variant.finish()
        successor = self.opened.get(variant.name)
        shared = {id(backend) for backend in successor.running.opened} if successor else set()
        await close_all(self.threads, [item for item in variant.running.opened if id(item) not in shared])
        if variant.name not in self.plans:
            self.metrics.remove(variant.name)

    def _keep(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Do it to its end, whoever waits for it."""
        task = asyncio.create_task(work)
        self._swaps.add(task)
        task.add_done_callback(self._swaps.discard)
        return task

    async def _swap(self, step: Callable[[str], Awaitable[None]], name: str | None) -> None:
        """One after the other, and to the end also if one fails or who asked for it leaves."""
        if self.draining:
            self.check_ready()
        if name is not None and name not in self.opened:
            raise self._absence(name)

        async def run() -> None:
            failures = []
            async with self._turn:
                for each in (*self.opened,) if name is None else (name,):
                    try:
                        if each not in self.opened:  # planned otherwise meanwhile
                            raise self._absence(each)
                        await step(each)
                    except ServiceError as error:
                        failures.append(error)
            if failures:
                raise failures[0]

        await asyncio.shield(self._keep(run()))

    async def _load(self, name: str) -> None:
        if self._is_loaded(name):
            return
        variant = self.opened[name]
        self._enter(name, "loading")
        try:
            variant.reopen(await open_again(self.threads, variant.running, self._warm[name].read, variant.spec))
        except Exception as error:
            logger.exception("variant %s could not be loaded", name)
            self._enter(name, "unloaded", f"it could not be loaded: {error}")
            if is_out_of_memory(error):
                raise OutOfMemory(f"there is no memory to load variant '{name}': {error}") from error
            raise ServiceError(f"variant '{name}' could not be loaded: {error}") from error
        self._enter(name, "serving")

    async def _unload(self, name: str, *, last_too: bool) -> None:
        if not self._is_loaded(name):
            return
        if [*self.variants] == [name] and not last_too:
            raise BadInput(f"variant '{name}' is the last one that serves and is not unloaded; load another one first")
        variant = self.opened[name]
        self._enter(name, "unloading")
        self.sequences.forget(variant)
        try:
            await variant.finish()
            await close_all(self.threads, variant.running.opened)
        finally:
            self._enter(name, "unloaded")

    def _is_loaded(self, name: str) -> bool:
        return self.status_of[name].state in {"serving", "restarting"}

    def _listen_to(self, name: str) -> None:
        """Hear on the loop what becomes of a variant's processes, if it has any."""
        loop, variant = asyncio.get_running_loop(), self.opened[name]
        workers = variant.workers
        variant.metrics.workers = no_workers
        if workers is None:
            return
        variant.metrics.workers = lambda: WorkerCounts(dict(workers.losses), workers.is_complete)

        def listener(event: WorkerEvent, why: str) -> None:
            with suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(self._hear, variant, event, why)

        workers.listener = listener
        if not workers.is_complete:
            self._hear(variant, "lost", "its worker was lost")

    def _hear(self, variant: Variant, event: WorkerEvent, why: str) -> None:
        """A variant gets no new requests while a worker of it is away; those that were in it wait for another one."""
        if event == "back":
            variant.workers_are_back()
        elif event == "failing":
            variant.workers_stay_away(why)
        if self.opened.get(variant.name) is variant and self._is_loaded(variant.name):
            self._enter(variant.name, "serving" if event == "back" else "restarting", "" if event == "back" else why)

    def _enter(self, name: str, state: VariantState, reason: str = "") -> None:
        """Change a variant's state, and with it who gets requests."""
        self.status_of[name] = VariantStatus(state, reason)
        metrics = self.metrics.variants[name]
        metrics.facts = replace(metrics.facts, state=state, reason=reason)
        self._find_serving()

    def _find_serving(self) -> None:
        """By their states, and share out the traffic among them."""
        self.variants = {each: self.opened[each] for each in self.opened if self.status_of[each].state == "serving"}
        self.split.share_out(self.opened, self.variants)
        for variant in self.variants.values():
            variant.neighbours = [other for other in self.variants.values() if other is not variant]
        self._tell()

    def _absence(self, name: str) -> ServiceError:
        """Why no variant of that name serves, or none at all if it is empty."""
        if not name:
            away = [
                f"'{each}' is {at.state}: {at.reason}"
                for each, at in self.status_of.items()
                if at.state == "restarting"
            ]
            told = "; ".join(away) if away else f"no variant of '{self.name}' is loaded"
            return NotReady(told, retry_after_s=1.0 if away else None)
        if name not in self.plans:
            return NotFound(f"no variant '{name}'; there are {', '.join(self.plans)}")
        state, reason = self.status_of[name]
        soon = 1.0 if state == "restarting" else None
        return NotReady(f"variant '{name}' is {state}" + (f": {reason}" if reason else ""), retry_after_s=soon)

    def close(self) -> None:
        """End the lanes after what they still have to do, then close all backends."""
        if self._watchdog is not None:
            self._watchdog.stop()
        self.threads.close()
        self.decoders.close()
        self.device.close()
        loaded = [variant for name, variant in self.opened.items() if self._is_loaded(name)]
        backends = {
            id(backend): backend for variant in (*loaded, *self._retiring) for backend in variant.running.opened
        }
        for backend in backends.values():
            backend.close()


def _facts(plan: VariantPlan, device: Device, warm: WarmVariant | None) -> VariantFacts:
    facts = replace(plan.facts, lanes=len(device.lanes))
    if warm is None:
        return facts
    backend = warm.running.backends[0]
    return replace(facts, backend=backend.name, device=backend.device)
