"""What a client reads for one row: class names with probabilities, an embedding, or the tensors as they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from service.contracts import Array, Arrays, InputSpec, Json
from service.errors import BackendFailed, ConfigError

MANY_LABELS, BEST = 20, 5
"""With more labels than the first number, an answer tells only so many of the best scores."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Encodes outputs by what the spec says they are.

    With labels, the first output is the logits of these classes. Without labels, a single output of one axis is an
    embedding; anything else is told by the names of the outputs.
    """

    spec: InputSpec

    def __post_init__(self) -> None:
        if len(set(self.spec.labels)) < len(self.spec.labels):
            raise ConfigError("the labels must differ from each other: they are the keys of the scores")

    def encode(self, outputs: Arrays) -> list[dict[str, Json]]:
        """One answer per row.

        Raises:
            BackendFailed: the values are not finite (JSON has no NaN), or the logits are not one per label. A logit of
                -inf is a class that is ruled out: its probability is 0.
        """
        if self.spec.labels:
            return _classes(outputs[0], self.spec.labels)
        for item, array in zip(self.spec.outputs, outputs, strict=True):
            _require_finite(array, f"output '{item.name}'")
        if len(outputs) == 1 and outputs[0].ndim == 2:
            return [{"embedding": row} for row in outputs[0].tolist()]
        names = [item.name for item in self.spec.outputs]
        rows = zip(*(array.tolist() for array in outputs), strict=True)
        return [{"outputs": dict(zip(names, row, strict=True))} for row in rows]


def _classes(logits: Array, labels: tuple[str, ...]) -> list[dict[str, Json]]:
    """Logits [rows, labels] -> per row the best label and the probabilities, best first."""
    logits = logits.astype(np.float64)
    if logits.ndim != 2 or logits.shape[1] != len(labels):
        raise BackendFailed(f"the model gave {logits.shape} logits for {len(labels)} labels")
    largest = logits.max(axis=1, keepdims=True)
    _require_finite(largest, "logits")
    shares = np.exp(logits - largest)
    shares /= shares.sum(axis=1, keepdims=True)
    told = BEST if len(labels) > MANY_LABELS else len(labels)
    best = (-logits).argsort(axis=1, kind="stable")[:, :told]
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
