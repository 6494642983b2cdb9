"""What clients notice of a reload (SIGHUP): p99 while a variant is built, opened and swapped, by that before.

    python -m loadtest.benchmarks.reload --network encoder --rate 20 --rounds 6

Requests come at a steady rate, each at its own time, whatever became of the one before. In turns a variant is added and
removed again; it needs building in the first round alone. All requests between the signal and the line in the log are
`during`, as many seconds before it `steady`.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from leanserve.contracts import Json
from loadtest.benchmarks.service import BenchmarkService, service_over, write_config
from loadtest.peers.compare import CACHE
from loadtest.peers.network import SPECS, example
from loadtest.peers.process import HOST
from loadtest.peers.roster import Request

STEADY_S, AFTER_S = 4.0, 1.0
STAYS: Json = {"name": "float"}
COMES: Json = {"name": "int8", "passes": [{"kind": "quantize_dynamic"}]}


class Asked(NamedTuple):
    """When a request was due, the seconds until its answer, and its status (seconds of one clock)."""

    due: float
    seconds: float
    status: int


class Turn(NamedTuple):
    """One reload: how long it took, latencies before it, during it, and requests that were not answered."""

    seconds: float
    steady: list[float]
    during: list[float]
    failed: Counter[int]
    """By status."""

    def ratio(self, percentile: float) -> float:
        """During by steady."""
        return float(np.percentile(self.during, percentile) / np.percentile(self.steady, percentile))


async def turn(service: BenchmarkService, config: Json, rate: float) -> Turn:
    """Load, then a reload of that config meanwhile."""
    asked: list[Asked] = []
    load = asyncio.create_task(_open_loop(service, rate, asked))
    await asyncio.sleep(STEADY_S)
    lines = _told(service)
    write_config(service.config, config)
    began = time.perf_counter()
    service.process.send_signal(signal.SIGHUP)
    while (told := _told(service)) == lines:
        await asyncio.sleep(0.02)
    seconds = time.perf_counter() - began
    assert "reloaded in" in told[-1], told[-1]
    await asyncio.sleep(AFTER_S)
    load.cancel()
    steady = [item.seconds for item in asked if began - STEADY_S < item.due < began]
    during = [item.seconds for item in asked if began <= item.due < began + seconds + AFTER_S]
    return Turn(seconds, steady, during, Counter(item.status for item in asked if item.status != 200))


async def _open_loop(service: BenchmarkService, rate: float, asked: list[Asked]) -> None:
    """Ask at this rate, until cancelled; every request has a connection for itself."""
    request = service.request("float", example(service.network))
    due = time.perf_counter()
    tasks: set[asyncio.Task[None]] = set()
    while True:
        due += 1 / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        task = asyncio.create_task(_ask(service.port, request, due, asked))
        tasks.add(task)
        task.add_done_callback(tasks.discard)


async def _ask(port: int, request: Request, due: float, asked: list[Asked]) -> None:
    reader, writer = await asyncio.open_connection(HOST, port)
    headers = request.headers | {"Host": HOST, "Content-Length": str(len(request.body)), "Connection": "close"}
    lines = [f"POST {request.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
    writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + request.body)
    status = int((await reader.readline()).split()[1])
    await reader.read()
    asked.append(Asked(due, time.perf_counter() - due, status))
    writer.close()


def _told(service: BenchmarkService) -> list[str]:
    return [line for line in service.log.splitlines() if "reloaded in" in line or "reload refused" in line]


def _told_failed(failed: Counter[int]) -> str:
    return ", ".join(f"{count} x {status}" for status, count in failed.items()) or "0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=SPECS, default="encoder")
    parser.add_argument("--rate", type=float, default=20.0, help="requests per second")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--cache", type=Path, default=CACHE)
    given = parser.parse_args()
    table = Table(
        "reload", "seconds", "requests", "failed", "p50 steady ms", "p50 during", "p99 steady ms", "p99 during"
    )
    ratios: dict[str, list[float]] = {}
    with service_over(given.network, given.cache, variants=[STAYS]) as service:
        base = {key: value for key, value in service.settings().items() if key != "variants"}
        for number in range(given.rounds):
            added = number % 2 == 0
            name = "built and added" if not number else "added" if added else "removed"
            found = asyncio.run(turn(service, base | {"variants": [STAYS, *([COMES] if added else [])]}, given.rate))
            ratios.setdefault(name, []).append(found.ratio(99))
            shown = [f"{1000 * float(np.percentile(times, at)):.1f}" for at in (50, 99) for times in found[1:3]]
            table.add_row(name, f"{found.seconds:.1f}", str(len(found.during)), _told_failed(found.failed), *shown)
    Console().print(table)
    for name, values in ratios.items():
        Console().print(
            f"{name}: p99 during / steady {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
        )


if __name__ == "__main__":
    main()
