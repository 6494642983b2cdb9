"""A cold start as a user meets it: what is answered while it builds, in a hostile folder, for a model that is too large
for 32 rows; and how it ends when it is interrupted.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from leanserve.child import ROOTS
from leanserve.config.schema import ServiceConfig
from leanserve.errors import StartupError
from leanserve.start import BuildFailed, ServiceStart
from leanserve.telemetry.startup import BuildNews

MODEL = """\
import queue
import torch
from torch import nn

INPUTS = ({"name": "x", "dtype": "float32", "shape": (4,)},)
queue.SimpleQueue()

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 2.0))
    def forward(self, x):
        if len(x) > 8:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4294967296 bytes.")
        return x * self.scale
"""
CONFIG = """\
base: {python: "small:Small"}
data: {synthetic: 16}
variants: [{name: float}]
drain: {delay_s: 0}
"""
HOSTILE = ("service/__init__.py", "models/__init__.py", "queue.py", "json.py", "torch.py")
COMMAND = "from leanserve.__main__ import main\nmain()\n"
"""What pip installs as `leanserve`."""
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads the process table of Linux")


@dataclass
class Start:
    """A `leanserve serve` in its own folder, which has everything that could be taken for something else."""

    folder: Path
    process: subprocess.Popen[str]
    http: httpx.Client

    def get(self, path: str) -> httpx.Response:
        return self.http.get(path)

    def ready(self) -> Any:
        """The body of the readiness, once the server listens."""
        assert self.process.poll() is None, self.log
        try:
            return self.get("/readyz").json()
        except httpx.TransportError:
            return {}

    @property
    def phase(self) -> str | None:
        progress = self.ready().get("progress", {})
        return progress.get("phase") if isinstance(progress, dict) else None

    @property
    def log(self) -> str:
        return (self.folder / "log").read_text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in HOSTILE:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"raise SystemExit('the wrong {name}')\n")
    (tmp_path / "small.py").write_text(MODEL)
    (tmp_path / "service.yaml").write_text(CONFIG)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "leanserve").write_text(COMMAND)
    return tmp_path


@contextmanager
def started(folder: Path) -> Iterator[Start]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    arguments = ["bin/leanserve", "serve", "--config", "service.yaml", "--cache", "cache", "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, ROOTS)), "LEANSERVE_MEASURE_SECONDS": "1"}
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=folder, env=environment, stdout=log, stderr=log, text=True
        )
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
        yield Start(folder, process, http)
    process.kill()
    process.wait()


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    with started(folder) as running:
        yield running


def wait_for(happens: Callable[[], object], seconds: float = 120) -> None:
    give_up = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < give_up
        time.sleep(0.02)


def test_a_cold_start_is_alive_tells_its_progress_and_serves_what_fits_into_memory(start: Start) -> None:
    wait_for(start.ready)
    phases, states = list[str](), list[str]()
    while (phase := start.phase) is not None:
        assert start.get("/healthz").status_code == 200
        refused = start.http.post("/v1/predict", json={"inputs": [0, 0, 0, 0]})
        listed = start.get("/v1/variants").json()
        if refused.status_code == 503:
            assert refused.json()["code"] == "not_ready"
            phases += [phase] if phase not in phases else []
            (variant,) = listed["variants"]
            states += [variant["state"]] if variant["state"] not in states else []
        time.sleep(0.01)
    assert phases.index("building") < phases.index("measuring")
    assert set(phases) <= {"opening", "building", "measuring", "loading", "warming"}
    assert {"building", "built"} <= set(states)
    assert start.get("/readyz").json() == {"ready": True}

    (variant,) = start.get("/v1/variants").json()["variants"]
    assert (variant["state"], variant["memory_rows"], variant["quality"]["memory_rows"]) == ("serving", 8, 8)
    assert list(variant["quality"]["latency_ms"]) == ["1", "8"]
    rows = [[float(row)] * 4 for row in range(20)]
    answered = start.http.post("/v1/predict", json={"inputs": rows}).json()
    answers = [item["outputs"]["output"] for item in answered["predictions"]]
    assert answers == [[2 * value for value in row] for row in rows]
    assert answered["batch_rows"] <= 8
    page = start.get("/metrics").text
    assert 'measure="memory_rows"' in page
    assert "leanserve_ready 1.0" in page

    start.process.send_signal(signal.SIGTERM)
    assert start.process.wait(20) == 0
    assert "float: base: there is memory for batches of at most 8 rows" in start.log
    assert "ready in" in start.log
    assert "Traceback" not in start.log


def children_of(process: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == process and state != "Z":
            found.append(int(path.parent.name))
    return found


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@needs_proc
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_during_the_build_ends_both_processes_promptly(
    start: Start, number: signal.Signals, status: int
) -> None:
    wait_for(lambda: start.phase == "building")
    (build,) = children_of(start.process.pid)
    began = time.monotonic()
    start.process.send_signal(number)
    assert start.process.wait(20) == status
    assert time.monotonic() - began < 8
    assert not is_running(build)
    assert "Traceback" not in start.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_process_ends_raises_in_no_finalizer(number: signal.Signals) -> None:
    code = f"import atexit, signal\natexit.register(signal.raise_signal, {number.value})\n{COMMAND}"
    ended = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_a_build_is_asked_to_end_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    counting = "asked = []\nsignal.signal(signal.SIGTERM, lambda *_: asked.append(1))\n"
    waiting = "while not asked:\n    time.sleep(0.01)\ntime.sleep(0.3)\nsys.exit(10 + len(asked))\n"
    start = built_by(monkeypatch, tmp_path, counting + TELLS + waiting)

    def end() -> None:
        wait_for(lambda: start.startup.built)
        start.stop()
        time.sleep(0.1)
        start.close()

    ending = threading.Thread(target=end)
    ending.start()
    with pytest.raises(BuildFailed) as failed:
        start.build_in_child(tmp_path)
    ending.join()
    assert failed.value.status == 11


@needs_proc
def test_a_build_ends_with_a_server_that_is_killed(start: Start) -> None:
    wait_for(lambda: children_of(start.process.pid))
    (build,) = children_of(start.process.pid)
    start.process.kill()
    wait_for(lambda: not is_running(build), 10)


def test_a_model_without_memory_for_a_single_row_is_refused_by_the_start(folder: Path) -> None:
    (folder / "small.py").write_text(MODEL.replace("len(x) > 8", "len(x)"))
    with started(folder) as start:
        assert start.process.wait(60) == 2
        assert "error: base: there is no memory to run the model on x [3, 4]: RuntimeError: Default" in start.log
        assert "Traceback" not in start.log


def built_by(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> ServiceStart:
    """A start whose build runs this code; `tell(line)` is how that tells how far it is."""
    told = (
        "import os, signal, sys, time\ndescriptor = int(sys.argv[-1])\ntell = lambda news: os.write(descriptor, news)\n"
    )

    def command(module: str, *arguments: str) -> list[str]:
        assert (module, arguments[0], arguments[-2]) == ("leanserve", "build", "--tell")
        return [sys.executable, "-c", told + code, *arguments]

    monkeypatch.setattr("leanserve.start.command", command)
    config = ServiceConfig.model_validate({"base": "digits", "variants": [{"name": "float"}]})
    return ServiceStart(tmp_path / "service.yaml", None, config)


TELLS = f"tell({BuildNews('float', 'base', 1, 4).to_line()!r}.encode())\n"


def test_a_build_is_heard_and_its_failure_keeps_its_status(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    start = built_by(monkeypatch, tmp_path, TELLS + "sys.exit(2)")
    with pytest.raises(BuildFailed) as failed:
        start.build_in_child(tmp_path)
    assert failed.value.status == 2
    wait_for(lambda: start.startup.built == 0.25)
    assert start.startup.variants["float"].state == "building"
    start.close()


def test_a_build_that_the_kernel_kills_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    start = built_by(monkeypatch, tmp_path, "os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(StartupError, match=r"the build was killed \(SIGKILL\), as the kernel does .*; give it more"):
        start.build_in_child(tmp_path)


@pytest.mark.parametrize("ignoring", ["", "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"], ids=["ends", "is stuck"])
def test_a_build_for_which_nobody_waits_is_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ignoring: str
) -> None:
    monkeypatch.setattr("leanserve.start.END_S", 0.5)
    start = built_by(monkeypatch, tmp_path, ignoring + TELLS + "time.sleep(60)")
    failures: list[BaseException] = []

    def run() -> None:
        try:
            start.build_in_child(tmp_path)
        except BaseException as error:
            failures.append(error)

    building = threading.Thread(target=run)
    building.start()
    wait_for(lambda: start.startup.built)
    start.close()
    building.join(10)
    assert len(failures) == 1
    with pytest.raises(BuildFailed):  # nothing is begun any more
        start.build_in_child(tmp_path)
