"""A server that listens before it has a fleet: what it answers, and how the fleet takes over or the start ends."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from fakes import open_variants
from leanserve.api.access import Access
from leanserve.api.front import Front
from leanserve.api.reloading import Reload
from leanserve.api.server import Address, Server
from leanserve.api.service import Service
from leanserve.api.starting import StartingApp
from leanserve.config.schema import ServiceConfig
from leanserve.contracts import Base
from leanserve.errors import StartupError
from leanserve.serving.opening import WarmFleet
from leanserve.telemetry.startup import BuildNews, Startup

CONFIG = ServiceConfig.model_validate(
    {"base": "digits", "variants": [{"name": "float"}, {"name": "onnx", "passes": [{"kind": "onnxruntime"}]}]}
)


@pytest.fixture
def startup() -> Startup:
    started = Startup(["float", "onnx"])
    started.building(BuildNews("onnx", "onnxruntime", 1, 4))
    return started


def ask(startup: Startup, method: str, path: str, config: ServiceConfig = CONFIG, **headers: str) -> httpx.Response:
    async def scenario() -> httpx.Response:
        app = Front(StartingApp(startup, config, Access()))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:  # type: ignore[arg-type]
            return await http.request(method, path, headers=headers)

    return asyncio.run(scenario())


@pytest.mark.parametrize(
    ("path", "body"), [("/healthz", {"live": True}), ("/v2/health/live", {"live": True, "ready": False})]
)
def test_it_is_alive(startup: Startup, path: str, body: dict[str, bool]) -> None:
    reply = ask(startup, "GET", path)
    assert (reply.status_code, reply.json()) == (200, body)
    assert ask(startup, "HEAD", path).status_code == 200


@pytest.mark.parametrize("path", ["/readyz", "/v2/health/ready"])
def test_it_is_not_ready_and_says_how_far_it_is(startup: Startup, path: str) -> None:
    reply = ask(startup, "GET", path)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
    body = reply.json()
    assert body["progress"].pop("seconds") >= 0
    assert body == {
        "error": "the service is starting: building variant 'onnx' (onnxruntime), 1 of 4 artifacts done, 0 s so far",
        "code": "not_ready",
        "ready": False,
        "progress": {"phase": "building", "variant": "onnx", "pass": "onnxruntime", "done": 1, "total": 4},
    }


def test_its_variants_are_listed_with_their_states(startup: Startup) -> None:
    startup.exclude("float", "score 0.5 is too low")
    listed = ask(startup, "GET", "/v1/variants")
    assert listed.status_code == 200
    body = listed.json()
    assert (body["model"], body["starting"]["phase"]) == (None, "building")
    assert body["variants"] == [
        {"name": "float", "state": "excluded", "reason": "score 0.5 is too low", "passes": []},
        {"name": "onnx", "state": "building", "reason": None, "passes": ["onnxruntime"]},
    ]


@pytest.mark.parametrize("accept", ["*/*", "application/openmetrics-text"])
def test_its_metrics_say_that_it_is_not_ready(startup: Startup, accept: str) -> None:
    reply = ask(startup, "GET", "/metrics", accept=accept)
    assert reply.status_code == 200
    families = text_string_to_metric_families(reply.text)
    samples = {sample.name: sample.value for family in families for sample in family.samples}
    assert samples["leanserve_ready"] == 0
    assert samples["leanserve_build_progress"] == 0.25
    assert samples["process_start_time_seconds"] > 0


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/predict"),
        ("GET", "/v1/predict"),
        ("POST", "/v2/models/digits/infer"),
        ("GET", "/v2"),
        ("POST", "/v2/repository/index"),
        ("GET", "/openapi.json"),
        ("POST", "/healthz"),
        ("GET", "/nothing"),
    ],
)
def test_whatever_needs_the_model_is_refused_with_a_time_to_come_again(
    startup: Startup, method: str, path: str
) -> None:
    reply = ask(startup, method, path)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "5")
    assert set(reply.json()) == {"error", "code"}
    assert reply.json()["code"] == "not_ready"


def test_pages_of_other_origins_may_read_that_it_starts(startup: Startup) -> None:
    page = {"origin": "https://page.example"}
    cors = ServiceConfig.model_validate(CONFIG.model_dump() | {"cors": {"origins": [page["origin"]]}})
    refused = ask(startup, "POST", "/v1/predict", cors, **page)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (503, page["origin"])
    preflight = ask(startup, "OPTIONS", "/v1/predict", cors, **page, **{"access-control-request-method": "POST"})
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, page["origin"])
    assert "access-control-allow-origin" not in ask(startup, "GET", "/healthz", CONFIG, **page).headers


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v1/embeddings"), ("GET", "/v1/models"), ("GET", "/v1/models/digits")]
)
def test_clients_of_openai_are_refused_in_their_shape(startup: Startup, method: str, path: str) -> None:
    startup.all_built()
    reply = ask(startup, method, path)
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert reply.json()["error"]["code"] == "not_ready"


@dataclass
class Slow:
    """Starts when it is told to, or fails with `failure`."""

    warm: WarmFleet | None = None
    failure: BaseException | None = None
    startup: Startup = field(default_factory=lambda: Startup(["a"]))
    may_end: threading.Event = field(default_factory=threading.Event)
    stopped: bool = False

    def run(self) -> WarmFleet:
        assert self.may_end.wait(20)
        if self.failure is not None:
            raise self.failure
        assert self.warm is not None
        return self.warm

    def stop(self) -> None:
        self.stopped = True
        self.may_end.set()

    experiments: Path | None = None

    def write_traffic(self, weights: Mapping[str, float], caps: Mapping[str, float]) -> None:
        raise NotImplementedError

    def reload(self, current: ServiceConfig, base: Base) -> Reload:
        raise NotImplementedError


@contextmanager
def running(start: Slow, config: ServiceConfig, told: list[Any] | None = None) -> Iterator[tuple[Server, str]]:
    """A server in a thread, and its address."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = Server(config, Address(listening), start, (told if told is not None else []).append)
    thread = threading.Thread(target=server.run, args=([listening],))
    collector = gc.get_threshold()
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        start.may_end.set()
        server.should_exit = True
        thread.join(20)
        listening.close()
        gc.unfreeze()
        gc.set_threshold(*collector)
    assert not thread.is_alive()


