"""The contract of a compression pass: typed options and one `apply`.

A pass is a frozen pydantic model, so its options are checked when the config is read. Its class variables say where it
may stand in a variant; `compose` in `leanserve.config.schema` checks them before any work is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from leanserve.contracts import BuildContext, Json, Model
from leanserve.hardware import Hardware

if TYPE_CHECKING:
    from torch import nn

Tag = Literal[
    "eager_module",  # a plain torch module whose structure may be changed
    "float_weights",  # weights in float32, not yet quantized or cast
    "exportable",  # can be exported to ONNX, or is ONNX already
    "onnx_graph",  # is an ONNX file
    "runtime",  # an execution runtime has been chosen
    "dynamic_ranges",  # activations are quantized by ranges that are found while running
]
Need = Literal[
    "calibration",  # rows of the calibration split
    "train",  # rows of the train split
    "labels",  # which have labels
    "batches",  # of many rows: a base may keep each of them apart
    "gpu",  # that computes: an NVIDIA driver with a device
    "compiler",  # of C++, where the model is loaded
    "building_compiler",  # of C++, where the artifact is made
]


class Stage(IntEnum):
    """What a pass does to a model, in the order in which passes may follow one another."""

    ARCHITECTURE = 1
    STRUCTURAL_REMOVAL = 2
    FACTORISATION = 3
    SPARSIFICATION = 4
    TRAINING = 5
    """It may also come before others of the stages 1-4, of which it recovers the model."""
    NUMERIC_PREPARATION = 6
    PRECISION = 7
    LAYOUT_AND_RUNTIME = 8
    LOADING = 9
    """Acts whenever the model is loaded: its artifact has no files, those of the pass before are used."""

    @property
    def words(self) -> str:
        """The stage as messages name it."""
        return self.name.lower().replace("_", " ")


BASE_TAGS: frozenset[Tag] = frozenset({"eager_module", "float_weights", "exportable"})
"""The state tags of an uncompressed torch base."""

GRAPH_TAGS: frozenset[Tag] = frozenset({"float_weights", "exportable", "onnx_graph"})
"""Of a base that is an ONNX file."""

PROGRAM_TAGS: frozenset[Tag] = frozenset({"float_weights", "exportable"})
"""Of a base that is an exported program: it runs and exports, but has no layers that a pass could replace."""

EXPORTED: frozenset[Tag] = frozenset({"eager_module"})
"""What a pass that lowers to ONNX removes."""


@dataclass(frozen=True, slots=True)
class Applied:
    """What `apply` gives back.

    `decisions` is the JSON from which `rebuild_structure` and `on_load` repeat the pass without data; `facts` are
    numbers for the report (for example `macs_ratio`). `files` go into the artifact besides what its format saves there:
    a place in it (`tokenizer/vocab.txt`) -> the file or folder to copy, such as one in the context's scratch space.
    """

    model: Model
    decisions: Mapping[str, Json] = field(default_factory=dict)
    facts: Mapping[str, float] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)
    simulated: bool | None = None
    """As `Pass.simulated`, where that is seen only when it is done."""


class Pass(BaseModel):
    """One transformation of a model. Subclasses add `kind: Literal[...]`, their options and `apply`.

    Of an option that is a `Path` the content of the file decides the artifact, wherever it lies.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str

    requires: ClassVar[frozenset[Tag]] = frozenset()
    forbids: ClassVar[frozenset[Tag]] = frozenset()
    produces: ClassVar[frozenset[Tag]] = frozenset()
    removes: ClassVar[frozenset[Tag]] = frozenset()
    stage: ClassVar[Stage]
    libraries: ClassVar[tuple[str, ...]] = ("torch",)
    """Distributions whose versions decide the result; they enter the cache key."""
    isa_bound: ClassVar[bool] = False
    """Whether the artifact or its measured decisions depend on the CPU's instruction set or the GPU."""
    simulated: ClassVar[bool] = False
    """Whether the gain is only simulated (zeros without a sparse kernel, fake quantization)."""

    joins: ClassVar[bool] = False
    """Whether it makes one model of several, as the first pass of a variant with `parents`; it then has `join`, and
    `rebuild_joined` where it changes the structure."""

    @property
    def evaluates(self) -> bool:
        """Whether it asks `BuildContext.evaluate`, so that the score decides what it makes."""
        return False

    @property
    def times(self) -> bool:
        """Whether it measures time to decide, so that the artifact is one for this kind of CPU."""
        return False

    @property
    def needs(self) -> frozenset[Need]:
        """What this pass cannot do without, given its options; checked before any work (`leanserve.build.needs`)."""
        return frozenset()

    @property
    def processes_needed(self) -> int:
        """How many processes run it together, each with all of the model (`leanserve.build.peers`)."""
        return 1

    def unsupported_reason(self, hardware: Hardware) -> str | None:
        """Why this pass cannot pay on a machine with these instruction-set flags; `None` if it can."""
        return None

    def apply(self, model: Model, context: BuildContext) -> Applied:
        """Transform the model. The given model is left as it was.

        Raises:
            PassFailed: the options do not fit this model; the text names the option.
        """
        raise NotImplementedError

    def join(self, models: Sequence[Model], context: BuildContext) -> Applied:
        """Make one model of those of all parents, in the order in which the config names them.

        A model is loaded whenever it is asked for, so that there is memory for many; the given ones are left as they
        were. Raises as `apply`.
        """
        [model] = models
        return self.apply(model, context)

    def rebuild_joined(self, modules: Sequence[nn.Module], decisions: Mapping[str, Json]) -> nn.Module:
        """Repeat the structural change on the parents' untrained modules, each rebuilt when it is asked for."""
        return self.rebuild_structure(modules[0], decisions)

    def rebuild_structure(self, module: nn.Module, decisions: Mapping[str, Json]) -> nn.Module:
        """Repeat the structural change on an untrained module, without data; weights are loaded afterwards."""
        return module

    def on_load(self, model: Model, decisions: Mapping[str, Json], folder: Path) -> Model:
        """Repeat what the format does not store (compilation, session options) on a loaded model.

        `folder` is the artifact's: what `apply` gave as `files` is there.
        """
        return model
