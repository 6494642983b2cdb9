"""What a row may order the scripted backend to do, so that a test decides from outside what a server process meets.

The first number of a row is its order; an ordinary row has none and is answered with ten times itself. Orders are
far below zero: no image and no warm-up row reaches them.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import Counter
from pathlib import Path

import numpy as np

from leanserve.contracts import Array, Arrays, ModelSpec, Result, TensorSpec

RAISE = -1001.0
"""The batch raises, as a model does on a row that it cannot take."""
EXIT = -1002.0
"""The batch raises what is no `Exception`, as a panic in a native library does."""
GARBAGE = -1003.0
"""The batch returns something that is no tuple of arrays."""
HOLD = -1004.0
"""The batch takes until the file `gate` is gone: the device is busy meanwhile, and the file `holding` is there."""
CENSUS = -1005.0
"""The row is answered with how many requests, tickets, connections and tasks the process holds (`COUNTED`)."""

COUNTED = ("Ticket", "Request", "Exchange", "RequestResponseCycle", "Connection", "Task")
WIDTH = 8
LABELS = tuple("abcdefgh")
SPEC = ModelSpec(
    (TensorSpec("x", "float32", (1, 2, 4)),), (TensorSpec("y", "float32", (WIDTH,), meaning="logits"),), LABELS
)


class RuleBackend:
    """Obeys its rows; every batch takes `batch_s` seconds, in which it sleeps."""

    name = "rule"
    self_contained = False
    device = "cpu"
    row_buckets: tuple[int, ...] = ()

    def __init__(self, folder: Path, batch_s: float = 0.0) -> None:
        self._folder = folder
        self._batch_s = batch_s

    def run(self, batch: Arrays) -> Result:
        rows = batch[0].reshape(-1, WIDTH)
        orders = set(rows[:, 0].tolist())
        if HOLD in orders:
            _hold(self._folder)
        if self._batch_s:
            time.sleep(self._batch_s)
        if RAISE in orders:
            raise RuntimeError("ordered to fail")
        if EXIT in orders:
            raise SystemExit("ordered to exit")
        if GARBAGE in orders:
            return Result(None)  # type: ignore[arg-type]
        answers = rows * 10
        if CENSUS in orders:
            answers[rows[:, 0] == CENSUS, : len(COUNTED)] = _census()
        return Result((answers,))

    def close(self) -> None: ...


def _hold(folder: Path, seconds: float = 30.0) -> None:
    give_up = time.monotonic() + seconds
    (folder / "holding").touch()
    while (folder / "gate").exists():
        assert time.monotonic() < give_up
        time.sleep(0.001)
    (folder / "holding").unlink()


def _census() -> list[int]:
    gc.collect()
    held = Counter(type(item).__name__ for item in gc.get_objects() if not _finished(item))
    return [held[name] for name in COUNTED]


def _finished(item: object) -> bool:
    return isinstance(item, asyncio.Task) and item.done()


def row(*values: float) -> Array:
    """One row [1, 1, 2, 4] that begins with these values."""
    made = np.zeros((1, 1, 2, 4), np.float32)
    made.reshape(WIDTH)[: len(values)] = values
    return made
