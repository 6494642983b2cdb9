"""Clients that were answered together tend to ask again together, within a millisecond or two.

A lane that takes the first of them alone leaves the others behind it for a whole batch. So for a small share of the
time that their batch took, no lane is sent for fewer than they were. Who was answered alone never waits for anybody.
"""

from __future__ import annotations

from collections.abc import Sequence

from service.serving.execution import Ran

SHARE, TICK_S = 0.04, 0.001
"""The share of a batch's time, and the shortest wait: the loop's timer is too coarse for less."""


class Group:
    """The requests of a variant that were answered together last. Times are seconds of the caller's clock."""

    def __init__(self, most: int) -> None:
        """`most`: the rows of the largest batch; no more are waited for."""
        self._most = most
        self._rows = 0
        self._until = 0.0

    def answered(self, ran: Sequence[Ran], now: float) -> None:
        """These were answered, in one batch."""
        if len(ran) > 1 and ran[0].infer_s * SHARE >= TICK_S:
            self._until = now + ran[0].infer_s * SHARE
            self._rows = min(ran[0].batch_size, self._most)

    def pause(self, waiting_rows: int, now: float) -> float:
        """Seconds to wait for the others when so many rows have come; 0 if it is together or was waited for."""
        return self._until - now if now < self._until and waiting_rows < self._rows else 0.0
