"""The lanes of a device: the only threads on which models are run for clients, and on which they are loaded at start.

A device runs `lanes` batches at a time, each with its share of the device's threads. One lane of all threads answers a
lone request soonest; several narrow lanes leave fewer threads waiting for each other within a batch and yield more
rows per second (docs/decisions/005-lanes.md). All lanes take their work from one first-in-first-out queue, in the
moment they are free, so variants that share the device take turns batch by batch and contention shows in queue time.
Of several idle lanes the one goes that was last at work: its core is awake, and has its thread and its stack at hand.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TypeAlias, TypeVar

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Lane:
    """One thread of a device and the cores it may use.

    Whoever runs something there has `held` meanwhile. `due_at` is when the batch that runs now should be done by its
    measured cost (seconds of `time.perf_counter`); whoever runs a batch sets it, and sets it back to 0 afterwards.
    """

    index: int
    threads: int
    due_at: float = 0.0
    held: threading.Lock = field(default_factory=threading.Lock, repr=False)
    called: SimpleQueue[Job] = field(default_factory=SimpleQueue, repr=False)
    """The job for which it is woken, if it was idle."""
    left: list[Afterwards] = field(default_factory=list, repr=False)
    """What its last job left to do, if that was not done yet."""

    def finish(self) -> None:
        """Do what the last job left to do, if anything. Callable from any thread; never raises."""
        try:
            left = self.left.pop()
        except IndexError:
            return
        try:
            left()
        except BaseException:
            logger.exception("what a job on lane %d left to do failed", self.index)


Afterwards = Callable[[], object]
Job: TypeAlias = Callable[[Lane], Afterwards | None]
"""What a lane does. It may return what is left to do when the lane is free again, such as telling what came of it.

A job that waits already goes first: whoever is told would be in the way of its first steps, with Python's lock in hand.
It calls `Lane.finish` when it needs the lock no more; else that is called when the job is done.
"""
_Result = TypeVar("_Result")


class Device:
    """A named device of `threads` threads, shared out among its lanes."""

    def __init__(self, name: str, threads: int, lanes: int = 1, *, spare: bool = False) -> None:
        """`spare`: there is a core besides, for what is done `aside`."""
        self.name = name
        self.threads = threads
        self.spare = spare
        self.lanes = tuple(Lane(index, max(1, threads // lanes)) for index in range(lanes))
        self._jobs: deque[Job] = deque()
        self._idle: list[Lane] = []
        self._waiting = 0  # those and the called lanes' jobs; counted, for it is asked before every short batch
        self._handing = threading.Lock()
        self._posting = threading.Lock()
        self._aside = ThreadPoolExecutor(1, f"device-{name}-aside")
        self._threads = [
            threading.Thread(target=self._work, args=(lane,), name=f"device-{name}-{lane.index}", daemon=True)
            for lane in self.lanes
        ]
        for thread in self._threads:
            thread.start()

    @property
    def lane_threads(self) -> int:
        """CPU threads of every lane."""
        return self.lanes[0].threads

    def remaining_s(self) -> float:
        """Predicted seconds until a lane is free: 0 if one is, or if its batch is overdue."""
        due_at = min([lane.due_at for lane in self.lanes])
        return max(0.0, due_at - time.perf_counter()) if due_at else 0.0

    def post(self, job: Job) -> None:
        """Queue a job behind all others, for the next free lane. Callable from any thread; the job must not raise."""
        with self._handing:
            self._waiting += 1
            if not self._idle:
                self._jobs.append(job)
                return
            lane = self._idle.pop()
        lane.called.put(job)

    def borrow(self) -> Lane | None:
        """A free lane whose part the calling thread may take for one short job; `None` if all work or jobs wait.

        The caller releases `held` afterwards.
        """
        if self.waiting():
            return None
        return next((lane for lane in self.lanes if lane.held.acquire(blocking=False)), None)

    def widen(self, lane: Lane) -> bool:
        """Hold all other lanes, too, if none of them works; then the job on this lane may use all threads.

        It calls `narrow` afterwards.
        """
        held: list[Lane] = []
        for other in self.lanes:
            if other is not lane:
                if not other.held.acquire(blocking=False):
                    _release(held)
                    return False
                held.append(other)
        return True

    def narrow(self, lane: Lane) -> None:
        """Let the other lanes go."""
        _release([other for other in self.lanes if other is not lane])

    def idle(self) -> int:
        """Lanes that run nothing now and have no job waiting for them."""
        return max(0, sum([not lane.held.locked() for lane in self.lanes]) - self.waiting())

    def others_work(self, lane: Lane) -> bool:
        """Whether any lane but this one runs something."""
        return any(other.held.locked() for other in self.lanes if other is not lane)

    def busy(self) -> bool:
        """Whether every lane runs something."""
        return all(lane.held.locked() for lane in self.lanes)

    def waiting(self) -> int:
        """Jobs that no lane has taken yet."""
        return self._waiting

    def aside(self, job: Callable[[], None]) -> None:
        """Do something beside the lanes, on one thread that is there from the first such job on."""
        self._aside.submit(job)

    def call(self, function: Callable[[Lane], _Result]) -> _Result:
        """Run a function on the next free lane and wait for it. Raises what it raises."""
        done: Future[_Result] = Future()

        def job(lane: Lane) -> None:
            _fulfil(done, function, lane)

        self.post(job)
        return done.result()

    def call_on_each(self, function: Callable[[Lane], _Result]) -> list[_Result]:
        """Run a function on every lane, all at the same time, and wait; the results by lane.

        Raises:
            Exception: what the function raised, that of the first lane if there are several.
        """
        futures: list[Future[_Result]] = [Future() for _ in self.lanes]
        together = threading.Barrier(len(self.lanes))

        def job(lane: Lane) -> None:
            together.wait()  # a lane that waits here cannot take the job of another
            _fulfil(futures[lane.index], function, lane)

        with self._posting:  # the jobs of two callers must not mix: their barriers would wait for each other
            for _ in self.lanes:
                self.post(job)
        wait(futures)
        return [future.result() for future in futures]

    def close(self) -> None:
        """Finish the queued jobs and end the threads."""
        for _ in self._threads:
            self.post(_end)
        for thread in self._threads:
            thread.join()
        self._aside.shutdown()  # the last jobs of the lanes may have used it

    def _next_job(self, lane: Lane) -> Job:
        while True:
            with self._handing:
                if self._jobs:
                    self._waiting -= 1
                    return self._jobs.popleft()
                if not lane.left:
                    self._idle.append(lane)
                    break
            lane.finish()
        job = lane.called.get()
        with self._handing:
            self._waiting -= 1
        return job

    def _work(self, lane: Lane) -> None:
        while (job := self._next_job(lane)) is not _end:
            self._do(job, lane)
            del job  # nothing of a batch is kept while the lane waits for the next one
        lane.finish()

    def _do(self, job: Job, lane: Lane) -> None:
        try:
            with lane.held:
                left = job(lane)
            lane.finish()
            if left is not None:
                lane.left.append(left)
            if not self._jobs:
                lane.finish()
        except BaseException:
            # The thread outlives any job: a lost lane would hang what waits for it, the last one all variants.
            logger.exception("a job on lane %d of device %s failed", lane.index, self.name)


def _end(_: Lane) -> None:
    """The last job of a lane; it is not done, the lane ends there."""


def _release(lanes: Iterable[Lane]) -> None:
    for lane in lanes:
        lane.held.release()


def _fulfil(future: Future[_Result], function: Callable[[Lane], _Result], lane: Lane) -> None:
    try:
        future.set_result(function(lane))
    except BaseException as error:
        future.set_exception(error)
