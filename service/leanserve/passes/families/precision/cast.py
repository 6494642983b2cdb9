"""Compute in 16-bit floats: half the memory traffic, and instructions that do two or more products at once.

bfloat16 keeps float32's range with 8 bits of precision (Kalamkar et al. 2019), float16 has 11 bits but overflows at
65504. Both pay only where the processor has instructions for them; elsewhere they are emulated, which was seen to be 40
to 500 times slower. Inputs and outputs stay as the spec says. Layers that suffer can be kept in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

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
"""CPU flags, any of which makes a type fast; `bf16` and `asimdhp` are ARM's."""

ROWS = 8
"""Rows in the measured batch."""


class Cast(Pass):
    """Cast weights and activations to bfloat16 or float16, except in the layers to keep."""

    kind: Literal["cast"] = "cast"
    dtype: Literal["bf16", "fp16"] = "bf16"
    keep: tuple[str, ...] = ()
    """Layers that stay float32: globs over module names, or `type:BatchNorm2d`. A container keeps all it holds."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    removes: ClassVar[frozenset[Tag]] = frozenset({"float_weights", "exportable"})
    stage: ClassVar[Stage] = Stage.PRECISION

    def unsupported_reason(self, hardware: Hardware) -> str | None:
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
        with inference(context.threads):
            self._check(module(*example), model.module(*example))
            seconds = seconds_per_call({"before": lambda: model.module(*example), "after": lambda: module(*example)})
        facts = {"speedup": seconds["before"] / seconds["after"], "kept_layers": len(kept)}
        return Applied(replace(model, module=module), {"keep": kept}, facts)

    def rebuild_structure(self, module: nn.Module, decisions: Mapping[str, Json]) -> nn.Module:
        import torch

        narrow = {"bf16": torch.bfloat16, "fp16": torch.float16}[self.dtype]
        module.to(narrow)
        _bridge(module, inside=narrow, outside=torch.float32)
        for name in decisions["keep"]:
            layer = module.get_submodule(name)
            layer.float()
            _bridge(layer, inside=torch.float32, outside=narrow)
        return module

    def _kept(self, module: nn.Module) -> list[str]:
        """The outermost modules that match: what is inside one of them is kept with it."""
        if not self.keep:
            return []
        from leanserve.runtime.formats.tied_tensors import ties_of

        names = Targets(include=self.keep).select(module)
        inside = {part for layer in names.values() for part in layer.modules()}
        for tie in ties_of(module.state_dict()):
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


def _bridge(module: nn.Module, inside: torch.dtype, outside: torch.dtype) -> None:
    """Convert the floats that go into a module to `inside` and those that come out to `outside`.

    Hooks rather than a wrapping module: the names of the weights stay what they are.
    """
    module.register_forward_pre_hook(_Convert(inside).before, with_kwargs=True)
    module.register_forward_hook(_Convert(outside).after)


class _Convert:
    """Forward hooks that convert float tensors, in containers too; integers (token ids, masks) pass untouched."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def before(self, _: nn.Module, args: Any, kwargs: Any) -> Any:
        return self._each((args, kwargs))

    def after(self, _: nn.Module, __: Any, outputs: Any) -> Any:
        return self._each(outputs)

    def _each(self, values: Any) -> Any:
        from torch.utils._pytree import tree_map

        return tree_map(self._converted, values)

    def _converted(self, value: Any) -> Any:
        import torch

        return value.to(self.dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
