"""What comes together to several idle lanes is divided among them, where a batch costs by its rows.

Else eight clients who were answered together would go from lane to lane together (docs/decisions/005-lanes.md).
"""

from __future__ import annotations

from leanserve.runtime.lanes import LoadedVariant

MAX_COST_RATIO, MAX_LATENCY_RATIO, HANDOVER_S = 1.25, 1.05, 200e-6
"""What waits is divided if that takes at most so many times the lanes' seconds, and so many times the clients'; another
batch costs some on its way to a lane and back. Clients may wait a little longer, for lanes that are apart fill each
other's gaps from then on: while the clients of one ask again, the other works."""


class IdleLanes:
    """Of the device of one variant."""

    def __init__(self, running: LoadedVariant) -> None:
        self._running = running

    def portion(self, bucket: int, rows: int) -> int:
        """Rows for a lane that takes now, while `rows` of a length bucket wait: all, or a share equal to others'.

        Shares are made where other lanes are idle, nobody is answered much later by them, and the lanes do little more
        than one would.
        """
        running = self._running
        if rows == 1 or len(running.device.lanes) == 1:
            return rows
        lanes = 1 + running.device.idle()
        table = running.costs.tables[bucket]
        share = -(-rows // lanes)
        if lanes == 1 or share >= table.knee:
            return rows
        most = min(rows, table.knee)
        whole = (running.wide.costs if running.wide else running.costs).tables[bucket].seconds(most)
        apart = table.seconds(share)
        cheap = apart * most / share <= MAX_COST_RATIO * table.seconds(most)
        return share if cheap and apart + HANDOVER_S < MAX_LATENCY_RATIO * whole else rows
