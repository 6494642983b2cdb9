"""The store: state and audit entry together or not at all, bounded, and clear about a file that is none."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from leanserve.errors import StartupError
from leanserve.experiments import store as module
from leanserve.experiments.store import AuditEntry, ExperimentStore

WRITER = """
import os, sys
from pathlib import Path
from leanserve.experiments.store import AuditEntry, ExperimentStore

store = ExperimentStore(Path(sys.argv[1]))
if sys.argv[2] == "between":
    store._connection.set_trace_callback(lambda sql: os._exit(7) if sql.startswith("insert into audit") else None)
step = 0
while True:
    step += 1
    store.save("live", {"step": step}, AuditEntry(float(step), "ramp", "advance", step - 1, step))
    print(step, flush=True)
"""


def entry(step: int) -> AuditEntry:
    return AuditEntry(float(step), "ann", "promote", {"share": 0.5}, {"share": 1.0, "step": step})


def test_what_was_saved_is_there_again(tmp_path: Path) -> None:
    with ExperimentStore(tmp_path / "experiments.db") as store:
        assert store.load("live") is None
        assert store.names == []
        for step in range(3):
            store.save("live", {"share": step / 2}, entry(step))
        store.save("other", {"share": 0.25}, entry(9))
        store.keep("live", {"share": 0.75}, at=10.0)
    with ExperimentStore(tmp_path / "experiments.db") as store:
        assert store.load("live") == {"share": 0.75}
        assert store.names == ["live", "other"]
        assert store.audit("live") == [entry(2), entry(1), entry(0)]
        assert store.audit("live", most=1) == [entry(2)]
        assert store.audit("unknown") == []


def test_a_crash_between_the_writes_leaves_neither(tmp_path: Path) -> None:
    path = tmp_path / "experiments.db"
    with ExperimentStore(path) as store:
        store.save("live", {"step": 0}, entry(0))
    done = subprocess.run([sys.executable, "-c", WRITER, str(path), "between"], env=os.environ, check=False)
    assert done.returncode == 7
    with ExperimentStore(path) as store:
        assert store.load("live") == {"step": 0}
        assert store.audit("live") == [entry(0)]
        store.save("live", {"step": 1}, entry(1))
        assert store.load("live") == {"step": 1}


def test_a_killed_process_loses_nothing_that_save_returned_for(tmp_path: Path) -> None:
    path = tmp_path / "experiments.db"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), "always"], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    writer.stdout.readline()
    time.sleep(0.2)
    writer.send_signal(signal.SIGKILL)
    printed = writer.stdout.read().split()
    writer.wait()
    writer.stdout.close()
    with ExperimentStore(path) as store:
        state, last = store.load("live"), store.audit("live", most=1)[0]
        assert state == {"step": last.after}
        assert last.after >= int(printed[-1] if printed else 1)
    with sqlite3.connect(path) as connection:
        assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
    connection.close()


def test_only_the_newest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_ENTRIES", 3)
    monkeypatch.setattr(module, "MOST_EXPERIMENTS", 2)
    with ExperimentStore(tmp_path / "experiments.db") as store:
        for step in range(5):
            store.save(f"experiment {step % 4}", step, entry(step))
        assert store.names == ["experiment 0", "experiment 3"]
        assert [len(store.audit(f"experiment {number}")) for number in range(4)] == [1, 0, 1, 1]


def test_a_state_that_is_no_json_changes_nothing(tmp_path: Path) -> None:
    with ExperimentStore(tmp_path / "experiments.db") as store:
        store.save("live", 1, entry(1))
        with pytest.raises(ValueError, match="JSON compliant"):
            store.save("live", float("nan"), entry(2))
        assert store.load("live") == 1
        assert store.audit("live") == [entry(1)]


def damaged(path: Path) -> None:
    path.write_bytes(b"no database, and long enough to be taken for one" * 100)


def of_the_future(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("pragma user_version = 99")
    connection.close()


@pytest.mark.parametrize("spoilt", [damaged, of_the_future, Path.mkdir])
def test_a_file_that_is_no_store_is_named_with_the_remedy(spoilt: object, tmp_path: Path) -> None:
    path = tmp_path / "experiments.db"
    assert callable(spoilt)
    spoilt(path)
    with pytest.raises(StartupError, match=r"experiments\.db: .*; move the file away"):
        ExperimentStore(path)
