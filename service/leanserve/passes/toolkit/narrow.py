"""The hidden features of a transformer layer that can go: heads of attention, neurons of the feed-forward part.

Both are the same thing: rows of linear layers that are read by columns of a later one. Attention is known by its parts:
three linear layers for query, key and value, or one for all (`qkv`), and a count of heads in the module that has them;
the linear layer that is called next reads what they mix. Whatever is found is tried out before it counts: without its
first unit the model must answer as with zeros in the columns that read it.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from leanserve.contracts import Data, TorchModel
from leanserve.passes.toolkit.activations import Moments, observe
from leanserve.runtime.formats.torch_size import example

COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
WIDTHS = ("all_head_size", "attn_dim", "inner_dim", "inner_attn_dim", "embed_dim")
"""Attributes by which modules call their count of heads, and the width of all heads together."""
APART = (("query", "key", "value"), ("q", "k", "v"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"))
TOGETHER = ("qkv", "Wqkv", "in_proj", "qkv_proj")
SAME = 1e-3


@dataclass(frozen=True)
class Units:
    """Units (heads, neurons) of one place: `size` features each, made by rows of `makers`, read by columns of `reader`.

    A maker holds `parts` copies of the features after another (3 of a fused `qkv`). `counter` is the module that counts
    heads.
    """

    what: Literal["heads", "feed_forward"]
    makers: tuple[str, ...]
    reader: str
    count: int
    size: int
    parts: int = 1
    counter: str | None = None

    def features(self, units: Sequence[int]) -> Tensor:
        """The places of the features of these units."""
        return (torch.tensor(units)[:, None] * self.size + torch.arange(self.size)).flatten()

    @torch.no_grad()
    def keep(self, module: nn.Module, units: Sequence[int]) -> None:
        """Leave these units, in place."""
        width, kept = self.count * self.size, self.features(units)
        rows = torch.cat([kept + part * width for part in range(self.parts)])
        for name in self.makers:
            _keep(module.get_submodule(name), rows, axis=0)
        _keep(module.get_submodule(self.reader), kept, axis=1)
        if self.counter is not None:
            counter = module.get_submodule(self.counter)
            for name in (*COUNTS, *WIDTHS):
                if vars(counter).get(name) in (self.count, width) and isinstance(vars(counter)[name], int):
                    setattr(counter, name, len(units) * (1 if name in COUNTS else self.size))

    @torch.no_grad()
    def idle(self, module: nn.Module) -> set[int]:
        """The units that say the same of every row, or that nobody reads: all weights of their values are zero, or all
        that multiply them. What a softmax mixes of one value is that value."""
        values = _linear(module, self.makers[-1]).weight[-self.count * self.size :]
        reader = _linear(module, self.reader).weight
        places = {unit: self.features([unit]) for unit in range(self.count)}
        return {unit for unit, at in places.items() if not (values[at].any() and reader[:, at].any())}

    @torch.no_grad()
    def silence(self, module: nn.Module, units: Sequence[int]) -> None:
        """Make nobody read these units, in place."""
        _linear(module, self.reader).weight[:, self.features(units)] = 0


def units_of(model: TorchModel) -> list[Units]:
    """All heads and feed-forward neurons that can go, in the order of execution."""
    order = _order(model)
    found = [*_attention(model.module, order), *_feed_forward(model.module, order)]
    return [item for item in found if item.count > 1 and _proven(model, item)]


def energies(model: TorchModel, units: Sequence[Units], data: Data) -> dict[str, tuple[Tensor, Tensor]]:
    """By reader: what each unit adds to its output (mean square, as a share of all units' sum), and the features' mean.

    What a unit adds varies with the row; its mean goes into the reader's bias when the unit goes, so that only what
    varies counts.
    """
    moments = {item.reader: Moments() for item in units}
    layers: dict[str, nn.Module] = {item.reader: model.module.get_submodule(item.reader) for item in units}
    observe(model, layers, data, lambda name, x, _: moments[name].add(x.flatten(0, -2)), lambda *_: None)
    found = {}
    for item in units:
        weight, covariance = (
            _linear(model.module, item.reader).weight.detach().double(),
            moments[item.reader].covariance,
        )
        blocks = [item.features([unit]) for unit in range(item.count)]
        added = torch.stack([((weight[:, at] @ covariance[at][:, at]) * weight[:, at]).sum() for at in blocks])
        found[item.reader] = (added.clamp_min(0) / added.sum().clamp_min(1e-12), moments[item.reader].mean)
    return found


@torch.no_grad()
def narrow(module: nn.Module, item: Units, kept: Sequence[int], mean: Tensor) -> None:
    """Leave some units, in place; the mean of what the others added stays in the reader's bias."""
    gone = item.features([unit for unit in range(item.count) if unit not in set(kept)])
    reader = _linear(module, item.reader)
    if reader.bias is not None and len(gone):
        reader.bias.add_((reader.weight[:, gone].double() @ mean[gone]).to(reader.bias.dtype))
    item.keep(module, kept)


def _attention(module: nn.Module, order: Sequence[str]) -> list[Units]:
    found = []
    for name, child in module.named_modules():
        count = next((vars(child)[key] for key in COUNTS if isinstance(vars(child).get(key), int)), 0)
        linears = {key: layer for key, layer in child.named_children() if isinstance(layer, nn.Linear)}
        groups = [group for group in (*APART, *((key,) for key in TOGETHER)) if set(group) <= linears.keys()]
        if not count or not groups:
            continue
        makers = tuple(f"{name}.{key}".lstrip(".") for key in groups[0])
        parts = 3 if len(makers) == 1 else 1
        widths = {linears[key].out_features for key in groups[0]}
        width = widths.pop() // parts
        reader = _next(order, makers)
        if not widths and width % count == 0 and reader and _linear(module, reader).in_features == width:
            found.append(Units("heads", makers, reader, count, width // count, parts, name))
    return found


def _feed_forward(module: nn.Module, order: Sequence[str]) -> list[Units]:
    found = []
    for up, down in pairwise(order):
        first, second = _linear(module, up), _linear(module, down)
        fits = first.out_features == second.in_features and first.in_features == second.out_features
        if fits and first.out_features > first.in_features:
            found.append(Units("feed_forward", (up,), down, first.out_features, 1))
    return found


def _proven(model: TorchModel, item: Units) -> bool:
    """Whether the model without a unit answers as with nobody reading it."""
    silent, without = copy.deepcopy(model.module), copy.deepcopy(model.module)
    inputs = example(model.spec, rows=2)
    try:
        with torch.no_grad():
            item.silence(silent, [0])
            item.keep(without, list(range(1, item.count)))
            wanted, given = tree_leaves(silent(*inputs)), tree_leaves(without(*inputs))
    except RuntimeError:
        return False  # its code counts on the width
    return all(bool((a - b).abs().max() <= SAME * a.abs().max()) for a, b in zip(wanted, given, strict=True))


def _order(model: TorchModel) -> list[str]:
    """Linear layers that are called once, in the order of execution."""
    calls: list[str] = []
    layers = {name: child for name, child in model.module.named_modules() if isinstance(child, nn.Linear)}
    with ExitStack() as stack, torch.no_grad():
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(lambda *_, name=name: calls.append(name)).remove)
        model.module(*example(model.spec))
    return [name for name in calls if calls.count(name) == 1]


def _next(order: Sequence[str], makers: Sequence[str]) -> str | None:
    """The linear layer that is called after all of the makers."""
    if not set(makers) <= set(order):
        return None
    last = max(order.index(name) for name in makers)
    return order[last + 1] if last + 1 < len(order) else None


def _keep(layer: nn.Module, places: Tensor, axis: int) -> None:
    assert isinstance(layer, nn.Linear)
    layer.weight = nn.Parameter(layer.weight.detach().index_select(axis, places))
    if axis == 0:
        layer.out_features = len(places)
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.detach()[places])
    else:
        layer.in_features = len(places)


def _linear(module: nn.Module, name: str) -> nn.Linear:
    layer = module.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer
