"""How long the event loop of a server keeps others waiting: asked of `/healthz` again and again, from another process.

On cores that others share most of a delay is not the server's. What the kernel tells of that is left out: the time for
which the loop's thread, or the one that asks, was ready to run and had no core (Linux, `/proc/PID/schedstat`).

    python loop_lag.py PORT PID    asks until its input ends, then prints the worst delay and how often it asked
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STALL_MS = 50.0
"""Nothing that one client sends may keep others waiting for longer."""
EVERY_S = 0.002
_ASK = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"


@dataclass
class LoopLag:
    """What was seen; complete after the block."""

    worst_ms: float = 0.0
    asked: int = 0


@contextmanager
def loop_lag(port: int, pid: int) -> Iterator[LoopLag]:
    """Watch the loop that runs on the main thread of that process for the time of the block."""
    command = [sys.executable, __file__, str(port), str(pid)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout is not None
        assert asking.stdout.readline() == "asking\n"
        lag = LoopLag()
        yield lag
        told, _ = asking.communicate()
        lag.worst_ms, lag.asked = json.loads(told)
    assert asking.returncode == 0


def _waited_for_a_core(pid: int) -> float:
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[1]) / 1e9


def _wait_for_the_end(ended: threading.Event) -> None:
    sys.stdin.read()
    ended.set()


def _ask_until_told(port: int, pid: int) -> tuple[float, int]:
    ended = threading.Event()
    threading.Thread(target=_wait_for_the_end, args=(ended,), daemon=True).start()
    worst, asked, own = 0.0, 0, os.getpid()
    with socket.create_connection(("127.0.0.1", port), 60) as connection:
        while not ended.wait(EVERY_S):
            excused = _waited_for_a_core(pid) + _waited_for_a_core(own)
            began = time.perf_counter()
            connection.sendall(_ASK)
            reply = b""
            while not reply.endswith(b"}"):
                reply += connection.recv(65536)
            took = time.perf_counter() - began
            assert reply.startswith(b"HTTP/1.1 200 "), reply
            took -= _waited_for_a_core(pid) + _waited_for_a_core(own) - excused
            worst, asked = max(worst, took), asked + 1
            if asked == 1:
                print("asking", flush=True)
    return worst * 1000, asked


if __name__ == "__main__":
    print(json.dumps(_ask_until_told(int(sys.argv[1]), int(sys.argv[2]))))
