"""What a torch module gives back, found out by running it: names, dtypes and shapes of its outputs.

Two runs with different numbers of rows and different lengths tell which axes are fixed. A module whose first axis does
not follow the rows cannot be batched, and one that mixes rows up must not be; both are refused here, before anybody
waits for a build.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from service.bases.description import Tensor
from service.bases.probing import Run, check_rows, or_row_by_row
from service.contracts import Array, Arrays, InputSpec, RowsTogether
from service.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

RUNS = ((2, 16), (3, 24))
"""Rows and length of dynamic axes."""


def traced_outputs(
    module: nn.Module, inputs: Sequence[Tensor], names: Sequence[str], rows: RowsTogether = "any"
) -> tuple[Tensor, ...]:
    """The outputs of a module that takes `inputs`; `names` are used as far as they go, then `output_1` ...

    Raises:
        ConfigError: it does not run on these inputs, gives no tensors, or mixes up the rows.
    """
    spec = InputSpec(tuple(item.field() for item in inputs), (), rows=rows)
    small, large = (or_row_by_row(partial(_run, module, spec, length), spec.most_rows(most)) for most, length in RUNS)
    found = []
    for index, (one, two) in enumerate(zip(small, large, strict=True)):
        name = names[index] if index < len(names) else f"output_{index}"
        shape = tuple(a if a == b else None for a, b in zip(one.shape[1:], two.shape[1:], strict=True))
        found.append(Tensor(name=name, dtype=str(one.dtype).removeprefix("torch."), shape=shape))
    try:
        check_rows(runner(module), inputs, [item.name for item in found], rows)
    except ConfigError as error:
        raise ConfigError(f"base: the model cannot be served: {error}") from error
    return tuple(found)


def runner(module: nn.Module) -> Run:
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


def _run(module: nn.Module, spec: InputSpec, length: int, rows: int) -> tuple[Any, ...]:
    import torch

    batch = spec.example(rows, length)
    shapes = ", ".join(f"{item.name} {list(array.shape)}" for item, array in zip(spec.fields, batch, strict=True))
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
    for index, tensor in enumerate(tensors):
        if tensor.shape[:1] != (rows,):
            raise ConfigError(
                f"base: output {index} of the model has shape {list(tensor.shape)} for {rows} rows: its first axis "
                "must count the rows, or requests cannot share a batch"
            )
    return tensors
