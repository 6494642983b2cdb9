"""How long onnxruntime's threads wait busily for more work, in seconds of the clock.

onnxruntime takes the time in microseconds (`session.intra_op.spin_duration_us`) and turns it into pauses of the core,
whose length differs: where onnxruntime counts 200 us, virtual cores have been awake for 0.4 ms, others for 2 ms. So
what a microsecond means there is measured once, by threads that have nothing to do.
"""

from __future__ import annotations

import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import onnxruntime

from leanserve.runtime.formats.onnx_session import onnx_session

ASKED_US = 500
"""What is asked for to see what comes of it."""
STEP_S, STEPS = 0.005, 20
"""How often, and how many times at most, it is looked whether a thread still works."""
_TASKS = Path("/proc/self/task")
RELU = (
    b'\x08\x08:3\n\x0c\n\x01x\x12\x01y"\x04Relu\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01'
    b"b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)
"""An ONNX model (opset 17) of one operator."""


def spin_us(seconds: float) -> int:
    """The setting for which threads stay awake so long after their last work."""
    return max(1, round(seconds * 1e6 / _stretch()))


@cache
def _stretch() -> float:
    """Seconds for which threads stay awake, by those that were asked for; 1 where it cannot be seen (not Linux)."""
    if not _TASKS.exists():
        return 1.0
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = 2, 1
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(ASKED_US))
    before = set(_TASKS.iterdir())
    session = onnx_session(RELU, options)
    new = set(_TASKS.iterdir()) - before
    spun = _rest(new.pop()) if len(new) == 1 else 0.0  # others began meanwhile: whose is which?
    del session
    return spun * 1e6 / ASKED_US or 1.0


def _rest(task: Path) -> float:
    """CPU seconds that a thread has used when it rests; 0 where the kernel does not tell."""
    used = 0.0
    with suppress(OSError):
        for _ in range(STEPS):
            time.sleep(STEP_S)
            last, used = used, int((task / "schedstat").read_text().split()[0]) / 1e9
            if used == last:
                break
    return used
