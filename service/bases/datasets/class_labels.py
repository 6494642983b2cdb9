"""The class names that data brings (folders, strings in an array) as the numbers that the model's logits have."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from service.errors import ConfigError

SHOWN = 3


def class_numbers(names: Sequence[str], labels: Sequence[str], key: str) -> NDArray[np.int64]:
    """Class numbers int64 [len(names)] of class names: exact, by number, or alike but for case, `_`, `-`, synonyms.

    Of a label such as `tench, Tinca tinca` the part before the comma is enough.

    Raises:
        ConfigError: a name is no label; the text starts with `key` and lists near ones.
    """
    known = _known(labels)
    found: dict[str, int] = {}
    for name in dict.fromkeys(names):
        number = known.get(name, known.get(_plain(name)))
        if number is None:
            raise ConfigError(f"{key}: '{name}' is no label of the model: {_nearest(name, labels)}")
        found[name] = number
    return np.array([found[name] for name in names], dtype=np.int64)


def checked_numbers(numbers: NDArray[np.integer], labels: Sequence[str], key: str) -> NDArray[np.int64]:
    """Class numbers as int64.

    Raises:
        ConfigError: one is not that of a label; the text starts with `key`.
    """
    wrong = (numbers < 0) | (numbers >= len(labels))
    if wrong.any():
        row = int(np.argmax(wrong))
        raise ConfigError(f"{key}: row {row} has class {numbers[row]}, the model has 0 to {len(labels) - 1}")
    return numbers.astype(np.int64)


def require_labels(labels: Sequence[str], key: str) -> None:
    """Labelled data asks for a model whose classes have names.

    Raises:
        ConfigError: they have none; the text starts with `key`.
    """
    if not labels:
        raise ConfigError(
            f"{key}: the rows have classes, but those of the model are not known; name them in base.labels"
        )


def _known(labels: Sequence[str]) -> dict[str, int]:
    """Every way of naming a label that names no other; the more literal one wins."""
    known: dict[str, int] = {}
    ways = (
        labels,
        [str(number) for number in range(len(labels))],
        [_plain(label) for label in labels],
        [_plain(label.partition(",")[0]) for label in labels],
    )
    for way in ways:
        own = {name: number for number, name in enumerate(way) if way.count(name) == 1}
        known = own | known
    return known


def _plain(name: str) -> str:
    """Without case, separators and leading zeros of a number."""
    plain = re.sub(r"[\s_-]+", " ", name).strip().casefold()
    return str(int(plain)) if plain.isdecimal() else plain


def _nearest(name: str, labels: Sequence[str]) -> str:
    plain = {_plain(label): label for label in labels}
    near = [plain[found] for found in difflib.get_close_matches(_plain(name), plain, SHOWN, cutoff=0.5)]
    if near:
        return "did you mean " + " or ".join(f"'{label}'" for label in near) + "?"
    first = ", ".join(f"'{label}'" for label in labels[:SHOWN])
    return f"there are {len(labels)}, {first}" + (" ..." if len(labels) > SHOWN else "")
