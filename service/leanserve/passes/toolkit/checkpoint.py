"""Training checkpoints without pickle: tensors of module and optimiser as safetensors, everything else as JSON beside.

A checkpoint is swapped in whole, so that a kill at any moment leaves one that can be read, and its tensors are checked
against a checksum before training goes on from them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from leanserve.contracts import Json

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

MODULE, OPTIMISER = "module.", "optimiser."


class TrainingCheckpoint(NamedTuple):
    """An interrupted training: what the loop noted, and the state to go on from."""

    notes: Json
    tensors: Mapping[str, Tensor]
    plain: Mapping[str, Json]
    groups: Json

    def restore(self, module: nn.Module, optimiser: torch.optim.Optimizer) -> None:
        """Put module and optimiser in the state in which they were written."""
        from leanserve.passes.toolkit.ties import load_tensors

        of_module = {name: tensor for name, tensor in self.tensors.items() if name.startswith(MODULE)}
        load_tensors(module, {name.removeprefix(MODULE): tensor for name, tensor in of_module.items()})
        state: dict[int, dict[str, Json]] = {}
        for place, value in {**self.tensors, **self.plain}.items():
            if place.startswith(OPTIMISER):
                index, _, name = place.removeprefix(OPTIMISER).partition(".")
                state.setdefault(int(index), {})[name] = value
        optimiser.load_state_dict({"state": state, "param_groups": self.groups})


def write_checkpoint(path: Path, module: nn.Module, optimiser: torch.optim.Optimizer, notes: Json) -> None:
    """Write a checkpoint beside the old one and swap."""
    import torch

    from leanserve.passes.toolkit.ties import write_tensors

    state = optimiser.state_dict()
    own = module.state_dict().items()
    tensors = {MODULE + name: value for name, value in own if isinstance(value, torch.Tensor)}
    plain: dict[str, Json] = {}
    for index, values in state["state"].items():
        for name, value in values.items():
            (tensors if isinstance(value, torch.Tensor) else plain)[f"{OPTIMISER}{index}.{name}"] = value
    told = {"notes": notes, "plain": plain, "groups": state["param_groups"], "sha256": _checksum(tensors)}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    write_tensors(tensors, partial, {"told": json.dumps(told)})
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


def read_training_checkpoint(path: Path) -> TrainingCheckpoint | None:
    """A checkpoint; `None` if there is none, or none that is as it was written: then training starts anew."""
    from safetensors import SafetensorError

    from leanserve.passes.toolkit.ties import read_tensors

    if not path.is_file():
        return None
    try:
        tensors, header = read_tensors(path)
        told = json.loads(header["told"])
        if told["sha256"] != _checksum(tensors):
            return None
        return TrainingCheckpoint(told["notes"], tensors, told["plain"], told["groups"])
    except (SafetensorError, ValueError, KeyError):
        return None


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    import torch

    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
