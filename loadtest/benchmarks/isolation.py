"""What `isolation: process` costs: one server, the same artifact in its own process and in a worker, in turns.

    python -m loadtest.benchmarks.isolation --network encoder --connections 1 8 32 --rounds 8 --seconds 1.5

Prints requests per second in the worker by those in the process itself, the same of the CPU time per answer, which
others on the machine disturb less, and latencies: medians over the rounds, with the middle half of them.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from loadtest.benchmarks.service import BenchmarkService, service_over
from loadtest.peers.callers import Closed, closed_loop
from loadtest.peers.compare import CACHE
from loadtest.peers.network import SPECS, example
from loadtest.peers.process import cpu_s_of

TIMES = ("p50_ms", "p99_ms")
VARIANTS = {"here": "none", "apart": "process"}


class Way(NamedTuple):
    """What one variant did in one turn, and the CPU milliseconds of the service per answer."""

    load: Closed
    cpu_ms: float


def one_round(service: BenchmarkService, connections: int, seconds: float, order: list[str]) -> dict[str, Way]:
    """Both ways, one after the other."""
    return {name: _turn(service, name, connections, seconds) for name in order}


def _turn(service: BenchmarkService, variant: str, connections: int, seconds: float) -> Way:
    request = service.request(variant, example(service.network))
    before = cpu_s_of(service.process.pid)
    load = closed_loop(service.port, request, connections, seconds)
    assert not load.failed
    return Way(load, 1000 * (cpu_s_of(service.process.pid) - before) / (load.rate * seconds))


def _spread(ratios: list[float]) -> str:
    """The median, and between which the middle half lies."""
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def _median(rounds: list[dict[str, Way]], which: str, name: str) -> str:
    return f"{statistics.median(getattr(found[name].load, which) for found in rounds):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", choices=SPECS, default="encoder")
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1.5)
    parser.add_argument("--cache", type=Path, default=CACHE)
    given = parser.parse_args()
    table = Table("connections", "rate apart / here", "CPU per answer apart / here", "p50 ms", "p99 ms")
    variants = [{"name": name, "isolation": isolation} for name, isolation in VARIANTS.items()]
    with service_over(given.network, given.cache, variants=variants) as service:
        for connections in given.connections:
            one_round(service, connections, 0.5, [*VARIANTS])
            orders = [[*VARIANTS], [*reversed(VARIANTS)]]
            rounds = [one_round(service, connections, given.seconds, orders[n % 2]) for n in range(given.rounds)]
            rates = _spread([found["apart"].load.rate / found["here"].load.rate for found in rounds])
            cpu = _spread([found["apart"].cpu_ms / found["here"].cpu_ms for found in rounds])
            times = [" / ".join(_median(rounds, which, name) for name in ("apart", "here")) for which in TIMES]
            table.add_row(str(connections), rates, cpu, *times)
    Console().print(table)


if __name__ == "__main__":
    main()
