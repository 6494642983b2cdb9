"""Starts a peer as a process of its own on a free port of this machine, and ends all of it afterwards.

The environments are made once, below a cache folder: `pip install` of some peers takes minutes.
"""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from loadtest.peers.roster import Peer, Request

ROOT = Path(__file__).parents[2]
READY_S = 600
HOST = "127.0.0.1"


class PeerError(Exception):
    """A peer cannot be installed, does not start, or answers wrongly; the message says which, and shows its log."""


class Running(NamedTuple):
    """A peer that answers; `pid` leads a session of its own."""

    peer: Peer
    port: int
    pid: int

    def cpu_s(self) -> float:
        """CPU seconds of all its processes so far."""
        return cpu_s_of(self.pid)


def environment_of(peer: Peer, cache: Path) -> Path:
    """The Python of the peer's environment, made if it is not there or its requirements have changed.

    Raises:
        PeerError: the packages cannot be installed.
    """
    if peer.own:
        return Path(sys.executable)
    folder = cache / peer.requirements.stem
    python, wanted, installed = folder / "bin" / "python", peer.requirements.read_text(), folder / "requirements.txt"
    if installed.exists() and installed.read_text() == wanted:
        return python
    venv.create(folder, with_pip=True, clear=True)
    command: list[str | Path] = [python, "-m", "pip", "install", "--quiet", "-r", peer.requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise PeerError(f"{peer.name}: cannot install its requirements:\n{done.stderr[-2000:]}")
    installed.write_text(wanted)
    return python


def cpu_s_of(leader: int) -> float:
    """CPU seconds so far of a process and all that it has started."""
    return sum(_cpu_ticks(pid) for pid in _family(leader)) / os.sysconf("SC_CLK_TCK")


@contextmanager
def serving(peer: Peer, network: Path, cache: Path, options: Sequence[str] = ()) -> Iterator[Running]:
    """Run the peer over this ONNX file until the block ends; its log is in the cache folder.

    Raises:
        PeerError: it ends, or does not serve within ten minutes (leanserve measures a network at its first start).
    """
    python, port, log = environment_of(peer, cache), _free_port(), cache / f"{peer.name}.log"
    command: list[str | Path] = [python, peer.program, network.resolve(), str(port), *peer.options, *options]
    variables = os.environ | {"RAY_USAGE_STATS_ENABLED": "0", "BENTOML_DO_NOT_TRACK": "True"}
    variables |= {"PYTHONPATH": str(ROOT)} if peer.own else {}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=variables, start_new_session=True)
    try:
        _wait_until_it_serves(process, peer, port, log)
        yield Running(peer, port, process.pid)
    finally:
        _end(process)


def ask(port: int, request: Request) -> tuple[int, bytes]:
    """Status and body of the reply to one request."""
    connection = http.client.HTTPConnection(HOST, port, timeout=60)
    try:
        connection.request("POST", request.path, request.body, request.headers)
        reply = connection.getresponse()
        return reply.status, reply.read()
    finally:
        connection.close()


def _wait_until_it_serves(process: subprocess.Popen[bytes], peer: Peer, port: int, log: Path) -> None:
    give_up = time.monotonic() + READY_S
    while time.monotonic() < give_up and process.poll() is None:
        if _serves(port):
            return
        time.sleep(0.1)
    raise PeerError(f"{peer.name} does not serve; the end of {log}:\n{log.read_text()[-2000:]}")


def _serves(port: int) -> bool:
    """Whether a peer listens and does not say that it is not ready yet, as leanserve does while it measures."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status != http.HTTPStatus.SERVICE_UNAVAILABLE
    except http.client.HTTPException:
        return True  # it answers something else
    except OSError:
        return False
    finally:
        connection.close()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and whatever it started."""
    family = _family(process.pid)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        give_up = time.monotonic() + 10
        while time.monotonic() < give_up and (process.poll() is None or any(map(_lives, family))):
            time.sleep(0.1)
        family = [pid for pid in family if _lives(pid)]
    process.wait()


def _family(leader: int) -> list[int]:
    """The process, its session and its descendants, some of which make sessions of their own (Linux)."""
    stats: dict[int, list[str]] = {}
    for folder in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            stats[int(folder.name)] = _stat(int(folder.name))
    found = {leader}
    size = 0
    while len(found) > size:
        size = len(found)
        found |= {pid for pid, stat in stats.items() if int(stat[1]) in found or int(stat[3]) == leader}
    return sorted(found & stats.keys())


def _lives(pid: int) -> bool:
    try:
        return _stat(pid)[0] != "Z"
    except OSError:
        return False


def _cpu_ticks(pid: int) -> int:
    try:
        return sum(map(int, _stat(pid)[11:13]))
    except OSError:
        return 0


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat from the state on, which follows the name in brackets."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as free:
        return int(free.getsockname()[1])
