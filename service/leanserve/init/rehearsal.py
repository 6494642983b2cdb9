"""Every suggested variant is made once on a few rows, and run, before it is written down.

What a model is made of tells which passes suit it, not whether they can be applied: no layer may have rank to spare, no
operator may be quantizable, an exporter may give up. A config must not fail minutes into its first build.
"""

from __future__ import annotations

import json
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import NamedTuple, cast

from pydantic import TypeAdapter

from leanserve.bases.loaded import LoadedBase, RowsOver
from leanserve.config.schema import ServiceConfig
from leanserve.config.variant_section import VariantConfig
from leanserve.contracts import BuildContext, Data, Json, Model, OnnxModel, Share, Split, TorchModel
from leanserve.evaluation.candidates import CandidateEvaluator
from leanserve.hardware import this_hardware, thread_budget
from leanserve.init.reach import Reach
from leanserve.init.suggestions import Suggestion
from leanserve.passes import AnyPass
from leanserve.passes.base import EXPORTED, Pass

_PASS: TypeAdapter[Pass] = TypeAdapter(AnyPass)
ROWS = 8
OPTIONAL = ({"fold_bn"}, {"channels_last"}, {"smooth"}, {"fold_bn", "channels_last"}, {"fold_bn", "smooth"})
"""Passes that a variant is worth trying without."""
LONGEST_REASON = 240
"""Characters; some exporters explain themselves on pages."""


