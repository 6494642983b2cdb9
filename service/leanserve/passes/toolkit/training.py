"""The one training loop: everything that trains calls `train`, with what it lowers and with what happens on the way.

It exists once so that what is easy to get wrong is right once: a run that was interrupted goes on from its last epoch
and ends in the same weights as an undisturbed one, bfloat16 is used only where the CPU has instructions for it, and
whoever waits sees how far it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from leanserve.contracts import BuildContext, Data
from leanserve.errors import PassFailed
from leanserve.memory import is_out_of_memory
from leanserve.passes.toolkit.augmentation import require_augmentable
from leanserve.passes.toolkit.training_options import TrainingOptions
from leanserve.passes.toolkit.training_run import Division, Objective, Trained, TrainingCallback, TrainingRun

if TYPE_CHECKING:
    import torch
    from torch import nn


_VECTOR = 8
"""float32 in a vector of AVX2."""


def train(
    module: nn.Module,
    objective: Objective,
    data: Data,
    schedule: TrainingOptions,
    callbacks: Sequence[TrainingCallback],
    context: BuildContext,
) -> Trained:
    """Train `module` in place on `data` (usually the base's train split) and leave it in eval mode.

    After an interruption the same call with the same `context.scratch` goes on behind the last finished epoch and gives
    the same weights as an undisturbed run.

    Raises:
        PassFailed: there are no rows, the augmentation does not fit the inputs, the loss is not finite, or there is no
            memory for the batches; or the base says that rows share no batch, where a step needs many.
    """
    import torch

    if context.base.spec.rows != "any":
        raise PassFailed(
            f"training runs batches of any rows, and base.rows: {context.base.spec.rows} says that they share none; "
            "drop the pass"
        )
    if len(data) == 0:
        raise PassFailed(f"base '{context.base.name}' has no rows in its train split; training needs some")
    require_augmentable(schedule.augment, context.base.spec.inputs)
    threads = torch.get_num_threads()
    torch.set_num_threads(context.threads)
    try:
        module.to(context.device)
        objective.to(context.device)
        if (extra := objective.extra()) is not None:
            extra.to(context.device)
        order_kernels(module, torch.channels_last)
        with torch.random.fork_rng([0] if context.device != "cpu" else []), torch.enable_grad():
            run = TrainingRun(module, objective, schedule, callbacks, context, _division(schedule))
            return run.to_the_end(data)
    except Exception as error:
        if isinstance(error, PassFailed) or not is_out_of_memory(error):
            raise
        text = f"memory ran out while training on batches of {schedule.batch} rows ({error}); lower the option 'batch'"
        raise PassFailed(text) from error
    finally:
        torch.set_num_threads(threads)
        order_kernels(module.cpu().eval(), torch.contiguous_format)


def _division(schedule: TrainingOptions) -> Division:
    """What several processes share, if there are several."""
    if schedule.processes == 1:
        return Division()
    if schedule.splits_weights:
        from leanserve.passes.toolkit.split_weights import WeightDivision

        return WeightDivision()
    from leanserve.passes.toolkit.processes import RowDivision

    return RowDivision()


def order_kernels(module: nn.Module, order: torch.memory_format) -> None:
    """Store kernels of convolutions in this order; channels last, a small ResNet trains 1.4 times as fast on a CPU."""
    import torch
    from torch import nn

    convolutions = [child for child in module.modules() if isinstance(child, nn.Conv2d)]
    if order == torch.channels_last and any(map(_breaks_channels_last, convolutions)):
        return
    for child in convolutions:
        child.weight.data = child.weight.data.contiguous(memory_format=order)


def _breaks_channels_last(conv: nn.Conv2d) -> bool:
    """Whether oneDNN (3.12, of torch 2.13) may write where it must not: on CPUs with AVX2 and no more it does, in the
    backward pass of pointwise strided convolutions with less than a vector of inputs."""
    pointwise = conv.kernel_size == (1, 1) and conv.stride != (1, 1)
    return pointwise and conv.in_channels // conv.groups < _VECTOR
