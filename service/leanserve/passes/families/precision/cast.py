"""Compute in 16-bit floats: half the memory traffic, and instructions that do two or more products at once.

bfloat16 keeps float32's range with 8 bits of precision (Kalamkar et al. 2019), float16 has 11 bits but overflows at
65504. Both pay only where the processor has instructions for them; elsewhere they are emulated, which was seen to be 40
to 500 times slower. Inputs and outputs stay as the spec says. Layers that suffer can be kept in float32.

With `how: autocast` weights stay float32 and torch chooses operation by operation: products are narrow, sums,
normalizations and exponentials are not (Micikevicius et al. 2018). That answers better and is slower, for weights are
converted at every call. `tf32` is a mode of NVIDIA's tensor cores: float32's range, 10 bits, weights untouched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal, Self, TypeAlias

from pydantic import model_validator

from leanserve.comparison import compared
from leanserve.contracts import BuildContext, Json, Model
from leanserve.errors import PassFailed
from leanserve.hardware import Hardware
from leanserve.passes.base import Applied, Pass, Stage, Tag
from leanserve.passes.toolkit.targets import Targets
from leanserve.passes.toolkit.timing import inference, seconds_per_call
from leanserve.runtime.formats.expected import torch_model

if TYPE_CHECKING:
    import torch
    from torch import nn

    Outputs: TypeAlias = torch.Tensor | tuple[torch.Tensor, ...]

INSTRUCTIONS: Mapping[str, frozenset[str]] = {
    "bf16": frozenset({"avx512_bf16", "amx_bf16", "bf16"}),
    "fp16": frozenset({"avx512_fp16", "amx_fp16", "asimdhp"}),
}
"""CPU flags, any of which makes a type fast; `bf16` and `asimdhp` are ARM's. GPUs compute in both."""

ROWS = 8
"""Rows in the measured batch."""


class Cast(Pass):
    """Compute in bfloat16, float16 or TF32, except in the layers to keep."""

    kind: Literal["cast"] = "cast"
    dtype: Literal["bf16", "fp16", "tf32"] = "bf16"
    """`tf32` computes on NVIDIA GPUs from Ampere only."""
    how: Literal["everything", "autocast"] = "everything"
    """Whether weights and activations are cast, or torch chooses for each operation and weights stay float32."""
    keep: tuple[str, ...] = ()
    """Layers that stay float32: globs over module names, or `type:BatchNorm2d`. A container keeps all it holds."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    removes: ClassVar[frozenset[Tag]] = frozenset({"float_weights", "exportable"})
    stage: ClassVar[Stage] = Stage.PRECISION

    @model_validator(mode="after")
    def _tf32_is_a_mode(self) -> Self:
        if self.dtype == "tf32" and self.how == "autocast":
            raise ValueError("dtype: tf32 changes no tensor, so that there is nothing to choose; drop how: autocast")
        return self

    def unsupported_reason(self, hardware: Hardware) -> str | None:
        if hardware.on_gpu:
            return None
        if self.dtype == "tf32":
            return "cast to tf32 is a mode of NVIDIA GPUs from Ampere, and there is no GPU; take bf16, or drop the pass"
        if INSTRUCTIONS[self.dtype].intersection(hardware.isa):
            return None
        wanted = ", ".join(sorted(INSTRUCTIONS[self.dtype]))
        return f"cast to {self.dtype} would be emulated: this CPU has none of {wanted}; drop the pass"

    def apply(self, model: Model, context: BuildContext) -> Applied:
        import torch

        model = torch_model(model, self.kind)
        kept = self._kept(model.module)
        module = self.rebuild_structure(copy.deepcopy(model.module), {"keep": kept})
        rows = model.spec.most_rows(ROWS)
        example = tuple(torch.from_numpy(array) for array in model.spec.example(rows, seed=context.seed))
        before = copy.deepcopy(model.module) if context.device != "cpu" else model.module
        ways = {
            name: partial(_answered, way.to(context.device), [item.to(context.device) for item in example])
            for name, way in {"before": before, "after": module}.items()
        }
        with inference(context.threads):
            self._check(ways["after"](), ways["before"]())
            seconds = seconds_per_call(ways)
        facts = {"speedup": seconds["before"] / seconds["after"], "kept_layers": len(kept)}
        return Applied(replace(model, module=module.cpu()), {"keep": kept}, facts)

    def rebuild_structure(self, module: nn.Module, decisions: Mapping[str, Json]) -> nn.Module:
        import torch

        from leanserve.passes.toolkit.float_modes import autocast, bridge, float32_inside, tf32

        kept = [module.get_submodule(name) for name in decisions["keep"]]
        if self.dtype == "tf32":
            tf32(module, kept)
            return module
        narrow = {"bf16": torch.bfloat16, "fp16": torch.float16}[self.dtype]
        if self.how == "autocast":
            autocast(module, narrow)
            for layer in kept:
                float32_inside(layer)
            return module
        module.to(narrow)
        bridge(module, inside=narrow, outside=torch.float32)
        for layer in kept:
            layer.float()
            bridge(layer, inside=torch.float32, outside=narrow)
        return module

    def _kept(self, module: nn.Module) -> list[str]:
        """The outermost modules that match: what is inside one of them is kept with it."""
        if not self.keep:
            return []
        from leanserve.runtime.formats.tied_tensors import ties_of

        names = Targets(include=self.keep).select(module)
        inside = {part for layer in names.values() for part in layer.modules()}
        for tie in ties_of(module.state_dict()) if self.dtype != "tf32" and self.how == "everything" else ():
            wide = [name for name in tie if module.get_submodule(name.rpartition(".")[0]) in inside]
            if wide and (narrow := [name for name in tie if name not in wide]):
                raise PassFailed(f"cast.keep: {wide[0]} and {narrow[0]} are one tensor; keep both layers, or neither")
        return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]

    def _check(self, outputs: Outputs, before: Outputs) -> None:
        """What is infinite already in float32, such as a masked logit, may stay so."""
        pairs = zip(*(item if isinstance(item, tuple) else (item,) for item in (outputs, before)), strict=True)
        for output, right in pairs:
            if compared(output.float().numpy(), right.numpy()).unlike.any():
                raise PassFailed(
                    f"cast.dtype {self.dtype} overflows in this model; use bf16, or name layers in cast.keep"
                )


def _answered(module: Callable[..., Outputs], inputs: list[torch.Tensor]) -> Outputs:
    """The outputs on the CPU, where they are there once a GPU has computed them."""
    outputs = module(*inputs)
    return tuple(item.cpu() for item in outputs) if isinstance(outputs, tuple) else outputs.cpu()
