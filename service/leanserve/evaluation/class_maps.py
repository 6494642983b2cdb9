"""At how many places of a map does the base's best class stay, class by class?

Most pixels are background, most steps of a recogniser a blank: over all places a dead class would hardly count. So
each class that is frequent in the base is counted apart, those that are rare together, and all places once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np

from leanserve.comparison import NO_CLASS, best_classes
from leanserve.contracts import Array, TensorSpec

LEAST_PLACES = 0.01
"""Share of all places from which on the places of a class are judged by themselves."""


class PlaceCounts(NamedTuple):
    """Places of each row by groups of the base's classes, [rows, groups]; the first group are all places."""

    hits: Array
    """Where both have the same class."""
    seen: Array
    classes: tuple[int | None, ...]
    """The class of a group; `None`: it has several, or places without any."""

    @classmethod
    def of(cls, ours: Array, theirs: Array, field: TensorSpec, pieces: Sequence[slice]) -> Self:
        """Those of two outputs [rows, ...] of `contracts.CLASS_MAPS`, counted a piece of the rows at a time."""
        counted = [_by_class(ours[rows], theirs[rows], field) for rows in pieces]
        hits, seen = (np.concatenate(parts) for parts in zip(*counted, strict=True))
        shares = seen.sum(axis=0) / seen.sum()
        frequent = shares >= LEAST_PLACES
        rare = [~frequent] if shares[~frequent].sum() >= LEAST_PLACES else []
        groups = np.stack([np.ones(len(shares), bool), *np.eye(len(shares), dtype=bool)[frequent], *rare], axis=1)
        known = [index if index < len(shares) - 1 else None for index in np.flatnonzero(frequent).tolist()]
        return cls(hits @ groups, seen @ groups, (None, *known, *[None for _ in rare]))

    @property
    def shares(self) -> Array:
        """Share of equal places by group."""
        return ratios(self.hits.sum(axis=0), self.seen.sum(axis=0))

    @property
    def row_shares(self) -> Array:
        """Share of equal places by row."""
        return ratios(self.hits[:, 0], self.seen[:, 0])


def ratios(parts: Array, wholes: Array) -> Array:
    """Elementwise; 1 of nothing."""
    return np.where(wholes > 0, parts / np.where(wholes > 0, wholes, 1), 1.0)


def _by_class(ours: Array, theirs: Array, field: TensorSpec) -> tuple[Array, Array]:
    """Equal places and all places of each row, by the base's class [rows, classes + 1]; the last has no class."""
    one, other = best_classes(ours, field), best_classes(theirs, field)
    width = (theirs.shape[1] if field.meaning == "classes_first" else theirs.shape[-1]) + 1
    cells = np.where(other == NO_CLASS, width - 1, other) + np.arange(len(other))[:, None] * width
    chosen = cells[one == other], cells.ravel()
    hits, seen = (np.bincount(each, minlength=len(other) * width).astype(np.float64) for each in chosen)
    return hits.reshape(-1, width), seen.reshape(-1, width)
