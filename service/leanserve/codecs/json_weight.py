"""What a JSON body would become, counted before it is parsed.

An empty list is three bytes of a body and a hundred of memory, and a parser that builds five million of them holds
Python's lock for two seconds. Brackets, quotes and commas are counted at the speed of memory, without that lock.
"""

from __future__ import annotations

import numpy as np

from leanserve.codecs.tensors import Buffer
from leanserve.errors import BodyTooLarge

MAX_LISTS = 2**20
"""Lists, objects and texts that a body may hold: some 100 MB of memory. Numbers take what the body's length allows."""
_FEW_BYTES = 2**16
"""Of a body that holds too few of anything to matter."""
_BYTE_S, _NUMBER_S, _LIST_S = 2e-9, 100e-9, 450e-9
"""Seconds to parse a byte of text, a number and a list, and to make an array of them and forget them again."""


def json_seconds(body: Buffer) -> float:
    """About how long it takes to parse a body and to make arrays of it.

    Raises:
        BodyTooLarge: it holds too many lists, objects and texts.
    """
    lists, numbers = _counted(body)
    return len(body) * _BYTE_S + numbers * _NUMBER_S + lists * _LIST_S


def require_few_lists(body: Buffer) -> None:
    """Raises `BodyTooLarge` as `json_seconds`."""
    if len(body) > _FEW_BYTES:
        _counted(body)


def _counted(body: Buffer) -> tuple[int, int]:
    """Lists (with objects and texts) and numbers in a body, those within its texts included."""
    characters = np.frombuffer(body, np.uint8)

    def count(character: str) -> int:
        return int(np.count_nonzero(characters == ord(character)))

    lists = count("[") + count("{") + count('"') // 2
    if lists > MAX_LISTS:
        raise BodyTooLarge(f"the body holds {lists} lists, objects and texts in JSON; at most {MAX_LISTS} are taken")
    return lists, count(",") + 1
