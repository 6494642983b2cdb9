"""A batch on the device: joined, run and split; run again in halves where it fails.

All of it happens between taking a batch from the queue and waking the event loop. It runs on the lanes of a
device, several at a time; a batch that is alone there has all threads of the device, if that makes it quicker.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from leanserve.contracts import Arrays, ModelSpec
from leanserve.errors import BackendFailed, BadInput, OutOfMemory, ServiceError
from leanserve.memory import forget, is_out_of_memory, run_in_parts
from leanserve.runtime.assembly import dynamic_axes, join, rejoin, split, trim
from leanserve.runtime.costs import CostTable
from leanserve.runtime.device import Lane
from leanserve.runtime.lanes import LanePlacement, LoadedVariant
from leanserve.serving.batcher import Ticket
from leanserve.serving.incidents import log_incident

logger = logging.getLogger(__name__)

IDLE_WAIT_SHARE = 0.25
"""A batch is alone if its foremost request waited for less than this share of the time that the batch takes."""
MAX_COST_RATIO, MAX_LATENCY_RATIO, HANDOVER_S = 1.25, 1.05, 200e-6
"""What waits is divided among idle lanes if that takes at most so many times the lanes' seconds, and so many times the
clients'; another batch costs some on its way to a lane and back. Clients may wait a little longer, for lanes that are
apart fill each other's gaps from then on: while the clients of one ask again, the other works."""
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


