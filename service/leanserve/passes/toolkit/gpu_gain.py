"""Can this GPU do it, and is it faster than bfloat16? For passes that pay on tensor cores alone."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import nn

from leanserve.contracts import BuildContext, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.toolkit.timing import inference, seconds_per_call

ROWS = 32
"""Rows of the measured batch."""


def require_capability(kind: str, least: tuple[int, int], device: str) -> None:
    """Ask torch what the GPU is.

    Raises:
        PassFailed: it is older than the pass needs, or torch was built without CUDA.
    """
    if not torch.cuda.is_available():
        raise PassFailed(f"{kind} needs torch built for CUDA, and this one sees no GPU; install the extra 'gpu'")
    if (found := torch.cuda.get_device_capability(device)) < least:
        raise PassFailed(f"{kind} needs compute capability {least[0]}.{least[1]}, the GPU has {found[0]}.{found[1]}")


def gain(model: TorchModel, module: nn.Module, context: BuildContext) -> float:
    """Seconds of a batch of the model in bfloat16 over those of `module`, which are put on the context's device."""
    dense = copy.deepcopy(model.module).to(context.device, torch.bfloat16)
    made = copy.deepcopy(module).to(context.device)
    batch = model.spec.example(model.spec.most_rows(ROWS), seed=context.seed)
    wide = [torch.from_numpy(array).to(context.device) for array in batch]
    narrow = [item.to(torch.bfloat16) if item.is_floating_point() else item for item in wide]
    with inference(context.threads):
        seconds = seconds_per_call({"dense": partial(_done, dense, narrow), "made": partial(_done, made, wide)})
    return seconds["dense"] / seconds["made"]


def _done(module: nn.Module, inputs: list[torch.Tensor]) -> None:
    """Run a batch to its end: a GPU is told what to do long before it has done it."""
    module(*inputs)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
