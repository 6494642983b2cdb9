"""From a read config to variants that are warm, while the server listens already: open, build in a child, load, warm.

The build has a process of its own, so that compression can neither stall the server nor leak into it. It shows its own
progress on the terminal, and tells it here by lines through a pipe.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from leanserve.child import command, how_it_ended
from leanserve.config.schema import ServiceConfig
from leanserve.errors import StartupError
from leanserve.telemetry.startup import BuildNews, Startup
from leanserve.timing import MEASURE_S

if TYPE_CHECKING:
    from leanserve.serving.opening import WarmFleet

logger = logging.getLogger(__name__)

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
    ) -> None:
        """`measure_s` bounds the time that the build takes for timing."""
        self.startup = Startup(variant.name for variant in config.variants)
        self._path = path
        self._cache = cache
        self._config = config
        self._warn = warn
        self._measure_s = measure_s
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
            self._build_in_child(work.store.root)
        else:
            work.store.sweep()
            if work.elsewhere:
                self._warn(work.elsewhere)
        self.startup.all_built()
        return work.open_variants(self.startup)

    def stop(self) -> None:
        """End the build, if one is running. What else is going on ends with the process."""
        with self._changing:
            self._stopped = True
            if self._build is not None:
                self._build.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """Stop, and wait until no build is running any more."""
        self.stop()
        if self._build is not None:
            try:
                self._build.wait(END_S)
            except subprocess.TimeoutExpired:
                self._build.kill()
                self._build.wait()

    def _build_in_child(self, cache: Path) -> None:
        reading, writing = os.pipe()
        paths = ("--config", str(self._path), "--cache", str(cache))
        arguments = ("build", *paths, "--measure-seconds", str(self._measure_s), "--tell", str(writing))
        try:
            with self._changing:
                if self._stopped:
                    raise BuildFailed(-signal.SIGTERM)
                self._build = subprocess.Popen(command("leanserve", *arguments), pass_fds=[writing])
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
