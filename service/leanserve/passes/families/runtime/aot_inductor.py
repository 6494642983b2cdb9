"""Compile the model once, when it is built, into a package of machine code (AOTInductor, Ansel et al. 2024).

The same fused loops as `torch_compile`, for any number of rows, but nothing is compiled where it serves: a package is
opened in milliseconds, and the machine needs no compiler. What it costs: a minute of building, a package for one
instruction set and one version of torch, and code for any number of rows is a little slower than code for a fixed one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from leanserve.contracts import BuildContext, Model, TorchModel
from leanserve.hardware import Hardware
from leanserve.passes.base import Applied, Need, Pass, Stage, Tag
from leanserve.passes.toolkit.timing import inference, seconds_per_call
from leanserve.runtime.formats.aot_inductor import PackagedModel
from leanserve.runtime.formats.expected import torch_model

if TYPE_CHECKING:
    from leanserve.runtime.formats.packaged_module import PackagedModule

ROWS = 8
"""Rows in the measured batch."""


class AotInductor(Pass):
    """Compile ahead of time, for any number of rows; whole graphs only."""

    kind: Literal["aot_inductor"] = "aot_inductor"
    freezing: Literal["auto", "on", "off"] = "on"
    """Whether weights become constants, laid out for the products; `auto` compiles both ways and keeps the faster."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module"})
    forbids: ClassVar[frozenset[Tag]] = frozenset({"runtime"})
    produces: ClassVar[frozenset[Tag]] = frozenset({"runtime"})
    removes: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "exportable"})
    stage: ClassVar[Stage] = Stage.LAYOUT_AND_RUNTIME
    isa_bound: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"building_compiler"})

    def unsupported_reason(self, hardware: Hardware) -> str | None:
        if hardware.on_gpu:
            return "aot_inductor compiles for the CPU, and variants run on a GPU; take torch_compile, or device: cpu"
        return None

    def apply(self, model: Model, context: BuildContext) -> Applied:
        from leanserve.passes.toolkit.compilation import require_compiler
        from leanserve.runtime.formats.torch import FORMAT

        model = torch_model(model, self.kind)
        require_compiler(self.kind)
        choices = ("on", "off") if self.freezing == "auto" else (self.freezing,)
        started = time.perf_counter()
        made = {choice: self._packaged(model, choice, context) for choice in choices}
        seconds = self._timed(model, made, context)
        best = min(choices, key=lambda choice: seconds[choice])
        facts = {"speedup": seconds["eager"] / seconds[best]}
        facts["compile_s"] = (time.perf_counter() - started) / len(choices)
        if len(choices) == 2:
            facts["freezing_speedup"] = seconds["off"] / seconds["on"]
        return Applied(PackagedModel(_path(context, best), model.spec, FORMAT.size(model)), {"freezing": best}, facts)

    def _packaged(self, model: TorchModel, freezing: str, context: BuildContext) -> PackagedModule:
        from leanserve.passes.toolkit.packaging import package

        with inference(context.threads):
            return package(model, _path(context, freezing), freezing=freezing == "on")

    def _timed(self, model: TorchModel, made: Mapping[str, PackagedModule], context: BuildContext) -> dict[str, float]:
        """Seconds per call of every package, and of the module as it is (`eager`)."""
        import torch

        rows = model.spec.most_rows(ROWS)
        example = tuple(torch.from_numpy(array) for array in model.spec.example(rows, seed=context.seed))
        with inference(context.threads):
            return seconds_per_call(
                {name: partial(way, *example) for name, way in {**made, "eager": model.module}.items()}
            )


def _path(context: BuildContext, freezing: str) -> Path:
    return context.scratch / f"freezing-{freezing}.pt2"
