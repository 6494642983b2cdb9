"""Distillation: train the compressed model to answer like the uncompressed base (Hinton, Vinyals and Dean 2015).

The teacher's soft answers say more per sample than labels do, and they need none, so unlabelled data will do. Placed
after pruning or factorisation it wins back most of what these have cost. It buys accuracy at no cost in serving; it
costs minutes of training. Sparsity patterns made by earlier passes are kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveFloat

from service.compression.passes.base import Applied, Need, Pass, Tag
from service.compression.tools.training import TrainingOptions, train
from service.contracts import BuildContext, InputSpec, Model, TorchModel
from service.errors import PassFailed
from service.machine import isa_flags

if TYPE_CHECKING:
    import torch
    from torch import nn

    from service.compression.tools.training import Loss

Measure = Literal["kl", "mse", "cosine"]

RULED_OUT = -1e4
"""A logarithm whose exponential is 0."""


class Distill(TrainingOptions, Pass):
    """Train on the base's answers to the train split; the teacher sees the same augmented inputs as the student."""

    kind: Literal["distill"] = "distill"
    loss: Literal["auto", "kl", "mse", "cosine"] = "auto"
    """`kl` compares class probabilities, `cosine` directions of embeddings, `mse` values relative to the teacher's
    variance. `auto`: `kl` where the base has classes, else `cosine`."""
    temperature: PositiveFloat = 4.0
    """Softens both distributions in `kl`: the larger, the more the small probabilities count."""
    alpha: float = Field(default=0.0, ge=0, le=1)
    """Weight of the hard-label cross-entropy beside the teacher's 1 - alpha; above 0 it needs labels."""

    needs: ClassVar[frozenset[Need]] = frozenset({"inputs", "train"})
    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    order: ClassVar[int] = 5
    isa_bound: ClassVar[bool] = True  # `precision: auto` trains differently where the CPU has bfloat16

    def apply(self, model: Model, context: BuildContext) -> Applied:
        import copy

        if not isinstance(model, TorchModel):
            raise PassFailed("distill trains torch modules; put it before the pass that exports the model")
        self._check(model.spec)
        student = copy.deepcopy(model.module)
        outcome = train(student, self._loss(student, context.base.build().eval(), model.spec), self, context)
        decisions = {"loss": self._measure(model.spec), "precision": self.resolved_precision(isa_flags())}
        facts = {"first_loss": outcome.first_loss, "last_loss": outcome.last_loss}
        return Applied(TorchModel(student, model.spec), decisions, facts)

    def _measure(self, spec: InputSpec) -> Measure:
        if self.loss == "auto":
            return "kl" if spec.labels else "cosine"
        return self.loss

    def _check(self, spec: InputSpec) -> None:
        if self.alpha and not spec.labels:
            raise PassFailed(f"distill.alpha is {self.alpha}, but the base has no classes; set it to 0")
        if self.augment != "none" and not any(len(item.shape) == 3 for item in spec.fields):
            names = ", ".join(f"{item.name} {list(item.shape)}" for item in spec.fields)
            raise PassFailed(f"distill.augment is '{self.augment}', but no input is an image (C, H, W): {names}")

    def _loss(self, student: nn.Module, teacher: nn.Module, spec: InputSpec) -> Loss:
        import torch
        import torch.nn.functional as F

        measure = self._measure(spec)

        def loss(inputs: tuple[torch.Tensor, ...], labels: torch.Tensor | None) -> torch.Tensor:
            with torch.no_grad():
                wanted = _outputs(teacher(*inputs))
            given = _outputs(student(*inputs))
            pairs = zip(given, wanted, strict=True)
            distance = torch.stack([_distance(measure, a, b, self.temperature) for a, b in pairs]).mean()
            if not self.alpha:
                return distance
            if labels is None:
                raise PassFailed(f"distill.alpha is {self.alpha}, but the train split has no labels; set it to 0")
            return self.alpha * F.cross_entropy(given[0], labels.long()) + (1 - self.alpha) * distance

        return loss


def _outputs(outputs: torch.Tensor | tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Outputs in float32: softmax and norms of bfloat16 lose what distillation is about."""
    return tuple(item.float() for item in (outputs if isinstance(outputs, tuple) else (outputs,)))


def _distance(measure: Measure, given: torch.Tensor, wanted: torch.Tensor, temperature: float) -> torch.Tensor:
    import torch.nn.functional as F

    if measure == "kl":
        log_given, log_wanted = (F.log_softmax(item / temperature, dim=-1) for item in (given, wanted))
        # A class that the teacher rules out (a logit of -inf) adds p log p = 0, which floats call NaN.
        out = log_wanted.isneginf()
        log_given, log_wanted = log_given.masked_fill(out, 0.0), log_wanted.masked_fill(out, RULED_OUT)
        # Gradients shrink with the temperature's square; undo that, as in section 2.1 of the paper.
        return F.kl_div(log_given, log_wanted, reduction="batchmean", log_target=True) * temperature**2
    alike = wanted.isinf() & (given == wanted)
    given, wanted = given.masked_fill(alike, 0.0), wanted.masked_fill(alike, 0.0)
    if measure == "cosine":
        return (1 - F.cosine_similarity(given, wanted, dim=-1)).mean()
    return F.mse_loss(given, wanted) / wanted.var().clamp_min(1e-12)
