"""The labels of all files of one `data:` section, read when the first of them is asked for, and all in the same way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from leanserve.bases.datasets.class_labels import LabelColumn, class_numbers
from leanserve.contracts import Array, ModelSpec
from leanserve.errors import ConfigError
from leanserve.scoring import regressed

Understanding = Callable[[Sequence[LabelColumn]], Sequence[Array]]
"""Makes of the columns of all files together the labels of each."""


@dataclass(frozen=True)
class LabelFiles:
    """Label columns by their file, and what makes class numbers, or numbers to be hit, of them together."""

    columns: Mapping[Path, Callable[[], LabelColumn]]
    understood: Understanding

    def of(self, path: Path) -> Array:
        """The labels of one file, per row.

        Raises:
            ConfigError: a row of some file has none that can be read; the text names its place.
        """
        return self._found[path]

    @cached_property
    def _found(self) -> dict[Path, Array]:
        columns = [read() for read in self.columns.values()]
        return dict(zip(self.columns, self.understood(columns), strict=True))


def understanding(spec: ModelSpec, key: str) -> Understanding:
    """How labels are read that belong to this model: as its classes, or as the numbers that it should give.

    Raises:
        ConfigError: it gives neither classes with names nor values; the text starts with `key`.
    """
    if spec.labels:
        return partial(class_numbers, labels=spec.labels)
    if any(item.meaning == "values" for item in spec.outputs):
        return targets
    raise ConfigError(
        f"{key}: the rows have labels, but the model has neither classes with names (base.labels) nor an output whose "
        f"values could be compared with them; its outputs are {_shown(spec)} (base.outputs says what they mean)"
    )


def understanding_of_column(spec: ModelSpec, *, own_labels: bool) -> Understanding:
    """As `understanding`, of `data.label`, a value per row; `own_labels`: only the configured score understands them.

    Raises:
        ConfigError: also where one value does not belong to one output of a model without classes.
    """
    if own_labels:
        return as_given
    understood = understanding(spec, "data.label")
    if not spec.labels:
        require_target(spec, (), "data.label")
    return understood


def as_given(columns: Sequence[LabelColumn]) -> list[Array]:
    """Labels that only the configured score understands: numbers of any shape per row, or texts."""
    return [column.values for column in columns]


def targets(columns: Sequence[LabelColumn]) -> list[NDArray[np.float64]]:
    """Per column the numbers that a regressor should give, float64 [rows, ...].

    Raises:
        ConfigError: one is no finite number; the text names its place.
    """
    return [_numbers(column) for column in columns]


def require_target(spec: ModelSpec, shape: tuple[int, ...], key: str) -> None:
    """Check that labels of this shape per row belong to one output of a model without classes.

    Raises:
        ConfigError: they fit none, or several; the text starts with `key`.
    """
    fitting = regressed(spec.outputs, shape)
    if len(fitting) == 1:
        return
    fault = "fit several outputs" if fitting else "fit no output"
    raise ConfigError(
        f"{key}: labels of shape {list(shape)} per row {fault} of {_shown(spec)}; labels are what one output of values "
        "should be. If they are classes, name them in base.labels; else leave them out"
    )


def _numbers(column: LabelColumn) -> NDArray[np.float64]:
    values = column.values
    if values.dtype.kind == "U":
        return np.array([_number(str(text), row, column) for row, text in enumerate(values)], np.float64)
    found = values.astype(np.float64)
    sound = np.isfinite(found).reshape(len(found), -1).all(axis=1)
    if not sound.all():
        raise ConfigError(f"{column.place(int(np.argmin(sound)))}: the label is no finite number")
    return found


def _number(text: str, row: int, column: LabelColumn) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not np.isfinite(number):
        raise ConfigError(
            f"{column.place(row)}: '{text}' is no finite number; of a model without classes a label is one (names of "
            "classes are listed in base.labels)"
        )
    return number


def _shown(spec: ModelSpec) -> str:
    return ", ".join(f"'{item.name}' {list(item.shape)} ({item.meaning})" for item in spec.outputs)
