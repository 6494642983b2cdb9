"""Flushing denormals to zero on the calling thread, without the help of a model library.

Numbers below 1e-38 (float32) take a CPU a hundred times longer, and a few of them slow a layer down many times. The
setting is per thread. onnxruntime makes it for its own threads but for only one of the lanes that call it, and torch
takes seconds to import; so the C library's floating-point environment is read, one bit is set, and it is written back.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import platform

_ENVIRONMENT_WORDS = 16
"""32-bit words kept for `fenv_t`: 8 are used on x86-64, 2 on aarch64."""
_FLUSH = {"x86_64": (7, 0x8040), "AMD64": (7, 0x8040), "aarch64": (0, 1 << 24)}
"""Machine -> word of glibc's `fenv_t` and bits in it: MXCSR with FTZ and DAZ, or FPCR with FZ."""


def flush_denormals() -> None:
    """Flush denormals on this thread from now on; on machines and C libraries that are not known, do nothing."""
    known = _FLUSH.get(platform.machine())
    if known is None or platform.libc_ver()[0] != "glibc":
        return
    word, bits = known
    library = ctypes.CDLL(ctypes.util.find_library("m"))
    environment = (ctypes.c_uint32 * _ENVIRONMENT_WORDS)()
    if library.fegetenv(environment) == 0:
        environment[word] |= bits
        library.fesetenv(environment)
