"""The repeated blocks of a network, and networks without some of them.

A block is a child of a list or sequence that gives back what it takes in, in shape: a transformer layer, a residual
block that changes neither resolution nor width. In its place a `Skip` hands its input on, so that the code around it,
its counters and its positions stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from leanserve.contracts import Data, Json, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.toolkit.activations import tensors
from leanserve.passes.toolkit.structure import replace
from leanserve.passes.toolkit.targets import Targets
from leanserve.runtime.formats.torch_size import example

ROWS = 32


class Skip(nn.Module):
    """Gives its first input on, as the first of a tuple of `items` where the block gave one (0: a tensor)."""

    def __init__(self, items: int) -> None:
        super().__init__()
        self.items = items

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Any:
        """What else a block is given (masks, positions) has no effect."""
        return (x, *(None for _ in range(self.items - 1))) if self.items else x


@dataclass(frozen=True)
class StackBlock:
    """A block by its name; `items` is the length of the tuple it gives, 0 for a tensor. `stack` holds it and others."""

    name: str
    items: int

    @property
    def stack(self) -> str:
        """The name of the list or sequence that it stands in."""
        return self.name.rpartition(".")[0]


def blocks_of(model: TorchModel, targets: Targets) -> list[StackBlock]:
    """The blocks among the targets, in the order of execution; not those inside of others.

    Raises:
        PassFailed: there are none.
    """
    modules = dict(model.module.named_modules())
    wanted = {
        name: child
        for name, child in targets.select(model.module).items()
        if isinstance(modules[name.rpartition(".")[0]], nn.Sequential | nn.ModuleList)
        and any(True for _ in child.children())
        and any(True for _ in child.parameters())
    }
    calls: dict[str, list[StackBlock | None]] = {name: [] for name in wanted}
    with ExitStack() as stack, torch.no_grad():
        for name, child in wanted.items():
            hook = _recorder(calls, name)
            stack.callback(child.register_forward_hook(hook, with_kwargs=True).remove)
        model.module(*example(model.spec))
    found = [item for seen in calls.values() if len(seen) == 1 for item in seen if item is not None]
    outer = [item for item in found if not any(item.name.startswith(other.name + ".") for other in found)]
    if not outer:
        raise PassFailed(
            "targets: no block can be left out: none stands in a list or sequence, is called once and gives back the "
            "shape that it takes"
        )
    return outer


def skip(module: nn.Module, blocks: Mapping[str, Json]) -> nn.Module:
    """Leave out blocks, in place: by name, the items that each gives."""
    for name, items in blocks.items():
        replace(module, module.get_submodule(name), Skip(items))
    return module


@torch.no_grad()
def changes_of(model: TorchModel, blocks: list[StackBlock], data: Data) -> dict[str, float]:
    """By block, 1 - the cosine between what goes in and what comes out, mean over positions (Men et al., "ShortGPT",
    2024): a block that changes little can go."""
    sums, counts = dict.fromkeys((item.name for item in blocks), 0.0), dict.fromkeys((item.name for item in blocks), 0)

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
            before, after = inputs[0], output[0] if isinstance(output, tuple) else output
            cosine = torch.cosine_similarity(before, after, dim=1 if before.ndim == 4 else -1)
            sums[name] += float((1 - cosine).sum())
            counts[name] += cosine.numel()

        return hook

    with ExitStack() as stack:
        for item in blocks:
            layer = model.module.get_submodule(item.name)
            stack.callback(layer.register_forward_hook(watch(item.name)).remove)
        for inputs in list(tensors(model, data, ROWS)):
            model.module(*inputs)
    return {name: total / counts[name] for name, total in sums.items()}


def _recorder(calls: dict[str, list[StackBlock | None]], name: str) -> Any:
    def hook(_: nn.Module, inputs: tuple[Any, ...], __: Mapping[str, Any], output: Any) -> None:
        first = output[0] if isinstance(output, tuple) and output else output
        alike = bool(inputs) and isinstance(first, Tensor) and isinstance(inputs[0], Tensor)
        same = alike and inputs[0].shape == first.shape and inputs[0].dtype == first.dtype
        calls[name].append(StackBlock(name, len(output) if isinstance(output, tuple) else 0) if same else None)

    return hook
