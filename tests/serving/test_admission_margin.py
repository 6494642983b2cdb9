"""Admission learns how much longer than predicted requests wait, and forgets it."""

from __future__ import annotations

import pytest

from leanserve.serving.admission_margin import LEAST, MOST, AdmissionMargin


@pytest.mark.parametrize(
    ("predicted_s", "waited_s", "ratio"),
    [(1.0, 1.2, 1.2), (1.0, 0.5, 1.0), (1.0, 9.0, MOST), (0.0, 0.0005, 1.05), (0.06, 0.06, 1.0)],
    ids=["a fifth longer", "sooner", "much longer", "hardly any wait", "as predicted"],
)
def test_the_margin_follows_the_waits(predicted_s: float, waited_s: float, ratio: float) -> None:
    margin = AdmissionMargin()
    assert margin.factor == LEAST
    for _ in range(200):
        margin.waited(predicted_s, waited_s)
    assert margin.factor == pytest.approx(LEAST * ratio, rel=0.01)


def test_a_disturbance_is_forgotten_also_where_only_short_waits_are_let_in() -> None:
    margin = AdmissionMargin()
    for _ in range(100):
        margin.waited(0.02, 0.2)
    for _ in range(200):
        margin.waited(0.005, 0.004)
    assert margin.factor == pytest.approx(LEAST, rel=0.01)
