"""Tensors of texts: numpy arrays of Python's `str`, counted, as bytes and back, and compared.

numpy has no kind for texts of any length but objects, whose bytes are addresses. So whoever counts, stores, sends or
compares arrays by their bytes asks here. As bytes a text is its length (4 bytes, little-endian) and its UTF-8, as
BYTES of the Open Inference Protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from math import prod
from struct import Struct
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

_Array: TypeAlias = NDArray[Any]

STRING = "string"
"""The dtype of a tensor of texts in specs and configs, and where numpy's own are told apart from it."""
KINDS = "OU"
"""Kinds of numpy dtypes that are texts: of any length, and of a fixed one, as files have them."""
LENGTH = Struct("<I")


def numpy_dtype(name: str) -> np.dtype[Any]:
    """That of the arrays of a tensor whose dtype has this name."""
    return np.dtype(np.object_) if name == STRING else np.dtype(name)


def dtype_name(array: _Array) -> str:
    """The name of an array's dtype in specs and configs."""
    return STRING if array.dtype.kind in KINDS else str(array.dtype)


def array_of_texts(texts: Sequence[str], shape: Sequence[int]) -> _Array:
    """Texts in row-major order as an array of this shape."""
    found = np.empty(len(texts), np.object_)
    found[:] = texts
    return found.reshape(shape)


def size_of(array: _Array) -> int:
    """About how many bytes an array takes; of texts their characters are counted as one each."""
    return array.nbytes + (sum(map(len, array.flat)) if array.dtype.kind == "O" else 0)


def of_fixed_width(array: _Array) -> _Array:
    """The array as it can be written into a file without pickle: every text takes the bytes of the longest."""
    return array.astype(np.str_) if array.dtype.kind == "O" else array


def packed_texts(array: _Array) -> bytes:
    """All texts, in row-major order, each behind its length."""
    texts = [text.encode() for text in array.ravel().tolist()]
    return b"".join(chain.from_iterable((LENGTH.pack(len(text)), text) for text in texts))


def unpacked_texts(content: memoryview, shape: Sequence[int]) -> _Array:
    """What `packed_texts` made of an array of this shape; the bytes are trusted."""
    texts, start = [], 0
    for _ in range(prod(shape)):
        end = start + LENGTH.size + LENGTH.unpack_from(content, start)[0]
        texts.append(str(content[start + LENGTH.size : end], "utf-8"))
        start = end
    return array_of_texts(texts, shape)


def as_numbers(one: _Array, other: _Array) -> tuple[_Array, _Array]:
    """Two arrays of the same shape for who compares numbers: of texts 1 where the first differs, and 0 everywhere."""
    if other.dtype.kind not in KINDS:
        return one, other
    return np.asarray(one != other, np.int8), np.zeros(other.shape, np.int8)
