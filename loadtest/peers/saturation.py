"""leanserve over networks that take long, beside onnxruntime alone on the same cores.

    python -m loadtest.peers.saturation --network encoder --connections 8 32 64 --rounds 5 --seconds 5

Three questions, answered within one run, in interleaved rounds. *Saturation*: how much of the rows per second of the
best bare loop (over batch sizes and ways to split the threads) are served. *Idle*: what a lone client waits beyond the
model. *Overload*: with ten times the requests that can be answered, how many are still answered, and how late. The load
generator lives on the same cores; `client` is the share of them that it took, and the share of the bare loop is given
twice: of all cores, and of what the client left. docs/peers.md tells what was found.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from loadtest.peers import bare
from loadtest.peers.bare import Bare, Subject, Way
from loadtest.peers.callers import Closed, Overload, closed_loop, open_loop
from loadtest.peers.compare import CACHE, WIDTH, Plan, check, expected
from loadtest.peers.network import SPECS, example, write_network
from loadtest.peers.process import PeerError, Running, serving
from loadtest.peers.quiet import CORES, PATIENCE_S, quietly
from loadtest.peers.roster import PEERS, Request
from loadtest.peers.wrk import Load, load

BATCHES = (1, 2, 4, 8, 16)
OVERLOAD, CALLERS = 10, 64
"""How many times the peak is offered, and by how many callers beside those who wait in the queue."""
TRY_S = 2.0


class Round(NamedTuple):
    """One round: the bare loop, the loads by connections, a lone client and bare runs of one row, the overload."""

    best: Bare
    served: dict[int, Closed]
    alone: Load
    single: Bare
    flooded: Overload


def ways() -> list[Way]:
    """All cores for each run, or one core for each of several loops."""
    return [Way(1, CORES, batch) for batch in BATCHES] + [Way(CORES, 1, batch) for batch in BATCHES if CORES > 1]


def best_way(subject: Subject, plan: Plan, console: Console, seconds: float = TRY_S) -> Way:
    """The way with the highest rate; each is tried twice, and its better try counts."""
    rates: dict[Way, float] = {}
    for _ in range(2):
        for way in ways():
            found = quietly(partial(bare.measure, subject, way, seconds), patience_s=plan.patience_s)
            rates[way] = max(rates.get(way, 0.0), found.rate)
    for way, rate in rates.items():
        console.print(f"bare {subject.engine}, {way}: {rate:.1f} rows/s", highlight=False)
    return max(rates, key=lambda way: rates[way])


def one_round(running: Running, request: Request, subject: Subject, way: Way, plan: Plan, timeout_s: float) -> Round:
    """The bare loop and the loads, one after the other; the server idles while the bare loops run."""

    seconds, patience_s = plan.seconds, plan.patience_s

    def loaded(count: int) -> Closed:
        found = quietly(lambda: closed_loop(running.port, request, count, seconds), running.cpu_s, patience_s)
        if found.failed:
            raise PeerError(f"{found.failed} requests failed at {count} connections")
        return found

    def alone(way: Way) -> Bare:
        return quietly(lambda: bare.measure(subject, way, seconds), patience_s=patience_s)

    def flood(peak: float) -> Overload:
        waiting = round(2 * peak * timeout_s)  # twice what can be admitted
        run = partial(open_loop, running.port, request, OVERLOAD * peak, seconds, waiting + CALLERS)
        return quietly(run, running.cpu_s, patience_s)

    best = alone(way)
    served = {count: loaded(count) for count in plan.connections}
    flooded = flood(max(found.rate for found in served.values()))
    single = min((alone(Way(1, threads, 1)) for threads in {1, CORES}), key=lambda found: found.p50_ms)
    # By wrk: after a batch a caller in Python has cold caches, too, for which the server is not to blame.
    lone = quietly(lambda: load(running.port, request, 1, seconds), running.cpu_s, patience_s)
    if lone.failed:
        raise PeerError(f"{lone.failed} requests of a lone client failed")
    return Round(best, served, lone, single, flooded)


def saturation_table(rounds: Sequence[Round], seconds: float, title: str) -> Table:
    """Medians over the rounds, ratios within a round."""
    table = Table(title=title)
    for column in ("connections", "rows/s", "bare rows/s", "of bare", "client", "of what it left", "p50 ms", "p99 ms"):
        table.add_column(column, justify="right")
    for count in rounds[0].served:
        loads = [item.served[count] for item in rounds]
        shares = [found.client_cpu_s / (seconds * CORES) for found in loads]
        ratios = [found.rate / item.best.rate for found, item in zip(loads, rounds, strict=True)]
        left = [ratio / (1 - share) for ratio, share in zip(ratios, shares, strict=True)]
        table.add_row(
            str(count),
            f"{statistics.median(found.rate for found in loads):.1f}",
            f"{statistics.median(item.best.rate for item in rounds):.1f}",
            f"{statistics.median(ratios):.1%}",
            f"{statistics.median(shares):.1%}",
            f"{statistics.median(left):.1%}",
            f"{statistics.median(found.p50_ms for found in loads):.1f}",
            f"{statistics.median(found.p99_ms for found in loads):.1f}",
        )
    return table


def idle_line(rounds: Sequence[Round]) -> str:
    """What a lone client waits, and how much of it is not the model."""
    served = statistics.median(item.alone.p50_ms for item in rounds)
    single = statistics.median(item.single.p50_ms for item in rounds)
    added = statistics.median(item.alone.p50_ms - item.single.p50_ms for item in rounds)
    return f"idle: p50 {served:.2f} ms, bare {single:.2f} ms, added {added:.2f} ms"


def overload_line(rounds: Sequence[Round], seconds: float, timeout_ms: float) -> str:
    """How many were answered under overload, and how late."""
    ratios = [item.flooded.goodput / max(found.rate for found in item.served.values()) for item in rounds]
    answered = [ms for item in rounds for ms in item.flooded.answered_ms]
    statuses: dict[int, int] = {}
    for item in rounds:
        for status, count in item.flooded.statuses.items():
            statuses[status] = statuses.get(status, 0) + count
    offered = statistics.median(item.flooded.offered for item in rounds)
    client = statistics.median(item.flooded.client_cpu_s for item in rounds) / (seconds * CORES)
    return (
        f"overload: {offered:.0f} requests/s offered, goodput {statistics.median(ratios):.1%} of the peak, "
        f"{statistics.median(ratios) / (1 - client):.1%} of what the callers left (they took {client:.1%}), p99 of the "
        f"answered {np.percentile(answered, 99):.0f} ms with {timeout_ms:.0f} ms allowed in the queue, {statuses}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=SPECS, default="encoder")
    parser.add_argument("--connections", nargs="+", type=int, default=[8, 32, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=10, help="per measurement; at least several times the slowest batch"
    )
    parser.add_argument("--timeout-ms", type=float, default=4000, help="longest wait in the server's queue")
    parser.add_argument("--lanes", default="auto", help="the server's `lanes`")
    parser.add_argument(
        "--patience", type=float, default=PATIENCE_S, help="seconds to wait for a quiet machine; 0: none"
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="networks, artifacts, logs")
    options = parser.parse_args(arguments)
    err = Console(stderr=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the servers are ended
    network = write_network(options.network, options.cache / "networks")
    rows = example(options.network)
    peer = PEERS["leanserve"]
    request = peer.form.request(options.network, rows)
    plan = Plan(options.connections, options.rounds, options.seconds, options.patience)
    subject = Subject(network, options.network)
    way = best_way(subject, plan, err)
    timeout_s = options.timeout_ms / 1000
    settings = (f"batch={{timeout_ms: {options.timeout_ms}}}", f"lanes={options.lanes}")
    try:
        with serving(peer, network, options.cache, settings) as running:
            check(running, request, expected(network, rows))
            closed_loop(running.port, request, max(options.connections), TRY_S)
            rounds = [one_round(running, request, subject, way, plan, timeout_s) for _ in range(plan.rounds)]
    except PeerError as error:
        err.print(f"error: {error}", markup=False)
        return 1
    out = Console(width=WIDTH, highlight=False)
    title = f"{options.network}, one row per request, against bare {way}, {options.rounds} interleaved rounds"
    out.print(saturation_table(rounds, options.seconds, title))
    out.print(idle_line(rounds))
    out.print(overload_line(rounds, options.seconds, options.timeout_ms))
    return 0


if __name__ == "__main__":
    sys.exit(main())
