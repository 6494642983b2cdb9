"""A variant between a real event loop and a real device, with a backend that does as it is told."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable

import numpy as np

from leanserve.contracts import Arrays, Decoded, Json, ModelSpec, Result, TensorSpec, Weighed
from leanserve.runtime.costs import Costs, CostTable
from leanserve.runtime.device import Device
from leanserve.runtime.lanes import LoadedVariant
from leanserve.serving.batch_runner import Prediction
from leanserve.serving.batcher import QueueLimits
from leanserve.serving.company import company_by
from leanserve.serving.opening import WarmVariant
from leanserve.serving.variant import Variant
from leanserve.telemetry.observations import VariantFacts, VariantMetrics

SPEC = ModelSpec((TensorSpec("x", "float32", (2,)),), (TensorSpec("y", "float32", (2,)),))


class ScriptedBackend:
    """Doubles its input; waits at a gate, refuses batches with a negative value, remembers the rows it ran."""

    name = "scripted"
    self_contained = False
    device = "cpu"

    def __init__(self, row_buckets: tuple[int, ...] = ()) -> None:
        self.row_buckets = row_buckets
        self.gate = threading.Event()
        self.gate.set()
        self.started = threading.Event()
        self.ran: list[int] = []

    def run(self, batch: Arrays) -> Result:
        self.started.set()
        assert self.gate.wait(10)
        if (batch[0] < 0).any():
            raise ValueError("negative")
        self.ran.append(len(batch[0]))
        return Result((batch[0] * 2,))

    def close(self) -> None: ...


class NoCodec:
    """Of a variant that is asked with arrays."""

    media_types = ()

    def prepare(self, media_type: str, body: bytes) -> Weighed[Decoded]:
        raise NotImplementedError

    def decode(self, media_type: str, body: bytes) -> Decoded:
        raise NotImplementedError

    def encode(self, outputs: Arrays, most: int | None = None) -> list[dict[str, Json]]:
        raise NotImplementedError


class Slow(ScriptedBackend):
    """Takes so many seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    def run(self, batch: Arrays) -> Result:
        time.sleep(self.seconds)
        return super().run(batch)


def sample(value: float, rows: int = 1) -> Arrays:
    return (np.full((rows, 2), value, np.float32),)


def stay() -> bool:
    return False


Scenario = Callable[[Variant, ScriptedBackend], Awaitable[None]]


def play(
    scenario: Scenario,
    limits: QueueLimits,
    backend: ScriptedBackend | None = None,
    seconds: float | Callable[[int], float] = 0.001,
    lanes: int = 1,
) -> Variant:
    """Run a scenario against a variant whose batches are believed to cost `seconds`; all lanes share the backend."""
    backend = backend or ScriptedBackend()
    device = Device("test", lanes, lanes)
    sizes = (1, 2, limits.max_rows)
    costs = Costs([CostTable({rows: seconds(rows) if callable(seconds) else seconds for rows in sizes})])
    warm = warm_variant(LoadedVariant(device, (backend,) * lanes, costs), limits)
    return act(warm, lambda variant: scenario(variant, backend), backend.gate)


def warm_variant(running: LoadedVariant, limits: QueueLimits, name: str = "v", spec: ModelSpec = SPEC) -> WarmVariant:
    return WarmVariant(name, spec, NoCodec(), running, limits, company_by(spec, trusts_rows=True))


def act(warm: WarmVariant, scene: Callable[[Variant], Awaitable[None]], *gates: threading.Event) -> Variant:
    """Serve a variant on a loop and act there for at most 20 s; then the gates are opened and its device is closed."""

    async def body() -> Variant:
        variant = Variant(warm, VariantMetrics("v", VariantFacts()))
        await scene(variant)
        await asyncio.sleep(0)
        variant.metrics.catch_up()
        return variant

    try:
        return asyncio.run(asyncio.wait_for(body(), 20))
    finally:
        for gate in gates:
            gate.set()
        warm.running.device.close()


async def hold(variant: Variant, backend: ScriptedBackend) -> asyncio.Task[Prediction]:
    """Keep the device busy with one request until the gate is opened."""
    backend.gate.clear()
    task = asyncio.create_task(variant.predict(sample(100), stay))
    await asyncio.to_thread(backend.started.wait, 5)
    return task
