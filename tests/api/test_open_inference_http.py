"""The Open Inference Protocol over REST against a live server: every path, every refusal, and HTTP's own corners."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import pytest

from fakes import POOR, Live, PixelBackend, live_server
from leanserve.api.v2 import rest as open_inference_http
from leanserve.codecs.open_inference import InferDecoder, InferRequest
from openapi import body_of

LIMIT = 256 * 2**10
INFER = "/v2/models/pixels/infer"
PIXELS = np.array([[[[0, 1], [2, 3]]], [[[4, 5], [6, 7]]]], np.float32)
LOGITS = (PIXELS.reshape(2, 4) * 10).tolist()
LOGIT_BYTES = (PIXELS * 10).tobytes()


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_server(limits={"body_bytes": LIMIT}) as server:
        yield server


@pytest.fixture
def http(live: Live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{live.http}") as client:
        yield client


def tensor(rows: int = 1, **changes: Any) -> dict[str, Any]:
    data = {"data": PIXELS[:rows].ravel().tolist()}
    return {"name": "image", "shape": [rows, 1, 2, 2], "datatype": "FP32", **data, **changes}


def request(**changes: Any) -> dict[str, Any]:
    return {"inputs": [tensor()], **changes}


def binary(pixels: np.ndarray[Any, Any] = PIXELS, **changes: Any) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a request whose tensor follows the JSON."""
    sent: dict[str, Any] = {"name": "image", "shape": list(pixels.shape), "datatype": "FP32"}
    sent["parameters"] = {"binary_data_size": pixels.nbytes}
    head = json.dumps({"inputs": [sent], **changes}).encode()
    return head + pixels.tobytes(), {"Inference-Header-Content-Length": str(len(head))}


@contextmanager
def occupied(live: Live, more: int = 0) -> Iterator[None]:
    """The device is busy with a request to `held` until the block ends; `held` executes that and `more` others."""
    held = live.fleet.variants["held"]
    backend = held.backend
    assert isinstance(backend, PixelBackend)
    ran = backend.ran
    live.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(httpx.post, f"http://{live.http}/v2/models/pixels/versions/held/infer", json=request())
        until(lambda: backend.waits)
        try:
            yield
        finally:
            live.gate.set()
        assert first.result().status_code == 200
    assert backend.ran == ran + 1 + more


def until(happened: Any, seconds: float = 10) -> None:
    give_up = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < give_up
        time.sleep(0.002)


def test_health_has_both_keys_and_readiness_ends_with_draining(live: Live, http: httpx.Client) -> None:
    for path in ("/v2/health/live", "/v2/health/ready"):
        assert http.get(path).json() == {"live": True, "ready": True}
    assert http.get("/v2/models/pixels/ready").json() == {"name": "pixels", "ready": True}
    live.fleet.draining = True
    try:
        assert http.get("/v2/health/live").json() == {"live": True, "ready": False}
        for path in ("/v2/health/ready", "/v2/models/pixels/ready", "/v2/models/pixels/versions/a/ready"):
            reply = http.get(path)
            assert (reply.status_code, "draining" in reply.json()["error"]) == (503, True)
        assert http.post(INFER, json=request()).status_code == 200
    finally:
        live.fleet.draining = False


def test_server_and_model_describe_themselves(http: httpx.Client) -> None:
    for path in ("/v2", "/v2/"):
        body = http.get(path).json()
        assert set(body) == {"name", "version", "extensions"}
        assert "binary_tensor_data" in body["extensions"]
    for path in ("/v2/models/pixels", "/v2/models/pixels/versions/b"):
        assert http.get(path).json() == {
            "name": "pixels",
            "versions": ["a", "b", "broken", "held"],
            "platform": "pixel",
            "inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, 1, 2, 2]}],
            "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 4]}],
        }
    config = http.get("/v2/models/pixels/versions/a/config").json()
    assert config["max_batch_size"] == 32
    assert config["input"] == [{"name": "image", "data_type": "TYPE_FP32", "dims": [1, 2, 2]}]
    assert (config["dynamic_batching"]["priority_levels"], config["dynamic_batching"]["default_priority_level"]) == (
        3,
        2,
    )
    assert config["dynamic_batching"]["preferred_batch_size"][0] in {1, 2, 4, 8, 16, 32}