class BatchRunner:
    """Runs the batches of one variant."""

    def __init__(self, name: str, spec: ModelSpec, running: LoadedVariant) -> None:
        self._name = name
        self._spec = spec
        self._running = running
        self.row_bytes = spec.row_bytes
        self._output_axes = dynamic_axes(spec.outputs)

    def join(self, tickets: list[Ticket[PendingResult]]) -> Arrays:
        """What `run` would join for any lane."""
        running = self._running
        rows = running.placement(running.device.lanes[0]).padded(_rows(tickets), tickets[0].bucket)
        return join([ticket.sample for ticket in tickets], self._spec, rows)

    def run(
        self, lane: Lane, tickets: list[Ticket[PendingResult]], taken: float, joined: Arrays | None = None
    ) -> list[CompletedBatch]:
        """Run tickets, `taken` from their queue at that time, as one batch on this lane, or on all if these are idle.

        They may be `joined` already. Several batches are returned only where it failed and was run again in parts.
        Never raises. Without tickets nothing is run.
        """
        if not tickets:
            return []
        running = self._running
        wide, device = running.wide, running.device
        if wide is None or _waited(wide, tickets, taken) or device.waiting() or not device.widen(lane):
            return self._run((lane,), running.placement(lane), tickets, taken, joined)
        try:
            return self._run(device.lanes, wide, tickets, taken, joined)
        finally:
            device.narrow(lane)

    def portion(self, bucket: int, rows: int) -> int:
        """Rows for a lane that takes now, while `rows` of a length bucket wait: all, or a share equal to others'.

        Shares are made where other lanes are idle, nobody is answered much later by them, and the lanes do little more
        than one would. Else eight clients who were answered together would go from lane to lane together.
        """
        if rows == 1:
            return rows
        running = self._running
        lanes = 1 + running.device.idle()
        table = running.costs.tables[bucket]
        share = -(-rows // lanes)
        if lanes == 1 or share >= table.knee:
            return rows
        most = min(rows, table.knee)
        whole = (running.wide.costs if running.wide else running.costs).tables[bucket].seconds(most)
        apart = table.seconds(share)
        cheap = apart * most / share <= MAX_COST_RATIO * table.seconds(most)
        return share if cheap and apart + HANDOVER_S < MAX_LATENCY_RATIO * whole else rows

    def _run(
        self,
        lanes: tuple[Lane, ...],
        way: LanePlacement,
        tickets: list[Ticket[PendingResult]],
        taken: float,
        joined: Arrays | None = None,
    ) -> list[CompletedBatch]:
        backend, costs = way.backend, way.costs.tables[tickets[0].bucket]
        rows = _rows(tickets)
        padded = way.padded(rows, tickets[0].bucket)
        try:
            if joined is None or len(joined[0]) != padded:
                joined = join([ticket.sample for ticket in tickets], self._spec, padded)
            for lane in lanes:
                lane.finish()  # from here on Python's lock is free for those who were answered last
            started = time.perf_counter()
            _set_due(lanes, started + costs.seconds(padded))
            outputs, facts = backend.run(joined)
            ended = time.perf_counter()
            _check_rows(outputs, padded)
            replies = self._split(outputs, tickets)
        except BaseException as error:  # a panic in a native library is no Exception, and these clients wait
            if is_out_of_memory(error):
                forget(error)
            return self._run_apart(lanes, way, tickets, taken, error)
        finally:
            _set_due(lanes, 0.0)
        timed = Timed(taken, started, ended, time.perf_counter(), padded, len(lanes), costs, facts)
        return [CompletedBatch(tickets, replies, rows, ended - started, timed)]

    def _split(self, outputs: Arrays, tickets: list[Ticket[PendingResult]]) -> list[Arrays]:
        replies = split(outputs, [ticket.rows for ticket in tickets])
        if not self._output_axes:
            return replies
        padded = max(ticket.length for ticket in tickets)
        return [
            trim(reply, self._output_axes, padded, ticket.length)
            for reply, ticket in zip(replies, tickets, strict=True)
        ]

    def _run_apart(
        self,
        lanes: tuple[Lane, ...],
        way: LanePlacement,
        tickets: list[Ticket[PendingResult]],
        taken: float,
        error: BaseException,
    ) -> list[CompletedBatch]:
        """Find the bad request by halving, or what fits into memory: its batch mates are answered, it alone fails."""
        if len(tickets) > 1:
            middle = len(tickets) // 2
            halves = (self._run(lanes, way, half, taken) for half in (tickets[:middle], tickets[middle:]))
            return [batch for half in halves for batch in half]
        if tickets[0].rows > 1 and is_out_of_memory(error):
            return [self._run_in_parts(way, tickets[0])]
        return [CompletedBatch(tickets, [self._failure(error, tickets[0])], tickets[0].rows)]

    def _run_in_parts(self, way: LanePlacement, ticket: Ticket[PendingResult]) -> CompletedBatch:
        """A request for which there is no memory as a whole."""

        def run(part: Arrays) -> Arrays:
            rows = len(part[0])
            made = way.backend.run(join([part], self._spec, way.padded(rows, ticket.bucket)))
            return tuple(array[:rows] for array in made.outputs)

        started = time.perf_counter()
        try:
            [reply] = self._split(rejoin(run_in_parts(run, ticket.sample)), [ticket])
        except Exception as error:
            return CompletedBatch([ticket], [self._failure(error, ticket)], ticket.rows)
        return CompletedBatch([ticket], [reply], ticket.rows, time.perf_counter() - started)

    def _failure(self, error: BaseException, ticket: Ticket[PendingResult]) -> ServiceError:
        """What the client of a request is told on which the model failed."""
        if isinstance(error, BadInput):
            return BadInput(str(error))  # told anew: the stack of the error holds the tickets, and they would hold it
        if is_out_of_memory(error):
            text = "variant %s: memory ran out on a request: %s"
            logger.error(text, self._name, error, extra={"identity": ticket.identity})
            return OutOfMemory(f"variant '{self._name}' ran out of memory on this request; try again later")
        where = log_incident(f"variant {self._name} failed on a request", error, ticket.identity)
        return BackendFailed(f"the model failed on this request; {where}")


def _rows(tickets: list[Ticket[PendingResult]]) -> int:
    return sum([ticket.rows for ticket in tickets])


def _waited(wide: LanePlacement, tickets: list[Ticket[PendingResult]], taken: float) -> bool:
    """Whether a batch had to wait for others, so that more will come while it runs, although no lane works now."""
    seconds = wide.costs.tables[tickets[0].bucket].seconds(_rows(tickets))
    return taken - tickets[0].enqueued_at > IDLE_WAIT_SHARE * seconds


def _set_due(lanes: tuple[Lane, ...], due_at: float) -> None:
    for lane in lanes:
        lane.due_at = due_at


def _check_rows(outputs: Arrays, rows: int) -> None:
    """A backend that answers too few rows would leave clients without an answer, or with that of another."""
    for position, array in enumerate(outputs):
        if len(array) != rows:
            raise ValueError(f"output {position} of the model has {len(array)} rows for a batch of {rows}")
