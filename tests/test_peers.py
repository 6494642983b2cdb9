"""The comparison with other servers: what is asked, measured and shown, and that nothing is left running."""

from __future__ import annotations

import asyncio
import io
import shutil
import socket
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from loadtest.peers import bare, compare, process, quiet, saturation
from loadtest.peers.bare import Bare, Way, measure
from loadtest.peers.callers import Closed, Overload, closed_loop, open_loop, rate_between_groups
from loadtest.peers.compare import Cell, Plan, check, expected, table
from loadtest.peers.network import SPECS, example, write_network
from loadtest.peers.process import PeerError, Running, ask, serving
from loadtest.peers.roster import BINARY_V2, BYTES, PEERS, Form, Peer, Request
from loadtest.peers.saturation import Round, best_way
from loadtest.peers.steps import STEPS, StopWatch
from loadtest.peers.wrk import Load, load
from service.api.codecs.open_inference import InferDecoder

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


def test_without_wrk_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(PeerError, match="apt install wrk"):
        load(1, Request("/", {}, b""), 1, 1)


def some_load(rate: float, p50_ms: float = 1.0) -> Load:
    return Load(rate=rate, failed=0, p50_ms=p50_ms, p99_ms=2.0, requests=1000, client_cpu_s=0.5)


def shown(renderable: object) -> str:
    file = io.StringIO()
    Console(file=file, width=160).print(renderable)
    return file.getvalue()


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


def test_a_bare_loop_tells_rows_per_second_and_the_time_of_a_run(tmp_path: Path) -> None:
    found = measure(write_network("mlp", tmp_path), Way(2, 1, 4), 0.1)
    assert found.rate > 1000
    assert 0 < found.p50_ms < 50


def test_the_best_way_is_that_of_the_highest_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saturation, "CORES", 2)
    monkeypatch.setattr(saturation, "quietly", lambda run, **_: run())
    rates = {Way(1, 2, 1): 5.0, Way(2, 1, 4): 9.0}
    monkeypatch.setattr(bare, "measure", lambda _, way, __: Bare(rates.get(way, 1.0), 1.0))
    assert best_way(Path(), Plan([8], 1, 1, 0), Console(file=io.StringIO())) == Way(2, 1, 4)
    assert len(saturation.ways()) == 10


def test_saturation_is_told_as_shares_of_the_bare_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saturation, "CORES", 2)
    flooded = Overload(1000, 90, (10.0, 20.0), {200: 90, 429: 910}, 0.2)
    item = Round(Bare(100, 9), {8: Closed(90, 1, 2, 0, 0.5)}, Closed(1, 10.5, 11, 0, 0), Bare(1, 10), flooded)
    text = shown(saturation.saturation_table([item, item], 5.0, "title"))
    # 90 of 100; wrk took 0.5 s of 2 x 5 s, so 90 of the 95 that it left.
    assert "90.0%" in text
    assert "5.0%" in text
    assert "94.7%" in text
    assert saturation.idle_line([item]) == "idle: p50 10.50 ms, bare 10.00 ms, added 0.50 ms"
    line = saturation.overload_line([item, item], 2, 3000)
    assert "goodput 100.0% of the peak" in line
    assert "{200: 180, 429: 1820}" in line


@contextmanager
def refusing_server(capacity: int) -> Iterator[int]:
    """Answers the first `capacity` requests of each 100 ms with 200, the others with 429."""
    loop = asyncio.new_event_loop()
    spent: dict[int, int] = {}

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            slot = int(time.perf_counter() * 10)
            spent[slot] = spent.get(slot, 0) + 1
            status = 200 if spent[slot] <= capacity else 429
            writer.write(b"HTTP/1.1 %d X\r\nContent-Length: 2\r\n\r\nok" % status)
        writer.close()

    listening = socket.create_server(("127.0.0.1", 0))
    server = loop.run_until_complete(asyncio.start_server(serve, sock=listening))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        loop.call_soon_threadsafe(server.close)
        time.sleep(0.1)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def test_a_closed_loop_counts_who_was_answered() -> None:
    with refusing_server(capacity=1_000_000) as port:
        found = closed_loop(port, Request("/", {}, b"x"), connections=2, seconds=0.3)
    assert found.failed == 0
    assert 0 < found.p50_ms <= found.p99_ms
    assert found.client_cpu_s > 0
    with refusing_server(capacity=0) as port:
        found = closed_loop(port, Request("/", {}, b"x"), connections=2, seconds=0.1)
    assert (found.rate, found.failed > 10) == (0, True)


