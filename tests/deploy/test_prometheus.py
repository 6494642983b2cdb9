"""Every panel and rule shows something: a real Prometheus scrapes a real service under load, and is asked for all.

What only a GPU or a readable RAPL can tell comes from a second target, a page of our metrics on a machine with both.
"""

from __future__ import annotations

import http.server
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import numpy as np
import onnxruntime as ort
import pytest
import yaml

from fake_hardware import FakeNvml, busy_gpu, processor
from leanserve.contracts import Array
from leanserve.telemetry.hardware_metrics import Sources
from leanserve.telemetry.metrics import Metrics
from leanserve.telemetry.observations import VariantFacts
from tiny_graphs import CNN, CNN_WEIGHTS, graph

ROOT = Path(__file__).parents[2]
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
PROMETHEUS = shutil.which("prometheus", path=PATH)
pytestmark = pytest.mark.skipif(
    PROMETHEUS is None, reason="no Prometheus on the PATH; `make prometheus` gets it on Debian"
)
CONFIG = """\
base: {onnx: tiny.onnx, labels: [one, two, three]}
data: {arrays: rows.npz, labels: label}
variants:
  - name: base
  - name: int8
    passes: [{kind: quantize_static}, {kind: onnxruntime}]
  - name: poor # eight bits are not exact
    passes: [{kind: quantize_static}]
    gate: {min_agreement: 1.0, on_fail: exclude}
hardware: {price_per_hour: 0.5}
"""
COMPARISON = re.compile(r" (?:==|>) [\d.]+")
"""What makes an alert of an expression; without it there is always something to show."""


def panels() -> list[tuple[str, str]]:
    dashboard = json.loads((ROOT / "deploy/grafana/dashboards/variants.json").read_text())
    found = [(panel["title"], target["expr"]) for panel in dashboard["panels"] for target in panel["targets"]]
    values = {"$__rate_interval": "10s", "$model": ".*", "$version": ".*"}
    for name, value in values.items():
        found = [(title, expression.replace(name, value)) for title, expression in found]
    return found


def rules() -> list[tuple[str, str]]:
    groups = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())["groups"]
    every = [rule for group in groups for rule in group["rules"]]
    return [(rule.get("record") or rule["alert"], COMPARISON.sub("", rule["expr"])) for rule in every]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextmanager
