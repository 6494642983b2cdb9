"""The whole product as a user meets it: real processes, real images, real kills. One small config is built once."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import httpx
import pytest
from PIL import Image

from leanserve.contracts import Array
from leanserve.hardware import thread_budget

CONFIG = """\
base: digits
gate: {max_drop: 0.01, min_agreement: 0.97, on_fail: exclude}
variants:
  - name: float
    isolation: process
  - name: onnx
    passes: [{kind: fold_bn}, {kind: onnxruntime}]
  - name: cut # far too much, and no recovery
    passes: [{kind: prune_channels, macs: 0.1}]
drain: {delay_s: 1.0, timeout_s: 10}
"""


@dataclass
class Service:
    """A running `leanserve serve`."""

    process: subprocess.Popen[str]
    url: str
    ready_s: float
    log: Path

    def post(self, png: bytes, **headers: str) -> httpx.Response:
        """One prediction; `x_variant="int8"` becomes the header `x-variant`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.post(self.url + "/v1/predict", content=png, headers={"content-type": "image/png"} | named)


def start(config: Path, cache: Path, log: Path, within: float, before: Sequence[str] = ()) -> Service:
    """Start the service as a user would, with `before` in front of the command, and wait until it is ready."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*before, sys.executable, "-m", "leanserve", "serve", "--config", str(config), "--port", str(port)]
    began = time.monotonic()
    with log.open("w") as stream:
        environment = os.environ | {"LEANSERVE_CACHE": str(cache)}
        process = subprocess.Popen(command, stdout=stream, stderr=stream, text=True, env=environment)
    url = f"http://127.0.0.1:{port}"
    while time.monotonic() - began < within:
        if process.poll() is not None:
            pytest.fail(f"the service ended with {process.returncode}:\n{log.read_text()}")
        try:
            if httpx.get(url + "/readyz").status_code == 200:
                return Service(process, url, time.monotonic() - began, log)
        except httpx.TransportError:
            pass  # it does not listen yet
        time.sleep(0.1)  # it listens long before it is ready, and should not be kept from that
    process.kill()
    pytest.fail(f"not ready within {within} s:\n{log.read_text()}")


def stop(service: Service) -> int:
    service.process.send_signal(signal.SIGTERM)
    return service.process.wait(20)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("service")
    (folder / "service.yaml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def service(place: Path) -> Iterator[Service]:
    running = start(place / "service.yaml", place / "cache", place / "log", within=280)
    yield running
    if running.process.poll() is None:
        assert stop(running) == 0


def digits(count: int) -> list[tuple[bytes, str]]:
    """Real digits as PNG, with their labels, from the test split."""
    from leanserve_models.digits import images

    return [(png(image), str(label)) for image, label in zip(*images("test", count), strict=True)]


def png(image: Array) -> bytes:
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def test_every_serving_variant_reads_real_digits(service: Service) -> None:
    for variant in ("float", "onnx"):
        replies = [(service.post(image, x_variant=variant).json(), label) for image, label in digits(20)]
        assert all(reply["variant"] == variant for reply, _ in replies)
        assert sum(reply["label"] == label for reply, label in replies) >= 19


def test_curl_as_in_the_readme(service: Service, tmp_path: Path) -> None:
    image, label = digits(1)[0]
    (tmp_path / "digit.png").write_bytes(image)
    command = ["curl", "-sS", "-H", "content-type: image/png", "--data-binary", f"@{tmp_path}/digit.png"]
    done = subprocess.run([*command, service.url + "/v1/predict"], capture_output=True, text=True, check=True)
    assert f'"label":"{label}"' in done.stdout


def test_an_excluded_variant_is_visible_with_its_reason_everywhere(service: Service) -> None:
    listed = httpx.get(service.url + "/v1/variants").json()["variants"]
    cut = next(item for item in listed if item["name"] == "cut")
    assert cut["state"] == "excluded"
    assert "gate." in cut["reason"]
    refused = service.post(digits(1)[0][0], x_variant="cut")
    assert refused.status_code == 503
    assert cut["reason"] in refused.json()["error"]
    assert re.search(
        r'leanserve_variant_info\{[^}]*state="excluded"[^}]*version="cut"|version="cut"[^}]*state="excluded"',
        httpx.get(service.url + "/metrics").text,
    )


def test_clients_that_leave_do_not_disturb_the_others(service: Service) -> None:
    image, label = digits(1)[0]
    host, port = service.url.removeprefix("http://").split(":")
    head = f"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: image/png\r\ncontent-length: {len(image)}\r\n\r\n"
    for _ in range(100):
        with socket.create_connection((host, int(port))) as leaver:
            leaver.sendall(head.encode() + image)
    replies = [service.post(image) for _ in range(10)]
    assert [reply.json()["label"] for reply in replies] == [label] * 10


def test_a_second_start_builds_nothing(service: Service, place: Path) -> None:
    again = start(place / "service.yaml", place / "cache", place / "log2", within=60)
    assert stop(again) == 0
    assert "[1/" not in again.log.read_text()
    assert again.ready_s < service.ready_s / 3  # both beside whatever else runs here; alone 4 s and 100 s


@pytest.mark.soak
def test_a_read_only_cache_of_another_machine_serves_and_says_so(
    service: Service, place: Path, read_only: Callable[[Path], list[str]]
) -> None:
    """Another number of threads is another machine."""
    other = place / "other.yaml"
    other.write_text(f"threads: {2 if thread_budget() == 1 else 1}\n{CONFIG}")
    before = read_only(place / "cache")
    running = start(other, place / "cache", place / "log4", within=60, before=before)
    image, label = digits(1)[0]
    assert running.post(image).json()["label"] == label
    assert stop(running) == 0
    (warning,) = (line for line in running.log.read_text().splitlines() if "warning" in line)
    assert "measured on" in warning
    assert "not on this machine" in warning
    command = [*before, sys.executable, "-m", "leanserve", "report", "--config", str(other), "--cache"]
    told = subprocess.run([*command, str(place / "cache")], capture_output=True, text=True, check=True)
    assert "(measured on another machine)" in told.stdout
    new = subprocess.run([*command, str(place / "cache" / "new")], capture_output=True, text=True, check=False)
    assert new.returncode == 2
    assert new.stderr.count("\n") == 1
    assert "cannot be created (Read-only file system)" in new.stderr or "Permission denied" in new.stderr


@pytest.mark.soak
def test_a_flipped_byte_is_told_and_rebuilt(service: Service, place: Path) -> None:
    victim = next((place / "cache" / "artifacts").glob("*/model.onnx"))
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "leanserve",
            "build",
            "--config",
            str(place / "service.yaml"),
            "--cache",
            str(place / "cache"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "damaged artifact is rebuilt" in done.stderr
    assert str(victim) in done.stderr


@pytest.mark.soak
def test_kill_9_during_a_build_then_start_again(place: Path, tmp_path: Path) -> None:
    config = tmp_path / "service.yaml"
    config.write_text("base: digits\nvariants: [{name: onnx, passes: [{kind: fold_bn}, {kind: onnxruntime}]}]\n")
    command = [sys.executable, "-m", "leanserve", "build", "--config", str(config), "--cache", str(tmp_path / "cache")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache").glob("artifacts/*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()

    running = start(config, tmp_path / "cache", tmp_path / "log", within=120)
    image, label = digits(1)[0]
    assert running.post(image).json()["label"] == label
    assert stop(running) == 0
    assert not list((tmp_path / "cache" / "tmp").iterdir())


def test_sigterm_under_load_loses_nothing(service: Service, place: Path) -> None:
    running = start(place / "service.yaml", place / "cache", place / "log3", within=60)
    image, label = digits(1)[0]
    drain_began = threading.Event()
    stopped_asking = threading.Event()
    failures: list[str] = []

    def ask() -> None:
        with httpx.Client() as client:
            while not stopped_asking.is_set():
                reply = client.post(running.url + "/v1/predict", content=image, headers={"content-type": "image/png"})
                if reply.status_code != 200 or reply.json()["label"] != label:
                    failures.append(reply.text)

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    time.sleep(0.5)
    running.process.send_signal(signal.SIGTERM)
    drain_began.set()
    time.sleep(0.3)
    assert httpx.get(running.url + "/readyz").status_code == 503
    time.sleep(0.4)  # the delay is 1 s: everything asked until now must be answered
    stopped_asking.set()
    for asker in askers:
        asker.join()
    assert not failures
    assert running.process.wait(15) == 0


RELOADED = """\
  - name: folded # of which all is built, for it is on the way to `onnx`
    passes: [{kind: fold_bn}]
