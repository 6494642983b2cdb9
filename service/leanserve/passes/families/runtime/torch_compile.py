"""Compile the model with TorchInductor (Ansel et al. 2024): fused loops in C++ instead of a kernel call per operation.

Freezing makes the weights constants, which allows prepacking and constant folding; it speeds up many models and slows
down some, so by default both are compiled and timed here and the faster one is kept. What it costs: a C++ compiler on
the machine that serves, and 10 to 35 seconds per row count at the first start (torch's cache shortens later ones).
Nothing is stored but the decision: the model is compiled when it is loaded, at its first batch in each bucket.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, PositiveInt

from leanserve.contracts import BuildContext, Json, Model, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.base import Applied, Need, Pass, Stage, Tag
from leanserve.passes.toolkit.timing import inference, seconds_per_call
from leanserve.runtime.formats.expected import torch_model

if TYPE_CHECKING:
    from leanserve.passes.toolkit.compilation import CompiledModule, Tensors

Freezing = Literal["on", "off"]

ROWS = 8
"""Rows of the measured batch where no buckets are set."""


class TorchCompile(Pass):
    """Compile for fixed row counts (`buckets`), or for any (`buckets: []`); whole graphs only."""

    kind: Literal["torch_compile"] = "torch_compile"
    mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """As in `torch.compile`. `reduce-overhead` records CUDA graphs and is refused on a CPU."""
    freezing: Literal["auto", "on", "off"] = "auto"
    """Whether weights become constants; `auto` compiles both ways and keeps the faster."""
    buckets: tuple[PositiveInt, ...] = Field(default=(1, 8, 32), max_length=16)
    """Row counts to compile for; batches are padded to the next one. Empty: one graph for any number of rows."""

    requires: ClassVar[frozenset[Tag]] = frozenset({"eager_module"})
    forbids: ClassVar[frozenset[Tag]] = frozenset({"runtime"})
    produces: ClassVar[frozenset[Tag]] = frozenset({"runtime"})
    removes: ClassVar[frozenset[Tag]] = frozenset({"eager_module", "exportable"})
    stage: ClassVar[Stage] = Stage.LOADING
    isa_bound: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"compiler"})

    def apply(self, model: Model, context: BuildContext) -> Applied:
        """Decide about freezing. The model comes back as it was: `on_load` compiles, where it will run."""
        import torch

        model = torch_model(model, self.kind)
        self._check(model)
        buckets = self._row_counts(model)
        rows = model.spec.most_rows(buckets[len(buckets) // 2] if buckets else ROWS)
        example = tuple(torch.from_numpy(array) for array in model.spec.example(rows, seed=context.seed))
        choices: tuple[Freezing, ...] = ("on", "off") if self.freezing == "auto" else (self.freezing,)
        compiled: dict[str, CompiledModule] = {}
        with inference(context.threads):
            started = time.perf_counter()
            for done, choice in enumerate(choices):
                context.progress(done, len(choices), f"compiling with freezing {choice}")
                compiled[choice] = self._compiled(model, choice)
                _run_once(compiled[choice], example)
            compile_s = (time.perf_counter() - started) / len(choices)
            ways = {**compiled, "eager": model.module}
            seconds = seconds_per_call({name: partial(way, *example) for name, way in ways.items()})
        context.progress(len(choices), len(choices))
        best = min(choices, key=lambda choice: seconds[choice])
        facts = {"speedup": seconds["eager"] / seconds[best], "compile_s": compile_s}
        if len(choices) == 2:
            facts["freezing_speedup"] = seconds["off"] / seconds["on"]
        return Applied(model, {"freezing": best}, facts)

    def on_load(self, model: Model, decisions: Mapping[str, Json], folder: Path) -> Model:  # noqa: ARG002
        """Wrap the module so that its first batch in each bucket compiles it."""
        model = torch_model(model, self.kind)
        return replace(model, module=self._compiled(model, decisions["freezing"]).eval())

    def _compiled(self, model: TorchModel, freezing: Freezing) -> CompiledModule:
        from torch._inductor import list_mode_options

        from leanserve.passes.toolkit.compilation import CompiledModule

        options = {**list_mode_options(self.mode), "freezing": freezing == "on"}
        return CompiledModule(model.module, model.spec, self._row_counts(model), options)

    def _row_counts(self, model: TorchModel) -> tuple[int, ...]:
        """The buckets that batches of this model can have."""
        return tuple(rows for rows in self.buckets if rows == model.spec.most_rows(rows))

    def _check(self, model: TorchModel) -> None:
        from leanserve.passes.toolkit.compilation import require_compiler

        if self.mode == "reduce-overhead" and all(weight.device.type == "cpu" for weight in model.module.parameters()):
            raise PassFailed(
                "torch_compile.mode 'reduce-overhead' records CUDA graphs and does nothing on a CPU; use 'default'"
            )
        if self.buckets and not self._row_counts(model):
            raise PassFailed("torch_compile.buckets have no 1, and base.rows: one gives every row a batch to itself")
        free = [item.name for item in model.spec.inputs if None in item.shape]
        if self.buckets and free:
            raise PassFailed(
                f"torch_compile.buckets fix the rows, but {', '.join(free)} also vary in length and every length would "
                "be compiled anew; set buckets: []"
            )
        require_compiler(self.kind)


def _run_once(compiled: CompiledModule, example: Tensors) -> None:
    from torch._dynamo.exc import Unsupported

    try:
        compiled(*example)
    except Unsupported as error:
        reason = str(error).strip().splitlines()[0]
        raise PassFailed(f"torch_compile needs the model as one graph, and it breaks: {reason}") from error
