"""`python -m leanserve_models.choose_pieces`: choose the pieces of photos on which `efficientnet_lite0` is gated.

What a variant answers about a piece of sky says nothing about it. This takes the first pieces of each strip on which
the base is sure (`LEAD`) and writes their numbers beside the module, where everybody can check them.
"""

from __future__ import annotations

import json
from itertools import count

import torch

from leanserve_models.efficientnet_lite0 import CHOSEN, LEAD, SPLIT_ROWS, Split, build, piece, prepared


def leads(network: torch.nn.Module, split: Split, numbers: range) -> list[float]:
    """By how much the likeliest class of each piece is ahead of the second, 0..1."""
    images = torch.stack([torch.from_numpy(prepared(piece(split, number))) for number in numbers])
    with torch.inference_mode():
        best, second = network(images).softmax(dim=1).topk(2).values.T
    return (best - second).tolist()  # type: ignore[no-any-return]


def chosen(network: torch.nn.Module, split: Split, rows: int) -> list[int]:
    """The numbers of the first `rows` pieces of a split on which the network is sure."""
    found: list[int] = []
    for start in count(0, 32):
        numbers = range(start, start + 32)
        found += [number for number, lead in zip(numbers, leads(network, split, numbers), strict=True) if lead >= LEAD]
        if len(found) >= rows:
            return found[:rows]
    raise AssertionError("the strips never run out of pieces")


def main() -> None:
    """Write the numbers of the pieces of the splits `gate` and `test`."""
    network = build()
    splits: tuple[Split, ...] = ("gate", "test")
    numbers = {split: chosen(network, split, SPLIT_ROWS[split]) for split in splits}
    CHOSEN.write_text(json.dumps(numbers) + "\n", encoding="utf-8")
    print({split: f"{len(found)} of the first {found[-1] + 1} pieces" for split, found in numbers.items()})


if __name__ == "__main__":
    main()
