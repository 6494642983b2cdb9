"""What a model that runs gives back, found out by running it: its outputs, and whether rows stay out of each other.

Whatever a file declares, only a run tells. Rows are run alone and together: a model whose first axis does not count the
rows, or that mixes them (a softmax over the batch, statistics of the batch, dropout left on), would answer wrongly as
soon as two requests share a batch, so it is refused before anybody waits for a build.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from service.bases.description import Tensor
from service.bases.meanings import guessed
from service.comparison import largest_difference, largest_finite
from service.contracts import Array, Arrays, InputSpec
from service.errors import ConfigError

Run = Callable[[Arrays], Sequence[Array]]

ROWS = 3
LENGTHS = (16, 24)
"""Of the dynamic axes, in two runs: what differs between them is a dynamic axis of an output."""
TOLERANCE = 1e-3
"""Largest accepted difference, relative to the largest output: kernels add in another order in another batch."""
NUMBERS = "biuf"
"""Kinds of numpy dtypes."""


class Answer(NamedTuple):
    """One output of two models for the same rows."""

    name: str
    one: Array
    other: Array


def probe(run: Run, inputs: Sequence[Tensor], names: Sequence[str], tolerance: float = TOLERANCE) -> tuple[Tensor, ...]:
    """The outputs of a model, one per name.

    Raises:
        ConfigError: it does not run on batches of 1 and of 3 rows, gives no arrays of numbers, or mixes up the rows.
    """
    spec = InputSpec(tuple(item.field() for item in inputs), ())
    rows = spec.example(ROWS, LENGTHS[0])
    together = _attempt(run, rows, names)
    alone = [_attempt(run, tuple(array[row : row + 1] for array in rows), names) for row in range(ROWS)]
    dynamic = any(None in item.shape for item in inputs)
    longer = _attempt(run, spec.example(ROWS, LENGTHS[1], seed=1), names) if dynamic else together
    return tuple(
        _output(name, together[index], [outputs[index] for outputs in alone], longer[index], tolerance)
        for index, name in enumerate(names)
    )


def differs(answer: Answer, tolerance: float = TOLERANCE) -> str | None:
    """How one output differs from the other, as text; `None` if it does not."""
    if answer.one.shape != answer.other.shape:
        return f"output '{answer.name}' has shape {list(answer.one.shape)}, not {list(answer.other.shape)}"
    change, largest = largest_difference(answer.one, answer.other), largest_finite(answer.other)
    if change <= tolerance * largest:
        return None
    return f"output '{answer.name}' differs by {change:.2g}, where its largest value is {largest:.2g}"


def _attempt(run: Run, batch: Arrays, names: Sequence[str]) -> list[Array]:
    try:
        outputs = list(run(batch))
    except Exception as error:  # whatever a runtime raises on a model that it has never seen
        shapes = ", ".join(str(list(array.shape)) for array in batch)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ConfigError(f"it does not run on {shapes}: {lines[0] if lines else type(error).__name__}") from error
    if len(outputs) != len(names):
        raise ConfigError(f"it gives {len(outputs)} outputs, not {len(names)} ({', '.join(names)})")
    for name, output in zip(names, outputs, strict=True):
        if not isinstance(output, np.ndarray) or output.dtype.kind not in NUMBERS:
            kind = output.dtype if isinstance(output, np.ndarray) else type(output).__name__
            raise ConfigError(f"its output '{name}' is no tensor of numbers ({kind}); leave it out of the export")
    return outputs


def _output(name: str, together: Array, alone: Sequence[Array], longer: Array, tolerance: float) -> Tensor:
    firsts = [array.shape[:1] for array in (together, *alone)]
    if firsts != [(ROWS,), *[(1,)] * ROWS]:
        raise ConfigError(
            f"its output '{name}' has shape {list(together.shape)} for {ROWS} rows: the first axis must count the "
            "rows, or requests cannot share a batch"
        )
    reason = differs(Answer(name, together, np.concatenate(alone)), tolerance)
    if reason:
        raise ConfigError(
            f"the answer to a row depends on the other rows of its batch (alone and together, {reason}), so "
            "requests cannot share one; was it exported in training mode, or does it work across the first axis?"
        )
    shape = tuple(a if a == b else None for a, b in zip(together.shape[1:], longer.shape[1:], strict=True))
    return guessed(Tensor(name=name, dtype=str(together.dtype), shape=shape), (together, longer))
