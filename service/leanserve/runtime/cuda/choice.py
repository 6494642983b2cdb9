"""Which devices variants run on: what the config wants (`device`), of what there is."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from leanserve.errors import StartupError
from leanserve.hardware import Gpu

logger = logging.getLogger(__name__)

ENGINES: Final[Mapping[str, str]] = {
    "torch": "lib/libtorch_cuda.so",
    "onnxruntime": "capi/libonnxruntime_providers_cuda.so",
}
"""Engines that can compute on GPUs -> the library that only their builds for CUDA have, in the package's folder."""
CPU: Final = ("cpu",)


def engines_for_cuda() -> dict[str, bool]:
    """The engines that are installed, and whether each is built for CUDA. None of them is imported."""
    found = {}
    for engine, library in ENGINES.items():
        spec = find_spec(engine)
        if spec is not None and spec.origin is not None:
            found[engine] = (Path(spec.origin).parent / library).exists()
    return found


def chosen_devices(wanted: str | Sequence[str], gpus: Sequence[Gpu], engines: Mapping[str, bool]) -> tuple[str, ...]:
    """The devices as torch names them: `cpu`, or one `cuda:N` or more.

    `auto` is the first GPU, if every engine that is installed can compute there, or else the CPU: a variant that went
    to the CPU alone, beside others on the GPU, would be compared with them.

    Raises:
        StartupError: what is wanted is not there; the text says what is.
    """
    if wanted == "auto":
        return _automatic(gpus, engines)
    if wanted == "cpu":
        return CPU
    names = tuple("cuda:0" if name == "cuda" else name for name in ([wanted] if isinstance(wanted, str) else wanted))
    there = [f"cuda:{number}" for number in range(len(gpus))]
    missing = [name for name in names if name not in there]
    if missing:
        raise StartupError(f"there is no {' and no '.join(missing)}: {_seen(gpus)}")
    if not any(engines.values()):
        told = " and ".join(engines)
        raise StartupError(f"{_seen(gpus)}, but {told} are built for CPUs: install the extra 'gpu' instead of 'cpu'")
    return names


def _automatic(gpus: Sequence[Gpu], engines: Mapping[str, bool]) -> tuple[str, ...]:
    if not gpus:
        return CPU
    unable = [engine for engine, able in engines.items() if not able]
    if unable:
        text = "%s, but %s: variants run on the CPU; install what is built for CUDA, or set `device`"
        logger.warning(text, _seen(gpus), " and ".join(f"{engine} is built for CPUs" for engine in unable))
        return CPU
    return ("cuda:0",)


def _seen(gpus: Sequence[Gpu]) -> str:
    if not gpus:
        return "CUDA's driver shows no GPU (nvidia-smi and CUDA_VISIBLE_DEVICES tell more); set device: cpu"
    told = (f"cuda:{number} ({gpu.name}, {gpu.memory_bytes / 2**30:.0f} GiB)" for number, gpu in enumerate(gpus))
    return f"CUDA's driver shows {', '.join(told)}"
