"""All variants of one base at work: chosen per request, unloaded and loaded again, drained.

The fleet is what sessions and the API see. It knows neither the config file nor the artifact store; the composition
root plans and opens what it serves (`opening.py`). While it serves, variants can be unloaded and loaded again; what
that takes is in `reload.py`, and here only who answers meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from leanserve.errors import BadInput, NotFound, NotReady, OutOfMemory, ServiceError
from leanserve.memory import is_out_of_memory
from leanserve.runtime.device import BatchOnLane, Lane
from leanserve.runtime.linux.denormals import flush_denormals
from leanserve.serving.decoding import Decoders
from leanserve.serving.opening import VariantPlan, WarmFleet
from leanserve.serving.reload import LoadingThreads, Read, close_all, open_again
from leanserve.serving.sequences import Sequences
from leanserve.serving.traffic import choose_variant, normalize_weights
from leanserve.serving.variant import Variant
from leanserve.serving.watchdog import Watchdog, WatchdogLimits
from leanserve.telemetry.metrics import Metrics
from leanserve.telemetry.observations import VariantFacts, VariantState

logger = logging.getLogger(__name__)


class VariantStatus(NamedTuple):
    """Whether a variant serves, and if not, why."""

    state: VariantState
    reason: str = ""


class Fleet:
    """The variants that serve, those that do not and why, and the traffic split among them (`weights`)."""

    def __init__(self, warm: WarmFleet, watched: WatchdogLimits | None = None) -> None:
        """Serve what was opened, on the running loop; all methods but `close` belong to its thread.

        With `watched` neither a batch that hangs nor a loop that does is waited for any longer.
        """
        flush_denormals()  # as on the lanes: the loop runs short batches itself
        self.name = warm.base.name
        self.plans = warm.plans
        self.device = warm.device
        self.sticky_header = warm.traffic.sticky_header.lower().encode()
        self.draining = False
        self.metrics = Metrics(self.name, caveats=warm.base.caveats, ready=self.is_ready, threads=warm.device.threads)
        self.opened: dict[str, Variant] = {}
        """All that passed their gate, whether they serve now or not."""
        isolates = watched is not None and watched.on_stuck == "isolate"
        for name, plan in warm.plans.items():
            metrics = self.metrics.add(name, _facts(plan, warm))
            if name in warm.variants:
                self.opened[name] = Variant(warm.variants[name], metrics, lanes_only=isolates)
        self.variants = dict(self.opened)
        """Those that serve now."""
        self.status_of = {name: VariantStatus(plan.facts.state, plan.facts.reason) for name, plan in warm.plans.items()}
        self.sequences = Sequences(warm.traffic.sequences)
        self._reads: dict[str, Read] = {name: opened.read for name, opened in warm.variants.items() if opened.read}
        self._given_weights = warm.traffic.weights
        self._split = normalize_weights(self._given_weights, self.opened)
        """As `weights`, but over all that were opened, so that a caller's key means the same while one is away."""
        self.weights: Mapping[str, float] = {}
        self.decoders = Decoders(warm.decode_memory)
        self._threads = LoadingThreads()
        self._turn = asyncio.Lock()
        self._swaps: set[asyncio.Task[None]] = set()
        self._listeners: list[Callable[[], None]] = []
        self._share_out()
        self._watchdog = Watchdog(self.device, watched, self.isolate) if watched else None

    def choose(self, name: str | None, caller_key: str | None) -> Variant:
        """Explicit name, then sticky key, then weights.

        Raises:
            NotFound: no such variant. NotReady: it was excluded by its gate, or is not loaded; or none is.
        """
        if name is None:
            name = choose_variant(self._split, self.weights, caller_key, self.name)
        variant = self.variants.get(name)
        if variant is None:
            raise self._absence(name)
        return variant

    def confirm(self, variant: Variant, name: str | None, caller_key: str | None) -> Variant:
        """The variant that was chosen before the loop turned to others; another choice if it was unloaded since."""
        return variant if variant.name in self.variants else self.choose(name, caller_key)

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
                        await step(each)
                    except ServiceError as error:
                        failures.append(error)
            if failures:
                raise failures[0]

        swap = asyncio.create_task(run())
        self._swaps.add(swap)
        swap.add_done_callback(self._swaps.discard)
        await asyncio.shield(swap)

    async def _load(self, name: str) -> None:
        if name in self.variants:
            return
        variant = self.opened[name]
        self._enter(name, "loading")
        try:
            variant.reopen(await open_again(self._threads, variant.running, self._reads[name], variant.spec))
        except Exception as error:
            logger.exception("variant %s could not be loaded", name)
            self._enter(name, "unloaded", f"it could not be loaded: {error}")
            if is_out_of_memory(error):
                raise OutOfMemory(f"there is no memory to load variant '{name}': {error}") from error
            raise ServiceError(f"variant '{name}' could not be loaded: {error}") from error
        self._enter(name, "serving")

    async def _unload(self, name: str, *, last_too: bool) -> None:
        if name not in self.variants:
            return
        if len(self.variants) == 1 and not last_too:
            raise BadInput(f"variant '{name}' is the last one that serves and is not unloaded; load another one first")
        variant = self.opened[name]
        self._enter(name, "unloading")
        self.sequences.forget(variant)
        try:
            await variant.finish()
            await close_all(self._threads, variant.running.opened)
        finally:
            self._enter(name, "unloaded")

    def _enter(self, name: str, state: VariantState, reason: str = "") -> None:
        """Change a variant's state, and with it who gets requests."""
        self.status_of[name] = VariantStatus(state, reason)
        self.variants = {each: self.opened[each] for each in self.opened if self.status_of[each].state == "serving"}
        self._share_out()
        metrics = self.metrics.variants[name]
        metrics.facts = replace(metrics.facts, state=state, reason=reason)
        self._tell()

    def _share_out(self) -> None:
        self.weights = normalize_weights(self._given_weights, self.variants)
        for variant in self.variants.values():
            variant.neighbours = [other for other in self.variants.values() if other is not variant]

    def _absence(self, name: str) -> ServiceError:
        """Why no variant of that name serves, or none at all if it is empty."""
        if not name:
            return NotReady(f"no variant of '{self.name}' is loaded")
        if name not in self.plans:
            return NotFound(f"no variant '{name}'; there are {', '.join(self.plans)}")
        state, reason = self.status_of[name]
        return NotReady(f"variant '{name}' is {state}" + (f": {reason}" if reason else ""))

    def close(self) -> None:
        """End the lanes after what they still have to do, then close all backends."""
        if self._watchdog is not None:
            self._watchdog.stop()
        self._threads.close()
        self.decoders.close()
        self.device.close()
        for variant in self.variants.values():
            for backend in variant.running.opened:
                backend.close()


def _facts(plan: VariantPlan, warm: WarmFleet) -> VariantFacts:
    facts = replace(plan.facts, lanes=len(warm.device.lanes))
    if plan.name not in warm.variants:
        return facts
    backend = warm.variants[plan.name].running.backends[0]
    return replace(facts, backend=backend.name, device=backend.device)
