""" "Errors repeat what I sent, name your folders, fill the log": what a refusal says, and what is told of it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from fakes import Live, live_server
from leanserve.api.v2.grpc_messages import SERVICE, message
from loop_lag import STALL_MS, loop_lag
from raw_client import Client
from raw_http import ask, post
from rule_service import RuleService, needs_proc

INFER = "/v2/models/rules/infer"
MB = 10**6


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_server(limits={"body_bytes": 16 * MB}) as server:
        yield server


def tensor(**changes: object) -> bytes:
    wrong = {"name": "x", "shape": [1, 1, 2, 4], "datatype": "FP32", "data": [0] * 8} | changes
    return json.dumps({"inputs": [wrong]}).encode()


LONG = "q" * (12 * MB)
LONG_TEXTS = {
    "datatype": post(INFER, tensor(datatype=LONG)),
    "name": post(INFER, tensor(name=LONG)),
    "parameter": post(INFER, json.dumps({"inputs": [], "parameters": {LONG: 1}}).encode()),
    "id": post(INFER, json.dumps({"id": [LONG], "inputs": []}).encode()),
    "no json": post(INFER, LONG.encode()),
    "variant": post(INFER, tensor(), "x-variant: " + "q" * 60_000),
    "content type": post("/v1/predict", b"1", "content-type: " + "q" * 60_000),
    "encoding": post(INFER, tensor(), "content-encoding: " + "q" * 60_000),
    "path": post("/v2/" + "q" * 8000, b""),
    "unknown path": post("/" + "q" * 8000, b""),
    "query": post("/healthz?" + "q" * 8000, b""),
}


@pytest.mark.parametrize("request_", LONG_TEXTS.values(), ids=LONG_TEXTS)
def test_what_was_sent_is_repeated_in_short(service: RuleService, request_: bytes) -> None:
    reply = asyncio.run(ask(service.port, request_))
    assert 400 <= reply.status < 500
    assert len(reply.body) < 4000
    assert len(b"".join(f"{name}{value}".encode() for name, value in reply.headers.items())) < 2000


@needs_proc
def test_long_texts_keep_nobody_waiting(service: RuleService) -> None:
    worst = []
    for _ in range(3):
        with loop_lag(service.port, service.process.pid) as lag:
            for name in ("variant", "content type", "encoding", "path", "unknown path"):
                asyncio.run(ask(service.port, LONG_TEXTS[name]))
        worst.append(lag.worst_ms)
        if lag.worst_ms < STALL_MS:
            break
    assert min(worst) < STALL_MS, worst


WRONG = {
    "bad input": (post(INFER, b"{"), 400),
    "no http": (b"nonsense\r\n\r\n", 400),
    "no host": (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET /healthz HTTP/1.1\r\nhost: x\r\nhost: x\r\n\r\n", 400),
    "gzip, chunked": (
        b"POST /healthz HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
        501,
    ),
    "two codings": (
        b"POST /healthz HTTP/1.1\r\nhost: x\r\ntransfer-encoding: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        501,
    ),
    "gzip": (b"POST /healthz HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip\r\n\r\n", 501),
    "chunked, gzip": (b"POST /healthz HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked, gzip\r\n\r\n", 400),
    "unknown path": (b"GET /etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n", 404),
    "dots": (b"GET /../../etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n", 404),
    "wrong verb": (b"DELETE /healthz HTTP/1.1\r\nhost: x\r\n\r\n", 405),
    "no such model": (post("/v2/models/nothing/infer", tensor()), 404),
}


@pytest.mark.parametrize(("request_", "status"), WRONG.values(), ids=WRONG)
def test_a_refusal_has_its_status_and_no_path_of_the_server(service: RuleService, request_: bytes, status: int) -> None:
    reply = asyncio.run(ask(service.port, request_))
    assert reply.status == status
    assert set(reply.json()) == {"error", "code"}
    for place in (str(service.folder), str(Path(__file__).parents[2]), "site-packages", ".py"):
        assert place not in reply.body.decode()


def test_no_description_or_metric_names_a_path_of_the_server(service: RuleService) -> None:
    for path in ("/metrics", "/v1/variants", "/v2", "/v2/models/rules", "/v2/models/rules/config", "/openapi.json"):
        page = service.http.get(path).text
        for place in (str(service.folder), str(Path(__file__).parents[2]), "site-packages"):
            assert place not in page, path


def test_clients_mistakes_are_few_lines_in_the_log_and_no_stacks(service: RuleService) -> None:
    def lines() -> list[str]:
        return (service.folder / "log").read_text().splitlines()

    before = len(lines())
    for _ in range(30):
        for request_, _ in WRONG.values():
            asyncio.run(ask(service.port, request_))
    told = lines()[before:]
    assert len(told) <= 6
    assert not any("Traceback" in line for line in lines())


CODES = {
    "bad input": ({"inputs": [{"name": "image", "datatype": "FP99", "shape": [1]}]}, "INVALID_ARGUMENT"),
    "unknown model": ({"model_name": "nothing"}, "NOT_FOUND"),
    "unknown version": ({"model_version": "nothing"}, "NOT_FOUND"),
    "excluded": ({"model_version": "poor"}, "UNAVAILABLE"),
    "long name": ({"inputs": [{"name": "q" * 12 * MB, "datatype": "FP32", "shape": [1]}]}, "INVALID_ARGUMENT"),
    "long version": ({"model_version": "q" * 12 * MB}, "NOT_FOUND"),
    "too large": ({"id": "q" * 17 * MB}, "RESOURCE_EXHAUSTED"),
}


@pytest.mark.parametrize(("changes", "code"), CODES.values(), ids=CODES)
def test_grpc_refuses_with_the_same_codes_and_in_short(live: Live, changes: dict[str, object], code: str) -> None:
    request = message("ModelInferRequest")(**({"model_name": "pixels"} | changes))
    with grpc.insecure_channel(live.grpc, [("grpc.max_send_message_length", -1)]) as channel:
        call = channel.unary_unary(f"/{SERVICE}/ModelInfer", type(request).SerializeToString, lambda data: data)
        with pytest.raises(grpc.RpcError) as refused:
            call(request, timeout=20)
    assert refused.value.code().name == code
    assert len(refused.value.details()) < 3000


def test_the_page_for_prometheus_is_compressed_where_that_is_permitted(service: RuleService) -> None:
    plain = asyncio.run(ask(service.port, b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n"))
    packed = service.http.get("/metrics", headers={"accept-encoding": "gzip"})
    assert "content-encoding" not in plain.headers
    assert packed.headers["content-encoding"] == "gzip"
    assert int(packed.headers["content-length"]) < len(plain.body) / 4
    assert "leanserve_ready 1.0" in packed.text
    assert b"leanserve_ready 1.0" in plain.body


@needs_proc
def test_who_asks_for_metrics_without_end_keeps_nobody_waiting(service: RuleService) -> None:
    async def scrape() -> None:
        pages = [ask(service.port, b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n") for _ in range(20)]
        for reply in await asyncio.gather(*pages):
            assert reply.status == 200

    worst = []
    for _ in range(3):
        with loop_lag(service.port, service.process.pid) as lag:
            for _ in range(5):
                asyncio.run(scrape())
        worst.append(lag.worst_ms)
        if lag.worst_ms < STALL_MS:
            break
    assert min(worst) < STALL_MS, worst


def test_trailers_change_nothing_on_the_way_of_chunks(live: Live) -> None:
    body = json.dumps({"inputs": [{"name": "image", "shape": [1, 1, 2, 2], "datatype": "FP32", "data": [0, 1, 2, 3]}]})
    client = Client(live)
    head = b"POST /v2/models/pixels/infer HTTP/1.1\r\nhost: x\r\nx-variant: a\r\ntransfer-encoding: chunked\r\n\r\n"
    trailers = b"x-variant: poor\r\nhost: y\r\ncontent-type: image/png\r\n\r\n"
    status, headers, _ = client.ask(head + b"%x\r\n%b\r\n0\r\n" % (len(body), body.encode()) + trailers)
    assert (status, headers["x-variant"]) == (200, "a")
    client.close()
