"""For whom a lane waits, and how long, on a clock of the test."""

from __future__ import annotations

import numpy as np
import pytest

from service.serving.batcher import Ticket
from service.serving.execution import Ran, Reply
from service.serving.groups import SHARE, TICK_S, Group


def answered(requests: int, seconds: float) -> list[Ran]:
    """One batch of so many requests of one row that ran for so long."""
    return [Ran(Ticket[Reply]((np.zeros(1),), None), (), seconds, requests) for _ in range(requests)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("requests", "seconds", "waiting", "later", "pause"),
    [
        (4, 1.0, 1, 0.0, SHARE),
        (4, 1.0, 3, 0.5 * SHARE, 0.5 * SHARE),
        (4, 1.0, 4, 0.0, 0.0),
        (4, 1.0, 1, SHARE, 0.0),
        (9, 1.0, 8, 0.0, 0.0),
        (1, 1.0, 1, 0.0, 0.0),
        (4, 0.9 * TICK_S / SHARE, 1, 0.0, 0.0),
    ],
    ids=["first back", "some", "all", "waited for", "a full batch", "alone", "too short a batch"],
)
def test_a_group_is_waited_for(requests: int, seconds: float, waiting: int, later: float, pause: float) -> None:
    group = Group(most=8)
    assert group.pause(1, 100.0) == 0.0
    group.answered(answered(requests, seconds), 100.0)
    assert group.pause(waiting, 100.0 + later) == pytest.approx(pause)
