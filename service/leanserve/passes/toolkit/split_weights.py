"""One training by several processes, each of which holds its share of the weights (tensor parallel), for models that
are larger than what one of them may hold.

Of linear layers, convolutions and embedding tables every process holds some outputs: their weights, gradients and the
optimiser's moments. All see whole batches; what a layer takes is whole in every process, and what it gives is put
together of all their shares (the column-parallel layer of Shoeybi et al., "Megatron-LM", 2019, whose outputs are
gathered at once). So whoever watches layers sees what one process would see, and the weights are those of one process
but for the order of sums. `torch.distributed.tensor.parallel` offers it for linear layers and embeddings alone.

The teacher is held in shares, too. All that is left whole is computed by every process alike: norms, tied and grouped
layers, and those with too few outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from leanserve.errors import PassFailed
from leanserve.passes.toolkit.checkpoint import as_part, part_of
from leanserve.passes.toolkit.training_run import Division, TrainingCallback, TrainingRun

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from leanserve.passes.toolkit.checkpoint import TrainingState


class WeightDivision(Division):
    """Every process holds some of the weights, and the state of their training."""

    def around(self, callbacks: Sequence[TrainingCallback]) -> Sequence[TrainingCallback]:
        return [SplitWeights(), *callbacks]

    def whole_state(self, state: TrainingState) -> TrainingState:
        """The states of all processes as one, for a checkpoint from which each finds its own again."""
        states: list[TrainingState] = [{}] * dist.get_world_size()
        dist.all_gather_object(states, state)
        whole = {"identity": state["identity"]}
        for rank, item in enumerate(states):
            whole |= as_part(item, f"rank.{rank}")
        return whole

    def own_state(self, state: TrainingState) -> TrainingState:
        return part_of(state, f"rank.{dist.get_rank()}")


class SplitWeights(TrainingCallback):
    """While it trains, this process holds its share of the module's weights and of its teacher's. The first callback:
    others see the same shares from beginning to end."""

    def __init__(self) -> None:
        self._shares: list[_Share] = []

    def begin(self, run: TrainingRun) -> None:
        self._shares = [_Share(layer) for layer in splittable(run.module)]
        if not self._shares:
            raise PassFailed(
                f"split: no linear layer, convolution or table has outputs that {dist.get_world_size()} processes can "
                "share evenly; drop it"
            )
        for teacher in run.objective.teachers():
            for layer in splittable(teacher):
                _Share(layer)
        run.train_only(list(run.module.parameters()))

    def end(self, run: TrainingRun) -> None:  # noqa: ARG002 - it knows its layers
        for share in self._shares:
            share.put_together()


def splittable(module: nn.Module) -> Iterator[nn.Module]:
    """The layers whose outputs all processes can share evenly; not those that share a weight with others."""
    users: dict[int, int] = {}
    for child in module.modules():
        for parameter in child.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1
    for child in module.modules():
        # Of these types themselves: what is derived from them may be read without being called.
        if type(child) not in (nn.Linear, nn.Conv2d, nn.Embedding):
            continue
        weight = child.get_parameter("weight")
        if users[id(weight)] > 1 or (isinstance(child, nn.Conv2d) and child.groups > 1):
            continue
        outputs = weight.shape[_outputs_of(child)]
        if outputs >= 2 * dist.get_world_size() and outputs % dist.get_world_size() == 0:
            yield child


class _Share:
    """A layer of which this process holds its outputs, as if it were whole."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = layer
        self._axis = _outputs_of(layer)
        self._hooks: list[RemovableHandle] = []
        for name, parameter in self._parameters():
            mine = parameter.detach().chunk(dist.get_world_size(), self._axis if name == "weight" else 0)
            self._set(name, mine[dist.get_rank()].clone(), parameter)
        axis = 1 if isinstance(layer, nn.Conv2d) else -1
        if not isinstance(layer, nn.Embedding):  # ids have no gradient
            self._hooks.append(layer.register_forward_pre_hook(lambda _, inputs: (_spread(inputs[0]),)))
        # Before the hooks of those who watch the layer, who are to see all of it.
        self._hooks.append(layer.register_forward_hook(lambda _, __, given: _gathered(given, axis), prepend=True))

    def put_together(self) -> None:
        """The layer as it was, with the weights of all processes."""
        for hook in self._hooks:
            hook.remove()
        for name, parameter in self._parameters():
            self._set(name, _joined(parameter.detach(), self._axis if name == "weight" else 0), parameter)

    def _parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self._layer.named_parameters(recurse=False))

    def _set(self, name: str, value: Tensor, old: nn.Parameter) -> None:
        setattr(self._layer, name, nn.Parameter(value, requires_grad=old.requires_grad))


class _Spread(torch.autograd.Function):
    """What all processes compute shares from: their gradients of it add up."""

    @staticmethod
    def forward(_: Any, whole: Tensor) -> Tensor:
        return whole.view_as(whole)

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous()
        dist.all_reduce(total)
        return total


class _Gather(torch.autograd.Function):
    """The outputs of all processes, side by side; each gets the gradient of its own."""

    @staticmethod
    def forward(context: Any, mine: Tensor, axis: int) -> Tensor:
        context.axis = axis
        return _joined(mine, axis)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.chunk(dist.get_world_size(), context.axis)[dist.get_rank()], None


def _spread(whole: Tensor) -> Tensor:
    return cast("Tensor", _Spread.apply(whole))  # type: ignore[no-untyped-call]


def _gathered(mine: Tensor, axis: int) -> Tensor:
    return cast("Tensor", _Gather.apply(mine, axis))  # type: ignore[no-untyped-call]


def _joined(mine: Tensor, axis: int) -> Tensor:
    parts = [torch.empty_like(mine, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, mine.contiguous())
    return torch.cat(parts, axis)


def _outputs_of(layer: nn.Module) -> int:
    """The axis of the weight along which the outputs are."""
    return 1 if isinstance(layer, nn.Embedding) else 0
