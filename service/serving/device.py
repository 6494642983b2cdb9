"""One thread per device: the only place where models are loaded, run and closed.

Work arrives in one first-in-first-out queue, so variants that share the device take turns batch by batch and never run
at the same time: contention shows in queue time, never in inference time.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

logger = logging.getLogger(__name__)

Job = Callable[[], None]
Result = TypeVar("Result")


class Device:
    """A named device with its thread.

    `due_at` is when the batch that runs now should be done by its measured cost (seconds of `time.perf_counter`);
    whoever runs a batch sets it, and sets it back to 0 afterwards.
    """

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self.threads = threads
        self.due_at = 0.0
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"device-{name}", daemon=True)
        self._thread.start()

    def remaining_s(self) -> float:
        """Predicted seconds until the batch that runs now is done; 0 if none runs, or if it is overdue."""
        return max(0.0, self.due_at - time.perf_counter())

    def post(self, job: Job) -> None:
        """Queue a job behind all others. Callable from any thread; the job must not raise."""
        self._jobs.put(job)

    def call(self, function: Callable[[], Result]) -> Result:
        """Run a function on the device thread, wait for it, and return its result or raise its exception."""
        return self.submit(function).result()

    def submit(self, function: Callable[[], Result]) -> Future[Result]:
        """Run a function on the device thread; the future gets its result or exception."""
        future: Future[Result] = Future()

        def job() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self.post(job)
        return future

    def close(self) -> None:
        """Finish the queued jobs and end the thread."""
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except BaseException:
                # The thread outlives any job: a lost device would hang every variant on it.
                logger.exception("a job on device %s failed", self.name)
