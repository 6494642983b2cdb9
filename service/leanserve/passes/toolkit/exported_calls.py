"""Reading the graph of an exported program: which operator a node calls, and whose parameter a tensor is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import fx


def operator_of(node: fx.Node) -> str:
    """`conv2d` for `aten.conv2d.default` and for `aten.conv2d.padding`; empty for what is no such call."""
    name = str(node.target)
    return name.split(".")[1] if name.startswith("aten.") else ""


def owner_of(parameter: str) -> str:
    """The name of the module that has a parameter."""
    return parameter.rpartition(".")[0]
