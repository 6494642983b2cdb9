"""Scores of the config: those that are shipped against references, and functions of the user's own."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import jaccard_score, roc_curve

from leanserve.bases.opening import open_base, reopen_base
from leanserve.bases.origin import Origin
from leanserve.bases.scores.detection import Detections, mean_average_precision, overlap
from leanserve.bases.scores.opening import open_score
from leanserve.bases.scores.segmentation import mean_intersection_over_union
from leanserve.bases.scores.sequences import edit_distance, spoken
from leanserve.bases.scores.verification import all_pairs, equal_error_rate
from leanserve.config.schema import ServiceConfig
from leanserve.contracts import Array, Json, ModelSpec, TensorSpec
from leanserve.errors import ConfigError, PassFailed
from leanserve.scoring import Scoring
from tiny_graphs import graph, write

RANDOM = np.random.default_rng(0)
VECTOR = TensorSpec("vector", "float32", (4,), meaning="embedding")
BOXES, SCORES = TensorSpec("boxes", "float32", (2, 4)), TensorSpec("scores", "float32", (2,))
DETECTOR = ModelSpec((), (BOXES, SCORES, TensorSpec("kinds", "int64", (2,))))


def opened(declared: Json, spec: ModelSpec, folder: Path = Path()) -> Scoring:
    config = {"base": "digits", "variants": [{"name": "a"}], "score": declared}
    score = ServiceConfig.model_validate(config).score
    assert score is not None
    return open_score(score, spec, folder)


# Detection


def test_boxes_overlap_by_what_they_share() -> None:
    one = np.array([[0, 0, 10, 10], [0, 0, 0, 0]])
    other = np.array([[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30]])
    np.testing.assert_allclose(overlap(one, other), np.array([[1, 1 / 3, 0], [0, 0, 0]]))


SQUARE, FAR, NEAR = [0, 0, 10, 10], [50, 50, 60, 60], [0, 0, 10, 8]
NOTHING = [-1, 0, 0, 0, 0]


@pytest.mark.parametrize(
    ("boxes", "scores", "labels", "levels", "expected"),
    [
        ([[SQUARE, FAR]], [[0.9, 0.8]], [[[0, *SQUARE], [0, *FAR]]], [0.5], 1.0),
        ([[SQUARE, FAR]], [[0.9, 0.8]], [[[0, *SQUARE], NOTHING]], [0.5], 1.0),
        # A wrong box that is surer halves the precision at every recall.
        ([[FAR, SQUARE]], [[0.9, 0.8]], [[[0, *SQUARE], NOTHING]], [0.5], 0.5),
        # Half of the boxes are found: 51 of 101 recalls are reached.
        ([[SQUARE, NEAR]], [[0.9, 0.8]], [[[0, *SQUARE], [0, *FAR]]], [0.5], 51 / 101),
        # It overlaps by 0.8, which is enough for 0.5 to 0.8 of COCO's ten thresholds.
        ([[NEAR, FAR]], [[0.9, 0.1]], [[[0, *SQUARE], NOTHING]], [0.5, 0.75, 0.8, 0.85, 0.9], 3 / 5),
        # The second box of a pair of rows is in the other row.
        ([[SQUARE, FAR], [FAR, FAR]], [[0.9, 0.1]] * 2, [[[0, *SQUARE]], [[0, *SQUARE]]], [0.5], 51 / 101),
    ],
    ids=["all", "an extra one", "a wrong one first", "half", "thresholds", "rows"],
)
def test_average_precision_by_hand(
    boxes: list[Any], scores: list[Any], labels: list[Any], levels: list[float], expected: float
) -> None:
    found = Detections.of(np.array(boxes, np.float32), np.array(scores), None)
    assert mean_average_precision(found, np.array(labels, np.float32), levels) == pytest.approx(expected, abs=1e-6)


def test_average_precision_is_that_of_the_definition() -> None:
    """One class, one threshold and boxes that overlap fully or not at all: a ranked list, counted in plain Python."""
    right = RANDOM.random(60) < 0.6
    boxes = np.array([[SQUARE if good else FAR] for good in right], np.float32)
    scores = RANDOM.random((60, 1))
    ranked = right[np.argsort(-scores[:, 0])]
    precisions = [(ranked[: n + 1].sum() / 60, ranked[: n + 1].mean()) for n in range(60)]
    expected = np.mean(
        [max((p for r, p in precisions if r >= recall - 1e-12), default=0.0) for recall in np.linspace(0, 1, 101)]
    )
    labels = np.array([[[0, *SQUARE]]] * 60, np.float32)
    assert mean_average_precision(Detections.of(boxes, scores, None), labels, [0.5]) == pytest.approx(expected)


def test_a_detector_is_scored_by_the_outputs_that_are_named() -> None:
    score = opened({"detection": "boxes", "scores": "scores", "classes": "kinds"}, DETECTOR)
    boxes, scores = np.array([[SQUARE, FAR]], np.float32), np.array([[0.9, 0.8]], np.float32)
    labels = np.array([[[3, *SQUARE], [5, *FAR]]], np.float32)
    assert score.name == "mean average precision"
    assert score.function((boxes, scores, np.array([[3, 5]])), labels) == 1.0
    assert score.function((boxes, scores, np.array([[3, 3]])), labels) == 0.5
    dead = np.full_like(scores, np.nan)
    assert score.function((boxes, dead, np.array([[3, 5]])), labels) == 0.0
    with pytest.raises(PassFailed, match=r"labels of detections are \[rows, boxes, 5\], not \[1, 2\]"):
        score.function((boxes, scores, np.array([[3, 5]])), np.zeros((1, 2)))
    best = Detections.of(boxes, np.array([[[0.1, 0.7], [0.9, 0.3]]]), None)
    assert (best.scores.tolist(), best.classes.tolist()) == ([[0.7, 0.9]], [[1, 0]])


# Sequences


def slow_distance(one: str, other: str) -> int:
    """By the definition."""
    if not one or not other:
        return len(one) + len(other)
    changed = slow_distance(one[1:], other[1:]) + (one[0] != other[0])
    return min(changed, slow_distance(one[1:], other) + 1, slow_distance(one, other[1:]) + 1)


def test_edit_distances() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    for _ in range(60):
        one, other = ("".join(RANDOM.choice(list("ab "), RANDOM.integers(0, 6))) for _ in range(2))
        assert edit_distance(one, other) == slow_distance(one, other)


def steps(*ids: int) -> Array:
    return np.eye(4, dtype=np.float32)[list(ids)]


def test_what_is_spoken_is_what_is_left_of_blanks_and_repetitions() -> None:
    assert spoken(steps(0, 1, 1, 0, 1, 2), blank=0) == [1, 1, 2]
    assert spoken(steps(0, 1, 1), blank=None) == [0, 1, 1]
    assert spoken(np.array([2, 3, -1, -1]), blank=None) == [2, 3]
    padded = np.concatenate([steps(1, 2), np.full((2, 4), np.nan, np.float32)])
    assert spoken(padded, blank=0) == [1, 2]


@pytest.mark.parametrize(("symbols", "expected"), [("character", 1 - 1 / 5), ("word", 1 - 1 / 2)], ids=["CER", "WER"])
def test_error_rates_count_characters_or_words(symbols: str, expected: float) -> None:
    spec = ModelSpec((), (TensorSpec("logits", "float32", (6, 4)),))
    score = opened({"sequence": "logits", "symbols": symbols, "alphabet": "-ab ", "blank": 0}, spec)
    answers = np.stack([steps(1, 2, 3, 2, 2, 1)])  # "ab ba"
    assert score.function((answers,), np.array(["ab bb"])) == pytest.approx(expected)
    assert score.function((answers,), np.array(["ab ba"])) == 1.0


def test_tokens_are_compared_as_they_are(tmp_path: Path) -> None:
    spec = ModelSpec((), (TensorSpec("ids", "int64", (None,)),))
    score = opened({"sequence": "ids"}, spec)
    assert score.function((np.array([[5, 6, 7], [5, -1, -1]]),), np.array([[5, 6, 8], [5, -1, -1]])) == 1 - 1 / 4
    with pytest.raises(ConfigError, match=r"score\.alphabet: to count words, say what the ids stand for"):
        opened({"sequence": "ids", "symbols": "word"}, spec)
    (tmp_path / "ids.txt").write_text("-\nab\n cd\n")
    named = opened({"sequence": "ids", "symbols": "word", "alphabet": "ids.txt"}, spec, tmp_path)
    assert named.function((np.array([[1, 2, 1]]),), np.array(["ab cdab"])) == 1.0
    assert named.digest != score.digest


# Segmentation and verification


def test_mean_iou_is_that_of_scikit_learn() -> None:
    labels, answers = (RANDOM.integers(0, 4, (3, 8, 8)) for _ in range(2))
    expected = jaccard_score(labels.ravel(), answers.ravel(), average="macro")
    assert mean_intersection_over_union(answers, labels, None) == pytest.approx(expected)
    per_class = np.eye(4)[answers] + 0.1
    for answered in (per_class, np.moveaxis(per_class, 3, 1)):
        assert mean_intersection_over_union(answered, labels, None) == pytest.approx(expected)
    kept = labels != 3
    expected = jaccard_score(labels[kept], answers[kept], average="macro")
    assert mean_intersection_over_union(answers, labels, 3) == pytest.approx(expected)
    spec = ModelSpec((), (TensorSpec("mask", "float32", (4, 8, 8)),))
    assert opened({"segmentation": "mask"}, spec).function((np.moveaxis(np.eye(4)[labels], 3, 1),), labels) == 1.0
    with pytest.raises(PassFailed, match="no numbers per class"):
        mean_intersection_over_union(answers[:, :4], labels, None)


def test_the_equal_error_rate_is_where_the_curve_crosses() -> None:
    genuine = RANDOM.random(500) < 0.5
    scores = RANDOM.normal(genuine * 1.5, 1.0)
    found = equal_error_rate(scores, genuine)
    false_positives, true_positives, _ = roc_curve(genuine, scores)
    place = np.argmin(np.abs(false_positives - (1 - true_positives)))
    assert found == pytest.approx((false_positives[place] + 1 - true_positives[place]) / 2, abs=0.005)
    assert found == pytest.approx(0.2266, abs=0.03), "half of 1.5 deviations on both sides"
    assert equal_error_rate(np.array([0.9, 0.8, 0.1]), np.array([True, True, False])) == 0.0
    assert equal_error_rate(np.ones(4), np.array([True, True, False, False])) == pytest.approx(0.5)
    assert np.isnan(equal_error_rate(np.ones(2), np.ones(2, bool)))


def test_embeddings_are_compared_in_all_pairs_but_not_with_their_copies() -> None:
    rows = np.array([[1, 0], [0.9, 0.1], [0, 1], [1, 0]])
    cosines, same = all_pairs(rows, np.array(["ann", "ann", "bob", "ann"]))
    assert len(cosines) == 5, "the first and the last row are the same"
    assert same.sum() == 2
    spec = ModelSpec((), (TensorSpec("vector", "float32", (2,), meaning="embedding"),))
    score = opened({"verification": "vector"}, spec)
    assert score.function((rows,), np.array([1, 1, 2, 1])) == 1.0
    alike = ModelSpec((), (TensorSpec("alike", "float32", (1,)),))
    assert opened({"verification": "alike"}, alike).function((np.array([[0.2], [0.9]]),), np.array([0, 1])) == 1.0


# Functions of the user's own

SOURCE = """
from scoring_help import half

