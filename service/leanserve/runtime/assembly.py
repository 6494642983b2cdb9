"""Requests -> one batch -> replies: the copies between samples and batch buffers, and nothing else.

One copy per tensor. Rows of different length are padded along their dynamic axes with the field's own pad value; rows
are padded up to a bucket only for backends whose shapes are compiled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from leanserve.contracts import Array, Arrays, ModelSpec, TensorSpec


def join(samples: Sequence[Arrays], spec: ModelSpec, rows: int) -> Arrays:
    """Concatenate samples along the row axis to exactly `rows` rows; a lone sample that fits is passed on uncopied."""
    if len(samples) == 1 and len(samples[0][0]) == rows:
        return samples[0]
    fields = zip(*samples, strict=True)
    return tuple([_join_field(arrays, item, rows) for arrays, item in zip(fields, spec.inputs, strict=True)])


def split(outputs: Arrays, counts: Sequence[int]) -> list[Arrays]:
    """Cut the outputs back into one tuple per sample (views); padding rows at the end are dropped."""
    if len(counts) == sum(counts):  # one row each, as nearly always: the arrays are walked through, not cut
        return list(zip(*[array[: len(counts), None] for array in outputs], strict=True))
    replies, start = [], 0
    for count in counts:
        replies.append(tuple([array[start : start + count] for array in outputs]))
        start += count
    return replies


def dynamic_axes(fields: Sequence[TensorSpec]) -> tuple[tuple[int, int], ...]:
    """Position of the field and axis of the batch (the first counts rows) for every axis whose size varies."""
    return tuple(
        (position, axis)
        for position, item in enumerate(fields)
        for axis, size in enumerate(item.shape, start=1)
        if size is None
    )


def longest(sample: Arrays, axes: Sequence[tuple[int, int]]) -> int:
    """The largest size along these axes; 0 if there are none."""
    return max((sample[position].shape[axis] for position, axis in axes), default=0)


def trim(reply: Arrays, axes: Sequence[tuple[int, int]], padded: int, length: int) -> Arrays:
    """Cut answers at padded positions off: along these axes of the outputs, where they are as long as the batch was."""
    arrays = list(reply)
    for position, axis in axes:
        if arrays[position].shape[axis] == padded:
            arrays[position] = arrays[position][(slice(None),) * axis + (slice(0, length),)]
    return tuple(arrays)


def rejoin(parts: Sequence[Arrays]) -> Arrays:
    """Put the replies of a split request together again."""
    return parts[0] if len(parts) == 1 else tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))


def cut(sample: Arrays, max_rows: int) -> list[Arrays]:
    """Cut a request into parts of at most `max_rows` rows (views)."""
    rows = len(sample[0])
    if rows <= max_rows:
        return [sample]
    return [tuple(array[start : start + max_rows] for array in sample) for start in range(0, rows, max_rows)]


def _join_field(arrays: Sequence[Array], item: TensorSpec, rows: int) -> Array:
    count = sum(map(len, arrays))
    if count == rows and None not in item.shape:
        return np.concatenate(arrays)
    shape = tuple(max(array.shape[axis] for array in arrays) for axis in range(1, arrays[0].ndim))
    joined = np.full((rows, *shape), item.filler, item.array_dtype)
    start = 0
    for array in arrays:
        window = (slice(start, start + len(array)), *(slice(0, size) for size in array.shape[1:]))
        joined[window] = array
        start += len(array)
    return joined
