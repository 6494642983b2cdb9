"""uvicorn, listening from the first second, with a drain that loses nothing.

While the service starts, on a thread of its own so that the loop answers probes, `starting.py` answers; then the real
app takes its place in one step. A signal while starting ends the start and the process.

Later, on SIGTERM or SIGINT: readiness turns 503 at once, so that load balancers look elsewhere; requests are served for
`drain.delay_s` more; then no new connection is taken and what is open gets `drain.timeout_s` to finish; exit 0.
A second signal skips the delay.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import uvicorn

from leanserve.api.access import Access, Key, is_loopback
from leanserve.api.front import Front
from leanserve.api.reloading import Reload, reload_config
from leanserve.api.routes import HotPath
from leanserve.api.service import Service
from leanserve.api.starting import StartingApp
from leanserve.api.tls import ServedCertificate, TlsFiles
from leanserve.config.schema import ServiceConfig
from leanserve.contracts import Base
from leanserve.errors import ConfigError
from leanserve.http.connection import connections_to
from leanserve.http.ending import EndingConnection
from leanserve.http.limits import HttpLimits
from leanserve.http.listening import allow_descriptors, refuse_connections
from leanserve.http.open_connections import OpenConnections
from leanserve.http.tls_server import Listening, TlsServer
from leanserve.live.director import Director
from leanserve.live.documents import experiment_in_short
from leanserve.live.snapshot import LiveNumbers
from leanserve.serving.decoding import THREADS
from leanserve.serving.fleet import Fleet
from leanserve.serving.opening import WarmFleet
from leanserve.telemetry.startup import Startup

if TYPE_CHECKING:
    from leanserve.api.v2.grpc_server import GrpcServer

logger = logging.getLogger(__name__)

_YOUNG = 50_000
"""Objects that may be new before the garbage collector looks for cycles among them (Python's own value is 700): more
than a body that is parsed on the event loop can hold, or it would run in the midst of that."""
_NEVER = 1_000_000
"""Collections of the middle generation before one of the oldest."""
_SWITCH_S = 0.001
"""While the service starts, a thread that runs Python gives way after this time to another that wants to; Python's own
is 5 ms, several times per probe."""


class Start(Protocol):
    """What opens the variants while the server listens already."""

    @property
    def startup(self) -> Startup:
        """How far it is."""

    def run(self) -> WarmFleet:
        """Open them; on a thread that is there only for this.

        Raises:
            StartupError: it cannot be served. Whatever else ends the start.
        """

    def stop(self) -> None:
        """Give up soon; nobody waits for the result any more. Callable from any thread."""

    @property
    def experiments(self) -> Path | None:
        """The file in which the state of experiments is kept; `None`: nowhere."""

    def write_traffic(self, weights: Mapping[str, float], caps: Mapping[str, float]) -> None:
        """Write who gets the traffic into the config file. Callable from any thread.

        Raises:
            ConfigError: the file is not valid. OSError: it cannot be written.
        """

    def reload(self, current: ServiceConfig, base: Base) -> Reload:
        """What the config file says now, for a service that runs with the config and base that it has."""


class Address(NamedTuple):
    """Where to listen: a socket for HTTP, host and port for gRPC, and the certificate of both."""

    http: socket.socket
    grpc: tuple[str, int] | None = None
    tls: TlsFiles | None = None

    @property
    def is_local(self) -> bool:
        """Whether only this machine reaches both."""
        hosts = [self.http.getsockname()[0], *(() if self.grpc is None else self.grpc[:1])]
        return all(map(is_loopback, hosts))


class Interrupted(Exception):
    """A signal ended the start."""

    def __init__(self, number: int) -> None:
        super().__init__(f"{signal.Signals(number).name} while starting")
        self.number = number


def _nobody(_: Service) -> None:
    """Nobody waits to be told."""


def run_server(
    config: ServiceConfig,
    address: Address,
    start: Start,
    announce: Callable[[Service], None] = _nobody,
    keys: Sequence[Key] = (),
) -> None:
    """Listen, start, and serve until a signal ends it; then drain. Blocks.

    `announce` is called once the service answers: who is told by it and asks at once finds somebody. `keys` are those
    of the config, as `api.keys` has read them.

    Raises:
        Interrupted: a signal came before.
        StartupError: the port for gRPC cannot be had. Whatever `start` raises.
    """
    server = Server(config, address, start, announce, keys)
    server.run(sockets=[address.http])
    if server.failure is not None:
        raise server.failure


class Server(uvicorn.Server):
    """A server that listens before it has a fleet; `failure` is why it never had one."""

    def __init__(
        self,
        config: ServiceConfig,
        address: Address,
        start: Start,
        announce: Callable[[Service], None] = _nobody,
        keys: Sequence[Key] = (),
    ) -> None:
        self._access = Access(keys, config.cors.origins, local=address.is_local)
        self._front = Front(StartingApp(start.startup, config, self._access))
        self._connections = OpenConnections(_kept_limits(config))
        super().__init__(
            uvicorn.Config(
                self._front,
                http=connections_to(self._front.find, self._connections),
                ws="none",
                loop="auto",
                lifespan="off",
                access_log=False,
                log_config=None,
                log_level="warning",
                server_header=False,
                proxy_headers=False,
            )
        )
        self.failure: BaseException | None = None
        self.service: Service | None = None
        self._settings = config
        self._address = address
        self._start = start
        self._announce = announce
        self._certificate = None if address.tls is None else ServedCertificate(address.tls)
        self._grpc: GrpcServer | None = None
        self._is_reload_wanted = False
        self._reloading: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002 - it has its own
        """Listen, and begin to start what is served."""
        await super().startup([])  # with nothing to listen on: it starts what else belongs to it
        self._listening = await self._listen(asyncio.get_running_loop())
        if self._address.grpc is not None:
            from leanserve.api.v2.grpc_server import GrpcPort, start_grpc

            credentials = None if self._certificate is None else self._certificate.grpc_credentials()
            port = GrpcPort(*self._address.grpc, self._connections.limits, credentials)
            self._grpc = await start_grpc(port, self._start.startup, self._access)
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._run_start, args=(loop,), name="start", daemon=True).start()

    async def _listen(self, loop: asyncio.AbstractEventLoop) -> Listening:
        """As uvicorn does, but for TLS, where it counts nobody before the end of the handshake."""
        config, claimed = self.config, self._address.http
        protocol: Callable[..., EndingConnection] = config.http_protocol_class  # type: ignore[assignment]
        made = partial(protocol, config=config, server_state=self.server_state, app_state=self.lifespan.state)
        if (certificate := self._certificate) is None:
            return await loop.create_server(made, sock=claimed, backlog=config.backlog)
        return TlsServer(claimed, made, lambda: certificate.context, self._connections).start(config.backlog)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:  # noqa: ARG002 - it has its own
        """Take no more connections and calls, and let those that are open finish."""
        timeout_s = 0.0 if self.service is None else self._settings.drain.timeout_s
        self._connections.drain()
        await asyncio.gather(self._end_http(timeout_s), self._end_grpc(timeout_s))
        if self.service is not None:
            await self.service.experiments.close()

    async def _end_http(self, timeout_s: float) -> None:
        await refuse_connections(self._address.http, timeout_s / 4)
        self._listening.close()
        self._address.http.close()
        await self._connections.drained(timeout_s)
        for task in list(self.server_state.tasks):
            task.cancel()

    async def _end_grpc(self, timeout_s: float) -> None:
        if self._grpc is not None:
            await self._grpc.stop(timeout_s)

    def _run_start(self, loop: asyncio.AbstractEventLoop) -> None:
        """On the thread of the start: what takes long is done here, and the loop is told what came of it."""
        then: Callable[[], None]
        try:
            with _giving_way():
                warm = self._start.run()
                from leanserve.api.app import create_app

                then = partial(self._take_over, warm, create_app)
        except BaseException as error:
            then = partial(self._fail, error)
        with suppress(RuntimeError):  # the loop was closed meanwhile: nobody waits for it
            loop.call_soon_threadsafe(then)

    def _fail(self, error: BaseException) -> None:
        if self.failure is None:
            self.failure = error
        self.should_exit = True

    def _take_over(self, warm: WarmFleet, create_app: Callable[[Service], HotPath]) -> None:
        if self.should_exit:
            return
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(THREADS, thread_name_prefix="decode"))
        try:
            service = opened_service(warm, self._settings, self._access, self._start)
            self._front.serve(create_app(service))
            if self._grpc is not None:
                self._grpc.serve(service)
        except Exception as error:
            self._fail(error)
            return
        _settle()
        self.service = service
        self._announce(service)
        if self._is_reload_wanted:
            self._begin_reload()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Replaces uvicorn's handlers, which stop accepting at once and end the process by the signal itself."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, number)
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def _hang_up(self) -> None:
        """Reload, after the start or the reload that goes on; or drain, where the config says so."""
        if self._settings.on_sighup == "drain":
            self._end(signal.SIGHUP)
            return
        self._is_reload_wanted = True
        if self.service is not None and self._reloading is None:
            self._begin_reload()

    def _begin_reload(self) -> None:
        self._reloading = asyncio.get_running_loop().create_task(self._reload())

    async def _reload(self) -> None:
        """As often as it is wanted: what changed while a file was read is in the next reading."""
        service = self.service
        while self._is_reload_wanted and service is not None and not service.fleet.draining:
            self._is_reload_wanted = False
            await self._renew_certificate(service.fleet)
            await reload_config(self._start.reload(service.config, service.base), service, self._adopt)
            service = self.service
        self._reloading = None

    async def _renew_certificate(self, fleet: Fleet) -> None:
        """Read it again, whatever becomes of the config."""
        if self._certificate is None:
            return
        try:
            if await fleet.threads.do(self._certificate.read_again):
                logger.warning("tls: the files have changed; new connections go by them")
        except ConfigError as error:
            logger.error("tls: all stays as it was: %s", error)

    def _adopt(self, config: ServiceConfig, keys: Sequence[Key]) -> None:
        """In one step with the fleet: answer by another config, and admit by its keys."""
        from leanserve.api.app import create_app

        assert self.service is not None
        if self._grpc is not None and config.limits.body_bytes != self._settings.limits.body_bytes:
            text = "limits.body_bytes: gRPC keeps %d until the service is started again"
            logger.warning(text, self._settings.limits.body_bytes)
        if changes := self._access.renew(keys):
            logger.warning("keys: %s", ", ".join(changes))
        self._settings = config
        self._connections.keep(_kept_limits(config))
        self.service = service = self.service._replace(config=config)
        service.experiments.reconfigure(config.experiment)
        service.live.hardware = config.hardware
        self._front.serve(create_app(service))
        if self._grpc is not None:
            self._grpc.serve_again(service)

    def _end(self, number: int) -> None:
        if self.service is None:
            self._fail(Interrupted(number))
            self._start.stop()
            return
        if self.service.fleet.draining:
            self._stop()
            return
        if self._reloading is not None:
            self._start.stop()
        self.service.fleet.drain()
        self._connections.drain()
        delay = self._settings.drain.delay_s
        logger.warning("%s: draining, serving %.1f s more", signal.Signals(number).name, delay)
        asyncio.get_running_loop().call_later(delay, self._stop)

    def _stop(self) -> None:
        self.should_exit = True


def opened_service(warm: WarmFleet, config: ServiceConfig, access: Access, start: Start) -> Service:
    """What answers, of what was opened, on the running loop.

    Raises:
        StartupError: the state of experiments cannot be read.
    """
    fleet = Fleet(warm, config.watchdog.limits)
    director = Director(fleet, config.experiment, start.experiments, start.write_traffic)
    live = LiveNumbers(fleet, config.hardware, partial(experiment_in_short, director))
    return Service(fleet, warm.base, config, access, warm.post, director, live)


def _kept_limits(config: ServiceConfig) -> HttpLimits:
    """Those of the config, with as many connections as the system allows."""
    limits = config.limits.http
    return limits._replace(connections=allow_descriptors(limits.connections))


@contextmanager
def _giving_way() -> Iterator[None]:
    """So that the loop answers while other threads import and load.

    Nothing is done about what libraries need Python's lock for: 0.1 to 0.2 s until torch's own is loaded.
    """
    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(_SWITCH_S)
    # What is imported stays. Looking through all of it for cycles, again and again, stops the loop for 0.1 s each time
    # and takes a fifth of the time that importing torch takes; it is done once, in the end.
    gc.set_threshold(_YOUNG, thresholds[1], _NEVER)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*thresholds)


def _settle() -> None:
    """Set the process for serving, once everything that lives as long as it is there."""
    # What start-up made lives as long as the process. Left to the collector, scanning it stops the loop for 20-30 ms
    # again and again: a quarter of the throughput of a tiny model.
    gc.collect()
    gc.freeze()
    # What requests in flight hold is freed by their end; a threshold above it keeps the collector from counting them
    # again and again. Cycles are collected all the same, a little later.
    gc.set_threshold(_YOUNG)
