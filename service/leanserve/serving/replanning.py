"""Another plan for a fleet that serves: what it has anew is opened and warmed beside the variants that answer.

Nothing is timed: a new variant on the lanes, even for one batch of each size, would keep the others waiting. What its
batches cost is known well enough from the build, which has timed all variants beside each other: the costs of one that
serves here, times the ratio of the two there. What it learns from its own batches corrects that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from leanserve.codecs.text import TextCodec
from leanserve.contracts import Backend, Base, Json, ModelSpec
from leanserve.runtime.assembly import dynamic_axes
from leanserve.runtime.costs import Costs, costs_like, length_buckets
from leanserve.runtime.device import Device
from leanserve.runtime.isolation.workers import Workers
from leanserve.runtime.lanes import LoadedVariant
from leanserve.serving.opening import TrafficPlan, VariantPlan, WarmVariant, queue_limits, warm_variant
from leanserve.serving.reload import LaneCosts, LoadingThreads, Read, close_all, open_beside


class VariantSource(NamedTuple):
    """From what a variant is opened."""

    read: Read
    workers: Workers | None = None
    """What its backends report to, where they are isolated."""
    seated: bool = False
    """Whether lanes stay on processors of their own while they run it (`LoadedVariant`)."""


class FleetPlan(NamedTuple):
    """All variants of a fleet, the split among them, the sources of those that pass their gates, and the report."""

    plans: Sequence[VariantPlan]
    traffic: TrafficPlan
    sources: Mapping[str, VariantSource]
    report: Json = None


class Serving(NamedTuple):
    """A variant that a fleet has: its plan, and as what it was opened, with the backends that it has now."""

    plan: VariantPlan
    warm: WarmVariant


class FleetSite(NamedTuple):
    """Where variants are opened: for this base, on this device, by these threads; beside those that are there."""

    base: Base
    device: Device
    threads: LoadingThreads
    there: Mapping[str, Serving]


async def open_new(site: FleetSite, planned: FleetPlan) -> dict[str, WarmVariant]:
    """All variants of a plan that are not there as they are planned; those that are can stay.

    One of which only the queue is planned otherwise gets the backends that are there.

    Raises:
        Exception: whatever reading, opening or running raises; what was opened is closed again.
    """
    found: dict[str, WarmVariant] = {}
    try:
        for plan in planned.plans:
            before = site.there.get(plan.name)
            if plan.name not in planned.sources or (before and before.plan.same_service(plan)):
                continue
            if before and before.plan.same_model(plan):
                limits = queue_limits(plan.batch, before.warm.running.costs)
                found[plan.name] = before.warm._replace(limits=limits, device_share=plan.device_share)
            else:
                found[plan.name] = await _opened(site, plan, planned.sources[plan.name])
    except BaseException:
        for name in found.keys() & planned.sources.keys():
            await close_all(site.threads, backends_of_its_own(found[name], site.there.get(name)))
        raise
    return found


def backends_of_its_own(warm: WarmVariant, other: Serving | None) -> list[Backend]:
    """Those that it does not share with the other."""
    shared = {id(backend) for backend in other.warm.running.opened} if other else set()
    return [backend for backend in warm.running.opened if id(backend) not in shared]


async def _opened(site: FleetSite, plan: VariantPlan, source: VariantSource) -> WarmVariant:
    spec = plan.spec or site.base.spec
    most = spec.most_rows(plan.batch.max_rows)
    fitting = min(plan.measured.memory_rows or most, most)
    model = next(iter(site.there.values()))
    costs_of = partial(_foreseen, model, plan, spec, fitting)
    backends, wide, costs = await open_beside(site.threads, site.device, source.read, spec, costs_of)
    memory_rows = fitting if fitting < most else None
    running = LoadedVariant(site.device, backends, costs, wide, memory_rows, seated=source.seated)
    made = warm_variant(site.base, plan, running, source.read, source.workers)
    if isinstance(made.codec, TextCodec):
        await site.threads.do(made.codec.open)
    return made


def _foreseen(model: Serving, plan: VariantPlan, spec: ModelSpec, most: int, backend: Backend) -> LaneCosts:
    """What batches of a backend will cost, by those of a variant that is there."""
    running, ratio = model.warm.running, _ratio(plan, model.plan)
    lengths = length_buckets(spec.max_length) if dynamic_axes(spec.inputs) else ()

    def like(known: Costs) -> Costs:
        return costs_like(known, ratio, most, backend.row_buckets, lengths)

    wide = running.wide if backend.self_contained else None
    return LaneCosts(like(running.costs), like(wide.costs) if wide else None)


def _ratio(new: VariantPlan, known: VariantPlan) -> Callable[[int], float]:
    """Seconds of a batch of so many rows over those of another variant, as the build has measured; 1 if it has not."""
    times, others = (plan.facts.quality.get("latency_ms", {}) for plan in (new, known))
    measured = {int(rows): times[rows] / others[rows] for rows in times if others.get(rows)}

    def ratio(rows: int) -> float:
        nearest = min(measured, key=lambda known_rows: abs(known_rows - rows), default=None)
        return 1.0 if nearest is None else float(measured[nearest])

    return ratio
