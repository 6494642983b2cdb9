"""Turns of Python's threads that are short while something long is done beside the event loop.

The loop gives up Python's lock at every event, and waits for it a whole switch interval (5 ms) where another thread
runs Python: while a body of 4 MB was parsed on a thread, a turn of the loop took 26 ms, of which 2 were its own.
"""

from __future__ import annotations

import sys
import threading

SWITCH_S = 0.0005
"""Seconds until a thread that runs Python gives way to another that wants to."""


class ShortSwitches:
    """A context manager: threads give way soon while anybody is in it, on whatever thread."""

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._inside = 0
        self._usual = sys.getswitchinterval()

    def __enter__(self) -> None:
        with self._changing:
            if not self._inside:
                self._usual = sys.getswitchinterval()
                sys.setswitchinterval(SWITCH_S)
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._changing:
            self._inside -= 1
            if not self._inside:
                sys.setswitchinterval(self._usual)
