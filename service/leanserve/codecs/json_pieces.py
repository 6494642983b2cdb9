"""JSON of many numbers, written in pieces of less than half a millisecond.

A JSON library writes a value in one go and holds Python's lock for all of it: a quarter of a second for the 13 million
numbers that 32 rows of a segmentation may have. Between two pieces the event loop can have the lock, and it is not held
while they are put together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import orjson

from leanserve.codecs.joining import joined
from leanserve.contracts import Array, Json

PIECE = 2**14
"""Numbers, or what takes as long to write, in one piece: 0.3 ms."""


def json_text(value: Json, numbers: int) -> bytes:
    """A value, whose arrays are contiguous, as JSON; some `numbers` are in it."""
    if numbers <= PIECE:
        return _written(value)
    return joined(list(_pieces(value, _weight(value))))


def _weight(value: Json) -> int:
    """About how many numbers take as long to write."""
    if isinstance(value, np.ndarray):
        return value.size
    if isinstance(value, dict):
        return len(value) + sum(map(_weight, value.values()))
    if isinstance(value, list | tuple):
        return 1 + sum(map(_weight, value))
    return 1 + len(value) // 64 if isinstance(value, str) else 1


def _pieces(value: Json, weight: int) -> Iterator[bytes]:
    if weight <= PIECE or not isinstance(value, np.ndarray | dict | list | tuple):
        yield _written(value)
    elif isinstance(value, np.ndarray):
        yield from _in_brackets(_of_array(value))
    elif isinstance(value, dict):
        yield b"{"
        for number, (key, item) in enumerate(value.items()):
            yield b"%b%b:" % (b"," if number else b"", _written(key))
            yield from _pieces(item, _weight(item))
        yield b"}"
    else:
        yield from _in_brackets(_of_list(value))


def _in_brackets(groups: Iterable[Iterable[bytes]]) -> Iterator[bytes]:
    opening = b"["
    for pieces in groups:
        yield opening
        yield from pieces
        opening = b","
    yield b"]"


def _of_array(array: Array) -> Iterator[Iterable[bytes]]:
    """The pieces of every item of an array, or of several together with commas between."""
    width = array.size // len(array)
    if width > PIECE:
        yield from (_pieces(item, width) for item in array)
        return
    step = PIECE // width
    for start in range(0, len(array), step):
        yield (_written(array[start : start + step])[1:-1],)


def _of_list(items: Sequence[Json]) -> Iterator[Iterable[bytes]]:
    """The same of a list."""
    group: list[Json] = []
    held = 0
    for item in items:
        weight = _weight(item)
        if group and held + weight > PIECE:
            yield (_written(group)[1:-1],)
            group, held = [], 0
        if weight > PIECE:
            yield _pieces(item, weight)
        else:
            group.append(item)
            held += weight
    if group:
        yield (_written(group)[1:-1],)


def _written(value: Json) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SERIALIZE_NUMPY)
