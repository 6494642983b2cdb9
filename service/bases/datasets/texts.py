"""`data: {texts: FILE}`: texts, or pairs of texts, one per line of a file.

Splits deal out lines. A pair becomes two consecutive rows, and both carry its label, so that a score can compare their
embeddings. Only the split that is asked for is tokenized, and batches are padded to their own longest text.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from service.api.codecs.text import TextCodec
from service.bases.checkpoints import file_digest
from service.bases.data_declaration import TextData
from service.bases.datasets.class_labels import class_numbers, require_labels
from service.bases.datasets.splits import Rows as Numbers
from service.bases.datasets.tables import TableRows
from service.bases.datasets.text_files import FORMATS, Line, read_lines
from service.contracts import Array, Batch, Codec, Data, Split
from service.errors import BadInput, ConfigError


def open_texts(declared: TextData, labels: Sequence[str], codec: Codec, folder: Path) -> TextRows:
    """The texts that the config declares; `labels` are the class names of the model, none for embeddings.

    Raises:
        ConfigError: a file is missing or of an unknown format, or the columns do not suit the model.
    """
    if not isinstance(codec, TextCodec):
        raise ConfigError("data.texts: the model takes no texts; if it does, name its tokenizer in base.text")
    if labels and declared.pair is not None:
        raise ConfigError("data.pair: the model classifies single texts; pairs are for models of embeddings")
    if declared.label is not None and declared.pair is None:
        require_labels(labels, "data.label")
    # Requests are bounded; a training set need not be.
    codec = replace(codec, max_characters=sys.maxsize, max_total=sys.maxsize, max_rows=sys.maxsize)
    unit = 1 if declared.pair is None else 2
    if isinstance(declared.texts, Path):
        table = _opened(declared, folder / declared.texts, "data.texts", labels, codec)
        return TextRows(TableRows("data.texts", table, declared.splits, declared.seed), unit)
    tables = {
        split: _opened(declared, folder / path, f"data.texts.{split}", labels, codec)
        for split, path in declared.texts.items()
    }
    return TextRows(TableRows("data.texts", tables, declared.splits, declared.seed), unit)


def _opened(declared: TextData, path: Path, key: str, labels: Sequence[str], codec: TextCodec) -> TextTable:
    if path.suffix not in FORMATS:
        raise ConfigError(f"{key}: {path} is none of {', '.join(FORMATS)}")
    if not path.is_file():
        raise ConfigError(f"{key}: there is no file {path}")
    return TextTable(path, declared, tuple(labels), codec)


@dataclass(frozen=True)
class TextRows:
    """A `bases.loaded.Rows`; every line of the files is `unit` rows."""

    lines: TableRows
    unit: int

    @property
    def digest(self) -> str:
        return self.lines.digest

    def split(self, split: Split, n: int | None) -> Data:
        return self.lines.split(split, None if n is None else n // self.unit)


@dataclass(frozen=True)
class TextTable:
    """A `tables.Table` over the lines of a file."""

    path: Path
    declared: TextData
    labels: tuple[str, ...]
    codec: TextCodec

    @cached_property
    def digest(self) -> str:
        columns = self.declared.model_dump_json(include={"text", "pair", "label"})
        tokens = f"{file_digest(self.codec.tokenizer)} {self.codec.max_length}"
        return hashlib.sha256(f"{file_digest(self.path)} {columns} {tokens}".encode()).hexdigest()

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        return tuple(hashlib.sha256("\0".join(texts).encode()).digest() for texts in self._texts)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(f"line {line.number}" for line in self._lines)

    def data(self, rows: Numbers) -> TokenData:
        texts = [text for row in rows for text in self._texts[row]]
        labels = None if self._labels is None else self._labels[rows]
        unit = len(self._text_columns)
        try:
            tokens = self.codec.tokens(texts) if texts else []
        except BadInput as error:
            raise ConfigError(f"data.texts: {self.path}: {error}") from error
        return TokenData(tokens, None if labels is None else np.repeat(labels, unit), unit, self.codec)

    @property
    def _text_columns(self) -> tuple[str | int, ...]:
        declared = self.declared
        return (declared.text,) if declared.pair is None else (declared.text, declared.pair)

    @cached_property
    def _lines(self) -> list[Line]:
        label = () if self.declared.label is None else (self.declared.label,)
        return read_lines(self.path, (*self._text_columns, *label))

    @cached_property
    def _texts(self) -> list[tuple[str, ...]]:
        return [line.values[: len(self._text_columns)] for line in self._lines]

    @cached_property
    def _labels(self) -> Array | None:
        """Class numbers int64, or similarities float64, one per line."""
        if self.declared.label is None:
            return None
        said = [(line.values[-1], f"{self.path}:{line.number}: column {self.declared.label}") for line in self._lines]
        if self.declared.pair is not None:
            return np.array([_similarity(value, where) for value, where in said], dtype=np.float64)
        first = dict(reversed(said))
        numbers = {value: class_numbers([value], self.labels, where)[0] for value, where in first.items()}
        return np.array([numbers[value] for value, _ in said], dtype=np.int64)


def _similarity(value: str, where: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{where}: the similarity of a pair is a number, not '{value}'")
    return number


@dataclass(frozen=True)
class TokenData:
    """`contracts.Data` of token ids; `unit` consecutive rows stay together when rows are shuffled."""

    tokens: list[list[int]]
    labels: Array | None
    unit: int
    codec: TextCodec

    def __len__(self) -> int:
        return len(self.tokens)

    def batches(self, size: int, shuffle_seed: int | None = None) -> Iterator[Batch]:
        order = np.arange(len(self)).reshape(-1, self.unit)
        if shuffle_seed is not None:
            np.random.default_rng(shuffle_seed).shuffle(order)
        flat = order.reshape(-1)
        for start in range(0, len(flat), size):
            rows = flat[start : start + size]
            inputs = self.codec.arrays([self.tokens[row] for row in rows])
            yield Batch(inputs, None if self.labels is None else self.labels[rows])
