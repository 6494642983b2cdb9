"""What a person types to name data, as the config's `data:` section."""

from __future__ import annotations

import csv
import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from leanserve.bases.datasets.image_folder import image_folder
from leanserve.codecs.image_formats import FORMAT_NAMES
from leanserve.contracts import Json, ModelSpec
from leanserve.errors import ConfigError

SYNTHETIC: Json = {"synthetic": 64}
LABELS = ("labels", "label", "y", "targets", "target")
LOOKED_AT = 50
"""Lines of a table that are looked at."""


def data_section(path: Path | None, spec: ModelSpec, folder: Path) -> dict[str, Json]:
    """The `data:` section for a folder of images, an `.npz`, or a table of texts; without a path synthetic rows.

    Raises:
        ConfigError: none of these.
    """
    if path is None:
        return dict(SYNTHETIC)
    near = os.path.relpath(path, folder)
    if path.is_dir():
        return {"images": near}
    if not path.is_file():
        raise ConfigError(f"--data: there is nothing at {path}")
    try:
        if path.suffix == ".npz":
            return {"arrays": near, **_arrays(path, spec)}
        if path.suffix in {".csv", ".tsv", ".jsonl"}:
            return {"texts": near, **_columns(_head(path), classes=bool(spec.labels))}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error, csv.Error) as error:
        raise ConfigError(f"--data {path}: not read as its name says: {str(error).splitlines()[0]}") from error
    raise ConfigError(f"--data {path}: give a folder of images, an .npz file, or texts as .csv, .tsv or .jsonl")


def data_seen(path: Path | None) -> str | None:
    """What lies in a folder of images, on one line; of files nothing is said.

    Raises:
        ConfigError: the folder cannot be listed.
    """
    if path is None or not path.is_dir():
        return None
    return image_folder(path, FORMAT_NAMES, "--data").seen()


def _arrays(path: Path, spec: ModelSpec) -> dict[str, Json]:
    with np.load(path, allow_pickle=False) as stored:
        names = [name for name in stored.files if stored[name].ndim >= 1]
    labels = next((name for name in LABELS if name in names), None)
    wanted = [item.name for item in spec.inputs]
    others = [name for name in names if name != labels]
    section: dict[str, Json] = {}
    if not set(wanted) <= set(others):
        if len(wanted) > 1 or not others:
            raise ConfigError(f"--data {path} has the arrays {', '.join(names)}, the model takes {', '.join(wanted)}")
        section["inputs"] = others[0]
    return section | ({} if labels is None else {"labels": labels})


def _head(path: Path) -> tuple[Sequence[str | int], list[list[str]]]:
    """Column names (or numbers, where there is no header) and the first lines."""
    with path.open(encoding="utf-8", newline="") as stream:
        if path.suffix == ".jsonl":
            rows = [json.loads(line) for _, line in zip(range(LOOKED_AT), stream, strict=False)]
            names = list(rows[0]) if rows else []
            return names, [[str(row.get(name, "")) for name in names] for row in rows]
        lines = csv.reader(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
        table = [line for _, line in zip(range(LOOKED_AT), lines, strict=False)]
    if not table:
        return [], []
    numeric = [_is_number(cell) for cell in table[-1]]
    header = any(numeric) and not any(_is_number(cell) for cell in table[0])
    return (table[0], table[1:]) if header else (list(range(len(table[0]))), table)


def _columns(head: tuple[Sequence[str | int], list[list[str]]], *, classes: bool) -> dict[str, Json]:
    """The columns of text, pair and label: long columns are texts, a column of numbers or of few words is the label."""
    names, rows = head
    if not rows:
        raise ConfigError("--data: the file is empty")
    numbers = [name for index, name in enumerate(names) if all(_is_number(row[index]) for row in rows)]
    words = sorted(
        (name for name in names if name not in numbers),
        key=lambda name: -sum(len(row[list(names).index(name)]) for row in rows),
    )
    if not words:
        raise ConfigError("--data: no column of texts found")
    pair = None if classes or len(words) < 2 else words[1]
    texts = sorted((words[0], *(() if pair is None else (pair,))), key=list(names).index)
    rest = [name for name in names if name not in texts]
    likely = [*(name for name in rest if name in LABELS), *(name for name in rest if name in numbers)]
    label = likely[0] if likely else None
    if label is None and classes:
        label = next(iter(rest), None)
    section: dict[str, Json] = {"text": texts[0]}
    if len(texts) > 1:
        section["pair"] = texts[1]
    return section | ({} if label is None else {"label": label})


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
