"""What hangs is noticed: a batch that does not end, and an event loop that does not turn.

A thread looks at the lanes and at the loop, once a second. Nobody can end a thread that does not return from a library,
so there are two ways to go on. `exit` ends the process, with a status of its own, for its supervisor to start it again.
`isolate` gives the lane up and another takes its place; the variant fails, and the others live. A loop that does not
turn can only be ended.

What is counted is looks, not time: a process that was stopped for a while, or has no core, looks less often.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import math
import os
import sys
import threading
from collections.abc import Callable
from typing import Literal, NamedTuple

from leanserve.runtime.device import BatchOnLane, Device, Lane

logger = logging.getLogger(__name__)

EXIT_STATUS = 70
"""EX_SOFTWARE of sysexits.h; the service uses it for nothing else."""
LOOKS = 20
"""How often it is looked, at least, before something counts as stuck."""
OnStuck = Literal["exit", "isolate"]


class WatchdogLimits(NamedTuple):
    """Seconds for which a batch may run and the loop may not turn, and what is done then."""

    batch_s: float = 60.0
    loop_s: float = 10.0
    on_stuck: OnStuck = "exit"

    @property
    def look_s(self) -> float:
        """From one look to the next."""
        return min(1.0, self.batch_s / LOOKS, self.loop_s / LOOKS)


Isolate = Callable[[Lane, BatchOnLane], None]


class Watchdog:
    """Watches the lanes of a device and the loop on which it was made, until it is stopped."""

    def __init__(
        self, device: Device, limits: WatchdogLimits, isolate: Isolate, end: Callable[[int], None] | None = None
    ) -> None:
        """`isolate` is called on the loop with a lane and what it is stuck in; `end` ends the process."""
        self._loop = asyncio.get_running_loop()
        self._device = device
        self._limits = limits
        self._isolate = isolate
        self._end = end or end_process
        self._stopped = threading.Event()
        self._seen: dict[int, tuple[BatchOnLane | None, int]] = {}
        """By lane, the batch that ran at the last look, and for how many looks."""
        self._turned = True
        self._still = 0
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()

    def _watch(self) -> None:
        while not self._stopped.wait(self._limits.look_s):
            try:
                self.look()
            except RuntimeError:  # the loop is closed
                return

    def look(self) -> None:
        """Look once at everything; called by the watchdog's own thread.

        Raises:
            RuntimeError: the loop is closed.
        """
        for lane in self._device.lanes:
            self._look_at(lane)
        if self._turned:
            self._turned, self._still = False, 0
            self._loop.call_soon_threadsafe(self._turn)
            return
        self._still += 1
        if self._still == self._looks(self._limits.loop_s):
            self._give_up(f"the event loop has not turned for {self._limits.loop_s:g} s{self._short_batch()}")

    def _turn(self) -> None:
        self._turned = True

    def _look_at(self, lane: Lane) -> None:
        batch = lane.batch
        before, looks = self._seen.get(lane.index, (None, 0))
        looks = looks + 1 if batch is before else 0
        self._seen[lane.index] = (batch, looks)
        if batch is None or looks != self._looks(self._limits.batch_s):
            return
        what = f"a batch of variant '{batch.share.name}' has run for more than {self._limits.batch_s:g} s"
        if self._limits.on_stuck == "exit":
            self._give_up(what)
            return
        logger.critical("%s on lane %d: the lane is given up, the variant fails", what, lane.index)
        self._loop.call_soon_threadsafe(self._isolate, lane, batch)

    def _looks(self, seconds: float) -> int:
        return math.ceil(seconds / self._limits.look_s)

    def _short_batch(self) -> str:
        """Whose batch holds the loop up, if one that it runs itself does."""
        running = [lane.batch.share.name for lane in self._device.lanes if lane.batch is not None]
        return f"; batches of {', '.join(running)} are running" if running else ""

    def _give_up(self, what: str) -> None:
        logger.critical("%s: the process ends with status %d", what, EXIT_STATUS)
        self._end(EXIT_STATUS)


def end_process(status: int) -> None:
    """End it now, whatever its threads are at; where they are is written to stderr."""
    faulthandler.dump_traceback(sys.stderr)
    sys.stderr.flush()
    os._exit(status)
