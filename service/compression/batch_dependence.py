"""Does a row's answer depend on the rows that happen to share its batch?

Users of other servers find out in production: kernels are chosen by batch size and add in another order, one scale is
taken for a whole batch of activations, padding leaks into an attention. Here it is a number of every artifact, taken
through the same `join` that serving uses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from service.comparison import both_finite, differ_in_kind
from service.contracts import Array, Arrays, Backend, Field, InputSpec
from service.serving.assembly import join

GOLDEN = 8
"""Rows whose answers are compared."""
COMPANY = 32
"""Rows in the largest batch they are put into."""


def batch_dependence(backend: Backend, spec: InputSpec, rows: Arrays) -> float:
    """The largest change of an output by company, relative to its largest finite value alone; at least 0.

    The first `GOLDEN` of the given rows run alone, then together, then in front of a batch of `COMPANY` rows (given
    rows are repeated to fill it). Along dynamic axes the rows are cut to different lengths, from half to whole, so that
    in company the shorter ones are padded; what the model answers at padded positions is left out.
    """
    golden = min(GOLDEN, len(rows[0]))
    samples = [_sample(rows, spec, index) for index in range(len(rows[0]))]
    alone = [_answers(backend, spec, [sample])[0] for sample in samples[:golden]]
    crowd = [samples[index % len(samples)] for index in range(COMPANY)]
    companies = [_answers(backend, spec, company)[:golden] for company in (samples[:golden], crowd)]
    by_output = zip(*alone, strict=True), *(zip(*together, strict=True) for together in companies)
    return max(_relative_change(*rows) for rows in zip(*by_output, strict=True))


def _answers(backend: Backend, spec: InputSpec, samples: Sequence[Arrays]) -> list[Arrays]:
    """All outputs of every sample of one batch."""
    outputs = [np.array(output, np.float64) for output in backend.run(join(samples, spec, len(samples)))]
    return list(zip(*outputs, strict=True))


def _relative_change(alone: Arrays, *companies: Arrays) -> float:
    """Of one output of the golden rows, alone and in each company."""
    largest = max(float(np.abs(answer[np.isfinite(answer)]).max(initial=0)) for answer in alone)
    scale = max(largest, float(np.finfo(np.float32).tiny))
    return max(_change(*pair, scale) for together in companies for pair in zip(alone, together, strict=True))


def _change(alone: Array, together: Array, scale: float) -> float:
    """Relative to the scale; at least 1 where a number is infinite or NaN in one of the two only."""
    shared = together[tuple(slice(0, size) for size in alone.shape)]
    finite = both_finite(alone, shared)
    change = float(np.abs(shared[finite] - alone[finite]).max(initial=0)) / scale
    return max(change, 1.0) if differ_in_kind(alone, shared).any() else change


def _sample(rows: Arrays, spec: InputSpec, index: int) -> Arrays:
    """One row; its dynamic axes keep between a half and all of their length, by its place among the golden rows."""
    kept = (GOLDEN + 1 + index % GOLDEN) / (2 * GOLDEN)
    return tuple(_cut(array[index : index + 1], item, kept) for item, array in zip(spec.fields, rows, strict=True))


def _cut(row: Array, item: Field, kept: float) -> Array:
    lengths = zip(item.shape, row.shape[1:], strict=True)
    return row[(slice(None), *(slice(math.ceil(has * kept) if size is None else has) for size, has in lengths))]
