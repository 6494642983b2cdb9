"""The example `onnx-file`: made, built and asked in every way that it names; the answers are those of the file."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import onnx
import onnxruntime
import pytest
from test_end_to_end import start, stop
from tritonclient import http as triton

from leanserve.config.schema import read_config
from leanserve.contracts import Array

EXAMPLE = Path(__file__).parent.parent / "examples" / "onnx-file"
ROWS = 24
TOLERANCE = {"float": 1e-5, "int8": 0.1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with its files made, and two of its variants."""
    copy = tmp_path_factory.mktemp("example")
    for name in ("make_model.py", "config.yaml"):
        shutil.copy(EXAMPLE / name, copy)
    subprocess.run([sys.executable, "make_model.py"], cwd=copy, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    head, *variants = (copy / "config.yaml").read_text().split("  - name: ")
    kept = [text for text in variants if text.split()[0] in TOLERANCE]
    assert len(kept) == len(TOLERANCE)
    (copy / "config.yaml").write_text("  - name: ".join([head, *kept]))
    return copy


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    service = start(folder / "config.yaml", folder / "cache", folder / "log", within=280)
    yield service.url
    assert stop(service) == 0


@pytest.fixture(scope="module")
def rows(folder: Path) -> Array:
    with np.load(folder / "digits.npz") as stored:
        pixels: Array = stored["pixels"][:ROWS]
    return pixels


@pytest.fixture(scope="module")
def logits(folder: Path, rows: Array) -> Array:
    """Of the file as it is, which takes one row at a time."""
    model = onnx.load(folder / "model.onnx")
    model.ir_version = 10  # onnx writes a format that onnxruntime is yet to learn
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.concatenate([np.asarray(session.run(None, {"pixels": row[None]})[0]) for row in rows])


def shares(predictions: list[dict[str, Any]]) -> Array:
    return np.array([[answer["scores"][str(digit)] for digit in range(10)] for answer in predictions])


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def ask(url: str, media_type: str, body: bytes, variant: str) -> Any:
    reply = httpx.post(url + "/v1/predict", content=body, headers={"content-type": media_type, "x-variant": variant})
    assert reply.status_code == 200, reply.text
    return reply.json()


@pytest.mark.parametrize("variant", TOLERANCE)
def test_every_format_gets_the_answers_of_the_file(url: str, rows: Array, logits: Array, variant: str) -> None:
    npy = io.BytesIO()
    np.save(npy, rows)
    npz = io.BytesIO()
    np.savez(npz, pixels=rows)
    bodies = {
        "application/json": json.dumps({"inputs": rows.tolist()}).encode(),
        "application/x-npy": npy.getvalue(),
        "application/x-npz": npz.getvalue(),
        "application/octet-stream": rows.astype("<f4").tobytes(),
    }
    for media_type, body in bodies.items():
        found = shares(ask(url, media_type, body, variant)["predictions"])
        np.testing.assert_allclose(found, softmax(logits), rtol=0, atol=TOLERANCE[variant], err_msg=media_type)


def test_clients_of_the_protocol_find_the_names_of_the_graph(url: str, rows: Array, logits: Array) -> None:
    tensor = triton.InferInput("pixels", list(rows.shape), "FP32")
    tensor.set_data_from_numpy(rows)
    with triton.InferenceServerClient(url.removeprefix("http://")) as client:
        found = client.infer("digits-net", [tensor], model_version="float").as_numpy("logits")
    np.testing.assert_allclose(found, logits, rtol=1e-4, atol=1e-4)


def test_the_row_in_the_readme_is_a_zero(url: str) -> None:
    body = re.findall(r"-d '(\{.*?\})'", (EXAMPLE / "README.md").read_text(), re.DOTALL)
    assert len(body) == 1
    assert ask(url, "application/json", body[0].encode(), "float")["label"] == "0"


def test_a_row_that_does_not_fit_is_refused_with_its_place(url: str) -> None:
    reply = httpx.post(url + "/v1/predict", json={"inputs": [[0] * 64, [0] * 63]})
    assert reply.status_code == 400
    assert reply.json() == {"error": "inputs[1]: expected 64 entries, got 63", "code": "bad_input"}


def test_the_variants_are_measured_against_the_labels(url: str) -> None:
    listed = httpx.get(url + "/v1/variants").json()["variants"]
    assert {item["name"]: item["state"] for item in listed} == dict.fromkeys(TOLERANCE, "serving")
    assert all(item["quality"]["score"] > 0.9 and item["quality"]["samples"] == 500 for item in listed)
    assert all(item["quality"]["macs"] == 64 * 512 + 512 * 512 + 512 * 10 for item in listed)


def test_the_whole_config_is_valid_and_short() -> None:
    assert len((EXAMPLE / "config.yaml").read_text().splitlines()) < 30
    assert len(read_config(EXAMPLE / "config.yaml").variants) == 5
