"""The packages put together: a read config with its base, plan and store, and the variants that it opens."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from leanserve.errors import ConfigError, StartupError

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    from collections.abc import Callable

    from leanserve.artifacts.manifest import VariantReport
    from leanserve.artifacts.store import ArtifactStore
    from leanserve.bases.loaded import LoadedBase
    from leanserve.bases.opening import Where
    from leanserve.build.plan import Plan
    from leanserve.build.progress import BuildProgress
    from leanserve.config.schema import ServiceConfig
    from leanserve.config.variant_section import BatchConfig
    from leanserve.contracts import Backend, Json
    from leanserve.hardware import Hardware
    from leanserve.serving.opening import BatchLimits, TrafficPlan, VariantPlan, WarmFleet
    from leanserve.serving.reload import Read
    from leanserve.serving.replanning import FleetPlan, VariantSource
    from leanserve.telemetry.observations import VariantFacts
    from leanserve.telemetry.startup import Startup


class AppContext:
    """A read config with its base, plan and store: what every command starts from."""

    def __init__(
        self,
        path: Path,
        cache: Path | None,
        *,
        make_cache: bool = True,
        config: ServiceConfig | None = None,
        where: Where = "here",
    ) -> None:
        """`config` is what stands in the file at `path`, if it was read already; `where` is that of `open_base`."""
        from leanserve.bases.opening import open_base
        from leanserve.bases.origin import Origin
        from leanserve.build.needs import require_data, require_machine
        from leanserve.build.plan import plan, shortfall
        from leanserve.codecs.image_limits import ImageLimits
        from leanserve.codecs.postprocess.chain import PostChain
        from leanserve.config.schema import read_config
        from leanserve.config.yaml import read_yaml
        from leanserve.hardware import thread_budget

        self.config: ServiceConfig = config or read_config(path)
        root = cache or self.config.cache
        if make_cache:
            from leanserve.artifacts.store import ArtifactStore

            self.store: ArtifactStore = ArtifactStore(root)
        origin = Origin(
            base=self.config.base,
            data=self.config.data,
            score=self.config.score,
            folder=path.resolve().parent,
            images=ImageLimits(self.config.limits.image_pixels, self.config.limits.image_side),
            cache=root.resolve() if make_cache else None,
        )
        self.base: LoadedBase = open_base(origin, where)
        self.post = PostChain(self.config.postprocess, self.base.spec, origin.folder)
        budget = thread_budget()
        threads = budget if self.config.threads == "auto" else self.config.threads
        self.hardware: Hardware = chosen_hardware(self.config, path, threads)
        self.plan: Plan = plan(self.config, self.base, self.hardware)
        require_machine(self.config, os.environ.get("CXX", "g++"))
        if self.config.lanes != "auto" and self.config.lanes > self.threads and not self.hardware.on_gpu:
            line = read_yaml(path).place(["lanes"])
            raise ConfigError(
                f"{line}: lanes is {self.config.lanes}, but there are only {self.threads} threads to share"
            )
        if make_cache:
            self.missing = shortfall(self.store, self.plan, self.hardware)
            """What has to be built or measured first, in words; `None`: nothing."""
            if self.missing is not None and not self.store.writable:
                raise StartupError(
                    f"cache folder {self.store.root}: it is read-only and not complete: {self.missing}; run `leanserve "
                    "build` where it can be written, or set 'cache' or LEANSERVE_CACHE to another folder"
                )
        if not make_cache or self.missing is not None:
            require_data(self.config, self.base, os.environ.get("CXX", "g++"))

    @property
    def threads(self) -> int:
        """CPU threads in the budget."""
        return self.hardware.threads

    @property
    def disturbed(self) -> bool:
        """Whether other work disturbed the timing that is stored, which can be measured again."""
        from leanserve.build.plan import stored_benchmark

        timed = stored_benchmark(self.store, self.plan, self.hardware)
        return self.store.writable and timed is not None and timed.disturbed

    @property
    def elsewhere(self) -> str:
        """A warning where the measurements of a read-only cache are of another machine; else empty."""
        from leanserve.build.plan import machines

        found = machines(self.store, self.plan, self.hardware)
        where = f"measured on {' and on '.join(found)}, not on this machine ({self.hardware.words})"
        return f"{where}: the cache is read-only" if found else ""

    def reports(self) -> list[VariantReport]:
        """Every variant's report; raises where a gate says abort, or where none is left to serve."""
        from leanserve.build.plan import reports
        from leanserve.errors import GateFailed

        found = reports(self.store, self.config, self.plan, self.hardware)
        if all(report.state == "excluded" for report in found):
            raise GateFailed("; ".join(f"variant '{item.name}' is excluded: {item.reason}" for item in found))
        return found

    def lanes(self, reports: list[VariantReport]) -> int:
        """Batches that run at a time: as configured, or as pays for the variants that serve."""
        from leanserve.build.plan import stored_benchmark

        if self.config.lanes != "auto":
            return self.config.lanes
        timed = stored_benchmark(self.store, self.plan, self.hardware)
        assert timed is not None  # what is reported was timed
        keys = [report.ancestry[-1].key for report in reports if report.state == "serving"]
        if self.hardware.on_gpu:
            return timed.best_streams(keys) * len(self.hardware.devices)
        self_contained = all(self.store.format_of(key).self_contained for key in keys)
        return timed.best_lanes(keys, self.threads, self_contained=self_contained)

    def build(self, progress: BuildProgress, measure_s: float) -> None:
        """Build, measure and time every artifact of the plan that is missing; timing takes about so many seconds."""
        from leanserve.build.builder import Builder

        Builder(self.store, self.config, self.base, self.hardware, progress, measure_s).build(self.plan)

    def open_variants(self, startup: Startup | None = None) -> WarmFleet:
        """Load and warm every variant that passed its gate, on every lane of the device; `startup` is told of each."""
        from leanserve.codecs.text import TextCodec
        from leanserve.runtime.device import Device
        from leanserve.serving.opening import WarmFleet
        from leanserve.telemetry.startup import Startup

        reports = self.reports()
        startup = startup or Startup(report.name for report in reports)
        _tell_verdicts(reports, startup)
        lanes = self.lanes(reports)
        device = Device(self.hardware.devices[0], self.threads, lanes, self._processors(lanes))
        warm = WarmFleet(self.base, serving_plans(self.config, reports), device, traffic_plan(self.config), self.post)
        warm.decode_memory = self.config.limits.decode_mb * 2**20
        warm.cuda_visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        warm.report = self._report_document(reports)

        def load(name: str, read: Read, threads: int) -> Backend:
            backend = read()(threads)
            startup.enter(name, "warming")
            return backend

        for report in reports:
            if report.state == "serving":
                name = report.name
                startup.enter(name, "loading")
                source = self._source(report, len(device.lanes), alone=is_alone(reports))
                warm.open(name, partial(load, name, source.read), source.read, source.workers, seated=source.seated)
                startup.enter(name, "warm")
        for variant in warm.variants.values():
            if isinstance(variant.codec, TextCodec):
                variant.codec.open()  # else the first text would wait for its tokenizer
        return warm

    def plan_fleet(self, lanes: int) -> FleetPlan:
        """All of it for a service that runs already, with so many lanes.

        Raises:
            StartupError: something is not as it must be.
        """
        from leanserve.serving.replanning import FleetPlan

        reports = self.reports()
        serving = [report for report in reports if report.state == "serving"]
        sources = {report.name: self._source(report, lanes, alone=is_alone(reports)) for report in serving}
        traffic = traffic_plan(self.config)
        return FleetPlan(serving_plans(self.config, reports), traffic, sources, self._report_document(reports))

    def _report_document(self, reports: list[VariantReport]) -> Json:
        from leanserve.report.document import report_document
        from leanserve.report.summary import summarise

        return report_document(summarise(reports, self.base.caveats, self.elsewhere))

    def _processors(self, lanes: int) -> tuple[int, ...]:
        """One for each thread, where so many lanes may stay on theirs; else none."""
        from leanserve.runtime.linux.processors import own_processors

        if not self.config.pin or self.hardware.on_gpu or lanes not in {1, self.threads}:
            return ()
        return own_processors(self.threads)

    def _source(self, report: VariantReport, lanes: int, *, alone: bool) -> VariantSource:
        """How the model of a variant is read, and its backends are opened: here, or by workers."""
        from leanserve.artifacts.load import load_model
        from leanserve.contracts import Share
        from leanserve.runtime.formats import open_backend
        from leanserve.serving.replanning import VariantSource

        key = report.ancestry[-1].key
        processors = self._processors(lanes) if self.store.format_of(key).places_threads else ()

        def share_of(threads: int) -> Share:
            callers = lanes if self.hardware.on_gpu else max(1, self.threads // threads)
            own = processors if threads == self.threads else ()
            return Share(threads, self.hardware.devices, alone=alone, callers=callers, processors=own)

        if self.config.isolation_of(self.config.variant(report.name)) == "none":

            def read() -> Callable[[int], Backend]:
                model = load_model(self.store, self.base, key)
                return lambda threads: open_backend(model, share_of(threads))

            return VariantSource(read, seated=bool(processors))
        from leanserve.runtime.isolation.backend import IsolatedBackend
        from leanserve.runtime.isolation.life import WorkerProgram
        from leanserve.runtime.isolation.workers import Workers
        from leanserve.worker import WorkerTask

        workers = Workers(report.name, self.config.stuck_after_s)
        batches = lanes if self.hardware.on_gpu or self.store.format_of(key).self_contained else 1

        def open_worker(threads: int) -> Backend:
            task = WorkerTask(str(self.store.root), key, self.base.origin, share_of(threads))
            program = WorkerProgram(report.name, "leanserve.worker", (task.to_argument(),))
            return IsolatedBackend(program, batches, workers)

        return VariantSource(lambda: open_worker, workers)


def chosen_hardware(config: ServiceConfig, path: Path, threads: int) -> Hardware:
    """This machine as variants use it: so many threads, and the devices that the config at `path` wants.

    Raises:
        ConfigError: a device is not there.
    """
    from leanserve.config.yaml import read_yaml
    from leanserve.hardware import this_hardware
    from leanserve.runtime.cuda.choice import chosen_devices, engines_for_cuda
    from leanserve.runtime.cuda.driver import visible_gpus

    if config.device == "cpu":
        return this_hardware(threads)
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as NVML numbers them, for child processes too
    gpus = visible_gpus()
    try:
        devices = chosen_devices(config.device, gpus, engines_for_cuda() if gpus else {})
    except StartupError as error:
        raise ConfigError(f"{read_yaml(path).place(['device'])}: device: {error}") from error
    return this_hardware(threads, gpus, devices)


def _tell_verdicts(reports: Sequence[VariantReport], startup: Startup) -> None:
    """Which variants do not serve, and of which that serve the gate could not decide something."""
    for report in reports:
        if report.reason is not None:
            startup.exclude(report.name, report.reason)
        elif report.doubt is not None:
            logger.warning("variant '%s' serves, undecided: %s", report.name, report.doubt)


def serving_plans(config: ServiceConfig, reports: Sequence[VariantReport]) -> list[VariantPlan]:
    """What serving needs to know of every variant, from its section and its report."""
    from leanserve.config.variant_section import MAX_BATCH_DEPENDENCE
    from leanserve.serving.opening import MeasuredLimits, VariantPlan

    return [
        VariantPlan(
            report.name,
            _facts(report),
            _batch_limits(config.batch_of(config.variant(report.name))),
            MeasuredLimits(report.quality.batch_dependence <= MAX_BATCH_DEPENDENCE, report.quality.memory_rows),
            report.spec,
            config.variant(report.name).device_share,
            _content(config, report, alone=is_alone(reports)),
        )
        for report in reports
    ]


def is_alone(reports: Sequence[VariantReport]) -> bool:
    """Whether a single variant is served, whose threads need not make way for others."""
    return sum(report.state == "serving" for report in reports) == 1


def _content(config: ServiceConfig, report: VariantReport, *, alone: bool) -> str:
    """What decides the backends of a variant, and its processes."""
    isolated = config.isolation_of(config.variant(report.name)) == "process"
    where = f"in workers, stuck after {config.stuck_after_s} s" if isolated else "in the service"
    return f"{report.ancestry[-1].key} {where}{', alone' if alone else ''}"


def traffic_plan(config: ServiceConfig) -> TrafficPlan:
    """Who answers a request that names no variant, and how many sequences are kept."""
    from leanserve.serving.opening import SequenceLimits, TrafficPlan
    from leanserve.serving.traffic import TrafficRules

    kept = config.sequences
    limits = SequenceLimits(kept.most, kept.state_bytes, kept.idle_s)
    rules = TrafficRules(config.traffic.weights, config.traffic.caps)
    return TrafficPlan(rules, config.traffic.sticky_header, limits)


def _batch_limits(batch: BatchConfig) -> BatchLimits:
    from leanserve.serving.opening import BatchLimits

    return BatchLimits(
        max_rows=batch.max_rows,
        max_delay_s=batch.max_delay_ms / 1000,
        queue_rows=batch.queue_rows,
        timeout_s=batch.timeout_ms / 1000,
        levels=batch.priority_levels,
        default_level=batch.default_level,
    )


def _facts(report: VariantReport) -> VariantFacts:
    from leanserve.telemetry.observations import VariantFacts

    passes, last = report.ancestry[1:], report.ancestry[-1]
    return VariantFacts(
        parents=report.parents,
        passes=tuple(str(manifest.kind) for manifest in passes),
        simulated=tuple(str(manifest.kind) for manifest in report.ancestry if manifest.simulated),
        state=report.state,
        reason=report.reason or "",
        doubt=report.doubt or "",
        quality=report.quality.model_dump() if report.built else {},
        build_seconds=tuple(manifest.seconds for manifest in passes),
        cpu=last.cpu,
        threads=last.threads,
    )
