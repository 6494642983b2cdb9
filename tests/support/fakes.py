"""A base and variants that answer by rule, in a fleet, and a live server over them: what the tests of the API share."""

from __future__ import annotations

import gc
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn

from leanserve.api.access import Access, Key
from leanserve.api.reloading import Reload
from leanserve.api.server import Address, Server, opened_service
from leanserve.api.service import Service
from leanserve.api.tls import TlsFiles
from leanserve.artifacts.manifest import Manifest, Quality, VariantReport
from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.images import ImageCodec
from leanserve.codecs.postprocess.chain import PostChain
from leanserve.config.rewriting import write_traffic
from leanserve.config.schema import ServiceConfig
from leanserve.context import serving_plans, traffic_plan
from leanserve.contracts import Array, Arrays, Base, Codec, Data, Model, ModelSpec, Result, Split, TensorSpec
from leanserve.hardware import this_hardware
from leanserve.runtime.device import Device
from leanserve.serving.fleet import Fleet
from leanserve.serving.opening import WarmFleet
from leanserve.serving.short_batches import SHORT_S
from leanserve.telemetry.startup import Startup
from report_samples import classes

LABELS = ("zero", "one", "two", "three")
SPEC = ModelSpec(
    (TensorSpec("image", "float32", (1, 2, 2)),), (TensorSpec("logits", "float32", (4,), meaning="logits"),), LABELS
)


class PixelBase:
    """A base whose answer is the position of the brightest of four pixels."""

    name = "pixels"
    spec = SPEC
    codec: Codec = ImageCodec(mode="L", size=(2, 2), mean=(0.0,), std=(1.0,), answers=AnswerEncoder(SPEC))
    digest = "0"
    origin = "pixels"
    caveats = ()
    unit = 1
    scored_as = "accuracy"
    score_digest = ""

    def codec_for(self, spec: ModelSpec) -> Codec:
        return self.codec

    def model(self) -> Model:
        raise NotImplementedError

    def build(self) -> object:
        raise NotImplementedError

    def data(self, split: Split, n: int | None = None, spec: ModelSpec | None = None) -> Data:
        raise NotImplementedError

    def score(self, outputs: Arrays, labels: Array) -> float:
        raise NotImplementedError


class PixelBackend:
    name = "pixel"
    self_contained = False
    device = "cpu"
    row_buckets: tuple[int, ...] = ()

    def __init__(self, *, broken: bool = False, gate: threading.Event | None = None) -> None:
        self.broken = broken
        self.gate = gate
        self.waits = False
        self.ran = 0
        self.closed = False

    def run(self, batch: Arrays) -> Result:
        if self.gate is not None:
            self.waits = not self.gate.is_set()
            assert self.gate.wait(20)
            time.sleep(2 * SHORT_S)  # work for a lane: the event loop must not wait at the gate
            self.waits = False
            self.ran += len(batch[0])
        if self.broken and batch[0].max() == 1.0:
            raise RuntimeError("secret detail")
        return Result((batch[0].reshape(len(batch[0]), 4) * 10,))

    def close(self) -> None:
        self.closed = True


def report(name: str, reason: str | None = None, spec: ModelSpec = SPEC) -> VariantReport:
    quality = Quality(
        samples=10,
        score=1.0,
        score_low=0.7,
        score_high=1.0,
        agreement=1.0,
        drop=0.0,
        drop_low=-0.1,
        drop_high=0.1,
        outputs=(classes(1.0),),
        batch_dependence=0.0,
        disk_bytes=10,
        parameters=1,
        macs=1,
        latency_ms={1: 1.0},
        throughput=1000.0,
        speedup=1.0,
        speedup_low=1.0,
        speedup_high=1.0,
        rounds=7,
        waited=0.0,
        peak_memory_bytes=1,
    )
    manifest = Manifest(
        key=name,
        parents=(),
        base="pixels",
        kind=None,
        options={},
        decisions={},
        facts={},
        simulated=False,
        format="torch",
        spec=spec,
        files={},
        parameters=1,
        macs=1,
        seconds=0.0,
        versions={},
        hardware=this_hardware(),
        quality=quality,
        cpu="x",
        threads=1,
    )
    return VariantReport(name=name, state="excluded" if reason else "serving", reason=reason, ancestry=(manifest,))