traffic: {weights: {float: 3, folded: 1}}
drain:"""


@pytest.mark.soak
def test_sighup_builds_and_serves_what_the_config_says_now_and_loses_nothing(service: Service, place: Path) -> None:
    config = place / "reloaded.yaml"
    config.write_text(CONFIG)
    running = start(config, place / "cache", place / "log4", within=60)
    image, label = digits(1)[0]
    over = threading.Event()
    seen: list[tuple[int, str]] = []

    def client() -> None:
        with httpx.Client(base_url=running.url) as http:
            while not over.is_set():
                time.sleep(0.02)  # the build beside has the lowest priority
                reply = http.post("/v1/predict", content=image, headers={"content-type": "image/png"})
                seen.append((reply.status_code, reply.json().get("variant", "")))

    thread = threading.Thread(target=client)
    thread.start()
    try:
        changed = CONFIG.replace("drain:", RELOADED)
        config.write_text(re.sub(r"  - name: onnx\n.*\n", "", changed))
        running.process.send_signal(signal.SIGHUP)
        told = logged(running, r".*(?:reloaded in|reload refused).*")
        assert told.endswith("float 100%, onnx 0% -> float 75%, folded 25%")
        assert running.post(image, x_variant="folded").json()["label"] == label
        assert running.post(image, x_variant="onnx").status_code == 404
        config.write_text(CONFIG.replace("on_fail: exclude", "on_fail: abort"))
        running.process.send_signal(signal.SIGHUP)
        assert "reload refused, everything is as it was: variant 'cut' fails its gate" in logged(running, ".*refused.*")
        assert running.post(image, x_variant="folded").status_code == 200
    finally:
        over.set()
        thread.join()
        assert stop(running) == 0
    assert {status for status, _ in seen} == {200}
    assert {name for _, name in seen} == {"float", "folded"}


def logged(running: Service, pattern: str, within: float = 60.0) -> str:
    """The first line of the log that is like this, once there is one."""
    give_up = time.monotonic() + within
    while (found := re.search(pattern, running.log.read_text())) is None:
        assert time.monotonic() < give_up, running.log.read_text()
        time.sleep(0.05)
    return found[0]


def test_a_port_in_use_is_told_before_any_building(service: Service, tmp_path: Path) -> None:
    port = service.url.rpartition(":")[2]
    done = subprocess.run(
        [sys.executable, "-m", "leanserve", "serve", "--port", port, "--cache", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert not list(tmp_path.glob("artifacts/*"))


def test_a_wrong_config_is_one_line_and_status_2(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("base: digits\nvariants: [{name: a, passess: []}]\n")
    for command in ("check", "build", "serve"):
        done = subprocess.run(
            [sys.executable, "-m", "leanserve", command, "--config", str(tmp_path / "bad.yaml")],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 2
        assert "bad.yaml:2: variants.0.passess: unknown key 'passess'; did you mean 'passes'?" in done.stderr
        assert "Traceback" not in done.stderr


def test_a_failing_gate_aborts_the_start_naming_the_variant(service: Service, place: Path) -> None:
    strict = place / "strict.yaml"
    strict.write_text(CONFIG.replace("on_fail: exclude", "on_fail: abort"))
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "leanserve",
            "serve",
            "--config",
            str(strict),
            "--cache",
            str(place / "cache"),
            "--port",
            "1",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    # Root may listen on port 1; whoever may not is told so, which is the same status.
    assert done.returncode == 2
    assert "variant 'cut' fails its gate" in done.stderr or "cannot listen" in done.stderr
