"""onnxruntime's threads stay awake for as long as was meant, on whatever cores."""

from __future__ import annotations

import time
from pathlib import Path

import onnxruntime
import pytest

from leanserve.runtime.linux import spin_control as awake
from leanserve.runtime.linux.spin_control import spin_us

TASKS = Path("/proc/self/task")


def spun(setting: int) -> float:
    """CPU seconds of a thread of a new session until it rests."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(setting))
    before = set(TASKS.iterdir())
    session = onnxruntime.InferenceSession(awake.RELU, options, providers=["CPUExecutionProvider"])
    (task,) = set(TASKS.iterdir()) - before
    time.sleep(0.3)
    seconds = int((task / "schedstat").read_text().split()[0]) / 1e9
    del session
    return seconds


@pytest.mark.skipif(not TASKS.exists(), reason="only Linux tells what a thread has used")
def test_threads_stay_awake_for_so_many_seconds() -> None:
    awake._stretch.cache_clear()
    # Their start is counted, too. onnxruntime by itself is wrong by two to ten times.
    assert spun(spin_us(0.02)) == pytest.approx(0.02, rel=0.4)


def test_where_it_cannot_be_seen_a_microsecond_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(awake, "_TASKS", tmp_path / "none")
    awake._stretch.cache_clear()
    assert spin_us(0.002) == 2000
    awake._stretch.cache_clear()
