"""Who is compared, and how each is asked: the same numbers for all, in the fastest form that a peer takes over HTTP.

A peer is a program in `servers/` that serves one ONNX file, run in a virtual environment of its own with the pinned
packages of `requirements/`; leanserve runs in the project's. All of them may use all cores and let requests of up to 32
rows share a batch, without a fixed delay where that can be told.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from leanserve.contracts import Array

HERE = Path(__file__).parent


class Request(NamedTuple):
    """A POST; `headers` beside the length of the body."""

    path: str
    headers: dict[str, str]
    body: bytes


class Form(NamedTuple):
    """A way to carry rows: the request to the network of that name, and the output of a 200 reply."""

    request: Callable[[str, Array], Request]
    output: Callable[[bytes], Any]


def _binary_request(network: str, rows: Array) -> Request:
    datatype = {"float32": "FP32", "int64": "INT64"}[rows.dtype.name]
    sent = {"name": "x", "shape": list(rows.shape), "datatype": datatype}
    wanted = {"name": "y", "parameters": {"binary_data": True}}
    document = {"inputs": [sent | {"parameters": {"binary_data_size": rows.nbytes}}], "outputs": [wanted]}
    head = json.dumps(document).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    return Request(f"/v2/models/{network}/infer", headers, head + rows.tobytes())


def _binary_output(body: bytes) -> Any:
    document, end = json.JSONDecoder().raw_decode(body.decode("latin-1"))
    assert document["outputs"][0]["name"] == "y"
    return np.frombuffer(body[end:], np.float32)


def _json_request(network: str, rows: Array) -> Request:
    datatype = {"float32": "FP32", "int64": "INT64"}[rows.dtype.name]
    sent = {"name": "x", "shape": list(rows.shape), "datatype": datatype, "data": rows.ravel().tolist()}
    body = json.dumps({"inputs": [sent]}).encode()
    return Request(f"/v2/models/{network}/infer", {"Content-Type": "application/json"}, body)


def _plain_json(wrap: Callable[[Any], Any]) -> Callable[[str, Array], Request]:
    def request(_: str, rows: Array) -> Request:
        body = json.dumps(wrap(rows.tolist())).encode()
        return Request("/predict", {"Content-Type": "application/json"}, body)

    return request


BINARY_V2 = Form(_binary_request, _binary_output)
JSON_V2 = Form(_json_request, lambda body: json.loads(body)["outputs"][0]["data"])
BYTES = Form(
    lambda _, rows: Request("/predict", {"Content-Type": "application/octet-stream"}, rows.tobytes()),
    lambda body: np.frombuffer(body, np.float32),
)
JSON_ROW = Form(_plain_json(lambda rows: {"row": rows[0]}), json.loads)
JSON_ROWS = Form(_plain_json(lambda rows: {"rows": rows}), json.loads)


@dataclass(frozen=True, slots=True)
class Peer:
    """A server to compare; `own` peers run in the project's environment, the others in one made for their `server`.

    `server` is the name where it is not given.
    """

    name: str
    form: Form
    own: bool = False
    options: tuple[str, ...] = field(default=())
    server: str = ""

    @property
    def program(self) -> Path:
        """What serves: takes the ONNX file, the port and the `options`."""
        return HERE / "servers" / f"{self.server or self.name}_server.py"

    @property
    def requirements(self) -> Path:
        """The pinned packages of its environment."""
        return HERE / "requirements" / f"{self.server or self.name}.txt"


PEERS = {
    peer.name: peer
    for peer in (
        Peer("leanserve", BINARY_V2, own=True),
        Peer("triton", BINARY_V2),
        Peer("fastapi", BYTES),
        Peer("fastapi-blocking", BYTES, options=("blocking",), server="fastapi"),
        Peer("litserve", JSON_ROW),
        Peer("bentoml", JSON_ROWS),
        Peer("ray", BYTES),
        Peer("mlserver", JSON_V2),
    )
}
