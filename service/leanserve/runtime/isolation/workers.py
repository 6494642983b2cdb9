"""The worker processes of one variant: whether all are there, how often and why one was lost, and who is told.

A variant has one worker for each backend that it would have in the service's own process. It serves while all of them
are there.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

from leanserve.contracts import Backend
from leanserve.runtime.costs import Costs
from leanserve.runtime.isolation.life import FIRST_S, WorkerEnd

logger = logging.getLogger(__name__)

WorkerEvent = Literal["lost", "failing", "back"]
"""A worker was lost; it could not be started again and will be tried later; all workers are there again."""
PAUSES_S = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Before the first, second, ... start after a loss; the last one from then on."""
STUCK_RATIO = 20.0
"""A batch is stuck if it takes so many times as long as the slowest at warm-up, and `stuck_after_s` at least."""


class Workers:
    """What is common to the isolated backends of one variant. Callable from any thread."""

    def __init__(self, variant: str, stuck_after_s: float, pauses_s: Sequence[float] = PAUSES_S) -> None:
        self.variant = variant
        self.losses: Counter[str] = Counter()
        """How often a worker was lost, by cause: the name of a signal, `stuck` or `exit`."""
        self.listener: Callable[[WorkerEvent, str], None] = _unheard
        """Told of what happens, and why, from threads of the backends."""
        self.warm: Callable[[Backend], None] = _as_it_is
        """Runs a backend that was started again in every shape that it will meet."""
        self._stuck_after_s = stuck_after_s
        self._pauses_s = pauses_s
        self._patience_s = FIRST_S
        self._shapes = 0
        self._away: set[int] = set()
        self._changing = threading.Lock()

    def settle(self, costs: Costs, shapes: int, warm: Callable[[Backend], None]) -> None:
        """From now on it is known what batches take, and how to `warm` another worker by running so many `shapes`."""
        slowest = max(max(table.table().values()) for table in costs.tables)
        self._patience_s = max(self._stuck_after_s, STUCK_RATIO * slowest)
        self._shapes = shapes
        self.warm = warm

    def patience_s(self, runs: int) -> float:
        """How long a batch may take in a worker that has begun so many before: the first ones may compile something."""
        return FIRST_S if runs < self._shapes else self._patience_s

    @property
    def is_complete(self) -> bool:
        """Whether all workers are there."""
        return not self._away

    def pause_s(self, losses: int) -> float:
        """Seconds before the next start, after so many losses in short time."""
        return self._pauses_s[min(losses, len(self._pauses_s)) - 1]

    def lost(self, backend: Backend, end: WorkerEnd, pause_s: float) -> None:
        """A worker is gone, and will be started again after a pause."""
        with self._changing:
            self._away.add(id(backend))
            self.losses[end.cause] += 1
        logger.error("variant '%s': its worker %s; the next one starts in %.0f s", self.variant, end.why, pause_s)
        self.listener("lost", f"its worker {end.why}")

    def failing(self, why: str, pause_s: float) -> None:
        """A lost worker could not be started again."""
        text = "variant '%s': its worker cannot be started again: %s; the next try is in %.0f s"
        logger.error(text, self.variant, why, pause_s)
        self.listener("failing", f"its worker cannot be started again: {why}")

    def back(self, backend: Backend, seconds: float) -> None:
        """A lost worker was started again and is warm, which took so long."""
        with self._changing:
            self._away.discard(id(backend))
            complete = not self._away
        logger.warning("variant '%s': its worker is back after %.1f s", self.variant, seconds)
        if complete:
            self.listener("back", "")

    def forget(self, backend: Backend) -> None:
        """A backend was closed, whether its worker was there or not."""
        with self._changing:
            self._away.discard(id(backend))


def _unheard(_: WorkerEvent, __: str) -> None:
    """Nobody listens yet."""


def _as_it_is(_: Backend) -> None:
    """Nothing to do before it was warm once."""
