"""Folds low-rank adapters into the weights that they change: W + scale B A (Hu et al., "LoRA", 2022).

Reads what PEFT writes: a file of tensors `base_model.model.<layer>.lora_A.weight`, and `adapter_config.json`. The
model answers as with its adapter and costs what it did without.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from leanserve.contracts import BuildContext, Model
from leanserve.errors import PassFailed
from leanserve.passes.base import Applied, Pass, Stage, Tag

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

PREFIX = "base_model.model."
FOLLOWS = ".lora_A.weight"


class MergeLora(Pass):
    """Add an adapter of PEFT to the base's weights."""

    kind: Literal["merge_lora"] = "merge_lora"
    adapter: Path
    """`adapter_model.safetensors`."""
    settings: Path
    """`adapter_config.json`, which tells how much the adapter counts."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    stage: ClassVar[Stage] = Stage.ARCHITECTURE

    def apply(self, model: Model, context: BuildContext) -> Applied:
        import torch

        from leanserve.passes.toolkit.structure import copy_of
        from leanserve.runtime.formats.tied_tensors import read_tensors

        made = copy_of(model, self.kind)
        settings = json.loads(self.settings.read_text(encoding="utf-8"))
        _check(settings, self.settings)
        tensors = read_tensors(self.adapter)[0]
        layers = _layers(tensors, self.adapter)
        weights = {id(weight): weight for weight in made.module.parameters()}
        for path in layers:
            context.progress(layers.index(path), len(layers), "folding adapters")
            down, up = tensors[PREFIX + path + FOLLOWS], tensors[f"{PREFIX}{path}.lora_B.weight"]
            layer = _layer(made.module, path)
            change = _change(down, up) * _scale(settings, path, len(down))
            with torch.no_grad():
                weight = weights[id(layer.weight)]
                if weight.shape != change.shape:
                    raise PassFailed(
                        f"adapter: '{path}' changes a weight of {list(change.shape)}, and the model's is "
                        f"{list(weight.shape)}; take the adapter of this base"
                    )
                weight.add_(change.to(weight.dtype))
        return Applied(made, {"layers": layers}, {"layers": len(layers)})


def _check(settings: Mapping[str, Any], path: Path) -> None:
    """Refuse what is more than low-rank matrices."""
    strange = {"use_dora": False, "fan_in_fan_out": False, "bias": "none", "modules_to_save": None}
    for name, usual in strange.items():
        if settings.get(name) not in (usual, None):
            raise PassFailed(
                f"settings: {name} is {settings[name]!r} in {path.name}, and only plain low-rank matrices are folded; "
                "merge the adapter with PEFT (merge_and_unload) and bring the result as base"
            )


def _layers(tensors: Mapping[str, Tensor], path: Path) -> list[str]:
    found = sorted(name.removeprefix(PREFIX).removesuffix(FOLLOWS) for name in tensors if name.endswith(FOLLOWS))
    known = {f"{PREFIX}{layer}.lora_{side}.weight" for layer in found for side in "AB"}
    if strange := sorted(tensors.keys() ^ known):
        raise PassFailed(f"adapter: '{strange[0]}' in {path.name} is no pair of low-rank matrices of a layer")
    if not found:
        raise PassFailed(f"adapter: {path.name} holds no tensor named '{PREFIX}<layer>{FOLLOWS}'")
    return found


def _layer(module: nn.Module, path: str) -> Any:
    """The layer of that name, or the only one whose name ends so: the base may hold the adapted model inside."""
    from torch import nn

    names = [name for name, child in module.named_modules() if isinstance(child, nn.Linear | nn.Conv2d)]
    near = [name for name in names if name == path] or [name for name in names if name.endswith("." + path)]
    if len(near) != 1:
        told = f"{len(near)} layers" if near else "no linear layer or convolution"
        raise PassFailed(f"adapter: the model has {told} called '{path}'; it has {', '.join(names[:8])}")
    return module.get_submodule(near[0])


def _scale(settings: Mapping[str, Any], path: str, rank: int) -> float:
    patterns = settings.get("alpha_pattern") or {}
    own = [value for name, value in patterns.items() if path == name or path.endswith("." + name)]
    alpha = float(own[0] if own else settings["lora_alpha"])
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _change(down: Tensor, up: Tensor) -> Tensor:
    """B A of a linear layer, [outputs, inputs], or of a convolution, [outputs, inputs, kh, kw]."""
    product = up.double().flatten(1) @ down.double().flatten(1)
    return product.reshape(len(up), *down.shape[1:])
