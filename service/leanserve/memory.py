"""Running out of memory, recognised in one place for all libraries, and stepping back from it.

numpy and Python raise `MemoryError`; torch and onnxruntime raise their general errors and say it in words, each in its
own. What asks for less may still work: half of a batch, and half of that.
"""

from __future__ import annotations

import errno
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from leanserve.contracts import Arrays

Outcome = TypeVar("Outcome")

SHARE = 0.8
"""Of the memory that is free, what an unknown model may take."""
EXIT_STATUS = 3
"""Of a child in which memory ran out; the reason is the last line of its stderr."""
_WORDS = re.compile(
    r"can't allocate memory|not enough memory|failed to allocate memory"  # torch on CPUs, onnxruntime
    r"|bad[_ ]alloc|out[_ ]of[_ ]memory|STATUS_ALLOC_FAILED|ErrorMemoryAllocation",  # C++, CUDA and its libraries
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether this error, or one that it was raised from, says that memory ran out."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
            return True
        if type(error).__name__ == "OutOfMemoryError" or _WORDS.search(str(error)):  # torch's has a class of its own
            return True
        error = error.__cause__
    return False


def bound_memory(proc: Path = Path("/proc")) -> None:
    """From now on this process gets no more than most of what is free, instead of having the kernel end processes.

    On Linux; within a container the kernel's own bound may be lower, and ends this process alone.
    """
    if sys.platform != "linux":
        return
    import resource

    lines = (proc / "meminfo").read_text().splitlines()
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    if free is not None:
        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = round(SHARE * free)
        resource.setrlimit(resource.RLIMIT_DATA, (wanted if most < 0 else min(wanted, most), most))


def forget(error: BaseException | None) -> None:
    """Let go of the arrays that the functions held in which the error came up, before anything else needs memory."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__


@contextmanager
def exit_when_out() -> Iterator[None]:
    """End the process with `EXIT_STATUS` where memory runs out in the block."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        sys.stderr.write(f"{str(error).strip() or type(error).__name__}\n")
        sys.exit(EXIT_STATUS)


def largest_that_fits(rows: int, run: Callable[[int], Outcome]) -> tuple[int, Outcome]:
    """The largest of `rows`, its half, its quarter and so on for which there is memory, and what `run` gave for it.

    Raises:
        Exception: whatever `run` raises; of a lack of memory only that for a single row.
    """
    while True:
        try:
            return rows, run(rows)
        except Exception as error:
            if rows == 1 or not is_out_of_memory(error):
                raise
            forget(error)
        rows //= 2


def run_in_parts(run: Callable[[Arrays], Outcome], batch: Arrays) -> list[Outcome]:
    """What `run` gives for a batch; where there is no memory for it, for its halves, or for theirs, in their order.

    Raises:
        Exception: as `largest_that_fits`.
    """
    rows = len(batch[0])
    try:
        return [run(batch)]
    except Exception as error:
        if rows == 1 or not is_out_of_memory(error):
            raise
        forget(error)
    halves = (tuple(array[part] for array in batch) for part in (slice(rows // 2), slice(rows // 2, rows)))
    return [result for half in halves for result in run_in_parts(run, half)]
