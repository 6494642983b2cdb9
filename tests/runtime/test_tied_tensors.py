"""Tensors with several names: stored once, loaded as one, and passes keep them right or say why they cannot."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from safetensors import safe_open
from torch import Tensor, nn

from leanserve.comparison import row_cosines
from leanserve.contracts import Arrays, Model, Share, TorchModel
from leanserve.errors import PassFailed
from leanserve.hardware import this_hardware
from leanserve.passes import AnyPass
from leanserve.passes.base import Applied, Pass
from leanserve.passes.toolkit.checkpoint import (
    as_part,
    module_state,
    part_of,
    read_training_checkpoint,
    write_checkpoint,
)
from leanserve.runtime.formats import open_backend
from leanserve.runtime.formats.tied_tensors import load_tensors, read_tensors, ties_of, write_tensors
from leanserve.runtime.formats.torch import FORMAT, WEIGHTS
from tied_nets import TiedLanguage, tied_base
from tiny_base import TinyBase, context_of, lively

pytestmark = pytest.mark.usefixtures("one_thread")

PASS: TypeAdapter[Pass] = TypeAdapter(AnyPass)
TIES = [["tokens.weight", "head.weight"], ["mix.weight", "again.weight"], ["mix.bias", "again.bias"]]


def applied(base: TinyBase, scratch: Path, **options: Any) -> Applied:
    pass_ = PASS.validate_python(options)
    if reason := pass_.unsupported_reason(this_hardware()):
        pytest.skip(reason)
    return pass_.apply(base.model(), context_of(base, scratch))


def answers(model: Model, base: TinyBase) -> Arrays:
    return open_backend(model, Share(1)).run(base.inputs).outputs


def module_of(model: Model) -> nn.Module:
    assert isinstance(model, TorchModel)
    return model.module


def test_a_tied_model_is_stored_once_and_is_tied_again_when_loaded(tmp_path: Path) -> None:
    base = tied_base()
    FORMAT.save(base.model(), tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert not {"head.weight", "again.weight", "again.bias"} & set(file.keys())
    fresh = lively(TiedLanguage(), seed=2)
    load_tensors(fresh, read_tensors(tmp_path / WEIGHTS)[0])
    assert isinstance(fresh, TiedLanguage)
    assert fresh.head.weight is fresh.tokens.weight
    assert fresh.again is fresh.mix
    assert ties_of(fresh.state_dict()) == TIES
    np.testing.assert_array_equal(answers(TorchModel(fresh, base.spec), base)[0], answers(base.model(), base)[0])


class Views(nn.Module):
    """Halves of one memory that overlap, its transpose, a buffer that is expanded, and a tensor without elements."""

    def __init__(self, fill: float = 1.0) -> None:
        super().__init__()
        memory = torch.arange(12.0) * fill
        self.low, self.high = nn.Parameter(memory[:8]), nn.Parameter(memory[4:])
        self.turned = nn.Parameter(memory.view(3, 4).t())
        self.register_buffer("wide", torch.tensor(fill).expand(5))
        self.register_buffer("empty", torch.empty(0))
        self.register_buffer("gaps", memory[::3])
        self.register_buffer("nothing", torch.tensor([torch.nan, fill]))


def test_views_of_one_memory_keep_their_values(tmp_path: Path) -> None:
    module = Views()
    write_tensors(module.state_dict(), tmp_path / "views")
    stored, _ = read_tensors(tmp_path / "views")
    fresh = Views(fill=7.0)
    load_tensors(fresh, stored)
    for name, tensor in module.state_dict().items():
        assert torch.equal(fresh.state_dict()[name].nan_to_num(), tensor.nan_to_num()), name


def test_what_a_pass_has_parted_is_parted_when_loaded(tmp_path: Path) -> None:
    """A deep copy parts overlapping parameters; training then changes each."""
    module = Views()
    module.low, module.high = (nn.Parameter(torch.full((8,), value)) for value in (1.0, 2.0))
    module.turned = nn.Parameter(torch.full((4, 3), 3.0))
    write_tensors(module.state_dict(), tmp_path / "views")
    fresh = Views()
    load_tensors(fresh, read_tensors(tmp_path / "views")[0])
    assert [set(tensor.flatten().tolist()) for tensor in (fresh.low, fresh.high, fresh.turned)] == [{1.0}, {2.0}, {3.0}]
    assert isinstance(fresh.low, nn.Parameter)


def test_what_a_pass_has_tied_is_tied_when_loaded(tmp_path: Path) -> None:
    one, other = nn.Linear(3, 3), nn.Linear(3, 3)
    other.weight = one.weight
    write_tensors(nn.ModuleList([one, other]).state_dict(), tmp_path / "two")
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    load_tensors(nn.ModuleList([first, second]), read_tensors(tmp_path / "two")[0])
    assert second.weight is first.weight
    assert torch.equal(first.weight, one.weight)


class WithState(nn.Linear):
    """Puts something beside tensors into its state dict."""

    def get_extra_state(self) -> str:
        return "own"

    def set_extra_state(self, state: str) -> None:
        assert state == "own"


def test_state_besides_tensors_comes_with_the_module(tmp_path: Path) -> None:
    module, fresh = WithState(3, 3), WithState(3, 3)
    write_tensors(module.state_dict(), tmp_path / "linear")
    load_tensors(fresh, read_tensors(tmp_path / "linear")[0])
    assert torch.equal(fresh.weight, module.weight)


def test_training_goes_on_from_a_tied_checkpoint_and_not_from_a_damaged_one(tmp_path: Path) -> None:
    module, path = lively(TiedLanguage(), seed=1), tmp_path / "training.safetensors"
    write_checkpoint(path, {"epoch": 3, **as_part(module_state(module), "module")})
    fresh = lively(TiedLanguage(), seed=2)
    found = read_training_checkpoint(path)
    assert found is not None
    assert found["epoch"] == 3
    load_tensors(fresh, part_of(found, "module"))
    assert ties_of(fresh.state_dict()) == TIES
    assert all(torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in module.state_dict().items())
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    assert read_training_checkpoint(path) is None


LOSSLESS: Mapping[str, tuple[Mapping[str, Any], float]] = {
    "distill": ({"epochs": 1, "precision": "float32"}, 0.99),
    "fold_bn": ({}, 0.999999),
    "cast": ({}, 0.9999),
    "quantize_dynamic": ({}, 0.999),
    "quantize_static": ({}, 0.999),
    "onnxruntime": ({}, 0.999999),
}


@pytest.mark.parametrize("kind", LOSSLESS)
def test_passes_answer_like_the_tied_base(kind: str, tmp_path: Path) -> None:
    options, least = LOSSLESS[kind]
    base = tied_base()
    model = applied(base, tmp_path, kind=kind, **options).model
    (given, *_), (wanted, *_) = answers(model, base), answers(base.model(), base)
    assert row_cosines(given.reshape(len(given), -1), wanted.reshape(len(wanted), -1)).mean() > least
    if isinstance(model, TorchModel):
        assert ties_of(model.module.state_dict()) == TIES


def test_a_shared_layer_is_factorised_in_all_of_its_places(tmp_path: Path) -> None:
    base = tied_base()
    assert isinstance(base.teacher, TiedLanguage)
    with torch.no_grad():
        base.teacher.mix.weight.copy_(base.teacher.mix.weight[:, :8] @ base.teacher.mix.weight[:8])
    options = {"kind": "lowrank_linear", "rank": 8, "targets": {"include": ["again"]}}
    done = applied(base, tmp_path, **options)
    assert done.decisions["ranks"] == {"mix": 8}
    module, x = module_of(done.model), torch.randn(5, 64)
    assert isinstance(module, TiedLanguage)
    assert module.again is module.mix
    assert torch.allclose(module.mix(x), base.teacher.mix(x), atol=1e-4)

    write_tensors(module.state_dict(), tmp_path / "stored")
    fresh = PASS.validate_python(options).rebuild_structure(base.torch_module(), done.decisions)
    load_tensors(fresh, read_tensors(tmp_path / "stored")[0])
    np.testing.assert_array_equal(answers(TorchModel(fresh, base.spec), base)[0], answers(done.model, base)[0])


def test_pruning_takes_the_same_channels_wherever_a_tensor_is_used(tmp_path: Path) -> None:
    base = tied_base()
    done = applied(base, tmp_path, kind="prune_channels", ratio=0.3)
    pruned, whole = module_of(done.model), base.teacher
    assert isinstance(pruned, TiedLanguage)
    assert isinstance(whole, TiedLanguage)
    stream = _columns(whole.tokens.weight, pruned.tokens.weight)
    assert len(stream) == 48
    last = _columns(whole.head.weight, pruned.head.weight)
    assert torch.equal(pruned.mix.weight, whole.mix.weight[stream][:, stream])
    assert torch.equal(pruned.last.weight, whole.last.weight[last][:, stream])
    assert pruned.again is pruned.mix

    write_tensors(pruned.state_dict(), tmp_path / "stored")
    fresh = PASS.validate_python({"kind": "prune_channels", "ratio": 0.3}).rebuild_structure(
        base.torch_module(), done.decisions
    )
    load_tensors(fresh, read_tensors(tmp_path / "stored")[0])
    np.testing.assert_array_equal(answers(TorchModel(fresh, base.spec), base)[0], answers(done.model, base)[0])


def _columns(whole: Tensor, part: Tensor) -> list[int]:
    """Which columns of `whole` are those of `part`, in its order."""
    return [next(index for index, column in enumerate(whole.T) if torch.equal(column, kept)) for kept in part.T]


class Twins(nn.Module):
    """Two layers with one tensor, of which the first is followed by a batch norm."""

    def __init__(self, tie: str) -> None:
        super().__init__()
        self.one, self.norm, self.two, self.three, self.last = (
            make(5) for make in (_linear, nn.BatchNorm1d, _linear, _linear, nn.BatchNorm1d)
        )
        setattr(self.two, tie, getattr(self.one, tie))

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.last(self.three(self.two(torch.relu(self.norm(self.one(x))))))
        return answer


def _linear(width: int) -> nn.Linear:
    return nn.Linear(width, width)


@pytest.mark.parametrize("tie", ["weight", "bias"])
def test_a_layer_that_shares_a_tensor_is_not_folded(
    tie: str, tmp_path: Path, rows: Callable[[nn.Module], TinyBase]
) -> None:
    base = rows(Twins(tie))
    done = applied(base, tmp_path, kind="fold_bn")
    assert done.decisions == {"pairs": [["three", "last"]]}
    np.testing.assert_allclose(answers(done.model, base)[0], answers(base.model(), base)[0], rtol=0, atol=1e-4)


@pytest.fixture
def rows() -> Callable[[nn.Module], TinyBase]:
    from leanserve.contracts import ModelSpec, TensorSpec

    spec = ModelSpec((TensorSpec("x", "float32", (5,)),), (TensorSpec("y", "float32", (5,)),))
    return lambda module: TinyBase(lively(module, seed=3), spec.example(9), None, spec)


def test_a_layer_cannot_stay_wide_while_its_twin_is_narrowed(tmp_path: Path) -> None:
    with pytest.raises(PassFailed, match=r"cast\.keep: head\.weight and tokens\.weight are one tensor"):
        applied(tied_base(), tmp_path, kind="cast", keep=["head"])
    base = tied_base()
    done = applied(base, tmp_path, kind="cast", keep=["head", "tokens", "again"])
    assert done.decisions == {"keep": ["tokens", "mix", "head"]}
    (given, *_), (wanted, *_) = answers(done.model, base), answers(base.model(), base)
    assert row_cosines(given.reshape(len(given), -1), wanted.reshape(len(wanted), -1)).mean() > 0.9999
