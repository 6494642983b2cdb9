"""Which of onnxruntime's execution providers run a graph, on what, and with which options."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime

from leanserve.contracts import Json, OnnxModel
from leanserve.errors import StartupError

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}


class ProviderChoice(NamedTuple):
    """Where a graph runs."""

    provider: str
    """A key of `PROVIDERS`."""
    device: str
    """`cpu` or `cuda:N`."""

    def listed(self, model: OnnxModel) -> list[Any]:
        """The providers for a session, with their options: the wanted one, then those that do what it cannot."""
        if self.provider == "cpu":
            return [PROVIDERS["cpu"]]
        number = self.device.partition(":")[2]
        # Float32 is float32, as in torch's backend; and arenas grow by what is asked for, for several share the GPU.
        cuda = (
            PROVIDERS["cuda"],
            {"device_id": number, "use_tf32": "0", "arena_extend_strategy": "kSameAsRequested"},
        )
        if self.provider == "cuda":
            return [cuda, PROVIDERS["cpu"]]
        tensorrt = (PROVIDERS["tensorrt"], _tensorrt_options(number, self.engines_of(model)))
        return [tensorrt, cuda, PROVIDERS["cpu"]]

    def engines_of(self, model: OnnxModel) -> Path | None:
        """Where TensorRT's engines are kept, which take minutes to make; `None`: nowhere, as where it cannot write."""
        folder = model.path.parent
        return folder / "tensorrt" if self.provider == "tensorrt" and os.access(folder, os.W_OK) else None

    def load_libraries(self) -> None:
        """Load CUDA's libraries from where pip puts them, which the loader of the system does not know."""
        if self.provider != "cpu":
            with redirect_stdout(sys.stderr):  # on which onnxruntime tells what it misses; ours may be read by a parent
                onnxruntime.preload_dlls()

    def require(self, active: Sequence[str]) -> None:
        """onnxruntime falls back to the CPU without a word; a variant measured as GPU must not run there.

        Raises:
            StartupError: the provider is not active.
        """
        wanted = PROVIDERS[self.provider]
        if wanted not in active:
            raise StartupError(
                f"onnxruntime cannot use {wanted} (active: {', '.join(active)}): install the extra 'gpu' instead of "
                "'cpu' on a machine with a working driver, or set provider: cpu in the pass onnxruntime"
            )


def provider_choice(settings: Mapping[str, Json], device: str) -> ProviderChoice:
    """What the pass `onnxruntime` decided (`provider`), else what the service's `device` says.

    A GPU that the pass asks for in a service on the CPU is the first one.
    """
    provider = settings.get("provider", "auto")
    if provider == "auto":
        provider = "cpu" if device == "cpu" else "cuda"
    if provider == "cpu":
        return ProviderChoice("cpu", "cpu")
    return ProviderChoice(provider, "cuda:0" if device == "cpu" else device)


def _tensorrt_options(number: str, engines: Path | None) -> dict[str, str]:
    options = {"device_id": number, "trt_timing_cache_enable": "1"}
    if engines is not None:
        kept = str(engines)
        options |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": kept, "trt_timing_cache_path": kept}
    return options
