"""Multiply linear layers in 8-bit floats (e4m3), twice as fast as 16 bits on the tensor cores that have them.

Weights are rounded once, inputs in every batch, with a scale per output and per row (Micikevicius et al. 2022); all
else is computed in bfloat16. No calibration. It pays on large products only: scaling costs small ones more than it
wins.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal

from leanserve.contracts import BuildContext, Json, Model
from leanserve.errors import PassFailed
from leanserve.hardware import Hardware
from leanserve.passes.base import Applied, Pass, Stage, Tag
from leanserve.passes.toolkit.targets import Targets
from leanserve.runtime.formats.expected import torch_model

if TYPE_CHECKING:
    from torch import nn


class Fp8(Pass):
    """Compute the targeted linear layers in 8-bit floats and the rest in bfloat16, on a GPU that can."""

    kind: Literal["fp8"] = "fp8"
    scale: Literal["row", "tensor"] = "row"
    """One scale of inputs per row (per token), or one for the whole batch, which rows then share."""
    targets: Targets = Targets()
    """Linear layers; those with a side that is no multiple of 16 are left in bfloat16."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    removes: ClassVar[frozenset[Tag]] = frozenset({"float_weights", "exportable"})
    stage: ClassVar[Stage] = Stage.PRECISION

    def unsupported_reason(self, hardware: Hardware) -> str | None:
        if hardware.on_gpu:
            return None
        return (
            "fp8 needs an NVIDIA GPU of compute capability 8.9 or more (L4, RTX 40, H100, B200), and there is none; "
            "take store_weights with dtype: fp8 for its size, or quantize_static for speed"
        )

    def apply(self, model: Model, context: BuildContext) -> Applied:
        from torch import nn

        from leanserve.passes.toolkit.gpu_gain import gain, require_capability
        from leanserve.passes.toolkit.tensor_core_layers import Fp8Linear, fits_fp8

        require_capability(self.kind, (8, 9), context.device)
        model = torch_model(model, self.kind)
        layers = {name: item for name, item in self.targets.select(model.module, nn.Linear).items() if fits_fp8(item)}
        if not layers:
            raise PassFailed("fp8.targets: no linear layer has sides that are multiples of 16; take cast")
        module = self.rebuild_structure(copy.deepcopy(model.module), {"layers": list(layers)})
        for name, layer in layers.items():  # of the weights in float32: rounded once, not twice
            made = Fp8Linear(layer, self.scale)
            module.get_buffer(f"{name}.weight").copy_(made.weight)
            module.get_buffer(f"{name}.scale").copy_(made.scale)
        facts = {"layers": len(layers), "speedup": gain(model, module, context)}
        return Applied(replace(model, module=module), {"layers": list(layers)}, facts)

    def rebuild_structure(self, module: nn.Module, decisions: Mapping[str, Json]) -> nn.Module:
        from leanserve.passes.toolkit.tensor_core_layers import Fp8Linear, put_on_tensor_cores

        return put_on_tensor_cores(module, decisions["layers"], partial(Fp8Linear, scale=self.scale))
