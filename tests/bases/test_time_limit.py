"""A model that does not end is given up, in whatever it is: an import, a factory, a forward pass, a program."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from leanserve.bases import time_limit
from leanserve.bases.apart import described_apart
from leanserve.bases.opening import open_base
from leanserve.bases.origin import Origin
from leanserve.config.base_section import PythonBase, TensorInput, TorchExportBase
from leanserve.config.data_section import SyntheticData
from leanserve.errors import ConfigError

MODEL = """
import time
from torch import nn
count = 0
def count_down():
    global count
    count += 1
    return count > 1
class Waiting(nn.Module):
    def forward(self, x):
        time.sleep(600)
def waits():
    return Waiting()
def sleeps():
    time.sleep(600)
def catches():
    while True:
        try:
            time.sleep(0.01)
        except BaseException:
            if count_down():
                raise
"""


@pytest.fixture(autouse=True)
def limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time_limit, "TRIAL_S", 0.5)
    monkeypatch.setattr(time_limit, "AGAIN_S", 0.05)


def opened(folder: Path, factory: str) -> Any:
    base = PythonBase(python=factory, inputs={"x": TensorInput(shape=(4,))})
    return open_base(Origin(base=base, data=SyntheticData(synthetic=8), folder=folder))


@pytest.mark.parametrize("factory", ["sleeps", "catches", "waits"])
def test_a_python_base_that_does_not_end_is_refused(tmp_path: Path, factory: str) -> None:
    name = f"endless_{factory}:{factory}"
    (tmp_path / f"endless_{factory}.py").write_text(MODEL)
    with pytest.raises(ConfigError, match=rf"base.python: .* {name} does not end within 0.5 s"):
        opened(tmp_path, name)


def test_a_module_that_does_not_end_is_refused(tmp_path: Path) -> None:
    (tmp_path / "endless_import.py").write_text("while True:\n    pass\n")
    with pytest.raises(ConfigError, match=r"endless_import:f does not end within 0.5 s"):
        opened(tmp_path, "endless_import:f")


def test_on_other_threads_too(tmp_path: Path) -> None:
    (tmp_path / "endless_threads.py").write_text("def f():\n    while True:\n        pass\n")
    raised: list[BaseException] = []

    def run() -> None:
        try:
            opened(tmp_path, "endless_threads:f")
        except ConfigError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert "does not end within 0.5 s" in str(raised[0])


def test_what_ends_in_time_hears_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def one() -> None:
        for _ in range(20):
            with time_limit.time_limit(0.02, "it"):
                pass
        time.sleep(0.1)

    one()
    failed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    thread = threading.Thread(target=one)
    thread.start()
    thread.join()
    assert not failed


def test_native_code_that_does_not_come_back_ends_the_command() -> None:
    code = (
        "import hashlib\nfrom leanserve.bases import time_limit\ntime_limit.GRACE_S = 0.2\n"
        "with time_limit.time_limit(0.2, 'it'):\n    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False)
    assert (done.returncode, done.stderr) == (2, "it does not end within 0.2 s, and cannot be ended\n")


def test_a_program_that_does_not_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.pt2").write_bytes(b"a program")
    origin = Origin(base=TorchExportBase(torch_export=Path("m.pt2")), data=SyntheticData(synthetic=8), folder=tmp_path)
    with pytest.raises(ConfigError, match=r"base.torch_export: .* does not end within 0.5 s"):
        described_apart(origin)  # which takes longer than that to import torch
    monkeypatch.setattr("leanserve.bases.sources.exported_program.safe_copy", lambda _: time.sleep(600))
    with pytest.raises(ConfigError, match=r"base.torch_export: to look at m.pt2 does not end within 0.5 s"):
        open_base(origin)
