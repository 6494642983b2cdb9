"""Nested JSON lists as arrays of one dtype: checked as a whole at the speed of C, searched by hand only for a mistake.

Nothing is converted silently. A float field takes numbers, an integer field whole numbers in its range, a boolean field
true and false, a field of texts only these; numpy alone would take strings, booleans among numbers, and wrap or round
what does not fit.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain
from typing import Any, TypeAlias

import numpy as np

from leanserve.codecs.tensors import clip, refuse_nul
from leanserve.contracts import Array, Json
from leanserve.errors import BadInput

Sizes: TypeAlias = tuple[int, ...]
DType: TypeAlias = np.dtype[Any]

TYPES: dict[str, frozenset[type]] = {
    "b": frozenset({bool}),
    "i": frozenset({int}),
    "u": frozenset({int}),
    "f": frozenset({int, float}),
    "O": frozenset({str}),
}
"""Kind of a numpy dtype -> the Python types that its JSON values may have; objects are texts."""
WORDS = {"b": "true or false", "i": "a whole number", "u": "a whole number", "f": "a number", "O": "a text"}


def sizes_of(value: Json) -> Sizes:
    """Lengths of nested lists along their first entries; () for anything but a list."""
    sizes = []
    while isinstance(value, list):
        sizes.append(len(value))
        value = value[0] if value else None
    return tuple(sizes)


def array_of(value: Json, dtype: DType, sizes: Sizes) -> Array | None:
    """Nested lists of exactly these sizes as an array, or `None` if anything is wrong with them."""
    leaves: Iterable[Json] = value if sizes else (value,)
    try:
        for _ in sizes[1:]:
            leaves = chain.from_iterable(leaves)
        if not set(map(type, leaves)) <= TYPES[dtype.kind]:
            return None
        with np.errstate(over="ignore"):  # what overflows to infinity is refused below
            array = np.array(value, dtype)
    except (TypeError, ValueError, OverflowError):  # no list among lists, unequal lengths, an integer out of range
        return None
    return array if array.shape == sizes and _is_sound(array) else None


def _is_sound(array: Array) -> bool:
    """Whether runtimes read every element as what it is: no infinity, no text that a NUL ends."""
    if array.dtype.kind == "O":
        return not any("\0" in text for text in array.flat)
    return array.dtype.kind != "f" or bool(np.isfinite(array).all())


def refuse(value: Json, dtype: DType, sizes: Sizes, where: str) -> None:
    """Find the first mistake in what should be nested lists of these sizes.

    Raises:
        BadInput: names its place, what was expected and what was found.
    """
    if not sizes:
        _refuse_number(value, dtype, where)
        return
    if not isinstance(value, list):
        raise BadInput(f"{where}: expected a list of {sizes[0]} entries, got {clip(value)}")
    if len(value) != sizes[0]:
        raise BadInput(f"{where}: expected {sizes[0]} entries, got {len(value)}")
    for index, item in enumerate(value):
        refuse(item, dtype, sizes[1:], f"{where}[{index}]")


def _refuse_number(value: Json, dtype: DType, where: str) -> None:
    if type(value) not in TYPES[dtype.kind]:
        raise BadInput(f"{where}: expected {WORDS[dtype.kind]}, got {clip(value)}")
    if dtype.kind == "b":
        return
    if dtype.kind == "O":
        refuse_nul(value, f"{where}: the text")
        return
    limits = np.iinfo(dtype) if dtype.kind in "iu" else np.finfo(dtype)
    if not float(limits.min) <= value <= float(limits.max) or array_of(value, dtype, ()) is None:
        raise BadInput(f"{where}: {clip(value)} is out of the range of {dtype}")