def test_the_openapi_description_has_an_example_that_works(http: httpx.Client) -> None:
    for path in (INFER, "/v2/models/pixels/versions/a/infer"):
        described = path.replace("pixels", "{model}").replace("/a/", "/{version}/")
        example = body_of(http, described)["example"]
        assert http.post(path, json=example).json()["outputs"][0]["data"] == [0, 0, 0, 0]


def test_the_index_tells_who_is_excluded_and_why(http: httpx.Client) -> None:
    index = http.post("/v2/repository/index").json()
    assert [item["version"] for item in index] == ["a", "b", "broken", "held", "poor"]
    assert index[0] == {"name": "pixels", "version": "a", "state": "READY", "reason": ""}
    assert index[4] == {"name": "pixels", "version": "poor", "state": "UNAVAILABLE", "reason": POOR}
    ready = http.post("/v2/repository/index", json={"ready": True}).json()
    assert [item["version"] for item in ready] == ["a", "b", "broken", "held"]


def test_statistics_count_requests_rows_and_batches(http: httpx.Client) -> None:
    path = "/v2/models/pixels/versions/b/stats"
    (before,) = http.get(path).json()["model_stats"]
    asked = time.time()
    for _ in range(3):
        http.post("/v2/models/pixels/versions/b/infer", json={"inputs": [tensor(2)]})
    http.post("/v2/models/pixels/versions/b/infer", json={"inputs": []})
    (after,) = http.get(path).json()["model_stats"]
    assert (after["name"], after["version"]) == ("pixels", "b")
    assert after["inference_count"] - before["inference_count"] == 6
    assert after["execution_count"] - before["execution_count"] == 3
    assert abs(after["last_inference"] / 1000 - asked) < 10
    for phase, more in (("success", 3), ("fail", 1), ("queue", 3), ("compute_infer", 3), ("cache_hit", 0)):
        was, now = before["inference_stats"][phase], after["inference_stats"][phase]
        assert now["count"] - was["count"] == more
        assert (now["ns"] > was["ns"]) == (more > 0)
    (pairs,) = [item for item in after["batch_stats"] if item["batch_size"] == 2]
    assert pairs["compute_infer"]["count"] >= 3
    versions = [item["version"] for item in http.get("/v2/models/stats").json()["model_stats"]]
    assert versions == ["a", "b", "broken", "held"]


def test_json_and_binary_tensors_get_the_same_answer(http: httpx.Client) -> None:
    reply = http.post(INFER, json={"id": "7", "inputs": [tensor(2)]})
    body = reply.json()
    assert (body["id"], body["model_name"], body["model_version"]) == ("7", "pixels", reply.headers["x-variant"])
    assert body["outputs"] == [
        {"name": "logits", "datatype": "FP32", "shape": [2, 4], "data": np.ravel(LOGITS).tolist()}
    ]
    assert body["parameters"].keys() == {"queue_ms", "inference_ms", "batch_rows"}
    content, headers = binary(parameters={"binary_data_output": True})
    reply = http.post(INFER, content=content, headers=headers)
    length = int(reply.headers["inference-header-content-length"])
    assert json.loads(reply.content[:length])["outputs"][0]["parameters"] == {"binary_data_size": 32}
    assert np.frombuffer(reply.content[length:], np.float32).reshape(2, 4).tolist() == LOGITS
    raw = http.post(INFER, content=PIXELS.tobytes(), headers={"inference-header-content-length": "0"})
    assert raw.content[-32:] == reply.content[-32:]


