"""Giving back to the system what libraries keep for their next use after they loaded, ran or closed a model."""

from __future__ import annotations

import ctypes
import gc
import platform
import sys


def give_back() -> None:
    """Give back what is in use no more. Takes tens of milliseconds; what runs meanwhile may wait for some of it."""
    gc.collect()  # compiled graphs hold themselves in cycles; it is quick, for what was made at start is not looked at
    if "onnxruntime" in sys.modules:
        from leanserve.runtime.onnx_arena import shrink_arena

        shrink_arena()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)  # else freed pages are kept for what this process may allocate later
