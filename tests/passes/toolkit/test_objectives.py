"""What a student is trained on: the same divergence whatever form the probabilities of its classes have."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from leanserve.contracts import CLASSES, Meaning
from leanserve.passes.toolkit.objectives import BY_MEANING, MEASURES, Output, cross_entropy, kl, mse

GIVEN, WANTED = (torch.randn(20, 5, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
LABELS = torch.arange(20) % 5


def output(meaning: Meaning, temperature: float = 1.0, scales: torch.Tensor | None = None) -> Output:
    return Output(meaning, torch.ones(1) if scales is None else scales, temperature)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_probabilities_are_not_put_through_a_softmax_again(temperature: float) -> None:
    expected = kl(GIVEN, WANTED, output("logits", temperature))
    softened = [(logits / temperature).softmax(1) for logits in (GIVEN, WANTED)]
    divergence = (softened[1] * (softened[1] / softened[0]).log()).sum(1).mean() * temperature**2
    torch.testing.assert_close(expected, divergence)
    chances = kl(GIVEN.softmax(1), WANTED.softmax(1), output("probabilities", temperature))
    torch.testing.assert_close(chances, expected)
    logarithms = kl(GIVEN.log_softmax(1), WANTED.log_softmax(1), output("log_probabilities", temperature))
    torch.testing.assert_close(logarithms, expected)


def test_independent_classes_add_up() -> None:
    ours, theirs = GIVEN.sigmoid(), WANTED.sigmoid()
    terms = theirs * (theirs / ours).log() + (1 - theirs) * ((1 - theirs) / (1 - ours)).log()
    found = kl(ours, theirs, output("independent_probabilities"))
    torch.testing.assert_close(found, terms.sum(1).mean(), rtol=1e-4, atol=1e-5)


def test_values_are_measured_channel_by_channel() -> None:
    wide = WANTED * torch.tensor([300.0, 1, 1, 1, 1])
    off = wide + torch.tensor([0.0, 1, 0, 0, 0])
    scales = torch.tensor([[300.0, 1, 1, 1, 1]])
    assert mse(off, wide, output("values", scales=scales)).item() == pytest.approx(0.2)


def test_hard_labels_are_compared_with_probabilities() -> None:
    expected = F.cross_entropy(GIVEN, LABELS)
    torch.testing.assert_close(cross_entropy(GIVEN, LABELS, "logits"), expected)
    torch.testing.assert_close(cross_entropy(GIVEN.softmax(1), LABELS, "probabilities"), expected)
    torch.testing.assert_close(cross_entropy(GIVEN.log_softmax(1), LABELS, "log_probabilities"), expected)
    half = torch.full((20, 5), 0.5)
    independent = cross_entropy(half, LABELS, "independent_probabilities")
    assert independent.item() == pytest.approx(5 * math.log(2))


def test_certain_probabilities_have_gradients_that_are_numbers() -> None:
    sure = torch.tensor([[1.0, 0.0]], requires_grad=True)
    for meaning in ("probabilities", "independent_probabilities"):
        for loss in (
            kl(sure, torch.tensor([[0.0, 1.0]]), output(meaning)),
            cross_entropy(sure, torch.tensor([1]), meaning),
        ):
            [gradient] = torch.autograd.grad(loss, sure)
            assert gradient.isfinite().all()


def test_there_is_a_measure_for_every_meaning() -> None:
    assert set(BY_MEANING) == CLASSES | {"embedding", "classes_first", "classes_last", "values"}
    assert set(BY_MEANING.values()) == set(MEASURES)
