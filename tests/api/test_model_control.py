"""Loading and unloading over the model repository extension: `tritonclient` unmodified, and what is refused."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from tritonclient import grpc as triton_grpc
from tritonclient import http as triton_http
from tritonclient import utils
from tritonclient.http import aio

from fakes import POOR, Live, live_server

PIXELS = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
ONE = "/v2/repository/models/pixels/versions/b"
ALL = "/v2/repository/models/pixels"
NAMES = ["a", "b", "broken", "held"]


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_server(model_control="explicit") as server:
        yield server


@pytest.fixture(params=["http", "grpc"])
def client(live: Live, request: pytest.FixtureRequest) -> Iterator[Any]:
    """tritonclient, by either transport."""
    made: Any = triton_http if request.param == "http" else triton_grpc
    with made.InferenceServerClient(getattr(live, request.param)) as opened:
        yield opened


@pytest.fixture
def http(live: Live) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{live.http}") as opened:
        yield opened


def image(client: Any) -> Any:
    made = triton_http if isinstance(client, triton_http.InferenceServerClient) else triton_grpc
    tensor = made.InferInput("image", list(PIXELS.shape), "FP32")
    tensor.set_data_from_numpy(PIXELS)
    return tensor


def states(live: Live) -> dict[str, tuple[str, str]]:
    """Version -> state and reason."""
    index = httpx.post(f"http://{live.http}/v2/repository/index").json()
    return {item["version"]: (item["state"], item["reason"]) for item in index}


def test_a_client_of_others_unloads_and_loads_the_whole_model(live: Live, client: Any) -> None:
    backends = [live.fleet.variants[name].backend for name in NAMES]
    client.unload_model("pixels")
    assert all(backend.closed for backend in backends)  # type: ignore[attr-defined]
    assert not client.is_model_ready("pixels")
    assert not client.is_server_ready()
    assert client.is_server_live()
    assert set(states(live).values()) == {("UNAVAILABLE", "unloaded"), ("UNAVAILABLE", POOR)}
    with pytest.raises(utils.InferenceServerException, match="no variant of 'pixels' is loaded"):
        client.infer("pixels", [image(client)])
    with pytest.raises(utils.InferenceServerException, match="no variant of 'pixels' is loaded"):
        client.get_model_metadata("pixels")
    client.load_model("pixels")
    assert client.is_model_ready("pixels")
    assert client.infer("pixels", [image(client)]).as_numpy("logits") is not None
    assert [name for name, (state, _) in states(live).items() if state == "READY"] == NAMES


def test_a_client_of_others_swaps_a_single_version(live: Live, client: Any) -> None:
    client.unload_model("pixels/versions/b")
    assert states(live)["b"] == ("UNAVAILABLE", "unloaded")
    assert not client.is_model_ready("pixels", "b")
    with pytest.raises(utils.InferenceServerException, match="variant 'b' is unloaded"):
        client.infer("pixels", [image(client)], model_version="b")
    for _ in range(20):
        client.infer("pixels", [image(client)])
    client.load_model("pixels/versions/b")
    client.load_model("pixels/versions/b")  # is loaded: nothing to do
    client.infer("pixels", [image(client)], model_version="b")


def test_the_asynchronous_client_of_others(live: Live) -> None:
    async def scenario() -> None:
        async with aio.InferenceServerClient(live.http) as client:
            await client.unload_model("pixels/versions/a", unload_dependents=True)
            assert not await client.is_model_ready("pixels", "a")
            await client.load_model("pixels/versions/a")
            assert await client.is_model_ready("pixels", "a")

    asyncio.run(scenario())


def test_everything_that_tells_about_variants_follows(http: httpx.Client) -> None:
    def told() -> tuple[str, float, bool, str]:
        body = http.get("/v1/variants").json()
        (about,) = [item for item in body["variants"] if item["name"] == "b"]
        versions = http.get("/v2/models/pixels").json()["versions"]
        page = http.get("/metrics").text.splitlines()
        (info,) = [line for line in page if line.startswith("leanserve_variant_info") and 'version="b"' in line]
        return about["state"], about["traffic_share"], "b" in versions, info.partition('state="')[2].partition('"')[0]

    def answered() -> float:
        page = http.get("/metrics").text.splitlines()
        (line,) = [line for line in page if line.startswith("nv_inference_count") and 'version="b"' in line]
        return float(line.split()[-1])

    infer = {"inputs": [{"name": "image", "shape": [1, 1, 2, 2], "datatype": "FP32", "data": [0, 1, 2, 3]}]}
    assert http.post("/v2/models/pixels/versions/b/infer", json=infer).status_code == 200
    rows = answered()
    assert told() == ("serving", 0.5, True, "serving")
    assert http.post(f"{ONE}/unload").json() == {}
    assert told() == ("unloaded", 0.0, False, "unloaded")
    assert answered() == rows
    refused = http.post("/v2/models/pixels/versions/b/infer", json=infer)
    assert (refused.status_code, refused.json()["code"]) == (503, "not_ready")
    assert http.get("/v2/models/pixels/versions/b").status_code == 503
    assert http.get("/v2/models/pixels/versions/b/ready").status_code == 503
    assert http.get("/readyz").status_code == 200
    assert http.post(f"{ONE}/load", json={}).status_code == 200
    assert told() == ("serving", 0.5, True, "serving")
    assert http.post("/v2/models/pixels/versions/b/infer", json=infer).status_code == 200
    assert answered() == rows + 1
    assert "model_repository" in http.get("/v2").json()["extensions"]
    assert set(http.get("/openapi.json").json()["paths"]) >= {f"{ALL.replace('pixels', '{model}')}/load"}


def test_readiness_ends_where_nothing_is_loaded(http: httpx.Client) -> None:
    assert http.post(f"{ALL}/unload").status_code == 200
    try:
        for path in ("/readyz", "/v2/models/pixels/ready", "/v2/models/pixels/config", "/v2/models/stats"):
            assert http.get(path).status_code == 503
        assert http.get("/v2/health/live").status_code == 200
        assert http.get("/v1/variants").json()["variants"][0]["traffic_share"] == 0
        assert http.get("/metrics").status_code == 200
    finally:
        assert http.post(f"{ALL}/load").status_code == 200
    assert http.get("/readyz").status_code == 200


@pytest.mark.parametrize(
    ("path", "content", "status", "text"),
    [
        (
            f"{ALL}/load",
            b'{"parameters": {"config": "{}"}}',
            400,
            "'config' are not taken: a version is loaded as it was",
        ),
        (f"{ALL}/load", b'{"parameters": {"unload_dependents": true}}', 400, "'unload_dependents' are not taken"),
        (f"{ONE}/unload", b'{"parameters": {"file:1/x": ""}}', 400, "'file:1/x' are not taken"),
        (f"{ONE}/unload", b'{"parameters": 1}', 400, "must be a JSON object"),
        (f"{ONE}/unload", b"[]", 400, "must be a JSON object"),
        (f"{ONE}/unload", b"{", 400, "not valid JSON"),
        (f"{ALL}/versions/poor/load", b"", 503, f"variant 'poor' is excluded: {POOR}"),
        (f"{ALL}/versions/poor/unload", b"", 503, f"variant 'poor' is excluded: {POOR}"),
        (f"{ALL}/versions/x/load", b"", 404, "no version 'x' of 'pixels'; there are a, b"),
        ("/v2/repository/models/other/load", b"", 404, "no model 'other'; this server has 'pixels'"),
    ],
)
def test_refusals(live: Live, http: httpx.Client, path: str, content: bytes, status: int, text: str) -> None:
    reply = http.post(path, content=content)
    assert reply.status_code == status
    assert text in reply.json()["error"]
    assert list(live.fleet.variants) == NAMES
    assert http.get(path).status_code in {404, 405}


def test_refusals_over_grpc(live: Live) -> None:
    with triton_grpc.InferenceServerClient(live.grpc) as client:
        for name, text in (("other", "no model 'other'"), ("pixels/versions/x", "no variant 'x'")):
            with pytest.raises(utils.InferenceServerException, match=text) as refused:
                client.load_model(name)
            assert refused.value.status() == str(grpc.StatusCode.NOT_FOUND)
        with pytest.raises(utils.InferenceServerException, match="'config' are not taken"):
            client.load_model("pixels", config="{}")


def test_the_last_version_is_not_unloaded_by_its_name(live: Live, http: httpx.Client) -> None:
    for name in NAMES[1:]:
        assert http.post(f"{ALL}/versions/{name}/unload").status_code == 200
    try:
        reply = http.post(f"{ALL}/versions/a/unload")
        assert (reply.status_code, reply.json()["code"]) == (400, "bad_input")
        assert "variant 'a' is the last one that serves" in reply.json()["error"]
    finally:
        assert http.post(f"{ALL}/load").status_code == 200
    assert list(live.fleet.variants) == NAMES


def test_an_image_that_was_being_decoded_is_answered_by_another_variant(
    live: Live, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding, unloaded = threading.Event(), threading.Event()
    prepare = type(live.service.base.codec).prepare

    def slow(*args: Any) -> Any:
        prepared = prepare(*args)

        def finish() -> Any:
            decoding.set()
            assert unloaded.wait(10)
            return prepared.finish()

        return prepared._replace(finish=finish)

    def predict(name: str | None, replies: list[httpx.Response]) -> None:
        headers = {"x-variant": name} if name else {"x-caller-key": key}
        replies.append(
            httpx.post(f"http://{live.http}/v1/predict", json={"inputs": [[0, 0], [255, 0]]}, headers=headers)
        )

    key = next(str(number) for number in range(99) if live.fleet.choose(None, str(number)).name == "b")
    monkeypatch.setattr(type(live.service.base.codec), "prepare", slow)
    for name, status in ((None, 200), ("b", 503)):
        replies: list[httpx.Response] = []
        decoding.clear()
        unloaded.clear()
        caller = threading.Thread(target=predict, args=(name, replies))
        caller.start()
        assert decoding.wait(10)
        assert http.post(f"{ONE}/unload").status_code == 200
        unloaded.set()
        caller.join()
        assert http.post(f"{ONE}/load").status_code == 200
        assert replies[0].status_code == status
        if status == 200:
            assert replies[0].json()["variant"] == replies[0].headers["x-variant"] == "a"
        else:
            assert "variant 'b' is unloaded" in replies[0].json()["error"]


def test_it_is_off_unless_the_config_says_otherwise() -> None:
    with live_server() as live, httpx.Client(base_url=f"http://{live.http}") as http:
        for path in (f"{ALL}/load", f"{ALL}/unload", f"{ONE}/load", f"{ONE}/unload"):
            reply = http.post(path)
            assert reply.status_code == 400
            assert "set model_control: explicit in the config" in reply.json()["error"]
        assert "model_repository" not in http.get("/v2").json()["extensions"]
        assert list(live.fleet.variants) == NAMES
        with (
            triton_grpc.InferenceServerClient(live.grpc) as client,
            pytest.raises(utils.InferenceServerException, match="set model_control: explicit"),
        ):
            client.unload_model("pixels")
