"""One tensor under several names: stored once, and one tensor again when it is loaded.

Language models share a table between their first and their last layer, and a block may stand in two places. Formats
that store tensors by name refuse shared memory or multiply it. Here every tensor is stored under its first name; the
file's header lists the other names. Views into one memory that are not the same tensor are stored each for itself.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

NOTES, TIES = "leanserve", "ties"
"""Where the header has all notes, and these the groups of names. One note in the header: several would be written in an
order that is drawn by lot, and the same tensors would not make the same file."""


def write_tensors(state: Mapping[str, Any], path: Path, notes: Mapping[str, str] | None = None) -> None:
    """Store the tensors of a state dict as safetensors, with `notes` in the header.

    What a module adds to its state dict besides tensors is left out: it comes with the module.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: value.detach() for name, value in state.items() if isinstance(value, Tensor)}
    ties = ties_of(tensors)
    again = {name for _, *others in ties for name in others}
    kept: dict[str, Tensor] = {}
    memories: set[int] = set()
    for name, tensor in tensors.items():
        if name not in again:
            memory = tensor.untyped_storage().data_ptr()
            kept[name] = tensor.clone().contiguous() if memory in memories else tensor.contiguous()
            memories.add(memory)
    try:
        save_file(kept, path, {NOTES: json.dumps({**(notes or {}), TIES: ties})})
    except SafetensorError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):  # a full disk, say: as Python would tell it
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        raise


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors by all of their names, those of a tie the same one, and the header's notes."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        notes = json.loads((file.metadata() or {}).get(NOTES, "{}"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    for first, *others in notes.pop(TIES, []):
        tensors |= dict.fromkeys(others, tensors[first])
    return tensors, notes


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a module the tensors of `read_tensors`: values, and which of them are one.

    Raises:
        RuntimeError: names or shapes differ.
    """
    own = module.state_dict(keep_vars=True)
    for first, *others in ties_of(tensors):
        for name in others:
            if first in own and name in own and _view(own[name]) != _view(own[first]):
                _put(module, name, own[first])
    for name, tensor in own.items():
        if isinstance(tensor, Tensor) and any(size > 1 and not step for size, step in _axes(tensor)):
            _put(module, name, tensor.detach().clone(memory_format=torch.contiguous_format))  # was `expand`ed
    besides = {name: value for name, value in own.items() if not isinstance(value, Tensor)}
    module.load_state_dict({**besides, **tensors}, strict=True)
    _part(module, tensors)


def ties_of(state: Mapping[str, Any]) -> list[list[str]]:
    """Names of tensors in a state dict that are the same memory seen in the same way, in groups."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and tensor.numel():
            groups.setdefault(_view(tensor), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _part(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Tensors that share memory here and did not where they were stored have overwritten each other: part them."""
    state = module.state_dict(keep_vars=True)
    memories = Counter(tensor.untyped_storage().data_ptr() for tensor in state.values() if isinstance(tensor, Tensor))
    for name, stored in tensors.items():
        tensor = state[name]
        if memories[tensor.untyped_storage().data_ptr()] > 1 and not _equal(tensor.detach(), stored):
            _put(module, name, stored.to(tensor.dtype).clone())


def _equal(one: Tensor, other: Tensor) -> bool:
    alike = (one == other.to(one.dtype)) | (one.isnan() & other.isnan())
    return bool(alike.all())


def _view(tensor: Tensor) -> tuple[object, ...]:
    place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset())
    return (*place, tensor.dtype, tuple(_axes(tensor)))


def _axes(tensor: Tensor) -> Iterator[tuple[int, int]]:
    return zip(tensor.shape, tensor.stride(), strict=True)


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or a buffer, which stays what it is."""
    path, _, leaf = name.rpartition(".")
    holder = module.get_submodule(path)
    old = getattr(holder, leaf)
    if not isinstance(old, nn.Parameter):
        setattr(holder, leaf, tensor.detach())
    else:
        setattr(holder, leaf, tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, old.requires_grad))
