"""`data: {texts: FILE}`: texts, or pairs of texts, one per line of a file.

Splits deal out lines. A pair becomes two consecutive rows, and both carry its label, so that a score can compare their
embeddings. Only the split that is asked for is tokenized, and batches are padded to their own longest text.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from leanserve.bases.checkpoints import file_digest
from leanserve.bases.datasets.class_labels import LabelColumn
from leanserve.bases.datasets.labels import LabelFiles, Understanding, as_given, targets, understanding_of_column
from leanserve.bases.datasets.splits import RowSource as Numbers
from leanserve.bases.datasets.tables import TableRows, tables_of
from leanserve.bases.datasets.text_files import Line, last_column, line_names, read_lines, require_table, text_digest
from leanserve.codecs.text import TextCodec
from leanserve.config.data_section import TextData
from leanserve.contracts import Array, Batch, Codec, Data, ModelSpec, Split
from leanserve.errors import BadInput, ConfigError


def open_texts(
    declared: TextData, spec: ModelSpec, codec: Codec, folder: Path, *, own_labels: bool = False
) -> TextRows:
    """The texts that the config declares, for a model of these outputs and labels; `own_labels` as for `open_arrays`.

    Raises:
        ConfigError: a file is missing or of an unknown format, or the columns do not suit the model.
    """
    if not isinstance(codec, TextCodec):
        raise ConfigError("data.texts: the model takes no texts; if it does, name its tokenizer in base.text")
    understood = as_given if own_labels else _understanding(declared, spec)
    # Requests are bounded; a training set need not be.
    codec = replace(codec, max_characters=sys.maxsize, max_total=sys.maxsize, max_rows=sys.maxsize)
    unit = 1 if declared.pair is None else 2
    tables = tables_of("data.texts", declared.texts, folder, lambda paths: _tables(paths, declared, understood, codec))
    return TextRows(TableRows("data.texts", tables, declared.splits, declared.seed), unit)


def _understanding(declared: TextData, spec: ModelSpec) -> Understanding:
    """How labels are read, which must suit the model."""
    if declared.pair is not None:
        if spec.labels:
            raise ConfigError("data.pair: the model classifies single texts; pairs are for models of embeddings")
        if declared.label is not None and not any(item.meaning == "embedding" for item in spec.outputs):
            raise ConfigError(
                "data.label: the similarity of a pair is compared with that of embeddings, and the model gives none; "
                "base.outputs says what its outputs mean"
            )
        return targets
    if declared.label is None:
        return as_given  # there are none
    return understanding_of_column(spec, own_labels=False)


def _tables(
    paths: Mapping[str, Path], declared: TextData, understood: Understanding, codec: TextCodec
) -> list[TextTable]:
    """A table per file, by the key that names it; the labels of all of them are read in the same way."""
    for key, path in paths.items():
        require_table(path, key)
    files = [TextFile(path, declared) for path in paths.values()]
    labels = None
    if declared.label is not None:
        labels = LabelFiles({file.path: file.column for file in files}, understood)
    return [TextTable(file, labels, codec) for file in files]


@dataclass(frozen=True)
class TextRows:
    """A `bases.loaded.RowSource`; every line of the files is `unit` rows."""

    lines: TableRows
    unit: int

    @property
    def digest(self) -> str:
        return self.lines.digest

    def split(self, split: Split, n: int | None) -> Data:
        return self.lines.split(split, None if n is None else n // self.unit)


@dataclass(frozen=True)
class TextFile:
    """The lines of a file; it is read when one is asked for."""

    path: Path
    declared: TextData

    @property
    def columns(self) -> tuple[str | int, ...]:
        """Those of the texts."""
        declared = self.declared
        return (declared.text,) if declared.pair is None else (declared.text, declared.pair)

    @cached_property
    def lines(self) -> list[Line]:
        label = () if self.declared.label is None else (self.declared.label,)
        return read_lines(self.path, (*self.columns, *label))

    @cached_property
    def texts(self) -> list[tuple[str, ...]]:
        return [line.values[: len(self.columns)] for line in self.lines]

    def column(self) -> LabelColumn:
        """The labels."""
        assert self.declared.label is not None
        return last_column(self.path, self.lines, self.declared.label)


@dataclass(frozen=True)
class TextTable:
    """A `tables.Table` over the lines of a file; labels are class numbers int64 or numbers float64, one per line."""

    file: TextFile
    labels: LabelFiles | None
    codec: TextCodec

    @cached_property
    def digest(self) -> str:
        columns = self.file.declared.model_dump_json(include={"text", "pair", "label"})
        tokens = f"{file_digest(self.codec.tokenizer)} {self.codec.max_length}"
        return hashlib.sha256(f"{file_digest(self.file.path)} {columns} {tokens}".encode()).hexdigest()

    @cached_property
    def digests(self) -> tuple[bytes, ...]:
        return tuple(map(text_digest, self.file.texts))

    @cached_property
    def names(self) -> tuple[str, ...]:
        return line_names(self.file.lines)

    def data(self, rows: Numbers) -> TokenData:
        texts = [text for row in rows for text in self.file.texts[row]]
        labels = None if self.labels is None else self.labels.of(self.file.path)[rows]
        unit = len(self.file.columns)
        try:
            tokens = self.codec.tokens(texts) if texts else []
        except BadInput as error:
            raise ConfigError(f"data.texts: {self.file.path}: {error}") from error
        return TokenData(tokens, None if labels is None else np.repeat(labels, unit), unit, self.codec)


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
