"""Does a row's answer depend on the rows that happen to share its batch?

Users of other servers find out in production: kernels are chosen by batch size and add in another order, one scale is
taken for a whole batch of activations, padding leaks into an attention. Here it is a number of every artifact, taken
through the same `join` that serving uses. Ordinary company is not enough to see it: where one scale serves a batch,
rows that are alike move each other by a hundredth, and a single value of a stranger wipes out all others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import numpy as np

from leanserve.contracts import Array, Arrays, Backend, ModelSpec, TensorSpec
from leanserve.runtime.assembly import join
from leanserve.texts import KINDS, STRING

GOLDEN = 8
"""Rows whose answers are compared."""
COMPANY = 32
"""Rows in the largest batch they are put into."""
TIMES, HUGE = 1e3, 1e30
"""How large strangers are: so many times the largest value of the rows, and near the end of what a float32 holds."""
RUINED = 1e6
"""What counts where an answer is not finite any more."""

PerRow = list[list[Array]]
"""The outputs of every row."""


def batch_dependence(backend: Backend, spec: ModelSpec, rows: Arrays, most: int = COMPANY) -> float:
    """The largest change of an output by company, relative to the largest absolute value of that output alone.

    The first `GOLDEN` of the given rows run alone, then together, then in front of a batch of `most` rows (given rows
    are repeated to fill it), then between strangers: huge rows, rows of NaN and infinity; where inputs are integers,
    other ones; no batch has more than `most` rows. Along dynamic axes the rows are cut to different lengths, from half
    to whole, so that in company the shorter ones are padded, unless only rows of equal length share a batch; what the
    model answers at padded positions is left out. 0 where every row has a batch to itself.
    """
    if spec.most_rows(most) == 1:
        return 0.0
    golden = min(GOLDEN, len(rows[0]), most)
    samples = [_sample(rows, spec, index) for index in range(len(rows[0]))]
    alone = [_answers(backend, spec, [sample])[0] for sample in samples[:golden]]
    crowd = [samples[index % len(samples)] for index in range(most)]
    changes = [_change(alone, _answers(backend, spec, company)) for company in (samples[:golden], crowd)]
    among = max(1, min(golden, most - 2))
    for first, last in _strangers(spec, rows):
        with suppress(Exception):  # what the model refuses fails alone, for a batch that fails is run again in halves
            answers = _answers(backend, spec, [first, *samples[:among], last][:most])
            changes.append(_change(alone[:among], answers[1 : 1 + among]))
    return max(changes)


def _answers(backend: Backend, spec: ModelSpec, samples: Sequence[Arrays]) -> PerRow:
    """The outputs of every sample of one batch, which is filled up as when serving."""
    rows = next((size for size in backend.row_buckets if size >= len(samples)), len(samples))
    given = backend.run(join(samples, spec, rows)).outputs
    outputs = [output.copy() if output.dtype.kind in KINDS else np.array(output, np.float64) for output in given]
    return [[output[index, ...] for output in outputs] for index in range(len(samples))]


def _change(alone: PerRow, together: PerRow) -> float:
    """The largest change of any output, each relative to its own largest value alone."""
    return max(_relative(*outputs) for outputs in zip(_by_output(alone), _by_output(together), strict=True))


def _by_output(answers: PerRow) -> Iterator[tuple[Array, ...]]:
    return zip(*answers, strict=True)


def _relative(alone: Sequence[Array], together: Sequence[Array]) -> float:
    if alone[0].dtype.kind in KINDS:
        return float(not all(map(_same_texts, alone, together)))
    finite = (answer[np.isfinite(answer)] for answer in alone)
    largest = max(float(np.abs(values).max(initial=0.0)) for values in finite)
    change = max(_difference(*answers) for answers in zip(alone, together, strict=False))
    return min(change / max(largest, float(np.finfo(np.float32).tiny)), RUINED)


def _same_texts(alone: Array, together: Array) -> bool:
    return bool((_shared(alone, together) == alone).all())


def _shared(alone: Array, together: Array) -> Array:
    """What both have: padding in company is left out."""
    return together[tuple(slice(0, size) for size in alone.shape)]


def _difference(alone: Array, together: Array) -> float:
    shared = _shared(alone, together)
    apart = ~((shared == alone) | (np.isnan(shared) & np.isnan(alone)))
    with np.errstate(invalid="ignore"):
        changes = np.abs(shared[apart] - alone[apart])
    return float(np.where(np.isnan(changes), np.inf, changes).max(initial=0.0))


def _strangers(spec: ModelSpec, rows: Arrays) -> Iterator[tuple[Arrays, Arrays]]:
    """Pairs of rows that the golden ones have no say in."""
    random = np.random.default_rng(0)

    def row(size: float) -> Arrays:
        pairs = zip(spec.inputs, rows, strict=True)
        return tuple(_stranger(random, item, array, size) for item, array in pairs)

    yield row(TIMES), row(HUGE)
    if any(array.dtype.kind == "f" for array in rows):
        yield row(np.inf), row(np.nan)


def _stranger(random: np.random.Generator, item: TensorSpec, rows: Array, size: float) -> Array:
    """One row: floats of that size, integers anywhere in the range of those that are given or allowed, texts of other
    rows."""
    shape = (1, *rows.shape[1:])
    if item.dtype == STRING:
        return random.permuted(rows.reshape(-1))[: math.prod(shape)].reshape(shape)
    if rows.dtype.kind == "f":
        scale = max(1.0, float(np.abs(rows).max())) if size == TIMES else 1.0
        most = float(np.finfo(rows.dtype).max) / 10
        if not math.isfinite(size):
            return np.full(shape, size, rows.dtype)
        return (random.standard_normal(shape) * min(scale * size, most)).astype(rows.dtype)
    low, high = item.values or (int(rows.min()), int(rows.max()))
    drawn: Array = random.integers(low, high, shape, rows.dtype, endpoint=True)
    drawn.reshape(1, -1)[:, :1] = rows[:1].reshape(1, -1)[:, :1]  # a mask without a single 1 would be a row of nothing
    return drawn


def _sample(rows: Arrays, spec: ModelSpec, index: int) -> Arrays:
    """One row; its dynamic axes keep between a half and all of their length, by its place among the golden rows."""
    kept = 1.0 if spec.rows == "one_length" else (GOLDEN + 1 + index % GOLDEN) / (2 * GOLDEN)
    pairs = zip(spec.inputs, rows, strict=True)
    return tuple(
        _cut(array[index : index + 1], item, lambda has: spec.size(math.ceil(has * kept))) for item, array in pairs
    )


def _cut(row: Array, item: TensorSpec, kept: Callable[[int], int]) -> Array:
    lengths = zip(item.shape, row.shape[1:], strict=True)
    return row[(slice(None), *(slice(kept(has) if size is None else has) for size, has in lengths))]
