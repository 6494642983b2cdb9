"""How much an output of values varies, channel by channel: the yardstick of every error in it.

A network that gives a column from 0 to 320 and one from 0 to 1 is wrong about the second long before an error over all
its numbers shows it. So every channel has a scale of its own, that of the base's answers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from leanserve.contracts import Array

CONSTANT = 1e-4
"""Share of a channel's largest value below which its spread is rounding: the channel is constant."""


def channel_axis(shape: Sequence[int | None]) -> int | None:
    """Which axis of a batch counts its channels, whatever an exporter's habits: the shortest fixed one above 1.

    `shape` is that of a row. It is axis 1 of features [rows, C], of images [rows, C, H, W] and of boxes [rows, 4, N],
    axis 2 of boxes [rows, N, 4]. `None`: a row has a single channel.
    """
    sizes = [(size, axis) for axis, size in enumerate(shape, start=1) if size is not None and size > 1]
    return min(sizes)[1] if sizes else None


def by_channel(array: Array, axis: int | None) -> Array:
    """The numbers of every channel, [channels, numbers]."""
    return array.reshape(1, -1) if axis is None else np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)


def channel_scales(parts: Sequence[Array], axis: int | None) -> NDArray[np.float64]:
    """What an error of each channel is relative to, [channels]; `parts` are batches of rows of the same output.

    It is the standard deviation. A channel that is constant is measured by its largest value, one that is always 0 by
    the median of the scales of the others; where all are 0, errors are absolute. What is not finite is left out.
    """
    channels = 1 if axis is None else parts[0].shape[axis]
    count, total, largest, squares = (np.zeros(channels) for _ in range(4))
    for part in parts:
        values, finite = _finite(part, axis)
        count += finite.sum(axis=1)
        total += values.sum(axis=1)
        largest = np.maximum(largest, np.abs(values).max(axis=1, initial=0.0))
    mean = total / np.maximum(count, 1)
    for part in parts:
        values, finite = _finite(part, axis)
        squares += np.square(np.where(finite, values - mean[:, None], 0.0)).sum(axis=1)
    spread = np.sqrt(squares / np.maximum(count, 1))
    scales = np.where(spread > CONSTANT * largest, spread, largest)
    others = float(np.median(scales[scales > 0])) if (scales > 0).any() else 1.0
    return np.where(scales > 0, scales, others)


def _finite(part: Array, axis: int | None) -> tuple[Array, Array]:
    """By channel in double precision, with 0 for what is not finite, and what is."""
    values = by_channel(np.asarray(part, np.float64), axis)
    finite = np.isfinite(values)
    return np.where(finite, values, 0.0), finite
