"""From a read config to variants that are warm, while the server listens already: open, build in a child, load, warm.

The build has a process of its own, so that compression can neither stall the server nor leak into it. It shows its own
progress on the terminal, and tells it here by lines through a pipe.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from leanserve.child import command, how_it_ended
from leanserve.config.changes import refuse_fixed
from leanserve.config.rewriting import write_traffic
from leanserve.config.schema import ServiceConfig, read_config
from leanserve.contracts import Base
from leanserve.disk import may_write
from leanserve.errors import ConfigError, StartupError
from leanserve.telemetry.startup import BuildNews, Startup
from leanserve.timing import MEASURE_S

if TYPE_CHECKING:
    from leanserve.api.access import Key
    from leanserve.context import AppContext
    from leanserve.serving.opening import WarmFleet
    from leanserve.serving.replanning import FleetPlan

logger = logging.getLogger(__name__)

BUILD_NICE = 19
"""Priority of a build beside a service that answers: it gets what the service leaves, and a seventieth of a core."""
END_S = 5.0
"""How long a build has to end when it is asked to; then it is killed, which loses no more."""


class BuildFailed(Exception):
    """The build ended with this exit status, and has said why."""

    def __init__(self, status: int) -> None:
        super().__init__(f"the build {how_it_ended(status)}")
        self.status = status


class ServiceStart:
    """An `api.server.Start`; `close` it when nobody waits for it any more."""

    def __init__(
        self,
        path: Path,
        cache: Path | None,
        config: ServiceConfig,
        warn: Callable[[str], None] = logger.warning,
        measure_s: float = MEASURE_S,
        environ: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`measure_s` bounds the time that the build takes for timing; `environ` may hold keys."""
        self.startup = Startup(variant.name for variant in config.variants)
        self._path = path
        self._cache = cache
        self._config = config
        self._warn = warn
        self._measure_s = measure_s
        self._environ = environ
        self._build: subprocess.Popen[bytes] | None = None
        self._stopped = False
        self._changing = threading.Lock()

    def run(self) -> WarmFleet:
        """Open what is to be served.

        Raises:
            StartupError: the base, the build, a gate or a variant is not as it must be.
            BuildFailed: the build has said what is not.
        """
        from leanserve.context import AppContext

        work = AppContext(self._path, self._cache, config=self._config, where="apart")
        self.startup.model = work.base.name
        if work.missing:
            logger.info("%s; building what is missing, GET /readyz tells how far it is", work.missing)
            self.build_in_child(work.store.root)
        else:
            work.store.sweep()
            if work.elsewhere:
                self._warn(work.elsewhere)
        self.startup.all_built()
        return work.open_variants(self.startup)

    def stop(self) -> None:
        """End the build, if one is running. What else is going on ends with the process."""
        with self._changing:
            if self._build is not None and not self._stopped:
                self._build.send_signal(signal.SIGTERM)
            self._stopped = True

    def close(self) -> None:
        """Stop, and wait until no build is running any more."""
        self.stop()
        if self._build is not None:
            try:
                self._build.wait(END_S)
            except subprocess.TimeoutExpired:
                self._build.kill()
                self._build.wait()

    @property
    def experiments(self) -> Path | None:
        """The file of the config, else one in the cache folder; `None` where that is read-only."""
        if self._config.experiment.store is not None:
            return self._config.experiment.store
        root = self._cache or self._config.cache
        if not may_write(root):
            logger.warning("cache folder %s: it is read-only: experiments are forgotten with the process", root)
            return None
        return root / f"experiments-{self._path.stem}.sqlite"

    def write_traffic(self, weights: Mapping[str, float], caps: Mapping[str, float]) -> None:
        """Into the config file. Raises as `config.rewriting`."""
        write_traffic(self._path, weights, caps)

    def reload(self, current: ServiceConfig, base: Base) -> ConfigReload:
        """What the file says now, for a service that runs with the config and base that it has."""
        return ConfigReload(self, self._path, self._cache, current, base)

    def keys_of(self, config: ServiceConfig) -> Sequence[Key]:
        """The keys of a config, as they are now. Raises `ConfigError` where one is missing."""
        from leanserve.api.keys import keys_of

        return keys_of(config.auth, self._path, self._environ)

    def build_in_child(self, cache: Path, nice: int = 0) -> None:
        """Build what is missing from a cache; waits for it.

        Raises:
            BuildFailed: it has said why. StartupError: it was killed.
        """
        reading, writing = os.pipe()
        paths = ("--config", str(self._path), "--cache", str(cache))
        arguments = ("build", *paths, "--measure-seconds", str(self._measure_s), "--tell", str(writing))
        try:
            with self._changing:
                if self._stopped:
                    raise BuildFailed(-signal.SIGTERM)
                self._build = subprocess.Popen(command("leanserve", *arguments), pass_fds=[writing])
                if nice and sys.platform == "linux":
                    os.setpriority(os.PRIO_PROCESS, self._build.pid, nice)
        finally:
            os.close(writing)
        # What the build has started itself may hold the pipe open for longer than the build runs.
        threading.Thread(target=self._listen, args=(reading,), name="build-news", daemon=True).start()
        status = self._build.wait()
        if status > 0:
            raise BuildFailed(status)
        if status < 0:
            remedy = "give it more memory, or run `leanserve build` where there is more"
            raise StartupError(f"the build {how_it_ended(status)}; {remedy}")

    def _listen(self, reading: int) -> None:
        with os.fdopen(reading, encoding="utf-8") as lines:
            for line in lines:
                self.startup.building(BuildNews.from_line(line))


