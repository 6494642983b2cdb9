"""`/openapi.json` is generated from the table of endpoints: what it says of each, and that it says it of all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from fakes import live_server
from leanserve.api.v2.described import infer_query
from leanserve.contracts import ModelSpec, TensorSpec
from openapi import body_of, followed

NAMES = ["a", "b", "broken", "held"]


@pytest.fixture(scope="module")
def document() -> Iterator[Any]:
    with live_server(model_control="explicit") as live:
        yield httpx.get(f"http://{live.http}/openapi.json").json()


def test_every_path_is_told_with_its_verb(document: Any) -> None:
    told = {(method, path) for path, methods in document["paths"].items() for method in methods}
    model, version = "/v2/models/{model}", "/v2/models/{model}/versions/{version}"
    swaps = [f"/v2/repository/models/{{model}}{each}" for each in ("", "/versions/{version}")]
    assert told == {
        *(("get", path) for path in ("/healthz", "/readyz", "/metrics", "/v1/variants", "/v1/models", "/v2")),
        *(("get", path) for path in ("/v2/health/live", "/v2/health/ready", "/v2/models/stats")),
        *(("get", root + end) for root in (model, version) for end in ("", "/config", "/stats", "/ready")),
        *(("post", f"{root}/infer") for root in (model, version)),
        *(("post", f"{root}/{swap}") for root in swaps for swap in ("load", "unload")),
        ("post", "/v1/predict"),
        ("post", "/v2/repository/index"),
        *(("get", path) for path in ("/v1/live", "/v1/live/stream", "/v1/base", "/v1/report")),
        *(("get", path) for path in ("/v1/experiment", "/v1/experiment/disagreements")),
        *(("post", f"/v1/experiment/{verb}") for verb in ("start", "promote", "abort")),
        ("put", "/v1/experiment"),
    }


def test_a_prediction_is_told_whole(document: Any) -> None:
    told = document["paths"]["/v2/models/{model}/versions/{version}/infer"]["post"]
    assert set(told["requestBody"]["content"]) == {"application/json", "application/octet-stream"}
    parameters = {item["name"].lower(): item for item in told["parameters"]}
    assert {name for name, item in parameters.items() if item["in"] == "path"} == {"model", "version"}
    assert {name for name, item in parameters.items() if item["in"] == "header"} == {
        "x-variant",
        "x-caller-key",
        "inference-header-content-length",
    }
    assert [item["required"] for item in parameters.values()] == [item["in"] == "path" for item in parameters.values()]
    assert parameters["version"]["schema"]["enum"] == NAMES
    assert set(told["responses"]) == {
        "200",
        "default",
        *map(str, (400, 401, 403, 404, 405, 413, 415, 429, 500, 503, 504)),
    }
    reply = followed(document, told["responses"]["200"]["content"]["application/json"]["schema"])
    assert {"model_name", "model_version", "outputs", "parameters"} <= set(reply["properties"])
    refusal = followed(document, told["responses"]["429"]["content"]["application/json"]["schema"])
    assert refusal["required"] == ["error", "code"]


def test_loading_is_not_told_of_where_it_is_not_allowed() -> None:
    with live_server() as live, httpx.Client(base_url=f"http://{live.http}") as http:
        assert not [path for path in http.get("/openapi.json").json()["paths"] if path.endswith("load")]
        assert body_of(http, "/v2/models/{model}/infer")["required"] == ["inputs"]


def test_tensors_are_told_by_name_shape_and_datatype() -> None:
    spec = ModelSpec(
        (TensorSpec("ids", "int64", (None,)), TensorSpec("x", "float32", (3, 500))),
        (TensorSpec("y", "float32", (2,)),),
    )
    schema = infer_query(spec).model_json_schema()
    assert "example" not in schema, "its rows are too large to be shown"
    first, second = (schema["$defs"][name]["properties"] for name in ("InputTensor0", "InputTensor1"))
    assert (first["name"]["const"], first["datatype"]["const"]) == ("ids", "INT64")
    assert second["datatype"]["enum"] == ["FP32", "FP16", "BF16"]
    rows, three, many = second["shape"]["prefixItems"]
    assert (rows["minimum"], three["const"], many["const"]) == (1, 3, 500)
    assert (second["shape"]["minItems"], second["shape"]["maxItems"]) == (3, 3)
