"""Variants made of variants: keys, the order of building, and what a joined variant is when it is loaded again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from builds import constructed, measure_nothing
from leanserve.artifacts.load import OneByOne, load_model
from leanserve.artifacts.store import ArtifactStore
from leanserve.build.cache_key import steps_of
from leanserve.config.schema import ServiceConfig
from leanserve.contracts import TorchModel
from leanserve.errors import PassFailed
from leanserve.hardware import this_hardware
from structural_nets import Residual, image_base
from tiny_base import TinyBase

PRUNE = {"kind": "prune_channels", "ratio": 0.34}
FOLD = {"kind": "fold_bn"}


def distill(rate: float) -> dict[str, Any]:
    return {"kind": "distill", "epochs": 1, "precision": "float32", "learning_rate": rate}


def config_of(*variants: Mapping[str, Any]) -> ServiceConfig:
    return ServiceConfig.model_validate({"base": "tiny", "variants": list(variants)})


SOUP = (
    {"name": "folded", "parent": "soup", "passes": [FOLD]},
    {"name": "soup", "parents": ["slow", "fast"], "passes": [{"kind": "merge"}]},
    {"name": "slow", "parent": "pruned", "passes": [distill(1e-3)]},
    {"name": "fast", "parent": "pruned", "passes": [distill(2e-3)]},
    {"name": "pruned", "passes": [PRUNE]},
)


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    measure_nothing(monkeypatch)


@pytest.fixture
def base() -> TinyBase:
    return image_base(Residual())


def keys(config: ServiceConfig, base: TinyBase, place: int) -> list[str]:
    return [step.key for step in steps_of(config, base, config.variants[place], this_hardware())]


def test_going_on_from_a_parent_is_the_same_as_writing_all_passes_out(base: TinyBase) -> None:
    whole = config_of({"name": "a", "passes": [PRUNE, distill(1e-3), FOLD]})
    short = config_of({"name": "b", "parent": "a", "passes": [FOLD]}, {"name": "a", "passes": [PRUNE, distill(1e-3)]})
    assert keys(whole, base, 0) == keys(short, base, 0)
    steps = steps_of(short, base, short.variants[0], this_hardware())
    assert [(step.variant, step.position) for step in steps[1:]] == [("a", 1), ("a", 2), ("b", 1)]


def test_parents_and_their_order_decide_the_key(base: TinyBase) -> None:
    def key(*parents: str) -> str:
        soup = {"name": "soup", "parents": parents, "passes": [{"kind": "merge"}]}
        return keys(config_of(soup, {"name": "even"}, *SOUP[2:]), base, 0)[-1]

    found = [key("slow", "fast"), key("fast", "slow"), key("slow", "fast", "pruned"), key("slow", "pruned")]
    assert len(set(found)) == 4
    assert key("slow", "fast") == found[0]


@pytest.mark.usefixtures("unmeasured", "one_thread")
def test_a_soup_is_built_after_its_parents_and_loaded_again_alone(tmp_path: Path, base: TinyBase) -> None:
    config, store = config_of(*SOUP), ArtifactStore(tmp_path)
    lines, said = constructed(store, config, base)
    assert said.count("prune_channels:") == said.count("merge:") == 1
    assert "pruned: prune_channels:" in said, "the variant that has the pass is named"
    folded, soup, slow, fast, _ = lines
    assert (len(folded), len(soup), folded[:-1]) == (6, 5, soup)
    assert [recipe.key for recipe in store.ancestry(soup[-1])] == soup
    recipe = store.recipe(soup[-1])
    assert recipe is not None
    assert recipe.parents == (slow[-1], fast[-1])
    assert set(soup[:-1]) == {*slow, *fast}

    models = {name: load_model(store, base, line[-1]) for name, line in {"a": slow, "b": fast, "soup": soup}.items()}
    tensors = {name: model.module.state_dict() for name, model in models.items() if isinstance(model, TorchModel)}
    mean = (tensors["a"]["conv1.weight"] + tensors["b"]["conv1.weight"]) / 2
    torch.testing.assert_close(tensors["soup"]["conv1.weight"], mean)
    assert mean.shape[0] < 48, "the structure is that of the pruned parents"
    last = load_model(store, base, folded[-1])
    assert isinstance(last, TorchModel)
    rows = torch.tensor(base.inputs[0][:4])
    whole = models["soup"]
    assert isinstance(whole, TorchModel)
    with torch.no_grad():
        np.testing.assert_allclose(last.module(rows), whole.module(rows), rtol=0, atol=1e-4)

    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("artifacts/*/manifest.json")}
    constructed(store, config, base)
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.glob("artifacts/*/manifest.json")}


@pytest.mark.usefixtures("unmeasured", "one_thread")
def test_a_soup_that_fails_names_itself_and_its_pass(tmp_path: Path, base: TinyBase) -> None:
    config = config_of(
        {"name": "soup", "parents": ["whole", "pruned"], "passes": [{"kind": "merge"}], "gate": {"on_fail": "abort"}},
        {"name": "whole"},
        SOUP[-1],
    )
    with pytest.raises(PassFailed, match=r"variant 'soup', pass 1 \(merge\): the weight .* in parent 1 and"):
        constructed(ArtifactStore(tmp_path), config, base)


def test_many_generations_are_looked_at_once_each(base: TinyBase) -> None:
    """Each variant is made of the two before it: their number of lines to the base is a Fibonacci number."""
    variants: list[dict[str, Any]] = [{"name": "v0"}, {"name": "v1", "passes": [distill(1e-3)]}]
    variants += [
        {"name": f"v{n}", "parents": [f"v{n - 1}", f"v{n - 2}"], "passes": [{"kind": "merge"}]} for n in range(2, 60)
    ]
    assert len(keys(config_of(*variants), base, 59)) == 60


def test_models_that_are_made_when_asked_for_are_a_sequence() -> None:
    made: list[int] = []

    def make(number: int) -> int:
        made.append(number)
        if number == 3:
            raise IndexError("of its own")
        return number

    numbers: Sequence[int] = OneByOne([lambda number=number: make(number) for number in range(3)])  # type: ignore[misc]
    assert (len(numbers), made) == (3, [])
    assert (numbers[-1], list(numbers), list(numbers[1:])) == (2, [0, 1, 2], [1, 2])
    with pytest.raises(IndexError, match="of its own"):
        list(OneByOne([lambda: make(3)]))
