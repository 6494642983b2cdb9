"""What each layer costs a model when it alone is quantized: the ranking by which layers are left float.

The model runs with one layer in integers and all others in float, and its outputs are compared with those of the float
model on the same rows: by signal-to-noise ratio, and by divergence where an output has classes. No labels are needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from leanserve.comparison import ClassRows, class_divergence
from leanserve.contracts import CLASSES, Array, Arrays, Json, ModelSpec
from leanserve.passes.toolkit.lowering import feeds, open_session

if TYPE_CHECKING:
    import onnx

MOST_DB = 200.0
"""Of outputs that are the same: a number that JSON can hold."""


class Damage(NamedTuple):
    """Of one layer: the least signal-to-noise ratio of an output (dB), and the largest divergence of its classes."""

    layer: str
    sqnr_db: float
    kl: float | None

    def told(self) -> dict[str, Json]:
        """As a row of the table in the report."""
        return {"layer": self.layer, "SQNR, dB": round(self.sqnr_db, 2), "KL, nats": self.kl}


def outputs_of(graph: onnx.ModelProto, spec: ModelSpec, batches: Sequence[Arrays], threads: int) -> list[Arrays]:
    """The outputs of a graph for each batch."""
    session = open_session(graph, threads)
    names = [item.name for item in spec.outputs]
    return [tuple(map(np.asarray, session.run(names, feeds(spec, batch)))) for batch in batches]


def damage(layer: str, outputs: Sequence[Arrays], reference: Sequence[Arrays], spec: ModelSpec) -> Damage:
    """Compare the outputs with those of the float model, batch by batch."""
    ratios, divergences = [], []
    for index, item in enumerate(spec.outputs):
        pairs = [(ours[index], theirs[index]) for ours, theirs in zip(outputs, reference, strict=True)]
        if not item.dtype.startswith("float"):
            continue
        ratios.append(_sqnr_db(pairs))
        if item.meaning in CLASSES and len(item.shape) == 1:
            rows = [class_divergence(ClassRows.of(*pair), item.meaning) for pair in pairs]
            divergences.append(float(np.concatenate(rows).mean()))
    return Damage(layer, min(ratios, default=MOST_DB), max(divergences, default=None))


def _sqnr_db(pairs: Sequence[tuple[Array, Array]]) -> float:
    signal = noise = 0.0
    for ours, theirs in pairs:
        finite = np.isfinite(ours) & np.isfinite(theirs)
        wanted = theirs[finite].astype(np.float64)
        signal += float((wanted**2).sum())
        noise += float(((ours[finite] - wanted) ** 2).sum())
    if not noise or not signal:
        return MOST_DB if not noise else -MOST_DB
    return float(np.clip(10 * np.log10(signal / noise), -MOST_DB, MOST_DB))


def ranked(damages: Sequence[Damage], by: str) -> list[Damage]:
    """The worst first: by divergence (`kl`), or by signal-to-noise ratio."""
    if by == "kl":
        return sorted(damages, key=lambda item: (-(item.kl or 0.0), item.sqnr_db))
    return sorted(damages, key=lambda item: item.sqnr_db)


def table(damages: Sequence[Damage], kept: Mapping[str, object]) -> list[dict[str, Json]]:
    """The ranking as rows, with what became of each layer."""
    return [item.told() | {"kept": "float" if item.layer in kept else "int8"} for item in damages]