BODY = {"inputs": [[0, 0], [255, 0]]}


def test_an_open_connection_is_served_by_the_fleet_that_takes_over() -> None:
    gate = threading.Event()
    gate.set()
    opened, told = open_variants(gate), list[Service]()
    start = Slow(opened.warm)
    with running(start, opened.config, told) as (_, url), httpx.Client(base_url=url) as http:
        wait_for(lambda: http.get("/healthz").status_code == 200)
        before = http.post("/v1/predict", json=BODY)
        assert (before.status_code, before.json()["code"], told) == (503, "not_ready", [])
        stream = before.extensions["network_stream"].get_extra_info("socket").getsockname()
        start.may_end.set()
        wait_for(lambda: bool(told))
        replies = [http.post("/v1/predict", json=BODY) for _ in range(3)]  # whose head is known from the second on
        assert [reply.json()["label"] for reply in replies] == ["two"] * 3
        assert replies[-1].extensions["network_stream"].get_extra_info("socket").getsockname() == stream
        assert http.get("/readyz").json() == {"ready": True}
        assert {"leanserve_ready 1.0", "leanserve_build_progress 1.0"} <= set(http.get("/metrics").text.splitlines())
        assert "starting" not in http.get("/v1/variants").json()
    assert [service.fleet.device for service in told] == [opened.warm.device]
    opened.warm.close()


def test_nothing_is_refused_any_more_once_it_was_said_to_be_ready() -> None:
    gate = threading.Event()
    gate.set()
    opened, told = open_variants(gate), list[Service]()
    start, refused = Slow(opened.warm), list[float]()
    with running(start, opened.config, told) as (_, url):

        def client() -> None:
            with httpx.Client(base_url=url) as http:
                for _ in range(200):
                    was_told = bool(told)
                    if http.post("/v1/predict", json=BODY).status_code != 200 and was_told:
                        refused.append(time.perf_counter())

        clients = [threading.Thread(target=client) for _ in range(3)]
        wait_for(lambda: httpx.get(url + "/healthz").status_code == 200)
        for thread in clients:
            thread.start()
        time.sleep(0.1)
        start.may_end.set()
        for thread in clients:
            thread.join()
    assert told
    assert not refused
    opened.warm.close()


def test_a_start_that_fails_ends_the_server_with_its_reason() -> None:
    start = Slow(failure=StartupError("variant 'a' fails its gate"))
    with running(start, CONFIG) as (server, url):
        wait_for(lambda: httpx.get(url + "/healthz").status_code == 200)
        start.may_end.set()
        wait_for(lambda: server.failure is not None)
    assert server.failure is start.failure


def wait_for(happens: Any) -> None:
    give_up = time.monotonic() + 20
    while True:
        try:
            if happens():
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < give_up
        time.sleep(0.01)
