"""The classes that data brings (folders, numbers or names in an array or a column) as positions of the model's labels.

A number may be the position of a label, counted from 0, or its name ("1" to "5"). Which of the two is never decided row
by row, because then 0 and 1 may come out as the same class: all rows of all files of one `data:` section are read in
the same way, and what can be read in neither is an error that shows both.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from leanserve.contracts import Array
from leanserve.errors import ConfigError

SHOWN = 5
"""Values, and labels, that an error lists."""
NEAR = 3
WHOLE = re.compile(r"[+-]?\d+(\.0*)?")
TRUTHS = {"false": 0, "true": 1}
MISSING = frozenset({"", "nan", "none", "null", "na", "n/a"})
"""What tables and numpy write for a cell without a value."""
Reading = Mapping[Any, int | None]
"""Value -> class number, `None` where it has none."""


class LabelColumn(NamedTuple):
    """The labels of one file as they stand in it, [rows, ...], and how an error names the place of a row."""

    values: Array
    place: Callable[[int], str]


def class_numbers(columns: Sequence[LabelColumn], labels: Sequence[str]) -> list[NDArray[np.int64]]:
    """Per column the class numbers int64 [rows].

    They are what stands there if that are whole numbers below the number of labels that are no names of other labels,
    else the positions of the names: exact, or alike but for case, `_`, `-` and leading zeros. Of a label such as
    `tench, Tinca tinca` the part before the comma is enough. Truth values are 0 and 1 where there are two labels.

    Raises:
        ConfigError: some row has no class; the text names its place, and shows how the values would be read.
    """
    parts = [np.unique(column.values.reshape(-1), return_index=True, return_inverse=True) for column in columns]
    places: dict[Any, str] = {}
    for column, (values, firsts, _) in zip(columns, parts, strict=True):
        for value, first in sorted(zip(values.tolist(), firsts.tolist(), strict=True), key=lambda item: item[1]):
            places.setdefault(value, column.place(first))
    reading = _read(places, labels)
    return [np.array([reading[value] for value in values.tolist()], np.int64)[inverse] for values, _, inverse in parts]


def require_labels(labels: Sequence[str], key: str) -> None:
    """Labelled data asks for a model whose classes have names.

    Raises:
        ConfigError: they have none; the text starts with `key`.
    """
    if not labels:
        raise ConfigError(
            f"{key}: the rows have classes, but those of the model are not known; name them in base.labels"
        )


def _read(places: Mapping[Any, str], labels: Sequence[str]) -> Reading:
    names = _names(labels)
    for value, place in places.items():
        if _is_missing(value) and not {_text(value), _plain(_text(value))} & names.keys():
            raise ConfigError(f"{place}: the label is empty ({_shown(value)}); fill it in, or leave out the row")
    by_name: Reading = {value: names.get(_text(value), names.get(_plain(_text(value)))) for value in places}
    by_number: Reading = {value: _position(value, len(labels)) for value in places}
    if None not in by_number.values() and (None in by_name.values() or by_name == by_number):
        return by_number
    if None not in by_name.values():
        return by_name
    raise _unreadable(places, by_name, by_number, labels)


def _unreadable(places: Mapping[Any, str], by_name: Reading, by_number: Reading, labels: Sequence[str]) -> ConfigError:
    """Why neither reading fits: the first value that the better one has no class for, and what both make of others."""
    better = max((by_name, by_number), key=lambda reading: sum(found is not None for found in reading.values()))
    wrong = next(value for value in places if better[value] is None)
    shown = [wrong, *(value for value in places if value != wrong)][:SHOWN]
    readings = (
        f"as {what}: " + ", ".join(f"{_shown(value)} -> {_named(reading[value], labels)}" for value in shown)
        for what, reading in (("names", by_name), ("numbers from 0", by_number))
    )
    return ConfigError(
        f"{places[wrong]}: {_shown(wrong)} is no label of the model: {_remedy(wrong, by_name, by_number, labels)}. "
        f"The labels are read {'; '.join(readings)}"
    )


def _remedy(wrong: Any, by_name: Reading, by_number: Reading, labels: Sequence[str]) -> str:
    numbers = [number for value in by_name if (number := _whole(value)) is not None]
    if len(numbers) == len(by_name):
        from_one = (
            " (yours seem to count from 1: subtract 1)" if min(numbers) == 1 and max(numbers) == len(labels) else ""
        )
        return f"write names, or numbers from 0 to {len(labels) - 1}{from_one}; {_listed(labels)}"
    if all(by_name[value] is not None or by_number[value] is not None for value in by_name):
        return f"some rows have names and some have numbers; write all of them as names; {_listed(labels)}"
    if not isinstance(wrong, str):
        return f"a class is a whole number or a name; {_listed(labels)}"
    return _nearest(wrong, labels)


def _names(labels: Sequence[str]) -> dict[str, int]:
    """Every way of naming a label that names no other; the more literal one wins."""
    known: dict[str, int] = {}
    for way in (labels, [_plain(label) for label in labels], [_plain(label.partition(",")[0]) for label in labels]):
        known = {name: number for number, name in enumerate(way) if way.count(name) == 1} | known
    return known


def _plain(name: str) -> str:
    """Without case and separators between words, numbers without leading zeros; a minus stays what it is."""
    plain = re.sub(r"(?<=[^\W_])[\s_-]+(?=[^\W_])", " ", name.strip()).casefold()
    return str(int(plain.partition(".")[0])) if WHOLE.fullmatch(plain) else plain


def _text(value: Any) -> str:
    """A value as the name of a class: 3.0 is called 3."""
    number = _whole(value)
    return str(value) if isinstance(value, str | bool) or number is None else str(number)


def _whole(value: Any) -> int | None:
    """The whole number that a value is."""
    if isinstance(value, str):
        return int(value.partition(".")[0]) if WHOLE.fullmatch(value.strip()) else None
    return int(value) if not isinstance(value, bool) and math.isfinite(value) and value == int(value) else None


def _position(value: Any, count: int) -> int | None:
    """The position that a value says: a whole number below the count, or a truth value where there are two."""
    truth = TRUTHS.get(str(value).strip().casefold()) if count == 2 else None
    number = _whole(value) if truth is None else truth
    return number if number is not None and 0 <= number < count else None


def _is_missing(value: Any) -> bool:
    return value.strip().casefold() in MISSING if isinstance(value, str) else math.isnan(value)


def _shown(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else str(value)


def _named(number: int | None, labels: Sequence[str]) -> str:
    return "none" if number is None else f"'{labels[number]}'"


def _listed(labels: Sequence[str]) -> str:
    first = ", ".join(f"{number} '{label}'" for number, label in enumerate(labels[:SHOWN]))
    return f"there are {len(labels)}: {first}" + (" ..." if len(labels) > SHOWN else "")


def _nearest(name: str, labels: Sequence[str]) -> str:
    plain = {_plain(label): label for label in labels}
    near = [plain[found] for found in difflib.get_close_matches(_plain(name), plain, NEAR, cutoff=0.5)]
    if near:
        return "did you mean " + " or ".join(f"'{label}'" for label in near) + "?"
    return _listed(labels)