def test_path_then_header_then_stickiness_then_weights_choose(http: httpx.Client) -> None:
    def version(path: str = INFER, **headers: str) -> str:
        reply = http.post(
            path, json=request(), headers={name.replace("_", "-"): text for name, text in headers.items()}
        )
        return str(reply.json()["model_version"])

    assert version("/v2/models/pixels/versions/b/infer", x_variant="a") == "b"
    assert version(x_variant="held", x_caller_key="1") == "held"
    assert {version() for _ in range(40)} == {"a", "b"}
    sticky = [{version(x_caller_key=str(key)) for _ in range(3)} for key in range(12)]
    assert all(len(seen) == 1 for seen in sticky)
    assert {"a"} in sticky
    assert {"b"} in sticky


def stacked(depth: int) -> bytes:
    return b'{"inputs":' + b"[" * depth + b"]" * depth + b"}"


@pytest.mark.parametrize(
    ("method", "path", "content", "headers", "status", "text"),
    [
        ("GET", "/v2/models/other", b"", {}, 404, "no model 'other'; this server has 'pixels'"),
        ("GET", "/v2/models/", b"", {}, 404, "no model ''"),
        ("POST", "/v2/models/other/infer", b"{}", {}, 404, "no model 'other'"),
        ("GET", "/v2/models/pixels/versions/9", b"", {}, 404, "no version '9' of 'pixels'; there are a, b,"),
        ("GET", "/v2/models/pixels/versions/a/nothing", b"", {}, 404, "no such path: /v2/models/pixels/versions/a/no"),
        ("POST", "/v2/repository/models/pixels/load", b"", {}, 400, "set model_control: explicit in the config"),
        ("GET", "/v2/models/pixels/versions/poor", b"", {}, 503, "excluded: score 0.5"),
        ("GET", "/v2/models/pixels/versions/poor/ready", b"", {}, 503, "excluded: score 0.5"),
        ("POST", "/v2/models/pixels/versions/poor/infer", b"{}", {}, 503, "excluded: score 0.5"),
        ("POST", INFER, b"{}", {"x-variant": "nobody"}, 404, "no variant 'nobody'"),
        ("GET", INFER, b"", {}, 405, f"{INFER} takes POST, not GET"),
        ("DELETE", "/v2/models/pixels", b"", {}, 405, "takes GET, not DELETE"),
        ("PUT", "/v2/repository/index", b"", {}, 405, "takes POST, not PUT"),
        ("POST", "/v2/repository/index", b"[]", {}, 400, "must be a JSON object"),
        ("POST", "/v2/repository/index", b'{"ready": 1}', {}, 400, "'ready' is true or false"),
        ("POST", "/v2/repository/index", b"{", {}, 400, "not valid JSON"),
        ("POST", INFER, b"", {}, 400, "not valid JSON"),
        ("POST", INFER, stacked(100_000), {}, 400, "not valid JSON"),
        ("POST", INFER, b'{"inputs": []}', {}, 400, "input 'image' is missing"),
        ("POST", INFER, b"{}", {"inference-header-content-length": "x"}, 400, "must be a number of bytes"),
        ("POST", INFER, b"{}", {"inference-header-content-length": "-1"}, 400, "must be a number of bytes"),
        ("POST", INFER, b"{}", {"inference-header-content-length": "3"}, 400, "is 3, the body has 2 bytes"),
        ("POST", INFER, b"{}", {"content-encoding": "br"}, 415, "Content-Encoding 'br' is not taken"),
        ("POST", INFER, b"{}", {"content-encoding": "gzip"}, 400, "not valid gzip"),
        (
            "POST",
            INFER,
            gzip.compress(b"{}", mtime=0)[:-4],
            {"content-encoding": "gzip"},
            400,
            "ends before its end mark",
        ),
        (
            "POST",
            INFER,
            gzip.compress(b"{}", mtime=0) * 2,
            {"content-encoding": "gzip"},
            400,
            "follow the end of the gzip",
        ),
        ("POST", INFER, b"x" * (LIMIT + 1), {}, 413, f"{LIMIT + 1} bytes; at most {LIMIT}"),
        ("POST", INFER, gzip.compress(bytes(LIMIT + 1)), {"content-encoding": "gzip"}, 413, "inflates to more than"),
    ],
)
def test_every_refusal_is_one_error_text(
    http: httpx.Client, *, method: str, path: str, content: bytes, headers: dict[str, str], status: int, text: str
) -> None:
    reply = http.request(method, path, content=content, headers=headers)
    assert reply.status_code == status
    assert set(reply.json()) == {"error", "code"}
    assert text in reply.json()["error"]


