"""What each small policy of the scheduler brings: answers per second with it by those without, in one process.

    python -m loadtest.benchmarks.policies FOLDER [--rounds 6] [--seconds 0.4] [POLICY ...]

Clients in a closed loop call `Variant.predict` itself. Each burns `HTTP_S` of Python before it asks again, in place of
the parsing and writing that a server does on the same thread. A policy is switched on the running variant, so that
backend, lanes, queue and loop are the same with it and without. Networks are kept in FOLDER once made.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import uvloop

from leanserve.contracts import Arrays, ModelSpec, OnnxModel, TensorSpec
from leanserve.runtime.backends.onnx_runtime import OnnxRuntimeBackend
from leanserve.runtime.device import Device
from leanserve.runtime.warm_up import warm_up
from leanserve.serving.batcher import QueueLimits
from leanserve.serving.opening import WarmVariant
from leanserve.serving.variant import Variant
from leanserve.telemetry.observations import VariantFacts, VariantMetrics
from loadtest.peers import network

HTTP_S = 25e-6
"""Python per request on the loop's thread besides the scheduler's own."""
THREADS = 2
"""Of the device, a lane each."""


class Net(NamedTuple):
    """An ONNX file and what it takes."""

    path: Path
    spec: ModelSpec

    def example(self) -> Arrays:
        """One row."""
        return self.spec.example(1, seed=1)


def nets(folder: Path) -> dict[str, Net]:
    """The networks by name; made where they are not there yet."""
    brought = {name: Net(network.write_network(name, folder), network.SPECS[name]) for name in ("mlp", "encoder")}
    made = {"mlp256": _mlp256, "digits": _digits}
    for name, make in made.items():
        brought[name] = make(folder / f"{name}.onnx")
    return brought


def _image_spec(channels: int, size: int, classes: int) -> ModelSpec:
    takes = TensorSpec("x", "float32", (channels, size, size))
    return ModelSpec((takes,), (TensorSpec("y", "float32", (classes,), meaning="logits"),))


def _exported(path: Path, module: object, spec: ModelSpec) -> Net:
    from leanserve.contracts import TorchModel
    from leanserve.passes.toolkit.lowering import export_onnx

    if not path.exists():
        export_onnx(TorchModel(module.eval(), spec), path)  # type: ignore[attr-defined]
    return Net(path, spec)


def _mlp256(path: Path) -> Net:
    from torch import nn

    spec = ModelSpec((TensorSpec("x", "float32", (256,)),), (TensorSpec("y", "float32", (10,)),))
    return _exported(path, nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)), spec)


def _digits(path: Path) -> Net:
    from leanserve_models import digits

    return _exported(path, digits.build(), _image_spec(1, 32, 10))


Switch = Callable[[Variant], Callable[[], None]]
"""Takes a policy away from a variant; the result gives it back."""


class Policy(NamedTuple):
    """What takes it away, and where it is measured: networks and numbers of connections."""

    off: Switch
    networks: tuple[str, str]
    connections: tuple[int, ...] = (1, 32)


def _replaced(target: object, **instead: object) -> Callable[[], None]:
    """Set attributes; the result sets them back."""
    before = {name: getattr(target, name) for name in instead}
    for name, value in instead.items():
        setattr(target, name, value)

    def back() -> None:
        for name, value in before.items():
            setattr(target, name, value)

    return back


def _no_short(variant: Variant) -> Callable[[], None]:
    return _replaced(variant._scheduler._short, borrow=lambda: None)


def _no_gathering(variant: Variant) -> Callable[[], None]:
    scheduler = variant._scheduler
    return _replaced(scheduler, _gather=lambda _: scheduler._begin())


def _no_wide(variant: Variant) -> Callable[[], None]:
    return _replaced(variant.running.device, widen=lambda _: False)


POLICIES = {
    "short batches on the loop": Policy(_no_short, ("mlp", "mlp256"), (1, 8, 32)),
    "gathering turn by turn": Policy(_no_gathering, ("mlp", "digits"), (8, 32)),
    "wide lanes": Policy(_no_wide, ("digits", "encoder")),
}


class Rate(NamedTuple):
    """Answers per second of the clock, and of the process's CPU time, in which other programs have no part."""

    by_clock: float
    by_cpu: float


@contextmanager
def _before_others() -> Iterator[None]:
    """At the least real-time priority, where that is allowed: other programs wait, for the short time of a round."""
    _schedule(os.SCHED_RR, 1)
    try:
        yield
    finally:
        _schedule(os.SCHED_OTHER, 0)


def _schedule(kind: int, priority: int) -> None:
    for task in Path("/proc/self/task").iterdir():
        with suppress(PermissionError, ProcessLookupError):
            os.sched_setscheduler(int(task.name), kind, os.sched_param(priority))


async def _clients(variant: Variant, sample: Arrays, connections: int, seconds: float) -> Rate:
    answered = 0

    async def client() -> None:
        nonlocal answered
        while (now := time.perf_counter()) < end:
            while time.perf_counter() - now < HTTP_S:
                pass
            await variant.predict(sample, lambda: False)
            answered += 1

    with _before_others():
        started, used = time.perf_counter(), time.process_time()
        end = started + seconds
        await asyncio.gather(*(client() for _ in range(connections)))
        return Rate(answered / (time.perf_counter() - started), answered / (time.process_time() - used))


async def _ratios(warm: WarmVariant, policy: Policy, net: Net, rounds: int, seconds: float) -> dict[int, list[Rate]]:
    """By connections: the rates with the policy by those without, round by round."""
    variant, sample = Variant(warm, VariantMetrics("v", VariantFacts())), net.example()
    found: dict[int, list[Rate]] = {}
    for connections in policy.connections:
        ask = partial(_clients, variant, sample, connections)
        await ask(seconds)
        found[connections] = []
        for number in range(rounds):
            rates = {}
            for on in (number % 2 == 0, number % 2 == 1):
                back = None if on else policy.off(variant)
                rates[on] = await ask(seconds)
                if back is not None:
                    back()
                await asyncio.sleep(seconds)  # for others on the machine
            found[connections].append(Rate(*(a / b for a, b in zip(rates[True], rates[False], strict=True))))
    return found


def measure(policy: Policy, net: Net, rounds: int, seconds: float) -> dict[int, list[Rate]]:
    """Warm the network up as the service does, and measure."""
    device = Device("cpu", THREADS, THREADS)
    try:
        with _before_others():
            running = warm_up(
                device, lambda threads: OnnxRuntimeBackend(OnnxModel(net.path, net.spec), threads), net.spec, 32
            )
        knee = running.costs.tables[0].knee
        warm = WarmVariant("v", net.spec, None, running, QueueLimits(knee, 512))  # type: ignore[arg-type]
        return uvloop.run(_ratios(warm, policy, net, rounds, seconds))
    finally:
        device.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row of Markdown per policy, network and number of connections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("policy", nargs="*", default=list(POLICIES))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=0.4)
    given = parser.parse_args(arguments)
    made = nets(given.folder)
    for name in given.policy:
        for network_name in POLICIES[name].networks:
            found = measure(POLICIES[name], made[network_name], given.rounds, given.seconds)
            for connections, ratios in found.items():
                clock, cpu = (_shown(values) for values in zip(*ratios, strict=True))
                print(f"| {name} | {network_name} | {connections} | {clock} | {cpu} |", flush=True)


def _shown(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()
