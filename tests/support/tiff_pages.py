"""TIFF files tag by tag: what encoders would not write."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Literal

SHORT, LONG, LONG8 = 3, 4, 16


def page(
    tags: Mapping[int, int | Sequence[int]],
    data: bytes = b"",
    order: Literal["<", ">"] = "<",
    *,
    form: Literal["classic", "big"] = "classic",
    kinds: Mapping[int, int] = {},
) -> bytes:
    """A file of one page: the pixels `data` first, at byte 16, then the tags.

    A value above 65535, or one that is listed in `kinds`, is no SHORT.
    """
    big = form == "big"
    word = "Q" if big else "I"
    values: dict[int, tuple[int, ...]] = {
        tag: tuple(value) if isinstance(value, Sequence) else (value,) for tag, value in tags.items()
    }
    entries, blob = b"", b""
    start = 16 + len(data)
    end = start + (8 if big else 2) + len(values) * (20 if big else 12) + (8 if big else 4)
    for tag, found in sorted(values.items()):
        kind = kinds.get(tag, SHORT if max(found, default=0) < 1 << 16 else LONG)
        packed = struct.pack(
            f"{order}{len(found)}{ {1: 'B', SHORT: 'H', LONG: 'I', 8: 'h', LONG8: 'Q'}[kind] }", *found
        )
        if len(packed) > (8 if big else 4):
            packed, blob = struct.pack(order + word, end + len(blob)), blob + packed
        entries += struct.pack(f"{order}HH{word}", tag, kind, len(found)) + packed.ljust(8 if big else 4, b"\0")
    mark = b"II" if order == "<" else b"MM"
    if big:
        head = mark + struct.pack(order + "HHHQ", 43, 8, 0, start)
    else:
        head = mark + struct.pack(order + "HI", 42, start) + bytes(8)
    count = struct.pack(order + ("Q" if big else "H"), len(values))
    return head + data + count + entries + struct.pack(order + word, 0) + blob


def grey(width: int, height: int, **more: int | Sequence[int]) -> dict[int, int | Sequence[int]]:
    """The tags of an uncompressed image of 8 bits in one strip; `tNNN` sets tag NNN, and leaves it out if empty."""
    usual: dict[int, int | Sequence[int]] = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 277: 1, 273: 16}
    usual |= {278: height, 279: width * height}
    changed = usual | {int(name[1:]): value for name, value in more.items()}
    return {tag: value for tag, value in changed.items() if value != ()}
