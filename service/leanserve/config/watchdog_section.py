"""The section `watchdog`: what is done about a batch that does not end, and an event loop that does not turn."""

from __future__ import annotations

from pydantic import Field

from leanserve.config.section import Section
from leanserve.serving.watchdog import OnStuck, WatchdogLimits


class WatchdogConfig(Section):
    """How long is waited for what hangs."""

    batch_s: float = Field(60.0, gt=0, description="longest that a batch may run")
    loop_s: float = Field(10.0, gt=0, description="longest that the event loop may not turn; then the process ends")
    on_stuck: OnStuck = Field(
        "exit",
        description="what is done about a batch: exit ends the process with status 70; isolate takes its variant out "
        "of service, and leaves batches of microseconds to the lanes, too",
    )

    @property
    def limits(self) -> WatchdogLimits:
        """The same for the watchdog."""
        return WatchdogLimits(self.batch_s, self.loop_s, self.on_stuck)
