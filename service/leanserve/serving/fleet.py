"""All variants of one base: opened and warmed on their device before the first request, chosen per request, drained.

The fleet is what the API sees. It knows neither the config file nor the artifact store; `open_fleet` in the composition
root gives it what it needs. While it serves, variants can be unloaded and loaded again; what that takes is in
`reload.py`, and here only who answers meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from leanserve.artifacts.manifest import VariantReport
from leanserve.config.schema import BatchConfig, ServiceConfig
from leanserve.contracts import Base
from leanserve.errors import BadInput, NotFound, NotReady, OutOfMemory, ServiceError, StartupError
from leanserve.memory import is_out_of_memory
from leanserve.runtime.costs import Costs
from leanserve.runtime.device import Device
from leanserve.runtime.lanes import LoadedVariant
from leanserve.runtime.linux.denormals import flush_denormals
from leanserve.runtime.warm_up import warm_up
from leanserve.serving.batch_runner import PendingResult
from leanserve.serving.batcher import Batcher, QueueLimits
from leanserve.serving.company import company_by
from leanserve.serving.reload import LoadingThreads, Open, Read, close_all, open_again
from leanserve.serving.traffic import choose_variant, normalize_weights
from leanserve.serving.variant import Variant
from leanserve.telemetry.metrics import Metrics
from leanserve.telemetry.observations import VariantFacts, VariantState

logger = logging.getLogger(__name__)


class VariantStatus(NamedTuple):
    """Whether a variant serves, and if not, why."""

    state: VariantState
    reason: str = ""


class MeasuredLimits(NamedTuple):
    """What the build has found out about the batches of a variant."""

    trusts_rows: bool = True
    """Whether it keeps the rows of a batch apart, whatever their values."""
    memory_rows: int | None = None
    """Rows of the largest batch for which there was memory, where that is a limit."""


UNLIMITED = MeasuredLimits()


class Fleet:
    """The variants that serve, those that do not and why, and the traffic split among them (`weights`)."""

    def __init__(self, base: Base, config: ServiceConfig, reports: list[VariantReport], device: Device) -> None:
        self.base = base
        self.config = config
        self.reports = {report.name: report for report in reports}
        self.device = device
        self.status_of = {report.name: VariantStatus(report.state, report.reason or "") for report in reports}
        self.variants: dict[str, Variant] = {}
        """Those that serve now."""
        self.metrics = Metrics(base.name, caveats=base.caveats, ready=self.is_ready, threads=device.threads)
        self.draining = False
        self.sticky_header = config.traffic.sticky_header.lower().encode()
        self.weights: Mapping[str, float] = {}
        self._opened: dict[str, Variant] = {}
        self._reads: dict[str, Read] = {}
        self._split: Mapping[str, float] = {}
        """As `weights`, but over all that were opened, so that a caller's key means the same while one is away."""
        self._threads = LoadingThreads()
        self._turn = asyncio.Lock()
        self._swaps: set[asyncio.Task[None]] = set()
        self._listeners: list[Callable[[], None]] = []

    def open(
        self, name: str, load: Open, batch: BatchConfig, read: Read | None = None, measured: MeasuredLimits = UNLIMITED
    ) -> None:
        """Load a variant for every lane (`load` is called there) and warm it in every shape that it will meet.

        A batch has no more rows than there was memory for when it was `measured`, and than there is here, where all
        else is loaded, too. `read` is the first part of `load`, for loading it again while others serve; without it
        there is none apart.

        Raises:
            StartupError: it cannot be loaded or run; nothing half-warm is ever served.
        """
        try:
            spec = self.base.spec
            running = self._warm_up(name, load, spec.most_rows(batch.max_rows), measured.memory_rows)
        except Exception as error:
            remedy = "; fewer variants, or lanes: 1, take less memory" if is_out_of_memory(error) else ""
            raise StartupError(f"variant '{name}' cannot be loaded and warmed up: {error}{remedy}") from error
        batcher: Batcher[PendingResult] = Batcher(_limits(batch, running.costs))
        self._opened[name] = Variant(name, spec, running, batcher, company_by(spec, trusts_rows=measured.trusts_rows))
        self._reads[name] = read or (lambda: load)
        self._split = normalize_weights(self.config.traffic.weights, self._opened)
        self._enter(name, "serving")

    def _warm_up(self, name: str, load: Open, max_rows: int, memory_rows: int | None) -> LoadedVariant:
        fitting = min(memory_rows or max_rows, max_rows)
        running = warm_up(self.device, load, self.base.spec, fitting, len(self.config.variants))
        if running.memory_rows is None and fitting < max_rows:
            running = replace(running, memory_rows=fitting)
        if running.memory_rows is not None:
            text = "variant '%s': there is memory for batches of at most %d rows; batch.max_rows is %d"
            logger.warning(text, name, running.memory_rows, max_rows)
        return running

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Bind all variants to the loop that serves, and declare their metrics. Call it on the loop's thread."""
        flush_denormals()  # as on the lanes: the loop runs short batches itself
        for report in self.reports.values():
            variant = self._opened.get(report.name)
            facts = _facts(report, variant, self.device)
            if variant is None:
                self.metrics.add(report.name, facts)
                continue
            metrics = self.metrics.add(report.name, facts, variant.waiting_rows, variant.batcher.waiting_requests)
            others = [other for other in self.variants.values() if other is not variant]
            variant.bind(loop, metrics, others)

    def choose(self, name: str | None, caller_key: str | None) -> Variant:
        """Explicit name, then sticky key, then weights.

        Raises:
            NotFound: no such variant. NotReady: it was excluded by its gate, or is not loaded; or none is.
        """
        if name is None:
            name = choose_variant(self._split, self.weights, caller_key, self.base.name)
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
        if name is not None and name not in self._opened:
            raise self._absence(name)

        async def run() -> None:
            failures = []
            async with self._turn:
                for each in (*self._opened,) if name is None else (name,):
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
        variant = self._opened[name]
        self._enter(name, "loading")
        try:
            variant.reopen(await open_again(self._threads, variant.running, self._reads[name], self.base.spec))
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
        variant = self._opened[name]
        self._enter(name, "unloading")
        try:
            await variant.finish()
            await close_all(self._threads, variant.running.opened)
        finally:
            self._enter(name, "unloaded")

    def _enter(self, name: str, state: VariantState, reason: str = "") -> None:
        """Change a variant's state, and with it who gets requests."""
        self.status_of[name] = VariantStatus(state, reason)
        self.variants = {each: self._opened[each] for each in self._opened if self.status_of[each].state == "serving"}
        self.weights = normalize_weights(self.config.traffic.weights, self.variants)
        for variant in self.variants.values():
            variant.neighbours = [other for other in self.variants.values() if other is not variant]
        if name in self.metrics.variants:
            metrics = self.metrics.variants[name]
            metrics.facts = replace(metrics.facts, state=state, reason=reason)
        self._tell()

    def _absence(self, name: str) -> ServiceError:
        """Why no variant of that name serves, or none at all if it is empty."""
        if not name:
            return NotReady(f"no variant of '{self.base.name}' is loaded")
        if name not in self.reports:
            return NotFound(f"no variant '{name}'; there are {', '.join(self.reports)}")
        state, reason = self.status_of[name]
        return NotReady(f"variant '{name}' is {state}" + (f": {reason}" if reason else ""))

    def close(self) -> None:
        """End the lanes after what they still have to do, then close all backends."""
        self._threads.close()
        self.device.close()
        for variant in self.variants.values():
            for backend in variant.running.opened:
                backend.close()


def _limits(batch: BatchConfig, costs: Costs) -> QueueLimits:
    knees = tuple(table.knee for table in costs.tables)
    return QueueLimits(
        max_rows=max(knees),
        queue_rows=batch.queue_rows,
        max_delay_s=batch.max_delay_ms / 1000,
        timeout_s=batch.timeout_ms / 1000,
        levels=batch.priority_levels,
        default_level=batch.default_level,
        lengths=costs.lengths,
        rows_at=knees,
    )


def _facts(report: VariantReport, variant: Variant | None, device: Device) -> VariantFacts:
    passes = report.ancestry[1:]
    return VariantFacts(
        passes=tuple(str(manifest.kind) for manifest in passes),
        backend=variant.backend.name if variant else "",
        device=variant.backend.device if variant else "",
        lanes=len(device.lanes),
        state=report.state,
        reason=report.reason or "",
        quality=report.quality.model_dump(),
        build_seconds=tuple(manifest.seconds for manifest in passes),
    )
