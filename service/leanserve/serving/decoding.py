"""Decoding beside the event loop, on a budget of seconds: who decodes what, when, and who is refused.

A body of 600 bytes may ask for a second of work, so requests are not counted, but the seconds that their bytes and
headers announce (`contracts.Weighed`). What takes up to `QUICK_S` is decoded by a thread. What takes longer is left
to processes (`decoder_process.py`), of which a large body holds one while small ones pass by; there the cheapest goes
first, unless others have waited long. A request's time begins with its arrival: who would be decoded after its
deadline is refused at once with 429, and whose deadline passes all the same gets a 504 and is decoded no further.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass, field
from functools import partial
from heapq import heappop, heappush
from typing import Any, Generic, NamedTuple, TypeVar, TypeVarTuple

from leanserve.contracts import Made
from leanserve.errors import ClientGone, DeadlineUnreachable, QueueTimeout
from leanserve.http.loop_turns import LoopTurns
from leanserve.runtime.short_switches import ShortSwitches
from leanserve.runtime.unused_memory import give_back
from leanserve.serving.decoder_process import DecoderProcess, Decoding

THREADS = 2
"""Threads of the loop's default executor, which decode and encode what would hold up the loop."""
PROCESSES = 2
"""Processes for what is large. They run only while they are needed."""
QUICK_S = 0.025
"""Seconds of decoding that a thread may take; it may hold Python's lock for all of them."""
PATIENCE = 10.0
"""A job may be overtaken by one that takes a second less and came up to so many seconds later."""
IDLE_S = 20.0
"""After so long without work the processes end, and the memory of this one is given back."""
MEMORY = 512 * 2**20
"""Bytes that decoding one body may take in a process."""
LARGE = 2**20
"""Bytes of a body that is looked at on a thread of its own: to count what is in it may take as long as an image."""
_LARGE_SUM = 8 * 2**20
"""Bytes of bodies after which there may be memory to give back."""
_SMOOTHING = 0.1
LIGHT = 2**10
"""Bytes of text that are parsed on the loop without a thought of others: 15 microseconds, whatever is in them."""
_EACH_TURN = 2**17
"""Bytes of heavier texts that are parsed in one turn of the loop: 2.5 ms at worst."""
_AHEAD_S = 0.002
"""Seconds of decoding that threads are given in advance. The loop gives up Python's lock at every event and has to win
it back from them: of three hundred bodies that come at once, and that threads have before them, it would see none for
long."""

_Args = TypeVarTuple("_Args")
_Result = TypeVar("_Result")


class Patience(NamedTuple):
    """Until when (by `time.perf_counter`) a request is worth decoding, and whether its client has left before."""

    deadline: float
    is_disconnected: Callable[[], bool]


class Work(NamedTuple, Generic[Made]):
    """A body of `size` bytes to be decoded, and what is made of that, in this process and on any thread."""

    decoding: Decoding[Any]
    then: Callable[[Any], Made]
    size: int


@dataclass(order=True)
class _Job:
    order: float
    number: int
    seconds: float = field(compare=False)
    work: Work[Any] = field(compare=False)
    patience: Patience = field(compare=False)
    result: asyncio.Future[Any] = field(compare=False)


class _Quick(NamedTuple, Generic[Made]):
    """What a thread made of a body, or what it would cost, and how long that took."""

    made: Made | None
    announced_s: float
    took_s: float


class _Line:
    """Bodies before so many threads, and what each takes them. The threads get the next ones from the loop, in its
    turns."""

    def __init__(self, threads: int, on_thread: Callable[..., Awaitable[Any]], switches: ShortSwitches) -> None:
        self._threads = threads
        self._switches = switches
        self._on_thread = on_thread
        self._bodies = self._begun = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._mean_s = 0.001

    async def decode(self, work: Work[Made], patience: Patience) -> _Quick[Made]:
        """Decode what is quick, weigh what is not. Raises as `Decoders.run`."""
        _require_time(self._bodies * self._mean_s / self._threads, patience)
        self._bodies += 1
        try:
            await self._turn()
            try:
                with self._switches:
                    quick: _Quick[Made] = await self._on_thread(_decode_quickly, work, patience)
            finally:
                self._end_one()
        finally:
            self._bodies -= 1
        self._mean_s += _SMOOTHING * (quick.took_s - self._mean_s)
        return quick

    def _may_begin(self) -> bool:
        return self._begun < self._threads or (self._begun + 1) * self._mean_s <= _AHEAD_S

    async def _turn(self) -> None:
        if not self._waiting and self._may_begin():
            self._begun += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._end_one()
            raise

    def _end_one(self) -> None:
        self._begun -= 1
        while self._waiting and self._may_begin():
            turn = self._waiting.popleft()
            if not turn.done():
                self._begun += 1
                turn.set_result(None)


