"""A base with a caveat, from the command line to the last client: the first line on the screen says it already."""

from __future__ import annotations

from pathlib import Path

import httpx
import onnx
from onnx.parser import parse_model
from test_end_to_end import start, stop

MODEL = """<ir_version: 8, opset_import: ["" : 17]>
agraph (float[1, 4] x) => (float[1, 4] y) { y = Softmax (x) }"""
CONFIG = "base: {onnx: m.onnx}\ndata: {synthetic: 32}\nvariants: [{name: float}]\ndrain: {delay_s: 0}\n"


def test_synthetic_data_is_told_by_build_serve_and_every_answer(tmp_path: Path) -> None:
    onnx.save(parse_model(MODEL), tmp_path / "m.onnx")
    (tmp_path / "c.yaml").write_text(CONFIG)
    service = start(tmp_path / "c.yaml", tmp_path / "cache", tmp_path / "log", within=120)
    try:
        reply = httpx.post(service.url + "/v1/predict", json={"inputs": [[0, 0, 0, 0]] * 3})
    finally:
        assert stop(service) == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert "float: passes its gate (synthetic data)" in lines
    assert any(line.startswith("ready in ") and line.endswith("(synthetic data)") for line in lines)
    assert reply.headers["x-caveats"] == "synthetic data"
    assert [answer["outputs"] for answer in reply.json()["predictions"]] == [{"y": [0.25] * 4}] * 3
