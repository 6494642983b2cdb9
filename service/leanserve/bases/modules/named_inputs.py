"""Inputs by name: a module whose `forward(x, mask=None, lengths=None)` takes `x` and `lengths` gets just these.

Passes, exporters and backends give inputs by position, in the order of the spec. Where the names that the config
declares are those of parameters of `forward`, a hook puts each in its place, so that optional ones may be left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn


def take_by_name(module: nn.Module, names: Sequence[str]) -> nn.Module:
    """The same module; if `forward` has parameters of all these names, but in other places, inputs get there."""
    parameters = inspect.signature(module.forward).parameters.values()
    known = [item.name for item in parameters if item.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    if known[: len(names)] != list(names) and set(names) <= set(known):
        module.register_forward_pre_hook(partial(_by_name, tuple(names)), with_kwargs=True)
    return module


def _by_name(
    names: tuple[str, ...], _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (), {**named, **dict(zip(names, given, strict=False))}
