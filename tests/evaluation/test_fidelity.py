"""How near outputs are to the base's, each by its meaning: exact numbers for answers made to be that far off."""

from __future__ import annotations

import time
import tracemalloc

import numpy as np
import pytest

from leanserve.artifacts.manifest import OutputFidelity
from leanserve.contracts import CLASS_MAPS, CLASSES, Array, Meaning, TensorSpec
from leanserve.evaluation import fidelity as module
from leanserve.evaluation.fidelity import MEASURES, fidelity
from leanserve.passes.toolkit.spread import channel_axis, channel_scales

RANDOM = np.random.default_rng(0)


def compared(ours: Array, theirs: Array, meaning: Meaning = "values") -> OutputFidelity:
    field = TensorSpec("y", str(theirs.dtype), theirs.shape[1:], meaning=meaning)
    [found] = fidelity((ours,), (theirs,), (field,))
    return found


def softmax(logits: Array) -> Array:
    return np.asarray(np.exp(logits) / np.exp(logits).sum(1, keepdims=True))


# Values


def test_a_regressor_that_is_18_percent_off_is_not_right() -> None:
    theirs = RANDOM.standard_normal((100, 1)).astype(np.float32)
    found = compared(1.18 * theirs, theirs)
    assert found.error == pytest.approx(0.18, abs=0.01)
    assert found.agreement == pytest.approx(1 - (found.error or 0))
    far = theirs + 100
    assert (compared(1.18 * far, far).error or 0) > 10, "18 % of 100 are many times what the answers vary"


def test_error_is_the_root_mean_square_over_the_standard_deviation() -> None:
    theirs, noise = RANDOM.standard_normal((200, 1)), RANDOM.standard_normal((200, 1)) * 0.05
    expected = np.sqrt(np.mean(noise**2)) / theirs.std()
    assert compared(theirs + noise, theirs).error == pytest.approx(expected)


def test_a_wide_column_does_not_hide_a_narrow_one() -> None:
    theirs = np.stack([RANDOM.uniform(0, 320, 300), RANDOM.uniform(0, 1, 300)], axis=1).astype(np.float32)
    ours = theirs.copy()
    ours[:, 1] = 0.3 * (theirs[:, 1] - 0.5) + 0.5
    found = compared(ours, theirs)
    assert found.channel == 1
    assert found.error == pytest.approx(0.7, abs=0.01)


def test_every_output_has_its_own_measure() -> None:
    numbers = RANDOM.standard_normal((50, 4)).astype(np.float32)
    fields = (TensorSpec("class", "float32", (4,), meaning="logits"), TensorSpec("box", "float32", (4,)))
    first, second = fidelity((2 * numbers, 0.3 * numbers), (numbers, numbers), fields)
    assert (first.name, first.agreement, first.error) == ("class", 1.0, None)
    assert (first.kl or 0) > 0.1
    assert (second.name, second.kl) == ("box", None)
    assert (second.error or 0) >= 0.7


@pytest.mark.parametrize(
    ("theirs", "ours", "error"),
    [
        ([5.0] * 4, [5.0] * 4, 0.0),
        ([5.0] * 4, [5.05] * 4, 0.01),
        ([5.0, 5.0 + 2e-6] * 2, [5.05] * 4, 0.01),
        ([0.0] * 4, [0.0] * 4, 0.0),
        ([0.0] * 4, [0.02] * 4, 0.02),
    ],
)
def test_a_constant_channel_is_measured_by_its_value(theirs: list[float], ours: list[float], error: float) -> None:
    assert compared(np.array([ours]).T, np.array([theirs]).T).error == pytest.approx(error, abs=1e-6)


def test_a_dead_channel_is_measured_by_the_others() -> None:
    live = np.linspace(-1, 1, 9)
    theirs = np.stack([live, 10 * live, 100 * live, np.zeros(9)], axis=1)
    ours = theirs.copy()
    ours[:, 3] = 0.1 * (10 * live).std()
    found = compared(ours, theirs)
    assert found.channel == 3
    assert found.error == pytest.approx(0.1)
    rounding = theirs + np.array([0, 0, 0, 1e-7])
    assert compared(rounding, theirs).agreement > 0.999999


def test_channels_are_told_by_the_shape_of_a_row() -> None:
    shapes = ((), (1,), (7,), (3, 32, 32), (84, 8400), (100, 4), (None, 16), (1, 25200, 85), (32, 32, 3))
    assert [channel_axis(shape) for shape in shapes] == [None, None, 1, 1, 1, 2, 2, 3, 3]
    images = RANDOM.standard_normal((6, 3, 8, 8)) * np.array([1, 10, 100])[:, None, None]
    np.testing.assert_allclose(channel_scales([images], 1), images.std(axis=(0, 2, 3)))
    np.testing.assert_allclose(channel_scales([images[:1], images[1:4], images[4:]], 1), images.std(axis=(0, 2, 3)))
    ours = images.copy()
    ours[:, 0] *= 1.5
    assert compared(ours, images).channel == 0
    assert compared(np.moveaxis(ours, 1, 3), np.moveaxis(images, 1, 3)).channel == 0


def test_pieces_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = RANDOM.standard_normal((17, 3, 5)).astype(np.float32)
    ours = theirs + RANDOM.standard_normal(theirs.shape).astype(np.float32) * 0.1
    whole = compared(ours, theirs)
    monkeypatch.setattr(module, "PIECE", 40)
    assert compared(ours, theirs) == whole