class ConfigReload:
    """An `api.reloading.Reload`: what stands in the config file now, from reading it to a plan of the fleet.

    Nothing of the service that runs is touched.
    """

    def __init__(self, start: ServiceStart, path: Path, cache: Path | None, current: ServiceConfig, base: Base) -> None:
        self._start = start
        self._path = path
        self._cache = cache
        self._current = current
        self._base = base
        self._work: AppContext | None = None

    def read(self) -> ServiceConfig:
        """The config, if a service that runs can take it.

        Raises:
            StartupError: something in the file is wrong, or differs in what cannot change.
        """
        config = read_config(self._path)
        refuse_fixed(self._path, self._current, config)
        self._work = self._opened(config)
        return config

    def keys(self) -> Sequence[Key]:
        """The keys of that config, as they are now.

        Raises:
            StartupError: one is missing.
        """
        assert self._work is not None
        return self._start.keys_of(self._work.config)

    def build(self) -> None:
        """Build what is missing, in a child of the lowest priority; waits for it.

        Raises:
            StartupError: it could not be built.
        """
        assert self._work is not None
        if self._work.missing:
            logger.info("%s; building what is missing", self._work.missing)
            failed = None
            try:
                self._start.build_in_child(self._work.store.root, BUILD_NICE)
            except BuildFailed as error:
                failed = error
            self._work = self._opened(self._work.config)
            if failed is not None and self._work.missing:  # else it was a gate, of which the plan will tell
                raise StartupError(f"{failed}; it has said why before this line")

    def plan(self, lanes: int) -> FleetPlan:
        """What is to be served, on so many lanes.

        Raises:
            StartupError: a variant fails a gate that says so, or none is left.
        """
        assert self._work is not None
        return self._work.plan_fleet(lanes)

    def _opened(self, config: ServiceConfig) -> AppContext:
        from leanserve.config.yaml import read_yaml
        from leanserve.context import AppContext

        work = AppContext(self._path, self._cache, config=config, where="apart")
        if work.base.digest != self._base.digest:
            place = read_yaml(self._path).place(["base"])
            raise ConfigError(f"{place}: base: the files of the base or its data have changed; start the service again")
        return work
