"""Variants on their way to a fleet: planned, then loaded and warm on their device, but served by no loop yet.

Loading takes seconds to minutes and belongs to no event loop; a `Fleet` is made of what was opened here in one step, on
the loop that serves, so that there is never half a fleet.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from leanserve.codecs.postprocess.chain import PostChain
from leanserve.contracts import Backend, Base, Codec, Json, ModelSpec
from leanserve.errors import StartupError
from leanserve.memory import is_out_of_memory
from leanserve.runtime.costs import Costs
from leanserve.runtime.device import Device
from leanserve.runtime.isolation.workers import Workers
from leanserve.runtime.lanes import LoadedVariant
from leanserve.runtime.warm_up import warm_up
from leanserve.serving.batcher import QueueLimits
from leanserve.serving.company import Company, company_by
from leanserve.serving.decoding import MEMORY
from leanserve.serving.reload import Open, Read, shapes_to_meet, warm_again
from leanserve.serving.traffic import TrafficRules
from leanserve.telemetry.observations import VariantFacts

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How requests to a variant share batches, as wished for; what is measured may allow less."""

    max_rows: int = 32
    max_delay_s: float = 0.0
    queue_rows: int = 512
    timeout_s: float = 10.0
    levels: int = 3
    default_level: int = 2


class MeasuredLimits(NamedTuple):
    """What the build has found out about the batches of a variant."""

    trusts_rows: bool = True
    """Whether it keeps the rows of a batch apart, whatever their values."""
    memory_rows: int | None = None
    """Rows of the largest batch for which there was memory, where that is a limit."""


@dataclass(frozen=True, slots=True)
class VariantPlan:
    """One variant before it is loaded; what is `excluded` by its facts never is."""

    name: str
    facts: VariantFacts = field(default_factory=VariantFacts)
    batch: BatchLimits = field(default_factory=BatchLimits)
    measured: MeasuredLimits = field(default_factory=MeasuredLimits)
    spec: ModelSpec | None = None
    """What its artifact takes and gives; `None`: what the base does."""
    device_share: float = 1.0
    """Its part of the device's seconds, beside those of others that want them at the same time."""
    content: str = ""
    """Which model it is and where it runs, in words that are the same for the same."""

    def same_model(self, other: VariantPlan) -> bool:
        """Whether the backends of one can be those of the other."""
        mine, others = ((plan.content, plan.spec, plan.measured, plan.batch.max_rows) for plan in (self, other))
        return mine == others

    def same_service(self, other: VariantPlan) -> bool:
        """Whether one can stay where the other is planned."""
        mine, others = ((plan.batch, plan.device_share) for plan in (self, other))
        return self.same_model(other) and mine == others


class SequenceLimits(NamedTuple):
    """Sequences that are open at a time, bytes of their states together, and seconds until an idle one is forgotten."""

    most: int = 1000
    state_bytes: int = 256 * 2**20
    idle_s: float = 60.0


@dataclass(frozen=True, slots=True)
class TrafficPlan:
    """Which variant answers a request that names none: by this header's value, else by the rules. And how many clients
    may have a sequence."""

    rules: TrafficRules = field(default_factory=TrafficRules)
    sticky_header: str = "x-caller-key"
    sequences: SequenceLimits = field(default_factory=SequenceLimits)


def cannot_be_read() -> Open:
    """The `Read` of a variant that is never loaded again."""
    raise StartupError("this variant was opened without a way to load it again")


class WarmVariant(NamedTuple):
    """A variant loaded on every lane and run in every shape that it will meet."""

    name: str
    spec: ModelSpec
    codec: Codec
    running: LoadedVariant
    limits: QueueLimits
    company: Company | None = None
    """Which requests may share a batch: those of which it says the same; `None`: any may."""
    read: Read = cannot_be_read
    """The first part of loading it again."""
    device_share: float = 1.0
    """Its part of the device, beside those of others that want it at the same time."""
    workers: Workers | None = None
    """Its processes, where it has some of its own."""


