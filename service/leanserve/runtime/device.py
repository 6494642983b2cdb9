"""The lanes of a device: the only threads on which models are run for clients, and on which they are loaded at start.

A device runs `lanes` batches at a time, each with its share of the device's threads. One lane of all threads answers a
lone request soonest; several narrow lanes leave fewer threads waiting for each other within a batch and yield more
rows per second (docs/decisions/005-lanes.md). All lanes take their work from one queue, in the moment they are free.
Variants take turns there by the seconds that they have had (`turns.py`), so that contention shows in queue time alone.
Of several idle lanes the first goes, whose core is awake by that, and has its thread and its stack at hand.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from operator import attrgetter
from queue import SimpleQueue
from typing import NamedTuple, TypeAlias, TypeVar

from leanserve.runtime.linux.processors import keep_on
from leanserve.runtime.turns import DeviceShare, Rival, Turns

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Lane:
    """One thread of a device and the cores it may use.

    Whoever runs something there has `held` meanwhile. `due_at` is when the batch that runs now should be done by its
    measured cost (seconds of `time.perf_counter`), else 0, and `batch` is that batch (`Device.begin`, `Device.end`).
    """

    index: int
    threads: int
    due_at: float = 0.0
    batch: BatchOnLane | None = None
    widened: list[Lane] = field(default_factory=list, repr=False)
    """The other lanes that its job holds."""
    thread_id: int = 0
    """The kernel's number of its thread."""
    is_seated: bool = False
    """Whether its thread stays on one processor."""
    is_given_up: bool = False
    """Its job does not end, and another lane has taken its place."""
    held: threading.Lock = field(default_factory=threading.Lock, repr=False)
    called: SimpleQueue[Job] = field(default_factory=SimpleQueue, repr=False)
    """The job for which it is woken, if it was idle."""


class BatchOnLane(NamedTuple):
    """What runs: whose it is, and what was taken from its queue for it, which means nothing here."""

    share: DeviceShare
    formed: object


Job: TypeAlias = Callable[[Lane], object]
_Result = TypeVar("_Result")


