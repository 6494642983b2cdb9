"""How long did our threads wait for a processor? A measurement beside other work tells more of that work than of ours.

The kernel counts for every thread how long it was ready to run and did not (`schedstat`), and a virtual machine how
long its host had no processor for it (*steal*). Both are 0 on a quiet machine, whatever a model waits for by itself: a
GPU, or its own other threads. So a disturbance is told apart from CPU time that is below wall time for other reasons.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

STEAL = 8
"""Column of the time that was stolen, in the lines of processors of /proc/stat."""


class Contention:
    """Measures the seconds that this process waits from now on."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._before = self._counted()

    def waited_s(self) -> float:
        """Seconds, summed over threads, since the last call or since this was made; 0 where no kernel tells."""
        now = self._counted()
        waited = sum(max(0.0, seconds - self._before.get(name, 0.0)) for name, seconds in now.items())
        self._before = now
        return waited

    def _counted(self) -> dict[str, float]:
        return dict((*self._delays(), *self._steals()))

    def _delays(self) -> Iterator[tuple[str, float]]:
        """Of every thread."""
        for thread in (self._proc / "self" / "task").glob("*/schedstat"):
            with suppress(OSError, ValueError, IndexError):  # the thread has ended, or the kernel keeps no such numbers
                yield thread.parent.name, int(thread.read_text().split()[1]) / 1e9

    def _steals(self) -> Iterator[tuple[str, float]]:
        """Of every processor that we may use."""
        ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
        with suppress(OSError, ValueError):
            for line in (self._proc / "stat").read_text().splitlines():
                name, *ticks = line.split()
                if name in ours and len(ticks) >= STEAL:
                    yield name, int(ticks[STEAL - 1]) / os.sysconf("SC_CLK_TCK")
