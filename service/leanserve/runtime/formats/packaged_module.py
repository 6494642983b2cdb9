"""A package of TorchInductor as a module, so that what runs modules runs it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TypeAlias, cast

import torch
from torch import nn

TensorOutputs: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...]


class PackagedModule(nn.Module):
    """It has no parameters: its weights are in the machine code's memory, shared by none."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        with warnings.catch_warnings():
            # Importing the inductor defines a scripted module of torch's own, which torch itself has deprecated.
            warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
            from torch._inductor import aoti_load_package

            self._run = aoti_load_package(str(path))

    def forward(self, *inputs: torch.Tensor) -> TensorOutputs:
        return cast("TensorOutputs", self._run(*inputs))
