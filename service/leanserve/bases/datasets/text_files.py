"""CSV, TSV and JSONL as columns of text, every value with the line where it stands.

CSV follows RFC 4180: fields in quotes may hold commas, line ends and doubled quotes. TSV has no quoting, as its media
type says, so that an apostrophe or a quote in a sentence means nothing. A line of JSONL is an object or a list.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import numpy as np

from leanserve.bases.datasets.class_labels import LabelColumn
from leanserve.contracts import Json
from leanserve.disk import open_regular
from leanserve.errors import ConfigError

FORMATS = (".csv", ".tsv", ".jsonl")
ColumnName = str | int


class Line(NamedTuple):
    """The values of the asked columns, and the number of the line, from 1, where they begin."""

    number: int
    values: tuple[str, ...]


def read_lines(path: Path, columns: Sequence[ColumnName]) -> list[Line]:
    """All lines of a file that are not blank. Columns by name need a header, or objects in JSONL.

    Raises:
        ConfigError: the file cannot be read, or a line is not of its format or lacks a column; the text begins with
            `file:line`.
    """
    text = _text(path)
    if path.suffix == ".jsonl":
        return [Line(number, _picked(item, columns, path, number)) for number, item in _objects(text, path)]
    rows = _rows(text, path)
    places = _places(rows, columns, path)
    return [Line(number, _picked(row, places, path, number)) for number, row in rows]


def _text(path: Path) -> str:
    try:
        with open_regular(path) as stream:
            content = stream.read()
    except OSError as error:
        raise ConfigError(f"data: cannot read {path}: {error.strerror}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8 ({error.reason}); save the file in that encoding") from error


def _rows(text: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    stream = StringIO(text, newline="")
    if path.suffix == ".tsv":
        reader = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(stream, strict=True)
    begin = 1
    try:
        for row in reader:
            if row:
                yield begin, row
            begin = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError(f"{path}:{begin}: {error}") from error


def _places(rows: Iterator[tuple[int, list[str]]], columns: Sequence[ColumnName], path: Path) -> list[int]:
    """The columns as numbers; the header is taken off the rows if one of them is a name."""
    if not any(isinstance(column, str) for column in columns):
        return [int(column) for column in columns]
    number, header = next(rows, (1, []))
    names = [name.strip() for name in header]
    for column in columns:
        if isinstance(column, str) and column not in names:
            raise ConfigError(
                f"{path}:{number}: no column is called '{column}'; the header has {', '.join(names) or 'nothing'}"
            )
    return [names.index(column) if isinstance(column, str) else column for column in columns]


def _objects(text: str, path: Path) -> Iterator[tuple[int, Json]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}:{number}: not JSON: {error}") from error


def _picked(row: Json, columns: Sequence[ColumnName], path: Path, number: int) -> tuple[str, ...]:
    return tuple(_value(row, column, f"{path}:{number}") for column in columns)


def _value(row: Json, column: ColumnName, where: str) -> str:
    try:
        value = row[column]
    except (LookupError, TypeError):
        has = f"{len(row)} columns" if isinstance(row, list) else ", ".join(row) if isinstance(row, dict) else "a value"
        kind = "number" if isinstance(column, int) else "name"
        raise ConfigError(f"{where}: no column of the {kind} {column}; the line has {has}") from None
    if isinstance(value, bool):
        return json.dumps(value)  # a label may be one
    if isinstance(value, str | int | float):
        return str(value)
    raise ConfigError(f"{where}: column {column} holds {json.dumps(value)[:40]}, no text and no number")


def require_table(path: Path, key: str) -> None:
    """See that there is a file of a known format; `key` names it in the config.

    Raises:
        ConfigError: there is none.
    """
    if path.suffix not in FORMATS:
        raise ConfigError(f"{key}: {path} is none of {', '.join(FORMATS)}")
    if not path.is_file():
        raise ConfigError(f"{key}: there is no file {path}")


def last_column(path: Path, lines: Sequence[Line], name: ColumnName) -> LabelColumn:
    """The last of the asked columns as labels; `name` is what it is called."""
    values = np.array([line.values[-1] for line in lines], dtype=str)
    return LabelColumn(values, lambda row: f"{path}:{lines[row].number}: column {name}")


def line_names(lines: Sequence[Line]) -> tuple[str, ...]:
    """What errors call them."""
    return tuple(f"line {line.number}" for line in lines)


def text_digest(texts: Sequence[str]) -> bytes:
    """Of the content of a line, whatever else stands in it."""
    return hashlib.sha256("\0".join(texts).encode()).digest()
