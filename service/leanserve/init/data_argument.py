"""What a person types to name data, as the config's `data:` section."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from leanserve.bases.datasets.arrays import headers
from leanserve.bases.datasets.image_folder import by_ending, image_folder
from leanserve.bases.datasets.sounds import sounds_below
from leanserve.codecs.image_formats import FORMAT_NAMES
from leanserve.contracts import Json, ModelSpec, TensorSpec
from leanserve.errors import ConfigError

SYNTHETIC: Json = {"synthetic": 64}
LABELS = ("labels", "label", "y", "targets", "target", "class", "category", "sentiment", "score", "similarity", "stars")
TEXTS = ("text", "sentence", "sentence1", "text1", "question", "question1", "query", "premise", "review", "content")
PAIRS = ("sentence2", "text2", "question2", "hypothesis", "passage", "document", "pair")
TABLES = frozenset({".csv", ".tsv", ".jsonl"})
LOOKED_AT = 50
"""Lines of a table that are looked at."""


@dataclass(frozen=True)
class ToldColumns:
    """What a person may tell of columns and arrays, by name."""

    text: str | None = None
    pair: str | None = None
    label: str | None = None
    inputs: tuple[str, ...] = ()
    """`INPUT=ARRAY`, per input of the model; or `ARRAY` alone for a model with one. Of a table `INPUT=COLUMN`, or
    several columns with commas between them."""


def data_section(
    path: Path | None, spec: ModelSpec, folder: Path, told: ToldColumns = ToldColumns()
) -> dict[str, Json]:
    """The `data:` section for a folder of images or recordings, an `.npz`, or a table; else synthetic rows. A table has
    texts for a model of rows of any length, else numbers and words in columns.

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
        if path.suffix in TABLES and spec.inputs and all(None not in item.shape for item in spec.inputs):
            return {"table": near, **_table(_head(path, [item.name for item in spec.inputs]), path, spec, told)}
        if path.suffix in TABLES:
            return {"texts": near, **_columns(_head(path), told, classes=bool(spec.labels))}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile, zlib.error, csv.Error) as error:
        raise ConfigError(f"--data {path}: not read as its name says: {str(error).splitlines()[0]}") from error
    raise ConfigError(
        f"--data {path}: give a folder of images or recordings, an .npz file, or a table as .csv, .tsv or .jsonl"
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


def _table(head: Head, path: Path, spec: ModelSpec, told: ToldColumns) -> dict[str, Json]:
    """The columns of every input and of the label: as told, by their names, else all that are left in their order."""
    names, _ = head
    if not names:
        raise ConfigError("--data: the file is empty")
    asked = {name: tuple(columns.split(",")) for name, columns in _told_inputs(told.inputs, spec).items()}
    taken = {column for columns in asked.values() for column in columns}
    own = {_letters(item.name) for item in spec.inputs if item.name not in asked}
    usual = [name for name in names if str(name) not in taken and _letters(str(name)) not in own]
    label = _column(told.label, names, "--label") if told.label else _named(usual, LABELS)
    chosen = {name: tuple(_column(column, names, "--inputs") for column in columns) for name, columns in asked.items()}
    chosen = _matched_columns(path, spec, [name for name in names if name != label], chosen)
    differing = {name: columns for name, columns in chosen.items() if columns != (name,)}
    inputs = {name: columns[0] if len(columns) == 1 else list(columns) for name, columns in differing.items()}
    return ({"inputs": inputs} if inputs else {}) | ({} if label is None else {"label": label})


def _matched_columns(
    path: Path, spec: ModelSpec, columns: Sequence[str | int], chosen: Mapping[str, tuple[str | int, ...]]
) -> dict[str, tuple[str | int, ...]]:
    """With the columns of inputs of which nothing was told: of their names, or all that are left if these are as many
    as the only other input takes."""
    found = dict(chosen)
    for item in spec.inputs:
        alike = [name for name in columns if _letters(str(name)) == _letters(item.name)]
        if item.name not in found and alike and _width(item) == 1:
            found[item.name] = (next((name for name in alike if name == item.name), alike[0]),)
    missing = [item for item in spec.inputs if item.name not in found]
    taken = {name for names in found.values() for name in names}
    left = tuple(name for name in columns if name not in taken)
    if len(missing) == 1 and len(left) == _width(missing[0]):
        found[missing[0].name] = left
    elif missing:
        takes = ", ".join(f"{item.name} ({_width(item)})" for item in spec.inputs)
        raise ConfigError(
            f"--data {path} has the columns {', '.join(map(str, columns))}, the model takes {takes}; say which are "
            f"which with --inputs {missing[0].name}=COLUMN{',COLUMN' if _width(missing[0]) > 1 else ''}"
        )
    return {item.name: found[item.name] for item in spec.inputs}


def _width(item: TensorSpec) -> int:
    """Values per row."""
    return math.prod(size or 1 for size in item.shape)


def _column(asked: str, names: Sequence[str | int], option: str) -> str | int:
    found = next((name for name in names if str(name) == asked), None)
    if found is None:
        raise ConfigError(f"{option} {asked}: there is no such column; the file has {', '.join(map(str, names))}")
    return found


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())


def _named(names: Sequence[str | int], usual: Sequence[str]) -> Any:
    """The first of the names that is a usual one."""
    by_letters = {_letters(str(name)): name for name in reversed(names)}
    return next((by_letters[name] for name in usual if name in by_letters), None)


Head: TypeAlias = tuple[Sequence[str | int], list[list[str]]]
"""Names of columns, and some lines."""


def _head(path: Path, names: Iterable[str] = ()) -> Head:
    """Column names (or numbers, where there is no header) and the first lines; `names` are those of the inputs."""
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
    known = {*LABELS, *TEXTS, *PAIRS, *map(_letters, names)}
    named = any(_letters(cell) in known for cell in table[0]) and len({*table[0]}) == len(table[0]) and len(table) > 1
    header = (named or any(numeric)) and not any(_is_number(cell) for cell in table[0])
    return (table[0], table[1:]) if header else (list(range(len(table[0]))), table)


def _columns(head: Head, told: ToldColumns, *, classes: bool) -> dict[str, Json]:
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
