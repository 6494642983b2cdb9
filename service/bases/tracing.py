"""What a torch module gives back, found out by running it: dtypes, shapes and meanings of its outputs.

Two runs with different numbers of rows and different lengths tell which axes are fixed. A module whose first axis does
not follow the rows cannot be batched and is refused here, before anybody waits for a build. What autograd remembers of
a third run tells the last operator of every output, whatever the module is written in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from service.bases.description import Tensor
from service.bases.meanings import Operator, guessed, proven
from service.contracts import Field, InputSpec
from service.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

RUNS = ((2, 16), (3, 24))
"""Rows and length of dynamic axes."""
OPERATORS: Final[Mapping[str, Operator]] = {
    "SoftmaxBackward": "softmax",
    "LogSoftmaxBackward": "log_softmax",
    "SigmoidBackward": "sigmoid",
}
"""By the name of autograd's node, without the number at its end."""
UNCHANGING = frozenset(
    f"{name}Backward"
    for name in (
        *("Alias", "Clone", "Expand", "Permute", "ReshapeAlias", "Squeeze"),
        *("T", "ToCopy", "Transpose", "UnsafeView", "Unsqueeze", "View"),
    )
)
"""Nodes that hand the numbers on, in another shape or precision."""


def traced_outputs(module: nn.Module, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs of a module that takes `inputs`, without names.

    Raises:
        ConfigError: it does not run on these inputs, gives no tensors, or mixes up the rows.
    """
    fields = tuple(item.field() for item in inputs)
    small, large = (_run(module, fields, rows, length) for rows, length in RUNS)
    operators = last_operators(module, fields, len(small))
    found = []
    for index, (one, two) in enumerate(zip(small, large, strict=True)):
        if one.shape[:1] != (RUNS[0][0],) or two.shape[:1] != (RUNS[1][0],):
            raise ConfigError(
                f"base: output {index} of the model has shape {list(one.shape)} for {RUNS[0][0]} rows: its first axis "
                "must count the rows, or requests cannot share a batch"
            )
        shape = tuple(a if a == b else None for a, b in zip(one.shape[1:], two.shape[1:], strict=True))
        tensor = Tensor(name="", dtype=str(one.dtype).removeprefix("torch."), shape=shape)
        found.append(proven(guessed(tensor, (one.numpy(), two.numpy())), operators[index]))
    return tuple(found)


def last_operators(module: nn.Module, fields: Sequence[Field], outputs: int) -> list[Operator | None]:
    """The operator by which every output ends, where it is one that tells what the output means.

    Autograd remembers nothing unless some weight asks for a gradient, or without weights an input. A module that does
    not run with gradients tells nothing.
    """
    import torch

    weights = {item: item.requires_grad for item in module.parameters() if item.is_floating_point()}
    rows, length = RUNS[0]
    batch = [torch.from_numpy(array) for array in InputSpec(tuple(fields), ()).example(rows, length)]
    asked: list[torch.Tensor] = [*weights] or [item for item in batch if item.is_floating_point()]
    try:
        for item in asked:
            item.requires_grad_()
        with torch.enable_grad():
            given = module(*batch)
    except Exception:  # whatever the user's module raises where the runs before did not
        return [None] * outputs
    finally:
        for weight, before in weights.items():
            weight.requires_grad_(before)
    return [_operator(item.grad_fn) for item in (given if isinstance(given, tuple | list) else (given,))]


def _operator(node: Any) -> Operator | None:
    """The operator of a node of autograd's graph, or of the one whose numbers it hands on."""
    while node is not None:
        name = type(node).__name__.rstrip("0123456789")
        if name not in UNCHANGING:
            return OPERATORS.get(name)
        node = node.next_functions[0][0]
    return None


def _run(module: nn.Module, fields: tuple[Field, ...], rows: int, length: int) -> tuple[Any, ...]:
    import torch

    batch = InputSpec(fields, ()).example(rows, length)
    shapes = ", ".join(f"{item.name} {list(array.shape)}" for item, array in zip(fields, batch, strict=True))
    try:
        with torch.inference_mode():
            outputs = module(*(torch.from_numpy(array) for array in batch))
    except Exception as error:  # whatever the user's module raises
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ConfigError(
            f"base: the model does not run on {shapes}: {reason}. Its inputs are declared by base.image, base.text or "
            "base.inputs"
        ) from error
    tensors = tuple(outputs) if isinstance(outputs, tuple | list) else (outputs,)
    if not tensors or not all(isinstance(item, torch.Tensor) for item in tensors):
        kinds = ", ".join(type(item).__name__ for item in tensors)
        raise ConfigError(f"base: the model must return a tensor or a tuple of tensors, not {kinds or 'nothing'}")
    return tensors
