"""What libraries that this service uses would tell their makers about it, and that they are kept from that.

onnxruntime (since 1.29) and OpenVINO report sessions, models and a number of this machine over the network unless they
are told not to. OpenVINO does it from a fork of its process: a copy of a process with threads, which may stand still
for ever, and whose parent waits for it when it ends.
"""

from __future__ import annotations

import os
import sys
from typing import Any

_OFF = ("ORT_DISABLE_TELEMETRY", "ORT_TELEMETRY_DISABLED", "HF_HUB_DISABLE_TELEMETRY")
"""onnxruntime has had two names for it. They are read when a library is loaded, and inherited by child processes."""


def send_nothing() -> None:
    """Keep libraries from reporting; has to be called before they are imported.

    Who wants onnxruntime's reports sets `ORT_DISABLE_TELEMETRY=0`.
    """
    for name in _OFF:
        os.environ.setdefault(name, "1")
    modules: dict[str, Any] = sys.modules
    modules.setdefault("openvino_telemetry", None)  # to import it fails, for which OpenVINO has a stub
