from __future__ import annotations

import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest
import torch._inductor.config
from pydantic import ValidationError
from torch import nn
from torch._dynamo.utils import counters

from leanserve.contracts import ModelSpec, OnnxModel, TensorSpec, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.families.precision.cast import Cast
from leanserve.passes.families.runtime.torch_compile import TorchCompile
from leanserve.passes.toolkit.compilation import RecompiledError
from leanserve.runtime.backends.pytorch import TorchBackend
from tiny_base import context_of, lively, tiny_base

SPEC = ModelSpec((TensorSpec("values", "float32", (6,)),), (TensorSpec("logits", "float32", (2,)),))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(values)))  # type: ignore[no-any-return]


NOWHERE = Path()
"""It brings no files."""


def model() -> TorchModel:
    return TorchModel(lively(Mlp(), seed=1), SPEC)


def equipped(pass_: TorchCompile, freezing: str = "off") -> tuple[TorchBackend, TorchBackend]:
    """Backends of the compiled and of the eager model."""
    compiled = pass_.on_load(model(), {"freezing": freezing}, NOWHERE)
    assert isinstance(compiled, TorchModel)
    return TorchBackend(compiled, 1), TorchBackend(model(), 1)


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.soak
def test_freezing_is_measured_both_ways_and_decided(tmp_path: Path) -> None:
    given = model()
    applied = TorchCompile(buckets=(4,)).apply(given, context_of(tiny_base(), tmp_path))
    assert applied.model is given, "compilation belongs to loading; a build pass would store it"
    faster = "on" if applied.facts["freezing_speedup"] > 1 else "off"
    assert applied.decisions == {"freezing": faster}
    assert applied.facts["speedup"] > 0
    assert applied.facts["compile_s"] > 0


def test_where_rows_share_no_batch_only_single_rows_are_compiled(tmp_path: Path) -> None:
    alone = TorchModel(model().module, replace(SPEC, rows="one"))
    compiled = TorchCompile(buckets=(1, 8)).on_load(alone, {"freezing": "off"}, NOWHERE)
    assert isinstance(compiled, TorchModel)
    assert TorchBackend(compiled, 1).row_buckets == (1,)
    with pytest.raises(PassFailed, match="buckets have no 1"):
        TorchCompile(buckets=(8,)).apply(alone, context_of(tiny_base(), tmp_path))


def test_a_fixed_choice_is_not_measured_against_the_other(tmp_path: Path) -> None:
    applied = TorchCompile(buckets=(4,), freezing="on").apply(model(), context_of(tiny_base(), tmp_path))
    assert applied.decisions == {"freezing": "on"}
    assert "freezing_speedup" not in applied.facts


@pytest.mark.parametrize("freezing", ["on", "off"])
def test_any_batch_answers_as_eager_does_with_one_graph_per_bucket(freezing: str) -> None:
    compiled, eager = equipped(TorchCompile(buckets=(4, 1)), freezing)
    before, told = graphs(), []
    for rows in (1, 2, 4, 11):
        batch = SPEC.example(rows)
        result = compiled.run(batch)
        assert result.outputs[0] == pytest.approx(eager.run(batch).outputs[0], abs=1e-5)
        told.append(dict(result.facts))
    assert graphs() - before == 2
    assert told == [{"compiled_graphs": 1}, {"compiled_graphs": 1}, {}, {}], "each is told with the batch that made it"
    assert not eager.run(batch).facts
    assert (compiled.row_buckets, eager.row_buckets) == ((1, 4), ())


def test_without_buckets_one_graph_serves_any_number_of_rows() -> None:
    compiled, eager = equipped(TorchCompile(buckets=()))
    before = graphs()
    for rows in (1, 2, 5, 17):
        batch = SPEC.example(rows)
        assert compiled.run(batch).outputs[0] == pytest.approx(eager.run(batch).outputs[0], abs=1e-5)
    assert graphs() - before == 2, "one for a single row, one for more"
    assert compiled.row_buckets == ()


def test_more_graphs_than_torch_allows_by_default_are_still_compiled() -> None:
    before = graphs()
    for _ in range(2):
        compiled, _ = equipped(TorchCompile(buckets=(1, 2, 3, 4, 5)))
        for rows in (1, 2, 3, 4, 5):
            compiled.run(SPEC.example(rows))
    assert graphs() - before == 10, "torch stops compiling one method after 8, and runs it eager"


@pytest.mark.parametrize("freezing", ["on", "off"])
def test_conversions_at_the_door_of_a_cast_model_are_compiled_with_it(tmp_path: Path, freezing: str) -> None:
    narrow = Cast(keep=("second",)).apply(model(), context_of(tiny_base(), tmp_path)).model
    compiled = TorchCompile(buckets=(2,)).on_load(narrow, {"freezing": freezing}, NOWHERE)
    assert isinstance(narrow, TorchModel)
    assert isinstance(compiled, TorchModel)
    before, batch = graphs(), SPEC.example(2)
    assert TorchBackend(compiled, 1).run(batch).outputs[0] == pytest.approx(
        TorchBackend(narrow, 1).run(batch).outputs[0], abs=0.02
    )
    assert graphs() - before == 1


def test_what_would_recompile_is_an_error_and_never_eager() -> None:
    compiled, _ = equipped(TorchCompile(buckets=(2,)))
    batch = SPEC.example(2)
    compiled.run(batch)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(RecompiledError, match=r"inputs of shape \(2, 6\); was it compiled on this thread"):
            compiled.run(batch)
    finally:
        torch.set_num_threads(threads)
    compiled.run(batch)


class Breaks(Mlp):
    def forward(self, values: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return super().forward(values)


def test_models_that_do_not_compile_whole_are_refused(tmp_path: Path) -> None:
    context = context_of(tiny_base(), tmp_path)
    with pytest.raises(PassFailed, match=r"torch_compile needs the model as one graph, and it breaks: .+"):
        TorchCompile(buckets=(2,)).apply(TorchModel(Breaks().eval(), SPEC), context)
    tokens = ModelSpec((TensorSpec("ids", "int64", (None,)),), SPEC.outputs)
    with pytest.raises(PassFailed, match=r"but ids also vary in length .* set buckets: \[\]"):
        TorchCompile().apply(TorchModel(Mlp(), tokens), context)
    with pytest.raises(PassFailed, match="'reduce-overhead' records CUDA graphs and does nothing on a CPU"):
        TorchCompile(mode="reduce-overhead").apply(model(), context)
    with pytest.raises(PassFailed, match="drop the pass"):
        TorchCompile().apply(OnnxModel(tmp_path / "model.onnx", SPEC), context)
    with pytest.raises(ValidationError, match="buckets"):
        TorchCompile.model_validate({"buckets": [0]})


def test_a_missing_compiler_or_header_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_of(tiny_base(), tmp_path)
    missing = torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",)})
    with missing, pytest.raises(PassFailed, match=r"install g\+\+"):
        TorchCompile().apply(model(), context)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(PassFailed, match=r"Python\.h; install Python's headers"):
        TorchCompile().apply(model(), context)
