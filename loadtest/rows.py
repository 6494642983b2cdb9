"""What is sent: rows for any base behind a server, from files or from what the server says of itself.

    auto            the digits for the base `digits`, else random
    digits          scikit-learn's handwritten digits as PNG; `digits-json`: as pixels in JSON
    random          tensors that fit what `GET /v2/models/N` says, with random values
    FOLDER          its files of images or sounds, as they are; those in sub-folders are named after these
    FILE.npz        arrays by the names of the inputs, a row at a time, as tensors; images (uint8) as PNG
    FILE.csv ...    texts (also .tsv, .jsonl and .txt), one per line
    CONFIG.yaml     what its section `data` names, else random

Tensors go to the Open Inference Protocol as bytes, all else to `/v1/predict`.
"""

from __future__ import annotations

import csv
import io
import json
import mimetypes
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import yaml
from numpy.typing import NDArray

from loadtest.target import TargetError, asked, digits

Array = NDArray[Any]
PREDICT: Final = "/v1/predict"
MOST: Final = 512
"""Rows that are read of a source; they are sent again and again."""
RANDOM_ROWS, RANDOM_LENGTH, RANDOM_TOKENS = 32, 32, 100
DTYPES: Final = {
    "BOOL": "bool",
    **{f"{sign}INT{bits}": f"{sign.lower()}int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": f"float{bits}" for bits in (16, 32, 64)},
}
TYPES: Final = {".flac": "audio/flac", ".wav": "audio/wav", ".webp": "image/webp", ".avif": "image/avif"}
"""By endings that not every system's table of media types has."""


class LoadRow(NamedTuple):
    """One request: where to (`{variant}` stands for the variant), its body and headers, and the label that a right
    answer names; `None`: nobody knows it."""

    path: str
    body: bytes
    headers: dict[str, str]
    label: str | None = None


def rows_for(host: str, source: str) -> list[LoadRow]:
    """The rows of a source for the base behind a server. Raises `TargetError`: there are none, or they do not suit."""
    if source == "auto":
        source = "digits" if asked(host, "/v1/variants").get("model") == "digits" else "random"
    if source in {"digits", "digits-json"}:
        found = digits("png" if source == "digits" else "json")
        return [LoadRow(PREDICT, item.body, {"content-type": item.media_type}, item.label) for item in found]
    if source == "random":
        return _random(host)
    path = Path(source)
    if not path.exists():
        raise TargetError(f"there is no {path}; rows are auto, digits, digits-json, random, or a file or folder")
    try:
        rows = _of_path(host, path)
    except (OSError, ValueError, KeyError, csv.Error) as error:
        raise TargetError(f"cannot read rows from {path}: {error!r}") from error
    if not rows:
        raise TargetError(f"there are no rows in {path}")
    return rows[:MOST]


def _of_path(host: str, path: Path) -> list[LoadRow]:
    if path.is_dir():
        return list(_files(path))
    if path.suffix in {".yaml", ".yml"}:
        return _of_config(host, path)
    if path.suffix == ".npz":
        return _arrays(host, path)
    return [_text(text) for text in _texts(path, 0)]


def _of_config(host: str, path: Path) -> list[LoadRow]:
    """The rows of the section `data` of a config, of the gate split where each split has its own."""
    data = yaml.safe_load(path.read_text(encoding="utf-8")).get("data") or {}
    kind = next((key for key in ("images", "arrays", "texts") if key in data), None)
    if kind is None:
        return rows_for(host, "auto")
    named = data[kind]
    found = path.parent / (named.get("gate") or next(iter(named.values())) if isinstance(named, dict) else named)
    if kind == "texts":
        return [_text(text) for text in _texts(found, data.get("text", 0))]
    return _of_path(host, found)


def _files(folder: Path) -> Iterator[LoadRow]:
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        kind = TYPES.get(path.suffix.lower()) or mimetypes.guess_type(path.name)[0] or ""
        if kind.startswith(("image/", "audio/")):
            label = path.parent.name if path.parent != folder else None
            yield LoadRow(PREDICT, path.read_bytes(), {"content-type": kind.replace("x-wav", "wav")}, label)


def _texts(path: Path, column: str | int) -> Iterator[str]:
    with path.open(encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            lines = (json.loads(line) for line in file if line.strip())
            yield from (line if isinstance(line, str) else line[column or next(iter(line))] for line in lines)
        elif path.suffix in {".csv", ".tsv"}:
            form: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
            if isinstance(column, str):
                yield from (line[column] for line in csv.DictReader(file, **form))
            else:
                yield from (line[column] for line in csv.reader(file, **form) if line)
        else:
            yield from (line.rstrip("\r\n") for line in file if line.strip())


def _text(text: str) -> LoadRow:
    return LoadRow(PREDICT, json.dumps({"inputs": text}).encode(), {"content-type": "application/json"})


def _arrays(host: str, path: Path) -> list[LoadRow]:
    with np.load(path, allow_pickle=False) as stored:
        arrays = dict(stored)
    inputs = _inputs(host)
    if len(inputs) == 1 and inputs[0]["name"] not in arrays:
        arrays = {inputs[0]["name"]: next(iter(arrays.values()))}
    first = arrays[inputs[0]["name"]]
    if first.dtype == np.uint8 and inputs[0]["datatype"] != "UINT8":
        return [LoadRow(PREDICT, _png(image), {"content-type": "image/png"}) for image in first[:MOST]]
    rows = ({name: array[row] for name, array in arrays.items()} for row in range(len(first[:MOST])))
    return [_tensors(host, inputs, row) for row in rows]


def _random(host: str) -> list[LoadRow]:
    random = np.random.default_rng(0)
    inputs = _inputs(host)
    return [_tensors(host, inputs, {item["name"]: _drawn(random, item) for item in inputs}) for _ in range(RANDOM_ROWS)]


def _drawn(random: np.random.Generator, item: Any) -> Array:
    shape = [RANDOM_LENGTH if size < 0 else size for size in item["shape"][1:]]
    dtype = DTYPES.get(item["datatype"])
    if dtype is None:
        raise TargetError(f"no random rows for {item['name']!r} of datatype {item['datatype']}; name a source of rows")
    if "mask" in item["name"]:
        return np.ones(shape, dtype)
    if dtype.startswith("float"):
        return random.standard_normal(shape).astype(dtype)
    return random.integers(0, 2 if dtype == "bool" else RANDOM_TOKENS, shape).astype(dtype)


def _inputs(host: str) -> list[Any]:
    """What the model takes, as the server says."""
    return list(asked(host, f"/v2/models/{_model(host)}")["inputs"])


def _model(host: str) -> str:
    return str(asked(host, "/v1/variants")["model"])


def _tensors(host: str, inputs: Iterable[Any], row: dict[str, Array]) -> LoadRow:
    """One row as an infer request whose tensors follow its JSON."""
    told, chunks = [], []
    for item in inputs:
        array = np.ascontiguousarray(row[item["name"]][None], DTYPES[item["datatype"]])
        chunks.append(array.tobytes())
        told.append(
            {
                "name": item["name"],
                "datatype": item["datatype"],
                "shape": list(array.shape),
                "parameters": {"binary_data_size": array.nbytes},
            }
        )
    head = json.dumps({"inputs": told, "parameters": {"binary_data_output": True}}).encode()
    headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(head))}
    path = f"/v2/models/{_model(host)}/versions/{{variant}}/infer"
    return LoadRow(path, head + b"".join(chunks), headers)


def _png(image: Array) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image).save(file, "PNG")
    return file.getvalue()