def closeness(outputs, labels):
    return 1 - half(abs(outputs["y"] - labels).mean())

def broken(outputs, labels):
    raise KeyError("nobody")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "my_scores.py").write_text(SOURCE)
    (tmp_path / "scoring_help.py").write_text("def half(x):\n    return x / 2\n")
    monkeypatch.setattr(sys, "path", sys.path.copy())
    yield tmp_path
    for name in ("my_scores", "scoring_help"):
        sys.modules.pop(name, None)


VALUES = ModelSpec((), (TensorSpec("y", "float32", (2,)),))


def test_a_function_beside_the_config_gets_outputs_by_name_and_labels(folder: Path) -> None:
    score = opened("my_scores:closeness", VALUES, folder)
    assert (score.name, score.function((np.ones((3, 2)),), np.zeros((3, 2)))) == ("my_scores:closeness", 0.5)
    with pytest.raises(PassFailed, match=r"score: my_scores:broken failed: KeyError: 'nobody'"):
        opened("my_scores:broken", VALUES, folder).function((np.ones((3, 2)),), np.zeros((3, 2)))


@pytest.mark.parametrize("changed", ["my_scores.py", "scoring_help.py"])
def test_its_digest_knows_its_own_code_and_what_it_imports(folder: Path, changed: str) -> None:
    before = opened("my_scores:closeness", VALUES, folder).digest
    assert opened("my_scores:closeness", VALUES, folder).digest == before
    assert opened("my_scores:broken", VALUES, folder).digest != before
    path = folder / changed
    path.write_text(path.read_text() + "\nMORE = 1\n")
    assert opened("my_scores:closeness", VALUES, folder).digest != before


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ("nowhere_at_all:f", "score: there is no module nowhere_at_all"),
        ("my_scores:missing", "score: the module my_scores has no function missing"),
        ({"segmentation": "mask"}, "score.segmentation: the model has no output 'mask'; it gives y"),
        ({"detection": "y", "scores": "z"}, "score.scores: the model has no output 'z'; it gives y"),
    ],
)
def test_what_there_is_not_is_named(folder: Path, declared: Json, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        opened(declared, VALUES, folder)
    assert str(error.value).startswith(message)


def test_a_base_is_scored_so_here_and_in_child_processes_and_its_labels_may_be_of_any_form(folder: Path) -> None:
    write(folder / "m.onnx", graph("agraph (float[N, 2] x) => (float[N, 2] y) { y = Identity (x) }"))
    rows = RANDOM.standard_normal((40, 2)).astype(np.float32)
    np.savez(folder / "rows.npz", x=rows, boxes=RANDOM.random((40, 3, 5)))
    declared = {"arrays": "rows.npz", "labels": "boxes", "splits": {"gate": 16, "calibration": 8}}
    sections = {"base": {"onnx": "m.onnx", "rows": "any"}, "data": declared, "folder": folder}
    with pytest.raises(ConfigError, match="labels of shape"):
        open_base(Origin.model_validate(sections))
    (folder / "my_scores.py").write_text("def rate(outputs, labels):\n    return labels.shape[1] + len(outputs['y'])\n")
    base = open_base(Origin.model_validate(sections | {"score": "my_scores:rate"}))
    again = reopen_base(base.origin)
    assert base.scored_as == again.scored_as == "my_scores:rate"
    assert base.score_digest == again.score_digest != ""
    labels = next(base.data("gate").batches(16)).labels
    assert labels is not None
    assert again.score((np.zeros((16, 2)),), labels) == 19.0
