"""Run the model in onnxruntime: one fused graph instead of a Python call per operator.

The graph is exported once and compared with the module (see `toolkit.lowering`); onnxruntime fuses operators, lays out
convolutions for the CPU's vector width and needs neither torch nor Python between operators. Answers change by float
rounding only. What it costs: a second library, and models whose control flow depends on data cannot be exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import PositiveInt

from leanserve.contracts import BuildContext, Json, Model, OnnxModel
from leanserve.hardware import Hardware
from leanserve.passes.base import EXPORTED, Applied, Need, Pass, Stage, Tag
from leanserve.runtime.formats.expected import onnx_model


class OnnxRuntime(Pass):
    """Export to ONNX unless an earlier pass did, and choose the session's options."""

    kind: Literal["onnxruntime"] = "onnxruntime"
    optimisation: Literal["disable", "basic", "extended", "all"] = "all"
    """Graph optimisation at load: `basic` folds and removes, `extended` fuses, `all` also changes the memory layout."""
    threads: PositiveInt | Literal["auto"] = "auto"
    """Threads within an operator; `auto`: all that the device has."""
    spinning: Literal["auto", "off", "on"] = "auto"
    """How threads wait for the next operator of a batch: asleep (`off`), busily (`on`), or busily but not for long.

    Busily is sooner on idle cores, and later where other processes keep cores busy."""
    provider: Literal["auto", "cpu", "cuda", "tensorrt"] = "auto"
    """What runs the operators; `auto`: the CPU or CUDA, as the service's `device` says.

    `tensorrt` makes an engine of the graph, which takes minutes and is kept beside it. The last two need the extra
    `gpu`; where they are not active, the service refuses to start."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"exportable"})
    forbids: ClassVar[frozenset[Tag]] = frozenset({"runtime"})
    produces: ClassVar[frozenset[Tag]] = frozenset({"onnx_graph", "runtime"})
    removes: ClassVar[frozenset[Tag]] = EXPORTED
    stage: ClassVar[Stage] = Stage.LAYOUT_AND_RUNTIME
    libraries: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnxscript", "onnxruntime")

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"gpu"}) if self._wants_gpu else frozenset()

    @property
    def _wants_gpu(self) -> bool:
        return self.provider in {"cuda", "tensorrt"}

    def unsupported_reason(self, hardware: Hardware) -> str | None:
        if self._wants_gpu and not hardware.on_gpu:
            return f"provider: {self.provider} needs the service on a GPU, and it is on the CPU; set device: cuda"
        return None

    def apply(self, model: Model, context: BuildContext) -> Applied:
        from leanserve.passes.toolkit.lowering import as_onnx

        return Applied(self._with_options(as_onnx(model, context.scratch / "model.onnx")))

    def on_load(self, model: Model, decisions: Mapping[str, Json], folder: Path) -> Model:  # noqa: ARG002
        """Hand the options to the backend."""
        return self._with_options(onnx_model(model, self.kind))

    def _with_options(self, model: OnnxModel) -> OnnxModel:
        return replace(model, session=self.model_dump(mode="json", exclude={"kind"}))
