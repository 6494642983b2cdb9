"""Shapes of recurrent layers by rule, so that an exporter keeps a sequence's length open.

torch finds shapes by running its decompositions, and that of an LSTM or a GRU is a loop over the steps: it fixes the
length of the example, and everything behind the layer is computed from it. The exporter replaces the decompositions
while it captures a module, not while it lowers the program, and an operator remembers which it found last, so that the
replacement is not seen from the second export of a process on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey
from torch._decomp import decomposition_table


@contextmanager
def recurrent_shapes() -> Iterator[None]:
    """With rules in place of the decompositions of LSTM and GRU, and nothing remembered from before or for later."""
    key = DispatchKey.CompositeImplicitAutograd
    rules: dict[Any, Any] = {torch.ops.aten.lstm.input: _lstm, torch.ops.aten.gru.input: _gru}
    loops = {operator: (decomposition_table[operator], operator.py_kernels[key]) for operator in rules}
    try:
        for operator, rule in rules.items():
            decomposition_table[operator] = operator.py_kernels[key] = rule
            operator._dispatch_cache.clear()
        yield
    finally:
        for operator, (decomposition, kernel) in loops.items():
            decomposition_table[operator], operator.py_kernels[key] = decomposition, kernel
            operator._dispatch_cache.clear()


def _lstm(series: Tensor, states: Sequence[Tensor], *options: object) -> tuple[Tensor, Tensor, Tensor]:
    """Of `aten.lstm.input`: outputs as wide as the hidden state (the first), per direction."""
    hidden, cell = states
    return _outputs(series, hidden, options), hidden.clone(), cell.clone()


def _gru(series: Tensor, hidden: Tensor, *options: object) -> tuple[Tensor, Tensor]:
    """Of `aten.gru.input`."""
    return _outputs(series, hidden, options), hidden.clone()


def _outputs(series: Tensor, hidden: Tensor, options: Sequence[object]) -> Tensor:
    """Rows and steps as they come in, and a width per direction: the sixth option is `bidirectional`."""
    directions = 2 if options[5] else 1
    return series.new_empty((*series.shape[:2], directions * hidden.shape[2]))
