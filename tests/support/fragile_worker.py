"""`python fragile_worker.py DESCRIPTORS FOLDER`: a worker whose backend obeys its rows, and can crash.

FOLDER holds the files `broken`, with which it cannot open its model, and `starts`, with a line for each start.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from leanserve.contracts import Arrays, Backend, Result
from leanserve.errors import BadInput, DeviceLost
from leanserve.runtime.isolation.worker_side import serve_backend
from rules import RAISE, WIDTH

SEGFAULT, HANG, EXHAUST, REFUSE, SLOWLY, LOSE = -2001.0, -2002.0, -2003.0, -2004.0, -2005.0, -2006.0
"""What the first number of a row may order, besides `RAISE`."""
SLOWLY_S = 0.05


class FragileBackend:
    """Answers ten times its rows."""

    name = "fragile"
    self_contained = True
    device = "cpu"
    row_buckets: tuple[int, ...] = ()

    def run(self, batch: Arrays) -> Result:
        rows = batch[0].reshape(-1, WIDTH)
        orders = set(rows[:, 0].tolist())
        if SLOWLY in orders:
            time.sleep(SLOWLY_S)
        if SEGFAULT in orders:
            ctypes.string_at(0)
        if HANG in orders:
            time.sleep(60)
        if EXHAUST in orders:
            raise MemoryError("no memory for so many rows")
        if REFUSE in orders:
            raise BadInput("an index beyond the table")
        if LOSE in orders:
            raise DeviceLost("cuda:0 is lost to this process: an illegal memory access")
        if RAISE in orders:
            raise RuntimeError("ordered to fail")
        return Result((rows * np.float32(10),), {"rows": float(len(rows)), "process": float(os.getpid())})

    def close(self) -> None: ...


def read(folder: Path) -> Callable[[], Backend]:
    with (folder / "starts").open("a") as starts:
        starts.write(f"{os.getpid()}\n")
    if (folder / "broken").exists():
        raise RuntimeError("the disk is gone")
    return FragileBackend


if __name__ == "__main__":
    serve_backend(sys.argv[1], partial(read, Path(sys.argv[2])))