def test_a_failing_model_and_a_bug_of_ours_show_no_stack(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    one = json.dumps({"inputs": [tensor(data=[1, 1, 1, 1])]})
    reply = http.post("/v2/models/pixels/versions/broken/infer", content=one)
    assert (reply.status_code, "under id" in reply.json()["error"]) == (500, True)
    monkeypatch.setattr(open_inference_http, "encode_infer", lambda *_: 1 / 0)
    reply = http.post(INFER, json=request())
    assert (reply.status_code, reply.json()["code"]) == (500, "internal")
    assert "division" not in reply.text


def test_requests_may_be_compressed(http: httpx.Client) -> None:
    content, headers = binary()
    raw_deflate = zlib.compressobj(wbits=-15)
    for encoding, body in (
        ("gzip", gzip.compress(content)),
        ("GZip", gzip.compress(content)),
        ("deflate", zlib.compress(content)),
        ("deflate", raw_deflate.compress(content) + raw_deflate.flush()),
        ("identity", content),
    ):
        reply = http.post(INFER, content=body, headers=headers | {"content-encoding": encoding})
        assert np.reshape(reply.json()["outputs"][0]["data"], (2, 4)).tolist() == LOGITS
    exact = b" " * (LIMIT - 2) + b"{}"
    reply = http.post(INFER, content=gzip.compress(exact), headers={"content-encoding": "gzip"})
    assert (reply.status_code, "'inputs' must be" in reply.text) == (400, True)


@pytest.mark.parametrize(
    ("accepted", "encoding"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("GZIP;q=0.5", "gzip"),
        ("gzip, deflate", None),
        ("gzip;q=0", None),
        ("gzip;q=0.000", None),
        ("identity", None),
        ("br", None),
    ],
)
def test_replies_are_compressed_for_those_who_ask_for_one_encoding(
    http: httpx.Client, accepted: str, encoding: str | None
) -> None:
    content, headers = binary(parameters={"binary_data_output": True})
    reply = http.post(INFER, content=content, headers=headers | {"accept-encoding": accepted})
    assert reply.headers.get("content-encoding") == encoding
    assert reply.content[int(reply.headers["inference-header-content-length"]) :] == LOGIT_BYTES


def test_chunked_bodies_are_taken_and_bounded(http: httpx.Client) -> None:
    content, headers = binary()
    chunks = (content[i : i + 7] for i in range(0, len(content), 7))
    assert http.post(INFER, content=chunks, headers=headers).status_code == 200
    endless = (b"x" * 2**14 for _ in range(LIMIT // 2**14 + 1))
    assert http.post(INFER, content=endless).status_code == 413


def test_header_names_in_any_letter_case_on_a_connection_that_stays(live: Live) -> None:
    content, headers = binary(parameters={"binary_data_output": True})
    (length,) = headers.values()
    with socket.create_connection(live.host_and_port) as connection:
        for name in ("inference-header-content-length", "INFERENCE-HEADER-CONTENT-LENGTH"):
            head = f"POST {INFER} HTTP/1.1\r\nHOST: x\r\n{name}: {length}\r\nCONTENT-length: {len(content)}\r\n\r\n"
            connection.sendall(head.encode() + content)
            assert received(connection).endswith(LOGIT_BYTES)


def received(connection: socket.socket) -> bytes:
    """One whole reply with a content length."""
    reply = b""
    while b"\r\n\r\n" not in reply:
        reply += connection.recv(65536)
    head, _, body = reply.partition(b"\r\n\r\n")
    (length,) = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length")]
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


@pytest.mark.skipif(not hasattr(socket, "TCP_QUICKACK"), reason="only Linux lets a server acknowledge at once")
def test_a_client_that_sends_head_and_body_apart_is_not_held_up(live: Live) -> None:
    body = json.dumps(request()).encode()
    took = []
    with socket.create_connection(live.host_and_port) as connection:  # without TCP_NODELAY
        for _ in range(40):
            started = time.perf_counter()
            connection.sendall(f"POST {INFER} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode())
            connection.sendall(body)
            received(connection)
            took.append(time.perf_counter() - started)
    assert sorted(took)[len(took) // 2] < 0.02  # it is 0.044 when the acknowledgement is delayed


def test_head_has_the_headers_of_get_and_no_body(live: Live, http: httpx.Client) -> None:
    for path in ("/v2", "/v2/health/ready", "/v2/models/pixels/config"):
        got = http.get(path)
        head = http.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == got.headers["content-length"]
    assert http.head(INFER).status_code == 405
    assert http.head("/v2/models/other").status_code == 404


def test_the_timeout_parameter_bounds_the_queue(live: Live, http: httpx.Client) -> None:
    path = "/v2/models/pixels/versions/held/infer"
    with occupied(live):
        started = time.monotonic()
        reply = http.post(path, json=request(parameters={"timeout": 60_000}))
        assert 0.05 < time.monotonic() - started < 5
        assert reply.status_code in {429, 504}  # 429 if the measured cost says at once that it is hopeless
        assert reply.json()["code"] in {"queue_timeout", "deadline_unreachable"}


def test_the_priority_parameter_decides_who_goes_first(live: Live) -> None:
    held = live.fleet.variants["held"]
    path = f"http://{live.http}/v2/models/pixels/versions/held/infer"
    before: list[int] = []
    with occupied(live, more=2), ThreadPoolExecutor(2) as pool:
        background = pool.submit(httpx.post, path, json=request(parameters={"priority": 3}))
        until(lambda: held.batcher.waiting_rows == 1)
        urgent = pool.submit(httpx.post, path, json=request(parameters={"priority": 1}))
        until(lambda: held.batcher.waiting_rows == 2)
        before += [held.batcher.rows_before(level) for level in (1, 2, 3)]
        live.gate.set()
    assert before == [1, 1, 2]
    assert (urgent.result().status_code, background.result().status_code) == (200, 200)


def test_who_leaves_the_queue_is_not_executed(live: Live, http: httpx.Client) -> None:
    held = live.fleet.variants["held"]
    body = json.dumps(request()).encode()
    path = "/v2/models/pixels/versions/held/infer"
    with occupied(live):
        leaver = socket.create_connection(live.host_and_port)
        leaver.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        until(lambda: held.batcher.waiting_rows == 1)
        leaver.close()
        for _ in range(3):  # the loop is sure to have seen the disconnect when it has answered others since
            http.get("/v2")
    until(lambda: held.metrics.requests["client_gone"].count == 1)


def test_large_json_is_decoded_off_the_loop_and_small_bodies_on_it(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    decode = InferDecoder.decode

    def noted(self: InferDecoder, body: bytes, json_length: int | None = None) -> InferRequest:
        threads.append(threading.current_thread().name)
        return decode(self, body, json_length)

    monkeypatch.setattr(InferDecoder, "decode", noted)
    large = np.zeros((2**12, 1, 2, 2), np.float32)
    content, headers = binary(large)
    assert len(content) > open_inference_http.SMALL
    assert http.post(INFER, json=request()).status_code == 200
    assert http.post(INFER, content=content, headers=headers).status_code == 400  # more rows than the queue holds
    many = json.dumps({"inputs": [tensor()], "comment": "x" * open_inference_http.SMALL})
    assert http.post(INFER, content=many).status_code == 200
    assert [name.startswith("decode") for name in threads] == [False, False, True]
