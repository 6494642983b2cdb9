"""Clients that were answered together tend to ask again together, within a millisecond or two.

A lane that takes the first of them alone leaves the others behind it for a whole batch. So for a small share of the
time that their batch took, no lane takes fewer than they were, and those who came meanwhile. Who was answered alone
never waits for anybody.
"""

from __future__ import annotations

from collections.abc import Sequence

from leanserve.serving.batch_runner import CompletedBatch

SHARE, TICK_S = 0.05, 0.001
"""The share of a batch's time, and the shortest wait: the loop's timer is too coarse for less."""


class Cohort:
    """The requests of a variant that were answered together last. Times are seconds of the caller's clock.

    Lanes tell what they answered, lanes and the loop ask; whoever asks sees the whole of one group.
    """

    def __init__(self, most: int) -> None:
        """`most`: the rows of the largest batch; no more are waited for."""
        self._most = most
        self._last = (0, 0.0)  # rows, and until when they are waited for

    def answered(self, batches: Sequence[CompletedBatch], waiting_rows: int, now: float) -> None:
        """A batch is answered, while others are waiting: all of them are the group now, unless it ran in parts."""
        if len(batches) != 1:
            return
        [batch] = batches
        if len(batch.tickets) > 1 and batch.infer_s * SHARE >= TICK_S:
            self._last = (min(batch.rows + waiting_rows, self._most), now + batch.infer_s * SHARE)

    def pause(self, waiting_rows: int, now: float) -> float:
        """Seconds to wait for the others when so many rows have come; 0 if it is together or was waited for."""
        rows, until = self._last
        return until - now if now < until and waiting_rows < rows else 0.0
