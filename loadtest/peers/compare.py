"""leanserve beside other servers, over the same network under the same load, in interleaved rounds.

    python -m loadtest.peers.compare --peers leanserve triton fastapi --connections 1 32 64 --rounds 5 --seconds 3

All peers run at once and idle while another one is loaded, so that a round takes seconds and a machine that gets slower
meets everyone. Each is asked once before, and its answer compared with onnxruntime's. Shown are the medians of the
rounds, and the median of the ratios *within* a round. A measurement that others on the machine disturbed is done again
(`quiet.py`). docs/peers.md tells what was found.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
from rich.console import Console
from rich.table import Table

from leanserve.contracts import Array
from loadtest.peers.network import SPECS, example, write_network
from loadtest.peers.process import PeerError, Running, ask, serving
from loadtest.peers.quiet import PATIENCE_S, quietly
from loadtest.peers.roster import PEERS, Request
from loadtest.peers.wrk import Heads, Load, load

CACHE = Path(".leanserve/peers")
WARM_S, STARTS_S = 1.0, 60.0
WIDTH = 120


class Cell(NamedTuple):
    """One measurement: a load, and the CPU seconds of the server under it."""

    load: Load
    server_cpu_s: float


Rounds = Mapping[int, Mapping[str, Sequence[Cell]]]
"""connections -> peer -> one cell per round"""


def expected(network: Path, rows: Array) -> Array:
    """What onnxruntime answers."""
    import onnxruntime

    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": rows})[0])


def check(running: Running, request: Request, right: Array) -> None:
    """Raise `PeerError` unless the peer answers right, at the latest after a minute (some listen before they serve)."""
    status, body = ask(running.port, request)
    give_up = time.monotonic() + STARTS_S
    while status != 200:
        if time.monotonic() > give_up:
            raise PeerError(f"{running.peer.name} answers {status}: {body[:300]!r}")
        time.sleep(0.2)
        status, body = ask(running.port, request)
    found = np.asarray(running.peer.form.output(body), np.float32).reshape(right.shape)
    if not np.allclose(found, right, atol=1e-4):
        raise PeerError(f"{running.peer.name} answers {found.ravel()[:5]}, onnxruntime {right.ravel()[:5]}")


class Plan(NamedTuple):
    """What is measured: rounds over these numbers of connections, so many seconds each; see `quietly` for patience."""

    connections: Sequence[int]
    rounds: int
    seconds: float
    patience_s: float
    heads: Heads = "equal"


def measure(peers: Sequence[Running], requests: Mapping[str, Request], plan: Plan) -> Rounds:
    """One cell per number of connections, peer and round; who begins changes with every round."""
    names = [running.peer.name for running in peers]
    cells: dict[int, dict[str, list[Cell]]] = {count: {name: [] for name in names} for count in plan.connections}
    for number in range(plan.rounds):
        for count in plan.connections:
            turn = number % len(peers)
            for running in (*peers[turn:], *peers[:turn]):
                under_load = partial(_cell, running, requests[running.peer.name], count, plan)
                cells[count][running.peer.name].append(quietly(under_load, running.cpu_s, plan.patience_s))
    return cells


def _cell(running: Running, request: Request, connections: int, plan: Plan) -> Cell:
    before = running.cpu_s()
    found = load(running.port, request, connections, plan.seconds, plan.heads)
    if found.failed:
        raise PeerError(f"{running.peer.name} failed {found.failed} of {found.requests} requests")
    return Cell(found, running.cpu_s() - before)


def table(cells: Rounds, title: str) -> Table:
    """Medians over the rounds; `of best` is against the best other peer."""
    shown = Table(title=title)
    columns = ("connections", "server", "req/s", "of best other", "p50 ms", "p99 ms", "server µs/req", "wrk µs/req")
    for column in columns:
        shown.add_column(column, justify="left" if column == "server" else "right")
    for count, by_peer in cells.items():
        for name, found in by_peer.items():
            shown.add_row(
                str(count),
                name,
                f"{statistics.median(cell.load.rate for cell in found):,.0f}",
                _ratio(name, by_peer),
                f"{statistics.median(cell.load.p50_ms for cell in found):.2f}",
                f"{statistics.median(cell.load.p99_ms for cell in found):.2f}",
                f"{statistics.median(cell.server_cpu_s / cell.load.requests * 1e6 for cell in found):.0f}",
                f"{statistics.median(cell.load.client_cpu_s / cell.load.requests * 1e6 for cell in found):.0f}",
            )
        shown.add_section()
    return shown


def _ratio(name: str, by_peer: Mapping[str, Sequence[Cell]]) -> str:
    """Requests/s against the best other peer, as the median of the ratios within a round."""
    others = {other: cells for other, cells in by_peer.items() if other != name}
    if not others:
        return "-"
    best = max(others, key=lambda other: statistics.median(cell.load.rate for cell in others[other]))
    ratios = [own.load.rate / its.load.rate for own, its in zip(by_peer[name], others[best], strict=True)]
    return f"{statistics.median(ratios):.2f}x {best}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=["leanserve", "triton", "fastapi"])
    parser.add_argument("--network", choices=SPECS, default="mlp")
    parser.add_argument("--connections", nargs="+", type=int, default=[1, 32, 64])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="per measurement, whole ones")
    parser.add_argument(
        "--heads", choices=get_args(Heads), default="equal", help="unique: another x-request-id with every request"
    )
    parser.add_argument(
        "--patience", type=float, default=PATIENCE_S, help="seconds to wait for a quiet machine; 0: none"
    )
    parser.add_argument("--cache", type=Path, default=CACHE, help="environments of the peers, networks, logs")
    options = parser.parse_args(arguments)
    err = Console(stderr=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the servers are ended
    network = write_network(options.network, options.cache / "networks")
    rows = example(options.network)
    requests = {name: PEERS[name].form.request(options.network, rows) for name in options.peers}
    right = expected(network, rows)
    with ExitStack() as stack:
        running = []
        try:
            for name in options.peers:
                err.print(f"starting {name}")
                running.append(stack.enter_context(serving(PEERS[name], network, options.cache)))
                check(running[-1], requests[name], right)
                load(running[-1].port, requests[name], max(options.connections), WARM_S)
            plan = Plan(options.connections, options.rounds, options.seconds, options.patience, options.heads)
            cells = measure(running, requests, plan)
        except PeerError as error:
            err.print(f"error: {error}", markup=False)
            return 1
    title = f"{options.network}, one row per request, {options.heads} heads, median of {options.rounds} rounds"
    Console(width=WIDTH).print(table(cells, title))
    return 0


if __name__ == "__main__":
    sys.exit(main())
