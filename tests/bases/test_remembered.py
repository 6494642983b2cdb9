"""What is remembered of a base is believed only if it was written for that base."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from leanserve.bases import description
from leanserve.bases.description import Description, Tensor, remembered
from leanserve.errors import ConfigError


def described(name: str = "one") -> Description:
    return Description(name=name, inputs=(), outputs=())


def never() -> Description:
    raise AssertionError("it is remembered")


def note(folder: Path) -> Path:
    (path,) = (folder / "bases").iterdir()
    return path


def test_it_is_asked_once(tmp_path: Path) -> None:
    assert remembered(tmp_path, "a", described) == described()
    assert remembered(tmp_path, "a", never) == described()
    assert remembered(None, "a", lambda: described("again")).name == "again"


@pytest.mark.timeout(20)
@pytest.mark.parametrize("damage", ["flipped", "edited", "copied", "fifo", "folder"])
def test_a_damaged_note_is_written_again_with_a_message(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    remembered(tmp_path, "a", described)
    path = note(tmp_path)
    if damage == "flipped":
        path.write_bytes(path.read_bytes().replace(b"one", b"two"))
    elif damage == "edited":
        path.write_text(described("edited").model_dump_json())
    elif damage == "copied":
        remembered(tmp_path / "other", "b", lambda: described("other"))
        path.write_bytes(note(tmp_path / "other").read_bytes())
    else:
        path.unlink()
        os.mkfifo(path) if damage == "fifo" else path.mkdir()
    assert remembered(tmp_path, "a", described) == described()
    assert str(path) in caplog.text
    assert remembered(tmp_path, "a", never) == described()


def test_a_folder_that_cannot_be_written_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remembered(tmp_path, "a", described)
    monkeypatch.setattr(description, "may_write", lambda _: False)
    assert remembered(tmp_path, "a", never) == described()
    assert remembered(tmp_path, "b", lambda: described("two")).name == "two"
    assert remembered(tmp_path / "nowhere", "b", described) == described()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [note(tmp_path).name]


def test_what_json_does_not_have_is_refused_when_it_is_written(tmp_path: Path) -> None:
    padded = Tensor(name="x", dtype="float32", shape=(None,), pad=float("nan"))
    odd = described().model_copy(update={"inputs": (padded,)})
    with pytest.raises(ConfigError, match=r"inputs\[0\]\.pad is nan"):
        remembered(tmp_path, "a", lambda: odd)
    assert not [*(tmp_path / "bases").iterdir(), *(tmp_path / "tmp").iterdir()]
