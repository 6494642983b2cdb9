"""Measuring on a machine that others use as well: wait for a quiet moment, and do again what was disturbed.

What others took of the cores is what the kernel counts as busy, less what the measured processes and this one used. A
server of several processes is hurt less by company than one that lives on a single thread: such rounds compare nothing.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")
CORES = len(os.sched_getaffinity(0))
DISTURBED = 0.05
"""Share of all cores that others may take during a measurement."""
TRIES = 4
LOOK_S, PATIENCE_S = 0.5, 30.0


def quietly(
    run: Callable[[], Result], own_cpu_s: Callable[[], float] = lambda: 0.0, patience_s: float = PATIENCE_S
) -> Result:
    """The result of a run in which others took at most 5 % of the cores, else of the least disturbed of four.

    Before each it waits for a quiet moment, up to `patience_s`; without patience there is one run, come what may.
    `own_cpu_s` tells the CPU seconds so far of running processes that take part; child processes that end within the
    run, and this process, are counted anyway.
    """
    least: tuple[float, Result] | None = None
    for _ in range(TRIES if patience_s else 1):
        _wait_for_quiet(own_cpu_s, patience_s)
        began, busy, own = time.perf_counter(), busy_s(), _own(own_cpu_s)
        result = run()
        others = (busy_s() - busy - (_own(own_cpu_s) - own)) / (time.perf_counter() - began) / CORES
        if least is None or others < least[0]:
            least = (others, result)
        if others <= DISTURBED:
            break
    assert least is not None
    return least[1]


def busy_s(stat: Path = Path("/proc/stat")) -> float:
    """Seconds that all cores together were busy since the machine started; time stolen by its host included."""
    user, nice, system, _idle, _wait, interrupts, soft, stolen = map(int, stat.read_text().split()[1:9])
    return (user + nice + system + interrupts + soft + stolen) / os.sysconf("SC_CLK_TCK")


def _own(own_cpu_s: Callable[[], float]) -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return own_cpu_s() + sum(each.ru_utime + each.ru_stime for each in used)


def _wait_for_quiet(own_cpu_s: Callable[[], float], patience_s: float) -> None:
    give_up = time.monotonic() + patience_s
    while time.monotonic() < give_up:
        busy, own = busy_s(), _own(own_cpu_s)
        time.sleep(LOOK_S)
        if (busy_s() - busy - (_own(own_cpu_s) - own)) / LOOK_S / CORES <= DISTURBED:
            return
