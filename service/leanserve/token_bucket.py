"""How often something may happen: a rate with bursts."""

from __future__ import annotations

import time
from collections.abc import Callable


class TokenBucket:
    """A rate with bursts: tokens come at `rate` per second, at most `burst` of them are kept, a request takes one."""

    def __init__(self, rate: float, burst: int, now: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.burst, self._now = rate, burst, now
        self._tokens, self._at = float(burst), now()

    def take(self) -> float:
        """Take a token: 0 if there is one, else the seconds until there will be."""
        now = self._now()
        self._tokens = min(self.burst, self._tokens + (now - self._at) * self.rate)
        self._at = now
        if self._tokens < 1:
            return (1 - self._tokens) / self.rate
        self._tokens -= 1
        return 0.0
