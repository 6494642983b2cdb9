"""Texts and sequences of tokens: 1 - the error rate, which is the edit distance (Levenshtein 1966) per labelled symbol.

With characters as symbols it is the character error rate (CER), with words the word error rate (WER). Both are summed
over all rows before they are divided, as speech recognition does, so that a long line counts more than a short one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Literal

import numpy as np

from leanserve.contracts import Array

Symbols = Literal["character", "word", "token"]


def symbol_accuracy(pairs: Iterable[tuple[Sequence[object], Sequence[object]]]) -> float:
    """1 - error rate of pairs of an answer and what is labelled; below 0 where more is wrong than there is to say.

    NaN where all that is labelled is empty.
    """
    errors = symbols = 0
    for answer, wanted in pairs:
        errors += edit_distance(answer, wanted)
        symbols += len(wanted)
    return 1 - errors / symbols if symbols else float("nan")


def edit_distance(one: Sequence[object], other: Sequence[object]) -> int:
    """The least number of symbols that must be put in, taken out or exchanged to make one of the other."""
    numbers = {symbol: number for number, symbol in enumerate({*one, *other})}
    columns = np.array([numbers[symbol] for symbol in other], np.int64)
    steps = np.arange(len(columns) + 1)
    distances = steps
    for symbol in one:
        exchanged = distances[:-1] + (columns != numbers[symbol])
        changed = np.append(distances[0] + 1, np.minimum(distances[1:] + 1, exchanged))
        distances = np.minimum.accumulate(changed - steps) + steps
    return int(distances[-1])


def spoken(tokens: Array, blank: int | None) -> list[int]:
    """The ids of a row: whole numbers as they are, else the best of each step [steps, ids]; those below 0 are padding.

    With a `blank`, repeated ids are one and blanks none, as connectionist temporal classification has it (Graves 2006).
    """
    if tokens.dtype.kind == "f":
        tokens = tokens[np.isfinite(tokens).any(axis=1)]
        tokens = np.where(np.isnan(tokens), -np.inf, tokens).argmax(axis=1) if len(tokens) else np.zeros(0, np.int64)
    ids = [int(number) for number in tokens if number >= 0]
    return ids if blank is None else [number for number, _ in groupby(ids) if number != blank]


def in_symbols(text: str, symbols: Symbols) -> Sequence[str]:
    """A text as what is counted."""
    return text.split() if symbols == "word" else text
