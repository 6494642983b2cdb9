"""What outputs become in an answer, by what they mean."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from leanserve.codecs.answers import AnswerEncoder
from leanserve.contracts import Array, Json, Meaning, ModelSpec, TensorSpec
from leanserve.errors import BackendFailed, ConfigError
from leanserve.http.messages import json_response

LABELS = ("cat", "dog", "owl")
SURE = np.array([[0.03, 0.912, 0.058]], np.float32)


def of(meaning: Meaning, *others: TensorSpec, labelled: int = 0, labels: tuple[str, ...] = LABELS) -> AnswerEncoder:
    """The encoder of a model with one output of three numbers, which may stand behind others."""
    outputs = (*others[:labelled], TensorSpec("out", "float32", (3,), meaning=meaning), *others[labelled:])
    return AnswerEncoder(ModelSpec((), outputs, labels, labelled=labelled))


def sent(answers: Json) -> Json:
    """As a client reads them."""
    return json.loads(json_response(answers).body)


@pytest.mark.parametrize(
    ("meaning", "output"),
    [
        ("probabilities", SURE),
        ("independent_probabilities", SURE),
        ("log_probabilities", np.log(SURE)),
        ("logits", np.log(SURE) + 5),
    ],
)
def test_what_was_computed_as_a_probability_is_answered_as_it_is(meaning: Meaning, output: Array) -> None:
    assert of(meaning).encode((output,)) == [{"label": "dog", "scores": {"dog": 0.912, "owl": 0.058, "cat": 0.03}}]


def test_probabilities_of_independent_classes_may_all_be_high() -> None:
    [answer] = of("independent_probabilities").encode((np.array([[0.8, 0.1, 0.9]], np.float32),))
    assert answer == {"label": "owl", "scores": {"owl": 0.9, "cat": 0.8, "dog": 0.1}}


def test_the_labels_may_name_another_output_than_the_first() -> None:
    answers = of("probabilities", TensorSpec("number", "int64", ()), labelled=1)
    assert answers.encode((np.array([1]), SURE))[0]["scores"]["dog"] == 0.912


def test_a_class_at_minus_infinity_is_ruled_out() -> None:
    logits = np.array([[0, -np.inf, 0]], np.float32)
    assert of("logits").encode((logits,))[0]["scores"] == {"cat": 0.5, "owl": 0.5, "dog": 0.0}
    certain = np.array([[-np.inf, 0, -np.inf]], np.float32)
    assert of("log_probabilities").encode((certain,))[0]["scores"] == {"dog": 1.0, "cat": 0.0, "owl": 0.0}


@pytest.mark.parametrize("meaning", ["logits", "probabilities", "log_probabilities", "independent_probabilities"])
@pytest.mark.parametrize("row", [[0, math.nan, 0], [0, math.inf, 0], [-math.inf] * 3])
def test_what_is_no_number_is_not_answered(meaning: Meaning, row: list[float]) -> None:
    with pytest.raises(BackendFailed, match=f"{meaning} are not finite in row 1"):
        of(meaning).encode((np.array([[0, 0, 0], row], np.float32),))


def test_without_labels_the_meaning_decides() -> None:
    row = np.array([[1, 2, 3]], np.float32)
    assert sent(of("embedding", labels=()).encode((row,))) == [{"embedding": [1, 2, 3]}]
    for meaning in ("values", "logits", "probabilities"):
        assert sent(of(meaning, labels=()).encode((row,))) == [{"outputs": {"out": [1, 2, 3]}}]
    two = of("embedding", TensorSpec("length", "float32", ()), labels=())
    assert sent(two.encode((row, np.array([3.5], np.float32)))) == [{"outputs": {"out": [1, 2, 3], "length": 3.5}}]


def test_labels_of_what_has_no_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match="the labels name the output 'out', which is no classes"):
        of("values")
