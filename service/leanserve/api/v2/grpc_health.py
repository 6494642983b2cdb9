"""`grpc.health.v1`: whether this server takes requests, as Kubernetes and load balancers ask over gRPC.

The package `grpcio-health-checking` is told a status and repeats it; here it is looked up when somebody asks, so that
it cannot be another one than that of REST. And what is followed ends with the server: open streams would hold up a
drain until its timeout.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from leanserve.api.v2.grpc_messages import SERVICE, message
from leanserve.codecs.tensors import clip
from leanserve.errors import NotFound

HEALTH = "grpc.health.v1.Health"
SERVICES = ("", SERVICE)
"""Whose health may be asked for; the empty name is the whole server. Both are the same."""
REQUEST, RESPONSE = "grpc.health.v1.HealthCheckRequest", "grpc.health.v1.HealthCheckResponse"


class Health:
    """One method per call of the protocol."""

    def __init__(self, ready: Callable[[], bool]) -> None:
        """`ready` is asked; whoever knows that it answers otherwise now calls `changed`."""
        self._ready = ready
        self._changed = asyncio.Event()
        self._stopped = False

    async def check(self, request: Any, _: Any) -> Any:
        """The status now. Raises `NotFound` for a service that is not one of `SERVICES`."""
        if request.service not in SERVICES:
            raise NotFound(f"no service {clip(request.service)}; there is {SERVICE}")
        return message(RESPONSE)(status=self._status())

    async def watch(self, request: Any, _: Any) -> AsyncIterator[Any]:
        """The status now, and whenever it changes, until the client leaves or the server stops."""
        told = ""
        while not self._stopped:
            changed = self._changed  # before the look, so that no change is missed
            status = self._status() if request.service in SERVICES else "SERVICE_UNKNOWN"
            if status != told:
                yield message(RESPONSE)(status=status)
                told = status
            await changed.wait()

    def stop(self) -> None:
        """End what is followed."""
        self._stopped = True
        self.changed()

    def _status(self) -> str:
        return "SERVING" if self._ready() else "NOT_SERVING"

    def changed(self) -> None:
        """Have those who watch told, if it is another status. On the loop only."""
        self._changed.set()
        self._changed = asyncio.Event()
