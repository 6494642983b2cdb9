"""Every exported metric, declared once, and the page that Prometheus reads; the only file that knows prometheus_client.

The tables below say which metric is read from which number of a variant; one collector walks them at scrape time, so
that exporting costs the request path nothing (`observations.py` is what it writes). Triton's `nv_*` names stand beside
our own, so that clients and dashboards written for Triton work unchanged; they are untyped, because prometheus_client
appends `_total` to the name of a counter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from prometheus_client import CollectorRegistry, Metric, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from leanserve.contracts import Json
from leanserve.telemetry.experiment_metrics import ExperimentMetrics
from leanserve.telemetry.hardware_metrics import HardwareMetrics, Sources, single_gauge
from leanserve.telemetry.nvml import initialised_nvml
from leanserve.telemetry.observations import BucketCounts, VariantFacts, VariantMetrics
from leanserve.telemetry.startup import Startup

TRITON_REASONS = {
    "queue_full": "REJECTED",
    "deadline_unreachable": "REJECTED",
    "queue_timeout": "REJECTED",
    "client_gone": "CANCELED",
    "backend_failed": "BACKEND",
    "worker_lost": "BACKEND",
    "out_of_memory": "BACKEND",
}
"""Our outcome -> Triton's failure reason; what is not listed is OTHER."""

Samples: TypeAlias = list[tuple[dict[str, str], float | BucketCounts]]


class Family(NamedTuple):
    """One metric: its name and help, and how its samples (labels besides model and version) are read from a variant."""

    name: str
    kind: Literal["counter", "gauge", "histogram", "unknown"]
    text: str
    read: Callable[[VariantMetrics], Samples]


def _only(value: float | BucketCounts) -> Samples:
    return [({}, value)]


def _micros(seconds: float) -> Samples:
    return _only(round(seconds * 1e6))


def _outcomes(variant: VariantMetrics) -> Samples:
    return [({"outcome": outcome}, seen.count) for outcome, seen in variant.requests.items()]


def _durations(variant: VariantMetrics) -> Samples:
    # Apart by outcome, so that quick refusals cannot flatter the latency of answers.
    return [({"outcome": name}, seen) for name, seen in variant.requests.items() if name == "ok" or seen.count]


def _failures(variant: VariantMetrics) -> Samples:
    counts = dict.fromkeys(("REJECTED", "CANCELED", "BACKEND", "OTHER"), 0)
    for outcome, seen in variant.requests.items():
        if outcome != "ok":
            counts[TRITON_REASONS.get(outcome, "OTHER")] += seen.count
    return [({"reason": reason}, count) for reason, count in counts.items()]


def _busy(variant: VariantMetrics) -> Samples:
    return [({"device": variant.facts.device}, variant.lane_s)]


def _backend_facts(variant: VariantMetrics) -> Samples:
    return [({"fact": name}, value) for name, value in sorted(variant.backend_facts.items())]


def _sequence_ends(variant: VariantMetrics) -> Samples:
    return [({"how": how}, count) for how, count in variant.sequences_ended.items()]


def _worker_up(variant: VariantMetrics) -> Samples:
    workers = variant.workers()
    return [] if workers is None else _only(float(workers.are_there))


def _worker_losses(variant: VariantMetrics) -> Samples:
    workers = variant.workers()
    return [] if workers is None else [({"cause": cause}, count) for cause, count in workers.losses.items()]


def _lanes(variant: VariantMetrics) -> Samples:
    return [({"device": variant.facts.device}, variant.facts.lanes)]


def _info(variant: VariantMetrics) -> Samples:
    facts = variant.facts
    labels = {"passes": ",".join(facts.passes), "backend": facts.backend, "device": facts.device}
    return [(labels | {"state": facts.state, "reason": facts.reason, "undecided": facts.doubt}, 1)]


def _quality(variant: VariantMetrics) -> Samples:
    quality = variant.facts.quality
    outputs = [("", quality), *((str(output["name"]), output) for output in quality.get("outputs", ()))]
    return [({"measure": measure, "output": name}, value) for name, own in outputs for measure, value in _measures(own)]


