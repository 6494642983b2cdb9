"""Lanes and the threads of sessions stay on processors of their own, where the service has all of them.

A virtual processor that rests looks to the guest's kernel as if its host had taken it away, and a thread that is woken
then shares the processor of the one that wakes it: two threads of a batch take turns instead of working side by side,
until a batch lasts long enough for the kernel to move one. Sessions that run seldom never get that far
(docs/decisions/030-processors.md).
"""

from __future__ import annotations

import os
from collections.abc import Collection


def own_processors(threads: int) -> tuple[int, ...]:
    """The processors that this process may use, if these are as many as its threads and more than one; else none.

    Where there are more of them than threads, others use them, too, and the kernel knows better.
    """
    if threads < 2 or not hasattr(os, "sched_getaffinity"):
        return ()
    usable = tuple(sorted(os.sched_getaffinity(os.getpid())))
    return usable if len(usable) == threads else ()


def keep_on(thread_id: int, processors: Collection[int]) -> bool:
    """Have a thread, by the kernel's number, run on these processors only; whether the kernel lets us."""
    try:
        os.sched_setaffinity(thread_id, processors)
    except OSError:  # they were taken from us meanwhile, or the thread has ended
        return False
    return True
