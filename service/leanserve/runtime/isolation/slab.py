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
from leanserve.texts import KINDS, STRING, packed_texts, unpacked_texts

SlabPlace = tuple[str, tuple[int, ...], int, int]
"""Where an array is: its dtype, its shape, the offset of its first byte, and how many bytes it has there."""
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
        contents = [
            (STRING, packed_texts(array)) if array.dtype.kind in KINDS else (array.dtype.str, array) for array in arrays
        ]
        for array, (dtype, content) in zip(arrays, contents, strict=True):
            size = len(content) if isinstance(content, bytes) else content.nbytes
            places.append((dtype, array.shape, end, size))
            end = -(-(end + size) // ALIGNED) * ALIGNED
        if end > self._size:
            os.ftruncate(self.descriptor, max(LEAST_BYTES, 1 << (end - 1).bit_length()))
        for (_, content), (dtype, shape, offset, size) in zip(contents, places, strict=True):
            if isinstance(content, bytes):
                self._numbers("u1", (size,), offset)[...] = np.frombuffer(content, np.uint8)
            else:
                self._numbers(dtype, shape, offset)[...] = content
        return places

    def read(self, places: Sequence[SlabPlace]) -> Arrays:
        """The arrays there: numbers as views, which hold until the writer writes again."""
        return tuple([self._read(*place) for place in places])

    def close(self) -> None:
        """Let go of the memory, once no view of it is left, and of the descriptor."""
        self._memory, self._size = None, 0
        os.close(self.descriptor)

    def _read(self, dtype: str, shape: tuple[int, ...], offset: int, size: int) -> Array:
        if dtype == STRING:
            return unpacked_texts(self._numbers("u1", (size,), offset).data, shape)
        return self._numbers(dtype, shape, offset)

    def _numbers(self, dtype: str, shape: tuple[int, ...], offset: int) -> Array:
        end = offset + math.prod(shape) * np.dtype(dtype).itemsize
        if end > self._size or self._memory is None:
            self._size = os.fstat(self.descriptor).st_size
            self._memory = mmap.mmap(self.descriptor, self._size)
        return np.ndarray(shape, dtype, self._memory, offset)