POOR = "score 0.5 is 0.5 below the base's"
CONFIG = {
    "base": "pixels",
    "variants": [{"name": "a"}, {"name": "b"}, {"name": "broken"}, {"name": "held"}, {"name": "poor"}],
    "traffic": {"weights": {"a": 1, "b": 1}},
    "drain": {"delay_s": 0, "timeout_s": 5},
}


@dataclass(frozen=True)
class Opened:
    """The start of a service whose variants are open already."""

    config: ServiceConfig
    warm: WarmFleet
    startup: Startup = field(default_factory=lambda: Startup(()))

    def run(self) -> WarmFleet:
        return self.warm

    experiments: Path | None = None
    file: Path | None = None
    """That of the config."""

    def stop(self) -> None: ...

    def write_traffic(self, weights: Mapping[str, float], caps: Mapping[str, float]) -> None:
        if self.file is None:
            raise FileNotFoundError("this fleet was made without a config file")
        write_traffic(self.file, weights, caps)

    def reload(self, current: ServiceConfig, base: Base) -> Reload:
        raise NotImplementedError

    def service(self) -> Service:
        """On the running loop."""
        return opened_service(self.warm, self.config, Access(local=True), self)


def planned(config: ServiceConfig, base: object, device: Device, excluded: Mapping[str, str] = {}) -> Opened:
    """All variants of a config, with nothing open yet; some are excluded for a reason."""
    spec: ModelSpec = base.spec  # type: ignore[attr-defined]
    reports = [report(item.name, excluded.get(item.name), spec) for item in config.variants]
    plans = serving_plans(config, reports)
    post = PostChain(config.postprocess, spec, Path())
    return Opened(config, WarmFleet(base, plans, device, traffic_plan(config), post))  # type: ignore[arg-type]


def open_variants(gate: threading.Event, spec: ModelSpec = SPEC, **changes: Any) -> Opened:
    """`a`, `b` answer, `broken` fails on rows with a 1, `held` waits for the gate to open, `poor` is excluded."""
    config = ServiceConfig.model_validate(CONFIG | changes)
    base = PixelBase()
    base.spec = spec
    opened = planned(config, base, Device("cpu", 1), {"poor": POOR})
    for item in config.variants:
        if item.name != "poor":
            backend = PixelBackend(broken=item.name == "broken", gate=gate if item.name == "held" else None)
            opened.warm.open(item.name, lambda threads, backend=backend: backend)  # type: ignore[misc]
    return opened


@dataclass(frozen=True)
class Live:
    """A server that listens; `gate` stops and frees the variant `held`."""

    service: Service
    gate: threading.Event
    http: str
    grpc: str
    server: uvicorn.Server

    @property
    def fleet(self) -> Fleet:
        return self.service.fleet

    @property
    def host_and_port(self) -> tuple[str, int]:
        host, _, port = self.http.rpartition(":")
        return host, int(port)


@contextmanager
def live_server(
    spec: ModelSpec = SPEC, keys: Sequence[Key] = (), tls: TlsFiles | None = None, **changes: Any
) -> Iterator[Live]:
    """HTTP and gRPC on free ports, served from a thread."""
    gate = threading.Event()
    gate.set()
    with serving(open_variants(gate, spec, **changes), gate, keys, tls) as live:
        yield live


@contextmanager
def serving(
    opened: Opened, gate: threading.Event, keys: Sequence[Key] = (), tls: TlsFiles | None = None
) -> Iterator[Live]:
    """A live server over any variants; the gate is opened and the fleet closed at the end."""
    listening = socket.create_server(("127.0.0.1", 0))
    grpc_port = _free_port()
    server = Server(opened.config, Address(listening, ("127.0.0.1", grpc_port), tls), opened, keys=keys)
    thread = threading.Thread(target=server.run, args=([listening],))
    collector = gc.get_threshold()
    thread.start()
    try:
        for _ in range(1000):
            if server.service is not None:
                break
            assert thread.is_alive()
            time.sleep(0.01)
        service = server.service
        assert service is not None
        yield Live(service, gate, f"127.0.0.1:{listening.getsockname()[1]}", f"127.0.0.1:{grpc_port}", server)
    finally:
        gate.set()
        server.should_exit = True
        thread.join()
        (server.service.fleet if server.service else opened.warm).close()
        listening.close()
        gc.unfreeze()  # a server sets the collector for a process of its own
        gc.set_threshold(*collector)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
