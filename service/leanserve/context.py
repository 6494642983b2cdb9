"""The rooms put together: a read config with its base, plan and store, and the fleet that serves it."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from leanserve.errors import ConfigError, StartupError

if TYPE_CHECKING:
    from collections.abc import Callable

    from leanserve.artifacts.manifest import VariantReport
    from leanserve.artifacts.store import ArtifactStore
    from leanserve.build.builder import Plan
    from leanserve.build.progress import BuildProgress
    from leanserve.config.schema import ServiceConfig
    from leanserve.contracts import Backend, Base
    from leanserve.serving.fleet import Fleet
    from leanserve.telemetry.startup import Startup


class AppContext:
    """A read config with its base, plan and store: what every command starts from."""

    def __init__(
        self, path: Path, cache: Path | None, *, make_cache: bool = True, config: ServiceConfig | None = None
    ) -> None:
        """`config` is what stands in the file at `path`, if it was read already."""
        from leanserve.bases.opening import Origin, open_base
        from leanserve.build.builder import plan, shortfall
        from leanserve.build.needs import require_data, require_machine
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
            folder=path.resolve().parent,
            cache=root.resolve() if make_cache else None,
        )
        self.base: Base = open_base(origin)
        self.plan: Plan = plan(self.config, self.base)
        require_machine(self.config, os.environ.get("CXX", "g++"))
        budget = thread_budget()
        self.threads: int = budget if self.config.threads == "auto" else self.config.threads
        self.spare = self.threads < budget
        """Whether the lanes leave a core of those that may be used."""
        if self.config.lanes != "auto" and self.config.lanes > self.threads:
            where = read_yaml(path).place(["lanes"])
            raise ConfigError(
                f"{where}: lanes is {self.config.lanes}, but there are only {self.threads} threads to share"
            )
        if make_cache:
            self.missing = shortfall(self.store, self.plan, self.threads)
            """What has to be built or measured first, in words; `None`: nothing."""
            if self.missing is not None and not self.store.writable:
                raise StartupError(
                    f"cache folder {self.store.root}: it is read-only and not complete: {self.missing}; run `leanserve "
                    "build` where it can be written, or set 'cache' or LEANSERVE_CACHE to another folder"
                )
        if not make_cache or self.missing is not None:
            require_data(self.config, self.base)

    @property
    def elsewhere(self) -> str:
        """A warning where the measurements of a read-only cache are of another machine; else empty."""
        from leanserve.build.builder import machines
        from leanserve.hardware import cpu_name

        found = machines(self.store, self.plan, self.threads)
        here = f"{cpu_name()} with {self.threads} thread{'s' if self.threads > 1 else ''}"
        where = f"measured on {' and on '.join(found)}, not on this machine ({here})"
        return f"{where}: the cache is read-only" if found else ""

    def reports(self) -> list[VariantReport]:
        """Every variant's report; raises where a gate says abort, or where none is left to serve."""
        from leanserve.build.builder import reports
        from leanserve.errors import GateFailed

        found = reports(self.store, self.config, self.plan, self.threads)
        if all(report.state == "excluded" for report in found):
            raise GateFailed("; ".join(f"variant '{item.name}' is excluded: {item.reason}" for item in found))
        return found

    def lanes(self, reports: list[VariantReport]) -> int:
        """Batches that run at a time: as configured, or as pays for the variants that serve."""
        from leanserve.build.builder import stored_benchmark

        if self.config.lanes != "auto":
            return self.config.lanes
        timed = stored_benchmark(self.store, self.plan, self.threads)
        assert timed is not None  # what is reported was timed
        keys = [report.ancestry[-1].key for report in reports if report.state == "serving"]
        self_contained = all(self.store.format_of(key).self_contained for key in keys)
        return timed.best_lanes(keys, self.threads, self_contained=self_contained)

    def build(self, progress: BuildProgress) -> None:
        """Build, measure and time every artifact of the plan that is missing."""
        from leanserve.build.builder import Builder

        Builder(self.store, self.config, self.base, self.threads, progress).build(self.plan)

    def open_fleet(self, startup: Startup | None = None) -> Fleet:
        """Load and warm every variant that passed its gate, on every lane of the device; `startup` is told of each."""
        from leanserve.artifacts.load import load_model
        from leanserve.config.schema import MAX_BATCH_DEPENDENCE
        from leanserve.runtime.device import Device
        from leanserve.runtime.formats import open_backend
        from leanserve.serving.fleet import Fleet, MeasuredLimits
        from leanserve.telemetry.startup import Startup

        reports = self.reports()
        startup = startup or Startup(report.name for report in reports)
        for report in reports:
            if report.reason is not None:
                startup.exclude(report.name, report.reason)
        device = Device("cpu", self.threads, self.lanes(reports), spare=self.spare)
        fleet = Fleet(self.base, self.config, reports, device)

        alone = sum(report.state == "serving" for report in reports) == 1

        def read(key: str) -> Callable[[int], Backend]:
            return partial(open_backend, load_model(self.store, self.base, key), alone=alone)

        def load(name: str, key: str, threads: int) -> Backend:
            backend = read(key)(threads)
            startup.enter(name, "warming")
            return backend

        for variant, steps in self.plan.recipes:
            report = fleet.reports[variant.name]
            if report.state == "serving":
                key, name, batch = steps[-1].key, variant.name, self.config.batch_of(variant)
                trusts_rows = report.quality.batch_dependence <= MAX_BATCH_DEPENDENCE
                measured = MeasuredLimits(trusts_rows, report.quality.memory_rows)
                startup.enter(name, "loading")
                fleet.open(name, partial(load, name, key), batch, partial(read, key), measured)
                startup.enter(name, "warm")
        return fleet
