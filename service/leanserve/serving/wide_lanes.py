"""A batch that is alone on its device has all threads of it, where that is quicker (docs/decisions/005-lanes.md)."""

from __future__ import annotations

from leanserve.runtime.device import Lane
from leanserve.runtime.lanes import LanePlacement, LoadedVariant
from leanserve.serving.batch_runner import BatchPlace, PendingResult, count_rows
from leanserve.serving.batcher import Ticket

IDLE_WAIT_SHARE = 0.25
"""A batch is alone if its foremost request waited for less than this share of the time that the batch takes."""


class WideLanes:
    """Of one variant."""

    def __init__(self, running: LoadedVariant) -> None:
        self._running = running
        self._narrow = [BatchPlace((lane,), running.placement(lane)) for lane in running.device.lanes]

    def place(self, lane: Lane, tickets: list[Ticket[PendingResult]], taken: float) -> BatchPlace:
        """Where to run this batch: on this lane, or on all, if no other works and nothing waits."""
        running = self._running
        wide, device = running.wide, running.device
        elsewhere = running.seated and lane.index > 0  # its threads are where the first lane is not
        if wide is None or elsewhere or _waited(wide, tickets, taken) or device.waiting() or not device.widen(lane):
            place = self._narrow[lane.index]
            if place.lanes[0] is not lane:  # it has taken the place of one that was given up
                place = self._narrow[lane.index] = BatchPlace((lane,), running.placement(lane))
            return place
        return BatchPlace((lane, *lane.widened), wide)


def _waited(wide: LanePlacement, tickets: list[Ticket[PendingResult]], taken: float) -> bool:
    """Whether a batch had to wait for others, so that more will come while it runs, although no lane works now."""
    seconds = wide.costs.tables[tickets[0].bucket].seconds(count_rows(tickets))
    return taken - tickets[0].enqueued_at > IDLE_WAIT_SHARE * seconds
