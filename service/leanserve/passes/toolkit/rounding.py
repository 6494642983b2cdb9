"""Which way a weight is rounded: the nearest whole number is the best for the weight, not for what the layer gives.

`adaround` solves the problem of Nagel et al. 2020 ("Up or Down? Adaptive Rounding"): of all weights rounded up or down,
those of least error of the layer's outputs on calibration rows, which takes no more of the data than the second moments
of its inputs. It is solved weight by weight, each given all others, instead of by their relaxation. `stochastic` rounds
up with the probability of the fraction, which is right in the mean.

Quantizers round to the nearest. So weights are moved onto the grid beforehand, where the nearest is the weight itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import onnx
import torch
from onnx import numpy_helper

from leanserve.contracts import Array, BuildContext
from leanserve.errors import PassFailed
from leanserve.passes.toolkit.calibration import Recording, watched
from leanserve.passes.toolkit.histograms import Floats
from leanserve.passes.toolkit.onnx_graph import Graph

if TYPE_CHECKING:
    from leanserve.passes.toolkit.int8_graph import Bits, Weights

LARGEST = {8: 127, 7: 64}
SWEEPS = 3
"""How often each weight is looked at: after the second time few change."""
BLOCK = 64
"""Inputs after which the errors of all others are brought up to date."""


class WeightGrid(NamedTuple):
    """The numbers that weights become: how many bits a whole one has, and what shares a scale."""

    weights: Weights
    bits: Bits

    def scales(self, weight: Floats) -> Floats:
        """Of a matrix [outputs, inputs]: [outputs, 1] or [1, 1]; that of zeros is any."""
        largest = np.abs(weight).max(axis=1 if self.weights == "per_channel" else None, keepdims=True)
        scales: Floats = np.where(largest > 0, largest, 1) / LARGEST[self.bits]
        return scales


def with_rounded_weights(
    graph: Graph,
    layers: Sequence[onnx.NodeProto],
    rounding: Literal["stochastic", "adaround"],
    grid: WeightGrid,
    recording: Recording,
    context: BuildContext,
) -> Graph:
    """The graph with the layers' weights on the grid of their scales; `recording` has what the layers read."""
    random = np.random.default_rng(context.seed)
    moments = input_moments(graph, layers, recording, context) if rounding == "adaround" else {}
    written: dict[str, Array] = {}
    for done, node in enumerate(layers, start=1):
        weight = as_matrix(graph, node)
        scales, largest = grid.scales(weight), LARGEST[grid.bits]
        if rounding == "stochastic":
            whole = np.floor(weight / scales + random.random(weight.shape))
            whole = np.clip(whole, -largest, largest)
        elif node.name in moments:
            whole = adaround(weight / scales, scales, moments[node.name], largest)
        else:  # nothing is known of what it reads
            whole = np.rint(weight / scales)
        written[node.input[1]] = _as_stored(graph, node, whole * scales)
        context.progress(done, len(layers), "rounding weights")
    model = copy.deepcopy(graph.model)
    for item in model.graph.initializer:
        if item.name in written:
            item.CopyFrom(numpy_helper.from_array(written[item.name], item.name))
    return Graph(model)


def adaround(wanted: Floats, scales: Floats, moments: Floats, largest: int) -> Floats:
    """Whole numbers [outputs, inputs] beside the `wanted` ones, of least error of the outputs.

    `moments` is [inputs, inputs], or [groups, inputs, inputs] where the outputs belong to as many groups, in order.
    """
    if moments.ndim == 3:
        outputs = len(wanted) // len(moments)
        parts = [slice(start, start + outputs) for start in range(0, len(wanted), outputs)]
        scales = np.broadcast_to(scales, (len(wanted), 1))
        found = [adaround(wanted[part], scales[part], own, largest) for part, own in zip(parts, moments, strict=True)]
        return np.concatenate(found)
    low = np.clip(np.floor(wanted), -largest, largest)
    high = np.clip(low + 1, -largest, largest)
    whole = np.clip(np.rint(wanted), -largest, largest)
    # A scale of the outputs multiplies all errors of one alike, and changes no choice.
    slopes = (whole - wanted) @ moments
    for _ in range(SWEEPS):
        for start in range(0, wanted.shape[1], BLOCK):
            block = slice(start, min(start + BLOCK, wanted.shape[1]))
            slopes += _turned(whole, low, high, slopes, moments, block) @ moments[block]
    return whole


