"""Channels that must go together, in the order in which they go.

Removing an output channel removes an input channel of every consumer, and residual sums tie the channels of several
layers. torch-pruning (Fang et al., "DepGraph: Towards Any Structural Pruning", 2023) finds these groups by tracing.
Here they are cut into *blocks* of `round_to` channels, weakest first, because kernels are slow at odd channel counts;
all blocks of the model are put into one order, and pruning is the choice of how many of them to remove.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from leanserve.contracts import ModelSpec, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.toolkit.importance import Importance
from leanserve.passes.toolkit.layer_times import LayerTimes
from leanserve.runtime.formats.torch_size import example

Scope: TypeAlias = Literal["global", "uniform", "inner"]
"""In which order channels go: `uniform` takes the same share of every layer, `inner` of those alone that no sum ties to
others, such as the first layer of a residual block; with `global` channels compete across layers."""

LEAST_S = 1e-9
"""What a block saves at least, in seconds: a layer may be faster at a larger width."""
CLOSE = 0.01
"""A share that is near enough to its goal."""
LOOK = 12
"""Blocks that are tried, out of their order, to come closer."""


@dataclass(frozen=True)
class ChannelGroup:
    """Channels tied to the outputs of the layer `root`; each *slot* is `repeat` channels (more than 1 if grouped)."""

    root: str
    scores: tuple[float, ...]
    """Importance of each slot."""
    repeat: int
    makers: tuple[str, ...] = ()
    """The layers that make these channels: several, where a sum ties their outputs."""
    readers: tuple[str, ...] = ()
    """The layers that take them in."""

    def blocks(self, round_to: int, widest: int, scope: Scope) -> list[Block]:
        """Blocks that may be removed, weakest first, leaving a multiple of `round_to` channels (at least one).

        `widest` is the number of slots before any pruning; a uniform scope removes equal shares of it everywhere.
        """
        size = round_to // math.gcd(round_to, self.repeat)
        order = sorted(range(len(self.scores)), key=lambda slot: (self.scores[slot], slot))
        starts = [0, *range(len(order) % size or size, len(order) - size + 1, size)]
        blocks = []
        for start, end in pairwise(starts):
            slots = order[start:end]
            score = sum(self.scores[slot] for slot in slots) / len(slots)
            share = 1 - (len(order) - (start + end) / 2) / widest
            channels = [slot + part * len(order) for slot in slots for part in range(self.repeat)]
            blocks.append(Block(self.root, channels, score if scope == "global" else share))
        return blocks


class Block(NamedTuple):
    """Output channels of `root` that are removed together; blocks go in ascending `priority`."""

    root: str
    channels: list[int]
    priority: float


def channel_groups(model: TorchModel, importance: Importance, frozen: Collection[nn.Module]) -> list[ChannelGroup]:
    """The groups that may be pruned, in the model's order: none of a frozen layer, none that reaches an output."""
    from torch_pruning.ops import OPTYPE

    graph = traced_graph(model.module, model.spec)
    names = {child: name for name, child in model.module.named_modules()}
    found = []
    for group in graph.get_all_groups(ignored_layers=list(frozen), root_module_types=[nn.Conv2d, nn.Linear]):
        if any(dep.target.type == OPTYPE.OUTPUT for dep, _ in group):
            continue
        scores = importance(group)
        if scores is not None:
            repeat = _repeat(graph, group)
            slots = scores.reshape(repeat, -1).mean(0)
            root = names[group[0].dep.target.module]
            found.append(ChannelGroup(root, tuple(slots.tolist()), repeat, *_around(graph, group, names)))
    return found


def blocks_of_groups(
    groups: Sequence[ChannelGroup], round_to: int, widest: Mapping[str, int], scope: Scope
) -> list[Block]:
    """Everything that can be removed, in the order of removal; `widest`: each root's slots before any pruning."""
    chosen = [group for group in groups if scope != "inner" or len(group.makers) == 1]
    blocks = [block for group in chosen for block in group.blocks(round_to, widest[group.root], scope)]
    return sorted(blocks, key=lambda block: block.priority)


def by_saved_time(
    groups: Sequence[ChannelGroup], round_to: int, widest: Mapping[str, int], times: LayerTimes
) -> list[Block]:
    """As `blocks_of_groups`, in the order of importance for each second that a block saves: the fractional knapsack."""
    priced = []
    for group in groups:
        width, before = len(group.scores) * group.repeat, 0.0
        for block in group.blocks(round_to, widest[group.root], "global"):
            left = width - len(block.channels)
            saved = sum(_saved(times, name, width, left, made=True) for name in group.makers)
            saved += sum(_saved(times, name, width, left, made=False) for name in group.readers)
            price = block.priority * len(block.channels) / max(saved, LEAST_S)
            before = max(before, price)  # those of a group go weakest first, whatever they save
            priced.append(block._replace(priority=before))
            width = left
    return sorted(priced, key=lambda block: block.priority)


def _saved(times: LayerTimes, name: str, width: int, left: int, *, made: bool) -> float:
    inputs, outputs = times.widths(name)
    if made:
        return times.seconds(name, inputs, width) - times.seconds(name, inputs, left)
    share = inputs // width if inputs % width == 0 else 1  # flattened images: several inputs for each channel
    return times.seconds(name, width * share, outputs) - times.seconds(name, left * share, outputs)


