"""What a torch module gives back, found out by running it: dtypes, shapes and meanings of its outputs.

Two runs with different numbers of rows and different lengths tell which axes are fixed. A module whose first axis does
not follow the rows cannot be batched, and one that mixes rows up must not be; both are refused here, before anybody
waits for a build. What autograd remembers of a third run tells the last operator of every output, whatever the module
is written in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from leanserve.bases.description import Tensor
from leanserve.bases.meanings import LastOperator, guessed, proven
from leanserve.bases.probing import Run, check_rows, or_row_by_row, spec_of_inputs
from leanserve.contracts import Array, Arrays, ModelSpec, RowsTogether
from leanserve.errors import ConfigError
from leanserve.memory import is_out_of_memory

if TYPE_CHECKING:
    from torch import nn

RUNS = ((2, 16), (3, 24))
"""Rows and length of dynamic axes."""
DECLARE = "Its inputs are declared by base.image, base.text or base.inputs"
OPERATORS: Final[Mapping[str, LastOperator]] = {
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


def traced_outputs(
    module: nn.Module, inputs: Sequence[Tensor], rows: RowsTogether = "any", remedy: str = DECLARE
) -> tuple[Tensor, ...]:
    """The outputs of a module that takes `inputs`, by the names that it gives them itself, else without.

    `rows` says which may share a batch; `remedy` is told where the module does not run.

    Raises:
        ConfigError: it does not run on these inputs, gives no tensors, or mixes up the rows.
    """
    spec = spec_of_inputs(inputs, rows)
    attempts = (partial(_run, module, spec, length, remedy) for _, length in RUNS)
    small, large = (
        or_row_by_row(attempt, spec.most_rows(most)) for attempt, (most, _) in zip(attempts, RUNS, strict=True)
    )
    if len(small) != len(large):
        raise ConfigError(
            f"base: the model returns {len(small)} tensors for {RUNS[0][0]} rows and {len(large)} for {RUNS[1][0]}: it "
            "must return as many for any number of rows, each with a first axis that counts them"
        )
    operators = last_operators(module, spec, len(small))
    found: list[Tensor] = []
    for index, ((own, one), (_, two)) in enumerate(zip(small, large, strict=True)):
        name = _unlike(own, [item.name for item in (*inputs, *found)]) if own else ""
        shape = tuple(a if a == b else None for a, b in zip(one.shape[1:], two.shape[1:], strict=True))
        tensor = Tensor(name=name, dtype=str(one.dtype).removeprefix("torch."), shape=shape)
        found.append(proven(guessed(tensor, (_as_array(one), _as_array(two))), operators[index]))
    try:
        check_rows(runner(partial(_tensors_of, module)), spec, _told(found))
    except ConfigError as error:
        raise ConfigError(f"base: the model cannot be served: {error}") from error
    return tuple(found)


def _told(outputs: Sequence[Tensor]) -> list[str]:
    """How errors call outputs, of which some have no name."""
    return [item.name or (f"output_{index}" if index else "output") for index, item in enumerate(outputs)]


def _tensors_of(module: nn.Module, *batch: Any) -> list[Any]:
    from leanserve.bases.modules.tensor_outputs import named_tensors

    return [tensor for _, tensor in named_tensors(module(*batch))]


def _unlike(name: str, others: Sequence[str]) -> str:
    """With a number, if inputs or outputs are called so already."""
    numbered = (name if number == 0 else f"{name}_{number}" for number in range(len(others) + 1))
    return next(free for free in numbered if free not in others)


def last_operators(module: nn.Module, spec: ModelSpec, outputs: int) -> list[LastOperator | None]:
    """The operator by which every output ends, where it is one that tells what the output means.

    Autograd remembers nothing unless some weight asks for a gradient, or without weights an input. A module that does
    not run with gradients tells nothing.
    """
    import torch

    from leanserve.bases.modules.tensor_outputs import named_tensors

    weights = {item: item.requires_grad for item in module.parameters() if item.is_floating_point()}
    rows, length = RUNS[0]
    batch = [torch.from_numpy(array) for array in spec.example(spec.most_rows(rows), length)]
    asked: list[torch.Tensor] = [*weights] or [item for item in batch if item.is_floating_point()]
    try:
        for item in asked:
            item.requires_grad_()
        with torch.enable_grad():
            given = named_tensors(module(*batch))
    except Exception:  # whatever the user's module raises where the runs before did not
        return [None] * outputs
    finally:
        for weight, before in weights.items():
            weight.requires_grad_(before)
    return [_operator(item.grad_fn) for _, item in given]


def _operator(node: Any) -> LastOperator | None:
    """The operator of a node of autograd's graph, or of the one whose numbers it hands on."""
    while node is not None:
        name = type(node).__name__.rstrip("0123456789")
        if name not in UNCHANGING:
            return OPERATORS.get(name)
        node = node.next_functions[0][0]
    return None


def runner(module: Callable[..., Any]) -> Run:
    """Runs a module on copies of arrays, for it may change them; outputs that are no tensors stay what they are."""
    import torch

    def run(batch: Arrays) -> Sequence[Array]:
        with torch.inference_mode():
            outputs = module(*(torch.tensor(array) for array in batch))
        return [_as_array(item) for item in (outputs if isinstance(outputs, tuple | list) else (outputs,))]

    return run


def _as_array(item: Any) -> Any:
    import torch

    if not isinstance(item, torch.Tensor):
        return item
    return (item.float() if item.dtype == torch.bfloat16 else item).numpy()  # numpy has no bfloat16


def _run(module: nn.Module, spec: ModelSpec, length: int, remedy: str, rows: int) -> list[tuple[str, Any]]:
    import torch

    from leanserve.bases.modules.tensor_outputs import named_tensors

    batch = spec.example(rows, length)
    shapes = ", ".join(f"{item.name} {list(array.shape)}" for item, array in zip(spec.inputs, batch, strict=True))
    try:
        with torch.inference_mode():
            outputs = module(*(torch.from_numpy(array) for array in batch))
    except Exception as error:  # whatever the user's module raises
        reason = f"{type(error).__name__}: {str(error).splitlines()[0].rstrip('.') if str(error) else ''}"
        if is_out_of_memory(error):
            remedy = "Give it more memory, or make the model smaller"
            raise ConfigError(f"base: there is no memory to run the model on {shapes}: {reason}. {remedy}") from error
        raise ConfigError(f"base: the model does not run on {shapes}: {reason}. {remedy}") from error
    try:
        found = named_tensors(outputs)
    except TypeError as error:
        raise ConfigError(
            f"base: the model returns {error}; it must return tensors whose first axis counts the rows, alone or in a "
            "tuple, list, dict or dataclass. Put it into a module whose forward picks them: return self.model(x)[...]"
        ) from error
    for index, (_, tensor) in enumerate(found):
        if tensor.shape[:1] != (rows,):
            raise ConfigError(
                f"base: output {index} of the model has shape {list(tensor.shape)} for {rows} rows: its first axis "
                "must count the rows, or requests cannot share a batch"
            )
    return found