class Device:
    """A named device of `threads` threads, shared out among its lanes."""

    def __init__(self, name: str, threads: int, lanes: int = 1, processors: Sequence[int] = ()) -> None:
        """`processors`: one for each thread, where lanes may stay on the first of theirs."""
        self.name = name
        self.processors = tuple(processors)
        self.threads = threads
        self.lanes = tuple(Lane(index, max(1, threads // lanes)) for index in range(lanes))
        self._turns: Turns[Job] = Turns()
        self._nobodys = DeviceShare()  # of jobs that serve no variant: none of them waits for the turn of another
        self._idle: list[Lane] = []
        self._waiting = 0  # those and the called lanes' jobs; counted, for it is asked before every short batch
        self._handing = threading.Lock()
        self._posting = threading.Lock()
        self._threads = [self._start(lane) for lane in self.lanes]

    @property
    def lane_threads(self) -> int:
        """CPU threads of every lane."""
        return self.lanes[0].threads

    def remaining_s(self) -> float:
        """Predicted seconds until a lane is free: 0 if one is, or if its batch is overdue."""
        due_at = min([lane.due_at for lane in self.lanes])
        return max(0.0, due_at - time.perf_counter()) if due_at else 0.0

    def post(self, job: Job, share: DeviceShare | None = None) -> None:
        """Queue a job for the next free lane, in turn with those of other shares; without a share it goes next.

        Callable from any thread; the job must not raise.
        """
        share = share or self._nobodys
        with self._handing:
            self._waiting += 1
            if not self._idle:
                self._turns.add(job, share)
                return
            self._turns.begin(share)
            lane = self._first_idle()
        lane.called.put(job)

    def post_idle(self, job: Job) -> bool:
        """Have a lane do a job at once, if all lanes are idle and nothing waits for one; else it is not done.

        Callable from any thread; the job must not raise.
        """
        with self._handing:
            if self._waiting or len(self._idle) < len(self.lanes):
                return False
            self._waiting += 1
            lane = self._first_idle()
        lane.called.put(job)
        return True

    def seat(self, lane: Lane, *, seated: bool) -> None:
        """Have a lane stay on the processor that is its own, or go where it likes; before it runs or opens a backend.

        Only backends whose other threads are kept off that processor run on a lane that stays there.
        """
        if self.processors and seated != lane.is_seated:
            first = self.processors[lane.index * lane.threads]
            lane.is_seated = keep_on(lane.thread_id, (first,) if seated else self.processors) and seated

    def borrow(self, share: DeviceShare | None = None) -> Lane | None:
        """A free lane whose part the calling thread may take for one short job; `None` if all work or jobs wait.

        The caller gives it back afterwards.
        """
        if self.waiting():
            return None
        lane = next((lane for lane in self.lanes if lane.held.acquire(blocking=False)), None)
        if lane is not None and share is not None:
            with self._handing:
                self._turns.begin(share)
        return lane

    def begin(self, lanes: Sequence[Lane], batch: BatchOnLane, seconds: float, now: float) -> None:
        """A batch begins on these lanes, the first of which runs it, and should take so many seconds."""
        batch.share.charge(seconds * len(lanes))
        lanes[0].batch = batch
        for lane in lanes:
            lane.due_at = now + seconds

    def end(self, lanes: Sequence[Lane], batch: BatchOnLane, late_s: float) -> None:
        """It has ended, so many seconds later than it should."""
        if not lanes[0].is_given_up:
            lanes[0].batch = None
            for lane in lanes:
                lane.due_at = 0.0
        batch.share.charge(late_s * len(lanes))

    def wait_s(self, own_s: float, own: DeviceShare, rivals: Sequence[Rival] = ()) -> float:
        """Predicted seconds of a request in the queue, behind `own_s` lane-seconds of its own variant."""
        if not rivals:  # every request asks this
            return self.remaining_s() + own_s / len(self.lanes)
        seconds = self._turns.seconds_before(own_s, own, rivals, len(self.lanes), time.perf_counter())
        return self.remaining_s() + seconds

    def widen(self, lane: Lane) -> bool:
        """Hold all other lanes, too, if none of them works; then the job on this lane may use all threads.

        They are let go with this one.
        """
        for other in self.lanes:
            if other is not lane:
                if not other.held.acquire(blocking=False):
                    self._narrow(lane)
                    return False
                lane.widened.append(other)
        return True

    def give_back(self, lane: Lane) -> None:
        """Let go of a lane that was borrowed, and of all that it holds."""
        if lane.widened:
            self._narrow(lane)
        lane.held.release()

    def _narrow(self, lane: Lane) -> None:
        with self._handing:
            while lane.widened:
                lane.widened.pop().held.release()

    def give_up(self, lane: Lane) -> None:
        """Start another lane in place of one whose job does not end, and let go of all that it holds.

        Should the job end after all, its thread ends with it. Until then it keeps what it has of the cores.
        """
        fresh = Lane(lane.index, lane.threads)
        with self._handing:
            lane.is_given_up = True
            self.lanes = tuple(fresh if each is lane else each for each in self.lanes)
        for other in lane.widened:
            other.due_at = 0.0
        self._narrow(lane)
        self._threads[lane.index] = self._start(fresh)

    def waiting(self) -> int:
        """Jobs that no lane has taken yet."""
        return self._waiting

    def call(self, function: Callable[[Lane], _Result]) -> _Result:
        """Run a function on the next free lane and wait for it. Raises what it raises."""
        done: Future[_Result] = Future()

        def job(lane: Lane) -> None:
            self.seat(lane, seated=False)
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
            self.seat(lane, seated=False)
            _fulfil(futures[lane.index], function, lane)

        with self._posting:  # the jobs of two callers must not mix: their barriers would wait for each other
            for _ in self.lanes:
                self.post(job)
        wait(futures)
        return [future.result() for future in futures]

    def close(self) -> None:
        """Finish the queued jobs and end the threads."""
        last = DeviceShare()
        last.tag = math.inf
        for _ in self._threads:
            self.post(_end, last)
        for thread in self._threads:
            thread.join()

    def _first_idle(self) -> Lane:
        lane = min(self._idle, key=attrgetter("index"))
        self._idle.remove(lane)
        return lane

    def _next_job(self, lane: Lane) -> Job:
        with self._handing:
            if self._turns:
                self._waiting -= 1
                return self._turns.next()
            self._idle.append(lane)
        job = lane.called.get()
        with self._handing:
            self._waiting -= 1
        return job

    def _start(self, lane: Lane) -> threading.Thread:
        thread = threading.Thread(target=self._work, args=(lane,), name=f"device-{self.name}-{lane.index}", daemon=True)
        thread.start()
        return thread

    def _work(self, lane: Lane) -> None:
        lane.thread_id = threading.get_native_id()
        while not lane.is_given_up and (job := self._next_job(lane)) is not _end:
            self._do(job, lane)
            del job  # nothing of a batch is kept while the lane waits for the next one

    def _do(self, job: Job, lane: Lane) -> None:
        lane.held.acquire()
        try:
            job(lane)
        except BaseException:
            # The thread outlives any job: a lost lane would hang what waits for it, the last one all variants.
            logger.exception("a job on lane %d of device %s failed", lane.index, self.name)
        finally:
            self.give_back(lane)


def _end(_: Lane) -> None:
    """The last job of a lane; it is not done, the lane ends there."""


def _fulfil(future: Future[_Result], function: Callable[[Lane], _Result], lane: Lane) -> None:
    try:
        future.set_result(function(lane))
    except BaseException as error:
        future.set_exception(error)
