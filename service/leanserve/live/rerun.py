"""A batch that a client has its answer to is run once more, on a lane that has nothing else to do.

A quick one is run twice, and the second time counts: a variant that is asked seldom has less of its weights in the
caches than one that has just answered, and twins in one process differed by -4 to 10 % for as long as it lived.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from leanserve.contracts import Arrays
from leanserve.request_identity import RequestIdentity
from leanserve.runtime.device import BatchOnLane, Device, Lane
from leanserve.runtime.turns import DeviceShare
from leanserve.serving.batch_runner import BatchPlace, BatchRunner
from leanserve.serving.batcher import Formed, Ticket
from leanserve.serving.variant import Variant
from leanserve.texts import size_of

WARMED_BELOW_S = 0.02
"""Seconds of a batch from where on what the caches lack is of no account: all of them are filled in some 3 ms."""


class AnsweredRequest(NamedTuple):
    """What one request of a batch asked, what it was told, and which it was."""

    sample: Arrays
    answer: Arrays
    length: int
    identity: RequestIdentity | None

    @property
    def rows(self) -> int:
        return len(self.sample[0])

    @property
    def nbytes(self) -> int:
        return sum(size_of(array) for array in (*self.sample, *self.answer))


class Rerun(NamedTuple):
    """Answers by request, `None` where it failed; rows and lane seconds of the batch, 0 if it failed as a whole."""

    answers: Sequence[Arrays | None]
    rows: int
    seconds: float
    error: BaseException | None = None
    """The first of those that made requests fail."""


def rerun(variant: Variant, lane: Lane, requests: Sequence[AnsweredRequest]) -> Rerun:
    """Have a variant answer a batch on this lane, on its thread; if it fails, every request of it alone. Never raises.

    Its turns among variants are not touched by it: idle time belongs to nobody.
    """
    runner, share = variant.runner(), DeviceShare(variant.name)
    device = runner.running.device
    device.seat(lane, seated=runner.running.seated)
    place = BatchPlace((lane,), runner.running.placement(lane))
    bucket = variant.batcher.limits.bucket(max(request.length for request in requests))
    tickets = [_ticket(request, bucket) for request in requests]
    try:
        answers, seconds = _run(runner, place, _Site(device, share), tickets)
    except BaseException as error:  # as on the lanes: a panic in a native library is no Exception
        if len(requests) == 1:
            return Rerun([None], 0, 0.0, error)
        alone = [rerun(variant, lane, [request]) for request in requests]
        first = next((each.error for each in alone if each.error is not None), None)
        return Rerun([each.answers[0] for each in alone], 0, 0.0, first)
    return Rerun(answers, sum(request.rows for request in requests), seconds)


class _Site(NamedTuple):
    device: Device
    share: DeviceShare


def _ticket(request: AnsweredRequest, bucket: int) -> Ticket[Any]:
    ticket: Ticket[Any] = Ticket(request.sample, None, length=request.length)
    ticket.bucket, ticket.identity = bucket, request.identity
    return ticket


def _run(runner: BatchRunner, place: BatchPlace, site: _Site, tickets: list[Ticket[Any]]) -> tuple[list[Arrays], float]:
    batch, padded = runner.assemble(tickets, place)
    once_s = place.way.costs.tables[tickets[0].bucket].seconds(padded)
    warms = once_s < WARMED_BELOW_S
    expected_s = 2 * once_s if warms else once_s
    # So that requests that come meanwhile are told how long they wait, and the watchdog sees a batch that hangs.
    whole, started = BatchOnLane(site.share, Formed[Any]([], [], [])), time.perf_counter()
    site.device.begin(place.lanes, whole, expected_s, started)
    try:
        if warms:
            place.way.backend.run(batch)
        began = time.perf_counter()
        outputs, _ = place.way.backend.run(batch)
    finally:
        ended = time.perf_counter()
        site.device.end(place.lanes, whole, ended - started - expected_s)
    return runner.split(outputs, tickets, padded), ended - began
