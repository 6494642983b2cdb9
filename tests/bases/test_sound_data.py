"""Recordings in folders, and in tables, as the rows of a base."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter

from leanserve.bases.datasets.opening import open_rows
from leanserve.bases.description import Description, Tensor
from leanserve.bases.loaded import Rows
from leanserve.bases.opening import codec_of
from leanserve.config.base_section import AudioInput
from leanserve.config.data_section import AnyData
from leanserve.contracts import Array, Data
from leanserve.errors import ConfigError
from leanserve.init.data_argument import data_section, data_seen

WORDS = Description(
    name="words",
    inputs=(Tensor(name="wave", dtype="float32", shape=(400,)),),
    outputs=(Tensor(name="logits", dtype="float32", shape=(2,), meaning="logits"),),
    labels=("no", "yes"),
    audio=AudioInput(rate=8000, samples=400, hop=200),
)
ANY_LENGTH = WORDS.model_copy(
    update={
        "inputs": (Tensor(name="wave", dtype="float32", shape=(None,)),),
        "audio": AudioInput(rate=8000, samples=None),
        "max_length": 8000,
    }
)
SCORED = WORDS.model_copy(
    update={"labels": (), "outputs": (Tensor(name="mos", dtype="float32", shape=(1,), meaning="values"),)}
)


def rows(declared: dict[str, Any], folder: Path, description: Description = WORDS) -> Rows:
    data: AnyData = TypeAdapter(AnyData).validate_python(declared)
    return open_rows(data, description, codec_of(description, description.spec()), folder)


def everything(data: Data) -> tuple[list[Array], Array | None]:
    batches = list(data.batches(7))
    labels = [batch.labels for batch in batches if batch.labels is not None]
    return [row for batch in batches for row in batch.inputs[0]], np.concatenate(labels) if labels else None


def save(path: Path, samples: int, value: int, rate: int = 8000) -> None:
    """A recording of so many equal samples, `value` / 100."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(np.full(samples, value * 32767 // 100, "<i2").tobytes())


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Thirty recordings of one to three frames in folders of two classes, each of another loudness."""
    for number in range(30):
        save(tmp_path / f"clips/{('no', 'Yes')[number % 2]}/{number}.wav", 400 + 200 * (number % 3), number + 1)
    (tmp_path / "clips/no/notes.txt").write_text("no recording")
    save(tmp_path / "clips/.cache/x.wav", 400, 99)
    return tmp_path


def loudness(row: Array) -> int:
    return round(float(row[0]) * 100)


def test_frames_are_rows_and_those_of_a_recording_share_a_split(clips: Path) -> None:
    found = rows({"sounds": "clips", "splits": {"calibration": 12, "gate": 20}}, clips)
    of_split = {}
    for split in ("calibration", "gate", "train"):
        inputs, labels = everything(found.split(split, None))
        assert labels is not None
        assert [(loudness(row) - 1) % 2 for row in inputs] == labels.tolist()
        of_split[split] = sorted(map(loudness, inputs))
    all_rows = sorted(number for found in of_split.values() for number in found)
    assert all_rows == sorted(number + 1 for number in range(30) for _ in range(1 + number % 3))
    assert not set(of_split["gate"]) & (set(of_split["calibration"]) | set(of_split["train"]))


def test_a_recording_becomes_what_a_request_with_it_becomes(tmp_path: Path) -> None:
    for number in range(10):
        save(tmp_path / f"{number}.wav", 1001, number + 1, rate=16_000)
    found = rows({"sounds": "."}, tmp_path).split("gate", None)
    inputs, labels = everything(found)
    assert labels is None
    codec = codec_of(WORDS, WORDS.spec())
    wanted = {row.tobytes() for path in tmp_path.glob("*.wav") for row in codec.decode("", path.read_bytes()).inputs[0]}
    assert {row.tobytes() for row in inputs} <= wanted


def test_recordings_of_any_length_end_in_silence(tmp_path: Path) -> None:
    for number in range(10):
        save(tmp_path / f"{number}.wav", 100 * (number + 1), number + 1)
    found = rows({"sounds": ".", "splits": {"calibration": 2, "gate": 6}}, tmp_path, ANY_LENGTH)
    [batch] = found.split("gate", None).batches(8)
    for row in batch.inputs[0]:
        assert np.count_nonzero(row) == 100 * loudness(row)
        assert not row[100 * loudness(row) :].any()
    assert batch.inputs[0].shape[1] == 100 * max(map(loudness, batch.inputs[0]))


def test_a_table_names_recordings_with_classes_or_numbers(clips: Path) -> None:
    lines = [
        f"{('no', 'Yes')[number % 2]}/{number}.wav,{('no', 'yes')[number % 2]},{number / 10}" for number in range(30)
    ]
    (clips / "clips/all.csv").write_text("\n".join(["file,word,mos", *lines]))
    named = rows({"sounds": "clips/all.csv", "label": "word"}, clips)
    inputs, labels = everything(named.split("gate", None))
    assert labels is not None
    assert [(loudness(row) - 1) % 2 for row in inputs] == labels.tolist()
    scored = rows({"sounds": "clips/all.csv", "label": "mos"}, clips, SCORED)
    inputs, labels = everything(scored.split("gate", None))
    assert labels is not None
    assert [(loudness(row) - 1) / 10 for row in inputs] == pytest.approx(labels.tolist())
    assert everything(rows({"sounds": "clips/all.csv"}, clips).split("gate", None))[1] is None


def test_the_digest_follows_content_and_labels_not_the_place(clips: Path) -> None:
    first = rows({"sounds": "clips"}, clips).digest
    others = [rows({"sounds": "clips", **more}, clips).digest for more in ({"label": "none"}, {"seed": 1})]
    (clips / "clips").rename(clips / "moved")
    assert rows({"sounds": "moved"}, clips).digest == first
    save(clips / "moved/no/0.wav", 400, 50)
    assert len({first, *others, rows({"sounds": "moved"}, clips).digest}) == 4


def refused(folder: Path, text: str, description: Description = WORDS, **declared: Any) -> None:
    with pytest.raises(ConfigError, match=text):
        everything(rows({"sounds": "clips", **declared}, folder, description).split("gate", None))


def test_what_cannot_be_used_is_named(clips: Path) -> None:
    refused(clips, r"data.sounds: .*nothing is neither a folder of recordings nor a table", sounds="nothing")
    refused(clips, r"label is auto, folder or none; 'word' is a column", label="word")
    refused(clips, r"the model takes no sounds; .* base.audio", WORDS.model_copy(update={"audio": None}))
    refused(clips, r"name them in base.labels", WORDS.model_copy(update={"labels": ()}), label="folder")
    (clips / "clips/table.csv").write_text("file\nno/0.wav\nno/lost.wav")
    refused(clips, r"table.csv:3: there is no file .*lost.wav", sounds="clips/table.csv")
    save(clips / "clips/loose.wav", 400, 60)
    refused(clips, r"loose.wav lies in no folder of a class")
    (clips / "clips/loose.wav").unlink()
    (clips / "clips/no/0.wav").write_bytes(b"RIFF0000WAVEjunk")
    refused(clips, r"no/0.wav cannot be used: .*Repair or remove it")
    (clips / "empty").mkdir()
    refused(clips, r"there is no recording in .*empty; read are wav, flac", sounds="empty")


def test_init_tells_recordings_from_images(clips: Path) -> None:
    assert data_section(clips / "clips", WORDS.spec(), clips) == {"sounds": "clips"}
    assert data_seen(clips / "clips") == "30 recordings: 30 .wav; 1 other files are skipped: 1 .txt"
