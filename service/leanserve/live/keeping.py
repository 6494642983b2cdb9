"""The state of experiments on disk, written on a thread beside the loop, which also does what else takes long."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from leanserve.contracts import Json
from leanserve.errors import ServiceError
from leanserve.experiments.store import AuditEntry, ExperimentStore
from leanserve.live.plain import plain
from leanserve.live.record import ExperimentRecord

logger = logging.getLogger(__name__)
_MEMORY = Path(":memory:")
_Result = TypeVar("_Result")


class Keeper:
    """One store and its thread. `kept_at` is when something was last written (`time.monotonic`)."""

    def __init__(self, store: Path | None) -> None:
        """On the running loop. `store` is the SQLite file; `None`: the state is lost with the process.

        Raises:
            StartupError: the file is no store of experiments, or cannot be written.
        """
        self.kept_at = 0.0
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="experiment")
        self._tasks: set[asyncio.Task[None]] = set()
        self._store, self._last = self._thread.submit(_opened, store or _MEMORY).result()

    def last(self) -> ExperimentRecord | None:
        """The experiment that was saved last before the process started."""
        return None if self._last is None else ExperimentRecord.from_json(self._last)

    def apart(self, work: Callable[[], _Result]) -> Awaitable[_Result]:
        """Do it on the thread beside the loop, after all that was asked for before."""
        return self._loop.run_in_executor(self._thread, work)

    def begin(self, work: Coroutine[None, None, None]) -> None:
        """Have something done to its end, which nobody waits for."""
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def save(self, record: ExperimentRecord, entry: Json, before: Json | None) -> None:
        """Keep a move and what it led to. Raises `ServiceError` if it cannot be."""
        audit = AuditEntry(entry["at"], entry["who"], entry["action"], before or {}, entry)
        state = record.to_json()
        try:
            await self.apart(lambda: self._store.save(record.name, plain(state), audit))
        except Exception as error:
            raise ServiceError(f"the state of the experiment could not be kept: {error}") from error
        self.kept_at = time.monotonic()

    async def save_late(self, record: ExperimentRecord, entry: Json, before: Json | None) -> None:
        """The same for a move that is made already."""
        try:
            await self.save(record, entry, before)
        except ServiceError as error:
            logger.error("%s", error)

    async def keep(self, record: ExperimentRecord) -> None:
        """Keep evidence that has grown. Never raises."""
        self.kept_at = time.monotonic()
        state, at = record.to_json(), time.time()
        try:
            await self.apart(lambda: self._store.keep(record.name, plain(state), at))
        except Exception as error:
            logger.error("the state of experiment %s could not be kept: %s", record.name, error)

    async def close(self) -> None:
        """After all that was asked for."""
        await self.apart(self._store.close)
        self._thread.shutdown(wait=False)


def _opened(path: Path) -> tuple[ExperimentStore, Json | None]:
    store = ExperimentStore(path)
    return store, store.load(store.names[0]) if store.names else None
