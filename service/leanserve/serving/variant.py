"""A variant at work: `predict` is the hot path from decoded arrays to a prediction.

A request is admitted or refused, queued as tickets, and answered once per batch; `scheduler.py` says who runs it, when
and how.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from leanserve.contracts import Arrays, Backend
from leanserve.errors import BadInput, ClientGone, DeadlineUnreachable, NotReady, QueueFull, QueueTimeout, WorkerLost
from leanserve.request_identity import CURRENT_REQUEST
from leanserve.runtime.assembly import cut, dynamic_axes, longest, rejoin
from leanserve.runtime.lanes import LoadedVariant
from leanserve.runtime.turns import DeviceShare, Rival
from leanserve.serving.admission_margin import AdmissionMargin
from leanserve.serving.batch_runner import BatchRunner, CompletedBatch, PendingResult, Prediction
from leanserve.serving.batcher import Batcher, Formed, Ticket
from leanserve.serving.deferred_metrics import DeferredMetrics
from leanserve.serving.expiry import ExpiryTimer
from leanserve.serving.in_flight import InFlightCount
from leanserve.serving.opening import WarmVariant, with_knees
from leanserve.serving.scheduler import CompletedRound, Scheduler
from leanserve.serving.second_chances import SecondChances
from leanserve.telemetry.observations import VariantMetrics

logger = logging.getLogger(__name__)

RECHECK_S = 0.05
"""When it is looked again whether a lost worker is back: its loss is told by a lane, its return by another thread."""
IsDisconnected = Callable[[], bool]
BatchObserver = Callable[[Sequence[CompletedBatch]], None]
"""Is told of batches, on the loop, once their requests have their outcomes."""


class Variant:
    """One warm variant at work on its device: `predict`."""

    def __init__(self, warm: WarmVariant, metrics: VariantMetrics, *, lanes_only: bool = False) -> None:
        """Serve it on the running loop; `metrics` are told of every batch, and of the queue when they are asked.

        `lanes_only`: the loop runs no batch itself, however short.
        """
        self.name = warm.name
        self.spec = warm.spec
        self.codec = warm.codec
        self.running = warm.running
        self.costs = warm.running.costs
        self.batcher: Batcher[PendingResult] = Batcher(warm.limits)
        self.neighbours: Sequence[Variant] = ()
        """The other variants on its device that serve."""
        self.observer: BatchObserver | None = None
        self.metrics = metrics
        self.workers = warm.workers
        self._company = warm.company
        self._axes = dynamic_axes(warm.spec.inputs)
        self._device = warm.running.device
        self._margin = AdmissionMargin()
        self._share = DeviceShare(warm.name, warm.device_share)
        self._loop = loop = asyncio.get_running_loop()
        self._sweep = ExpiryTimer(loop, self._expire)
        self._unsettled = InFlightCount()
        self._second_chances = SecondChances(loop, self._unsettled.settle)
        self._expected = [0] * warm.limits.levels
        """Requests that are being decoded, by level."""
        self._tally = DeferredMetrics(loop, metrics, self._follow_costs)
        metrics.catch_up = self._tally.catch_up
        metrics.queue_rows, metrics.queue_requests = self.waiting_rows, self.batcher.waiting_requests
        self._scheduler = Scheduler(
            loop,
            self.runner(),
            self.batcher,
            self._share,
            self._complete,
            lanes_only=lanes_only or warm.running.lanes_only,
        )

    @property
    def backend(self) -> Backend:
        """The backend of the first lane; those of the others are of the same kind."""
        return self.running.backends[0]

    async def finish(self) -> None:
        """Wait until every request has its outcome and no lane runs one. Nobody may be sent here any more."""
        await self._unsettled.none()

    def reopen(self, running: LoadedVariant) -> None:
        """Go on with backends that were loaded anew."""
        self.running = running
        self._scheduler.reopen(self.runner())

    def workers_are_back(self) -> None:
        """Queue again what was in a worker when it was lost."""
        for ticket in self._second_chances.take():
            since = ticket.enqueued_at
            try:
                unclaimed = self.batcher.offer([ticket], time.perf_counter())
            except QueueFull as error:
                ticket.reply.set_exception(WorkerLost(f"the worker of the variant was lost; {error}"))
                self._unsettled.settle(1)
                continue
            ticket.enqueued_at = since  # its client has waited from then on
            self._scheduler.offered(unclaimed=unclaimed)
            self._sweep.by(ticket.deadline)

    def _recheck(self) -> None:
        """The worker may have been back before its loss was told here; then nobody else tells that it is."""
        if self.workers is not None and self.workers.is_complete:
            self.workers_are_back()

    def workers_stay_away(self, why: str) -> None:
        """Refuse what was in a worker when it was lost."""
        self._second_chances.refuse(why)

    def fail(self, formed: object, text: str) -> None:
        """Refuse with this text who waits, and who is in what was taken from the queue for a batch that is given up."""
        assert isinstance(formed, Formed)
        given_up = [*formed.batch, *formed.expired, *formed.left, *self.batcher.empty()]
        for ticket in given_up:
            if not ticket.reply.done():
                ticket.reply.set_exception(NotReady(text))
        self._unsettled.settle(len(given_up))

    def runner(self) -> BatchRunner:
        """The steps of a batch on its backends."""
        return BatchRunner(self.name, self.spec, self.running)

    def in_use(self) -> Callable[[], None]:
        """Keep its backends open for work beside its requests, until what this returns is called."""
        self._unsettled.add(1)
        return lambda: self._unsettled.settle(1)

    async def predict(
        self, sample: Arrays, is_disconnected: IsDisconnected, timeout_s: float | None = None, priority: int = 0
    ) -> Prediction:
        """Queue a request, wait for its batch, return its outputs.

        `sample` is checked against the spec by the codec. `gone` tells, from any thread, whether the client left.
        `priority` is 1 for the most urgent level; 0, and what is beyond the last level, stand for the default.

        Raises:
            BadInput: rows are longer than the spec's `max_length`, or hold what the model cannot look up.
            QueueFull, DeadlineUnreachable: refused at the door; `retry_after_s` is set.
            QueueTimeout: waited longer than `timeout_s`, or than the queue's own limit, and was not executed.
            ClientGone: the client left before its rows were executed.
            BackendFailed, OutOfMemory: the backend raised on these rows alone.
        """
        now = time.perf_counter()
        limits = self.batcher.limits
        timeout_s = limits.timeout_s if timeout_s is None else min(limits.timeout_s, timeout_s)
        length = self._length(sample) if self._axes else 0
        bucket = limits.bucket(length)
        level = limits.level(priority)
        predicted = self._admit(level, bucket, timeout_s)
        limits.check(len(sample[0]))  # before hundreds of thousands of rows are cut into parts
        parts = cut(sample, limits.rows_per_batch(bucket))
        tickets = [self._ticket(part, now + timeout_s, is_disconnected, level, length) for part in parts]
        tickets[0].predicted_s = predicted
        self._enqueue(tickets, now)
        if len(tickets) == 1:
            outputs, queue_s, infer_s, batch_size = await tickets[0].reply
            return Prediction(outputs, self.name, queue_s, infer_s, batch_size)
        replies = await asyncio.gather(*(ticket.reply for ticket in tickets))
        outputs_of, queue_of, infer_of, size_of = zip(*replies, strict=True)
        return Prediction(rejoin(outputs_of), self.name, max(queue_of), sum(infer_of), max(size_of))

    def check_open(self, priority: int | None = 0, timeout_s: float | None = None) -> None:
        """Refuse now whom `predict` would refuse whatever is asked, so that nobody reads or decodes it in vain.

        A `priority` of `None` is one that is not known yet.

        Raises:
            QueueFull, DeadlineUnreachable: not even a single row would be queued.
        """
        limits = self.batcher.limits
        if self.batcher.waiting_rows + sum(self._expected) >= limits.queue_rows:
            raise self._full(f"all {limits.queue_rows} rows of the queue are taken")
        level = 1 if priority is None else limits.level(priority)
        expected = sum(self._expected[:level])
        self._admit(level, 0, limits.timeout_s if timeout_s is None else min(limits.timeout_s, timeout_s), expected)

    @contextmanager
    def expecting(self, priority: int | None = 0) -> Iterator[None]:
        """While a request is decoded for this variant: it counts as a row for those who come after it, unless
        they are more urgent; of the default level where its `priority` is not known yet.

        Else images would be let in and decoded by the hundred, to be refused then, at the cost of those who wait.

        Raises:
            QueueFull, DeadlineUnreachable: as `check_open`.
        """
        self.check_open(priority)
        position = self.batcher.limits.level(priority or 0) - 1
        self._expected[position] += 1
        try:
            yield
        finally:
            self._expected[position] -= 1

    def waiting_rows(self) -> int:
        """Rows in the queue now."""
        return self.batcher.waiting_rows

    def wait_s(self, level: int, bucket: int = 0, expected: int = 0) -> float:
        """Predicted queue time of a request in a length bucket.

        Until a lane is free, and what the lanes do together before: the own queue up to this level with what is
        `expected` there, and turns of the neighbours in between.
        """
        asked = [other.as_rival() for other in self.neighbours if other.batcher.waiting_rows]
        if not asked and not self.batcher.waiting_rows and not expected:
            return self._device.remaining_s()
        before = self.batcher.rows_by_length(level)
        before[bucket] += expected
        return self._device.wait_s(self.costs.drain_seconds(before), self._share, asked)

    def as_rival(self) -> Rival:
        """What a neighbour has to know of this variant's queue."""
        rows = self.batcher.rows_by_length(self.batcher.limits.levels)
        return Rival(self._share, self.costs.drain_seconds(rows), self.costs.turn_seconds(rows))

    def _follow_costs(self) -> None:
        """Have batches be as large as is worth it now."""
        if self.costs.follow():
            self.batcher.limits = with_knees(self.batcher.limits, self.costs)
            logger.info("variant '%s': batches of up to %s rows now", self.name, self.batcher.limits.rows_at)

    def _length(self, sample: Arrays) -> int:
        length = longest(sample, self._axes)
        if length > self.spec.max_length:
            raise BadInput(f"an input is {length} long; this model takes at most {self.spec.max_length}")
        if self.spec.step > 1 or self.spec.least > 1:
            self._check_sizes(sample)
        return length

    def _check_sizes(self, sample: Arrays) -> None:
        step, least = self.spec.step, self.spec.least
        for position, axis in self._axes:
            if (size := sample[position].shape[axis]) != self.spec.size(size):
                allowed = f"multiples of {step}" if step > 1 else "sizes"
                at_least = f" from {self.spec.size(1)} up" if least > 1 else ""
                name = self.spec.inputs[position].name
                raise BadInput(f"axis {axis} of '{name}' has size {size}; this model takes {allowed}{at_least}")

    def _admit(self, level: int, bucket: int, timeout_s: float, expected: int = 0) -> float:
        """The predicted wait; refuse whoever allows less."""
        predicted = self.wait_s(level, bucket, expected)
        wait = predicted * self._margin.factor
        if wait > timeout_s:
            text = f"predicted to wait {wait * 1000:.0f} ms in the queue; the request allows {timeout_s * 1000:.0f} ms"
            raise DeadlineUnreachable(text, retry_after_s=wait - timeout_s)
        return predicted

    def _ticket(
        self, sample: Arrays, deadline: float, is_disconnected: IsDisconnected, level: int, length: int
    ) -> Ticket[PendingResult]:
        reply: PendingResult = self._loop.create_future()

        def left() -> bool:  # a cancelled caller is as gone as a closed connection
            return reply.cancelled() or is_disconnected()

        ticket = Ticket(sample, reply, deadline=deadline, is_disconnected=left, level=level, length=length)
        ticket.identity = CURRENT_REQUEST.get()
        if self._company is not None:
            ticket.company = self._company(sample)
        return ticket

    def _enqueue(self, tickets: list[Ticket[PendingResult]], now: float) -> None:
        try:
            unclaimed = self.batcher.offer(tickets, now)
        except QueueFull as error:
            raise self._full(str(error)) from None
        self._unsettled.add(len(tickets))
        self._scheduler.offered(unclaimed=unclaimed)
        self._sweep.by(tickets[0].deadline)

    def _full(self, text: str) -> QueueFull:
        return QueueFull(text, retry_after_s=self.wait_s(self.batcher.limits.levels))

    def _complete(self, done: CompletedRound) -> None:
        """Once per batch: hand every ticket its outcome, and remember what is to be counted."""
        lane, formed, taken, batches = done
        if lane.is_given_up:
            logger.warning("a batch of variant '%s' that was given up has ended after all", self.name)
            return  # its tickets have been refused
        kept = 0
        for batch in batches:
            first = batch.tickets[0]
            if first.predicted_s:
                self._margin.waited(first.predicted_s, taken - first.enqueued_at)
            kept += self._hand_out(batch, taken)
        if kept:
            self._loop.call_later(RECHECK_S, self._recheck)
        self._refuse(formed.expired)
        for ticket in formed.left:
            if not ticket.reply.done():
                ticket.reply.set_exception(ClientGone("the client left before its rows were executed"))
        self._unsettled.settle(len(formed.batch) + len(formed.expired) + len(formed.left) - kept)
        self._tally.add(batches)
        if self.observer is not None:
            self.observer(batches)

    def _hand_out(self, batch: CompletedBatch, taken: float) -> int:
        """Give the tickets of a batch their outcomes; how many have none yet, because they wait for another worker."""
        kept = 0
        for ticket, outcome in zip(batch.tickets, batch.outcomes, strict=True):
            if ticket.reply.done():
                continue
            if not isinstance(outcome, Exception):
                ticket.reply.set_result((outcome, taken - ticket.enqueued_at, batch.infer_s, batch.rows))
            elif isinstance(outcome, WorkerLost) and self._second_chances.keep(ticket, outcome):
                kept += 1
            else:
                ticket.reply.set_exception(outcome)
        return kept

    def _expire(self, now: float) -> float:
        """Refuse what has waited too long by now; the earliest deadline of the others."""
        expired, earliest = self.batcher.expire(now)
        self._refuse(expired)
        self._unsettled.settle(len(expired))
        return earliest

    def _refuse(self, tickets: list[Ticket[PendingResult]]) -> None:
        for ticket in tickets:
            if not ticket.reply.done():
                waited = time.perf_counter() - ticket.enqueued_at
                self._margin.waited(ticket.predicted_s, waited)
                text = f"waited {waited * 1000:.0f} ms in the queue of '{self.name}', longer than its timeout"
                ticket.reply.set_exception(QueueTimeout(text))
