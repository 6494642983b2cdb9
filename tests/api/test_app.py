"""The HTTP service over a fleet of scripted variants: replies, refusals, stickiness, metrics, draining."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from io import BytesIO

import httpx
import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from fakes import LABELS, open_variants
from leanserve.api.app import create_app
from leanserve.codecs.images import ImageCodec
from leanserve.errors import BadInput
from leanserve.serving.fleet import Fleet


@asynccontextmanager
async def client() -> AsyncIterator[tuple[httpx.AsyncClient, Fleet]]:
    gate = threading.Event()
    gate.set()
    service = open_variants(gate, limits={"body_bytes": 2000}).service()
    app, fleet = create_app(service), service.fleet
    try:
        transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            yield http, fleet
    finally:
        fleet.close()


def run(scenario: Callable[[httpx.AsyncClient, Fleet], object]) -> None:
    async def body() -> None:
        async with client() as (http, fleet):
            await scenario(http, fleet)  # type: ignore[misc]

    asyncio.run(body())


def test_the_device_of_a_variant_is_that_of_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        gate = threading.Event()
        gate.set()
        opened = open_variants(gate)
        monkeypatch.setattr(opened.warm.variants["b"].running.backends[0], "device", "cuda")
        fleet = opened.service().fleet
        page = fleet.metrics.render()[0].decode().splitlines()
        fleet.close()
        lines = {name: next(line for line in page if f'_lanes{{device="{name}"' in line) for name in ("cpu", "cuda")}
        assert 'version="a"' in lines["cpu"]
        assert 'version="b"' in lines["cuda"]

    asyncio.run(scenario())


def image(brightest: int, image_format: str = "PNG", value: int = 255) -> bytes:
    pixels = np.zeros(4, np.uint8)
    pixels[brightest] = value
    buffer = BytesIO()
    Image.fromarray(pixels.reshape(2, 2)).save(buffer, image_format)
    return buffer.getvalue()


PNG = {"content-type": "image/png"}


def test_an_image_gets_its_label_and_the_reply_says_who_answered_and_how() -> None:
    async def scenario(http: httpx.AsyncClient, fleet: Fleet) -> None:
        for index, label in enumerate(LABELS):
            reply = await http.post("/v1/predict", content=image(index), headers=PNG | {"x-variant": "b"})
            body = reply.json()
            assert reply.status_code == 200
            assert body["label"] == label
            assert set(body) == {"label", "scores", "variant", "queue_ms", "inference_ms", "batch_rows"}
            assert body["variant"] == reply.headers["x-variant"] == "b"
            assert set(body["scores"]) == set(LABELS)
            assert sum(body["scores"].values()) == pytest.approx(1, abs=1e-5)
            assert body["batch_rows"] == 1

    run(scenario)


def test_json_pixels_one_or_many() -> None:
    async def scenario(http: httpx.AsyncClient, fleet: Fleet) -> None:
        one = (await http.post("/v1/predict", json={"inputs": [[0, 0], [255, 0]]})).json()
        assert one["label"] == "two"
        many = (await http.post("/v1/predict", json={"inputs": [[[255, 0], [0, 0]], [[0, 0], [0, 255]]]})).json()
        assert [item["label"] for item in many["predictions"]] == ["zero", "three"]
        assert many["batch_rows"] == 2

    run(scenario)


def test_weights_stickiness_and_explicit_choice() -> None:
    async def ask(http: httpx.AsyncClient, headers: dict[str, str]) -> str:
        reply = await http.post("/v1/predict", json={"inputs": [[0, 0], [200, 0]]}, headers=headers)
        return str(reply.json()["variant"])

    async def scenario(http: httpx.AsyncClient, fleet: Fleet) -> None:
        assert {await ask(http, {}) for _ in range(40)} == {"a", "b"}  # 'broken' has no weight, 'poor' does not serve
        sticky = {key: {await ask(http, {"x-caller-key": key}) for _ in range(3)} for key in map(str, range(20))}
        assert all(len(seen) == 1 for seen in sticky.values())
        assert {name for seen in sticky.values() for name in seen} == {"a", "b"}
        assert await ask(http, {"x-caller-key": "1", "x-variant": "broken"}) == "broken"

    run(scenario)


@pytest.mark.parametrize(
    ("path", "content", "headers", "status", "text"),
    [
        ("/v1/predict", b"no image", PNG, 400, ""),
        ("/v1/predict", image(0)[:-30], PNG, 400, ""),
        ("/v1/predict", b'{"inputs": [[1, 2], [3]]}', {"content-type": "application/json"}, 400, ""),
        ("/v1/predict", b"", {"content-type": "application/json"}, 400, ""),
        ("/v1/predict", b"hello", {"content-type": "text/plain"}, 415, ""),
        ("/v1/predict", b"x" * 2001, PNG, 413, "2001 bytes; at most 2000"),
        (
            "/v1/predict",
            image(0),
            PNG | {"x-variant": "nobody"},
            404,
            "no variant 'nobody'; there are a, b, broken, held, poor",
        ),
        ("/v1/predict", image(0), PNG | {"x-variant": "poor"}, 503, "excluded: score 0.5"),
        ("/v1/predict", image(0), PNG | {"x-variant": "broken"}, 500, "under id"),
        ("/v1/nothing", b"", {}, 404, "no such path: /v1/nothing"),
        ("/metrics", b"", {}, 405, "does not take POST"),
    ],
)
def test_every_failure_is_one_error_text(
    path: str, content: bytes, headers: dict[str, str], status: int, text: str
) -> None:
    async def scenario(http: httpx.AsyncClient, fleet: Fleet) -> None:
        reply = await http.post(path, content=content, headers=headers)
        assert reply.status_code == status
        body = reply.json()
        assert set(body) == {"error", "code"}
        assert body["error"]
        assert text in body["error"]
        assert "secret" not in body["error"]

    run(scenario)


@pytest.mark.parametrize("blamed", [False, True], ids=["as it is", "taken for a bad body"])
def test_memory_that_runs_out_while_decoding_is_a_503_that_says_when_to_come_again(
    monkeypatch: pytest.MonkeyPatch, *, blamed: bool
) -> None:
    def decode(*_: object) -> None:
        lacking = MemoryError("Unable to allocate 8.00 GiB for an array")
        if blamed:
            raise BadInput("the image cannot be read") from lacking
        raise lacking

    async def scenario(http: httpx.AsyncClient, fleet: Fleet) -> None:
        monkeypatch.setattr(ImageCodec, "prepare", decode)
        reply = await http.post("/v1/predict", content=image(0), headers=PNG)
        assert (reply.status_code, reply.json()["code"], reply.headers["retry-after"]) == (503, "out_of_memory", "1")
        counted = [line for line in (await http.get("/metrics")).text.splitlines() if 'outcome="out_of_memory"' in line]
        assert sum(float(line.rpartition(" ")[2]) for line in counted if "requests_total" in line) == 1

    run(scenario)


def test_predict_takes_post_only() -> None:
    async def scenario(http: httpx.AsyncClient, fleet: Fleet) -> None:
        reply = await http.get("/v1/predict")
        assert (reply.status_code, reply.headers["allow"]) == (405, "POST")
        assert "takes POST" in reply.json()["error"]

    run(scenario)


def test_variants_health_openapi_and_readiness_while_draining() -> None:
    async def scenario(http: httpx.AsyncClient, fleet: Fleet) -> None:
        variants = (await http.get("/v1/variants")).json()["variants"]
        assert [(item["name"], item["state"]) for item in variants] == [
            ("a", "serving"),
            ("b", "serving"),
            ("broken", "serving"),
            ("held", "serving"),
            ("poor", "excluded"),
        ]
        assert variants[4]["reason"].startswith("score 0.5")
        assert [item["traffic_share"] for item in variants] == [0.5, 0.5, 0, 0, 0]
        assert variants[0]["batch_rows"] in {1, 2, 4, 8, 16, 32}
        assert "/v1/predict" in (await http.get("/openapi.json")).json()["paths"]
        assert (await http.get("/docs")).status_code == 200
        assert (await http.get("/readyz")).status_code == 200
        fleet.draining = True
        assert (await http.get("/readyz")).status_code == 503
        assert (await http.get("/healthz")).status_code == 200
        reply = await http.post("/v1/predict", content=image(1), headers=PNG)
        assert reply.status_code == 200  # draining refuses nobody who still comes

    run(scenario)


def test_metrics_count_what_happened() -> None:
    async def scenario(http: httpx.AsyncClient, fleet: Fleet) -> None:
        for _ in range(3):
            await http.post("/v1/predict", content=image(0), headers=PNG | {"x-variant": "a"})
        await http.post("/v1/predict", content=image(0), headers=PNG | {"x-variant": "broken"})
        await http.post("/v1/predict", content=b"nonsense", headers=PNG | {"x-variant": "a"})
        text = (await http.get("/metrics")).text
        samples = {
            (sample.name, sample.labels.get("version"), sample.labels.get("outcome")): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }
        assert samples[("leanserve_requests_total", "a", "ok")] == 3
        assert samples[("leanserve_requests_total", "a", "bad_input")] == 1
        assert samples[("leanserve_requests_total", "broken", "backend_failed")] == 1
        assert samples[("leanserve_batch_rows_sum", "a", None)] == 3
        assert samples[("leanserve_inference_duration_seconds_count", "a", None)] == 3
        assert samples[("leanserve_queue_duration_seconds_count", "a", None)] == 3
        assert samples[("leanserve_device_busy_seconds_total", "a", None)] > 0

    run(scenario)
