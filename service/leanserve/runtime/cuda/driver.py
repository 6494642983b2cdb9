"""Which GPUs this process may use, as CUDA's own driver tells: by `libcuda`, without importing torch or onnxruntime.

NVML would show all of the machine; CUDA shows those of `CUDA_VISIBLE_DEVICES`, and numbers them as everybody else does
who says `cuda:1`. A file of its own because a service of ONNX graphs must not import torch for it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

from leanserve.hardware import Gpu

LIBRARY = "libcuda.so.1"
NAME_BYTES = 128


def visible_gpus(open_library: Callable[[str], Any] = ctypes.CDLL) -> tuple[Gpu, ...]:
    """The GPUs by their CUDA numbers; none without a driver, or where it shows none."""
    try:
        cuda = open_library(LIBRARY)
    except OSError:
        return ()
    count = ctypes.c_int(0)
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return ()
    return tuple(_gpus(cuda, count.value))


def _gpus(cuda: Any, count: int) -> Iterator[Gpu]:
    for number in range(count):
        device, name, size = ctypes.c_int(0), ctypes.create_string_buffer(NAME_BYTES), ctypes.c_size_t(0)
        cuda.cuDeviceGet(ctypes.byref(device), number)
        cuda.cuDeviceGetName(name, NAME_BYTES, device)
        cuda.cuDeviceTotalMem_v2(ctypes.byref(size), device)
        yield Gpu(name.value.decode(errors="replace"), size.value)