class Decoders:
    """All that decodes, for the loop that it was made on."""

    def __init__(self, switches: ShortSwitches, memory: int = MEMORY) -> None:
        self._loop = asyncio.get_running_loop()
        self._processes = [DecoderProcess[Any](memory) for _ in range(PROCESSES)]
        self._free = list(self._processes)
        self._feeders = ThreadPoolExecutor(PROCESSES, thread_name_prefix="decode-apart")
        self._looker = ThreadPoolExecutor(1, thread_name_prefix="decode-large")
        self._waiting: list[_Job] = []
        self._running: list[_Job] = []
        self._numbers = 0
        self._small = _Line(THREADS, off_loop, switches)
        self._large = _Line(1, self._on_the_other_thread, switches)
        self.turn_for = LoopTurns(_EACH_TURN).wait
        self._took_s = self._announced_s = 1.0
        """What bodies took processes, and were announced to take, lately."""
        self._bytes = 0
        self._used_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def run(self, work: Work[Made], patience: Patience) -> Made:
        """Decode a body.

        Raises:
            DeadlineUnreachable: others come first, and it would be too late then.
            QueueTimeout: it was too late.
            ServiceError: whatever is wrong with the body.
        """
        self._use(work.size)
        quick = await (self._large if work.size > LARGE else self._small).decode(work, patience)
        if quick.announced_s <= QUICK_S:
            return quick.made  # type: ignore[return-value]
        made: Made = await self._apart(work, quick.announced_s, patience)
        return made

    async def _on_the_other_thread(self, look: Callable[[*_Args], _Result], *args: *_Args) -> _Result:
        """Where large bodies are looked at and small ones decoded, of which many may come in one body's time."""
        return await self._loop.run_in_executor(self._looker, copy_context().run, look, *args)

    async def _apart(self, work: Work[Made], seconds: float, patience: Patience) -> Made:
        now, self._numbers = time.perf_counter(), self._numbers + 1
        job = _Job(now + PATIENCE * seconds, self._numbers, seconds, work, patience, self._loop.create_future())
        before = sum(other.seconds for other in self._running)
        before += sum(other.seconds for other in self._waiting if other < job and not other.result.done())
        _require_time(before / PROCESSES * self._took_s / self._announced_s, patience)
        heappush(self._waiting, job)
        self._feed()
        try:
            async with asyncio.timeout(max(0.0, patience.deadline - now)):
                made: Made = await job.result
        except TimeoutError:
            raise _too_late() from None
        return made

    def _feed(self) -> None:
        """Give every free process the job that comes next."""
        while self._free and self._waiting:
            job = heappop(self._waiting)
            if job.result.done():  # its time was up, or it was cancelled
                continue
            if job.patience.is_disconnected():
                job.result.set_exception(_nobody_waits())
                continue
            process = self._free.pop()  # the last that worked: others may end
            self._running.append(job)
            began = time.perf_counter()
            outcome = self._loop.run_in_executor(self._feeders, _decode_apart, process, job)
            outcome.add_done_callback(partial(self._done, process, job, began))

    def _done(self, process: DecoderProcess[Any], job: _Job, began: float, outcome: asyncio.Future[Any]) -> None:
        self._free.append(process)
        self._running.remove(job)
        self._took_s += time.perf_counter() - began - _SMOOTHING * self._took_s
        self._announced_s += job.seconds - _SMOOTHING * self._announced_s
        self._use(0)
        if not job.result.done():
            if (error := outcome.exception()) is None:
                job.result.set_result(outcome.result())
            else:
                job.result.set_exception(error)
        else:
            outcome.exception()  # nobody is there to be told
        self._feed()

    def _use(self, size: int) -> None:
        self._bytes += size
        self._used_at = self._loop.time()
        if self._timer is None and (self._bytes > _LARGE_SUM or any(process.pid for process in self._processes)):
            self._timer = self._loop.call_later(IDLE_S, self._rest)

    def _rest(self) -> None:
        """End what has had nothing to do, and give memory back; or look again when it may have."""
        self._timer = None
        left = self._used_at + IDLE_S - self._loop.time()
        if left > 0 or self._running:
            self._timer = self._loop.call_later(max(left, 0.1), self._rest)
            return
        self._bytes = 0
        resting, self._free = self._free, []
        rest = self._loop.run_in_executor(self._feeders, _end_all, resting)
        rest.add_done_callback(lambda _: self._return(resting))

    def _return(self, rested: list[DecoderProcess[Any]]) -> None:
        self._free += rested
        self._feed()

    def close(self) -> None:
        """End the processes."""
        for threads in (self._feeders, self._looker):
            threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.end()


def _require_time(wait_s: float, patience: Patience) -> None:
    late = time.perf_counter() + wait_s - patience.deadline
    if late > 0:
        text = f"predicted to wait {wait_s * 1000:.0f} ms to be decoded, longer than the request allows"
        raise DeadlineUnreachable(text, retry_after_s=late)


def _decode_apart(process: DecoderProcess[Any], job: _Job) -> Any:
    return job.work.then(process.run(job.work.decoding, job.patience.deadline))


def _end_all(processes: list[DecoderProcess[Any]]) -> None:
    for process in processes:
        process.end()
    give_back()


def _decode_quickly(work: Work[Made], patience: Patience) -> _Quick[Made]:
    """On a thread: what can be had at once."""
    began = time.perf_counter()
    if began > patience.deadline:
        raise _too_late()
    if patience.is_disconnected():
        raise _nobody_waits()
    prepared = work.decoding.prepare()
    made = work.then(prepared.finish()) if prepared.seconds <= QUICK_S else None
    return _Quick(made, prepared.seconds, time.perf_counter() - began)


def _nobody_waits() -> ClientGone:
    return ClientGone("the client left before its body was decoded")


def _too_late() -> QueueTimeout:
    return QueueTimeout("the body was not decoded before the deadline of its request")


async def off_loop(work: Callable[[*_Args], _Result], *args: *_Args) -> _Result:
    """Do work that takes more than a few hundred microseconds where it does not hold up the event loop."""
    return await asyncio.to_thread(work, *args)  # which also takes the identity of the request there
