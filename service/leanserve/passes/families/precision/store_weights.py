"""Store weights in 16 or 8 bits of floats, and compute with them in float32: smaller on disk and on the wire.

What is loaded is a model in float32 whose weights were rounded, as fast and as large in memory as before. bfloat16 has
8 bits of precision, float16 has 11 in a smaller range; 8 bits (e4m3, Micikevicius et al. 2022) have 4, with a scale per
tensor. Vectors (biases, norms) stay as they are. No calibration, no hardware to ask for. Where time and memory count
rather than files, take `cast` or `quantize_static`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from leanserve.contracts import BuildContext, Model, OnnxModel, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.base import Applied, Pass, Stage, Tag
from leanserve.runtime.formats.expected import onnx_model, torch_model

if TYPE_CHECKING:
    from torch import nn

BYTES: Final[Mapping[str, int]] = {"bf16": 2, "fp16": 2, "fp8": 1}


class StoreWeights(Pass):
    """Round weights to a narrow type and store them in it; they are float32 again once they are loaded."""

    kind: Literal["store_weights"] = "store_weights"
    dtype: Literal["bf16", "fp16", "fp8"] = "bf16"
    keep: tuple[str, ...] = ()
    """Weights that are stored in float32: globs over their names (`head.*`)."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"exportable", "float_weights"})
    forbids: ClassVar[frozenset[Tag]] = frozenset({"runtime"})
    removes: ClassVar[frozenset[Tag]] = frozenset({"float_weights"})
    stage: ClassVar[Stage] = Stage.PRECISION
    libraries: ClassVar[tuple[str, ...]] = ("torch", "onnx")

    def apply(self, model: Model, context: BuildContext) -> Applied:
        if model.format == TorchModel.format:
            return self._of_module(torch_model(model, self.kind))
        return self._of_graph(onnx_model(model, self.kind), context)

    def _of_module(self, model: TorchModel) -> Applied:
        import torch

        from leanserve.runtime.formats.torch_storage import rounded_to

        module = copy.deepcopy(model.module)
        weights = {name: item for name, item in _parameters(module).items() if item.ndim > 1}
        kept = self._kept(list(weights))
        chosen = {name: item for name, item in weights.items() if name not in kept}
        with torch.no_grad():
            for name, weight in chosen.items():
                values = rounded_to(weight, self.dtype)
                self._check(name, overflows=bool((values.isinf() & weight.isfinite()).any()))
                weight.copy_(values)
        whole = sum(item.nbytes for item in [*module.parameters(), *module.buffers()])
        spared = sum(item.nbytes - item.numel() * BYTES[self.dtype] for item in set(chosen.values()))
        made = replace(model, module=module, storage=dict.fromkeys(chosen, self.dtype))
        return Applied(made, {"kept": kept}, {"weights": len(chosen), "size_ratio": 1 - spared / whole})

    def _of_graph(self, model: OnnxModel, context: BuildContext) -> Applied:
        import onnx

        from leanserve.passes.toolkit.narrow_graph import narrow_graph, overflowing, weights_of

        graph = onnx.load(model.path)
        kept = self._kept(weights_of(graph))
        for name in overflowing(graph, self.dtype, kept):
            self._check(name, overflows=True)
        stored = narrow_graph(graph, self.dtype, kept)
        path = context.scratch / "stored.onnx"
        onnx.save(graph, path)
        facts = {"weights": len(stored), "size_ratio": path.stat().st_size / model.path.stat().st_size}
        return Applied(OnnxModel(path, model.spec), {"kept": kept}, facts)

    def _kept(self, names: Sequence[str]) -> list[str]:
        """The weights that stay float32.

        Raises:
            PassFailed: a glob matches none, or there is none left to store.
        """
        for pattern in self.keep:
            if not any(fnmatchcase(name, pattern) for name in names):
                near = get_close_matches(pattern, names, n=5, cutoff=0.4) or names[:8] or ["none"]
                raise PassFailed(f"store_weights.keep: {pattern!r} matches no weight; near names: {', '.join(near)}")
        kept = [name for name in names if any(fnmatchcase(name, pattern) for pattern in self.keep)]
        if len(kept) == len(names):
            raise PassFailed("store_weights has no matrix, kernel or table to store; shorten keep, or drop the pass")
        return kept

    def _check(self, name: str, *, overflows: bool) -> None:
        if overflows:
            raise PassFailed(f"store_weights.dtype {self.dtype} overflows in '{name}'; take bf16, or name it in keep")


def _parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Float parameters by all of their names: one that stands in two places is rounded twice, to the same."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: item for name, item in named if item.dtype.is_floating_point}
