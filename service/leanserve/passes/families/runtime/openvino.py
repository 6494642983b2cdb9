"""Run the model in OpenVINO, on CPUs with VNNI or BF16 the fastest engine for many models.

The graph is exported once as for onnxruntime, then converted to OpenVINO's own format and compared with the graph it
was made from. Ranges that `quantize_static` chose are kept: OpenVINO computes such layers in 8-bit integers. In
bfloat16 a float model gains as much as many quantized ones and needs no calibration; answers then have 8 bits of
mantissa. What it costs: a second runtime of 60 MB (the extra `openvino`), and models quantized while running
(`quantize_dynamic`) are refused, because OpenVINO would compute them in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final, Literal

from leanserve.contracts import BuildContext, Json, Model
from leanserve.hardware import Hardware
from leanserve.passes.base import EXPORTED, Applied, Pass, Stage, Tag

if TYPE_CHECKING:
    from leanserve.runtime.formats.openvino import OpenVinoModel

Precision = Literal["f32", "bf16", "f16"]
COMPUTES: Final[Mapping[Precision, frozenset[str]]] = {
    "f32": frozenset(),
    "bf16": frozenset({"avx512_bf16", "amx_bf16", "bf16"}),
    "f16": frozenset({"avx512_fp16", "amx_fp16", "asimdhp"}),
}
"""Instruction sets of which a CPU needs one to compute in a precision."""


class OpenVino(Pass):
    """Convert to OpenVINO's format, and choose in which precision floats are computed."""

    kind: Literal["openvino"] = "openvino"
    precision: Precision = "f32"
    """Of float layers. Integer layers of `quantize_static` stay integer in any case."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"exportable"})
    forbids: ClassVar[frozenset[Tag]] = frozenset({"runtime", "dynamic_ranges"})
    produces: ClassVar[frozenset[Tag]] = frozenset({"runtime"})
    removes: ClassVar[frozenset[Tag]] = EXPORTED | {"exportable", "onnx_graph"}
    stage: ClassVar[Stage] = Stage.LAYOUT_AND_RUNTIME
    libraries: ClassVar[tuple[str, ...]] = ("torch", "onnx", "onnxscript", "onnxruntime", "openvino")

    def unsupported_reason(self, hardware: Hardware) -> str | None:
        if find_spec("openvino") is None:
            return "OpenVINO is not installed: pip install 'leanserve[openvino]'"
        flags = COMPUTES[self.precision]
        if flags and not flags.intersection(hardware.isa):
            return (
                f"precision: {self.precision} needs a CPU with one of {', '.join(sorted(flags))}, which {hardware.cpu} "
                "has not: it would be emulated or ignored; take f32"
            )
        return None

    def apply(self, model: Model, context: BuildContext) -> Applied:
        from leanserve.passes.toolkit.lowering import as_onnx
        from leanserve.passes.toolkit.openvino_graph import convert

        graph = as_onnx(model, context.scratch / "model.onnx")
        return Applied(self._with_options(convert(graph, context.scratch, context.threads)))

    def on_load(self, model: Model, decisions: Mapping[str, Json], folder: Path) -> Model:  # noqa: ARG002
        """Hand the options to the backend."""
        from leanserve.passes.toolkit.openvino_graph import openvino_model

        return self._with_options(openvino_model(model, self.kind))

    def _with_options(self, model: OpenVinoModel) -> OpenVinoModel:
        return replace(model, settings=self.model_dump(mode="json", exclude={"kind"}))
