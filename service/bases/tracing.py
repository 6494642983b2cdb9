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
DECLARE = "Its inputs are declared by base.image, base.text or base.inputs"


def traced_outputs(
    module: nn.Module, inputs: Sequence[Tensor], names: Sequence[str], remedy: str = DECLARE
) -> tuple[Tensor, ...]:
    """The outputs of a module that takes `inputs`, by the names it gives them itself.

    Of outputs without a name, `names` are used as far as they go, then `output_1` ... `remedy` is told where it does
    not run.

    Raises:
        ConfigError: it does not run on these inputs, gives no tensors, or mixes up the rows.
    """
    fields = tuple(item.field() for item in inputs)
    small, large = (_run(module, fields, (rows, length), remedy) for rows, length in RUNS)
    if len(small) != len(large):
        raise ConfigError(
            f"base: the model returns {len(small)} tensors for {RUNS[0][0]} rows and {len(large)} for {RUNS[1][0]}: it "
            "must return as many for any number of rows, each with a first axis that counts them"
        )
    told = [own or (names[index] if index < len(names) else f"output_{index}") for index, (own, _) in enumerate(small)]
    found: list[Tensor] = []
    for index, ((_, one), (_, two)) in enumerate(zip(small, large, strict=True)):
        name = _unlike(told[index], [item.name for item in (*inputs, *found)])
        if one.shape[:1] != (RUNS[0][0],) or two.shape[:1] != (RUNS[1][0],):
            raise ConfigError(
                f"base: output {index} of the model has shape {list(one.shape)} for {RUNS[0][0]} rows: its first axis "
                "must count the rows, or requests cannot share a batch"
            )
        shape = tuple(a if a == b else None for a, b in zip(one.shape[1:], two.shape[1:], strict=True))
        found.append(Tensor(name=name, dtype=str(one.dtype).removeprefix("torch."), shape=shape))
    return tuple(found)


def _unlike(name: str, others: Sequence[str]) -> str:
    """With a number, if inputs or outputs are called so already."""
    numbered = (name if number == 0 else f"{name}_{number}" for number in range(len(others) + 1))
    return next(free for free in numbered if free not in others)


def _run(module: nn.Module, fields: tuple[Field, ...], sizes: tuple[int, int], remedy: str) -> list[tuple[str, Any]]:
    import torch

    from service.bases.modules.tensor_outputs import named_tensors

    batch = InputSpec(fields, ()).example(*sizes)
    shapes = ", ".join(f"{item.name} {list(array.shape)}" for item, array in zip(fields, batch, strict=True))
    try:
        with torch.inference_mode():
            outputs = module(*(torch.from_numpy(array) for array in batch))
    except Exception as error:  # whatever the user's module raises
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ConfigError(f"base: the model does not run on {shapes}: {reason}. {remedy}") from error
    try:
        return named_tensors(outputs)
    except TypeError as error:
        raise ConfigError(
            f"base: the model returns {error}; it must return tensors whose first axis counts the rows, alone or in a "
            "tuple, list, dict or dataclass. Put it into a module whose forward picks them: return self.model(x)[...]"
        ) from error
