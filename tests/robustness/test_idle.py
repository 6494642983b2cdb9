""" "Threads oversubscribed, idle pools spin": loaded variants that nobody asks cost nothing, neither time nor CPU.

That observing a request costs far below a hundredth of it is asserted in `tests/telemetry/test_metrics.py`.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from pathlib import Path

import pytest

from raw_http import connected, infer_request, read_reply
from rule_service import RuleService, needs_proc, serving
from rules import row

CLIENTS = 4
WINDOWS, WINDOW_S = 15, 0.3


async def keep_asking(service: RuleService, seconds: float) -> int:
    """How many requests to `onnx1` were answered in that time."""
    end = time.perf_counter() + seconds

    async def client() -> int:
        answered = 0
        async with connected(service.port) as (reader, writer):
            while time.perf_counter() < end:
                writer.write(infer_request("onnx1", row(1)))
                answered += (await read_reply(reader)).status == 200
        return answered

    return sum(await asyncio.gather(*(client() for _ in range(CLIENTS))))


@needs_proc
@pytest.mark.soak
def test_three_idle_neighbours_cost_the_hot_variant_nothing_and_idle_costs_no_cpu(tmp_path: Path) -> None:
    four = ("onnx1", "onnx2", "onnx3", "onnx4")
    with serving(tmp_path / "alone", "onnx1") as alone, serving(tmp_path / "four", *four) as together:
        ratios = []
        for _ in range(WINDOWS):
            lone = asyncio.run(keep_asking(alone, WINDOW_S))
            ratios.append(asyncio.run(keep_asking(together, WINDOW_S)) / lone)
        before = together.cpu_s()
        time.sleep(2.0)  # the measurement itself: nothing is to happen
        assert together.cpu_s() - before < 0.02 * 2.0
    # It is 1.0. Of windows this short, on cores that others share, single ones were seen at 0.8 and medians at 0.89,
    # hence neither a mean nor a tighter limit; a neighbour that computes takes a core and leaves half.
    assert statistics.median(ratios) > 0.8
