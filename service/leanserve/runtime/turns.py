"""Whose turn it is: variants share a device in seconds, in proportion to their weights, not in batches.

Start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996). The *tag* of a share is the seconds that it has had, by
its weight; of those who wait the one with the smallest tag goes next, and its tag is the device's own clock from then
on. Who comes back with a smaller one starts at that clock, so that nobody saves up turns while it has nothing to do. A
batch is charged by its predicted cost when it begins, or its variant would get all idle lanes meanwhile, and corrected
by what it took.

A variant that wants less than its part therefore waits for the batches that run, and for nobody else's queue.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Generic, NamedTuple, TypeVar

RECENT_S, LOOK_S = 2.0, 0.05
"""Time constant of what counts as recent, and how often it is looked at."""
STEPS = 3
"""How often the prediction of a wait is put into itself; each step brings it down to what it should be."""
_Job = TypeVar("_Job")


class DeviceShare:
    """What a variant has had of a device. `name` is for the log."""

    __slots__ = ("_rate", "_seen_at", "_seen_s", "_used_s", "name", "tag", "weight")

    def __init__(self, name: str = "", weight: float = 1.0) -> None:
        self.name = name
        self.weight = weight
        self.tag = 0.0
        self._used_s = self._seen_s = self._seen_at = self._rate = 0.0

    def charge(self, seconds: float) -> None:
        """It has had so many seconds of a lane; below 0 to give some back. From any thread: Python switches between
        statements such as these, not within."""
        self.tag += seconds / self.weight
        self._used_s += seconds

    def rate(self, now: float) -> float:
        """Lanes that it has kept busy of late. Ask on one thread only."""
        passed = now - self._seen_at
        if passed >= LOOK_S:
            fresh = (self._used_s - self._seen_s) / passed
            self._rate += (1 - math.exp(-passed / RECENT_S)) * (fresh - self._rate)
            self._seen_s, self._seen_at = self._used_s, now
        return self._rate


class Rival(NamedTuple):
    """Another share of the device: predicted lane-seconds of all its queue, and of one batch of it."""

    share: DeviceShare
    backlog_s: float
    turn_s: float


class Turns(Generic[_Job]):
    """The jobs that wait for a lane, by share. Whoever calls it holds the device's lock."""

    def __init__(self) -> None:
        self.clock = 0.0
        self._waiting: list[tuple[DeviceShare, _Job]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, job: _Job, share: DeviceShare) -> None:
        """It waits from now on."""
        share.tag = max(share.tag, self.clock)
        self._waiting.append((share, job))

    def next(self) -> _Job:
        """The job whose turn it is; of equals the one that came first."""
        waiting = self._waiting
        chosen = min(range(len(waiting)), key=lambda each: waiting[each][0].tag) if len(waiting) > 1 else 0
        share, job = waiting.pop(chosen)
        self.clock = max(self.clock, share.tag)
        return job

    def begin(self, share: DeviceShare) -> None:
        """A job of this share begins without having waited."""
        share.tag = self.clock = max(share.tag, self.clock)

    def seconds_before(self, own_s: float, own: DeviceShare, rivals: Iterable[Rival], lanes: int, now: float) -> float:
        """Predicted seconds until all lanes have done what goes before a request: `own_s` lane-seconds of its own
        queue, and the turns of rivals in between.

        A rival has its turns until its tag is beyond that of the request, and no more work than waits there now and
        will come meanwhile, if it goes on as of late. So rivals that are busy now are expected to be busy for as long.
        """
        reached = max(own.tag, self.clock) + own_s / own.weight
        bounds = [
            (rival.turn_s + (reached - rival.share.tag) * rival.share.weight, rival.backlog_s, rival.share.rate(now))
            for rival in rivals
            if reached > rival.share.tag
        ]
        total = own_s + sum([fair for fair, *_ in bounds])
        for _ in range(STEPS if bounds else 0):
            total = own_s + sum([min(fair, backlog + rate * total / lanes) for fair, backlog, rate in bounds])
        return total / lanes
