"""Batches of microseconds are run by the event loop itself, in the part of a free lane.

To wake a lane and be woken by it takes as long as they do, with Python's lock going back and forth
(docs/decisions/008-short-batches.md).
"""

from __future__ import annotations

from collections.abc import Callable

from leanserve.runtime.device import Lane
from leanserve.runtime.lanes import LoadedVariant
from leanserve.runtime.turns import DeviceShare

SHORT_S, LONG_S = 50e-6, 300e-6
"""The loop itself runs a variant whose largest batch took no longer at warm-up, until it turns out to take much longer:
to wake a lane and be woken by it costs about as much."""


class ShortBatches:
    """Of one variant."""

    def __init__(
        self, running: LoadedVariant, share: DeviceShare, turn_s: Callable[[], float], *, lanes_only: bool = False
    ) -> None:
        """`turn_s` predicts the next batch. With `lanes_only` none is short enough: a batch that hangs on the loop
        takes it along."""
        self._device = running.device
        self._share = share
        self._turn_s = turn_s
        # Decided by the warm-up, once: what is learnt beside a busy loop, or loaded anew, does not take it back.
        self._short = not lanes_only and all(table.seconds(table.knee) <= SHORT_S for table in running.costs.tables)

    def borrow(self) -> Lane | None:
        """A free lane in whose part the loop runs the next batch; `None` where a lane is to do it."""
        return self._device.borrow(self._share) if self._short and self._turn_s() <= LONG_S else None
