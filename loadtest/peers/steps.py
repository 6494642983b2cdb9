"""Microseconds per step of a request, measured in the service itself while it serves.

    python -m loadtest.peers.steps --network mlp --connections 32 --seconds 5

Serves in this process as `leanserve serve` does, with a stop-watch around the functions that a request passes, and
loads it with wrk. Every function is charged with the time in itself, without that in others that are watched; a step on
a lane runs beside the event loop, and what it waits for Python's lock is in its time. A stop-watch costs about 0.3 µs,
once per step; so the sum is somewhat above what a request takes without them.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from loadtest.peers.compare import CACHE
from loadtest.peers.network import SPECS, example, write_network
from loadtest.peers.process import HOST
from loadtest.peers.roster import BINARY_V2
from loadtest.peers.wrk import Load, load


class Step(NamedTuple):
    """A function `module:name` that requests pass, and what it does there."""

    where: str
    function: str
    what: str


STEPS = (
    Step("loop", "service.api.connection:Connection.data_received", "head known, coroutine begun, headers looked at"),
    Step("loop", "service.serving.fleet:Fleet.choose", "choose the variant"),
    Step("loop", "service.api.codecs.open_inference:InferDecoder.decode", "decode and check: plan known, views"),
    Step("loop", "service.serving.variant:Variant._admit", "admit: predicted wait against the deadline"),
    Step("loop", "service.serving.batcher:Batcher.offer", "offer: into the queue"),
    Step("lane", "service.serving.batcher:Batcher.take", "take: form the batch"),
    Step("lane", "service.serving.execution:join", "join: one copy"),
    Step("lane", "service.backends.onnx_runtime:OnnxRuntimeBackend.run", "run the model"),
    Step("lane", "service.serving.execution:split", "split: views"),
    Step("lane", "service.telemetry.observations:VariantMetrics.batch_done", "count the batch"),
    Step("loop", "service.serving.variant:Variant._settle", "settle: hand out the outputs"),
    Step("loop", "service.api.connection:Exchange._step", "resume the coroutine"),
    Step("loop", "service.api.open_inference_http:encode_infer", "encode the reply"),
    Step("loop", "service.telemetry.observations:VariantMetrics.request_done", "count the request"),
    Step("loop", "service.api.connection:Connection.reply", "reply: head, body, one write to the socket"),
)


class StopWatch:
    """Seconds in each watched function itself, over all calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.on = False
        self._running = threading.local()

    def watch(self, step: Step) -> None:
        """Put a stop-watch around the function, for good."""
        module_name, _, path = step.function.partition(":")
        owner: Any = import_module(module_name)
        *outer, name = path.split(".")
        for part in outer:
            owner = getattr(owner, part)
        self.seconds[step.function] = 0.0
        setattr(owner, name, self._timed(step.function, getattr(owner, name)))

    def _timed(self, key: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if not self.on:
                return function(*args, **kwargs)
            inner = getattr(self._running, "inner", 0.0)
            self._running.inner = 0.0
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - began
                self.seconds[key] += took - self._running.inner
                self._running.inner = inner + took

        return timed


def drive(network: str, port: int, connections: int, seconds: float, watch: StopWatch) -> Load:
    """Load the service that runs in the main thread, first without the stop-watch; then end it."""
    request = BINARY_V2.request(network, example(network))
    try:
        load(port, request, connections, 2)
        watch.on = True
        return load(port, request, connections, seconds)
    finally:
        watch.on = False
        os.kill(os.getpid(), signal.SIGTERM)


def report(found: Load, watch: StopWatch, title: str) -> Table:
    """Microseconds per request; what is left of the time is uvloop, the kernel, and waiting."""
    table = Table(title=title)
    for column in ("where", "step", "µs per request"):
        table.add_column(column, justify="right" if "µs" in column else "left")
    for step in STEPS:
        table.add_row(step.where, step.what, f"{watch.seconds[step.function] / found.requests * 1e6:.2f}")
    loop = sum(watch.seconds[step.function] for step in STEPS if step.where == "loop")
    table.add_section()
    table.add_row("loop", "sum", f"{loop / found.requests * 1e6:.2f}")
    table.add_row("", "one request, from rate and nothing else", f"{1e6 / found.rate:.2f}")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=SPECS, default="mlp")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--port", type=int, default=8090)
    parser.add_argument("--cache", type=Path, default=CACHE, help="networks and artifacts")
    options = parser.parse_args(arguments)
    from service.__main__ import app

    network = write_network(options.network, options.cache / "networks")
    config = network.with_name(f"{network.stem}-steps.yaml")
    store = (network.parent / "leanserve").resolve()
    lines = (f"base: {{onnx: {network.resolve()}}}", "data: {synthetic: 64}", "variants: [{name: float}]")
    config.write_text("\n".join((*lines, f"cache: {store}", "drain: {delay_s: 0}")) + "\n")
    watch = StopWatch()
    for step in STEPS:
        watch.watch(step)
    found: list[Load] = []

    def measure() -> None:
        _wait_until_it_listens(options.port)
        found.append(drive(options.network, options.port, options.connections, options.seconds, watch))

    threading.Thread(target=measure, daemon=True).start()
    app(["serve", "--config", str(config), "--port", str(options.port)], standalone_mode=False)
    title = f"{options.network} at {options.connections} connections, {found[0].rate:,.0f} requests/s"
    Console().print(report(found[0], watch, title))


def _wait_until_it_listens(port: int) -> None:
    import urllib.error
    import urllib.request

    while True:
        try:
            urllib.request.urlopen(f"http://{HOST}:{port}/readyz", timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
        else:
            return


if __name__ == "__main__":
    main()
