"""The quick slice of the zoo: what needs no download is brought, built, served and compared with the original run."""

from __future__ import annotations

from pathlib import Path

import pytest

from zoo.catalogue import MODELS, QUICK
from zoo.trial import Trial


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("name", QUICK)
def test_a_model_is_brought_by_init_alone(tmp_path: Path, name: str) -> None:
    model = next(model for model in MODELS if model.name == name)
    outcome = Trial().of(model, tmp_path)
    assert outcome.accepted, outcome.said
    assert outcome.built, outcome.said
    assert outcome.right, outcome
    assert len(outcome.serving) >= 2
