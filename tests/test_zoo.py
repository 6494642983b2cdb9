"""The quick slice of the zoo: what needs no download is brought, built, served and compared with the original run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zoo.__main__ import _outcome
from zoo.answers import Answers
from zoo.catalogue import MODELS, QUICK, Brought, ZooModel
from zoo.trial import Outcome, Trial


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", QUICK)
def test_a_model_is_brought_by_init_alone(tmp_path: Path, name: str) -> None:
    model = next(model for model in MODELS if model.name == name)
    outcome = Trial(measure_s=0.0).of(model, tmp_path)
    assert outcome.accepted, outcome.said
    assert outcome.built, outcome.said
    assert outcome.right, outcome
    assert len(outcome.serving) >= 2


def nothing(folder: Path) -> Brought:
    return Brought((str(folder),), lambda row: ())


def lost(folder: Path) -> Brought:
    raise RuntimeError("tried again")


def test_a_model_that_takes_too_long_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    outcome = Trial(limit_s=0.0).of(ZooModel("slow", "", nothing), tmp_path)
    assert (outcome.accepted, outcome.said) == (False, "init: not done within the limit of a model")


def test_what_was_served_right_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEANSERVE_ZOO", str(tmp_path))
    right = Outcome(name="m", accepted=True, built=True, error=0.0)
    path = tmp_path / "results" / "m.json"
    path.parent.mkdir()
    model = ZooModel("m", "", lost)
    for known, fresh, said in (
        (right, False, ""),
        (right, True, "tried again"),
        (Outcome(name="m"), False, "tried again"),
    ):
        path.write_text(known.model_dump_json())
        assert _outcome(model, None, Trial(), fresh=fresh).said == said
    path.write_text(right.model_dump_json())
    assert _outcome(ZooModel("m", "", lost, answers), None, Trial(), fresh=False).said == "tried again"


def answers() -> Answers:
    own: Any = lambda outputs: ["cat", 3, 0.5] if outputs else []  # noqa: E731 - one of five fields
    return Answers([], dict, list, own, lambda told: [str(told["label"]), int(told["x"]), float(told["score"])])


@pytest.mark.parametrize(
    ("label", "x", "score", "agree"),
    [("cat", 4, 0.5, True), ("dog", 3, 0.5, False), ("cat", 5, 0.5, False), ("cat", 3, 0.6, False)],
)
def test_answers_are_those_of_the_library_or_not(label: str, x: int, score: float, agree: bool) -> None:  # noqa: FBT001
    told = {"label": np.array(label), "x": np.array(x), "score": np.array(score)}
    assert answers().agree(told, [np.zeros(1)]) is agree
    assert not answers().agree(told, []), "the library finds nothing"
