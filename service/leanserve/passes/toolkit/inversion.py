"""Inputs made from a network alone: noise that is changed until batch norms see what they saw in training.

Yin et al., "Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion", 2020: batch norms remember mean and
variance of what went through them, and a classifier which inputs it is sure of.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from leanserve.contracts import ArrayData, BuildContext, ModelSpec
from leanserve.errors import PassFailed
from leanserve.passes.toolkit.objectives import logits
from leanserve.passes.toolkit.teacher import floats_of

SMOOTH = 1e-3
"""Weight of the squared differences of neighbouring pixels."""


def invent(
    teacher: nn.Module, context: BuildContext, rows: int, batch: int, steps: int
) -> tuple[ArrayData, list[float]]:
    """`rows` inputs of the base's spec, and the mean loss of the first and the last step.

    Raises:
        PassFailed: the model has no batch norm to go by, or takes something else than one tensor of floats.
    """
    spec = context.base.spec
    norms = [child for child in teacher.modules() if isinstance(child, _BatchNorm) and child.track_running_stats]
    if not norms:
        raise PassFailed("distill_datafree goes by what batch norms remember, and this base has none; take distill")
    [shape, *others] = [item.shape for item in spec.inputs]
    if others or not spec.inputs[0].dtype.startswith("float") or None in shape:
        raise PassFailed("distill_datafree invents one input of floats of a fixed shape; take distill for this base")
    parts, losses = [], []
    generator = torch.Generator().manual_seed(context.seed)
    for done in range(0, rows, batch):
        count = min(batch, rows - done)
        x = torch.randn((count, *(size or 1 for size in shape)), generator=generator).requires_grad_()
        classes = torch.randint(0, max(1, len(spec.labels)), (count,), generator=generator)
        losses.append(_dream(teacher, norms, spec, x, classes, steps))
        parts.append(x.detach())
        context.progress(done + count, 2 * rows, "inventing inputs")
    ends = [sum(pair[place] for pair in losses) / len(losses) for place in (0, 1)]
    return ArrayData((torch.cat(parts).numpy(),)), ends


def _dream(
    teacher: nn.Module, norms: list[_BatchNorm], spec: ModelSpec, x: Tensor, classes: Tensor, steps: int
) -> tuple[float, float]:
    """Change `x` in place; the first and the last loss."""
    optimiser = torch.optim.Adam([x], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    seen: list[Tensor] = []
    found: list[float] = []
    with ExitStack() as stack, torch.enable_grad():
        for norm in norms:
            stack.callback(norm.register_forward_pre_hook(_statistics(seen)).remove)
        for _ in range(steps):
            seen.clear()
            optimiser.zero_grad()
            answers = floats_of(teacher(x))
            loss = torch.stack(seen).mean() + SMOOTH * _roughness(x)
            if spec.labels:
                loss = loss + F.cross_entropy(
                    logits(answers[spec.labelled], spec.outputs[spec.labelled].meaning), classes
                )
            torch.autograd.backward(loss, inputs=[x])
            optimiser.step()
            schedule.step()
            found.append(loss.item())
    return found[0], found[-1]


def _statistics(seen: list[Tensor]) -> Any:
    def look(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].movedim(1, -1).reshape(-1, inputs[0].shape[1])
        scale = norm.running_var + norm.eps
        apart = (rows.mean(0) - norm.running_mean).square() / scale
        seen.append(apart.mean() + (rows.var(0, unbiased=False) / scale - 1).square().mean())

    return look


def _roughness(x: Tensor) -> Tensor:
    if x.ndim != 4:
        return torch.zeros(())
    return x.diff(dim=-1).square().mean() + x.diff(dim=-2).square().mean()
