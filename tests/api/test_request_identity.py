"""Every reply tells the id of its request, on every front, and so does every log line about one."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub

from fakes import Live, live_server
from leanserve.api.access import Access
from leanserve.api.front import Front
from leanserve.api.starting import StartingApp
from leanserve.api.v2.grpc_messages import SERVICE, message
from leanserve.config.schema import ServiceConfig
from leanserve.request_identity import RequestIdentities, RequestInLog, request_id
from leanserve.telemetry.startup import Startup
from raw_client import Client

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
TENSOR = {"name": "image", "shape": [1, 1, 2, 2], "datatype": "FP32", "data": [0, 1, 0, 0]}
PREDICT: dict[str, Any] = {"inputs": [[0, 255], [0, 0]]}
INFER: dict[str, Any] = {"inputs": [TENSOR]}
ASKED: list[tuple[str, str, Any, int]] = [
    ("POST", "/v1/predict", PREDICT, 200),
    ("POST", "/v1/predict", {"inputs": 1}, 400),
    ("GET", "/v1/predict", None, 405),
    ("POST", "/v2/models/pixels/infer", INFER, 200),
    ("POST", "/v2/models/pixels/versions/poor/infer", INFER, 503),
    ("POST", "/v2/models/other/infer", INFER, 404),
    ("POST", "/v1/embeddings", {}, 404),
    ("GET", "/v1/models", None, 200),
    ("GET", "/v2/health/ready", None, 200),
    ("GET", "/v1/variants", None, 200),
    ("GET", "/healthz", None, 200),
    ("HEAD", "/readyz", None, 200),
    ("GET", "/metrics", None, 200),
    ("GET", "/openapi.json", None, 200),
    ("GET", "/nothing", None, 404),
    ("DELETE", "/healthz", None, 405),
]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_server() as running:
        yield running


@pytest.fixture(scope="module")
def http(live: Live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{live.http}") as client:
        yield client


@pytest.mark.parametrize(("method", "path", "body", "status"), ASKED, ids=[f"{it[0]} {it[1]} {it[3]}" for it in ASKED])
def test_every_reply_tells_the_id_that_was_given(
    http: httpx.Client, method: str, path: str, body: Any, status: int
) -> None:
    reply = http.request(method, path, json=body, headers={"x-request-id": "my-id/1"})
    assert (reply.status_code, reply.headers.get_list("x-request-id")) == (status, ["my-id/1"])
    assert "traceparent" not in reply.headers


def test_chunked_bodies_and_large_ones_keep_the_id(http: httpx.Client) -> None:
    given = {"x-request-id": "chunked", "content-type": "application/json"}
    assert http.post("/v1/predict", content=iter([b"{", b"}"]), headers=given).headers["x-request-id"] == "chunked"
    large = http.post("/v1/predict", content=b" " * 2**20, headers=given | {"x-request-id": "large"})
    assert (large.status_code, large.headers["x-request-id"]) == (400, "large")


def test_a_trace_gives_the_id_and_comes_back(http: httpx.Client) -> None:
    told = http.post("/v1/predict", json=PREDICT, headers={"traceparent": PARENT}).headers
    assert (told["x-request-id"], told["traceparent"]) == (TRACE, PARENT)
    told = http.get("/healthz", headers={"traceparent": PARENT, "x-request-id": "mine"}).headers
    assert (told["x-request-id"], told["traceparent"]) == ("mine", PARENT)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"x-request-id": ""},
        {"x-request-id": "a b"},
        {"x-request-id": "x" * 129},
        {"traceparent": "00-1-2-3"},
        {"traceparent": PARENT.replace(TRACE, "0" * 32)},
        {"traceparent": "ff" + PARENT[2:]},
    ],
    ids=["none", "empty", "a space", "too long", "no trace", "the trace of nothing", "a forbidden version"],
)
def test_where_there_is_no_valid_id_one_is_made(http: httpx.Client, given: dict[str, str]) -> None:
    first, second = (http.post("/v1/predict", json=PREDICT, headers=given).headers for _ in range(2))
    assert first["x-request-id"] != second["x-request-id"]
    assert 10 <= len(first["x-request-id"]) <= 20
    assert "traceparent" not in first


def test_what_is_no_http_is_refused_with_an_id(live: Live) -> None:
    for request, wanted in ((b"nonsense\r\n\r\n", None), (b"GET / HTTP/1.1\r\nx-request-id: it\r\n\r\n", "it")):
        client = Client(live)
        status, headers, _ = client.ask(request)
        client.close()
        assert status == 400
        assert headers["x-request-id"] == (wanted or headers["x-request-id"]) != ""


def test_a_starting_server_tells_it_too() -> None:
    config = ServiceConfig.model_validate({"base": "fake", "variants": [{"name": "a"}]})
    front = Front(StartingApp(Startup(["a"]), config, Access()))

    async def ask() -> None:
        transport = httpx.ASGITransport(front)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            reply = await client.get("/readyz", headers={"x-request-id": "early"})
            assert (reply.status_code, reply.headers["x-request-id"]) == (503, "early")

    asyncio.run(ask())


def metadata(call: Any) -> dict[str, str]:
    return dict(call.trailing_metadata())


def test_grpc_tells_it_in_the_trailing_metadata(live: Live) -> None:
    request = message("ModelInferRequest")(model_name="pixels", raw_input_contents=[np.eye(2, dtype="f4").tobytes()])
    request.inputs.add(name="image", datatype="FP32", shape=[1, 1, 2, 2])
    with grpc.insecure_channel(live.grpc) as channel:
        infer = channel.unary_unary(f"/{SERVICE}/ModelInfer", type(request).SerializeToString)
        _, call = infer.with_call(request, metadata=[("x-request-id", "asked"), ("traceparent", PARENT)])
        assert metadata(call) == {"x-request-id": "asked", "traceparent": PARENT}
        request.model_version = "poor"
        with pytest.raises(grpc.RpcError) as refused:
            infer(request, metadata=[("x-request-id", "refused")])
        assert metadata(refused.value)["x-request-id"] == "refused"
        _, call = HealthStub(channel).Check.with_call(HealthCheckRequest(), metadata=[("x-request-id", "health")])
        assert metadata(call)["x-request-id"] == "health"
        with pytest.raises(grpc.RpcError) as unknown:
            HealthStub(channel).Check(HealthCheckRequest(service="x"))
        assert len(metadata(unknown.value)["x-request-id"]) >= 10


def test_a_failure_is_logged_under_the_id_that_the_client_is_told(
    http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.handler.addFilter(RequestInLog())
    broken = {"x-variant": "broken", "x-request-id": "find-me"}
    reply = http.post("/v1/predict", json=PREDICT, headers=broken)
    assert reply.status_code == 500
    assert "under id find-me" in reply.json()["error"]
    assert reply.headers["x-variant"] == "broken"
    assert [(record.getMessage(), vars(record)["request"]) for record in caplog.records] == [
        ("variant broken failed on a request", " [request find-me]")
    ]
    assert "secret detail" in caplog.text


def test_log_lines_of_no_request_name_none() -> None:
    record = logging.makeLogRecord({})
    assert RequestInLog().filter(record)
    assert vars(record)["request"] == ""


def test_ids_are_told_apart_between_processes_and_within_one() -> None:
    first, second = RequestIdentities(), RequestIdentities()
    made = {request_id(identities.of({})) for identities in (first, second) for _ in range(1000)}
    assert len(made) == 2000


def test_the_command_line_names_the_request_in_its_log() -> None:
    script = (
        "import logging; from leanserve.__main__ import _log_to_stderr; _log_to_stderr();"
        "from leanserve.request_identity import CURRENT_REQUEST; log = logging.getLogger('x');"
        "log.warning('before'); CURRENT_REQUEST.set(((b'x-request-id', b'seen'),)); log.warning('during')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    before, during = done.stderr.splitlines()
    assert before.endswith("WARNING x: before")
    assert during.endswith("WARNING x [request seen]: during")
