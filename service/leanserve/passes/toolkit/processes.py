"""One training by several processes, each of which computes its share of every batch (data-parallel, synchronous).

Every process runs the same pass on the same model with the same seed, so that all of them have the same weights at
every step; what they tell each other are gradients, over gloo. Without batch norm the result is that of one process,
but for the order of sums; a batch norm sees the rows of its own process, and all go on with the first one's statistics.

`leanserve.build.peers` starts the other processes, as torchrun would.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from leanserve.passes.toolkit.training_run import Division, TrainingCallback, TrainingRun


class RowDivision(Division):
    """Every process computes some rows of each batch."""

    def around(self, callbacks: Sequence[TrainingCallback]) -> Sequence[TrainingCallback]:
        return [ShareStatistics(), *callbacks, ShareSteps()]

    def own_rows(self, tensor: Tensor) -> Tensor:
        return tensor[dist.get_rank() :: dist.get_world_size()]


class ShareStatistics(TrainingCallback):
    """All go on with the running statistics of the first process. The first callback: others look at them."""

    def end_step(self, run: TrainingRun) -> None:
        buffers = [item for item in run.module.buffers() if item.is_floating_point()]
        if buffers:
            flat = torch.cat([item.reshape(-1).float() for item in buffers])
            dist.broadcast(flat, 0)
            for item, values in zip(buffers, torch.split(flat, [item.numel() for item in buffers]), strict=True):
                item.copy_(values.view_as(item))


class ShareSteps(TrainingCallback):
    """Gradients become the mean over all rows of all processes. The last callback: what others ask for is shared."""

    def gradients(self, run: TrainingRun, compute: Callable[[], Tensor]) -> Tensor:
        loss = compute()
        trained = [item for group in run.optimiser.param_groups for item in group["params"] if item.grad is not None]
        flat = torch.cat([loss.detach().reshape(1).float(), *(item.grad.reshape(-1) for item in trained)])
        flat *= run.rows / run.all_rows
        dist.all_reduce(flat)
        for item, grad in zip(trained, torch.split(flat[1:], [item.numel() for item in trained]), strict=True):
            item.grad.copy_(grad.view_as(item))
        return flat[0]
