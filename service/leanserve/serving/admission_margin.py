"""How much longer than predicted a request is taken to wait, when it is asked whether it can be answered in time.

Under overload all who are let in are predicted to wait almost as long as they may, so whatever a prediction leaves out
turns into 504s: at its word 4 % of them waited a little longer. Batches take up to a tenth longer on cores that refuse
hundreds of large requests a second meanwhile; and what each costs besides its run, or another program takes of the
cores, no cost table knows. So what was predicted is compared with what came of it.
"""

from __future__ import annotations

LEAST = 1.12
"""Where requests wait no longer than predicted."""
LITTLE_S, SMOOTHING, MOST = 0.01, 0.05, 1.5
"""Waits of less teach little; the weight of a new one; how many times as long as predicted it may count, at most."""


class AdmissionMargin:
    """Of one variant. All on the event loop."""

    def __init__(self) -> None:
        self.factor = LEAST
        self._ratio = 1.0

    def waited(self, predicted_s: float, seconds: float) -> None:
        """A request that was predicted to wait so long was taken from the queue, or given up, after so many seconds."""
        ratio = (seconds + LITTLE_S) / (predicted_s + LITTLE_S)
        self._ratio += SMOOTHING * (min(ratio, MOST) - self._ratio)
        self.factor = LEAST * max(1.0, self._ratio)
