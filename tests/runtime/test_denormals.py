from __future__ import annotations

import platform
import threading

import numpy as np
import pytest

from leanserve.runtime.linux.denormals import flush_denormals

KNOWN = platform.machine() in {"x86_64", "AMD64", "aarch64"} and platform.libc_ver()[0] == "glibc"


@pytest.mark.skipif(not KNOWN, reason="flushing is implemented for glibc on x86-64 and aarch64")
def test_denormals_are_flushed_on_the_thread_that_asks_and_on_no_other() -> None:
    tiny = np.full(64, 1e-39, np.float32)
    seen: list[float] = []

    def ask() -> None:
        seen.append(float((tiny + tiny).max()))
        flush_denormals()
        seen.append(float((tiny + tiny).max()))
        seen.append(float(np.float32(0.1) + np.float32(0.2)))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert seen == [pytest.approx(2e-39), 0.0, pytest.approx(0.3)]
    assert (tiny + tiny).max() > 0
