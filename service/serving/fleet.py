"""All variants of one base: opened and warmed on their device before the first request, chosen per request, drained.

The fleet is what the API sees. It knows neither the config file nor the artifact store; `open_fleet` in the composition
root gives it what it needs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from random import random

from service.compression.manifest import VariantReport
from service.config import BatchConfig, ServiceConfig
from service.contracts import Backend, Base
from service.errors import NotFound, NotReady, StartupError
from service.serving.batcher import Batcher, QueueLimits
from service.serving.costs import Costs
from service.serving.device import Device, Lane
from service.serving.execution import Reply
from service.serving.traffic import share_out, sticky_point
from service.serving.variant import Variant
from service.serving.warmup import warm_up
from service.telemetry.metrics import Metrics
from service.telemetry.observations import VariantFacts


class Fleet:
    """The variants that serve, those that do not and why, and the traffic split among them (`weights`)."""

    def __init__(self, base: Base, config: ServiceConfig, reports: list[VariantReport], device: Device) -> None:
        self.base = base
        self.config = config
        self.reports = {report.name: report for report in reports}
        self.device = device
        self.variants: dict[str, Variant] = {}
        self.metrics = Metrics(base.name, caveats=base.caveats)
        self.draining = False
        self.sticky_header = config.traffic.sticky_header.lower().encode()
        self.weights: Mapping[str, float] = {}

    def open(self, name: str, load: Callable[[], Backend], batch: BatchConfig) -> None:
        """Load a variant on every lane (`load` is called there) and warm it in every shape that it will meet.

        Raises:
            StartupError: it cannot be loaded or run; nothing half-warm is ever served.
        """
        try:
            running = warm_up(self.device, load, self.base.spec, batch.max_rows)
        except Exception as error:
            raise StartupError(f"variant '{name}' cannot be loaded and warmed up: {error}") from error
        batcher: Batcher[Reply] = Batcher(_limits(batch, running.costs))
        self.variants[name] = Variant(name, self.base.spec, running, batcher)
        self.weights = self._share_out()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Bind all variants to the loop that serves, and declare their metrics."""
        for report in self.reports.values():
            variant = self.variants.get(report.name)
            facts = _facts(report, variant, self.device)
            if variant is None:
                self.metrics.add(report.name, facts)
                continue
            metrics = self.metrics.add(report.name, facts, variant.waiting_rows, variant.batcher.waiting_requests)
            others = [other for other in self.variants.values() if other is not variant]
            variant.bind(loop, metrics, others)

    def _share_out(self) -> Mapping[str, float]:
        """The traffic split over serving variants; an excluded variant's share goes to the others."""
        given = self.config.traffic.weights
        weights = {name: given.get(name, 0.0) if given else 1.0 for name in self.variants}
        return weights if any(weights.values()) else dict.fromkeys(self.variants, 1.0)

    def choose(self, name: str | None, caller_key: str | None) -> Variant:
        """Explicit name, then sticky key, then weights.

        Raises:
            NotFound: no such variant. NotReady: it was excluded by its gate.
        """
        if name is None:
            point = random() if caller_key is None else sticky_point(caller_key, self.base.name)
            return self.variants[share_out(self.weights, point)]
        variant = self.variants.get(name)
        if variant is not None:
            return variant
        if name in self.reports:
            raise NotReady(f"variant '{name}' is excluded: {self.reports[name].reason}")
        raise NotFound(f"no variant '{name}'; there are {', '.join(self.reports)}")

    def close(self) -> None:
        """Close all backends on the lanes that ran them, then end these."""
        self.device.call_on_each(self._close_on)
        self.device.close()

    def _close_on(self, lane: Lane) -> None:
        for variant in self.variants.values():
            variant.backends[lane.index].close()


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
    passes = report.chain[1:]
    return VariantFacts(
        passes=tuple(str(manifest.kind) for manifest in passes),
        backend=variant.backend.name if variant else "",
        device=device.name if variant else "",
        lanes=len(device.lanes),
        state=report.state,
        reason=report.reason or "",
        quality=report.quality.model_dump(),
        build_seconds=tuple(manifest.seconds for manifest in passes),
    )
