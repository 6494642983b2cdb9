"""Maps of classes agree by their best class at every place, and as far as the class that suffers most."""

from __future__ import annotations

import numpy as np
import pytest

from leanserve.artifacts.manifest import OutputFidelity
from leanserve.contracts import Array, Meaning, TensorSpec
from leanserve.evaluation import fidelity as module
from leanserve.evaluation.fidelity import fidelity
from leanserve.evaluation.gate import _distance

RANDOM = np.random.default_rng(0)
FIRST: Meaning = "classes_first"
LAST: Meaning = "classes_last"


def scores(classes: Array, count: int) -> Array:
    """Maps [rows, count, ...] in which these classes [rows, ...] are best, each by another margin."""
    best = np.moveaxis(np.eye(count)[classes], -1, 1)
    return np.asarray(best * RANDOM.uniform(1, 9, best.shape) + RANDOM.uniform(0, 0.9, best.shape), np.float32)


def compared(ours: Array, theirs: Array, meaning: Meaning) -> OutputFidelity:
    [found] = fidelity((ours,), (theirs,), (TensorSpec("mask", "float32", theirs.shape[1:], meaning=meaning),))
    return found


@pytest.mark.parametrize("meaning", [FIRST, LAST])
def test_a_dead_class_is_named_although_most_places_are_right(meaning: Meaning) -> None:
    wanted = RANDOM.choice(4, (20, 16, 16), p=[0.9, 0.05, 0.03, 0.02])
    theirs = scores(wanted, 4)
    ours = theirs.copy()
    ours[:, 2] = -1
    if meaning == LAST:
        ours, theirs = np.moveaxis(ours, 1, -1), np.moveaxis(theirs, 1, -1)
    found = compared(ours, theirs, meaning)
    assert (found.agreement, found.channel) == (0.0, 2)
    assert found.agreement_high == 0.0
    worst = [(wanted[row] != 2).mean() for row in range(20)]
    assert found.worst_row == int(np.argmin(worst))
    assert found.worst_agreement == pytest.approx(min(worst))
    assert (
        "output 'mask' has an agreement of 0.0000, the share of places with the base's class where that is class 2"
        in (_distance(found))
    )


def test_other_margins_and_a_shift_of_all_scores_change_nothing() -> None:
    theirs = scores(RANDOM.integers(0, 3, (5, 7)), 3)
    found = compared(3 * theirs + 5, theirs, FIRST)
    assert (found.agreement, found.agreement_low, found.worst_agreement) == (1.0, 1.0, 1.0)


def test_classes_that_are_rare_are_judged_together() -> None:
    wanted = np.zeros((10, 1000), int)
    wanted[:, 500:] = np.arange(5000).reshape(10, 500) % 500  # each class but 0 at a tenth of a percent of all places
    ours = np.where(wanted % 2, 0, wanted)
    found = compared(scores(ours, 500), scores(wanted, 500), FIRST)
    assert found.channel is None
    assert found.agreement == pytest.approx(0.5, abs=0.01)
    assert found.agreement_low <= found.agreement <= found.agreement_high


def test_a_few_rare_places_decide_nothing_by_themselves() -> None:
    wanted = np.zeros((10, 1000), int)
    wanted[:, :5] = 1
    found = compared(scores(np.zeros_like(wanted), 2), scores(wanted, 2), FIRST)
    assert found.agreement == pytest.approx(0.995)
    assert found.channel is None


def test_rows_that_differ_leave_the_agreement_open() -> None:
    wanted = RANDOM.integers(0, 2, (12, 50))
    ours = wanted.copy()
    ours[:3] = 1 - ours[:3]
    found = compared(scores(ours, 2), scores(wanted, 2), FIRST)
    assert found.agreement == pytest.approx(0.75, abs=0.05)
    assert found.agreement_low < 0.6
    assert found.agreement_high > 0.85


def test_nan_is_the_class_of_a_place_with_nan_alone() -> None:
    theirs = scores(RANDOM.integers(0, 2, (4, 10)), 2)
    theirs[0, 1, 0] = np.nan
    assert compared(theirs.copy(), theirs, FIRST).agreement == 1.0
    ours = theirs.copy()
    ours[1:, 0] = np.nan
    found = compared(ours, theirs, FIRST)
    assert found.agreement < 0.4
    assert found.not_finite == 30


def test_a_map_is_compared_a_piece_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = RANDOM.integers(0, 5, (9, 6))
    theirs, ours = scores(wanted, 5), scores(np.where(RANDOM.random((9, 6)) < 0.3, 4 - wanted, wanted), 5)
    whole = compared(ours, theirs, FIRST)
    monkeypatch.setattr(module, "PIECE", 60)
    assert compared(ours, theirs, FIRST) == whole
