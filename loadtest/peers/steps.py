"""Microseconds per step of a request, measured in the service itself while it serves.

    python -m loadtest.peers.steps --network mlp --connections 32 --seconds 5

Serves in this process as `leanserve serve` does, with a stop-watch around the functions that a request passes, and
loads it with wrk. Every function is charged with its thread's CPU time in itself, without that in others that are
watched, and without what the stop-watches cost, which is measured first. They cost more than that, for they empty the
caches; so there is a load without them before, and all steps are scaled down to what the loop's thread took then.
Neither waiting nor other work on the machine is in the numbers. What is not watched is shown as the rest of the thread:
uvloop and the kernel, reading from sockets above all.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from loadtest.peers.compare import CACHE, WIDTH
from loadtest.peers.network import SPECS, example, write_network
from loadtest.peers.process import HOST
from loadtest.peers.roster import BINARY_V2
from loadtest.peers.wrk import Load, load


class Step(NamedTuple):
    """A function `module:name` that requests pass, and what it does there."""

    function: str
    what: str


STEPS = (
    Step("leanserve.http.connection:Connection.data_received", "head known, body cut off, coroutine begun"),
    Step("leanserve.serving.fleet:Fleet.choose", "choose the variant"),
    Step("leanserve.codecs.open_inference:InferDecoder.decode", "decode and check: plan known, views"),
    Step("leanserve.serving.variant:Variant._admit", "admit: predicted wait against the deadline"),
    Step("leanserve.serving.variant:Variant._ticket", "ticket: future, deadline, whether the client is gone"),
    Step("leanserve.serving.batcher:Batcher.offer", "offer: into the queue"),
    Step("leanserve.serving.scheduler:Scheduler.offered", "see to it that the queue is run"),
    Step("leanserve.serving.batcher:Batcher.take", "take: form the batch"),
    Step("leanserve.serving.batch_runner:join", "join: one copy"),
    Step("leanserve.runtime.backends.onnx_runtime:OnnxRuntimeBackend.run", "run the model"),
    Step("leanserve.serving.batch_runner:split", "split: views"),
    Step("leanserve.serving.deferred_metrics:DeferredMetrics.add", "count the batch"),
    Step("leanserve.serving.variant:Variant._settle", "settle: hand out the outputs"),
    Step("leanserve.http.connection:Exchange._step", "coroutines: all between the steps here"),
    Step("leanserve.api.v2.rest:encode_infer", "encode the reply"),
    Step("leanserve.telemetry.observations:VariantMetrics.request_done", "count the request"),
    Step("leanserve.http.connection:Connection.reply", "reply: head, body, one write to the socket"),
)


class StopWatch:
    """CPU seconds in each watched function itself, over all calls, and how many calls there were.

    The loop runs in the main thread; a short batch is run there, too, others on a lane.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.calls: Counter[str] = Counter()
        self.calls_on_loop: Counter[str] = Counter()
        self.on = False
        self._running = threading.local()
        self._own_s = self._outside_s = 0.0
        self._calibrate()

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
            began = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                took = time.thread_time() - began
                self.calls[key] += 1
                self.calls_on_loop[key] += threading.current_thread() is threading.main_thread()
                self.seconds[key] += took - self._running.inner - self._own_s
                self._running.inner = inner + took + self._outside_s

        return timed

    def _calibrate(self, calls: int = 20_000) -> None:
        """What watching costs: within the time that is taken, and outside it, with which the caller is charged."""
        self.seconds["nothing"] = 0.0
        nothing = self._timed("nothing", lambda: None)
        self.on = True
        began = time.thread_time()
        for _ in range(calls):
            nothing()
        spent = time.thread_time() - began
        self.on = False
        self._own_s = self.seconds.pop("nothing") / calls
        self._outside_s = spent / calls - self._own_s

    def cost_s(self, functions: Iterable[str]) -> float:
        """What watching these functions has cost so far."""
        return sum(self.calls[function] for function in functions) * (self._own_s + self._outside_s)


class Driven(NamedTuple):
    """A load, and the CPU seconds that the thread of the event loop took for it."""

    load: Load
    loop_s: float


def drive(network: str, port: int, connections: int, seconds: float, watch: StopWatch) -> tuple[Driven, Driven]:
    """Load the service that runs in the main thread, without the stop-watch and with it; then end it."""
    request = BINARY_V2.request(network, example(network))
    clock = time.pthread_getcpuclockid(threading.main_thread().ident or 0)

    def driven() -> Driven:
        before = time.clock_gettime(clock)
        found = load(port, request, connections, seconds)
        return Driven(found, time.clock_gettime(clock) - before)

    try:
        load(port, request, connections, 2)
        plain = driven()
        watch.on = True
        return plain, driven()
    finally:
        watch.on = False
        os.kill(os.getpid(), signal.SIGTERM)


def report(plain: Driven, watched: Driven, watch: StopWatch, title: str) -> Table:
    """Microseconds per request."""
    table = Table(title=title)
    for column in ("where", "step", "µs per request"):
        table.add_column(column, justify="right" if "µs" in column else "left")
    on_loop = [step.function for step in STEPS if 2 * watch.calls_on_loop[step.function] > watch.calls[step.function]]
    all_us = plain.loop_s / plain.load.requests * 1e6
    own_s = watched.loop_s - watch.cost_s(on_loop)
    us = {function: seconds / own_s * all_us for function, seconds in watch.seconds.items()}
    for step in STEPS:
        where = "loop" if step.function in on_loop else "lane"
        table.add_row(where, step.what, f"{us[step.function]:.1f}")
    table.add_row("loop", "rest: uvloop, reading, polling", f"{all_us - sum(us[step] for step in on_loop):.1f}")
    table.add_section()
    table.add_row("loop", "all", f"{all_us:.1f}")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=SPECS, default="mlp")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--port", type=int, default=8090)
    parser.add_argument("--cache", type=Path, default=CACHE, help="networks and artifacts")
    options = parser.parse_args(arguments)
    from leanserve.__main__ import app

    network = write_network(options.network, options.cache / "networks")
    config = network.with_name(f"{network.stem}-steps.yaml")
    store = (network.parent / "leanserve").resolve()
    lines = (f"base: {{onnx: {network.resolve()}}}", "data: {synthetic: 64}", "variants: [{name: float}]")
    config.write_text("\n".join((*lines, f"cache: {store}", "drain: {delay_s: 0}")) + "\n")
    watch = StopWatch()
    for step in STEPS:
        watch.watch(step)
    found: list[tuple[Driven, Driven]] = []

    def measure() -> None:
        _wait_until_it_listens(options.port)
        found.append(drive(options.network, options.port, options.connections, options.seconds, watch))

    threading.Thread(target=measure, daemon=True).start()
    app(["serve", "--config", str(config), "--port", str(options.port)], standalone_mode=False)
    ((plain, watched),) = found
    title = f"{options.network} at {options.connections} connections, {plain.load.rate:,.0f} requests/s"
    Console(width=WIDTH).print(report(plain, watched, watch, title))


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
