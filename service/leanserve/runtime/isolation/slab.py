"""Arrays in memory that two processes share: one writes them, the other reads them where they are.

The memory belongs to a file descriptor without a name (memfd_create(2)), so nothing of it is left when both processes
have ended, however that came about; `multiprocessing.shared_memory` has a tracker that must be kept from removing what
is in use. It grows by need: the writer makes the file longer, the reader sees it by what it is told to read.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence

import numpy as np

from leanserve.contracts import Array, Arrays

SlabPlace = tuple[str, tuple[int, ...], int]
"""Where an array is: its dtype, its shape, and the offset of its first byte."""
ALIGNED = 64
"""Bytes; what vectorised loops read best begins at a multiple of a cache line."""
LEAST_BYTES = 64 << 10


class Slab:
    """One direction between two processes; each has one of its own over the same descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory: mmap.mmap | None = None
        self._size = 0

    @classmethod
    def create(cls) -> Slab:
        """New, empty memory."""
        return cls(os.memfd_create("leanserve-batch", os.MFD_CLOEXEC))

    def write(self, arrays: Sequence[Array]) -> list[SlabPlace]:
        """Copy arrays there, over what was written before."""
        places: list[SlabPlace] = []
        end = 0
        for array in arrays:
            places.append((array.dtype.str, array.shape, end))
            end = -(-(end + array.nbytes) // ALIGNED) * ALIGNED
        if end > self._size:
            os.ftruncate(self.descriptor, max(LEAST_BYTES, 1 << (end - 1).bit_length()))
        for array, place in zip(arrays, places, strict=True):
            self._at(place)[...] = array
        return places

    def read(self, places: Sequence[SlabPlace]) -> Arrays:
        """The arrays there: views, which hold until the writer writes again."""
        return tuple([self._at(place) for place in places])

    def close(self) -> None:
        """Let go of the memory, once no view of it is left, and of the descriptor."""
        self._memory, self._size = None, 0
        os.close(self.descriptor)

    def _at(self, place: SlabPlace) -> Array:
        dtype, shape, offset = place
        end = offset + math.prod(shape) * np.dtype(dtype).itemsize
        if end > self._size or self._memory is None:
            self._size = os.fstat(self.descriptor).st_size
            self._memory = mmap.mmap(self.descriptor, self._size)
        return np.ndarray(shape, dtype, self._memory, offset)
