"""A service whose variants differ from the base in one thing each, for the tests of experiments on live traffic."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from fakes import PixelBase, planned
from leanserve.api.app import create_app
from leanserve.api.routes import HotPath
from leanserve.api.service import Service
from leanserve.config.schema import ServiceConfig
from leanserve.contracts import Arrays, Json, Result
from leanserve.runtime.device import Device

QUICK = {
    "shadow_time": 1.0,
    "limits": {"min_agreement": 0.8, "max_failures": 0.1, "max_broken": 0.05, "quantile": 0.5, "max_slowdown": 2.0},
    "ramp": {"stages": [0.5, 1.0], "min_stage_s": 0.0},
}
"""Limits so wide that some dozens of requests decide."""
LOOK_S = 0.1
INFER = "/v2/models/pixels/infer"


@dataclass
class Arm:
    """A backend that answers with the brightest pixel."""

    seconds: float = 0.0002
    wrong: float = 0.0
    """Share of its rows that it answers otherwise."""
    nan: float = 0.0
    fails: float = 0.0
    """Share of its batches."""
    name: str = "arm"
    device: str = "cpu"
    self_contained: bool = False
    row_buckets: tuple[int, ...] = ()
    ran: int = 0
    is_warm: bool = False
    """Before that it does nothing wrong."""

    def run(self, batch: Arrays) -> Result:
        rows = len(batch[0])
        until = time.perf_counter() + self.seconds
        while time.perf_counter() < until:
            pass
        self.ran += rows
        dice = np.random.default_rng(self.ran).random(rows)
        answers = batch[0].reshape(rows, 4) * 10
        if not self.is_warm:
            return Result((answers,))
        if dice[0] < self.fails:
            raise RuntimeError("does not run")
        answers[dice < self.wrong] = answers[dice < self.wrong][:, ::-1]
        answers[dice < self.nan] = np.nan
        return Result((answers,))

    def close(self) -> None: ...


@dataclass(frozen=True)
class Arms:
    """A service at work, asked in its own process."""

    service: Service
    app: HotPath
    client: httpx.AsyncClient
    backends: Mapping[str, Arm]

    async def ask(self, **headers: str) -> httpx.Response:
        """One image, whose brightest pixel is another one each time."""
        pixels = np.roll([1.0, 0.1, 0.2, 0.3], sum(backend.ran for backend in self.backends.values()) % 4)
        tensor = {"name": "image", "shape": [1, 1, 2, 2], "datatype": "FP32", "data": pixels.tolist()}
        return await self.client.post(INFER, json={"inputs": [tensor]}, headers=headers)

    async def verb(self, method: str, path: str, body: Json = None) -> httpx.Response:
        headers = {"content-type": "application/json"}
        return await self.client.request(method, f"/v1/experiment{path}", json=body or {}, headers=headers)

    async def experiment(self) -> Json:
        return (await self.client.get("/v1/experiment")).json()["experiment"]

    async def until_over(self) -> Json:
        """Ask, a few at a time, until the experiment has ended; `play` waits for no scene for ever."""
        while self.service.experiments.running is not None:
            await asyncio.gather(*(self.ask() for _ in range(2)))
            await asyncio.sleep(0.008)
        return await self.experiment()


Scene = Callable[[Arms], Awaitable[None]]


def play(scene: Scene, backends: Mapping[str, Arm], store: Path | None = None, **changes: Any) -> None:
    """Act on a service of these variants, the base first."""

    async def body() -> None:
        async with opened(backends, store, **changes) as arms:
            await asyncio.wait_for(scene(arms), 60)

    asyncio.run(body())


@asynccontextmanager
async def opened(backends: Mapping[str, Arm], store: Path | None, **changes: Any) -> AsyncIterator[Arms]:
    names = [{"name": name} for name in backends]
    config = ServiceConfig.model_validate({"base": "pixels", "variants": names, "experiment": QUICK} | changes)
    start = replace(
        planned(config, PixelBase(), Device("cpu", 1)),
        experiments=store,
        file=None if store is None else store.with_name("config.yaml"),
    )
    for name, backend in backends.items():
        start.warm.open(name, lambda threads, backend=backend: backend)  # type: ignore[misc]
        backend.is_warm = True
    service = start.service()
    app = create_app(service)
    transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            yield Arms(service, app, client, backends)
    finally:
        await service.experiments.close()
        service.fleet.close()
