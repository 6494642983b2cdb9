"""The pass `numpy_layers` of the test that adds a format: it lowers a chain of linear layers to the format `npz`.

The test copies this file to where the recipe puts a pass. What is between the layers is told in a file that the pass
brings into its artifact, in a folder of its own, and reads again when the artifact is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, cast

from leanserve.contracts import BuildContext, Json, Model
from leanserve.passes.base import Applied, Pass, Stage, Tag
from leanserve.runtime.formats.expected import torch_model

if TYPE_CHECKING:
    from leanserve.runtime.formats.npz import NpzModel

NOTE = "between/activation.txt"


class NumpyLayers(Pass):
    """Run linear layers in numpy."""

    kind: Literal["numpy_layers"] = "numpy_layers"

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "float_weights"})
    forbids: ClassVar[frozenset[Tag]] = frozenset({"runtime"})
    produces: ClassVar[frozenset[Tag]] = frozenset({"runtime"})
    removes: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "exportable"})
    stage: ClassVar[Stage] = Stage.LAYOUT_AND_RUNTIME

    def apply(self, model: Model, context: BuildContext) -> Applied:
        from leanserve.runtime.formats.npz import NpzModel
        from torch import nn

        module = torch_model(model, self.kind).module
        linear = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
        layers = tuple((layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in linear)
        note = context.scratch / "activation.txt"
        note.write_text("relu")
        return Applied(NpzModel(layers, model.spec, bends=True), files={NOTE: note})

    def on_load(self, model: Model, decisions: Mapping[str, Json], folder: Path) -> Model:
        lowered = cast("NpzModel", model)
        return cast("Model", replace(lowered, bends=(folder / NOTE).read_text() == "relu"))
