"""CORS: what browsers are told on every path and both ways of a connection; and nothing where it is off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from fakes import live_server
from raw_client import Client

PAGE, OTHER = "https://app.example.com", "https://other.example.com"
EXPOSED = {
    "traceparent",
    "www-authenticate",
    "x-request-id",
    "inference-header-content-length",
    "retry-after",
    "x-batch-rows",
    "x-caveats",
    "x-experiment",
    "x-inference-ms",
    "x-queue-ms",
    "x-variant",
}
INFER = "/v2/models/pixels/infer"
TENSOR = {"name": "image", "shape": [1, 1, 2, 2], "datatype": "FP32", "data": [0, 1, 2, 3]}
PATHS: list[tuple[str, str, Any, int]] = [
    ("POST", INFER, {"inputs": [TENSOR]}, 200),
    ("POST", INFER, {"inputs": []}, 400),
    ("POST", "/v1/predict", {"inputs": [[0, 0], [255, 0]]}, 200),
    ("POST", "/v1/predict", {"inputs": "x" * 5000}, 413),
    ("GET", "/v1/predict", None, 405),
    ("POST", "/v2/models/nothing/infer", {}, 404),
    ("GET", "/v1/models", None, 200),
    ("GET", "/v1/models/nothing", None, 404),
    ("GET", "/v1/variants", None, 200),
    ("GET", "/readyz", None, 200),
    ("HEAD", "/metrics", None, 200),
    ("GET", "/nothing", None, 404),
    ("POST", "/healthz", {}, 405),
]


@contextmanager
def asked(**cors: Any) -> Iterator[httpx.Client]:
    with (
        live_server(limits={"body_bytes": 4096}, cors=cors) as live,
        httpx.Client(base_url=f"http://{live.http}") as http,
    ):
        yield http


@pytest.fixture(scope="module")
def named() -> Iterator[httpx.Client]:
    with asked(origins=[PAGE, "http://localhost:3000"], credentials=True, headers=["X-Mine"], max_age_s=7) as http:
        yield http


@pytest.fixture(scope="module")
def anybody() -> Iterator[httpx.Client]:
    with asked(origins=["*"]) as http:
        yield http


@pytest.fixture(scope="module")
def nobody() -> Iterator[httpx.Client]:
    with asked() as http:
        yield http


def told(reply: httpx.Response) -> dict[str, str]:
    """What concerns CORS among the headers of a reply."""
    shown = {name.removeprefix("access-control-"): text for name, text in reply.headers.items() if "access-c" in name}
    others = {"accept", "accept-encoding"}  # of /metrics, to everybody
    vary = [name for name in reply.headers.get("vary", "").split(", ") if name and name not in others]
    return shown | ({"vary": ", ".join(vary)} if vary else {})


def preflight(http: httpx.Client, path: str, origin: str, headers: str | None = None) -> httpx.Response:
    asks = {"origin": origin, "access-control-request-method": "POST"}
    return http.options(path, headers=asks | ({"access-control-request-headers": headers} if headers else {}))


@pytest.mark.parametrize(("method", "path", "body", "status"), PATHS)
def test_a_named_page_may_read_every_reply(named: httpx.Client, method: str, path: str, body: Any, status: int) -> None:
    for _ in range(2):  # the second time predictions take the short way
        reply = named.request(method, path, json=body, headers={"origin": PAGE})
        assert reply.status_code == status
        assert {name for name in reply.headers if name.startswith("x-")} <= EXPOSED
        shown = told(reply)
        assert set(shown.pop("expose-headers").split(", ")) == EXPOSED
        assert shown == {"allow-origin": PAGE, "allow-credentials": "true", "vary": "origin"}


@pytest.mark.parametrize("origin", [OTHER, "null", PAGE.upper(), PAGE + ":8443", None])
@pytest.mark.parametrize(("method", "path", "body", "status"), PATHS)
def test_to_all_others_only_caches_are_told(
    named: httpx.Client, method: str, path: str, body: Any, status: int, origin: str | None
) -> None:
    headers = {} if origin is None else {"origin": origin}
    for _ in range(2):
        reply = named.request(method, path, json=body, headers=headers)
        assert reply.status_code == status
        assert told(reply) == {"vary": "origin"}


@pytest.mark.parametrize("path", [INFER, "/v1/predict", "/v1/variants", "/nothing"])
def test_a_page_asks_before_it_sends(named: httpx.Client, anybody: httpx.Client, path: str) -> None:
    reply = preflight(named, path, PAGE, "content-type,x-mine")
    shown = told(reply)
    assert (reply.status_code, reply.content) == (200, b"")
    assert (shown["allow-origin"], shown["allow-credentials"], shown["max-age"]) == (PAGE, "true", "7")
    assert shown["vary"] == "origin"
    assert shown["allow-methods"] == "GET, HEAD, POST, PUT"
    assert {"content-type", "inference-header-content-length", "x-variant", "x-caller-key", "X-Mine"} <= set(
        shown["allow-headers"].split(", ")
    )
    shown = told(preflight(anybody, path, OTHER, "authorization,x-stainless-lang"))
    assert shown["allow-headers"] == "authorization,x-stainless-lang"
    assert (shown["allow-origin"], shown["max-age"]) == ("*", "600")
    assert "allow-credentials" not in shown
    assert told(preflight(anybody, path, OTHER))["allow-methods"] == "GET, HEAD, POST, PUT"


def test_another_page_asks_in_vain(named: httpx.Client) -> None:
    for path in (INFER, "/v1/variants"):
        reply = preflight(named, path, OTHER)
        assert reply.status_code == 405
        assert told(reply) == {"vary": "origin"}
        assert named.options(path, headers={"origin": PAGE}).status_code == 405, "it does not ask for a method"


@pytest.mark.parametrize(("method", "path", "body", "status"), PATHS)
def test_any_page_may_read_every_reply(anybody: httpx.Client, method: str, path: str, body: Any, status: int) -> None:
    for origin in ({"origin": OTHER}, {}):
        reply = anybody.request(method, path, json=body, headers=origin)
        assert reply.status_code == status
        shown = told(reply)
        assert set(shown.pop("expose-headers").split(", ")) == EXPOSED
        assert shown == {"allow-origin": "*"}


@pytest.mark.parametrize(("method", "path", "body", "status"), PATHS)
def test_nothing_is_told_where_it_is_off(nobody: httpx.Client, method: str, path: str, body: Any, status: int) -> None:
    for _ in range(2):
        reply = nobody.request(method, path, json=body, headers={"origin": PAGE})
        assert reply.status_code == status
        assert told(reply) == {}
    refused = preflight(nobody, path, PAGE)
    assert refused.status_code in {405, 404}
    assert told(refused) == {}


def test_a_head_that_comes_again_is_answered_for_the_origin_in_it() -> None:
    """On one connection and at once, byte for byte as browsers send it."""
    request = "POST {} HTTP/1.1\r\nHost: x\r\nOrigin: {}\r\nContent-Length: 2\r\n\r\n{{}}"
    with live_server(cors={"origins": [PAGE, OTHER]}) as live:
        client = Client(live)
        for _ in range(3):
            for origin in (PAGE, OTHER):
                _, headers, _ = client.ask(request.format(INFER, origin).encode())
                assert headers["access-control-allow-origin"] == origin
        client.close()
