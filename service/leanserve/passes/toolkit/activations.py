"""What data says about a model: features seen by its layers, and batch-norm statistics after its weights changed.

Low-rank passes weigh their errors by what a layer really sees, and any structural change moves the mean and
variance that batch norm stored in training. Both need calibration rows only: no labels, no gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from leanserve.contracts import Data, Progress, TorchModel
from leanserve.errors import PassFailed
from leanserve.memory import largest_that_fits
from leanserve.runtime.formats.torch_size import example

See: TypeAlias = Callable[[str, Tensor, Tensor], None]
"""Told the name of a layer, its input and its output, once per call."""

OBSERVED_ROWS = 16
"""Rows per batch while layers are watched: unfolded convolution inputs are many times larger than the input."""

NORM_ROWS = 64
"""Rows per batch while batch norm is re-estimated: enough for a stable variance."""


class Moments:
    """Running count, mean and second moments of feature vectors, in double precision."""

    def __init__(self) -> None:
        self.count = 0
        """Vectors taken in."""
        self._sum = torch.zeros(())
        self._second = torch.zeros(())

    def add(self, features: Tensor) -> None:
        """Take in vectors [rows, d]."""
        self.count += len(features)
        self._sum = self._sum + features.sum(0, dtype=torch.float64)
        self._second = self._second + (features.T @ features).double()

    @property
    def mean(self) -> Tensor:
        """Mean vector [d]."""
        return self._sum / self.count

    @property
    def gram(self) -> Tensor:
        """Mean outer product [d, d], not centred."""
        return self._second / self.count

    @property
    def covariance(self) -> Tensor:
        """Covariance [d, d]."""
        return self.gram - torch.outer(self.mean, self.mean)


def tensors(model: TorchModel, data: Data, rows: int) -> Iterator[tuple[Tensor, ...]]:
    """The inputs of `data` in batches of nearly equal size, at most `rows` each and no more than there is memory for.

    That is found out at once, by running the model on the first of them as it is.
    """
    first = tuple(torch.tensor(array) for array in next(data.batches(rows)).inputs)
    with torch.no_grad():
        rows, _ = largest_that_fits(len(first[0]), lambda rows: model.module(*(tensor[:rows] for tensor in first)))
    size = math.ceil(len(data) / math.ceil(len(data) / rows))
    return (tuple(torch.tensor(array) for array in batch.inputs) for batch in data.batches(size))


def observe(model: TorchModel, layers: Mapping[str, nn.Module], data: Data, see: See, progress: Progress) -> None:
    """Run `data` through the model and let `see` look at every call of the named layers."""
    done = 0
    batches = tensors(model, data, OBSERVED_ROWS)
    with ExitStack() as stack, torch.no_grad():
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(_viewer(name, see)).remove)
        for inputs in batches:
            model.module(*inputs)
            done += len(inputs[0])
            progress(done, len(data), "watching layers")


def observe_beside(made: TorchModel, whole: TorchModel, name: str, data: Data, see: See) -> None:
    """Run `data` through two models, and let `see` look at what a layer takes in the one and gives in the other.

    What stands in its place in `made` may be a chain of layers; what it gives there is of no interest.
    """
    taken: list[Tensor] = []
    given: list[Tensor] = []
    batches = tensors(whole, data, OBSERVED_ROWS)
    with ExitStack() as stack, torch.no_grad():
        ours, theirs = made.module.get_submodule(name), whole.module.get_submodule(name)
        stack.callback(ours.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0])).remove)
        stack.callback(theirs.register_forward_hook(lambda _, __, output: given.append(output)).remove)
        for inputs in batches:
            made.module(*inputs)
            whole.module(*inputs)
            for x, y in zip(taken, given, strict=True):
                see(name, x, y)
            taken.clear()
            given.clear()


def refit_batch_norm(model: TorchModel, changed: Collection[str], data: Data) -> int:
    """Re-estimate the statistics of every batch norm that runs after one of the `changed` modules, in place.

    Returns how many were re-estimated. The weights of the norms stay as they are.

    Raises:
        PassFailed: there are batch norms to re-estimate, and fewer than two rows to do it with, or to run at once.
    """
    norms = _norms_after(model, changed)
    if not norms:
        return 0
    if model.spec.rows == "one":
        raise PassFailed("batch norms are re-estimated on batches of many rows, and base.rows: one forbids these")
    if len(data) < 2:
        raise PassFailed(f"samples: batch norm needs at least 2 calibration rows to be re-estimated, got {len(data)}")
    batches = tensors(model, data, NORM_ROWS)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
        norm.train()
    with torch.no_grad():
        for inputs in batches:
            model.module(*inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
    return len(norms)


def _norms_after(model: TorchModel, changed: Collection[str]) -> list[_BatchNorm]:
    """Batch norms with running statistics, by order of execution, once the first changed module has run."""
    ran: list[nn.Module] = []
    suspects = [model.module.get_submodule(name) for name in changed]
    norms = [child for child in model.module.modules() if isinstance(child, _BatchNorm) and child.track_running_stats]
    with ExitStack() as stack, torch.no_grad():
        for child in {*suspects, *norms}:
            stack.callback(child.register_forward_hook(lambda module, *_: ran.append(module)).remove)
        model.module(*example(model.spec))
    first = min((ran.index(child) for child in suspects if child in ran), default=len(ran))
    return [child for child in dict.fromkeys(ran[first:]) if isinstance(child, _BatchNorm) and child in norms]


def _viewer(name: str, see: See) -> Any:
    def view(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        see(name, inputs[0], output)

    return view
