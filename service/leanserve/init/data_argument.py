"""What a person types to name data, as the config's `data:` section."""

from __future__ import annotations

import csv
import json
import os
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leanserve.bases.datasets.arrays import headers
from leanserve.bases.datasets.image_folder import by_ending, image_folder
from leanserve.bases.datasets.sounds import sounds_below
from leanserve.codecs.image_formats import FORMAT_NAMES
from leanserve.contracts import Json, ModelSpec
from leanserve.errors import ConfigError

SYNTHETIC: Json = {"synthetic": 64}
LABELS = ("labels", "label", "y", "targets", "target", "class", "category", "sentiment", "score", "similarity", "stars")
TEXTS = ("text", "sentence", "sentence1", "text1", "question", "question1", "query", "premise", "review", "content")
PAIRS = ("sentence2", "text2", "question2", "hypothesis", "passage", "document", "pair")
LOOKED_AT = 50
"""Lines of a table that are looked at."""


@dataclass(frozen=True)
class ToldColumns:
    """What a person may tell of columns and arrays, by name."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None
    inputs: tuple[str, ...] = ()
    """`INPUT=ARRAY`, per input of the model; or `ARRAY` alone for a model with one."""


def data_section(
    path: Path | None, spec: ModelSpec, folder: Path, told: ToldColumns = ToldColumns()
) -> dict[str, Json]:
    """The `data:` section for a folder of images or recordings, an `.npz`, or a table of texts; else synthetic rows.

    Raises:
        ConfigError: none of these, or what was told of it is not there.
    """
    if path is None:
        return dict(SYNTHETIC)
    near = os.path.relpath(path, folder)
    if path.is_dir():
        return {"sounds" if _holds_sounds(path) else "images": near}
    if not path.is_file():
        raise ConfigError(f"--data: there is nothing at {path}")
    try:
        if path.suffix == ".npz":
            return {"arrays": near, **_arrays(path, spec, told)}
        if path.suffix in {".csv", ".tsv", ".jsonl"}:
            return {"texts": near, **_columns(_head(path), told, classes=bool(spec.labels))}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error, csv.Error) as error:
        raise ConfigError(f"--data {path}: not read as its name says: {str(error).splitlines()[0]}") from error
    raise ConfigError(
        f"--data {path}: give a folder of images or recordings, an .npz file, or texts as .csv, .tsv or .jsonl"
    )


def _holds_sounds(folder: Path) -> bool:
    """Whether a folder has recordings and no images."""
    return bool(sounds_below(folder)[0]) and not image_folder(folder, FORMAT_NAMES, "--data").files


def data_seen(path: Path | None) -> str | None:
    """What lies in a folder of images or recordings, on one line; of files nothing is said.

    Raises:
        ConfigError: the folder cannot be listed.
    """
    if path is None or not path.is_dir():
        return None
    if _holds_sounds(path):
        sounds, others = sounds_below(path)
        skipped = f"; {len(others)} other files are skipped: {by_ending(others)}" if others else ""
        return f"{len(sounds)} recordings: {by_ending(sounds)}{skipped}"
    return image_folder(path, FORMAT_NAMES, "--data").seen()


def _arrays(path: Path, spec: ModelSpec, told: ToldColumns) -> dict[str, Json]:
    try:
        found = headers(path, "--data")
    except ConfigError as error:
        raise ConfigError(f"--data {path}: not read as its name says: {error}") from error
    names = [name for name, header in found.items() if header.shape]
    label = told.label or _named(names, LABELS)
    if label is not None and label not in names:
        raise ConfigError(f"--label {label}: there is no such array in {path}; it has {', '.join(names)}")
    others = [name for name in names if name != label]
    chosen = _told_inputs(told.inputs, spec) or _matched(path, spec, others)
    section: dict[str, Json] = {}
    if any(name != array for name, array in chosen.items()):
        section["inputs"] = chosen if len(chosen) > 1 else next(iter(chosen.values()))
    return section | ({} if label is None else {"labels": label})


def _told_inputs(told: Sequence[str], spec: ModelSpec) -> dict[str, str]:
    found = {}
    for text in told:
        name, equals, array = text.rpartition("=")
        if not equals and len(spec.inputs) > 1:
            takes = ", ".join(item.name for item in spec.inputs)
            raise ConfigError(f"--inputs {text}: the model takes {takes}; give INPUT=ARRAY for each")
        found[name or spec.inputs[0].name] = array
    return found


def _matched(path: Path, spec: ModelSpec, arrays: Sequence[str]) -> dict[str, str]:
    """The array of every input: of its name, of its name but for case and signs, or the only one that is left."""
    chosen: dict[str, str] = {}
    for item in spec.inputs:
        alike = [name for name in arrays if _letters(name) == _letters(item.name)]
        chosen |= {item.name: next((name for name in alike if name == item.name), alike[0])} if alike else {}
    missing = [item.name for item in spec.inputs if item.name not in chosen]
    left = [name for name in arrays if name not in chosen.values()]
    if missing and len(missing) == 1 and (len(left) == 1 or (left and len(spec.inputs) == 1)):
        return {item.name: chosen.get(item.name, left[0]) for item in spec.inputs}
    if missing:
        takes = ", ".join(item.name for item in spec.inputs)
        raise ConfigError(
            f"--data {path} has the arrays {', '.join(arrays)}, the model takes {takes}; say which is which with "
            f"--inputs {missing[0]}=ARRAY"
        )
    return chosen


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())


def _named(names: Sequence[str | int], usual: Sequence[str]) -> Any:
    """The first of the names that is a usual one."""
    by_letters = {_letters(str(name)): name for name in reversed(names)}
    return next((by_letters[name] for name in usual if name in by_letters), None)


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


def _columns(head: tuple[Sequence[str | int], list[list[str]]], told: ToldColumns, *, classes: bool) -> dict[str, Json]:
    """The columns of text, pair and label: as told, by their names, else by what is in them."""
    names, rows = head
    if not rows:
        raise ConfigError("--data: the file is empty")
    guessed = _guessed(names, rows, told, classes=classes)
    section: dict[str, Json] = {}
    for key, name in guessed.items():
        asked = getattr(told, key)
        if asked is not None and asked not in map(str, names):
            columns = ", ".join(map(str, names))
            raise ConfigError(f"--{key} {asked}: there is no such column; the file has {columns}")
        if name is not None:
            section[key] = name
    return section


def _guessed(
    names: Sequence[str | int], rows: list[list[str]], told: ToldColumns, *, classes: bool
) -> dict[str, str | int | None]:
    """Long columns are texts, a column of numbers or of few words is the label."""

    def column(asked: str | None) -> str | int | None:
        return None if asked is None else next((name for name in names if str(name) == asked), asked)

    label = column(told.label) or _named(names, LABELS)
    numbers = [name for index, name in enumerate(names) if all(_is_number(row[index]) for row in rows)]
    words = sorted(
        (name for name in names if name not in numbers and name != label),
        key=lambda name: -sum(len(row[list(names).index(name)]) for row in rows),
    )
    known = column(told.text) or _named(words, TEXTS)
    pair = column(told.pair) or (None if classes else _named(words, PAIRS))
    if known is None and not words:
        raise ConfigError("--data: no column of texts found; name it with --text")
    text = known if known is not None else words[0]
    if pair is None and not classes and told.pair is None and len(words) > 1 and known is None:
        text, pair = sorted(words[:2], key=list(names).index)
    rest = [name for name in names if name not in {text, pair}]
    if label is None:
        label = next((name for name in rest if name in numbers), None)
    if label is None and classes:
        label = next(iter(rest), None)
    return {"text": text, "pair": pair, "label": label}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
