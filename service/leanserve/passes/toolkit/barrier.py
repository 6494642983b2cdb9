"""The loss on the straight way between the weights of two models: is there a barrier that an average would stand on?"""

from __future__ import annotations

import copy
import dataclasses

import torch

from leanserve.contracts import Base, Data, TorchModel
from leanserve.passes.toolkit.activations import refit_batch_norm, tensors
from leanserve.passes.toolkit.teacher import MatchTeacher, TeacherTerms

PLACES = (0.0, 0.25, 0.5, 0.75, 1.0)
ROWS = 64


def curve_between(one: TorchModel, other: TorchModel, base: Base, data: Data) -> list[float]:
    """The distance from the base's answers at `PLACES`, by what suits each output; batch norm is estimated at each."""
    return [answer_loss(_between(one, other, share, data), base, data) for share in PLACES]


def barrier_of(losses: list[float]) -> float:
    """How far the loss rises above the straight line between its ends; 0 if nowhere."""
    line = ((1 - share) * losses[0] + share * losses[-1] for share in PLACES)
    return max(loss - straight for loss, straight in zip(losses, line, strict=True))


@torch.no_grad()
def answer_loss(model: TorchModel, base: Base, data: Data) -> float:
    """Mean distance of a model's answers from the base's, at temperature 1."""
    objective = MatchTeacher(model, base, TeacherTerms(temperature=1.0))
    total, count = 0.0, 0
    for inputs in list(tensors(model, data, ROWS)):
        total += objective.loss(inputs, None).item() * len(inputs[0])
        count += len(inputs[0])
    return total / count


def _between(one: TorchModel, other: TorchModel, share: float, data: Data) -> TorchModel:
    made = dataclasses.replace(one, module=copy.deepcopy(one.module))
    theirs = other.module.state_dict()
    with torch.no_grad():
        for name, tensor in made.module.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.lerp(tensor.double(), theirs[name].double(), share))
    refit_batch_norm(made, {name.rpartition(".")[0] for name in theirs}, data)
    return made
