"""One variant on several GPUs: a backend on each, and the GPU with the fewest batches takes the next one.

To lanes and queues it is one backend, so that all GPUs have one queue: none of them idles while another has a backlog.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from leanserve.contracts import Arrays, Backend, Result


class Replicas:
    """A `contracts.Backend` over several of the same model, all of them self-contained."""

    self_contained = True

    def __init__(self, backends: Sequence[Backend]) -> None:
        self._backends = tuple(backends)
        self._running = [0] * len(backends)
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self._backends[0].name

    @property
    def device(self) -> str:
        return ",".join(backend.device for backend in self._backends)

    @property
    def row_buckets(self) -> tuple[int, ...]:
        return self._backends[0].row_buckets

    def run(self, batch: Arrays) -> Result:
        """On the GPU that runs the fewest batches now, the first of several."""
        with self._lock:
            chosen = self._running.index(min(self._running))
            self._running[chosen] += 1
        try:
            return self._backends[chosen].run(batch)
        finally:
            with self._lock:
                self._running[chosen] -= 1

    def close(self) -> None:
        for backend in self._backends:
            backend.close()
