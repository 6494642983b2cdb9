"""Labels in data as classes of the model: read in one way as a whole, or refused with both ways shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from leanserve.bases.datasets.class_labels import LabelColumn, class_numbers
from leanserve.errors import ConfigError

ANIMALS = ("cat", "dog", "owl")
DIGITS = tuple("0123456789")
STARS = ("1", "2", "3", "4", "5")
FOLDERS = ("0", "1", "10", "2", "3", "4", "5", "6", "7", "8", "9")
"""As sorting by name leaves them."""


def read(values: Any, labels: Sequence[str], *others: Any) -> list[int]:
    """The classes of the first column; the others are of the same data section."""
    columns = [LabelColumn(np.asarray(item), lambda row: f"a.csv:{row}") for item in (values, *others)]
    return [int(number) for number in class_numbers(columns, labels)[0]]


@pytest.mark.parametrize(
    ("values", "labels", "classes"),
    [
        ([0, 2, 1, 0], ANIMALS, [0, 2, 1, 0]),
        ([0.0, 2.0], ANIMALS, [0, 2]),
        (["0", "2.0", "02"], ANIMALS, [0, 2, 2]),
        (["owl", "Cat", " dog "], ANIMALS, [2, 0, 1]),
        ([0, 1, 2, 3, 4], STARS, [0, 1, 2, 3, 4]),
        (["0", "4"], STARS, [0, 4]),
        ([1, 2, 3, 4, 5], STARS, [0, 1, 2, 3, 4]),
        (["1", "5"], STARS, [0, 4]),
        ([1, 2, 3], STARS, [0, 1, 2]),
        ([9, 0, 3], DIGITS, [9, 0, 3]),
        (["009", "3"], DIGITS, [9, 3]),
        (["2", "10", "0"], FOLDERS, [3, 2, 0]),
        (DIGITS, ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"), list(range(10))),
        (["10", "1"], tuple(str(number) for number in range(1, 11)), [9, 0]),
        ([-1, 1, -1], ("-1", "1"), [0, 1, 0]),
        (["-1", "+1"], ("-1", "1"), [0, 1]),
        ([3.5, 4.5], ("3.5", "4.5"), [0, 1]),
        ([False, True], ("no", "yes"), [0, 1]),
        (["True", "false"], ("no", "yes"), [1, 0]),
        ([False, True], ("true", "false"), [1, 0]),
        (["nan", "none"], ("none", "nan"), [1, 0]),
        (["polar_bear", "Polar-Bear", "tench"], ("tench, Tinca tinca", "polar bear"), [1, 1, 0]),
    ],
)
def test_a_column_is_read_as_numbers_or_as_names(values: Any, labels: Sequence[str], classes: list[int]) -> None:
    assert read(values, labels) == classes


@pytest.mark.parametrize(
    ("values", "labels", "error"),
    [
        ([0, -1], ANIMALS, r"a.csv:1: -1 is no label .* from 0 to 2; .*numbers from 0: -1 -> none, 0 -> 'cat'"),
        (["0", "-1"], ANIMALS, r"a.csv:1: '-1' is no label"),
        ([1, 2, 3], ANIMALS, r"a.csv:2: 3 is no label .*count from 1: subtract 1.*3 -> none, 1 -> 'dog', 2 -> 'owl'"),
        ([0, 1, 5], STARS, r"names: 0 -> none, 1 -> '1', 5 -> '5'; as numbers from 0: 0 -> '1', 1 -> '2', 5 -> none"),
        ([0.0, 3.5], ANIMALS, r"a.csv:1: 3.5 is no label of the model: a class is a whole number or a name"),
        ([0.0, math.inf], ANIMALS, r"a.csv:1: inf is no label"),
        ([0.0, math.nan], ANIMALS, r"a.csv:1: the label is empty \(nan\)"),
        (["cat", ""], ANIMALS, r"a.csv:1: the label is empty \(''\)"),
        (["cat", "NaN"], ANIMALS, r"a.csv:1: the label is empty \('NaN'\)"),
        (["cat", "dog", "1"], ANIMALS, r"a.csv:2: '1' is no label .*some rows have names and some have numbers"),
        (["0", "1", "2", "cat"], ANIMALS, r"a.csv:3: 'cat' is no label .*some rows have names and some have numbers"),
        (["cta"], ANIMALS, r"a.csv:0: 'cta' is no label of the model: did you mean 'cat'\?"),
        (["fish"], ANIMALS, r"'fish' is no label .*: there are 3: 0 'cat', 1 'dog', 2 'owl'"),
        ([True, False], ANIMALS, r"True is no label|False is no label"),
    ],
)  # fmt: skip
def test_what_can_be_read_in_neither_way_shows_both(values: Any, labels: Sequence[str], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        read(values, labels)


def test_all_files_of_a_section_are_read_in_the_same_way() -> None:
    assert read([1, 2, 3], STARS, [0, 4]) == [1, 2, 3], "alone they would be names"
    assert read([1, 2, 3], STARS, ["4", "5"]) == [0, 1, 2]
    assert read([0, 1, 2], STARS, [1, 2]) == [0, 1, 2]
    with pytest.raises(ConfigError, match=r"0 -> none.*5 -> none"):
        read([0, 1, 2], STARS, [4, 5])


def test_a_perfect_classifier_scores_one_whatever_the_labels_are_called() -> None:
    for labels in (STARS, ("a", "b", "c", "d", "e"), ("0", "1", "2", "3", "4")):
        numbers = np.random.default_rng(0).integers(0, 5, 1000)
        assert read(numbers, labels) == numbers.tolist()
        assert read([labels[number] for number in numbers], labels) == numbers.tolist()
