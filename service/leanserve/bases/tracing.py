"""What a torch module gives back, found out by running it (`probing`), with the names that it gives its outputs itself.

What autograd remembers of a third run tells the last operator of every output, whatever the module
is written in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from leanserve.bases.axis_sizes import AxisSizes, with_sizes
from leanserve.bases.description import Probed, Tensor
from leanserve.bases.meanings import LastOperator, proven
from leanserve.bases.probing import ROWS, Run, or_row_by_row, probe, two_lengths
from leanserve.contracts import Array, Arrays, ModelSpec
from leanserve.errors import ConfigError
from leanserve.memory import is_out_of_memory

if TYPE_CHECKING:
    from torch import nn

DECLARE = "Its inputs are declared by base.image, base.text, base.audio or base.inputs"
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


def traced(module: nn.Module, spec: ModelSpec, remedy: str = DECLARE) -> Probed:
    """What a module gives for the inputs of the spec, by the names that it gives its outputs itself, else without.

    `remedy` is told where the module does not run.

    Raises:
        ConfigError: it does not run on these inputs, gives no tensors, or mixes up the rows.
    """
    own = or_row_by_row(partial(_named_outputs, module, spec, remedy), spec.most_rows(ROWS))
    try:
        found = probe(runner(partial(_tensors_of, module)), spec, _told(own))
    except ConfigError as error:
        raise ConfigError(f"base: the model cannot be served: {error}") from error
    operators = last_operators(module, spec, len(own))
    taken = [item.name for item in spec.inputs]
    outputs: list[Tensor] = []
    for name, output, operator in zip(own, found.outputs, operators, strict=True):
        free = _unlike(name, [*taken, *(item.name for item in outputs)]) if name else ""
        outputs.append(proven(output.model_copy(update={"name": free}), operator))
    return found.model_copy(update={"outputs": tuple(outputs)})


def sized(module: nn.Module, spec: ModelSpec) -> AxisSizes:
    """The spec with sizes of its dynamic axes on which the module runs; as it is where it runs on none."""

    def only_run(*batch: Any) -> tuple[()]:
        module(*batch)
        return ()

    try:
        return with_sizes(runner(only_run), spec, ())
    except ConfigError:
        return AxisSizes(spec)  # what is wrong with it is told by `traced`


def _told(names: Sequence[str]) -> list[str]:
    """How errors call outputs, of which some have no name."""
    return [name or (f"output_{index}" if index else "output") for index, name in enumerate(names)]


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
    batch = [torch.from_numpy(array) for array in spec.example(spec.most_rows(2), two_lengths(spec)[0])]
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


def _named_outputs(module: nn.Module, spec: ModelSpec, remedy: str, rows: int) -> list[str]:
    """The name of every tensor that a module returns for so many rows, empty where it gives none."""
    import torch

    from leanserve.bases.modules.tensor_outputs import named_tensors

    batch = spec.example(rows, two_lengths(spec)[0])
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
        return [name for name, _ in named_tensors(outputs)]
    except TypeError as error:
        raise ConfigError(
            f"base: the model returns {error}; it must return tensors whose first axis counts the rows, alone or in a "
            "tuple, list, dict or dataclass. Put it into a module whose forward picks them: return self.model(x)[...]"
        ) from error
