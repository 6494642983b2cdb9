"""Stop-watches around the steps of a request."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from loadtest.peers.steps import STEPS, StopWatch


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