def _turned(whole: Floats, low: Floats, high: Floats, slopes: Floats, moments: Floats, block: slice) -> Floats:
    """Turn weights of a block the other way where that lowers the error, in place; what each has changed by."""
    own, inner = slopes[:, block].copy(), moments[block, block]
    changes = np.zeros_like(own)
    for place, column in enumerate(range(block.start, block.stop)):
        change = np.where(whole[:, column] == low[:, column], high[:, column], low[:, column]) - whole[:, column]
        gain = 2 * change * own[:, place] + change**2 * inner[place, place]
        changes[:, place] = np.where(gain < 0, change, 0)
        whole[:, column] += changes[:, place]
        own += np.outer(changes[:, place], inner[place])
    return changes


def as_matrix(graph: Graph, node: onnx.NodeProto) -> Floats:
    """The weight of a layer as [outputs, inputs]."""
    weight = numpy_helper.to_array(graph.constants[node.input[1]]).astype(np.float64)
    return weight.reshape(len(weight), -1) if node.op_type == "Conv" else graph.kernel(node).astype(np.float64)


def _as_stored(graph: Graph, node: onnx.NodeProto, weight: Floats) -> Array:
    shape = tuple(graph.constants[node.input[1]].dims)
    outputs_first = node.op_type == "Conv" or any(item.name == "transB" and item.i for item in node.attribute)
    return np.ascontiguousarray((weight if outputs_first else weight.T).reshape(shape), np.float32)


def input_moments(
    graph: Graph, layers: Sequence[onnx.NodeProto], recording: Recording, context: BuildContext
) -> dict[str, Floats]:
    """Mean outer products of what each layer multiplies, by its name; not of convolutions of one or three dimensions.

    Raises:
        PassFailed: a tensor holds NaN or infinity.
    """
    sums: dict[str, Any] = {}
    for activations in watched(recording, context.progress, "watching layers"):
        for node in layers:
            for vectors in _vectors(node, activations, graph):
                sums[node.name] = sums.get(node.name, 0.0) + vectors
    if broken := [name for name, total in sums.items() if not np.isfinite(total).all()]:
        raise PassFailed(f"what layer '{broken[0]}' reads cannot be calibrated: it contains NaN or infinite values")
    return sums


def _vectors(node: onnx.NodeProto, activations: Mapping[str, Array], graph: Graph) -> Iterator[Floats]:
    """The outer products of a batch, summed."""
    values = activations[node.input[0]]
    if node.op_type != "Conv":
        flat = values.reshape(-1, values.shape[-1])
        yield (flat.T @ flat).astype(np.float64)
    elif values.ndim == 4:
        about = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        kernel = tuple(graph.constants[node.input[1]].dims[2:])
        top, left, bottom, right = about.get("pads", [0, 0, 0, 0])
        padded = torch.nn.functional.pad(torch.from_numpy(values), (left, right, top, bottom))
        strides, dilations = about.get("strides", [1, 1]), about.get("dilations", [1, 1])
        patches = torch.nn.functional.unfold(padded, kernel, dilation=dilations, stride=strides)
        groups = about.get("group", 1)
        apart = patches.reshape(len(patches), groups, -1, patches.shape[-1]).permute(1, 2, 0, 3).flatten(2)
        products = torch.matmul(apart, apart.mT).double().numpy()
        yield products if groups > 1 else products[0]
