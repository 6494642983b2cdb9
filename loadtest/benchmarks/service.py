"""A real `leanserve serve` over a network of the comparisons, with a config that a benchmark writes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import yaml

from leanserve.contracts import Array, Json
from loadtest.peers.network import write_network
from loadtest.peers.process import HOST, ROOT
from loadtest.peers.roster import BINARY_V2, Request

READY_S = 600.0


class BenchmarkService(NamedTuple):
    """A server that is ready; its log is beside its config."""

    network: str
    port: int
    process: subprocess.Popen[bytes]
    config: Path

    def request(self, variant: str, rows: Array) -> Request:
        """A prediction by that variant; an empty name leaves the choice to the traffic split."""
        made = BINARY_V2.request(self.network, rows)
        version = f"/versions/{variant}" if variant else ""
        return made._replace(path=f"/v2/models/{self.network}{version}/infer")

    def settings(self) -> Json:
        """What its config says now."""
        return yaml.safe_load(self.config.read_text())

    @property
    def log(self) -> str:
        """What the server has written so far."""
        return self.config.with_suffix(".log").read_text()


@contextmanager
def service_over(network: str, cache: Path, **config: Json) -> Iterator[BenchmarkService]:
    """Serve a network of `loadtest.peers.network` with these keys of the config, until the block ends."""
    path = write_network(network, cache).resolve()
    file = cache.resolve() / f"{network}-benchmark.yaml"
    base = {"base": {"onnx": str(path)}, "data": {"synthetic": 64}, "cache": str(cache.resolve() / "leanserve")}
    write_config(file, base | {"drain": {"delay_s": 0}} | config)
    with socket.create_server((HOST, 0)) as free:
        port = int(free.getsockname()[1])
    command = [sys.executable, "-m", "leanserve", "serve", "--config", str(file), "--port", str(port)]
    with file.with_suffix(".log").open("w") as log:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT / "service"), str(ROOT / "models")))}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        running = BenchmarkService(network, port, process, file)
        _wait_until_ready(running)
        yield running
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def write_config(file: Path, config: Json) -> None:
    """The config as YAML, replaced in one step."""
    unfinished = file.with_suffix(".part")
    unfinished.write_text(yaml.safe_dump(config, sort_keys=False))
    unfinished.rename(file)


def _wait_until_ready(service: BenchmarkService) -> None:
    give_up = time.monotonic() + READY_S
    while time.monotonic() < give_up and service.process.poll() is None:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{service.port}/readyz", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.2)
    raise SystemExit(f"the service did not become ready:\n{service.log[-2000:]}")
