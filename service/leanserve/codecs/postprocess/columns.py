"""An answer under one name, for all rows of a request: as JSON per row, or as arrays by name (npz, tensors of V2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from leanserve.contracts import Array, Json
from leanserve.errors import BackendFailed, BadInput

WHOLE = ""
"""The name of the column of an answer that is one array per row, as the outputs of models are."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Arrays by name, each with one entry per row of the request, [rows, ...].

    With `rows` [entries] there are any number of entries per row, as of boxes in an image: the number of the row to
    which each belongs, ascending; the arrays are [entries, ...] then.
    """

    arrays: Mapping[str, Array]
    rows: Array | None = None

    def of_rows(self, count: int) -> list[Json]:
        """What stands in JSON for each of `count` rows, numbers as numpy has them.

        Raises:
            BackendFailed: a number is not finite, which JSON does not have.
        """
        for name, array in self.arrays.items():
            require_finite(array, name or "values")
        if WHOLE in self.arrays:
            return list(np.ascontiguousarray(self.arrays[WHOLE]))
        columns = map(_items, self.arrays.values())
        entries = [dict(zip(self.arrays, entry, strict=True)) for entry in zip(*columns, strict=True)]
        if self.rows is None:
            return entries
        ends = np.searchsorted(self.rows, np.arange(count + 1)).tolist()
        return [entries[start:end] for start, end in pairwise(ends)]

    def named(self, name: str) -> dict[str, Array]:
        """As arrays: `name`, or `name.column`, and `name.row` with the row of each entry where it is needed."""
        found = {f"{name}.{column}" if column else name: array for column, array in self.arrays.items()}
        return found if self.rows is None else found | {f"{name}.row": self.rows}


def together(parts: Sequence[Columns], groups: Sequence[Sequence[int]]) -> Columns:
    """The answers to parts of a request as one; `groups` are the rows of each part.

    Raises:
        BadInput: rows are of different shape, which no array can hold.
    """
    order = np.concatenate([np.asarray(group, np.int64) for group in groups])
    rows = None
    if parts[0].rows is not None:
        placed = [np.asarray(group)[part.rows] for part, group in zip(parts, groups, strict=True)]
        rows = np.concatenate(placed)
        order = rows
    turn = np.argsort(order, kind="stable")
    joined = {}
    for name in parts[0].arrays:
        arrays = [part.arrays[name] for part in parts]
        if len({array.shape[1:] for array in arrays}) > 1:
            raise BadInput("the answers to these rows differ in shape, which arrays cannot hold; ask for JSON")
        joined[name] = np.concatenate(arrays)[turn]
    return Columns(joined, None if rows is None else rows[turn])


def best(array: Array, count: int) -> tuple[Array, Array]:
    """Numbers [..., n] -> positions and values of the `count` largest (fewer if there are fewer), largest first."""
    count = min(count, array.shape[-1])
    found = np.argpartition(array, -count, axis=-1)[..., -count:]
    values = np.take_along_axis(array, found, axis=-1)
    turn = np.lexsort((found, -values), axis=-1)
    return np.take_along_axis(found, turn, axis=-1), np.take_along_axis(values, turn, axis=-1)


def require_finite(array: Array, what: str) -> None:
    """Raise `BackendFailed` naming the first entry where a float is NaN or infinite."""
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        bad = int(np.argmin(np.isfinite(array).reshape(len(array), -1).all(axis=1)))
        raise BackendFailed(f"the model's {what} are not finite in row {bad}")


def _items(array: Array) -> list[Json]:
    """The entries of an array, texts as `str`."""
    return array.tolist() if array.dtype.kind in "OU" else list(np.ascontiguousarray(array))
