"""`fp8` and `sparse_2_4`: their arithmetic on a CPU, where torch has it too; their speed needs a GPU (`gpu`)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from leanserve.contracts import Model, Share, TorchModel
from leanserve.errors import PassFailed
from leanserve.hardware import Gpu, Hardware
from leanserve.passes.base import Applied, Pass
from leanserve.passes.families.precision.fp8 import Fp8
from leanserve.passes.families.precision.sparse_2_4 import Sparse24
from leanserve.passes.families.prune.prune_oneshot import PruneOneshot
from leanserve.passes.toolkit.tensor_core_layers import Fp8Linear, HalfSparseLinear
from leanserve.runtime.backends.pytorch import TorchBackend
from leanserve.runtime.formats import format_named, open_backend
from structural_nets import row_base
from tiny_base import context_of

BASE = row_base()
GPU = Hardware("x", 1, (), (Gpu("H200", 1),), ("cuda:0",))
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the passes run where they do not pay."""
    monkeypatch.setattr("leanserve.passes.toolkit.gpu_gain.require_capability", lambda *_: None)
    monkeypatch.setattr("leanserve.passes.toolkit.gpu_gain.gain", lambda *_: 1.0)


def made(pass_: Pass, model: Model, folder: Path) -> Applied:
    applied = pass_.apply(model, context_of(BASE, folder))
    assert isinstance(applied.model, TorchModel)
    return applied


def half_sparse(folder: Path) -> Model:
    return PruneOneshot(pattern="2:4").apply(BASE.model(), context_of(BASE, folder)).model


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("scale", ["row", "tensor"])
def test_8_bit_floats_answer_near_and_come_back_from_the_store(tmp_path: Path, scale: str) -> None:
    pass_ = Fp8.model_validate({"scale": scale})
    applied = made(pass_, BASE.model(), tmp_path)
    assert applied.decisions["layers"] == ["second"], "24 inputs and 10 outputs are no multiples of 16"
    module = applied.model.module  # type: ignore[attr-defined]
    assert isinstance(module.second, Fp8Linear)
    assert module.second.weight.dtype == torch.float8_e4m3fn
    format_ = format_named("torch")
    format_.save(applied.model, tmp_path)
    again = format_.load(
        tmp_path, BASE.spec, lambda: pass_.rebuild_structure(row_base().torch_module(), applied.decisions)
    )
    ours, right = TorchBackend(again, 1), TorchBackend(BASE.model(), 1)
    found, wanted = ours.run(BASE.inputs).outputs[0], right.run(BASE.inputs).outputs[0]
    np.testing.assert_array_equal(found, TorchBackend(applied.model, 1).run(BASE.inputs).outputs[0])  # type: ignore[arg-type]
    assert 0 < np.linalg.norm(found - wanted) < 0.05 * np.linalg.norm(wanted)
    if scale == "row":
        strangers = np.concatenate([BASE.inputs[0][:4], 1e4 * BASE.inputs[0][4:8]])
        np.testing.assert_allclose(ours.run((strangers,)).outputs[0][:4], found[:4], atol=0.05)


@pytest.mark.usefixtures("on_cpu")
def test_half_sparse_layers_are_found_and_answer_as_in_float32(tmp_path: Path) -> None:
    sparse = half_sparse(tmp_path)
    applied = made(Sparse24(), sparse, tmp_path)
    assert applied.decisions["layers"] == ["second"]
    assert isinstance(applied.model.module.second, HalfSparseLinear)  # type: ignore[attr-defined]
    found, wanted = (TorchBackend(item, 1).run(BASE.inputs).outputs[0] for item in (applied.model, sparse))  # type: ignore[arg-type]
    assert 0 < np.linalg.norm(found - wanted) < 0.02 * np.linalg.norm(wanted)
    with pytest.raises(PassFailed, match=r"no linear layer is 2:4 sparse .* put prune_oneshot"):
        Sparse24().apply(BASE.model(), context_of(BASE, tmp_path))


@pytest.mark.usefixtures("on_cpu")
def test_what_tensor_cores_do_not_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PassFailed, match="no linear layer has sides that are multiples of 16"):
        Fp8.model_validate({"targets": {"include": ["head"]}}).apply(BASE.model(), context_of(BASE, tmp_path))


def test_without_such_a_gpu_both_say_which_and_what_else_to_take(tmp_path: Path) -> None:
    none = Hardware("x", 1, ("avx512_bf16",))
    assert "compute capability 8.9 or more (L4" in str(Fp8().unsupported_reason(none))
    assert "compute capability 8.0 or more (A100" in str(Sparse24().unsupported_reason(none))
    assert Fp8().unsupported_reason(GPU) is None
    assert Sparse24().unsupported_reason(GPU) is None
    if not torch.cuda.is_available():
        with pytest.raises(PassFailed, match="needs torch built for CUDA"):
            Fp8().apply(BASE.model(), context_of(BASE, tmp_path))


class Wide(nn.Module):
    """Large enough that products are what takes the time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 4096), nn.Linear(4096, 4096)

    def forward(self, row: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.second(torch.relu(self.first(row)))[:, :10]
        return out


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("kind", ["fp8", "sparse_2_4"])
def test_on_a_gpu_they_answer_near(tmp_path: Path, kind: str) -> None:
    base = replace(BASE, teacher=Wide().eval())
    context = replace(context_of(base, tmp_path), device="cuda:0")
    given: Model = base.model()
    if kind == "sparse_2_4":
        given = PruneOneshot.model_validate({"pattern": "2:4", "method": "wanda"}).apply(given, context).model
    applied = (Fp8() if kind == "fp8" else Sparse24()).apply(given, context)
    assert applied.facts["speedup"] > 0
    found, wanted = (
        open_backend(item, Share(1, ("cuda:0",))).run(BASE.inputs).outputs[0] for item in (applied.model, given)
    )
    assert 0 < np.linalg.norm(found - wanted) < 0.05 * np.linalg.norm(wanted)
