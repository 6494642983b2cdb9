"""The steps of a batch on the device: rows joined, outputs split; and what is done where it fails: run again in halves.

All of it happens between taking a batch from the queue and waking the event loop, on a lane or in the part of one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from leanserve.contracts import Arrays, ModelSpec
from leanserve.errors import BackendFailed, BadInput, DeviceLost, OutOfMemory, ServiceError, WorkerLost
from leanserve.memory import forget, is_out_of_memory, run_in_parts
from leanserve.runtime.assembly import dynamic_axes, join, rejoin, split, trim
from leanserve.runtime.costs import CostTable
from leanserve.runtime.device import Lane
from leanserve.runtime.lanes import LanePlacement, LoadedVariant
from leanserve.serving.batcher import Ticket
from leanserve.serving.incidents import log_incident
from leanserve.serving.watchdog import EXIT_STATUS, end_process

logger = logging.getLogger(__name__)

PendingResult = asyncio.Future[tuple[Arrays, float, float, int]]
"""Outputs, seconds in the queue, seconds on the device, rows in the batch."""


class Prediction(NamedTuple):
    """Outputs of one request and how they came about. `batch_size` counts rows, those of other requests included."""

    outputs: Arrays
    variant: str
    queue_s: float
    infer_s: float
    batch_size: int


class CompletedBatch(NamedTuple):
    """Tickets that ran together, what became of each, and how long they ran. What failed was not timed."""

    tickets: list[Ticket[PendingResult]]
    outcomes: Sequence[Arrays | Exception]
    rows: int
    infer_s: float = 0.0
    timed: Timed | None = None


class Timed(NamedTuple):
    """What is counted of a batch: its times (`time.perf_counter`), rows with padding, lanes, the table it corrects, and
    what the backend told of it.
    """

    taken: float
    started: float
    ended: float
    split: float
    padded: int
    lanes: int
    costs: CostTable
    facts: Mapping[str, float] = MappingProxyType({})


End = Callable[[int], None]
Retry = Callable[[list[Ticket[PendingResult]]], list[CompletedBatch]]


class BatchPlace(NamedTuple):
    """Where a batch runs: on these lanes, the first of which has the thread, by the backend that is meant for them."""

    lanes: Sequence[Lane]
    way: LanePlacement


class BatchRunner:
    """The steps of one variant's batches; the scheduler goes through them."""

    def __init__(self, name: str, spec: ModelSpec, running: LoadedVariant, end: End = end_process) -> None:
        """`end` ends the process, whose device is lost."""
        self.running = running
        self._end = end
        self._name = name
        self._spec = spec
        self._output_axes = dynamic_axes(spec.outputs)

    def assemble(self, tickets: list[Ticket[PendingResult]], place: BatchPlace) -> tuple[Arrays, int]:
        """The rows of all tickets as one batch, and how many these are with those that fill it up."""
        padded = place.way.padded(count_rows(tickets), tickets[0].bucket)
        return join([ticket.sample for ticket in tickets], self._spec, padded), padded

    def split(self, outputs: Arrays, tickets: list[Ticket[PendingResult]], padded: int) -> list[Arrays]:
        """What every ticket gets of the outputs of a batch of so many rows."""
        _check_rows(outputs, padded)
        replies = split(outputs, [ticket.rows for ticket in tickets])
        if not self._output_axes:
            return replies
        longest = max(ticket.length for ticket in tickets)
        return [
            trim(reply, self._output_axes, longest, ticket.length)
            for reply, ticket in zip(replies, tickets, strict=True)
        ]

    def run_apart(
        self, error: BaseException, tickets: list[Ticket[PendingResult]], place: BatchPlace, retry: Retry
    ) -> list[CompletedBatch]:
        """After a batch failed: find the bad request by halving, or what fits into memory. Its mates are answered, it
        alone fails.

        Where the worker was lost that would need others, one after the other: all are told, for `second_chances`.
        """
        self._end_if_lost(error)
        if isinstance(error, WorkerLost):
            failures = [self._failure(error, ticket) for ticket in tickets]
            return [CompletedBatch(tickets, failures, sum(ticket.rows for ticket in tickets))]
        if is_out_of_memory(error):
            forget(error)
        if len(tickets) > 1:
            middle = len(tickets) // 2
            return [*retry(tickets[:middle]), *retry(tickets[middle:])]
        if tickets[0].rows > 1 and is_out_of_memory(error):
            return [self._run_in_parts(place.way, tickets[0])]
        return [CompletedBatch(tickets, [self._failure(error, tickets[0])], tickets[0].rows)]

    def _run_in_parts(self, way: LanePlacement, ticket: Ticket[PendingResult]) -> CompletedBatch:
        """A request for which there is no memory as a whole."""

        def run(part: Arrays) -> Arrays:
            rows = len(part[0])
            made = way.backend.run(join([part], self._spec, way.padded(rows, ticket.bucket)))
            return tuple(array[:rows] for array in made.outputs)

        started = time.perf_counter()
        try:
            [reply] = self.split(rejoin(run_in_parts(run, ticket.sample)), [ticket], ticket.rows)
        except Exception as error:
            self._end_if_lost(error)
            return CompletedBatch([ticket], [self._failure(error, ticket)], ticket.rows)
        return CompletedBatch([ticket], [reply], ticket.rows, time.perf_counter() - started)

    def _end_if_lost(self, error: BaseException) -> None:
        """Rather than go on with a device that answers nothing right any more, leave it to a new process."""
        if isinstance(error, DeviceLost):
            logger.critical("variant %s: %s: the process ends with status %d", self._name, error, EXIT_STATUS)
            self._end(EXIT_STATUS)

    def _failure(self, error: BaseException, ticket: Ticket[PendingResult]) -> ServiceError:
        """What the client of a request is told on which the model failed."""
        if isinstance(error, BadInput):
            return BadInput(str(error))  # told anew: the stack of the error holds the tickets, and they would hold it
        if isinstance(error, WorkerLost):
            return WorkerLost(str(error), ran=error.ran, alone=error.alone)
        if is_out_of_memory(error):
            text = "variant %s: memory ran out on a request: %s"
            logger.error(text, self._name, error, extra={"identity": ticket.identity})
            return OutOfMemory(f"variant '{self._name}' ran out of memory on this request; try again later")
        where = log_incident(f"variant {self._name} failed on a request", error, ticket.identity)
        return BackendFailed(f"the model failed on this request; {where}")


def count_rows(tickets: list[Ticket[PendingResult]]) -> int:
    """Rows of all tickets."""
    return sum([ticket.rows for ticket in tickets])


def _check_rows(outputs: Arrays, rows: int) -> None:
    """A backend that answers too few rows would leave clients without an answer, or with that of another."""
    for position, array in enumerate(outputs):
        if len(array) != rows:
            raise ValueError(f"output {position} of the model has {len(array)} rows for a batch of {rows}")
