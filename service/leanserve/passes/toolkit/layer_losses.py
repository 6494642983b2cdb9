"""What the answers lose when one layer alone gets lower ranks: which layers bear them, found out by trying."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeAlias, cast

import torch
from torch import nn

from leanserve.contracts import Base, BuildContext, Data, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.toolkit.activations import tensors
from leanserve.passes.toolkit.notes import Notes
from leanserve.passes.toolkit.rank_ladders import Losses, Ranks
from leanserve.passes.toolkit.structure import replace
from leanserve.passes.toolkit.teacher import MatchTeacher, TeacherTerms, floats_of

Instead: TypeAlias = Callable[[str, Sequence[Ranks], Data], Sequence[nn.Module]]
"""What takes the place of a layer, for each of these ranks; it may look at the rows first."""

ASKED_ROWS = 128
"""Calibration rows whose answers are compared: all layers are told apart by the same ones."""
ROWS = 64


def losses_by_layer(
    model: TorchModel, layers: Mapping[str, nn.Module], instead: Instead, samples: int, context: BuildContext
) -> dict[str, Losses]:
    """By layer, how to find out what the answers lose by ranks of it alone; what is found is kept in `scratch`.

    Raises:
        PassFailed: the answers are whole numbers, between which there is no distance.
    """
    if not TeacherTerms().measures(model.spec):
        raise PassFailed("sensitivity: answers needs outputs with a distance, and all are whole numbers; take energy")
    data = context.base.data("calibration", min(samples, ASKED_ROWS), model.spec)
    distance = AnswerDistance(model, context.base, data)
    notes = Notes(context.scratch / "losses.json")

    @torch.inference_mode(mode=False)  # whoever asks may be timing
    def found(name: str, ranks: Sequence[Ranks]) -> list[float]:
        return [distance.with_other(layers[name], other) for other in instead(name, ranks, data)]

    def lost(name: str, ranks: Sequence[Ranks]) -> list[float]:
        context.progress(list(layers).index(name), len(layers), "asking for answers")
        return cast("list[float]", notes.once(f"{name} {ranks}", lambda: found(name, ranks)))

    return {name: partial(lost, name) for name in layers}


class AnswerDistance:
    """Of a model with one layer changed from the model as it is: the mean over rows, each output by what suits it."""

    @torch.no_grad()
    def __init__(self, model: TorchModel, base: Base, data: Data) -> None:
        self._module = model.module
        self._objective = MatchTeacher(model, base, TeacherTerms(temperature=1.0), teacher=model.module)
        self._batches = list(tensors(model, data, ROWS))
        self._wanted = [floats_of(self._module(*inputs)) for inputs in self._batches]

    @torch.no_grad()
    def with_other(self, layer: nn.Module, other: nn.Module) -> float:
        """With `other` in the place of `layer`, which is put back."""
        replace(self._module, layer, other)
        try:
            answers = [floats_of(self._module(*inputs)) for inputs in self._batches]
        finally:
            replace(self._module, other, layer)
        distances = map(self._objective.distance, answers, self._wanted)
        rows = [len(inputs[0]) for inputs in self._batches]
        return sum(float(distance) * count for distance, count in zip(distances, rows, strict=True)) / sum(rows)
