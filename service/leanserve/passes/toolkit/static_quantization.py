"""Integers with ranges from calibration data: the options and the steps, for every pass that quantizes so.

`quantize_static` quantizes once, `quantize_select` many times with other layers left float: the data is read once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from leanserve.contracts import BuildContext, Model
from leanserve.errors import PassFailed

if TYPE_CHECKING:
    import onnx

    from leanserve.passes.toolkit.histograms import Range
    from leanserve.passes.toolkit.int8_graph import Bits
    from leanserve.passes.toolkit.onnx_graph import Graph

PERCENTILE = 99.99


class StaticOptions(BaseModel):
    """What is quantized, and how: inherited, so that it means the same everywhere."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    observer: Literal["minmax", "percentile", "entropy", "mse"] = "mse"
    """How an activation's range is chosen from its values: all of them, a share, least KL divergence, least error."""
    percentile: float | None = Field(default=None, gt=50, le=100)
    """With `observer: percentile`, the share of values in percent that the range holds (default 99.99)."""
    activations: Literal["asymmetric", "symmetric"] = "asymmetric"
    """Whether ranges that hold both signs reach as far below zero as above it."""
    weights: Literal["per_channel", "per_tensor"] = "per_channel"
    """One scale per output channel, or one per layer: smaller tables, lower accuracy."""
    rounding: Literal["nearest", "stochastic", "adaround"] = "nearest"
    """How a weight becomes a whole number: the nearest, up or down by chance, or as the layer's outputs want it."""
    attention: Literal["float", "int8"] = "float"
    """Products of two activations, as attention has them."""
    embeddings: Literal["float", "int8"] = "float"
    """Tables that rows are looked up in, with a scale per row."""
    reduce_range: Literal["auto", "on", "off"] = "auto"
    """Whether weights use 7 of their 8 bits. `auto`: only on CPUs whose sums of 8-bit products overflow (no VNNI)."""
    samples: PositiveInt = 256
    """Rows of the calibration split to look at, fewer if it has fewer."""
    batch: PositiveInt = 32
    """Rows per batch while calibrating: bounds the memory."""

    @model_validator(mode="after")
    def _percentile_is_used(self) -> Self:
        if self.percentile is not None and self.observer != "percentile":
            raise ValueError(f"percentile has no effect with observer '{self.observer}'; set observer: percentile")
        return self

    def calibrated(
        self, graph: Graph, subsets: Sequence[Collection[str]], model: Model, context: BuildContext
    ) -> Calibrated:
        """The graph with the ranges that quantizing it needs, whichever of the `subsets` of its nodes are kept float.

        Raises:
            PassFailed: there are no calibration rows, or a tensor holds NaN or infinity.
        """
        from leanserve.passes.toolkit.calibration import Recording, ranges_of
        from leanserve.passes.toolkit.histograms import range_finder
        from leanserve.passes.toolkit.int8_graph import int8_nodes, int8_tensors, symmetric_ranges, weight_bits
        from leanserve.passes.toolkit.rounding import WeightGrid, with_rounded_weights

        data = context.base.data("calibration", self.samples, model.spec)
        if not len(data):
            raise PassFailed("int8 ranges are calibrated with data, but the base's calibration split is empty")
        attention = self.attention == "int8"
        chosen = [int8_nodes(graph, kept, attention=attention) for kept in subsets]
        tensors = list(dict.fromkeys(name for nodes in chosen for name in int8_tensors(graph, nodes)))
        recording = Recording(graph.model, model.spec, tensors, data, self.batch, context.threads)
        ranges = ranges_of(recording, range_finder(self.observer, self.percentile or PERCENTILE), context.progress)
        if self.activations == "symmetric":
            ranges = symmetric_ranges(graph, ranges)
        bits = weight_bits(self.reduce_range, context.hardware.isa)
        if self.rounding != "nearest":
            layers = [node for node in chosen[0] if node in graph.layers]
            looked = dataclasses.replace(recording, tensors=list(dict.fromkeys(node.input[0] for node in layers)))
            graph = with_rounded_weights(graph, layers, self.rounding, WeightGrid(self.weights, bits), looked, context)
        return Calibrated(graph, ranges, self, bits, len(data))


@dataclass(frozen=True)
class Calibrated:
    """A float graph that can be quantized, wholly or in parts."""

    graph: Graph
    ranges: Mapping[str, Range]
    options: StaticOptions
    bits: Bits
    rows: int
    """Of the calibration split that were looked at."""

    def nodes(self, kept: Collection[str]) -> Sequence[onnx.NodeProto]:
        """What is computed in integers if these nodes are not."""
        from leanserve.passes.toolkit.int8_graph import int8_nodes

        return int8_nodes(self.graph, kept, attention=self.options.attention == "int8")

    def left(self, kept: Collection[str]) -> list[str]:
        """Layers that stay float."""
        names = {node.name for node in self.nodes(kept)}
        return [node.name for node in self.graph.layers if node.name not in names]

    def quantized(self, kept: Collection[str]) -> onnx.ModelProto:
        """The graph in integers, without the nodes in `kept`."""
        from leanserve.passes.toolkit.int8_graph import int8_tensors, quantized
        from leanserve.passes.toolkit.int8_tables import with_int8_tables

        chosen = self.nodes(kept)
        ranges = {name: self.ranges[name] for name in int8_tensors(self.graph, chosen)}
        written = quantized(self.graph, chosen, ranges, self.options.weights, self.bits)
        if self.options.embeddings == "float":
            return written
        return with_int8_tables(written, [node for node in self.graph.tables if node.name not in kept])
