"""Run layers with two zeros in every four weights on tensor cores that skip them (Mishra et al. 2021).

The zeros are made before, by `prune_oneshot` with `pattern: "2:4"`, and training may follow that. Here the layers are
computed in bfloat16, and compressed where they are loaded on a GPU. Everywhere else such weights are as slow as others.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, Literal

from leanserve.contracts import BuildContext, Json, Model
from leanserve.errors import PassFailed
from leanserve.hardware import Hardware
from leanserve.passes.base import Applied, Pass, Stage, Tag
from leanserve.passes.toolkit.targets import Targets
from leanserve.runtime.formats.expected import torch_model

if TYPE_CHECKING:
    from torch import nn


class Sparse24(Pass):
    """Multiply by the targeted 2:4 sparse linear layers without their zeros, and compute in bfloat16."""

    kind: Literal["sparse_2_4"] = "sparse_2_4"
    targets: Targets = Targets()
    """Linear layers; those that are not 2:4 sparse, or too small, stay dense."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    removes: ClassVar[frozenset[Tag]] = frozenset({"float_weights", "exportable"})
    stage: ClassVar[Stage] = Stage.PRECISION

    def unsupported_reason(self, hardware: Hardware) -> str | None:
        if hardware.on_gpu:
            return None
        return (
            "sparse_2_4 needs an NVIDIA GPU of compute capability 8.0 or more (A100, RTX 30, L4, H100), and there is "
            "none; CPUs have no kernel that skips zeros: drop the pass"
        )

    def apply(self, model: Model, context: BuildContext) -> Applied:
        from torch import nn

        from leanserve.passes.toolkit.gpu_gain import gain, require_capability
        from leanserve.passes.toolkit.tensor_core_layers import is_half_sparse

        require_capability(self.kind, (8, 0), context.device)
        model = torch_model(model, self.kind)
        layers = [name for name, item in self.targets.select(model.module, nn.Linear).items() if is_half_sparse(item)]
        if not layers:
            raise PassFailed(
                "sparse_2_4.targets: no linear layer is 2:4 sparse with 32 n outputs and 64 n inputs; put "
                'prune_oneshot with pattern: "2:4" before it'
            )
        module = self.rebuild_structure(copy.deepcopy(model.module), {"layers": layers})
        facts = {"layers": len(layers), "speedup": gain(model, module, context)}
        return Applied(replace(model, module=module), {"layers": layers}, facts)

    def rebuild_structure(self, module: nn.Module, decisions: Mapping[str, Json]) -> nn.Module:
        from leanserve.passes.toolkit.tensor_core_layers import HalfSparseLinear, put_on_tensor_cores

        return put_on_tensor_cores(module, decisions["layers"], HalfSparseLinear)
