"""Telling the event loop, from a lane, that something is done there.

What asyncio has for it, `call_soon_threadsafe`, wakes the loop of uvloop by an eventfd, and the kernel then likes to
run it where it ran last: on the core of another lane, which has to stop for it, while the core of the lane that is
done has nothing to do. A write to a pipe tells the kernel that the writer is about to wait, so that the reader may have
its core: one or two of a hundred rows per second of an encoder at 8 connections (docs/decisions/005-lanes.md).
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections import deque
from collections.abc import Callable
from functools import partial


class LoopWaker:
    """Runs callbacks on a loop, in the order in which threads asked for them. It lives as long as its loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        """Call it on the loop's thread."""
        self._callbacks: deque[Callable[[], object]] = deque()
        self._rung = False
        self._read, self._write = os.pipe()
        os.set_blocking(self._read, False)
        weakref.finalize(self, _close, self._read, self._write)
        loop.add_reader(self._read, self._answer)
        self._loop = loop

    def wake_by_pipe(self, callback: Callable[..., object], *arguments: object) -> None:
        """Have the loop call this soon. Callable from any thread; nothing happens once the loop is closed."""
        self._callbacks.append(partial(callback, *arguments))
        if not self._rung:  # else the loop has yet to look, and will find this
            self._rung = True
            os.write(self._write, b"!")

    def wake_threadsafe(self, callback: Callable[..., object], *arguments: object) -> None:
        """The same by the loop's own way: sooner heard by a core that has nothing to do.

        Raises:
            RuntimeError: the loop is closed.
        """
        self._callbacks.append(partial(callback, *arguments))
        self._loop.call_soon_threadsafe(self._open)

    def _answer(self) -> None:
        os.read(self._read, 2**10)
        self._rung = False  # before looking: what comes from now on rings again
        self._open()

    def _open(self) -> None:
        while self._callbacks:
            try:
                self._callbacks.popleft()()
            except Exception as error:
                context = {"message": "a callback from a lane failed", "exception": error}
                self._loop.call_exception_handler(context)


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
