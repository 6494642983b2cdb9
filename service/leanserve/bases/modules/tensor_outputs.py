"""The tensors in whatever a module returns: a list, a mapping, a dataclass, a record of the library transformers.

Passes, exporters and backends want a tensor or a flat tuple of tensors. A hook makes a brought module give just that:
nothing behind it knows of other forms, and the names of its layers stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

REMARKS = (type(None), bool, int, float, str)
"""What modules return beside tensors, and nobody is asked for."""


def named_tensors(returned: Any) -> list[tuple[str, Tensor]]:
    """The tensors in their order, with the names of keys and fields around them; in a list they have no name.

    `None`, plain numbers and, beside others, tensors without axes (a loss) are left out.

    Raises:
        TypeError: there is something else in it, or no tensor.
    """
    found = list(_walk("", returned))
    if not found:
        raise TypeError(f"a {type(returned).__name__} without tensors" if returned is not None else "nothing")
    return [item for item in found if item[1].ndim] or found


def give_tensors(module: nn.Module, *inputs: Tensor) -> nn.Module:
    """The same module; if it does not return a tensor or a flat tuple of them for these inputs, it does from now on."""
    with torch.no_grad():  # not in inference mode: what a module keeps for later may be trained with
        returned = module(*inputs)
    flat = returned if type(returned) is tuple else (returned,)
    if not all(isinstance(item, Tensor) for item in flat) or len(named_tensors(returned)) < len(flat):
        module.register_forward_hook(_tensors_only)
    return module


def _tensors_only(_: nn.Module, __: Any, returned: Any) -> Tensor | tuple[Tensor, ...]:
    tensors = tuple(tensor for _, tensor in named_tensors(returned))
    return tensors if len(tensors) > 1 else tensors[0]


def _walk(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif (parts := _parts(value)) is not None:
        for part, inner in parts:
            yield from _walk(part if not name else name if not part else f"{name}_{part}", inner)
    elif not isinstance(value, REMARKS):
        raise TypeError(f"an object of type {type(value).__name__}{f' as {name!r}' if name else ''}")


def _parts(value: Any) -> list[tuple[str, Any]] | None:
    """What a container holds, with names; `None`: it is no container."""
    if isinstance(value, Mapping):
        return [(str(key), inner) for key, inner in value.items()]
    if is_dataclass(value) and not isinstance(value, type):
        return [(item.name, getattr(value, item.name)) for item in fields(value)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    return [("", inner) for inner in value] if isinstance(value, tuple | list) else None
