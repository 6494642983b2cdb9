"""uvicorn, with a drain that loses nothing.

On SIGTERM or SIGINT: readiness turns 503 at once, so that load balancers look elsewhere; requests are served for
`drain.delay_s` more; then no new connection is taken and what is open gets `drain.timeout_s` to finish; exit 0.
A second signal skips the delay.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from service.api.app import create_app
from service.api.connection import connections_to
from service.serving.fleet import Fleet

logger = logging.getLogger(__name__)

_YOUNG = 10_000
"""Objects that may be new before the garbage collector looks for cycles among them (Python's own value is 700)."""


def listen(host: str, port: int) -> socket.socket:
    """Claim the port before hours of building, rather than fail after them.

    Raises:
        OSError: the address is in use or not ours.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    claimed = socket.socket(family, socket.SOCK_STREAM)
    claimed.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Inherited by connections; without it a reply in two writes waits for the client's delayed acknowledgement.
    claimed.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        claimed.bind((host, port))
    except OSError:
        claimed.close()
        raise
    return claimed


def serve_fleet(
    fleet: Fleet,
    claimed: socket.socket,
    grpc_at: tuple[str, int] | None = None,
    announce: Callable[[], None] = lambda: None,
) -> None:
    """Serve HTTP on the claimed port, and gRPC where asked, until a signal ends it; then drain. Blocks.

    `announce` is called once the ports listen: who is told by it and asks at once finds somebody.
    """
    app = create_app(fleet, grpc_at)
    config = uvicorn.Config(
        app,
        http=connections_to(app),
        ws="none",
        loop="auto",
        lifespan="on",
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=max(1, round(fleet.config.drain.timeout_s)),
    )
    # What start-up made lives as long as the process. Left to the collector, scanning it stops the loop for 20-30 ms
    # again and again: a quarter of the throughput of a tiny model.
    gc.collect()
    gc.freeze()
    # What requests in flight hold is freed by their end; a threshold above it keeps the collector from counting them
    # again and again. Cycles are collected all the same, a little later.
    gc.set_threshold(_YOUNG)
    _DrainingServer(config, fleet, announce).run(sockets=[claimed])


class _DrainingServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, fleet: Fleet, announce: Callable[[], None]) -> None:
        super().__init__(config)
        self._fleet = fleet
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:  # else the application did not start, and said why
            self._announce()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Replaces uvicorn's handlers, which stop accepting at once and end the process by the signal itself."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._drain, number)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _drain(self, number: int) -> None:
        if self._fleet.draining:
            self._stop()
            return
        self._fleet.drain()
        delay = self._fleet.config.drain.delay_s
        logger.warning("%s: draining, serving %.1f s more", signal.Signals(number).name, delay)
        asyncio.get_running_loop().call_later(delay, self._stop)

    def _stop(self) -> None:
        self.should_exit = True
