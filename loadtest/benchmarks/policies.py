"""What each small policy of the scheduler brings: answers per second with it by those without, in one process.

    python -m loadtest.benchmarks.policies FOLDER [--rounds 8] [--seconds 0.5] [POLICY ...]

Clients in a closed loop call `Variant.predict` itself. Each burns `HTTP_S` of Python before it asks again, in place of
the parsing and writing that a server does on the same thread. A policy is switched on the running variant, so that
backend, lanes, queue and loop are the same with it and without. Networks are kept in FOLDER once made.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
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
from loadtest.peers.quiet import CORES, busy_s

HTTP_S = 25e-6
"""Python per request on the loop's thread besides the scheduler's own."""
DISTURBED, TRIES = 0.1, 5
"""Rounds in which others took more of the cores are done again, this many times as many in all; the quietest count."""
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


def _no_cohort(variant: Variant) -> Callable[[], None]:
    return _replaced(variant._scheduler._cohort, pause=lambda *_: 0.0)


def _no_wide(variant: Variant) -> Callable[[], None]:
    return _replaced(variant.running.device, widen=lambda _: False)


def _no_portion(variant: Variant) -> Callable[[], None]:
    return _replaced(variant._scheduler._idle, portion=None)


class _Oldest(list):  # type: ignore[type-arg]
    def pop(self, _: int = 0) -> object:  # type: ignore[override]
        return super().pop(0)


def _no_last_lane(variant: Variant) -> Callable[[], None]:
    device = variant.running.device
    with device._handing:
        back = list(device._idle)
        device._idle = _Oldest(back)

    def again() -> None:
        with device._handing:
            device._idle = list(device._idle)

    return again


POLICIES = {
    "short batches on the loop": Policy(_no_short, ("mlp", "mlp256"), (1, 8, 32)),
    "gathering turn by turn": Policy(_no_gathering, ("mlp", "digits"), (8, 32)),
    "cohort": Policy(_no_cohort, ("digits", "encoder"), (8, 32)),
    "wide lanes": Policy(_no_wide, ("digits", "encoder")),
    "sharing among idle lanes": Policy(_no_portion, ("digits", "encoder"), (8, 32)),
    "the lane that was last at work": Policy(_no_last_lane, ("digits", "encoder")),
}


async def _clients(variant: Variant, sample: Arrays, connections: int, seconds: float) -> float:
    """Answers per second."""
    end = time.perf_counter() + seconds
    answered = 0

    async def client() -> None:
        nonlocal answered
        while (now := time.perf_counter()) < end:
            while time.perf_counter() - now < HTTP_S:
                pass
            await variant.predict(sample, lambda: False)
            answered += 1

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(connections)))
    return answered / (time.perf_counter() - started)


async def _ratios(warm: WarmVariant, policy: Policy, net: Net, rounds: int, seconds: float) -> dict[int, list[float]]:
    """By connections: the rate with the policy by the rate without, round by round."""
    variant, sample = Variant(warm, VariantMetrics("v", VariantFacts())), net.example()
    found: dict[int, list[float]] = {}
    for connections in policy.connections:
        ask = partial(_clients, variant, sample, connections)
        await ask(0.3)
        quiet, disturbed = list[tuple[float, float]](), list[tuple[float, float]]()
        for number in range(TRIES * rounds):
            rates, others = {}, _Others()
            for on in (number % 2 == 0, number % 2 == 1):
                back = None if on else policy.off(variant)
                rates[on] = await ask(seconds)
                if back is not None:
                    back()
            taken = others.share()
            (quiet if taken <= DISTURBED else disturbed).append((taken, rates[True] / rates[False]))
            if len(quiet) == rounds:
                break
        kept = sorted(quiet + sorted(disturbed)[: rounds - len(quiet)])
        found[connections] = [ratio for _, ratio in kept]
    return found


class _Others:
    """What other processes take of the cores, from now on."""

    def __init__(self) -> None:
        self._began, self._busy, self._own = time.perf_counter(), busy_s(), time.process_time()

    def share(self) -> float:
        """0..1 so far."""
        taken = busy_s() - self._busy - (time.process_time() - self._own)
        return taken / (time.perf_counter() - self._began) / CORES


def measure(policy: Policy, net: Net, rounds: int, seconds: float) -> dict[int, list[float]]:
    """Warm the network up as the service does, and measure."""
    device = Device("cpu", THREADS, THREADS)
    try:
        running = warm_up(
            device, lambda threads: OnnxRuntimeBackend(OnnxModel(net.path, net.spec), threads), net.spec, 32
        )
        knee = running.costs.tables[0].knee
        warm = WarmVariant("v", net.spec, None, running, QueueLimits(knee, 512))  # type: ignore[arg-type]
        return uvloop.run(_ratios(warm, policy, net, rounds, seconds))
    finally:
        device.close()


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row of Markdown per policy and network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("policy", nargs="*", default=list(POLICIES))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.5)
    given = parser.parse_args(arguments)
    made = nets(given.folder)
    for name in given.policy:
        for network_name in POLICIES[name].networks:
            found = measure(POLICIES[name], made[network_name], given.rounds, given.seconds)
            shown = ", ".join(
                f"{connections}: {statistics.median(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})"
                for connections, ratios in found.items()
            )
            print(f"| {name} | {network_name} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
