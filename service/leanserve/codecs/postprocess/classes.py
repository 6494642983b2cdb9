"""Scores of classes: made probabilities, and the best, or those that are high enough, with their names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field

from leanserve.codecs.postprocess.columns import WHOLE, Columns, best
from leanserve.codecs.postprocess.step import (
    Labels,
    PostStep,
    classes_told,
    fitting_labels,
    label_names,
    require_no_nan,
    require_numbers,
    shown,
)
from leanserve.contracts import Array, Arrays, Json, Placement, TensorSpec
from leanserve.errors import ConfigError

CLASS: Json = {"label": {"type": "string"}, "class": {"type": "integer"}, "score": {"type": "number"}}
"""JSON schema of a class with its score: by its name, or by its number."""
SCORED: Json = {"type": "array", "items": {"type": "object", "properties": CLASS, "required": ["score"]}}


class _Activation(PostStep):
    """Changes numbers one for one; a later step may read them."""

    shape: ClassVar[Json] = {"type": "array", "items": {}}

    def fitted(self, fields: Sequence[TensorSpec], labels: tuple[str, ...]) -> Self:
        [field] = fields
        if not field.shape or not field.dtype.startswith("float"):
            raise ConfigError(f"it reads lists of floats; the model's {shown(field)} is not that")
        return self

    def gives(self, fields: Sequence[TensorSpec]) -> TensorSpec | None:
        return fields[0]

    def apply(self, arrays: Arrays, places: Sequence[Placement]) -> Columns:
        require_no_nan(arrays[0], self.output or "values")
        return Columns({WHOLE: self.changed(arrays[0])})

    def changed(self, array: Array) -> Array:
        """The numbers, changed."""
        raise NotImplementedError


class Softmax(_Activation):
    """Logits to probabilities along the last axis; a class at minus infinity has none."""

    kind: Literal["softmax"] = "softmax"
    writes: ClassVar[str] = "probabilities"

    def changed(self, array: Array) -> Array:
        shares = np.exp(array - array.max(axis=-1, keepdims=True))
        return np.asarray(shares / shares.sum(axis=-1, keepdims=True))


class Sigmoid(_Activation):
    """Each logit to a probability of its own."""

    kind: Literal["sigmoid"] = "sigmoid"
    writes: ClassVar[str] = "probabilities"

    def changed(self, array: Array) -> Array:
        return np.asarray(0.5 * (1 + np.tanh(0.5 * array)))  # which overflows nowhere


class _Choice(PostStep):
    """Tells some of a list of scores."""

    labels: Labels | None = Field(None, description="class names, or a file; by default the base's if they fit")
    shape: ClassVar[Json] = SCORED

    def with_files(self, folder: Path) -> Self:
        return self.model_copy(update={"labels": label_names(self.labels, folder)})

    def fitted(self, fields: Sequence[TensorSpec], labels: tuple[str, ...]) -> Self:
        [field] = fields
        require_numbers(field, 1, "one list of scores per row")
        return self.model_copy(update={"labels": fitting_labels(self.labels, labels, field.shape[0])})

    def told(self, rows: Array, classes: Array, scores: Array) -> Columns:
        """Entries, the rows ascending."""
        assert not isinstance(self.labels, Path)
        return Columns({**classes_told(classes, self.labels), "score": scores}, rows)


class TopK(_Choice):
    """The best classes, best first."""

    kind: Literal["top_k"] = "top_k"
    writes: ClassVar[str] = "top"
    k: int = Field(5, ge=1, le=1000, description="how many")

    def apply(self, arrays: Arrays, places: Sequence[Placement]) -> Columns:
        require_no_nan(arrays[0], self.output or "scores")
        classes, scores = best(arrays[0], self.k)
        return self.told(np.repeat(np.arange(len(classes)), classes.shape[1]), classes.ravel(), scores.ravel())


class Threshold(_Choice):
    """All classes whose score is high enough, best first: of none, one or several."""

    kind: Literal["threshold"] = "threshold"
    writes: ClassVar[str] = "found"
    min_score: float = Field(0.5, description="least score that is told")

    def apply(self, arrays: Arrays, places: Sequence[Placement]) -> Columns:
        [scores] = arrays
        require_no_nan(scores, self.output or "scores")
        rows, classes = np.nonzero(scores >= self.min_score)
        values = scores[rows, classes]
        order = np.lexsort((classes, -values, rows))
        return self.told(rows[order], classes[order], values[order])
