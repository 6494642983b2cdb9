from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from leanserve.contracts import OnnxModel, TorchModel
from leanserve.passes.composition import find_violation
from leanserve.passes.families.quantize.quantize_static import QuantizeStatic
from leanserve.passes.families.runtime.fold_bn import FoldBn
from leanserve.passes.families.runtime.onnxruntime import OnnxRuntime
from leanserve.passes.families.runtime.torch_compile import TorchCompile
from tiny_base import context_of, tiny_base

BASE = tiny_base()


def test_a_torch_model_is_exported_and_gets_the_options(tmp_path: Path) -> None:
    pass_ = OnnxRuntime(optimisation="basic", threads=2, spinning="on")
    applied = pass_.apply(TorchModel(BASE.torch_module(), BASE.spec), context_of(BASE, tmp_path))
    assert isinstance(applied.model, OnnxModel)
    assert applied.model.path.parent == tmp_path
    assert applied.model.session == {"optimisation": "basic", "threads": 2, "spinning": "on", "provider": "auto"}
    stored = OnnxModel(applied.model.path, BASE.spec)
    assert pass_.on_load(stored, applied.decisions, tmp_path) == applied.model, (
        "loading from the store gives the same model"
    )


def test_a_graph_is_kept_and_gets_the_options(tmp_path: Path) -> None:
    given = OnnxModel(tmp_path / "int8.onnx", BASE.spec)
    applied = OnnxRuntime().apply(given, context_of(BASE, tmp_path))
    assert isinstance(applied.model, OnnxModel)
    assert applied.model.path == given.path
    assert applied.model.session == {"optimisation": "all", "threads": "auto", "spinning": "auto", "provider": "auto"}
    assert given.session == {}


def test_where_it_may_stand() -> None:
    assert find_violation([FoldBn(), QuantizeStatic(), OnnxRuntime()]) is None
    assert find_violation([OnnxRuntime(), FoldBn()]) is not None
    assert find_violation([OnnxRuntime(), OnnxRuntime()]) is not None
    assert find_violation([TorchCompile(), OnnxRuntime()]) is not None
    assert find_violation([QuantizeStatic(), QuantizeStatic()]) is not None


@pytest.mark.parametrize("options", [{"threads": 0}, {"threads": "many"}, {"optimisation": "most"}, {"spin": "on"}])
def test_impossible_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        OnnxRuntime.model_validate(options)
