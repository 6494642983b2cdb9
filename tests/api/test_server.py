"""The server around the app: when it says that it is ready, and what a signal does before and afterwards."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from fakes import Opened, open_variants
from leanserve.api.server import Address, Interrupted, run_server
from leanserve.api.service import Service
from leanserve.config.schema import EmbeddingsConfig
from leanserve.errors import ConfigError
from leanserve.http.listening import listen
from leanserve.serving.opening import WarmFleet


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """The garbage collector as it was: a server sets it for a process of its own."""
    thresholds = gc.get_threshold()
    yield
    gc.unfreeze()
    gc.set_threshold(*thresholds)


@pytest.fixture
def opened() -> Iterator[Opened]:
    gate = threading.Event()
    gate.set()
    found = open_variants(gate)
    yield found
    found.warm.close()


def test_who_is_told_that_it_is_ready_finds_somebody(opened: Opened) -> None:
    claimed = listen("127.0.0.1", 0)
    address = claimed.getsockname()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, 5)
    told: list[Service] = []

    def announce(ready: Service) -> None:
        socket.create_connection(address, 5).close()
        told.append(ready)
        for _ in range(2):  # the second one skips the delay of the drain
            os.kill(os.getpid(), signal.SIGTERM)

    run_server(opened.config, Address(claimed), opened, announce)
    assert [ready.fleet.device for ready in told] == [opened.warm.device]


def test_a_start_and_a_drain_are_told_to_who_watches_over_grpc_and_not_held_up_by_that() -> None:
    gate = threading.Event()
    gate.set()
    opened = open_variants(gate, drain={"delay_s": 0.3, "timeout_s": 10})
    with socket.create_server(("127.0.0.1", 0)) as free:
        grpc_at = free.getsockname()
    seen: list[str] = []
    watched = threading.Event()

    def watch() -> None:
        with grpc.insecure_channel(f"127.0.0.1:{grpc_at[1]}") as channel:
            for reply in HealthStub(channel).Watch(HealthCheckRequest(), timeout=20, wait_for_ready=True):
                seen.append(HealthCheckResponse.ServingStatus.Name(reply.status))
                watched.set()
                if seen[-1] == "SERVING":
                    os.kill(os.getpid(), signal.SIGTERM)

    class Watched(Opened):
        def run(self) -> WarmFleet:
            assert watched.wait(20)
            return self.warm

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run_server(opened.config, Address(listen("127.0.0.1", 0), grpc_at), Watched(opened.config, opened.warm))
    finally:
        watcher.join(20)
        opened.warm.close()
    assert seen == ["NOT_SERVING", "SERVING", "NOT_SERVING"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_starting_ends_it_at_once(opened: Opened, number: signal.Signals) -> None:
    stopped = threading.Event()

    class Slow(Opened):
        def run(self) -> WarmFleet:
            os.kill(os.getpid(), number)
            stopped.wait(20)
            return self.warm

        def stop(self) -> None:
            stopped.set()

    began = time.monotonic()
    with pytest.raises(Interrupted) as ended:
        run_server(opened.config, Address(listen("127.0.0.1", 0)), Slow(opened.config, opened.warm))
    assert ended.value.number == number
    assert time.monotonic() - began < 2


def test_what_fails_when_the_fleet_is_made_ends_the_start(opened: Opened) -> None:
    asked = opened.config.model_copy(update={"embeddings": EmbeddingsConfig(token_ids="own")})
    with pytest.raises(ConfigError, match="the base 'pixels' gives no embeddings of texts"):
        run_server(asked, Address(listen("127.0.0.1", 0)), opened)