def _measures(values: Mapping[str, Json], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _measures(value, f"{prefix}{name}_")
        elif isinstance(value, int | float) and name not in {"channel", "worst_row"} and math.isfinite(value):
            yield f"{prefix}{name}", value


def _build_seconds(variant: VariantMetrics) -> Samples:
    # A pass may occur twice in a variant: its position keeps the two apart.
    named = enumerate(zip(variant.facts.passes, variant.facts.build_seconds, strict=True), start=1)
    return [({"pass": kind, "position": str(position)}, seconds) for position, (kind, seconds) in named]


REQUESTS = (
    Family("leanserve_requests", "counter", "Requests, by how they ended.", _outcomes),
    Family("leanserve_request_duration_seconds", "histogram", "Time in the service, by outcome.", _durations),
)
"""For every variant, and with an empty `version` for the requests that reached none."""

FACTS = (
    Family("leanserve_variant_info", "gauge", "1; the labels describe the variant.", _info),
    Family("leanserve_variant_quality", "gauge", "The quality report, by measure and output.", _quality),
    Family("leanserve_build_seconds", "gauge", "Seconds that each build pass took.", _build_seconds),
)
"""For every variant, whatever its state."""

TRAFFIC = (
    Family("leanserve_queue_duration_seconds", "histogram", "Queue time, per request.", lambda v: _only(v.queue)),
    Family("leanserve_inference_duration_seconds", "histogram", "Device time, per batch.", lambda v: _only(v.infer)),
    Family("leanserve_batch_rows", "histogram", "Rows per batch, padding excluded.", lambda v: _only(v.rows)),
    Family("leanserve_padding_rows", "counter", "Rows added to fill a batch.", lambda v: _only(v.padding_rows)),
    Family(
        "leanserve_padding_tokens", "counter", "Positions added to shorter rows.", lambda v: _only(v.padding_tokens)
    ),
    Family("leanserve_queue_rows", "gauge", "Rows in the queue now.", lambda v: _only(v.queue_rows())),
    Family("leanserve_device_busy_seconds", "counter", "Seconds in which lanes of the device ran the variant.", _busy),
    Family(
        "leanserve_stuck_batches", "counter", "Batches given up, as they did not end.", lambda v: _only(v.stuck_batches)
    ),
    Family("leanserve_backend_facts", "counter", "What backends told of their batches, summed.", _backend_facts),
    Family("leanserve_sequences", "gauge", "Sequences that are open now.", lambda v: _only(v.sequences)),
    Family("leanserve_sequences_ended", "counter", "Sequences that are over, by how they ended.", _sequence_ends),
    Family("leanserve_worker_up", "gauge", "1 while the variant's worker processes are all there.", _worker_up),
    Family("leanserve_worker_restarts", "counter", "Workers lost and started again, by cause.", _worker_losses),
    Family("leanserve_device_lanes", "gauge", "Batches that the variant's device runs at a time.", _lanes),
    Family("nv_inference_request_success", "unknown", "Requests answered.", lambda v: _only(v.requests["ok"].count)),
    Family("nv_inference_request_failure", "unknown", "Requests not answered, by Triton's reason.", _failures),
    Family("nv_inference_count", "unknown", "Rows executed.", lambda v: _only(v.rows.total)),
    Family("nv_inference_exec_count", "unknown", "Batches executed.", lambda v: _only(v.rows.count)),
    Family("nv_inference_pending_request_count", "gauge", "Queued requests.", lambda v: _only(v.queue_requests())),
    Family(
        "nv_inference_request_duration_us",
        "unknown",
        "Total time in service.",
        lambda v: _micros(v.requests["ok"].total),
    ),
    Family("nv_inference_queue_duration_us", "unknown", "Total time in queue.", lambda v: _micros(v.queue.total)),
    Family(
        "nv_inference_compute_input_duration_us", "unknown", "Forming batches.", lambda v: _micros(v.input_request_s)
    ),
    Family("nv_inference_compute_infer_duration_us", "unknown", "Computing.", lambda v: _micros(v.infer_request_s)),
    Family(
        "nv_inference_compute_output_duration_us",
        "unknown",
        "Splitting batches.",
        lambda v: _micros(v.output_request_s),
    ),
)
"""For the variants that passed their gate, unloaded ones included. Triton's durations are summed over requests."""


class Metrics(Collector):
    """The metrics of all variants of one model; made once, by the composition root."""

    def __init__(
        self,
        model: str,
        sources: Sources | None = None,
        caveats: Sequence[str] = (),
        ready: Callable[[], bool] = lambda: True,
        threads: int | None = None,
    ) -> None:
        """`ready` is asked at scrape; `sources` are this machine's by default; `threads` is the budget for CPUs."""
        sources = sources or Sources(nvml=initialised_nvml())
        self.model = model
        self.caveats = caveats
        self.variants: dict[str, VariantMetrics] = {}
        self.unrouted = VariantMetrics("", VariantFacts())
        """Counts the requests that reached no variant: unknown path or variant, malformed input."""
        self.experiment = ExperimentMetrics()
        self._ready = ready
        self._hardware = HardwareMetrics(sources, threads)
        self._registry = _registry(self, sources.proc)

    def add(self, name: str, facts: VariantFacts) -> VariantMetrics:
        """Start to export a variant (replacing one of the same name); the result is what its serving code writes to."""
        self.variants[name] = VariantMetrics(name, facts)
        return self.variants[name]

    def remove(self, name: str) -> None:
        """Export a variant no more."""
        self.variants.pop(name, None)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The page for Prometheus and its content type; OpenMetrics where the `Accept` header asks for it."""
        self.catch_up()
        return self.page(accept)

    def catch_up(self) -> None:
        """Count what was put off; on the thread of the event loop."""
        for variant in self.variants.values():
            variant.catch_up()

    def page(self, accept: str = "") -> tuple[bytes, str]:
        """As `render`, of what is counted, on any thread, but one at a time.

        A number that the loop changes meanwhile is of before or of after; a sum may be one request behind its count.
        """
        return _page(self._registry, accept)

    def collect(self) -> Iterator[Metric]:
        """Build every family from the current numbers."""
        variants = list(self.variants.values())
        serving = [variant for variant in variants if variant.facts.state != "excluded"]
        for families, shown in ((REQUESTS, [*variants, self.unrouted]), (FACTS, variants), (TRAFFIC, serving)):
            yield from (self._metric(family, shown) for family in families)
        yield self._base_info()
        yield from _state(built=1.0, ready=self._ready())
        yield from self.experiment.collect(self.model)
        yield from self._hardware.collect(self.model, serving)

    def joules(self, name: str) -> float | None:
        """Energy of the device while it ran a variant, as of the last scrape; `None` where it cannot be read."""
        return self._hardware.joules.get(name)

    def _base_info(self) -> Metric:
        metric = Metric("leanserve_base_info", "1; the labels describe the base.", "gauge")
        metric.add_sample(metric.name, {"model": self.model, "caveats": ", ".join(self.caveats)}, 1)
        return metric

    def _metric(self, family: Family, variants: Iterable[VariantMetrics]) -> Metric:
        metric = Metric(family.name, family.text, family.kind)
        for variant in variants:
            for labels, value in family.read(variant):
                _add(metric, {"model": self.model, "version": variant.name} | labels, value)
        return metric


class StartMetrics(Collector):
    """The metrics of a service that is starting, and knows no base yet."""

    def __init__(self, startup: Startup, proc: Path = Path("/proc")) -> None:
        self._startup = startup
        self._registry = _registry(self, proc)

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """As `Metrics.render`."""
        return _page(self._registry, accept)

    def collect(self) -> Iterator[Metric]:
        """Not ready, and how much of the build is done."""
        return _state(built=self._startup.built, ready=False)


def _state(*, built: float, ready: bool) -> Iterator[Metric]:
    yield single_gauge("leanserve_ready", "1 while requests are answered; 0 while starting and draining.", float(ready))
    yield single_gauge("leanserve_build_progress", "Share (0-1) of the build that is done.", built)


def _registry(collector: Collector, proc: Path) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    ProcessCollector(registry=registry, proc=str(proc))
    return registry


def _page(registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


def _add(metric: Metric, labels: dict[str, str], value: float | BucketCounts) -> None:
    if not isinstance(value, BucketCounts):
        metric.add_sample(metric.name + ("_total" if metric.type == "counter" else ""), labels, value)
        return
    cumulative = list(accumulate(value.counts))
    for bound, count in zip((*value.bounds, math.inf), cumulative, strict=True):
        edge = "+Inf" if math.isinf(bound) else str(bound)
        metric.add_sample(f"{metric.name}_bucket", labels | {"le": edge}, count)
    metric.add_sample(f"{metric.name}_count", labels, cumulative[-1])
    metric.add_sample(f"{metric.name}_sum", labels, value.total)
