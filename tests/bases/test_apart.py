"""A base that is looked at in a process of its own is described as it is in this one, and so are its faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from leanserve.bases.opening import open_base
from leanserve.bases.origin import Origin
from leanserve.errors import ConfigError, StartupError
from tiny_graphs import graph, write

SCALED = "agraph (float[N, 4] x) => (float[N, 4] y) { y = Sigmoid (x) }"


def origin(folder: Path, name: str) -> Origin:
    return Origin.model_validate({"base": {"onnx": name}, "data": {"synthetic": 8}, "folder": folder})


def test_it_is_the_same_base(tmp_path: Path) -> None:
    write(tmp_path / "m.onnx", graph(SCALED))
    ours, theirs = (open_base(origin(tmp_path, "m.onnx"), where) for where in ("here", "apart"))
    assert (ours.spec, ours.digest) == (theirs.spec, theirs.digest)


def test_what_is_wrong_is_told_in_the_same_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "m.onnx", graph("agraph (float x) => (float y) { y = Neg (x) }"))
    with pytest.raises(ConfigError, match="'x' is a single value"):
        open_base(origin(tmp_path, "m.onnx"), "apart")
    monkeypatch.setattr("leanserve.child.command", lambda *_: ["/bin/false"])
    with pytest.raises(StartupError, match="looks at the model ended with status 1"):
        open_base(origin(tmp_path, "m.onnx"), "apart")