class LeftOut(NamedTuple):
    """A variant that is not suggested after all, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class FewRows(RowsOver):
    """The first rows of every split."""

    def split(self, split: Split, n: int | None) -> Data:
        return self.rows.split(split, ROWS if n is None else min(n, ROWS))


class Rehearsed(NamedTuple):
    """The variants that can be made of a base and run, and those that cannot."""

    kept: tuple[Suggestion, ...]
    left: tuple[LeftOut, ...]


def refused_variants(base: LoadedBase, config: ServiceConfig) -> tuple[LeftOut, ...]:
    """The variants of a config that cannot be made of the base, or not be run; those that join others are not tried."""
    named = {variant.name: variant for variant in config.variants}

    def line(variant: VariantConfig) -> Iterator[Pass]:
        if variant.parent is not None:
            yield from line(named[variant.parent])
        yield from variant.passes

    tried = []
    for variant in config.variants:
        passes = tuple(step.model_dump(mode="json") for step in line(variant))
        if not variant.parents and not any(_PASS.validate_python(step).joins for step in passes):
            tried.append(Suggestion(variant.name, passes, ""))
    return rehearsed(base, tried, spare=()).left


def rehearsed(base: LoadedBase, suggestions: Iterable[Suggestion], spare: Sequence[Set[str]] = OPTIONAL) -> Rehearsed:
    """Try every variant, then without the passes that may be spared; training is left to the build.

    What libraries warn of is told by the build, too.
    """
    kept: list[Suggestion] = []
    left: list[LeftOut] = []
    with TemporaryDirectory(prefix="leanserve-init-") as folder, _quiet():
        stage = _Stage(replace(base, rows=FewRows(base.rows)), Path(folder))
        for suggestion in suggestions:
            reasons = []
            for attempt in _attempts(suggestion, spare):
                if (reason := stage.failure_of(attempt.passes)) is None:
                    kept.append(attempt._replace(reach=stage.reach(attempt.passes)))
                    break
                reasons.append(reason)
            else:
                left.append(LeftOut(suggestion.name, reasons[-1]))
    return Rehearsed(tuple(kept), tuple(left))


@contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _attempts(suggestion: Suggestion, spare: Sequence[Set[str]]) -> Iterator[Suggestion]:
    """The variant, then without passes that it can do without: of some networks no batch norm follows a layer."""
    yield suggestion
    for spared in spare:
        others = tuple(step for step in suggestion.passes if step["kind"] not in spared)
        if others and len(others) < len(suggestion.passes):
            yield suggestion._replace(passes=others)


class _Stage:
    """Applies passes to a base, those that several variants begin with once; what several lower is exported once."""

    def __init__(self, base: LoadedBase, folder: Path) -> None:
        self._base = base
        self._folder = folder
        self._made: dict[str, Model | Exception] = {}
        """Models by the passes that made them, or why these cannot be applied."""
        self._graphs: dict[str, Model | Exception] = {}
        """The same of models that were lowered to ONNX."""
        self._facts: dict[str, Mapping[str, float]] = {}

    def failure_of(self, passes: tuple[Json, ...]) -> str | None:
        """Why a model cannot be made with these passes, or not be run; `None` if it can."""
        try:
            if passes:
                self.run(self.made(passes))
        except Exception as error:  # whatever a library raises on a model that it has never seen
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return lines[0][:LONGEST_REASON]
        return None

    def made(self, passes: tuple[Json, ...]) -> Model:
        return _once(self._made, _key(passes), lambda: self._applied(passes) if passes else self._base.model())

    def _graph_of(self, passes: tuple[Json, ...]) -> Model:
        from leanserve.passes.toolkit.lowering import as_onnx

        model, path = self.made(passes), Path(mkdtemp(dir=self._folder)) / "model.onnx"
        return _once(self._graphs, _key(passes), lambda: as_onnx(model, path))

    def reach(self, passes: tuple[Json, ...]) -> Reach:
        """How far these passes, which were tried, reach."""
        from leanserve.runtime.formats.torch_size import convolution_share

        kinds = [str(step["kind"]) for step in passes]
        facts = [self._facts.get(_key(passes[:count]), {}) for count in range(1, len(passes) + 1)]
        ratios = [known["macs_ratio"] for known in facts if "macs_ratio" in known]
        folded = [int(known["folded"]) for kind, known in zip(kinds, facts, strict=True) if kind == "fold_bn"]
        return Reach(
            self._in_eight_bits(passes) if any(kind.startswith("quantize") for kind in kinds) else None,
            convolution_share(cast(TorchModel, self._base.model())) if "channels_last" in kinds else None,
            math.prod(ratios) if ratios else None,
            (folded[0], self._norms()) if folded else None,
            next((known["speedup"] for kind, known in zip(kinds, facts, strict=True) if kind == "cast"), None),
        )

    def _in_eight_bits(self, passes: tuple[Json, ...]) -> float | None:
        from leanserve.runtime.formats.onnx_size import quantized_share

        model = self.made(passes)
        return quantized_share(cast(OnnxModel, model).path) if model.format == OnnxModel.format else None

    def _norms(self) -> int:
        """Batch norms of the base."""
        from torch.nn.modules.batchnorm import _BatchNorm

        module = cast(TorchModel, self._base.model()).module
        return sum(isinstance(layer, _BatchNorm) for layer in module.modules())

    def run(self, model: Model) -> None:
        """Open the model as a server does, and answer one row."""
        from leanserve.runtime.formats import open_backend

        backend = open_backend(model, Share(thread_budget()))
        try:
            backend.run(self._base.spec.example(max(1, min(backend.row_buckets, default=1))))
        finally:
            backend.close()

    def _applied(self, passes: tuple[Json, ...]) -> Model:
        model = self.made(passes[:-1])
        step = _PASS.validate_python(passes[-1])
        if "train" in step.needs:
            return model
        if model.format == TorchModel.format and _lowers(step):
            model = self._graph_of(passes[:-1])
        scratch = Path(mkdtemp(dir=self._folder))
        with closing(CandidateEvaluator(self._base, thread_budget())) as evaluate:
            context = BuildContext(self._base, 0, this_hardware(), scratch, _unheard, evaluate)
            applied = step.apply(model, context)
        self._facts[_key(passes)] = applied.facts
        return applied.model


def _lowers(step: Pass) -> bool:
    """Whether a pass exports the module to ONNX, and does nothing else with it."""
    return "exportable" in step.requires and "eager_module" not in step.requires and step.removes >= EXPORTED


def _once(known: dict[str, Model | Exception], key: str, make: Callable[[], Model]) -> Model:
    """What was made under this key, now or before; what could not be made is not tried again."""
    if key not in known:
        try:
            known[key] = make()
        except Exception as error:  # whatever a library raises on a model that it has never seen
            known[key] = error
    found = known[key]
    if isinstance(found, Exception):
        raise found
    return found


def _key(passes: tuple[Json, ...]) -> str:
    return json.dumps(passes, sort_keys=True)


def _unheard(done: float, total: float, note: str = "") -> None:
    """A `contracts.Progress` of which nobody hears."""
