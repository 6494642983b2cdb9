"""Who may do what, over HTTP and gRPC: keys, roles, rates; admin verbs and web pages; the audit log."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import grpc
import httpx
import numpy as np
import openai
import pytest
from fastapi.routing import APIRoute
from grpc_health.v1.health_pb2 import HealthCheckRequest
from grpc_health.v1.health_pb2_grpc import HealthStub
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest, ServerReflectionResponse
from tritonclient import grpc as triton_grpc
from tritonclient import http as triton_http
from tritonclient.utils import InferenceServerException

from call_costs import CALLS_OF_A_REQUEST, in_calls
from fakes import Live, live_server, open_variants
from leanserve.api.access import Access, Key
from leanserve.api.app import create_app
from leanserve.api.page_files import page_files
from leanserve.api.routes import endpoints_of
from leanserve.api.v2.grpc_messages import SERVICE, message
from leanserve.api.v2.grpc_server import METHODS, REFLECTION
from leanserve.errors import RateLimited, Unauthorized
from leanserve.token_bucket import TokenBucket

PREDICT, READ, ADMIN, SLOW, ALL = "predict-" + "p" * 32, "read-" + "r" * 32, "admin-" + "a" * 32, "slow-key", "all-key"
INFER = "/v2/models/pixels/infer"
TENSOR = {"name": "image", "shape": [1, 1, 2, 2], "datatype": "FP32", "data": [0, 1, 2, 3]}
BODY = {"inputs": [TENSOR]}
UNLOAD = "/v2/repository/models/pixels/versions/b/unload"
LOAD = "/v2/repository/models/pixels/versions/b/load"
ROWS = {"inputs": [[0, 0], [255, 0]]}
PAGE = "https://console.example.com"


def key(text: str, *roles: str, bucket: TokenBucket | None = None) -> Key:
    return Key(text.partition("-")[0], hashlib.sha256(text.encode()).digest(), frozenset(roles), bucket)


def test_the_rate_of_a_key_that_stays_goes_on() -> None:
    access = Access([key(SLOW, "predict", bucket=TokenBucket(0.01, 1))])
    header = {b"x-api-key": SLOW.encode()}
    access.admit("predict", header)
    assert access.renew([key(SLOW, "predict", bucket=TokenBucket(0.01, 1))]) == []
    with pytest.raises(RateLimited):
        access.admit("predict", header)
    assert access.renew([key(SLOW, "predict", bucket=TokenBucket(0.01, 2))]) == ["'slow' has changed"]
    access.admit("predict", header)


def keys() -> tuple[Key, ...]:
    return (
        key(PREDICT, "predict"),
        key(READ, "read"),
        key(ADMIN, "admin"),
        key(SLOW, "predict", bucket=TokenBucket(0.01, 2)),
        key(ALL, "predict", "read", "admin"),
    )


def bearer(text: str) -> dict[str, str]:
    return {"authorization": f"Bearer {text}"}


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_server(keys=keys(), model_control="explicit", cors={"origins": [PAGE]}) as server:
        yield server


@pytest.fixture
def http(live: Live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{live.http}") as opened:
        yield opened


@pytest.fixture(scope="module")
def keyless_server() -> Iterator[Live]:
    """On loopback, without keys."""
    with live_server(model_control="explicit", cors={"origins": [PAGE]}) as server:
        yield server


@pytest.fixture
def keyless(keyless_server: Live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{keyless_server.http}") as opened:
        yield opened
        assert opened.post(LOAD).status_code == 200


PATHS: list[tuple[str, str, Any, str]] = [
    ("POST", INFER, BODY, "predict"),
    ("POST", "/v1/predict", ROWS, "predict"),
    ("GET", "/v1/variants", None, "read"),
    ("GET", "/metrics", None, "read"),
    ("GET", "/openapi.json", None, "read"),
    ("GET", "/v1/base", None, "read"),
    ("GET", "/v1/report", None, "read"),
    ("GET", "/v1/models", None, "read"),
    ("GET", "/v2", None, "read"),
    ("GET", "/v2/models/pixels/config", None, "read"),
    ("POST", "/v2/repository/index", {}, "read"),
    ("POST", LOAD, {}, "admin"),
]


@pytest.mark.parametrize(("method", "path", "body", "role"), PATHS)
def test_a_path_is_for_keys_of_its_role(http: httpx.Client, method: str, path: str, body: Any, role: str) -> None:
    for text in (PREDICT, READ, ADMIN):
        for headers in (bearer(text), {"x-api-key": text}, {"authorization": f"bEARER  {text}"}):
            reply = http.request(method, path, json=body, headers=headers)
            if text.startswith(role):
                assert reply.status_code == 200, reply.text
            else:
                refused = error_of(reply)
                assert (reply.status_code, refused["code"]) == (403, "forbidden")
                assert f"has not the role '{role}'" in refused.get("error", refused.get("message"))
                assert text not in reply.text
    for wrong in (
        {},
        bearer("x" * 40),
        {"authorization": "Bearer"},
        {"authorization": "Basic eDp5"},
        {"x-api-key": ""},
    ):
        reply = http.request(method, path, json=body, headers=wrong)
        assert (reply.status_code, error_of(reply)["code"]) == (401, "unauthorized")
        assert reply.headers["www-authenticate"] == 'Bearer realm="leanserve"'
        assert reply.headers["x-request-id"]
        assert "x" * 40 not in reply.text


def error_of(reply: httpx.Response) -> Mapping[str, Any]:
    """The error in the shape of the front that was asked."""
    body = reply.json()
    return body["error"] if isinstance(body["error"], dict) else body


def test_what_exists_is_not_told_without_a_key(http: httpx.Client) -> None:
    for method, path in (("GET", "/nothing"), ("POST", "/v2/models/x/infer"), ("GET", "/v1/models/x"), ("GET", UNLOAD)):
        assert http.request(method, path).status_code == 401
    assert http.get("/nothing", headers=bearer(READ)).status_code == 404


def test_probes_need_no_key(http: httpx.Client) -> None:
    for path in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"):
        assert http.get(path).status_code == 200
        assert http.head(path).status_code == 200


def test_every_endpoint_asks_for_a_role() -> None:
    """A new one in the table must name its role; what FastAPI answers only reads."""
    gate = threading.Event()
    gate.set()
    opened = open_variants(gate, model_control="explicit")

    async def table() -> tuple[Mapping[str, str], Any]:
        service = opened.service()
        rows = [row for item in endpoints_of(service) for row in item.routes.items()]
        routes = {path: route.role for path, route in rows if route.method != "PUT"}
        assert {(path, route.role) for path, route in rows if route.method == "PUT"} == {("/v1/experiment", "admin")}
        app = create_app(service)
        service.fleet.close()
        return routes, app

    roles, hot = asyncio.run(table())
    assert {path for path, role in roles.items() if role == "open"} == {
        "/healthz",
        "/readyz",
        "/v2/health/live",
        "/v2/health/ready",
        *page_files(),
    }
    assert {path for path, role in roles.items() if role == "admin"} == {
        path for path in roles if path.endswith(("/load", "/unload", "/start", "/promote", "/abort"))
    }
    assert {path for path, role in roles.items() if role == "predict"} == {
        path for path in roles if path.endswith(("/infer", "/predict", "/embeddings"))
    }
    behind = hot._app._app
    for route in behind.routes:
        assert not isinstance(route, APIRoute) or (route.methods or set()) <= {"GET", "HEAD"}


def test_a_key_that_is_used_too_often_waits(http: httpx.Client) -> None:
    replies = [http.post(path, json=BODY, headers=bearer(SLOW)) for path in (INFER, INFER, INFER, "/v1/embeddings")]
    assert [reply.status_code for reply in replies] == [200, 200, 429, 429]
    assert replies[2].json()["code"] == "rate_limited"
    assert 60 < int(replies[2].headers["retry-after"]) <= 100
    assert replies[3].json()["error"]["type"] == "rate_limit_error"
    page = http.get("/metrics", headers=bearer(READ)).text.splitlines()
    (line,) = [
        one
        for one in page
        if one.startswith("leanserve_requests_total") and '"rate_limited"' in one and 'version=""' in one
    ]
    assert float(line.split()[-1]) >= 2
    assert http.post(INFER, json=BODY, headers=bearer(PREDICT)).status_code == 200, "others are not held up"


def test_a_bucket_fills_with_time() -> None:
    now = 0.0
    bucket = TokenBucket(2.0, 3, lambda: now)
    assert [bucket.take() for _ in range(4)] == [0, 0, 0, 0.5]
    now = 0.5
    assert [bucket.take() for _ in range(2)] == [0, 0.5]
    now = 100.0
    assert [bucket.take() for _ in range(4)] == [0, 0, 0, 0.5], "no more is kept than the burst"


def test_clients_of_others(live: Live) -> None:
    tensor = triton_http.InferInput("image", [1, 1, 2, 2], "FP32")
    tensor.set_data_from_numpy(np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2))
    with triton_http.InferenceServerClient(live.http) as client:
        assert client.is_server_live()
        assert client.infer("pixels", [tensor], headers=bearer(PREDICT)).as_numpy("logits") is not None
        client.unload_model("pixels/versions/b", headers=bearer(ADMIN))
        client.load_model("pixels/versions/b", headers=bearer(ADMIN))
        with pytest.raises(InferenceServerException, match="this needs a key"):
            client.unload_model("pixels/versions/b")
        with pytest.raises(InferenceServerException, match="this needs a key"):
            client.infer("pixels", [tensor])
    asked = openai.OpenAI(base_url=f"http://{live.http}/v1", api_key=READ, max_retries=0)
    assert asked.models.list().data == []
    with pytest.raises(openai.PermissionDeniedError) as forbidden:
        asked.embeddings.create(model="pixels", input="x")
    assert forbidden.value.code == "forbidden"
    with pytest.raises(openai.AuthenticationError) as unknown:
        openai.OpenAI(base_url=f"http://{live.http}/v1", api_key="wrong", max_retries=0).models.list()
    assert (unknown.value.type, unknown.value.code) == ("authentication_error", "unauthorized")


def test_grpc_asks_for_the_same_roles(live: Live) -> None:
    with grpc.insecure_channel(live.grpc) as channel:

        def status(call_name: str, text: str | None, **fields: Any) -> Any:
            call = channel.unary_unary(
                f"/{SERVICE}/{call_name}",
                request_serializer=message(f"{call_name}Request").SerializeToString,
                response_deserializer=message(f"{call_name}Response").FromString,
            )
            try:
                call(
                    message(f"{call_name}Request")(**fields), metadata=bearer(text).items() if text else (), timeout=10
                )
            except grpc.RpcError as error:
                return error
            return None

        fields: dict[str, dict[str, Any]] = {
            "ModelReady": {"name": "pixels"},
            "ModelMetadata": {"name": "pixels"},
            "ModelConfig": {"name": "pixels"},
            "RepositoryModelLoad": {"model_name": "pixels/versions/b"},
            "RepositoryModelUnload": {"model_name": "pixels/versions/b"},
        }
        for name, role in METHODS.items():
            if role == "open":
                assert status(name, None) is None
                continue
            refused = status(name, None)
            assert refused.code() == grpc.StatusCode.UNAUTHENTICATED, name
            assert dict(refused.trailing_metadata())["www-authenticate"].startswith("Bearer")
            for text in (PREDICT, READ, ADMIN):
                error = status(name, text, **fields.get(name, {}))
                if not text.startswith(role):
                    assert error.code() == grpc.StatusCode.PERMISSION_DENIED
                elif name != "ModelInfer":
                    assert error is None, error
                else:
                    assert error.code() == grpc.StatusCode.NOT_FOUND, "past the check: no model was named"
        assert status("RepositoryModelLoad", ADMIN, model_name="pixels/versions/b") is None
        assert HealthStub(channel).Check(HealthCheckRequest()).status == 1


def test_grpc_tells_who_must_wait() -> None:
    with live_server(keys=[key(SLOW, "read", bucket=TokenBucket(0.1, 1))]) as live:
        client = triton_grpc.InferenceServerClient(live.grpc)
        assert client.is_model_ready("pixels", headers=bearer(SLOW))
        with pytest.raises(InferenceServerException) as refused:
            client.is_model_ready("pixels", headers=bearer(SLOW))
        client.close()
    assert refused.value.status() == str(grpc.StatusCode.RESOURCE_EXHAUSTED)


def test_reflection_tells_the_calls_to_who_may_read(live: Live) -> None:
    class WithKey(grpc.StreamStreamClientInterceptor):  # type: ignore[misc]
        def intercept_stream_stream(self, proceed: Any, details: Any, requests: Any) -> Any:
            return proceed(details._replace(metadata=tuple(bearer(READ).items())), requests)

    with grpc.insecure_channel(live.grpc) as channel:
        database = ProtoReflectionDescriptorDatabase(grpc.intercept_channel(channel, WithKey()))
        assert {SERVICE, "grpc.health.v1.Health"} <= set(database.get_services())
        file = database.FindFileContainingSymbol(SERVICE)
        assert {call.name for service in file.service for call in service.method} >= set(METHODS)
        for name in REFLECTION:
            ask = channel.stream_stream(
                f"/{name}/ServerReflectionInfo",
                request_serializer=ServerReflectionRequest.SerializeToString,
                response_deserializer=ServerReflectionResponse.FromString,
            )
            request = [ServerReflectionRequest(list_services="")]
            (reply,) = ask(iter(request), metadata=tuple(bearer(READ).items()))
            assert SERVICE in [service.name for service in reply.list_services_response.service]
            with pytest.raises(grpc.RpcError) as refused:
                list(ask(iter(request)))
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"content-type": "application/json; charset=utf-8"}, 200),
        ({"content-type": "text/plain"}, 200),
        ({"content-type": "text/plain", "user-agent": "Mozilla/5.0 (X11; Linux x86_64)"}, 415),
        ({"content-type": "text/plain", "origin": PAGE}, 415),
        ({"content-type": "multipart/form-data; boundary=x"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"sec-fetch-site": "same-origin"}, 415),
        ({"origin": PAGE}, 415),
        ({"origin": PAGE, "content-type": "application/json"}, 200),
        ({"origin": "https://evil.example", "content-type": "application/json"}, 403),
        ({"origin": "null", "content-type": "application/json"}, 403),
        ({"host": "evil.example", "origin": "http://evil.example", "content-type": "application/json"}, 403),
        ({"host": "evil.example:8000"}, 403),
        ({"host": "localhost:8000", "origin": "http://localhost:8000", "content-type": "application/json"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "192.168.1.1"}, 200),
    ],
)
def test_no_web_page_of_others_unloads_a_model(keyless: httpx.Client, headers: dict[str, str], status: int) -> None:
    reply = keyless.post(UNLOAD, headers=headers)
    assert reply.status_code == status, reply.text
    states = {item["name"]: item["state"] for item in keyless.get("/v1/variants").json()["variants"]}
    assert states["b"] == ("unloaded" if status == 200 else "serving")


def test_with_a_key_the_service_may_have_a_name(http: httpx.Client) -> None:
    named = bearer(ADMIN) | {"host": "models.example.com", "content-type": "application/json"}
    assert http.post(LOAD, headers=named).status_code == 200
    assert http.post(LOAD, headers=named | {"origin": "http://models.example.com"}).status_code == 200
    assert http.post(LOAD, headers=named | {"origin": "https://evil.example"}).status_code == 403


def test_where_other_machines_reach_it_admin_verbs_need_a_key() -> None:
    anywhere, here = Access(), Access(local=True)
    assert anywhere.admit("predict", {}) is None
    assert anywhere.admit("read", {}) is None
    with pytest.raises(Unauthorized, match=r"auth\.keys"):
        anywhere.admit("admin", {})
    assert here.admit("admin", {}) is None


def test_every_admin_action_is_one_line(live: Live, http: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "leanserve.audit")
    assert http.post(UNLOAD, headers=bearer(ADMIN)).status_code == 200
    assert http.post(UNLOAD).status_code == 401
    with triton_grpc.InferenceServerClient(live.grpc) as client:
        client.load_model("pixels/versions/b", headers=bearer(ALL))
    assert http.post("/v2/repository/models/pixels/versions/poor/load", headers=bearer(ADMIN)).status_code == 503
    told = [json.loads(record.getMessage()) for record in caplog.records if record.name == "leanserve.audit"]
    assert told == [
        entry("key admin", "unload", "pixels/versions/b", {"b": "serving"}, {"b": "unloaded"}, "ok"),
        entry("key all", "load", "pixels/versions/b", {"b": "unloaded"}, {"b": "serving"}, "ok"),
        entry("key admin", "load", "pixels/versions/poor", {"poor": "excluded"}, {"poor": "excluded"}, "not_ready"),
    ]
    assert ADMIN not in caplog.text


def entry(who: str, action: str, target: str, before: Any, after: Any, outcome: str) -> dict[str, Any]:
    return {"who": who, "action": action, "target": target, "before": before, "after": after, "outcome": outcome}


def test_without_keys_the_address_is_told(keyless: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "leanserve.audit")
    assert keyless.post(UNLOAD).status_code == 200
    (told,) = [json.loads(record.getMessage()) for record in caplog.records if record.name == "leanserve.audit"]
    assert (told["who"], told["outcome"]) == ("127.0.0.1", "ok")


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return hmac_compare(left, right)

    hmac_compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", compare)
    access = Access(keys())
    assert access.admit("read", {b"x-api-key": READ.encode()}) == "read"
    with pytest.raises(Unauthorized):
        access.admit("read", {b"x-api-key": b"unknown"})
    assert [len(left) for left, _ in compared] == [32, 32], "also where there is none like it"


def test_a_key_costs_under_a_hundredth_of_a_request() -> None:
    """Without keys a request is asked for no more than a flag."""
    access, headers = Access(keys()), {b"authorization": b"Bearer " + PREDICT.encode()}
    assert in_calls(lambda: access.admit_over_http("predict", headers)) < CALLS_OF_A_REQUEST / 100
    assert not Access(local=True).keyed
