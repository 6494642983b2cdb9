"""The gate: every output counts, a reason says which failed and by how much, and doubt is told apart from failure."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from leanserve.artifacts.manifest import OutputFidelity, Quality
from leanserve.config.variant_section import GateConfig
from leanserve.contracts import TensorSpec
from leanserve.evaluation.fidelity import fidelity
from leanserve.evaluation.gate import GateVerdict, judged
from report_samples import artifact, classes, embedding, values


def quality(*outputs: OutputFidelity, **more: Any) -> Quality:
    return artifact("cast", outputs=outputs, **more).quality


def verdict(gate: dict[str, Any], found: Quality, *, compressed: bool = True) -> GateVerdict:
    return judged(GateConfig.model_validate(gate), found, artifact().quality, compressed=compressed)


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        ((values(0.01),), None),
        (
            (values(0.18, "y"),),
            "output 'y' has an agreement of 0.8200: it is off by 18.0 % of the base's spread (channel 2)",
        ),
        ((classes(1.0), values(0.7)), "output 'boxes' has an agreement of 0.3000: it is off by 70.0 %"),
        (
            (classes(0.9), values(0.7)),
            "output 'logits' has an agreement of 0.9000, the share of rows with the base's answer",
        ),
        ((embedding(0.97),), "output 'embedding' has an agreement of 0.9700, its mean cosine with the base's"),
        ((values(18.0),), "output 'boxes' has an agreement of 0.0000: it is off by 1800.0 %"),
        (
            (values(1.0).model_copy(update={"not_finite": 3}),),
            "output 'boxes' (3 numbers are infinite or NaN and should not be) has an agreement of 0.0000",
        ),
    ],
)
def test_the_gate_asks_every_output(outputs: tuple[OutputFidelity, ...], reason: str | None) -> None:
    found = judged(GateConfig(min_agreement=0.98), quality(*outputs), quality(*outputs)).reason
    if reason is None:
        assert found is None
        return
    assert found is not None
    assert reason in found
    assert "gate.min_agreement asks for 0.98" in found
    assert found.count("output '") == sum(output.agreement < 0.98 for output in outputs)


def sampled(**more: Any) -> Quality:
    return quality(classes(1.0), score=0.987, **more)


@pytest.mark.parametrize(
    ("gate", "drop_high", "reason", "doubt"),
    [
        ({"max_drop": 0.01}, 0.009, "", ""),
        ({"max_drop": 0.01}, 0.012, "", "over 450 rows the drop may be up to 0.0120; gate.max_drop allows 0.01"),
        ({"max_drop": 0.01, "undecided": "fail"}, 0.012, "up to 0.0120", "up to 0.0120"),
        ({"max_drop": 0.001}, 0.012, "score 0.9870 is 0.0030 below the base's 0.9900", ""),
        ({"max_drop": 0.01}, None, "", "may be up to inf"),
    ],
)
def test_a_drop_whose_interval_reaches_beyond_its_limit_is_undecided(
    gate: dict[str, Any], drop_high: float | None, reason: str, doubt: str
) -> None:
    found = verdict(gate, sampled(drop=0.003, drop_low=-0.001, drop_high=drop_high))
    for told, expected in ((found.reason, reason), (found.doubt, doubt)):
        assert (told is None) == (not expected)
        assert expected in (told or "")
    assert not doubt or "(undecided: more gate rows decide it)" in (found.doubt or "")


def test_an_agreement_whose_interval_reaches_below_its_limit_is_undecided() -> None:
    near = values(0.01).model_copy(update={"agreement_low": 0.97})
    found = verdict({"min_agreement": 0.98}, quality(near))
    assert found.reason is None
    assert "output 'boxes' has an agreement of 0.9900: it is off by 1.0 %" in (found.doubt or "")
    assert "over 450 rows it may be 0.9700" in (found.doubt or "")
    settled = verdict({"min_agreement": 0.98, "undecided": "fail"}, quality(near))
    assert settled.reason == found.doubt


@pytest.mark.parametrize(
    ("speedup", "low", "reason", "doubt"),
    [
        (1.5, 1.3, "", ""),
        (1.1, 1.0, "1.10 times the throughput", ""),
        (1.3, 1.1, "", "1.10 times in its slowest round"),
    ],
)
def test_a_variant_must_be_as_fast_as_it_is_asked_to_be(speedup: float, low: float, reason: str, doubt: str) -> None:
    found = verdict({"min_speedup": 1.2}, sampled(speedup=speedup, speedup_low=low))
    assert (reason in (found.reason or ""), bool(found.reason)) == (True, bool(reason))
    assert (doubt in (found.doubt or ""), bool(found.doubt)) == (True, bool(doubt))
    assert verdict({"min_speedup": 1.2}, sampled(speedup=1.0), compressed=False).reason is None, "it is the base"


def test_a_speed_measured_beside_other_work_says_so() -> None:
    found = verdict({"min_speedup": 2}, sampled(speedup=1.9, waited=0.8))
    assert "1.90 times the throughput of the base, measured beside other work; gate.min_speedup" in (found.reason or "")


# Models that are broken in ways that a mean over everything hides

BOXES = TensorSpec("boxes", "float32", (6, 4))
SCORES = TensorSpec("scores", "float32", (6,))
RANDOM = np.random.default_rng(0)
GATE = {"min_agreement": 0.95}


def test_a_model_with_one_of_two_heads_destroyed_is_excluded() -> None:
    heads = (TensorSpec("kind", "float32", (5,), meaning="logits"), TensorSpec("price", "float32", (1,)))
    kind, price = (RANDOM.standard_normal((200, size)).astype(np.float32) for size in (5, 1))
    found = verdict(GATE, quality(*fidelity((kind, price[::-1]), (kind, price), heads)))
    assert re.match(r"output 'price' has an agreement of 0\.0000: it is off by 1\d\d\.\d % of", found.reason or "")
    assert "kind" not in (found.reason or "")


@pytest.mark.parametrize("gate", [GATE, {"max_drop": 1.0}], ids=["agreement", "score alone"])
def test_a_detector_with_dead_scores_is_excluded(gate: dict[str, Any]) -> None:
    boxes = RANDOM.uniform(0, 320, (100, 6, 4)).astype(np.float32)
    scores = RANDOM.uniform(0, 1, (100, 6)).astype(np.float32)
    dead = np.full_like(scores, 0.5)
    found = verdict(gate, quality(*fidelity((boxes, dead), (boxes, scores), (BOXES, SCORES))))
    assert "output 'scores' is the same for every row, and the base's is not" in (found.reason or "")
    assert ("'scores' has an agreement of 0.0" in (found.reason or "")) == ("min_agreement" in gate)
    assert "boxes" not in (found.reason or "")


def test_a_regression_that_is_five_percent_off_is_excluded() -> None:
    price = RANDOM.normal(100, 20, (300, 1)).astype(np.float32)
    field = TensorSpec("price", "float32", (1,))
    found = verdict(GATE, quality(*fidelity((price * 1.05,), (price,), (field,))))
    cosine = float((price * price * 1.05).sum() / (np.linalg.norm(price) * np.linalg.norm(price * 1.05)))
    assert cosine == pytest.approx(1), "by the angle of its answers nothing is wrong"
    assert re.match(r"output 'price' has an agreement of 0\.7\d+: it is off by 2\d\.\d %", found.reason or "")


def test_a_variant_whose_answers_depend_on_their_batch_is_excluded() -> None:
    found = verdict({}, quality(classes(1.0), batch_dependence=0.7))
    assert "an answer changes by 0.7 of the largest output with the rows that share its batch" in (found.reason or "")
