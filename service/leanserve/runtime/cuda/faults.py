"""Errors of CUDA after which nothing that this process asks of the GPU is answered right any more.

An illegal access, a failed assertion in a kernel or a hardware fault spoil the process's *context*: every later call
returns the same error, for all models on that GPU (CUDA Runtime API, "Error handling": *sticky* errors). Only another
process gets a new context.
"""

from __future__ import annotations

import re

_WORDS = re.compile(
    r"illegal memory access|device-side assert|unspecified launch failure|misaligned address|illegal instruction"
    r"|uncorrectable (NVLink|ECC) error|hardware stack error|invalid program counter|invalid device context"
    r"|cudaError(IllegalAddress|Assert|LaunchFailure|MisalignedAddress|ECCUncorrectable|HardwareStackError)"
    r"|CUDA_ERROR_(ILLEGAL_ADDRESS|ASSERT|LAUNCH_FAILED|MISALIGNED_ADDRESS|ECC_UNCORRECTABLE)"
    r"|CUDA failure (700|710|716|719|214)\b",
    re.IGNORECASE,
)


def is_lost(error: BaseException | None) -> bool:
    """Whether this error, or one that it was raised from, says that the process has lost the GPU."""
    while error is not None:
        if _WORDS.search(str(error)):
            return True
        error = error.__cause__
    return False
