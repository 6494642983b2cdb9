"""The orders of channels in which a network computes the same, and the one in which it is nearest to another network.

Hidden channels have no order: swapped in a layer and in all that read it, the function is the same. Two networks that
were trained apart differ by such an order above all. It is found group by group, by an assignment problem each:
`weight` matching makes the weights most alike (Ainsworth et al., "Git Re-Basin", 2023), `activation` matching what the
channels answer to the same rows (Li et al., "Convergent Learning", 2016).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from leanserve.contracts import Data, TorchModel
from leanserve.passes.toolkit.activations import tensors
from leanserve.passes.toolkit.channels import traced_graph
from leanserve.runtime.formats.torch_size import example

SWEEPS = 50
"""Rounds over all groups after which weight matching ends in any case."""
SAME = 1e-3
"""How far answers may move, relative to the largest, when channels change their order."""
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)


class Slice(NamedTuple):
    """Where the channels of a group are in a tensor: `places` [channels, n] along `axis`."""

    name: str
    axis: int
    places: Tensor

    def rows(self, state: dict[str, Tensor]) -> Tensor:
        """The numbers of each channel, [channels, m], in double precision."""
        tensor = state[self.name].movedim(self.axis, 0)
        return tensor[self.places].reshape(len(self.places), -1).double()


@dataclass(frozen=True)
class PermutationGroup:
    """Channels that change places together, of the layer `root` and of all that share them."""

    root: str
    makers: tuple[str, ...]
    """The layers whose outputs they are."""
    slices: tuple[Slice, ...]

    @property
    def width(self) -> int:
        """How many channels."""
        return len(self.slices[0].places)

    @torch.no_grad()
    def permute(self, state: Mapping[str, Tensor], order: Tensor) -> None:
        """Put channel `order[i]` in the place of channel `i` in the tensors that are there, in place."""
        for item in self.slices:
            if item.name not in state:
                continue
            tensor = state[item.name].movedim(item.axis, 0)
            tensor[item.places.flatten()] = tensor[item.places[order].flatten()].clone()


def permutation_groups(model: TorchModel) -> list[PermutationGroup]:
    """The groups whose order does not matter: none that reaches an output, none that an operation counts on.

    Each is tried out in a random order.
    """
    from torch_pruning.ops import OPTYPE

    module = copy.deepcopy(model.module)
    graph = traced_graph(module, model.spec)
    names = {child: name for name, child in module.named_modules()}
    found = []
    for group in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
        if any(dep.target.type == OPTYPE.OUTPUT for dep, _ in group):
            continue
        candidate = _group(graph, group, names)
        if candidate is not None and _changes_nothing(model, candidate):
            found.append(candidate)
    return found


@torch.no_grad()
def match_weights(
    one: TorchModel, other: TorchModel, groups: Sequence[PermutationGroup], seed: int
) -> dict[str, Tensor]:
    """By root, the order of `other`'s channels that makes its weights most like those of `one`."""
    wanted, moving = _weights(one.module), copy.deepcopy(other.module)
    orders = {group.root: torch.arange(group.width) for group in groups}
    generator = torch.Generator().manual_seed(seed)
    for _ in range(SWEEPS):
        moved = False
        for index in torch.randperm(len(groups), generator=generator).tolist():
            group, have = groups[index], _weights(moving)
            alike = sum(item.rows(wanted) @ item.rows(have).T for item in group.slices if item.name in wanted)
            order = _assigned(torch.as_tensor(alike))
            gain = alike[torch.arange(group.width), order].sum() - torch.as_tensor(alike).diagonal().sum()
            if gain > 1e-9 * abs(float(torch.as_tensor(alike).diagonal().sum())) + 1e-12:
                group.permute(moving.state_dict(), order)
                orders[group.root] = orders[group.root][order]
                moved = True
        if not moved:
            break
    return orders


def match_activations(
    one: TorchModel, other: TorchModel, groups: Sequence[PermutationGroup], data: Data
) -> dict[str, Tensor]:
    """By root, the order in which `other`'s channels correlate most with those of `one` on `data`."""
    makers = [name for group in groups for name in group.makers]
    sums: dict[str, _Correlation] = {name: _Correlation() for name in makers}
    for inputs in list(tensors(one, data, 32)):
        ours, theirs = _outputs(one, makers, inputs), _outputs(other, makers, inputs)
        for name in makers:
            sums[name].add(ours[name], theirs[name])
    return {
        group.root: _assigned(torch.stack([sums[name].value() for name in group.makers]).sum(0)) for group in groups
    }