def _around(graph: Any, group: Any, names: Mapping[nn.Module, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The layers with weights that make the channels of a group, and those that read them."""
    makers: list[str] = []
    readers: list[str] = []
    for dep, _ in group:
        layer = dep.target.module
        if isinstance(layer, nn.Conv2d | nn.Linear):
            (makers if graph.is_out_channel_pruning_fn(dep.handler) else readers).append(names[layer])
    return tuple(dict.fromkeys(makers)), tuple(dict.fromkeys(readers))


def without(model: TorchModel, blocks: Sequence[Block]) -> TorchModel:
    """A copy of the model without the channels of these blocks.

    Raises:
        PassFailed: the model's code depends on the channel counts that changed.
    """
    made = replace(model, module=copy.deepcopy(model.module))
    graph = traced_graph(made.module, made.spec)
    channels: dict[str, list[int]] = {}
    for block in blocks:
        channels.setdefault(block.root, []).extend(block.channels)
    for root, removed in channels.items():
        layer = made.module.get_submodule(root)
        prune = graph.get_pruner_of_module(layer).prune_out_channels
        graph.get_pruning_group(layer, prune, sorted(removed)).prune()
    _check_outputs(made, list(channels))
    return made


def nearest(
    model: TorchModel, blocks: Sequence[Block], kept: Callable[[TorchModel], float], goal: float, look: int = LOOK
) -> TorchModel:
    """Remove so many of the `blocks`, in their order, that `kept` comes closest to `goal`; found by bisection.

    Where the next block in order is so large that it leads too far, smaller ones of the `look` after it are taken.
    """
    low, high = 0, len(blocks)
    fewer, more = model, without(model, blocks)
    above, below = kept(fewer), kept(more)
    while high - low > 1:
        middle = (low + high) // 2
        made = without(model, blocks[:middle])
        share = kept(made)
        if share <= goal:
            high, more, below = middle, made, share
        else:
            low, fewer, above = middle, made, share
    if min(goal - below, above - goal) > CLOSE:
        fewer = _filled(model, blocks[: low + 1 + look], low, kept, goal) or fewer
        above = kept(fewer)
    return more if goal - below <= above - goal else fewer


def _filled(
    model: TorchModel, blocks: Sequence[Block], taken: int, kept: Callable[[TorchModel], float], goal: float
) -> TorchModel | None:
    """Without the first `taken` blocks, and those after the next one that fit above the goal; `None`: none does."""
    chosen, skipped, found = list(blocks[:taken]), {blocks[taken].root}, None
    for block in blocks[taken + 1 :]:
        if block.root not in skipped:
            made = without(model, [*chosen, block])
            if kept(made) >= goal:
                chosen.append(block)
                found = made
            else:
                skipped.add(block.root)
    return found


def width(model: TorchModel, roots: Collection[str]) -> int:
    """Output channels of the layers `roots`, together."""
    return sum(len(model.module.get_parameter(f"{root}.weight")) for root in roots)


def _check_outputs(model: TorchModel, pruned: Sequence[str]) -> None:
    place = f"targets: without some channels of {', '.join(pruned)}"
    try:
        with torch.no_grad():
            outputs = tree_leaves(model.module(*example(model.spec)))
    except RuntimeError as error:
        raise PassFailed(
            f"{place} the model no longer runs ({error}); its code depends on a channel count, exclude these layers"
        ) from error
    for output, field in zip(outputs, model.spec.outputs, strict=False):
        if any(size not in {None, found} for size, found in zip(field.shape, output.shape[1:], strict=False)):
            raise PassFailed(
                f"{place} the output {field.name} has shape {tuple(output.shape[1:])}; exclude these layers"
            )


def traced_graph(module: nn.Module, spec: ModelSpec) -> Any:
    """torch-pruning's dependency graph of a module: which channels belong together."""
    import torch_pruning

    module.requires_grad_(requires_grad=True)  # the tracing follows gradients
    with torch.enable_grad(), warnings.catch_warnings():
        # A parameter outside of the known layers is pruned along its last axis, which its shape check verifies.
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        graph: Any = torch_pruning.DependencyGraph()  # type: ignore[no-untyped-call]
        return graph.build_dependency(
            module,
            example_inputs=example(spec),
            # An operation of our own marks each output, so that groups which reach one are known.
            output_transform=lambda outputs: tree_map(lambda tensor: tensor * 1, outputs),
            verbose=False,
        )


def _repeat(graph: Any, group: Any) -> int:
    """Into how many parts the group's channels are cut by grouped convolutions and group norms."""
    repeats = [1]
    for dep, _ in group:
        layer = dep.target.module
        pruner = graph.get_pruner_of_module(layer)
        if isinstance(layer, nn.Conv2d) and layer.groups == layer.out_channels:
            continue  # depthwise: every channel stands alone
        if graph.is_out_channel_pruning_fn(dep.handler):
            repeats.append(pruner.get_out_channel_groups(layer))
        else:
            repeats.append(pruner.get_in_channel_groups(layer))
    return max(repeats)
