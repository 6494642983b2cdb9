"""Sessions of onnxruntime are opened in one place, which turns its telemetry off first."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

import leanserve
from leanserve.runtime.formats.onnx_session import onnx_session
from leanserve.runtime.linux.spin_control import RELU

ROOT = Path(leanserve.__file__).parent


def test_no_other_file_opens_one() -> None:
    found = {
        path.name
        for path in ROOT.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("InferenceSession")
    }
    assert found == {"onnx_session.py"}


def test_telemetry_is_off_before_a_session_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    opened = onnxruntime.InferenceSession

    def record(*args: Any, **options: Any) -> object:
        order.append("session")
        return opened(*args, **options)

    monkeypatch.setattr(onnxruntime, "disable_telemetry_events", lambda: order.append("off"))
    monkeypatch.setattr(onnxruntime, "InferenceSession", record)
    session = onnx_session(RELU, onnxruntime.SessionOptions())
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert order == ["off", "session"]