class _Correlation:
    """Between the channels of two layers, [channels, channels]."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: list[Tensor] = []

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        a, b = ours.double(), theirs.double()
        self._count += len(a)
        new = [a.sum(0), b.sum(0), a.square().sum(0), b.square().sum(0), a.T @ b]
        self._sums = new if not self._sums else [x + y for x, y in zip(self._sums, new, strict=True)]

    def value(self) -> Tensor:
        a, b, aa, bb, ab = (item / self._count for item in self._sums)
        spread = torch.outer((aa - a.square()).clamp_min(0).sqrt(), (bb - b.square()).clamp_min(0).sqrt())
        return torch.where(spread > 1e-12, (ab - torch.outer(a, b)) / spread.clamp_min(1e-12), 0.0)


def _group(graph: Any, group: Any, names: dict[nn.Module, str]) -> PermutationGroup | None:
    """A group of torch-pruning as the tensors it is made of; `None` where an operation counts on the order."""
    slices: dict[tuple[str, int], Slice] = {}
    makers = []
    for item in group:
        module, out = item.dep.target.module, graph.is_out_channel_pruning_fn(item.dep.handler)
        if module not in names:
            continue  # an operation without weights
        axes = _axes(module, out=out)
        if axes is None:
            return None
        if out and isinstance(module, nn.Conv2d | nn.Linear):
            makers.append(names[module])
        places = _places(item.idxs, item.root_idxs)
        for leaf, axis in axes:
            name = f"{names[module]}.{leaf}"
            slices[name, axis] = Slice(name, axis, places)
    widths = {len(item.places) for item in slices.values()}
    if len(widths) != 1 or widths == {1}:
        return None
    return PermutationGroup(names[group[0].dep.target.module], tuple(dict.fromkeys(makers)), tuple(slices.values()))


def _axes(module: nn.Module, *, out: bool) -> list[tuple[str, int]] | None:
    """The tensors of a layer that have the channels of its output or input, and where; `None`: not known."""
    own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    if isinstance(module, NORMS):
        return [(leaf, 0) for leaf, tensor in own.items() if tensor.ndim == 1]
    if isinstance(module, nn.Conv2d | nn.Linear):
        depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels == module.out_channels
        if isinstance(module, nn.Conv2d) and module.groups != 1 and not depthwise:
            return None
        return [(leaf, 0) for leaf in own] if out or depthwise else [("weight", 1)]
    return None if own else []


def _places(indices: Sequence[int], roots: Sequence[int]) -> Tensor:
    """[channels, n]: where each channel of the root is in a tensor that may hold it many times (flattened pixels)."""
    by_root: dict[int, list[int]] = {}
    for place, root in zip(indices, roots, strict=True):
        by_root.setdefault(root, []).append(place)
    return torch.tensor([sorted(by_root[root]) for root in sorted(by_root)])


def _changes_nothing(model: TorchModel, group: PermutationGroup) -> bool:
    moved = copy.deepcopy(model.module)
    group.permute(moved.state_dict(), torch.randperm(group.width, generator=torch.Generator().manual_seed(0)))
    inputs = example(model.spec, rows=2)
    with torch.no_grad():
        before, after = tree_leaves(model.module(*inputs)), tree_leaves(moved(*inputs))
        return all(bool((a - b).abs().max() <= SAME * a.abs().max()) for a, b in zip(before, after, strict=True))


def _outputs(model: TorchModel, layers: Sequence[str], inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What layers answer, [positions, channels]."""
    found: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            channels_last = output.movedim(1, -1) if isinstance(layer, nn.Conv2d) else output
            found[name] = channels_last.reshape(-1, channels_last.shape[-1])

        return hook

    with ExitStack() as stack, torch.no_grad():
        for name in layers:
            layer = model.module.get_submodule(name)
            stack.callback(layer.register_forward_hook(keep(name, layer)).remove)
        model.module(*inputs)
    return found


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in module.named_parameters()}


def _assigned(alike: Tensor) -> Tensor:
    return torch.from_numpy(linear_sum_assignment(alike.numpy(), maximize=True)[1])
