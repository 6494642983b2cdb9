"""A base with caveats, from the command line to the last client: the first line on the screen says them already."""

from __future__ import annotations

from pathlib import Path

import httpx
import onnx
import pytest
from onnx.parser import parse_model
from test_end_to_end import start, stop

MODEL = """<ir_version: 8, opset_import: ["" : 17]>
agraph (float[N, 4] x) => (float[N, 4] y) {
    first = Constant <value = int64[1] {0}> ()
    total = ReduceSum <keepdims = 1> (x, first)
    y = Mul (x, total)
}"""
"""Each row times the sum of all rows of its batch: a row alone becomes its square."""
CONFIG = """
base: {onnx: m.onnx, rows: one}
data: {synthetic: 32}
variants: [{name: float}, {name: again, passes: [{kind: onnxruntime}]}]
drain: {delay_s: 0}
"""
CAVEATS = "every row has a batch to itself, synthetic data"


@pytest.mark.soak
def test_what_to_know_of_a_base_is_told_by_build_serve_and_every_answer(tmp_path: Path) -> None:
    onnx.save(parse_model(MODEL), tmp_path / "m.onnx")
    (tmp_path / "c.yaml").write_text(CONFIG)
    service = start(tmp_path / "c.yaml", tmp_path / "cache", tmp_path / "log", within=120)
    try:
        reply = httpx.post(service.url + "/v1/predict", json={"inputs": [[0, 1, 2, 3], [5, 5, 5, 5], [1, 1, 2, 2]]})
    finally:
        assert stop(service) == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert f"float: passes its gate ({CAVEATS})" in lines
    assert any(line.startswith("ready in ") and line.endswith(f"({CAVEATS})") for line in lines)
    assert reply.headers["x-caveats"] == CAVEATS
    answers = [answer["outputs"]["y"] for answer in reply.json()["predictions"]]
    assert answers == [[0, 1, 4, 9], [25, 25, 25, 25], [1, 1, 4, 4]]
    assert reply.json()["batch_rows"] == 1
