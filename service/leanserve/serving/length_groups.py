"""A request whose rows differ in length, in groups that queue apart.

A batch is as long as its longest row, so that one long text among thirty short ones would cost as much as thirty-one
long ones. And where rows of different length must not share a batch at all, neither may those of one request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from leanserve.contracts import Arrays, Decoded, ModelSpec, RowsTogether

SHORTEST = 16
"""Tokens of the first group; that of each further group is twice as long."""
Row = TypeVar("Row")


def length_groups(lengths: Sequence[int], rows: RowsTogether = "any") -> list[list[int]]:
    """Row numbers by length: up to `SHORTEST`, up to twice as many, and so on; only groups that have rows.

    Rows that cannot share a batch with rows of `any` other length are grouped by their very length.
    """
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        longest = max(SHORTEST, 1 << (length - 1).bit_length()) if rows == "any" else length
        groups.setdefault(longest, []).append(row)
    return [groups[longest] for longest in sorted(groups)]


def cut_to_length(decoded: Decoded, spec: ModelSpec, group: Sequence[int]) -> Arrays:
    """The rows of a group, all as long as its first one, without what they were padded with."""
    length = decoded.lengths[group[0]]
    kept = [
        (list(group), *(slice(0, length) if size is None else slice(None) for size in item.shape))
        if item.shape.count(None) == 1
        else (list(group),)
        for item in spec.inputs
    ]
    return tuple(array[place] for array, place in zip(decoded.inputs, kept, strict=True))


def in_order(parts: Sequence[Sequence[Row]], groups: Sequence[Sequence[int]]) -> list[Row]:
    """What the groups gave, row by row, in the order of the request."""
    found = {row: part[place] for part, group in zip(parts, groups, strict=True) for place, row in enumerate(group)}
    return [found[row] for row in range(len(found))]
