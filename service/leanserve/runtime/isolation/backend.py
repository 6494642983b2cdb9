"""`isolation: process`: a `contracts.Backend` whose model is in a worker process; a lost worker is started again.

To the lanes it is a backend like others: `run` waits for a batch. What ends the worker (a segmentation fault, the
kernel's killer when memory runs out, a batch that never returns) ends a run with `WorkerLost`, and
`serving.second_chances` sees to its requests. A thread of the backend starts the worker and waits for its end. It lives
as long as the backend does, because the kernel ends a child with the thread that has started it.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

from leanserve.contracts import Arrays, Json, Result
from leanserve.errors import WorkerLost
from leanserve.runtime.isolation.life import WorkerLife, WorkerProgram
from leanserve.runtime.isolation.workers import Workers

STEADY_S = 60.0
"""A worker that was there for so long was well: the pauses begin anew."""


class IsolatedBackend:
    """A `contracts.Backend`.

    Raises:
        StartupError, MemoryError: the worker could not open the model; the text says why.
    """

    def __init__(self, program: WorkerProgram, lanes: int, workers: Workers) -> None:
        """`lanes`: batches that it is asked to run at once, at most. Waits until the worker has opened the model."""
        self._program = program
        self._lanes = lanes
        self._workers = workers
        self._life: WorkerLife | None = None
        self._serving: WorkerLife | None = None
        self._closed = threading.Event()
        opened: Future[Json] = Future()
        name = f"worker-of-{program.variant}"
        self._thread = threading.Thread(target=self._keep_running, args=(opened,), name=name, daemon=True)
        self._thread.start()
        told = opened.result()
        self._name: str = told["name"]
        self._device: str = told["device"]
        self._self_contained: bool = told["self_contained"]
        self._row_buckets = tuple(told["row_buckets"])

    @property
    def name(self) -> str:
        return self._name

    @property
    def device(self) -> str:
        return self._device

    @property
    def self_contained(self) -> bool:
        return self._self_contained

    @property
    def row_buckets(self) -> tuple[int, ...]:
        return self._row_buckets

    @property
    def process_id(self) -> int | None:
        """That of the worker; `None` while there is none."""
        life = self._serving
        return None if life is None else life.process_id

    def run(self, batch: Arrays) -> Result:
        """Run one batch in the worker.

        Raises:
            WorkerLost: it ended or got stuck meanwhile, or is not there. Else as the backend there.
        """
        life = self._serving
        if life is None:
            raise WorkerLost(f"variant '{self._program.variant}': its worker is being started again", ran=False)
        return life.run(batch, self._workers.patience_s)

    def close(self) -> None:
        """End the worker, and with it all memory of the model."""
        self._closed.set()
        if self._life is not None:
            self._life.kill()
        self._thread.join()
        self._workers.forget(self)

    def _keep_running(self, opened: Future[Json]) -> None:
        """Start the worker, and another one whenever it is lost, until the backend is closed."""
        try:
            life, told = self._start()
        except BaseException as error:
            self._end_life()
            opened.set_exception(error)
            return
        self._serving = life
        opened.set_result(told)
        losses = 0
        while True:
            began = time.monotonic()
            end = life.end()
            self._serving = None
            if self._closed.is_set():
                return
            losses = 1 if time.monotonic() - began > STEADY_S else losses + 1
            self._workers.lost(self, end, self._workers.pause_s(losses))
            replacement = self._replace(losses)
            if replacement is None:
                return
            life = replacement

    def _replace(self, losses: int) -> WorkerLife | None:
        """Another worker, open and warm, after as many tries as it takes; `None` once the backend is closed."""
        began = time.monotonic()
        while not self._closed.wait(self._workers.pause_s(losses)):
            try:
                self._serving, _ = self._start()
                self._workers.warm(self)
            except Exception as error:
                self._serving = None
                self._end_life()
                losses += 1
                if not self._closed.is_set():
                    self._workers.failing(str(error), self._workers.pause_s(losses))
                continue
            self._workers.back(self, time.monotonic() - began)
            return self._serving
        return None

    def _start(self) -> tuple[WorkerLife, Json]:
        """A worker that has opened the model."""
        self._life = life = WorkerLife(self._program, self._lanes)
        if self._closed.is_set():
            life.kill()
        return life, life.opened()

    def _end_life(self) -> None:
        """End a worker that was started in vain."""
        if self._life is not None:
            self._life.kill()
            self._life.end()
