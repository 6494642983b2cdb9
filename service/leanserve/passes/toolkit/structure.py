"""Changing a module's structure, writing the change down as JSON, and repeating it from the JSON without data.

An artifact stores weights, not code: when it is loaded, the base is built afresh and each pass repeats its structural
change on it, after which the weights must fit exactly. So decisions speak only of names, shapes and plain attributes.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping

import torch
from torch import nn

from leanserve.contracts import Json, Model, TorchModel
from leanserve.runtime.formats.expected import torch_model


def copy_of(model: Model, kind: str) -> TorchModel:
    """A deep copy in eval mode, free to be changed.

    Raises:
        PassFailed: the model has left torch already.
    """
    given = torch_model(model, kind)
    return dataclasses.replace(given, module=copy.deepcopy(given.module).eval())


def replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in the place of `old`, everywhere that `root` holds it (a layer may be shared)."""
    for holder in list(root.modules()):
        for name, child in list(holder._modules.items()):  # `named_children` tells a layer once
            if child is old:
                setattr(holder, name, new)


def differences(before: nn.Module, after: nn.Module) -> dict[str, Json]:
    """What changed from `before` to `after`, two modules with the same submodules: `{name: {shapes, attributes}}`.

    `shapes` holds the parameters and buffers that were resized, `attributes` the whole numbers, or tuples of them, that
    differ (`out_channels`, `groups`, `num_features`, `normalized_shape` ...).
    """
    found: dict[str, Json] = {}
    for name, new in after.named_modules():
        old = before.get_submodule(name)
        shapes = {
            key: list(tensor.shape)
            for key, tensor in _own_tensors(new).items()
            if tensor.shape != _own_tensors(old)[key].shape
        }
        attributes = {
            key: value
            for key, value in vars(new).items()
            if isinstance(value, int | tuple) and not isinstance(value, bool) and value != vars(old).get(key)
        }
        if shapes or attributes:
            found[name] = {"shapes": shapes, "attributes": attributes}
    return found


def reshape(module: nn.Module, found: Mapping[str, Json]) -> nn.Module:
    """Repeat `differences` on a fresh module, in place; resized tensors hold zeros until weights are loaded."""
    for name, change in found.items():
        child = module.get_submodule(name)
        for key, shape in change["shapes"].items():
            tensor = torch.zeros(shape, dtype=_own_tensors(child)[key].dtype)
            if key in dict(child.named_parameters(recurse=False)):
                setattr(child, key, nn.Parameter(tensor))
            else:
                setattr(child, key, tensor)
        for key, value in change["attributes"].items():
            setattr(child, key, tuple(value) if isinstance(value, list) else value)
    return module


def _own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
