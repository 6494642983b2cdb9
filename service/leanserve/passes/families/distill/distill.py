"""Distillation: train the compressed model to answer like the uncompressed base (Hinton, Vinyals and Dean 2015).

The teacher's soft answers say more per sample than labels do, and they need none, so unlabelled data will do. Placed
after pruning or factorisation it wins back most of what these have cost. It buys accuracy at no cost in serving; it
costs minutes of training. Sparsity patterns made by earlier passes are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveFloat

from leanserve.contracts import Base, BuildContext, Model, ModelSpec, TorchModel
from leanserve.errors import PassFailed
from leanserve.hardware import isa_flags
from leanserve.passes.base import Applied, Need, Pass, Stage, Tag
from leanserve.passes.toolkit.training import TrainingOptions, train

if TYPE_CHECKING:
    import torch
    from torch import nn

    from leanserve.passes.toolkit.objectives import LossKind, Output
    from leanserve.passes.toolkit.training import Loss

SPREAD_ROWS = 256
"""Rows of the train split on which the teacher shows how much its outputs vary."""


class Distill(TrainingOptions, Pass):
    """Train on the base's answers to the train split; the teacher sees the same augmented inputs as the student."""

    kind: Literal["distill"] = "distill"
    loss: Literal["auto", "kl", "mse", "cosine"] = "auto"
    """`kl` compares class probabilities, `cosine` directions of embeddings, `mse` values, each channel relative to its
    spread in the teacher. `auto`: what suits the meaning of each output. The losses of all outputs add up."""
    temperature: PositiveFloat = 4.0
    """Softens both distributions in `kl`: the larger, the more the small probabilities count."""
    alpha: float = Field(default=0.0, ge=0, le=1)
    """Weight of the hard-label cross-entropy beside the teacher's 1 - alpha; above 0 it needs labels."""

    needs: ClassVar[frozenset[Need]] = frozenset({"inputs", "train"})
    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    stage: ClassVar[Stage] = Stage.TRAINING
    isa_bound: ClassVar[bool] = True  # `precision: auto` trains differently where the CPU has bfloat16

    def apply(self, model: Model, context: BuildContext) -> Applied:
        import copy

        if not isinstance(model, TorchModel):
            raise PassFailed("distill trains torch modules; put it before the pass that exports the model")
        self._check(model.spec)
        student, teacher = copy.deepcopy(model.module), context.base.torch_module().eval()
        measures = self._measures(model.spec)
        outputs = self._outputs(teacher, model.spec, context.base)
        outcome = train(student, self._loss(student, teacher, model.spec, outputs), self, context)
        named = {model.spec.outputs[index].name: measure for index, measure in measures.items()}
        decisions = {"loss": named, "precision": self.resolved_precision(isa_flags())}
        facts = {"first_loss": outcome.first_loss, "last_loss": outcome.last_loss}
        return Applied(TorchModel(student, model.spec), decisions, facts)

    def _measures(self, spec: ModelSpec) -> dict[int, LossKind]:
        """By position, how each output is compared; whole numbers have no gradient and are left out."""
        from leanserve.passes.toolkit.objectives import BY_MEANING

        floats = ((index, item) for index, item in enumerate(spec.outputs) if item.dtype.startswith("float"))
        return {index: BY_MEANING[item.meaning] if self.loss == "auto" else self.loss for index, item in floats}

    def _outputs(self, teacher: nn.Module, spec: ModelSpec, base: Base) -> list[Output]:
        """All outputs of the teacher, with the scales of their channels."""
        import torch

        from leanserve.passes.toolkit.objectives import Output

        scales = _scales(teacher, spec, base) if "mse" in self._measures(spec).values() else {}
        return [
            Output(item.meaning, scales.get(index, torch.ones(1)), self.temperature)
            for index, item in enumerate(spec.outputs)
        ]

    def _check(self, spec: ModelSpec) -> None:
        if not self._measures(spec):
            raise PassFailed("distill trains on outputs of floats, and the base gives whole numbers only")
        if self.alpha and not spec.labels:
            raise PassFailed(f"distill.alpha is {self.alpha}, but the base has no classes; set it to 0")
        if self.augment != "none" and not any(len(item.shape) == 3 for item in spec.inputs):
            names = ", ".join(f"{item.name} {list(item.shape)}" for item in spec.inputs)
            raise PassFailed(f"distill.augment is '{self.augment}', but no input is an image (C, H, W): {names}")

    def _loss(self, student: nn.Module, teacher: nn.Module, spec: ModelSpec, outputs: Sequence[Output]) -> Loss:
        import torch

        from leanserve.passes.toolkit.objectives import MEASURES, cross_entropy

        measures = self._measures(spec)

        def loss(inputs: tuple[torch.Tensor, ...], labels: torch.Tensor | None) -> torch.Tensor:
            with torch.no_grad():
                wanted = _floats(teacher(*inputs))
            given = _floats(student(*inputs))
            distances = [MEASURES[measure](given[i], wanted[i], outputs[i]) for i, measure in measures.items()]
            distance = torch.stack(distances).sum()
            if not self.alpha:
                return distance
            if labels is None:
                raise PassFailed(f"distill.alpha is {self.alpha}, but the train split has no labels; set it to 0")
            hard = cross_entropy(given[spec.labelled], labels, outputs[spec.labelled].meaning)
            return self.alpha * hard + (1 - self.alpha) * distance

        return loss


def _floats(outputs: torch.Tensor | Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Outputs in float32: softmax and norms of bfloat16 lose what distillation is about."""
    return tuple(item.float() for item in (outputs if isinstance(outputs, tuple | list) else (outputs,)))


def _scales(teacher: nn.Module, spec: ModelSpec, base: Base) -> dict[int, torch.Tensor]:
    """By position of the output, what an error of each channel is relative to, shaped to be divided by."""
    import torch

    from leanserve.passes.toolkit.spread import channel_axis, channel_scales

    batches = base.data("train", SPREAD_ROWS).batches(32)
    with torch.no_grad():
        answers = [_floats(teacher(*map(torch.from_numpy, batch.inputs))) for batch in batches]
    found = {}
    for index, parts in enumerate(zip(*answers, strict=True)):
        axis = channel_axis(spec.outputs[index].shape)
        scales = torch.from_numpy(channel_scales([part.numpy() for part in parts], axis)).float()
        found[index] = scales.reshape([-1 if place == axis else 1 for place in range(parts[0].ndim)])
    return found
