"""What is read of all large bodies, or parsed of all large heads, between two turns of the event loop.

A loop reads whatever has come on every socket before it turns to anything else. A hundred clients that send 4 MB each
would keep it at that for 0.1 s: copying is the smaller part, most is for pages of memory that are touched for the first
time. So all bodies together get a few milliseconds of each turn; a reader for which nothing is left waits for a later
one, and the kernel keeps what has come. Of heads it is the parsing that takes long.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Protocol

AT_ONCE = 2**21
"""Bytes that are read in one turn: 1 to 2 ms."""
LEAST = 2**12
"""Bytes for which a reader always has a place: the loop asks for one where it has found something to be read."""
_AWAKE = 16
"""Readers that go on in each turn. Some of them find nothing, and leave it to others."""


class TurnReader(Protocol):
    """Whoever reads bodies."""

    def go_on(self) -> None:
        """It may read again."""


class ReadingTurns:
    """Shares the turns of one loop among its readers, first come first served."""

    def __init__(self, at_once: int = AT_ONCE) -> None:
        self._at_once = self.left = at_once
        """Bytes that may still be taken in this turn."""
        self._waiting: deque[TurnReader] = deque()
        self._is_over = True
        """Whether nothing was read in this turn."""

    def took(self, nbytes: int) -> bool:
        """So many bytes were read; whether there is something left for their reader. If not it has to `wait`."""
        self.left -= nbytes
        if self._is_over:
            self._is_over = False
            asyncio.get_running_loop().call_soon(self._next)
        return self.left > 0

    def wait(self, reader: TurnReader) -> None:
        """Tell this reader when it may `go_on`."""
        self._waiting.append(reader)

    def forget(self, reader: TurnReader) -> None:
        """This reader does not wait any more."""
        self._waiting.remove(reader)

    def _next(self) -> None:
        self.left = self._at_once
        self._is_over = not self._waiting
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._next)
        for _ in range(min(_AWAKE, len(self._waiting))):
            self._waiting.popleft().go_on()
