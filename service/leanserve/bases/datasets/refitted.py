"""Rows that come as arrays, for a model whose passes have changed what it takes.

The shipped bases give their rows as inputs of the model, so they cannot be decoded anew as files and texts are. Images
are resized as Pillow does it, and sequences are cut to the new length, with their end mark kept: as the base's codec
would have prepared them, but for the rounding to whole pixel values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from leanserve.bases.loaded import RowsOver
from leanserve.contracts import Array, Arrays, Batch, Data, ModelSpec, Split, TensorSpec
from leanserve.errors import PassFailed


@dataclass(frozen=True)
class RefittedRows(RowsOver):
    """Those of another for a model of `spec`."""

    spec: ModelSpec

    def split(self, split: Split, n: int | None) -> Data:
        return RefittedData(self.rows.split(split, n), self.spec)


@dataclass(frozen=True)
class RefittedData:
    """`contracts.Data` that fits the rows of another to `spec`, batch by batch."""

    data: Data
    spec: ModelSpec

    def __len__(self) -> int:
        return len(self.data)

    def batches(self, size: int, shuffle_seed: int | None = None) -> Iterator[Batch]:
        for batch in self.data.batches(size, shuffle_seed):
            yield Batch(_fitted(batch.inputs, self.spec), batch.labels)


def _fitted(inputs: Arrays, spec: ModelSpec) -> Arrays:
    ends = _ends(inputs, spec)
    return tuple(_refitted(array, item, spec, ends) for array, item in zip(inputs, spec.inputs, strict=True))


def _ends(inputs: Arrays, spec: ModelSpec) -> Array | None:
    """The place of the last element of every row, where a mask tells; `None`: all are as long as the array."""
    masks = [array for array, item in zip(inputs, spec.inputs, strict=True) if item.name == "attention_mask"]
    return masks[0].sum(axis=1).astype(np.int64) - 1 if masks else None


def _refitted(array: Array, item: TensorSpec, spec: ModelSpec, ends: Array | None) -> Array:
    if item.shape == (None,):
        return _cut(array, spec.max_length, ends)
    if len(item.shape) == 3 and len(array) and array.shape[1] == item.shape[0]:
        height, width = (wanted or size for wanted, size in zip(item.shape[1:], array.shape[2:], strict=True))
        return np.stack([np.stack([_resized(plane, height, width) for plane in image]) for image in array])
    if array.shape[1:] == tuple(
        have if size is None else size for size, have in zip(item.shape, array.shape[1:], strict=True)
    ):
        return array
    raise PassFailed(
        f"the input '{item.name}' was changed to {list(item.shape)}, and the base's own rows {list(array.shape[1:])} "
        "are neither images nor sequences that could be fitted; give the config `data:`"
    )


def _cut(array: Array, length: int, ends: Array | None) -> Array:
    """The first elements of every row [rows, any]; what is longer keeps its last one, which marks its end."""
    if array.shape[1] <= length:
        return array
    cut = array[:, :length].copy()
    last = np.full(len(array), array.shape[1] - 1) if ends is None else ends
    longer = np.flatnonzero(last >= length)
    cut[longer, length - 1] = array[longer, last[longer]]
    return cut


def _resized(plane: Array, height: int, width: int) -> Array:
    if plane.shape == (height, width):
        return plane
    image = Image.fromarray(plane.astype(np.float32), "F")
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).astype(plane.dtype)