class WarmFleet:
    """The variants of a base on one device: planned all at once, then opened one after the other."""

    def __init__(
        self,
        base: Base,
        plans: Sequence[VariantPlan],
        device: Device,
        traffic: TrafficPlan | None = None,
        post: PostChain | None = None,
    ) -> None:
        self.base = base
        self.plans = {plan.name: plan for plan in plans}
        self.device = device
        self.traffic = traffic or TrafficPlan()
        self.post = post or PostChain((), base.spec, Path())
        """What becomes of the outputs before clients see them."""
        self.report: Json = None
        """What the build has measured (`GET /v1/report`)."""
        self.decode_memory = MEMORY
        """Bytes that decoding one body may take."""
        self.cuda_visible: str | None = None
        """`CUDA_VISIBLE_DEVICES`, by which metrics tell GPUs apart."""
        self.variants: dict[str, WarmVariant] = {}
        """Those that are open."""

    def open(
        self,
        name: str,
        load: Open,
        read: Read | None = None,
        workers: Workers | None = None,
        *,
        seated: bool = False,
    ) -> None:
        """Load a planned variant for every lane (`load` is called there) and warm it in every shape that it will meet.

        A batch has no more rows than there was memory for when it was measured, and than there is here, where all else
        is loaded, too. `read` is the first part of `load`, for loading it again while others serve; without it there is
        none apart. `workers` are those that the backends report to, where these are isolated. `seated`: lanes stay on
        processors of their own while they run it (`LoadedVariant`).

        Raises:
            StartupError: it cannot be loaded or run; nothing half-warm is ever served.
        """
        plan = self.plans[name]
        spec = plan.spec or self.base.spec
        try:
            running = self._warm_up(plan, load, spec, seated=seated)
        except Exception as error:
            remedy = "; fewer variants, or lanes: 1, take less memory" if is_out_of_memory(error) else ""
            raise StartupError(f"variant '{name}' cannot be loaded and warmed up: {error}{remedy}") from error
        self.variants[name] = warm_variant(self.base, plan, running, read or (lambda: load), workers)

    def _warm_up(self, plan: VariantPlan, load: Open, spec: ModelSpec, *, seated: bool) -> LoadedVariant:
        max_rows = spec.most_rows(plan.batch.max_rows)
        fitting = min(plan.measured.memory_rows or max_rows, max_rows)
        running = warm_up(self.device, load, spec, fitting, len(self.plans), seated=seated)
        if running.memory_rows is None and fitting < max_rows:
            running = replace(running, memory_rows=fitting)
        if running.memory_rows is not None:
            text = "variant '%s': there is memory for batches of at most %d rows; batch.max_rows is %d"
            logger.warning(text, plan.name, running.memory_rows, max_rows)
        return running

    def close(self) -> None:
        """End the lanes after what they still have to do, then close all backends. A fleet made of this has its own."""
        self.device.close()
        for variant in self.variants.values():
            for backend in variant.running.opened:
                backend.close()


def warm_variant(
    base: Base, plan: VariantPlan, running: LoadedVariant, read: Read, workers: Workers | None = None
) -> WarmVariant:
    """A planned variant with backends that are warm."""
    spec = plan.spec or base.spec
    if workers is not None:
        running = replace(running, lanes_only=True)
        workers.settle(running.costs, len(shapes_to_meet(running.costs)), partial(_warm_alone, running.costs, spec))
    company = company_by(spec, trusts_rows=plan.measured.trusts_rows)
    codec = base.codec if spec == base.spec else base.codec_for(spec)
    limits = queue_limits(plan.batch, running.costs)
    return WarmVariant(plan.name, spec, codec, running, limits, company, read, plan.device_share, workers)


def _warm_alone(costs: Costs, spec: ModelSpec, backend: Backend) -> None:
    warm_again(costs, spec, [backend])


def queue_limits(batch: BatchLimits, costs: Costs) -> QueueLimits:
    """Those of the queue of a variant whose batches cost so much."""
    limits = QueueLimits(
        max_rows=1,
        queue_rows=batch.queue_rows,
        max_delay_s=batch.max_delay_s,
        timeout_s=batch.timeout_s,
        levels=batch.levels,
        default_level=batch.default_level,
        lengths=costs.lengths,
    )
    return with_knees(limits, costs)


def with_knees(limits: QueueLimits, costs: Costs) -> QueueLimits:
    """The same with batches as large as is worth it."""
    knees = tuple(table.knee for table in costs.tables)
    return replace(limits, max_rows=max(knees), rows_at=knees)
