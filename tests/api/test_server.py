"""The server around the app: when it says that it is ready."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
from collections.abc import Iterator

import pytest
from fakes import open_fleet

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
