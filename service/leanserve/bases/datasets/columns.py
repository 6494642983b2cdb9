"""`data: {table: FILE}`: rows of a table, numbers and words in columns, as the inputs of a model that takes arrays.

An input of one element per row is a column, a wider one several of them. Values are read as JSON numbers of a request
would be taken: what is no number of the input's dtype is an error with its file and line.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from leanserve.bases.checkpoints import file_digest
from leanserve.bases.datasets.class_labels import LabelColumn
from leanserve.bases.datasets.labels import LabelFiles, Understanding, understanding_of_column
from leanserve.bases.datasets.splits import RowSource as Numbers
from leanserve.bases.datasets.tables import PreparedData, TableRows, tables_of
from leanserve.bases.datasets.text_files import (
    ColumnName,
    Line,
    last_column,
    line_names,
    read_lines,
    require_table,
    text_digest,
)
from leanserve.codecs.arrays import ArrayCodec
from leanserve.config.data_section import TableData
from leanserve.contracts import Array, Arrays, Codec, ModelSpec, TensorSpec
from leanserve.errors import ConfigError
from leanserve.texts import STRING, array_of_texts

TRUTHS: Mapping[str, bool] = {"true": True, "1": True, "false": False, "0": False}
SAMPLED = 8
"""Rows on which a graph is tried."""

InputColumns = tuple[tuple[ColumnName, ...], ...]
"""Per input of the model."""


def open_columns(
    declared: TableData, spec: ModelSpec, codec: Codec, folder: Path, *, own_labels: bool = False
) -> TableRows:
    """The rows of the tables that the config declares; `own_labels` as for `open_arrays`.

    Raises:
        ConfigError: a file is missing or of an unknown format, or its columns do not suit the model.
    """
    if not isinstance(codec, ArrayCodec):
        raise ConfigError("data.table: the model takes no arrays; bring its rows as images, sounds or texts")
    understood = understanding_of_column(spec, own_labels=own_labels or declared.label is None)
    tables = tables_of("data.table", declared.table, folder, lambda paths: _tables(paths, declared, spec, understood))
    return TableRows("data.table", tables, declared.splits, declared.seed)


def _tables(
    paths: Mapping[str, Path], declared: TableData, spec: ModelSpec, understood: Understanding
) -> list[ColumnTable]:
    """A table per file, by the key that names it; the labels of all of them are read in the same way."""
    columns = columns_of(declared, spec.inputs)
    for key, path in paths.items():
        require_table(path, key)
    files = [ColumnFile(path, columns, declared.label) for path in paths.values()]
    labels = None
    if declared.label is not None:
        labels = LabelFiles({file.path: file.labels for file in files}, understood)
    return [ColumnTable(file, spec.inputs, labels) for file in files]


def columns_of(declared: TableData, inputs: Sequence[TensorSpec]) -> InputColumns:
    """The columns of every input, by default that of its name.

    Raises:
        ConfigError: an input is not of a fixed size, or has another number of columns than it takes.
    """
    unknown = [name for name in declared.inputs if name not in {item.name for item in inputs}]
    if unknown:
        takes = ", ".join(item.name for item in inputs)
        raise ConfigError(f"data.inputs: the model has no input '{unknown[0]}'; it takes {takes}")
    return tuple(_columns(item, declared.inputs.get(item.name, item.name)) for item in inputs)


def _columns(item: TensorSpec, named: ColumnName | tuple[ColumnName, ...]) -> tuple[ColumnName, ...]:
    columns = named if isinstance(named, tuple) else (named,)
    if None in item.shape:
        raise ConfigError(
            f"data.table: the input '{item.name}' takes rows of any length, which columns have not; bring them as "
            "arrays (data.arrays)"
        )
    if math.prod(size or 0 for size in item.shape) != len(columns):
        raise ConfigError(
            f"data.inputs: the input '{item.name}' takes {math.prod(size or 0 for size in item.shape)} values per row, "
            f"and has {len(columns)} columns ({', '.join(map(str, columns))}); list as many, in its order"
        )
    return columns


def first_lines(declared: TableData, inputs: Sequence[TensorSpec], folder: Path) -> list[Array] | None:
    """The first rows for these inputs; `None` where there are none: what is wrong is told when the table is opened."""
    path = declared.table if isinstance(declared.table, Path) else next(iter(declared.table.values()))
    try:
        require_table(folder / path, "data.table")
        file = ColumnFile(folder / path, columns_of(declared, inputs), None)
        rows = np.arange(min(SAMPLED, len(file.lines)))
        return list(ColumnTable(file, tuple(inputs), None).arrays(rows)) if len(rows) else None
    except ConfigError:
        return None


@dataclass(frozen=True)
class ColumnFile:
    """The lines of a file, read when one is asked for: the columns of all inputs, behind them that of the labels."""

    path: Path
    columns: InputColumns
    label: ColumnName | None

    @cached_property
    def lines(self) -> list[Line]:
        asked = [column for columns in self.columns for column in columns]
        return read_lines(self.path, [*asked, *([] if self.label is None else [self.label])])

    def labels(self) -> LabelColumn:
        """The last column."""
        assert self.label is not None
        return last_column(self.path, self.lines, self.label)


@dataclass(frozen=True)
class ColumnTable:
    """A `tables.Table` over the lines of a file."""

    file: ColumnFile
    inputs: tuple[TensorSpec, ...]
    label_files: LabelFiles | None

    @cached_property
    def digest(self) -> str:
        told = f"{file_digest(self.file.path)} {self.file.columns} {self.file.label}"
        return hashlib.sha256(told.encode()).hexdigest()

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        count = sum(map(len, self.file.columns))
        return tuple(text_digest(line.values[:count]) for line in self.file.lines)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return line_names(self.file.lines)

    def data(self, rows: Numbers) -> PreparedData:
        labels = None if self.label_files is None else self.label_files.of(self.file.path)
        return PreparedData(rows, self.arrays, labels)

    def arrays(self, rows: Numbers) -> Arrays:
        """These rows as the model's inputs.

        Raises:
            ConfigError: a value is none of its input's dtype; the text names its place.
        """
        start, arrays = 0, []
        for item, columns in zip(self.inputs, self.file.columns, strict=True):
            places = range(start, start + len(columns))
            arrays.append(self._array(item, columns, rows, places))
            start += len(columns)
        return tuple(arrays)

    def _array(self, item: TensorSpec, columns: Sequence[ColumnName], rows: Numbers, places: range) -> Array:
        lines = [self.file.lines[row] for row in rows]
        shape = (len(rows), *(size or 0 for size in item.shape))
        if item.dtype == STRING:
            return array_of_texts([line.values[place] for line in lines for place in places], shape)
        numbers = [
            _number(line.values[place], item, f"{self.file.path}:{line.number}: column {column}")
            for line in lines
            for column, place in zip(columns, places, strict=True)
        ]
        return np.array(numbers, item.array_dtype).reshape(shape)


def _number(text: str, item: TensorSpec, where: str) -> float | int | bool:
    """A value as the input takes it."""
    kind = item.array_dtype.kind
    try:
        if kind == "b":
            return TRUTHS[text.strip().casefold()]
        number = float(text)
        if kind == "f" and math.isfinite(number):
            return number
        limits = np.iinfo(item.array_dtype) if kind in "iu" else None
        if limits is not None and number.is_integer() and limits.min <= number <= limits.max:
            return int(text) if text.strip().lstrip("+-").isdigit() else int(number)
    except (KeyError, ValueError):
        pass
    found = f"'{text[:40]}'" if text.strip() else "nothing"
    raise ConfigError(f"{where}: the input '{item.name}' takes {item.dtype}, and there is {found}")
