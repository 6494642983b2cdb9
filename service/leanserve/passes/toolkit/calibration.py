"""Ranges of activations, found by streaming calibration data through the model.

Keeping every activation of every sample takes hundreds of gigabytes on a real model. Here the data is read twice in
batches: once for the extent of each tensor, once to fill a histogram of fixed size over that extent. Memory is bounded
by the activations of one batch, whatever the number of samples.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx

from leanserve.contracts import Array, Arrays, Data, ModelSpec, Progress
from leanserve.errors import PassFailed
from leanserve.memory import run_in_parts
from leanserve.passes.toolkit.histograms import Extent, FindRange, Histogram, Range
from leanserve.passes.toolkit.lowering import feeds, open_session


@dataclass(frozen=True)
class Recording:
    """The activations `tensors` of a float graph on `data`, `batch` rows at a time or as fit; may be replayed."""

    model: onnx.ModelProto
    spec: ModelSpec
    tensors: Sequence[str]
    data: Data
    batch: int
    threads: int

    def play(self) -> Iterator[tuple[int, Mapping[str, Array]]]:
        """Yield the number of rows of each batch and what the tensors were in it."""
        inputs = {item.name for item in self.model.graph.input}
        computed = [name for name in self.tensors if name not in inputs]
        session = open_session(_exposing(self.model, computed), self.threads)

        def values(inputs: Arrays) -> tuple[int, Mapping[str, Array]]:
            given = feeds(self.spec, inputs)
            # Asked for no output, onnxruntime gives all: of a graph with one layer only the input is watched.
            activations = session.run(computed, given) if computed else ()
            found = given | dict(zip(computed, activations, strict=True))
            return len(inputs[0]), {name: found[name] for name in self.tensors}

        for batch in self.data.batches(self.batch):
            yield from run_in_parts(values, batch.inputs)


def extents_of(recording: Recording, progress: Progress) -> dict[str, Extent]:
    """The smallest and largest value of each tensor.

    Raises:
        PassFailed: a tensor contains NaN or infinity.
    """
    extents = {name: Extent() for name in recording.tensors}
    for activations in watched(recording, progress, "finding ranges"):
        for name, values in activations.items():
            try:
                extents[name].add(values)
            except ValueError as error:
                raise PassFailed(f"tensor '{name}' cannot be calibrated: {error}") from error
    return extents


def ranges_of(recording: Recording, find: FindRange | None, progress: Progress) -> dict[str, Range]:
    """The range of each tensor that `find` reads from its histogram; without `find` all that was seen."""
    extents = extents_of(recording, progress)
    if find is None:
        return {name: (extent.low, extent.high) for name, extent in extents.items()}
    histograms = {name: Histogram(extent) for name, extent in extents.items()}
    for activations in watched(recording, progress, "filling histograms"):
        for name, values in activations.items():
            histograms[name].add(values)
    return {name: find(histogram) for name, histogram in histograms.items()}


def watched(recording: Recording, progress: Progress, note: str) -> Iterator[Mapping[str, Array]]:
    """What the tensors are in each batch; `progress` is told of it with this note."""
    done = 0
    for rows, activations in recording.play():
        yield activations
        done += rows
        progress(done, len(recording.data), note)


def _exposing(model: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """The graph with these tensors among its outputs."""
    exposed = copy.deepcopy(model)
    present = {item.name for item in exposed.graph.output}
    described = {item.name: item for item in exposed.graph.value_info}
    exposed.graph.output.extend(described[name] for name in tensors if name not in present)
    return exposed
