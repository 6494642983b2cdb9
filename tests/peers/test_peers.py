"""The comparison with other servers: what is asked, measured and shown, and that nothing is left running."""

from __future__ import annotations

import shutil
import subprocess
import venv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from leanserve.codecs.open_inference import InferDecoder
from loadtest.peers import compare, process
from loadtest.peers.compare import Cell, Plan, check, expected, table
from loadtest.peers.network import SPECS, example, write_network
from loadtest.peers.process import PeerError, Running, ask, serving
from loadtest.peers.roster import BINARY_V2, BYTES, PEERS, Form, Peer, Request
from loadtest.peers.wrk import Load, load
from tables import shown

ECHO = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
class Echo(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): ...
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[2])), Echo).serve_forever()
"""


@dataclass(frozen=True, slots=True)
class Scripted(Peer):
    """A peer whose program is given."""

    path: Path = Path()

    @property
    def program(self) -> Path:
        return self.path


def scripted(folder: Path, source: str, form: Form = BYTES) -> Scripted:
    path = folder / "server.py"
    path.write_text(source)
    return Scripted("scripted", form, own=True, path=path)


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_every_peer_has_a_program_and_pinned_requirements() -> None:
    for peer in PEERS.values():
        compile(peer.program.read_text(), peer.program.name, "exec")
        if not peer.own:
            lines = peer.requirements.read_text().split()
            assert lines
            assert all("==" in line or line == "setuptools<81" for line in lines)


@pytest.mark.parametrize("name", SPECS)
def test_a_binary_request_is_what_the_service_decodes(name: str) -> None:
    rows = example(name, 2)
    request = BINARY_V2.request(name, rows)
    length = int(request.headers["Inference-Header-Content-Length"])
    decoded = InferDecoder(SPECS[name]).decode(request.body, length)
    assert decoded.rows == 2
    np.testing.assert_array_equal(decoded.inputs[0], rows)
    assert [wanted.form for wanted in decoded.options.outputs] == ["binary"]


def test_a_binary_reply_is_read_behind_its_json() -> None:
    numbers = np.array([1.5, -2, 3e9], np.float32)
    head = b'{"model_name":"m","outputs":[{"name":"y","datatype":"FP32","shape":[1,3]}]}'
    np.testing.assert_array_equal(BINARY_V2.output(head + numbers.tobytes()), numbers)


@pytest.mark.parametrize(
    ("name", "body"), [("litserve", b'{"row": [1.0, 2.0]}'), ("bentoml", b'{"rows": [[1.0, 2.0]]}')]
)
def test_requests_in_plain_json(name: str, body: bytes) -> None:
    assert PEERS[name].form.request("mlp", np.array([[1, 2]], np.float32)).body == body


def test_the_small_network_is_written_once_and_takes_any_number_of_rows(tmp_path: Path) -> None:
    path = write_network("mlp", tmp_path)
    written = path.stat().st_mtime_ns
    assert write_network("mlp", tmp_path).stat().st_mtime_ns == written
    assert expected(path, example("mlp", 3)).shape == (3, 10)
    np.testing.assert_allclose(expected(path, example("mlp", 3))[:1], expected(path, example("mlp", 3)[:1]), atol=1e-5)


def test_a_peer_is_started_measured_and_ended_with_all_that_it_started(tmp_path: Path) -> None:
    peer = scripted(tmp_path, ECHO)
    with serving(peer, tmp_path / "n.onnx", tmp_path) as running:
        assert ask(running.port, Request("/", {}, b"abc")) == (200, b"abc")
        child = int((tmp_path / "scripted.log").read_text().split()[0])
        assert lives(running.pid)
        assert lives(child)
        before = running.cpu_s()
        for _ in range(300):
            ask(running.port, Request("/", {}, b"abc"))
        assert 0 < running.cpu_s() - before < 60
    assert not lives(running.pid)
    assert not lives(child)


def test_a_peer_that_listens_and_says_that_it_is_not_ready_is_waited_for(tmp_path: Path) -> None:
    ready = "    def do_GET(self):\n        print('asked', flush=True)\n        self.send_error(next(statuses))\n"
    starting = ECHO.replace("    def log_message", ready + "    def log_message").replace(
        "class Echo", "statuses = iter((503, 503, 200))\nclass Echo"
    )
    with serving(scripted(tmp_path, starting), tmp_path / "n.onnx", tmp_path) as running:
        assert ask(running.port, Request("/", {}, b"abc")) == (200, b"abc")
    assert (tmp_path / "scripted.log").read_text().split()[1:] == ["asked"] * 3


def test_a_peer_that_does_not_start_is_named_with_its_log(tmp_path: Path) -> None:
    peer = scripted(tmp_path, "raise SystemExit('no such network')")
    with (
        pytest.raises(PeerError, match=r"scripted does not serve.*\n.*no such network"),
        serving(peer, tmp_path, tmp_path),
    ):
        pytest.fail("it does not start")


def test_requirements_that_cannot_be_installed_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess([], 1, "", "no such package")
    monkeypatch.setattr(venv, "create", lambda *_, **__: None)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(PeerError, match=r"litserve: cannot install.*\nno such package"):
        process.environment_of(PEERS["litserve"], tmp_path)


def test_an_environment_is_made_again_when_the_requirements_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def create(folder: Path, **_: object) -> None:
        folder.mkdir(exist_ok=True)
        made.append(folder)

    monkeypatch.setattr(venv, "create", create)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: subprocess.CompletedProcess([], 0, "", ""))
    for _ in range(2):
        process.environment_of(PEERS["litserve"], tmp_path)
    assert len(made) == 1
    (tmp_path / "litserve" / "requirements.txt").write_text("litserve==0.1")
    process.environment_of(PEERS["litserve"], tmp_path)
    assert len(made) == 2


def test_a_wrong_answer_is_an_error(tmp_path: Path) -> None:
    with serving(scripted(tmp_path, ECHO), tmp_path / "n.onnx", tmp_path) as running:
        rows = np.ones((1, 4), np.float32)
        request = BYTES.request("", rows)
        check(running, request, rows)
        with pytest.raises(PeerError, match=r"scripted answers \[1"):
            check(running, request, rows * 2)


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
def test_wrk_counts_what_the_server_answers(tmp_path: Path) -> None:
    with serving(scripted(tmp_path, ECHO), tmp_path / "n.onnx", tmp_path) as running:
        found = load(running.port, Request("/p", {"X-A": "1"}, bytes(range(256))), 2, 1)
    assert found.failed == 0
    assert found.requests > 10
    assert found.rate == pytest.approx(found.requests, rel=0.3)
    assert 0 < found.p50_ms <= found.p99_ms < 1000
    assert 0 < found.client_cpu_s < 2


@pytest.mark.skipif(shutil.which("wrk") is None, reason="wrk is not installed")
def test_unique_heads_never_come_twice(tmp_path: Path) -> None:
    once = ECHO.replace("        self.send_response(200)", "        self.send_response(self.first())")
    once = once.replace(
        "    def log_message",
        """    seen = set()
    def first(self):
        known = self.headers["x-request-id"] in self.seen
        self.seen.add(self.headers["x-request-id"])
        return 409 if known else 200
    def log_message""",
    )
    request = Request("/p", {"X-A": "1"}, b"{}")
    with serving(scripted(tmp_path, once), tmp_path / "n.onnx", tmp_path) as running:
        assert load(running.port, request, 1, 1, "unique").failed == 0
        assert load(running.port, request, 1, 1, "equal").failed > 0


def test_without_wrk_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(PeerError, match="apt install wrk"):
        load(1, Request("/", {}, b""), 1, 1)


def some_load(rate: float, p50_ms: float = 1.0) -> Load:
    return Load(rate=rate, failed=0, p50_ms=p50_ms, p99_ms=2.0, requests=1000, client_cpu_s=0.5)


def test_the_table_shows_ratios_within_rounds_to_the_best_other() -> None:
    ours = [Cell(some_load(rate), 0.1) for rate in (100, 200, 400)]
    theirs = [Cell(some_load(rate), 0.1) for rate in (50, 100, 400)]
    text = shown(table({32: {"leanserve": ours, "triton": theirs, "slow": [Cell(some_load(1), 0.1)] * 3}}, "title"))
    assert "2.00x triton" in text
    assert "0.50x leanserve" in text
    assert "100" in text


def test_measuring_changes_who_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def fake(port: int, *_: object) -> Load:
        asked.append(port)
        return some_load(1)

    monkeypatch.setattr(compare, "load", fake)
    monkeypatch.setattr(compare, "quietly", lambda run, *_: run())
    monkeypatch.setattr(Running, "cpu_s", lambda _: 0.0)
    peers = [Running(PEERS[name], port, 0) for port, name in enumerate(("leanserve", "triton"))]
    cells = compare.measure(peers, dict.fromkeys(PEERS, Request("", {}, b"")), Plan([8], 2, 1, 0))
    assert asked == [0, 1, 1, 0]
    assert len(cells[8]["triton"]) == 2
