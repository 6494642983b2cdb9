"""TensorRT's engines are kept beside the graph: whole, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from leanserve.runtime.backends.engine_cache import SUMS, EngineCache


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_what_was_kept_is_there_again(tmp_path: Path) -> None:
    folder = tmp_path / "tensorrt"
    cache = EngineCache(folder)
    (folder / "graph.engine").write_bytes(b"one shape")
    cache.keep()
    (folder / "graph.engine").write_bytes(b"two shapes")  # TensorRT makes an engine anew for shapes that it has not met
    cache.keep()
    EngineCache(folder)
    assert names(folder) == {"graph.engine", SUMS}


@pytest.mark.parametrize("damage", ["cut", "added", "gone", "unlisted", "no list"])
def test_what_is_not_as_it_was_kept_is_made_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "tensorrt"
    cache = EngineCache(folder)
    for name in ("a.engine", "b.profile"):
        (folder / name).write_bytes(b"made of the graph")
    cache.keep()
    done: dict[str, Callable[[], object]] = {
        "cut": lambda: (folder / "a.engine").write_bytes(b"made of"),  # killed while it was written
        "added": lambda: (folder / "c.engine").write_bytes(b"by somebody else"),
        "gone": (folder / "b.profile").unlink,
        "unlisted": lambda: (folder / SUMS).write_text("[]"),
        "no list": (folder / SUMS).unlink,
    }
    done[damage]()
    EngineCache(folder)
    assert names(folder) == set()
    assert "are made again" in caplog.text


def test_nothing_is_summed_up_while_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = EngineCache(tmp_path / "tensorrt")
    (tmp_path / "tensorrt" / "a.engine").write_bytes(b"x")
    cache.keep()
    monkeypatch.setattr("leanserve.runtime.backends.engine_cache.sha256_of", lambda _: pytest.fail("read again"))
    cache.keep()
