"""Ends what a user's model does when it takes too long: a factory that waits for somebody, a program that loops.

The block is ended by an exception in its own thread, again and again until it is over, for what it runs may catch
anything. On the main thread a signal brings it, which also ends a sleep; on others it comes with the next line of
Python. Native code hears of neither: on the main thread, where a command waits for it, the process ends.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from leanserve.errors import ConfigError

TRIAL_S = 300.0
"""How long it may take to look at a model, whoever made it."""
AGAIN_S = 1.0
"""After so long the next exception comes."""
GRACE_S = 20.0
"""How long all of them may take to be heard."""


class _TimeUp(BaseException):
    """No `Exception`, which models catch."""


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """End the block after so long; `what` has taken it.

    Raises:
        ConfigError: it was ended.
    """
    text = f"{what} does not end within {seconds:g} s"
    is_main = threading.current_thread() is threading.main_thread()
    try:
        with _signals(seconds, text) if is_main else _exceptions(seconds):
            yield
    except _TimeUp:
        raise ConfigError(text) from None


@contextmanager
def _signals(seconds: float, text: str) -> Iterator[None]:
    def end(*_: object) -> None:
        raise _TimeUp

    def give_up() -> None:
        sys.stderr.write(f"{text}, and cannot be ended\n")
        sys.stderr.flush()
        os._exit(2)

    last = threading.Timer(seconds + GRACE_S, give_up)
    last.daemon = True
    began, handler = time.monotonic(), signal.signal(signal.SIGALRM, end)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)
    last.start()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        last.cancel()
        signal.signal(signal.SIGALRM, handler)
        if left:  # somebody else has set it
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 0.001), interval)


@contextmanager
def _exceptions(seconds: float) -> Iterator[None]:
    over, here = threading.Event(), ctypes.c_ulong(threading.get_ident())
    deciding = threading.Lock()

    def watch() -> None:
        wait = seconds
        while not over.wait(wait):
            with deciding:
                if not over.is_set():
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(here, ctypes.py_object(_TimeUp))
            wait = AGAIN_S

    threading.Thread(target=watch, name="time-limit", daemon=True).start()
    try:
        yield
    finally:
        with deciding:
            over.set()
        ctypes.pythonapi.PyThreadState_SetAsyncExc(here, None)  # one that has not been heard