@pytest.mark.parametrize(
    ("times", "rate"),
    [
        ([], 0.0),
        ([1.0, 1.001], 0.0),
        ([1.0, 2.0], 1.0),
        ([1.0, 1.001, 2.0, 2.001, 3.0, 3.001], 4 / 2),  # two per second, whatever part of a group the end cuts off
    ],
)
def test_the_rate_is_taken_between_groups(times: list[float], rate: float) -> None:
    assert rate_between_groups(times) == pytest.approx(rate, rel=0.01)


def test_an_open_loop_offers_its_rate_and_counts_who_was_answered() -> None:
    with refusing_server(capacity=4) as port:
        found = open_loop(port, Request("/", {}, b"x"), rate=400, seconds=1, connections=16)
    assert 150 < found.offered <= 420  # a busy machine skips turns
    assert 10 < found.goodput <= 48
    assert set(found.statuses) == {200, 429}
    assert len(found.answered_ms) == found.statuses[200]


def test_the_watched_steps_exist_and_time_in_others_is_not_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = StopWatch()
    watch.calls.clear()

    def inner() -> None:
        spin(0.05)

    def outer() -> None:
        spin(0.01)
        timed_inner()
        time.sleep(0.05)  # waiting is not counted

    def spin(seconds: float) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    timed_inner, timed_outer = watch._timed("inner", inner), watch._timed("outer", outer)
    watch.seconds = {"inner": 0.0, "outer": 0.0}
    timed_outer()
    assert watch.seconds == {"inner": 0.0, "outer": 0.0}  # it is not running
    watch.on = True
    timed_outer()
    assert watch.seconds["inner"] == pytest.approx(0.05, abs=0.01)
    assert watch.seconds["outer"] == pytest.approx(0.01, abs=0.005)
    assert (watch.calls["inner"], watch.calls["outer"]) == (1, 1)
    assert watch.cost_s(["inner", "outer"]) < 1e-4
    program = (
        "from loadtest.peers.steps import *\nwatch = StopWatch()\nfor step in STEPS: watch.watch(step)\n"
        "print(len(watch.seconds))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(STEPS)


def test_a_disturbed_run_is_done_again_and_a_quiet_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    others = iter([0.9, 0.4, 0.0, 0.0])
    busy = 0.0
    runs: list[float] = []

    def run() -> float:
        nonlocal busy
        share, began = next(others), time.perf_counter()
        time.sleep(0.05)
        busy += share * (time.perf_counter() - began) * quiet.CORES
        runs.append(share)
        return share

    monkeypatch.setattr(quiet, "LOOK_S", 0.0001)
    monkeypatch.setattr(quiet, "busy_s", lambda: busy)
    assert quiet.quietly(run) == 0.0
    assert runs == [0.9, 0.4, 0.0]
    assert quiet.quietly(run) == 0.0
    assert len(runs) == 4


def test_where_others_never_rest_the_least_disturbed_run_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    others = iter([0.9, 0.5, 0.3, 0.8, 0.0])
    busy = 0.0

    def run() -> float:
        nonlocal busy
        share, began = next(others), time.perf_counter()
        time.sleep(0.05)
        busy += share * (time.perf_counter() - began) * quiet.CORES
        return share

    monkeypatch.setattr(quiet, "busy_s", lambda: busy)
    assert quiet.quietly(run, patience_s=0.001) == 0.3
    assert quiet.quietly(run, patience_s=0) == 0.0


def test_what_the_run_itself_uses_is_no_disturbance() -> None:
    before = quiet.busy_s()
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end:
        pass
    assert quiet.busy_s() - before >= 0.2