def process(*command: str, cwd: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (cwd / "log").open("wb") as log:
        running = subprocess.Popen(command, cwd=cwd, stdout=log, stderr=log)
    try:
        yield running
    finally:
        running.terminate()
        running.wait(20)


def wait_for(url: str, running: subprocess.Popen[bytes], folder: Path, within: float) -> None:
    until = time.monotonic() + within
    while time.monotonic() < until and running.poll() is None:
        try:
            if httpx.get(url).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    pytest.fail(f"{url} is not there:\n{(folder / 'log').read_text()}")


def undecided(images: Array) -> bytes:
    """An ONNX file whose classes are so close for these images that eight bits change some answers."""
    text = CNN.format(batch="n", reshape="0")
    session = ort.InferenceSession(graph(text, CNN_WEIGHTS).SerializeToString())
    mean = np.asarray(session.run(None, {"img": images})[0]).mean(axis=0)
    return bytes(graph(text, CNN_WEIGHTS | {"bias": CNN_WEIGHTS["bias"] - mean}).SerializeToString())


@contextmanager
def service(folder: Path) -> Iterator[str]:
    """`leanserve serve` of a small ONNX file."""
    random = np.random.default_rng(0)
    images = random.standard_normal((96, 1, 8, 8), dtype=np.float32)
    (folder / "tiny.onnx").write_bytes(undecided(images))
    np.savez(folder / "rows.npz", img=images, label=random.integers(0, 3, 96))
    (folder / "leanserve.yaml").write_text(CONFIG)
    port = free_port()
    arguments = ("serve", "--config", "leanserve.yaml", "--cache", "cache", "--port", str(port))
    with process(sys.executable, "-m", "leanserve", *arguments, cwd=folder) as running:
        wait_for(f"http://127.0.0.1:{port}/readyz", running, folder, 120)
        yield f"127.0.0.1:{port}"


@contextmanager
def machine_with_gpu(folder: Path) -> Iterator[str]:
    """Our metrics on a machine with a GPU and a readable RAPL, busier with every scrape."""
    gpu, powercap = busy_gpu(), processor(folder, wraps_at=10**9)
    metrics = Metrics("elsewhere", Sources(powercap=powercap, nvml=FakeNvml(gpu)), threads=2)
    served = [metrics.add(device, VariantFacts(device=device)) for device in ("cpu", "cuda")]

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            gpu["TotalEnergyConsumption"] += 50_000
            counter = powercap / "intel-rapl:0/energy_uj"
            counter.write_text(str(int(counter.read_text()) + 5_000_000))
            for variant in served:
                variant.batch_done(4, 0, 0.01, [0.0])
                variant.lane_s += 0.01
            self.send_response(200)
            self.end_headers()
            self.wfile.write(metrics.render()[0])

        def log_message(self, *_: object) -> None: ...

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@contextmanager
def prometheus(folder: Path, *targets: str) -> Iterator[str]:
    """The config that we ship, with other targets and shorter intervals."""
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    config["scrape_configs"][0]["static_configs"] = [{"targets": list(targets)}]
    shipped = yaml.safe_load((ROOT / "deploy/prometheus/rules.yml").read_text())
    for group in shipped["groups"]:
        group["interval"] = "1s"
    (folder / "rules.yml").write_text(yaml.safe_dump(shipped))
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_port()
    assert PROMETHEUS is not None
    listen = f"--web.listen-address=127.0.0.1:{port}"
    with process(PROMETHEUS, "--config.file=prometheus.yml", "--storage.tsdb.path=data", listen, cwd=folder) as running:
        wait_for(f"http://127.0.0.1:{port}/-/ready", running, folder, 30)
        yield f"http://127.0.0.1:{port}"


def put_load_on(service_at: str, seconds: float) -> None:
    """Answers, refusals by a variant, and requests that reach none."""
    row = {"name": "img", "shape": [1, 1, 8, 8], "datatype": "FP32", "data": [0.5] * 64}
    with httpx.Client(base_url=f"http://{service_at}") as client:
        model = client.get("/v1/variants").json()["model"]
        client.post("/v1/experiment/start", json={"candidate": "int8"}).raise_for_status()
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            for variant in ("base", "int8"):
                path = f"/v2/models/{model}/versions/{variant}/infer"
                assert client.post(path, json={"inputs": [row]}).status_code == 200
                assert client.post(path, json={"inputs": []}).status_code == 400
            assert client.post(f"/v2/models/{model}/versions/none/infer", json={}).status_code == 404
            time.sleep(0.05)


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Prometheus that has watched a service under load."""
    folders = [tmp_path_factory.mktemp(name) for name in ("service", "machine", "prometheus")]
    with ExitStack() as stack:
        ours, other = stack.enter_context(service(folders[0])), stack.enter_context(machine_with_gpu(folders[1]))
        address = stack.enter_context(prometheus(folders[2], ours, other))
        put_load_on(ours, 12.0)
        yield address


@pytest.mark.parametrize(("name", "expression"), [*panels(), *rules()])
def test_shows_something(asked: str, name: str, expression: str) -> None:
    answer = httpx.get(asked + "/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", answer
    values = [float(item["value"][1]) for item in answer["data"]["result"]]
    assert values, f"{name}: nothing for {expression}"
    assert not all(map(math.isnan, values)), f"{name}: nothing but NaN"


def test_a_healthy_service_raises_no_critical_alert(asked: str) -> None:
    found = httpx.get(asked + "/api/v1/alerts").json()["data"]["alerts"]
    assert not [alert for alert in found if alert["labels"]["severity"] == "critical" and alert["state"] == "firing"]


def test_the_excluded_variant_is_told(asked: str) -> None:
    answer = httpx.get(asked + "/api/v1/query", params={"query": 'leanserve_variant_info{state="excluded"}'}).json()
    (found,) = answer["data"]["result"]
    assert found["metric"]["version"] == "poor"
    assert found["metric"]["reason"]
