"""Masks are a value of the model: kept by passes, stored with its artifact, and by then no guess from zeros."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from leanserve.artifacts.load import load_model
from leanserve.artifacts.manifest import Recipe
from leanserve.artifacts.store import ArtifactStore, checksums
from leanserve.contracts import TorchModel
from leanserve.hardware import this_hardware
from leanserve.passes.base import Pass
from leanserve.passes.families.distill.distill import Distill
from leanserve.passes.families.precision.cast import Cast
from leanserve.passes.families.prune.prune_channels import PruneChannels
from leanserve.passes.families.runtime.channels_last import ChannelsLast
from leanserve.passes.families.runtime.fold_bn import FoldBn
from leanserve.passes.toolkit.masks import masks_of
from leanserve.runtime.formats.torch import FORMAT
from structural_nets import Residual, image_base
from tiny_base import IMAGES, TinyBase, TinyNet, context_of, lively, tiny_base

pytestmark = pytest.mark.usefixtures("one_thread")

DISTILL = Distill(epochs=1, batch=16, precision="float32")


def sparse() -> TorchModel:
    """A third of `stem` and all of `conv` (in a residual block) are masked; one weight that is kept is zero."""
    module = lively(TinyNet(), seed=7)
    masks = {"stem.weight": torch.arange(72).reshape(8, 1, 3, 3) % 3 > 0, "conv.weight": torch.zeros(8, 8, 3, 3) > 0}
    with torch.no_grad():
        for name, mask in masks.items():
            module.get_parameter(name).mul_(mask)
        module.get_parameter("stem.weight")[0, 0, 0, 1] = 0
    return TorchModel(module, IMAGES, masks)


def recipe(key: str, parent: str | None, pass_: Pass | None, decisions: Any, folder: Path | None) -> Recipe:
    return Recipe(
        key=key,
        parents=() if parent is None else (parent,),
        base="tiny",
        kind=pass_.kind if pass_ else None,
        options=pass_.model_dump(mode="json") if pass_ else {},
        decisions=dict(decisions),
        facts={},
        simulated=False,
        format="torch",
        spec=IMAGES,
        files=checksums(folder) if folder else {},
        parameters=1,
        macs=1,
        seconds=0.0,
        versions={},
        hardware=this_hardware(),
    )


def reloaded(model: TorchModel, base: TinyBase, pass_: Pass, decisions: Any, tmp_path: Path) -> TorchModel:
    """The model as the artifact of this pass on the base, stored and loaded again."""
    store = ArtifactStore(tmp_path / "cache")
    for key, parent, step, stored in (("a" * 64, None, None, base.model()), ("b" * 64, "a" * 64, pass_, model)):
        with store.workspace(key) as folder:
            FORMAT.save(stored, folder)
            store.publish(folder, recipe(key, parent, step, decisions if step else {}, folder))
    found = load_model(store, base, "b" * 64)
    assert isinstance(found, TorchModel)
    return found


def same(ours: Any, theirs: Any) -> bool:
    return set(ours) == set(theirs) and all(torch.equal(mask, theirs[name]) for name, mask in ours.items())


def test_masks_come_back_with_the_artifact_as_they_were(tmp_path: Path) -> None:
    model = sparse()
    found = reloaded(model, tiny_base(), DISTILL, {}, tmp_path)
    assert same(found.masks, model.masks)
    assert bool(found.masks["stem.weight"][0, 0, 0, 1]), "zero, and yet no part of the pattern"
    assert all(torch.equal(value, model.module.state_dict()[name]) for name, value in found.module.state_dict().items())
    stored = (tmp_path / "cache" / "artifacts" / ("b" * 64) / "model.safetensors").stat().st_size
    FORMAT.save(replace(model, masks={}), tmp_path)
    bare = (tmp_path / "model.safetensors").stat().st_size
    assert stored - bare < 576 / 8 + 72 / 8 + 300, "a bit per weight, and two names in the header"


def test_training_keeps_the_masks_of_a_reloaded_artifact_and_its_artifact_carries_them_on(tmp_path: Path) -> None:
    base = tiny_base()
    model = reloaded(sparse(), base, DISTILL, {}, tmp_path)
    applied = DISTILL.apply(model, context_of(base, tmp_path / "scratch"))
    made = applied.model
    assert isinstance(made, TorchModel)
    assert same(made.masks, model.masks)
    weights = made.module.state_dict()
    assert torch.equal(weights["stem.weight"] != 0, model.masks["stem.weight"])
    assert weights["conv.weight"].count_nonzero() == 0, "zeros alone would be taken for an initialisation"
    assert same(reloaded(made, base, DISTILL, applied.decisions, tmp_path / "again").masks, model.masks)


def test_zeros_of_a_base_become_masks_once_it_is_trained(tmp_path: Path) -> None:
    base = tiny_base()
    with torch.no_grad():
        base.teacher.get_parameter("conv.weight")[0] = 0
    made = DISTILL.apply(base.model(), context_of(base, tmp_path)).model
    assert isinstance(made, TorchModel)
    assert set(made.masks) == {"conv.weight"}
    assert not bool(made.masks["conv.weight"][0].any())
    assert bool(made.masks["conv.weight"][1:].all())


@pytest.mark.parametrize("pass_", [FoldBn(), Cast(), ChannelsLast()], ids=lambda pass_: pass_.kind)
def test_passes_that_leave_names_and_shapes_keep_the_masks(pass_: Pass, tmp_path: Path) -> None:
    model = sparse()
    made = pass_.apply(model, context_of(tiny_base(), tmp_path)).model
    assert isinstance(made, TorchModel)
    assert same(masks_of(made), model.masks)


def test_a_structural_pass_drops_the_masks_of_what_it_reshapes_and_their_zeros_tell(tmp_path: Path) -> None:
    base = image_base(Residual())
    module = base.torch_module()
    masks = {
        name: torch.from_numpy(np.random.default_rng(0).random(tuple(module.get_parameter(name).shape)) > 0.5)
        for name in ("conv1.weight", "head.weight")
    }
    with torch.no_grad():
        for name, mask in masks.items():
            module.get_parameter(name).mul_(mask)
    pass_ = PruneChannels(ratio=0.3, round_to=8)
    result = pass_.apply(TorchModel(module, base.spec, masks), context_of(base, tmp_path))
    made = result.model
    assert isinstance(made, TorchModel)
    found = masks_of(made)
    for name, mask in masks.items():
        weight = made.module.get_parameter(name)
        assert weight.shape != mask.shape
        assert torch.equal(found[name], weight != 0)
    loaded = reloaded(made, base, pass_, result.decisions, tmp_path)
    assert loaded.masks == {}
    assert same(masks_of(loaded), found)


def test_a_model_without_sparsity_has_no_masks_and_stores_none(tmp_path: Path) -> None:
    model = TorchModel(lively(nn.Linear(3, 2), seed=1), IMAGES)
    assert masks_of(model) == {}
    FORMAT.save(model, tmp_path)
    assert b"mask:" not in (tmp_path / "model.safetensors").read_bytes()
