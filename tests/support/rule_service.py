"""A server process over scripted variants (`rule_fleet.py`), and what can be seen of it from outside."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from raw_http import ask, infer_request
from rules import CENSUS, COUNTED, HOLD, row

EVERY_REQUEST_ITS_OWN = httpx.Limits(max_keepalive_connections=0)
"""So that looking at the service leaves no connection behind."""
HERE = Path(__file__).parent
ESTABLISHED, CLOSE_WAIT = "01", "08"
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the process table of Linux")


@dataclass(frozen=True)
class RuleService:
    """A server process that is ready."""

    process: subprocess.Popen[str]
    port: int
    grpc_port: int
    folder: Path
    http: httpx.Client

    def get(self, path: str) -> Any:
        """The parsed reply of a GET."""
        return self.http.get(path).raise_for_status().json()

    def metric(self, name: str, **labels: str) -> float:
        """The sum of the samples of that name that carry these labels."""
        page = self.http.get("/metrics").text
        samples = [sample for family in text_string_to_metric_families(page) for sample in family.samples]
        return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())

    def executed(self, variant: str = "rule") -> tuple[int, int]:
        """Rows and batches executed so far."""
        labels = {"version": variant}
        return int(self.metric("nv_inference_count", **labels)), int(self.metric("nv_inference_exec_count", **labels))

    def descriptors(self) -> int:
        """Open files of the process, connections of which it knows that they have ended left out."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def left(self) -> int:
        """Requests to `rule` so far whose clients left."""
        return int(self.metric("leanserve_requests_total", version="rule", outcome="client_gone"))

    def queued(self) -> int:
        """Rows in all queues now."""
        return int(self.metric("leanserve_queue_rows"))

    def most_rows(self, variant: str = "rule") -> int:
        """How many rows a batch may have: the measured knee."""
        return next(int(item["batch_rows"]) for item in self.get("/v1/variants")["variants"] if item["name"] == variant)

    def rss(self) -> int:
        """Resident bytes of the process."""
        pages = int(self._proc("statm").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def cpu_s(self) -> float:
        """CPU seconds of all threads of the process so far."""
        user, system = self._proc("stat").rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

    def connections(self) -> int:
        """Open connections to the service, also those that the client has closed and the service has not."""
        lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        here = f":{self.port:04X}"
        return sum(local.endswith(here) and state in {ESTABLISHED, CLOSE_WAIT} for _, local, _, state, *_ in lines)

    def census(self) -> dict[str, int]:
        """What the process holds for requests, this question included; asked twice, for then its head is known."""
        for _ in range(2):
            reply = asyncio.run(ask(self.port, infer_request("rule", row(CENSUS))))
        return dict(zip(COUNTED, map(int, reply.outputs()), strict=False))

    def _proc(self, name: str) -> str:
        return Path(f"/proc/{self.process.pid}/{name}").read_text()

    @asynccontextmanager
    async def busy(self) -> AsyncIterator[None]:
        """The device runs one row of `rule` until the block ends."""
        gate = self.folder / "gate"
        gate.touch()
        try:
            first = asyncio.create_task(ask(self.port, infer_request("rule", row(HOLD))))
            await until((self.folder / "holding").exists)
            yield
        finally:
            gate.unlink()
        assert (await first).status == 200


async def until(happened: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for something that the server process does."""
    give_up = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < give_up
        await asyncio.sleep(0.005)


@contextmanager
def serving(
    folder: Path, *variants: str, exit_status: int = 0, program: str = "rule_fleet.py", **config: Any
) -> Iterator[RuleService]:
    """Start a server process over these variants and stop it with SIGTERM, by which it must end with this status."""
    folder.mkdir(exist_ok=True)
    port, grpc_port = _free_port(), _free_port()
    named = {"base": "rules", "variants": [{"name": name} for name in variants], "drain": {"delay_s": 0}}
    command = [
        sys.executable,
        str(HERE / program),
        str(folder),
        str(port),
        str(grpc_port),
        json.dumps(named | config),
    ]
    # The scripted base comes from the tests of the API, the service from the same checkout as this test.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (HERE, *sys.path)))}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, text=True, env=environment)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20, limits=EVERY_REQUEST_ITS_OWN) as http:
            service = RuleService(process, port, grpc_port, folder, http)
            _wait_until_ready(service)
            yield service
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == exit_status
    finally:
        process.kill()
        process.wait()


def _wait_until_ready(service: RuleService) -> None:
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up and service.process.poll() is None:
        try:
            service.get("/readyz")
        except httpx.HTTPError:
            time.sleep(0.05)
        else:
            return
    pytest.fail(f"the service did not become ready:\n{(service.folder / 'log').read_text()}")


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])
