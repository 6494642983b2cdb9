"""Torch modules: their weights as safetensors; the structure comes from the base and the passes, never from a file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from leanserve.contracts import Backend, ModelSize, ModelSpec, Share, TorchModel
from leanserve.hardware import Hardware

if TYPE_CHECKING:
    from torch import nn

WEIGHTS = "model.safetensors"


class TorchFormat:
    """A `contracts.Format`."""

    name = TorchModel.format
    libraries = ("torch",)
    runtime_module = "torch"
    self_contained = False
    places_threads = False
    in_memory = True

    def save(self, model: TorchModel, folder: Path) -> None:
        from leanserve.runtime.formats.tied_tensors import write_tensors
        from leanserve.runtime.formats.torch_masks import packed_state
        from leanserve.runtime.formats.torch_storage import narrow_state

        state, notes = narrow_state(packed_state(model), model.storage)
        write_tensors(state, folder / WEIGHTS, notes)

    def load(self, folder: Path, spec: ModelSpec, rebuild: Callable[[], nn.Module]) -> TorchModel:
        from leanserve.runtime.formats.tied_tensors import load_tensors, read_tensors
        from leanserve.runtime.formats.torch_masks import unpacked_state
        from leanserve.runtime.formats.torch_storage import wide_state

        module = rebuild()
        shapes = {name: weight.shape for name, weight in module.named_parameters()}
        stored, storage = wide_state(*read_tensors(folder / WEIGHTS))
        weights, masks = unpacked_state(stored, shapes)
        load_tensors(module, weights)
        return TorchModel(module.eval(), spec, masks, storage)

    def size(self, model: TorchModel) -> ModelSize:
        from leanserve.runtime.formats.torch_size import count_macs, count_parameters

        return ModelSize(count_macs(model), count_parameters(model))

    def open(self, model: TorchModel, share: Share) -> Backend:
        """On the CPU torch has one setting of threads for the process, so company makes no difference."""
        if share.device != "cpu":
            from leanserve.runtime.backends.pytorch_cuda import TorchCudaBackend
            from leanserve.runtime.cuda.card import TorchCard

            return TorchCudaBackend(model, TorchCard(share.device), share.callers)
        from leanserve.runtime.backends.pytorch import TorchBackend

        return TorchBackend(model, share.threads)


FORMAT = TorchFormat()


def training_device(hardware: Hardware) -> str:
    """Where torch trains on a machine: a GPU that it may use, if torch was built for it, else the CPU."""
    if not hardware.gpus:
        return "cpu"
    import torch

    return (hardware.devices[0] if hardware.on_gpu else "cuda:0") if torch.cuda.is_available() else "cpu"


def use_threads(threads: int) -> None:
    """Give torch this many threads: for a process in which models run with different numbers of them in turn.

    The setting holds for all threads of the process, whichever of them makes it. Other libraries need nothing: their
    models have threads of their own.
    """
    if "torch" in sys.modules:
        import torch

        torch.set_num_threads(threads)
