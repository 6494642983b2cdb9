"""What all kinds of files have in common: rows by number, prepared for the model only when a batch is drawn.

A file is a `Table`; `TableRows` deals its rows out to the splits and is the `RowSource` of a base. Nothing is decoded
before somebody asks for a batch, and never more than that batch: a folder of photos may be larger than the memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from leanserve.bases.datasets.splits import RowSource as Numbers
from leanserve.bases.datasets.splits import cut_splits, deal
from leanserve.config.data_section import SplitSizes
from leanserve.contracts import Array, Arrays, Batch, Data, Split
from leanserve.errors import ConfigError


class Table(Protocol):
    """The rows of one source."""

    @property
    def digest(self) -> str:
        """sha256 over everything that decides the rows and their labels, in order."""

    @property
    def digests(self) -> Sequence[bytes]:
        """Per row, of its content: rows with equal digests are copies."""

    @property
    def names(self) -> Sequence[str]:
        """Per row, what an error calls it."""

    def data(self, rows: Numbers) -> Data:
        """The rows of these numbers, as the model's inputs."""


@dataclass(frozen=True)
class PreparedData:
    """`contracts.Data` whose rows are prepared batch by batch."""

    rows: Numbers
    prepare: Callable[[Numbers], Arrays]
    """Row numbers to a batch."""
    labels: Array | None = None
    """Of all rows of the table, by row number."""

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int, shuffle_seed: int | None = None) -> Iterator[Batch]:
        order = self.rows.copy()
        if shuffle_seed is not None:
            np.random.default_rng(shuffle_seed).shuffle(order)
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            yield Batch(self.prepare(rows), None if self.labels is None else self.labels[rows])


@dataclass(frozen=True)
class TableRows:
    """A `bases.loaded.Rows` over one table that is cut into splits, or over one per split."""

    key: str
    tables: Table | Mapping[Split, Table]
    sizes: SplitSizes | None
    seed: int

    @property
    def unit(self) -> int:
        return 1

    @cached_property
    def digest(self) -> str:
        tables = self.tables if isinstance(self.tables, Mapping) else {"all": self.tables}
        parts = [f"{split} {table.digest}" for split, table in sorted(tables.items())]
        sizes = "" if self.sizes is None else self.sizes.model_dump_json()
        return hashlib.sha256(" ".join((self.key, *parts, sizes, str(self.seed))).encode()).hexdigest()

    def split(self, split: Split, n: int | None) -> Data:
        if split not in self._dealt:
            raise ConfigError(f"{self.key}: there are no files for the split '{split}', and this config needs them")
        table, rows = self._dealt[split]
        return table.data(rows[:n])

    @cached_property
    def _dealt(self) -> dict[Split, tuple[Table, Numbers]]:
        """Per split, the table that has its rows, and which these are."""
        tables = self.tables
        if not isinstance(tables, Mapping):
            return {split: (tables, rows) for split, rows in cut_splits(tables.digests, self.sizes, self.seed).items()}
        digests = {split: table.digests for split, table in tables.items()}
        names = {split: table.names for split, table in tables.items()}
        dealt = deal(digests, self.sizes, self.seed, self.key, names)
        return {split: (tables[source], rows) for split, (source, rows) in dealt.items()}


def tables_of(
    key: str,
    declared: Path | Mapping[Split, Path],
    folder: Path,
    open_all: Callable[[Mapping[str, Path]], Sequence[Table]],
) -> Table | Mapping[Split, Table]:
    """What `TableRows` is made of, of what the config declares under `key`: one source, or one per split.

    `open_all` gets the sources together, each by the key that names it: their labels are read in the same way.
    """
    if isinstance(declared, Path):
        [table] = open_all({key: folder / declared})
        return table
    paths = {f"{key}.{split}": folder / path for split, path in declared.items()}
    return dict(zip(declared, open_all(paths), strict=True))
