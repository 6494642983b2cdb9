"""What a torch module gives back, found out by running it: names, dtypes and shapes of its outputs.

Two runs with different numbers of rows and different lengths tell which axes are fixed. A module whose first axis does
not follow the rows cannot be batched and is refused here, before anybody waits for a build.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from service.bases.description import Tensor
from service.contracts import Field, InputSpec
from service.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

RUNS = ((2, 16), (3, 24))
"""Rows and length of dynamic axes."""


def traced_outputs(module: nn.Module, inputs: Sequence[Tensor], names: Sequence[str]) -> tuple[Tensor, ...]:
    """The outputs of a module that takes `inputs`; `names` are used as far as they go, then `output_1` ...

    Raises:
        ConfigError: it does not run on these inputs, gives no tensors, or mixes up the rows.
    """
    fields = tuple(item.field() for item in inputs)
    small, large = (_run(module, fields, rows, length) for rows, length in RUNS)
    found = []
    for index, (one, two) in enumerate(zip(small, large, strict=True)):
        name = names[index] if index < len(names) else f"output_{index}"
        if one.shape[:1] != (RUNS[0][0],) or two.shape[:1] != (RUNS[1][0],):
            raise ConfigError(
                f"base: output {index} of the model has shape {list(one.shape)} for {RUNS[0][0]} rows: its first axis "
                "must count the rows, or requests cannot share a batch"
            )
        shape = tuple(a if a == b else None for a, b in zip(one.shape[1:], two.shape[1:], strict=True))
        found.append(Tensor(name=name, dtype=str(one.dtype).removeprefix("torch."), shape=shape))
    return tuple(found)


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
