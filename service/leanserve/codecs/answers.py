"""What a client reads for one row: class names with probabilities, an embedding, or the tensors as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np

from leanserve.contracts import Array, Arrays, Json, Meaning, ModelSpec
from leanserve.errors import BackendFailed, ConfigError
from leanserve.texts import KINDS

MANY_LABELS, BEST = 20, 5
"""With more labels than the first number, an answer tells only so many of the best scores."""


@dataclass(frozen=True, slots=True)
class AnswerEncoder:
    """Encodes outputs by what the spec says they mean.

    With labels, the output that they name tells the best of them and the probabilities. Without labels, an embedding
    that is the only output is told as one; anything else by the names of the outputs.
    """

    spec: ModelSpec

    def __post_init__(self) -> None:
        spec = self.spec
        if len(set(spec.labels)) < len(spec.labels):
            raise ConfigError("the labels must differ from each other: they are the keys of the scores")
        if spec.labels and spec.outputs and spec.outputs[spec.labelled].meaning not in PROBABILITIES:
            raise ConfigError(f"the labels name the output '{spec.outputs[spec.labelled].name}', which is no classes")

    def encode(self, outputs: Arrays, most: int | None = None) -> list[dict[str, Json]]:
        """One answer per row, arrays as numpy has them; `most`: how many of the best scores of labels are told.

        Raises:
            BackendFailed: the values are not finite (JSON has no NaN), or there is not one per label. A logit of -inf
                is a class that is ruled out: its probability is 0.
        """
        if self.spec.labels:
            named = self.spec.outputs[self.spec.labelled]
            return _classes(
                _shares(outputs[self.spec.labelled], named.meaning, self.spec.labels), self.spec.labels, most
            )
        for item, array in zip(self.spec.outputs, outputs, strict=True):
            _require_finite(array, f"output '{item.name}'")
        if len(outputs) == 1 and self.spec.outputs[0].meaning == "embedding":
            return [{"embedding": row} for row in np.ascontiguousarray(outputs[0])]
        names = [item.name for item in self.spec.outputs]
        # The JSON library reads numbers where they are, and texts from lists.
        rows = zip(
            *(array.tolist() if array.dtype.kind in KINDS else np.ascontiguousarray(array) for array in outputs),
            strict=True,
        )
        return [{"outputs": dict(zip(names, row, strict=True))} for row in rows]


def softmax(logits: Array) -> Array:
    """Logits [rows, classes] -> probabilities; a class at -inf has none."""
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    return np.asarray(shares)


def _as_they_are(probabilities: Array) -> Array:
    return probabilities


PROBABILITIES: Final[Mapping[Meaning, Callable[[Array], Array]]] = {
    "logits": softmax,
    "probabilities": _as_they_are,
    "log_probabilities": np.exp,
    "independent_probabilities": _as_they_are,
}
"""The way to probabilities from every meaning that has classes."""
LOGARITHMIC: Final = frozenset({"logits", "log_probabilities"})
"""Meanings in which -inf is a probability of 0."""


def _shares(array: Array, meaning: Meaning, labels: tuple[str, ...]) -> Array:
    """The probabilities of all labels [rows, labels], in double precision."""
    if array.ndim != 2 or array.shape[1] != len(labels):
        raise BackendFailed(f"the model gave {array.shape} {meaning} for {len(labels)} labels")
    array = array.astype(np.float64)
    if not np.isfinite(array).all():
        _require_finite(_ruled_out_at_zero(array) if meaning in LOGARITHMIC else array, meaning)
    return PROBABILITIES[meaning](array)


def _ruled_out_at_zero(array: Array) -> Array:
    """With 0 for the classes at -inf, which the model rules out, except in a row that rules out all of them."""
    ruled_out = np.isneginf(array)
    return np.where(ruled_out & ~ruled_out.all(axis=1, keepdims=True), 0.0, array)


def _classes(shares: Array, labels: tuple[str, ...], most: int | None) -> list[dict[str, Json]]:
    """Probabilities [rows, labels] -> per row the best label and the probabilities, best first."""
    told = most or (BEST if len(labels) > MANY_LABELS else len(labels))
    best = (-shares).argsort(axis=1, kind="stable")[:, :told]
    scores = np.take_along_axis(shares, best, axis=1)
    return [_answer(labels, *row) for row in zip(best.tolist(), scores.tolist(), strict=True)]


def _answer(labels: tuple[str, ...], best: list[int], scores: list[float]) -> dict[str, Json]:
    names = [labels[column] for column in best]
    # Six digits are more than float32 logits justify, and a third of the bytes.
    return {"label": names[0], "scores": {name: round(p, 6) for name, p in zip(names, scores, strict=True)}}


def _require_finite(array: Array, what: str) -> None:
    if array.dtype.kind != "f":
        return
    finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
    if not finite.all():
        raise BackendFailed(f"the model's {what} are not finite in row {int(np.argmin(finite))}")
