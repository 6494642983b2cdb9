"""Waiting for a processor is counted, waiting for anything else is not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from leanserve.runtime.linux.contention import Contention


def thread(proc: Path, name: str, waited_ns: int) -> None:
    folder = proc / "self" / "task" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "schedstat").write_text(f"123 {waited_ns} 9\n")


def stolen(proc: Path, ticks: int) -> None:
    lines = (f"cpu{number} 1 2 3 4 5 6 7 {ticks if number == 0 else 0} 0 0" for number in range(64))
    (proc / "stat").write_text("cpu  9 9 9 9 9 9 9 9 9 9\n" + "\n".join(lines))


def test_delays_of_threads_and_stolen_time_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    thread(tmp_path, "1", 10**9)
    stolen(tmp_path, 0)
    contention = Contention(tmp_path)
    assert contention.waited_s() == 0.0
    thread(tmp_path, "1", 3 * 10**9)
    thread(tmp_path, "2", 5 * 10**8)  # a thread that was started meanwhile
    stolen(tmp_path, os.sysconf("SC_CLK_TCK"))
    assert contention.waited_s() == pytest.approx(3.5)
    assert contention.waited_s() == 0.0


def test_a_kernel_that_tells_nothing_is_never_disturbed(tmp_path: Path) -> None:
    contention = Contention(tmp_path)
    thread(tmp_path, "1", 0)
    (tmp_path / "self" / "task" / "1" / "schedstat").write_text("")
    assert contention.waited_s() == 0.0


def test_sleeping_is_no_waiting_and_sharing_a_processor_is() -> None:
    contention = Contention()
    time.sleep(0.2)
    assert contention.waited_s() < 0.15
    core = min(os.sched_getaffinity(0))
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])  # inherits the one core
    try:
        time.sleep(0.2)
        contention.waited_s()
        end = time.perf_counter() + 1.0
        while time.perf_counter() < end:
            pass
        assert contention.waited_s() > 0.25
    finally:
        other.kill()
        other.wait()
        os.sched_setaffinity(0, before)
