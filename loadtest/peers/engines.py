"""Engines and precisions, served: each beside its own bare loop, and beside the best of onnxruntime.

    python -m loadtest.peers.engines --network encoder --build         # once; other work beside it does no harm
    python -m loadtest.peers.engines --network encoder --rounds 3      # on a quiet machine

Every variant of `VARIANTS` has a bare loop, in the best of the ways to split threads and batches; those of `--served`
are also asked over HTTP, each by a service of its own. All take turns within a round, and ratios are those within one.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from leanserve.context import AppContext
from loadtest.peers import bare
from loadtest.peers.bare import Bare, Subject, Way
from loadtest.peers.callers import Closed, closed_loop
from loadtest.peers.compare import CACHE, WIDTH, Plan, expected
from loadtest.peers.network import SPECS, example, write_network
from loadtest.peers.process import PeerError, Running, ask, serving
from loadtest.peers.quiet import CORES, PATIENCE_S, quietly
from loadtest.peers.roster import PEERS, Request
from loadtest.peers.saturation import best_way
from loadtest.peers.wrk import Load, load

INT8, ORT = {"kind": "quantize_static", "observer": "minmax"}, {"kind": "onnxruntime"}
VARIANTS: Final[Mapping[str, Sequence[Mapping[str, Any]]]] = {
    "float": [ORT],
    "int8": [INT8, ORT],
    "int8-dynamic": [{"kind": "quantize_dynamic"}, ORT],
    "openvino-bf16": [{"kind": "openvino", "precision": "bf16"}],
    "openvino-int8": [INT8, {"kind": "openvino"}],
}
NEAR = 0.9
"""Least cosine to the float answers: of random weights, which are served for speed alone."""
WAY_S = 1.0
WARM_S = 2.0


class Served(NamedTuple):
    """A variant that is asked over HTTP: in one round."""

    by_connections: dict[int, Closed]
    alone: Load
    single: Bare
    """Bare runs of one row, on as many threads as are best for it."""


class Round(NamedTuple):
    """By variant: its bare loop, and what was served."""

    best: dict[str, Bare]
    served: dict[str, Served]


def build(network: Path) -> dict[str, Subject]:
    """The files of all variants that can be built of a network, which are made and measured if they are not there."""
    config = network.with_suffix(".yaml")
    variants = [{"name": name, "passes": passes} for name, passes in VARIANTS.items()]
    document = {
        "base": {"onnx": str(network.resolve())},
        "data": {"synthetic": 64},
        "gate": {"on_fail": "exclude"},
        "variants": variants,
        "cache": str((network.parent / "leanserve").resolve()),
    }
    config.write_text(json.dumps(document), encoding="utf-8")  # which is YAML, too
    command = [sys.executable, "-m", "leanserve", "build", "--config", str(config), "--measure-seconds", "0"]
    subprocess.run(command, check=True)
    context, found = AppContext(config, None), {}
    for report in context.reports():
        if report.built:
            engine = next(step["kind"] for step in reversed(VARIANTS[report.name]))
            folder = context.store.folder(context.store.holder(report.ancestry[-1].key).key)
            precision = VARIANTS[report.name][-1].get("precision", "f32")
            file, engine = ("model.onnx", engine) if engine == "onnxruntime" else ("model.xml", f"openvino-{precision}")
            found[report.name] = Subject(folder / file, network.stem, engine)
    return found


def check(running: Running, request: Request, right: Any) -> None:
    """Raise `PeerError` unless the answer is near to that in float."""
    status, body = ask(running.port, request)
    if status != 200:
        raise PeerError(f"answers {status}: {body[:300]!r}")
    found = np.asarray(running.peer.form.output(body), np.float32).ravel()
    cosine = float(found @ right.ravel() / np.linalg.norm(found) / np.linalg.norm(right))
    if cosine < NEAR:
        raise PeerError(f"the cosine of its answer to that in float is {cosine:.3f}")


def one_round(
    running: Mapping[str, Running],
    request: Request,
    subjects: Mapping[str, Subject],
    ways: Mapping[str, Way],
    plan: Plan,
) -> Round:
    """All bare loops and all loads, one after the other."""

    def alone(name: str, way: Way) -> Bare:
        return quietly(partial(bare.measure, subjects[name], way, plan.seconds), patience_s=plan.patience_s)

    def asked(name: str) -> Served:
        server = running[name]

        def loaded(connections: int) -> Closed:
            run = partial(closed_loop, server.port, request, connections, plan.seconds)
            found = quietly(run, server.cpu_s, plan.patience_s)
            if found.failed:
                raise PeerError(f"{name}: {found.failed} requests failed at {connections} connections")
            return found

        by_connections = {connections: loaded(connections) for connections in plan.connections}
        single = min((alone(name, Way(1, threads, 1)) for threads in {1, CORES}), key=lambda found: found.p50_ms)
        lone = quietly(lambda: load(server.port, request, 1, plan.seconds), server.cpu_s, plan.patience_s)
        return Served(by_connections, lone, single)

    return Round({name: alone(name, ways[name]) for name in subjects}, {name: asked(name) for name in running})


def bare_table(rounds: Sequence[Round], ways: Mapping[str, Way], title: str) -> Table:
    """Medians over the rounds; ratios to float within a round."""
    table = Table(title=title)
    for column in ("bare", "way", "rows/s", "by float"):
        table.add_column(column, justify="left" if column in {"bare", "way"} else "right")
    for name, way in ways.items():
        rate = statistics.median(item.best[name].rate for item in rounds)
        ratio = statistics.median(item.best[name].rate / item.best["float"].rate for item in rounds)
        table.add_row(name, str(way), f"{rate:.1f}", f"{ratio:.2f}x")
    return table


def served_table(rounds: Sequence[Round], seconds: float, title: str) -> Table:
    """Medians over the rounds of what is served, and of its ratios to bare loops within a round."""
    table = Table(title=title)
    columns = ("served", "connections", "rows/s", "of its bare loop", "client", "by float", "by best int8", "p50 ms")
    for column in columns:
        table.add_column(column, justify="left" if column == "served" else "right")
    for name in rounds[0].served:
        for count in rounds[0].served[name].by_connections:
            loads = [item.served[name].by_connections[count] for item in rounds]
            bares = [[item.best[name].rate, item.best["float"].rate, _best_int8(item)] for item in rounds]
            ratios = np.median(
                [[found.rate / rate for rate in rates] for found, rates in zip(loads, bares, strict=True)], axis=0
            )
            table.add_row(
                name,
                str(count),
                f"{statistics.median(found.rate for found in loads):.1f}",
                f"{ratios[0]:.1%}",
                f"{statistics.median(found.client_cpu_s for found in loads) / (seconds * CORES):.1%}",
                f"{ratios[1]:.2f}x",
                f"{ratios[2]:.2f}x",
                f"{statistics.median(found.p50_ms for found in loads):.1f}",
            )
        table.add_section()
    return table


def _best_int8(item: Round) -> float:
    """That of onnxruntime."""
    return max((found.rate for name, found in item.best.items() if name.startswith("int8")), default=float("nan"))


def idle_line(name: str, rounds: Sequence[Round]) -> str:
    """What a lone client waits for a variant, and how much of it is not the model."""
    found = [item.served[name] for item in rounds]
    served = statistics.median(item.alone.p50_ms for item in found)
    single = statistics.median(item.single.p50_ms for item in found)
    added = statistics.median(item.alone.p50_ms - item.single.p50_ms for item in found)
    return f"{name}, idle: p50 {served:.2f} ms, bare {single:.2f} ms, added {added:.2f} ms"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=[name for name in SPECS if name != "mlp"], default="encoder")
    parser.add_argument("--build", action="store_true", help="only build")
    parser.add_argument("--served", nargs="+", choices=VARIANTS, default=["openvino-int8", "openvino-bf16"])
    parser.add_argument("--connections", nargs="+", type=int, default=[8, 32, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3, help="per measurement")
    parser.add_argument("--lanes", default="auto", help="the services' `lanes`")
    parser.add_argument("--patience", type=float, default=PATIENCE_S, help="seconds to wait for a quiet machine")
    parser.add_argument("--cache", type=Path, default=CACHE, help="networks, artifacts, logs")
    options = parser.parse_args(arguments)
    out, err = Console(width=WIDTH, highlight=False), Console(stderr=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the servers are ended
    network = write_network(options.network, options.cache / "networks")
    subjects = build(network)
    if options.build:
        return 0
    rows, peer = example(options.network), PEERS["leanserve"]
    request, right = peer.form.request(options.network, rows), expected(network, rows)
    plan = Plan(options.connections, options.rounds, options.seconds, options.patience)
    ways = {name: best_way(subject, plan, err, WAY_S) for name, subject in subjects.items()}
    with ExitStack() as stack:
        try:
            running = {}
            for name in options.served:
                variants = json.dumps([{"name": name, "passes": VARIANTS[name]}])
                settings = (f"variants={variants}", f"lanes={options.lanes}")
                running[name] = stack.enter_context(serving(peer, network, options.cache, settings))
                check(running[name], request, right)
                closed_loop(running[name].port, request, max(options.connections), WARM_S)
            rounds = [one_round(running, request, subjects, ways, plan) for _ in range(plan.rounds)]
        except PeerError as error:
            err.print(f"error: {error}", markup=False)
            return 1
    title = f"{options.network}, {options.rounds} interleaved rounds"
    out.print(bare_table(rounds, ways, title))
    out.print(served_table(rounds, options.seconds, f"{title}, one row per request"))
    for name in running:
        out.print(idle_line(name, rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
