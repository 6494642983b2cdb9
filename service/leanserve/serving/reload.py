"""A variant's backends loaded and closed while other variants serve, at as little cost to these as can be.

The lanes have no part in it: models are read, opened, run in every shape and, one day, closed on threads that are there
only for this. A lane needs no preparation, for it has run the variant before; even a single row of a slow variant on it
would double the p99 of a fast one. What batches cost is known from before, too.

What computes has a lower priority. What holds a lock that everybody needs has not: who holds Python's, or the kernel's
for the memory of the process, and waits for a core keeps all others waiting for both. Opening cannot step back wherever
lanes have several threads: a backend may start threads of its own, which inherit a priority that nobody without
privileges can ever raise again.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import Literal, NamedTuple, TypeVar

from leanserve.contracts import Backend, ModelSpec
from leanserve.runtime.costs import Costs
from leanserve.runtime.device import Device
from leanserve.runtime.lanes import LanePlacement, LoadedVariant
from leanserve.runtime.short_switches import ShortSwitches
from leanserve.runtime.unused_memory import give_back

Open = Callable[[int], Backend]
"""Creates a backend with so many threads."""
Read = Callable[[], Open]
"""Reads a model, which may take long, and returns what is left to do: to open a backend for it."""
Priority = Literal["low", "usual"]
_Result = TypeVar("_Result")

NICE = 10
"""A tenth of the weight of a thread of the usual priority. At the lowest one, 19, a loading thread that holds Python's
lock waits for the cores so long that those who wait for the lock are kept up by tens of milliseconds."""


class LoadingThreads:
    """Two threads beside the lanes, of `low` and of `usual` priority; each starts when it is first needed.

    They are the same for every load, because glibc keeps some freed memory per thread for that thread's next use: with
    new threads each time, a hundred loads of a model left five times its weights behind. Daemons, because a model that
    takes minutes to load must not keep the process from ending.
    """

    def __init__(self, switches: ShortSwitches) -> None:
        self._switches = switches
        self._jobs: dict[Priority, SimpleQueue[Callable[[], None] | None]] = {}

    async def do(self, work: Callable[[], _Result], priority: Priority = "low") -> _Result:
        """The result of the work, which is done to its end whoever waits for it. One work at a time.

        All threads of Python take shorter turns meanwhile: else answers of other variants took ten times as long while
        a model was being compiled.
        """
        done: Future[_Result] = Future()
        done.set_running_or_notify_cancel()  # from now on it cannot be cancelled

        def job() -> None:
            try:
                done.set_result(work())
            except BaseException as error:
                done.set_exception(error)

        with self._switches:
            self._queue(priority).put(job)
            return await asyncio.wrap_future(done)

    def close(self) -> None:
        """End the threads once they have done what they do."""
        for jobs in self._jobs.values():
            jobs.put(None)

    def _queue(self, priority: Priority) -> SimpleQueue[Callable[[], None] | None]:
        if priority not in self._jobs:
            jobs = self._jobs[priority] = SimpleQueue()
            threading.Thread(target=_work, args=(jobs, priority), name=f"loading-{priority}", daemon=True).start()
        return self._jobs[priority]


def _work(jobs: SimpleQueue[Callable[[], None] | None], priority: Priority) -> None:
    if priority == "low":
        _step_back()
    while (job := jobs.get()) is not None:
        job()
        del job  # with the model that it refers to


def _step_back() -> None:
    """Have other threads go before this one; on Linux only, for elsewhere a priority is that of a process."""
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


class LaneCosts(NamedTuple):
    """What batches cost on a lane, and on all of them together, where there is to be a backend for that."""

    lanes: Costs
    wide: Costs | None = None


class OpenedBeside(NamedTuple):
    """Backends for all lanes, one for a batch that is alone, and what a batch costs on a lane."""

    backends: tuple[Backend, ...]
    wide: LanePlacement | None
    costs: Costs


async def open_again(threads: LoadingThreads, running: LoadedVariant, read: Read, spec: ModelSpec) -> LoadedVariant:
    """New backends like the closed ones, warm: for all lanes, shared where possible, and a wide one if there was.

    Raises:
        Exception: as `open_beside`.
    """
    costs = LaneCosts(running.costs, running.wide.costs if running.wide else None)
    opened = await open_beside(threads, running.device, read, spec, lambda _: costs)
    return replace(running, backends=opened.backends, wide=opened.wide)


async def open_beside(
    threads: LoadingThreads, device: Device, read: Read, spec: ModelSpec, costs_of: Callable[[Backend], LaneCosts]
) -> OpenedBeside:
    """Backends for a device on which others serve, warm in all shapes of the costs that they are said to have.

    Raises:
        Exception: whatever reading, opening or running raises; what was opened is closed.
    """
    opened = list[Backend]()

    async def open_with(count: int) -> Backend:
        open_backend = await threads.do(read, "usual")
        opened.append(await threads.do(partial(open_backend, count), "low" if count == 1 else "usual"))
        return opened[-1]

    try:
        backends = [await open_with(device.lane_threads)]
        for _ in device.lanes[1:]:
            shared = backends[0].self_contained
            backends.append(backends[0] if shared else await open_with(device.lane_threads))
        costs = costs_of(backends[0])
        wide = LanePlacement(await open_with(device.threads), costs.wide) if costs.wide else None
        await threads.do(partial(warm_again, costs.lanes, spec, opened))
        await threads.do(give_back, "usual")
    except Exception:
        await close_all(threads, opened)
        raise
    return OpenedBeside(tuple(backends), wide, costs.lanes)


async def close_all(threads: LoadingThreads, backends: Iterable[Backend]) -> None:
    """Close backends that no lane runs any more, and give their memory back to the system."""
    for backend in backends:
        await threads.do(backend.close, "usual")
    await threads.do(give_back, "usual")


def shapes_to_meet(costs: Costs) -> list[tuple[int, int]]:
    """Rows and length of all batches that a backend will meet: up to where the knee may move."""
    return [
        (rows, length)
        for table, length in zip(costs.tables, costs.lengths or (0,), strict=True)
        for rows in table.buckets
        if rows <= table.bucket(table.reach)
    ]


def warm_again(costs: Costs, spec: ModelSpec, backends: Iterable[Backend]) -> None:
    """Run every backend in every shape that it will meet."""
    backends = tuple(backends)
    for rows, length in shapes_to_meet(costs):
        for backend in backends:
            backend.run(spec.example(rows, length))
