"""What is measured while others work on the machine is measured again."""

from __future__ import annotations

import time

import pytest

from loadtest.peers import quiet


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
