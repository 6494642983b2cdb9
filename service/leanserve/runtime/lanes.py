"""A variant in memory: its warm backends, one for each lane of the device, and what batches cost there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from leanserve.contracts import Backend
from leanserve.runtime.costs import Costs
from leanserve.runtime.device import Device, Lane


class LanePlacement(NamedTuple):
    """A warm backend, and what a batch costs when it is run there."""

    backend: Backend
    costs: Costs

    def padded(self, rows: int, bucket: int) -> int:
        """The rows of a batch of a length bucket there, with those that fill it up to what was compiled."""
        return self.costs.tables[bucket].bucket(rows) if self.backend.row_buckets else rows


@dataclass(frozen=True, slots=True)
class LoadedVariant:
    """What runs a variant: a device, a warm backend for each of its lanes, and what a batch costs with all at work.

    Lanes share a backend that is self-contained. `wide` is there where a batch that is alone is quicker on all threads.
    Where it is `seated`, lanes stay on processors of their own while they run it, and its threads on others.
    With `lanes_only` the event loop runs none of its batches, however short: each waits for another process.
    `memory_rows` is the largest batch for which there was memory, where there was none for one that was wanted.
    """

    device: Device
    backends: tuple[Backend, ...]
    costs: Costs
    wide: LanePlacement | None = None
    memory_rows: int | None = None
    lanes_only: bool = False
    seated: bool = False

    def placement(self, lane: Lane) -> LanePlacement:
        """That of a lane by itself."""
        return LanePlacement(self.backends[lane.index], self.costs)

    @property
    def opened(self) -> tuple[Backend, ...]:
        """All backends, each once."""
        every = (*self.backends, self.wide.backend) if self.wide else self.backends
        return tuple({id(backend): backend for backend in every}.values())
