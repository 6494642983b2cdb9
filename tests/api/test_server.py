"""The server around the app: when it says that it is ready, and that it is no longer."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
from collections.abc import Iterator

import grpc
import pytest
from fakes import open_fleet
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from service.api.server import listen, serve_fleet


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """The garbage collector as it was: a server sets it for a process of its own."""
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


def test_who_is_told_that_it_is_ready_finds_somebody() -> None:
    gate = threading.Event()
    gate.set()
    fleet = open_fleet(gate)
    claimed = listen("127.0.0.1", 0)
    address = claimed.getsockname()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, 5)
    told: list[str] = []

    def announce() -> None:
        socket.create_connection(address, 5).close()
        told.append("ready")
        for _ in range(2):  # the second one skips the delay of the drain
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        serve_fleet(fleet, claimed, None, announce)
    finally:
        fleet.close()
    assert told == ["ready"]


def test_a_drain_is_told_to_who_watches_over_grpc_and_not_held_up_by_that() -> None:
    gate = threading.Event()
    gate.set()
    fleet = open_fleet(gate, drain={"delay_s": 0.3, "timeout_s": 10})
    with socket.create_server(("127.0.0.1", 0)) as free:
        grpc_at = free.getsockname()
    seen: list[str] = []

    def watch() -> None:
        with grpc.insecure_channel(f"127.0.0.1:{grpc_at[1]}") as channel:
            for reply in HealthStub(channel).Watch(HealthCheckRequest(), timeout=20):
                seen.append(HealthCheckResponse.ServingStatus.Name(reply.status))
                if seen == ["SERVING"]:
                    os.kill(os.getpid(), signal.SIGTERM)

    watcher = threading.Thread(target=watch)
    try:
        serve_fleet(fleet, listen("127.0.0.1", 0), grpc_at, watcher.start)
    finally:
        watcher.join(20)
        fleet.close()
    assert seen == ["SERVING", "NOT_SERVING"]
