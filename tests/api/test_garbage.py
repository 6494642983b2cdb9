"""What requests and connections leave for the garbage collector: nothing, or it would stop the loop to look through it.

What holds itself in a circle stays until then, and a body with it.
"""

from __future__ import annotations

import gc
import http.client
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from fakes import Live, live_server

ROW = b'{"inputs": [[[[1, 2, 3, 4], [5, 6, 7, 8]]]]}'
TIMES = 20
REQUESTS = {
    "answered": ("POST", "/v1/predict", ROW),
    "no JSON": ("POST", "/v1/predict", b'{"inputs"'),
    "wrong shape": ("POST", "/v1/predict", b'{"inputs": [1]}'),
    "large and wrong": ("POST", "/v1/predict", b'{"inputs": [' + b"0," * 150_000 + b"0]}"),
    "V2, wrong": ("POST", "/v2/models/pixels/infer", b'{"inputs": []}'),
    "V2, unknown": ("POST", "/v2/models/zebra/infer", b'{"inputs": []}'),
    "no embeddings": ("POST", "/v1/embeddings", b'{"model": "pixels", "input": "a"}'),
    "wrong method": ("GET", "/v1/predict", None),
    "read": ("GET", "/v1/variants", None),
    "unknown": ("GET", "/zebra", None),
}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_server() as server:
        yield server


@contextmanager
def uncollected() -> Iterator[list[str]]:
    """The types of what only the garbage collector would free of all that was made in the block."""
    gc.collect()
    gc.disable()
    kinds: list[str] = []
    try:
        yield kinds
        time.sleep(0.2)  # until the server has seen that its clients left
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        kinds += [type(item).__name__ for item in gc.garbage]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize("asked", REQUESTS.values(), ids=REQUESTS)
@pytest.mark.parametrize("connection", ["kept alive", "closed"])
def test_a_request_leaves_nothing_for_the_garbage_collector(
    live: Live, asked: tuple[str, str, bytes | None], connection: str
) -> None:
    client = http.client.HTTPConnection(*live.host_and_port)

    def ask() -> None:
        client.request(*asked, headers={"content-type": "application/json"})
        client.getresponse().read()
        if connection == "closed":
            client.close()

    ask()  # what is made once (a schema, a cache) is not meant
    with uncollected() as kinds:
        for _ in range(TIMES):
            ask()
        client.close()
    assert len(kinds) < TIMES, set(kinds)


def test_who_leaves_in_the_middle_of_a_body_leaves_nothing_either(live: Live) -> None:
    with uncollected() as kinds:
        for _ in range(TIMES):
            client = http.client.HTTPConnection(*live.host_and_port)
            client.putrequest("POST", "/v1/predict")
            client.putheader("content-length", "3000000")
            with suppress(ConnectionError):
                client.endheaders(b"[" * 100_000)
            client.close()
    assert len(kinds) < TIMES, set(kinds)