def test_a_large_output_is_compared_in_little_time_and_room() -> None:
    theirs = RANDOM.standard_normal((64, 84, 2100), dtype=np.float32)
    tracemalloc.start()
    started = time.perf_counter()
    found = compared(theirs, theirs)
    seconds, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.agreement == 1.0
    assert peak < 12 * theirs.nbytes
    assert seconds < 10


# Whole numbers, and what is no number


def test_whole_numbers_are_equal_or_not() -> None:
    theirs = np.array([[1, 7], [2, 7], [3, 7], [4, 7]])
    ours = np.array([[1, 7], [2, 7], [3, 7], [5, 7]])
    found = compared(ours, theirs)
    assert (found.agreement, found.error, found.channel) == (0.75, 0.25, 0)
    assert compared(ours[:, 0], theirs[:, 0]).agreement == 0.75
    assert compared(theirs == 1, ours == 1).agreement == 1.0


@pytest.mark.parametrize("meaning", sorted(MEASURES))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_in_both_agrees_and_in_one_does_not(meaning: Meaning, value: float) -> None:
    theirs = softmax(RANDOM.standard_normal((8, 4)))
    broken = theirs.copy()
    broken[3, 2] = value
    same, ours, base = (
        compared(broken, broken, meaning),
        compared(broken, theirs, meaning),
        compared(theirs, broken, meaning),
    )
    assert (same.agreement, same.not_finite) == (1.0, 0)
    for found in (ours, base):
        assert found.not_finite == 1
        assert found.model_validate_json(found.model_dump_json()) == found, "no number in it is NaN or infinite"
        if meaning in {"values", "embedding"}:
            assert found.agreement == (0.0 if meaning == "values" else pytest.approx(7 / 8))
        elif meaning in CLASS_MAPS:
            assert found.worst_row == 3 or np.isneginf(value)
        elif not np.isneginf(value):
            assert found.agreement == 7 / 8


def test_answers_that_are_all_broken_agree_in_nothing() -> None:
    theirs = softmax(RANDOM.standard_normal((8, 4)))
    for meaning in MEASURES:
        found = compared(np.full_like(theirs, np.nan), theirs, meaning)
        assert (found.agreement, found.not_finite) == (0.0, 32)


# Classes


def test_logits_and_probabilities_of_the_same_net_are_as_far_apart() -> None:
    theirs = RANDOM.standard_normal((100, 5))
    ours = theirs + 0.3 * RANDOM.standard_normal((100, 5))
    p, q = softmax(theirs), softmax(ours)
    expected = float(np.mean(np.sum(p * np.log(p / q), axis=1)))
    by_meaning = {
        "logits": compared(ours, theirs, "logits"),
        "probabilities": compared(q, p, "probabilities"),
        "log_probabilities": compared(np.log(q), np.log(p), "log_probabilities"),
    }
    for found in by_meaning.values():
        assert found.kl == pytest.approx(expected)
        assert found.agreement == np.mean(ours.argmax(1) == theirs.argmax(1))
        assert (found.cosine, found.error) == (None, None)


def test_a_class_that_is_ruled_out_on_one_side_is_far_and_not_infinite() -> None:
    theirs, ours = np.array([[0.5, 0.5, 0.0]]), np.array([[1.0, 0.0, 0.0]])
    found = compared(ours, theirs, "probabilities")
    assert 100 < (found.kl or 0) < 1000
    assert compared(theirs, theirs, "probabilities").kl == 0.0
    assert 100 < (compared(np.array([[0.0, -np.inf]]), np.zeros((1, 2)), "logits").kl or 0) < 1000


def test_a_softmax_that_sums_up_to_two_has_a_divergence() -> None:
    theirs = softmax(RANDOM.standard_normal((10, 5)))
    assert (compared(2 * theirs, theirs, "probabilities").kl or 0) > 0.1


def test_independent_classes_agree_where_the_same_ones_are_there() -> None:
    theirs = np.array([[0.9, 0.8, 0.1], [0.9, 0.1, 0.1], [0.2, 0.3, 0.1]])
    ours = np.array([[0.9, 0.3, 0.1], [0.8, 0.2, 0.1], [0.3, 0.2, 0.1]])
    found = compared(ours, theirs, "independent_probabilities")
    assert found.agreement == pytest.approx(1 / 3), "another set, the same, another best"
    terms = theirs * np.log(theirs / ours) + (1 - theirs) * np.log((1 - theirs) / (1 - ours))
    assert found.kl == pytest.approx(terms.sum(1).mean())


# Embeddings


def test_embeddings_are_compared_by_direction() -> None:
    theirs = RANDOM.standard_normal((20, 8))
    found = compared(3 * theirs, theirs, "embedding")
    assert (found.agreement, found.cosine, found.rank_agreement) == pytest.approx((1.0, 1.0, 1.0))
    assert compared(-theirs, theirs, "embedding").cosine == pytest.approx(-1)
    assert compared(-theirs, theirs, "embedding").agreement == 0.0
    theirs[0] = 0
    assert compared(theirs, theirs, "embedding").cosine == pytest.approx(1), "a row of zeros is itself"


def test_there_is_a_function_for_every_meaning() -> None:
    assert set(MEASURES) == CLASSES | CLASS_MAPS | {"embedding", "values"}
