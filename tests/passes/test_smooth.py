from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from leanserve.contracts import Json, ModelSpec, OnnxModel, TensorSpec, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.composition import find_violation
from leanserve.passes.families.quantize.quantize_static import QuantizeStatic
from leanserve.passes.families.quantize.smooth import Smooth
from leanserve.passes.families.runtime.fold_bn import FoldBn
from leanserve.passes.toolkit.lowering import export_onnx, open_session
from tiny_base import TinyBase, context_of, lively
from tiny_encoder import TinyEncoder, tiny_encoder_base

ROW = ModelSpec((TensorSpec("row", "float32", (24,)),), (TensorSpec("values", "float32", (8,)),))
INPUTS = np.random.default_rng(0).standard_normal((40, 24)).astype(np.float32)
INPUTS[:, 3] = 0


class PreNorm(nn.Module):
    """A norm that feeds two layers and nothing else, and a pair of layers with a ReLU between."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24)
        self.left, self.right = nn.Linear(24, 24), nn.Linear(24, 24, bias=False)
        self.up, self.down = nn.Linear(24, 64), nn.Linear(64, 8)

    def forward(self, row: Tensor) -> Tensor:
        x = self.norm(row)
        x = row + self.left(x) * torch.sigmoid(self.right(x))
        values: Tensor = self.down(torch.relu(self.up(x)))
        return values


def outlying(module: nn.Module) -> nn.Module:
    """With two inputs that are 50 times the others, and weights that make up for it."""
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, nn.LayerNorm):
                child.weight[:2] *= 50
    return module


BASE = TinyBase(outlying(lively(PreNorm(), seed=3)), (INPUTS,), None, ROW)


def smoothed(base: TinyBase, folder: Path, **options: object) -> tuple[TorchModel, Mapping[str, Json]]:
    applied = Smooth.model_validate(options).apply(base.model(), context_of(base, folder))
    assert isinstance(applied.model, TorchModel)
    return applied.model, {**applied.decisions, **applied.facts}


def answers(module: nn.Module, base: TinyBase, dtype: torch.dtype = torch.float32) -> Tensor:
    inputs = (torch.from_numpy(array) for array in base.inputs)
    with torch.no_grad():
        outputs: Tensor = copy.deepcopy(module).to(dtype)(
            *(item.to(dtype) if item.is_floating_point() else item for item in inputs)
        )
    return outputs


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("base", [BASE, tiny_encoder_base()], ids=["pre-norm", "encoder"])
def test_the_function_stays_what_it_was(base: TinyBase, tmp_path: Path, alpha: float) -> None:
    """Factors are powers of two: in double precision not a bit changes."""
    model, _ = smoothed(base, tmp_path, alpha=alpha)
    before = base.torch_module()
    assert any(
        not torch.equal(weight, before.state_dict()[name])
        for name, weight in model.module.state_dict().items()
        if name in before.state_dict()
    )
    assert torch.equal(answers(model.module, base, torch.float64), answers(before, base, torch.float64))
    torch.testing.assert_close(answers(model.module, base), answers(before, base), rtol=1e-6, atol=1e-6)


def test_factors_go_into_what_nothing_else_reads_and_are_shared_elsewhere(tmp_path: Path) -> None:
    model, told = smoothed(BASE, tmp_path)
    assert told == {"multiplied": [["up"]], "layers": 4, "folded": 2, "multiplications": 1}
    ratio = model.module.state_dict()["norm.weight"] / BASE.teacher.state_dict()["norm.weight"]
    assert torch.equal(ratio.log2(), ratio.log2().round())
    assert torch.equal(model.module.state_dict()["norm.bias"], BASE.teacher.state_dict()["norm.bias"] * ratio)

    encoder = tiny_encoder_base()
    model, told = smoothed(encoder, tmp_path)
    assert ["query", "key", "value"] in told["multiplied"]
    before, after = (
        export_onnx(TorchModel(module, encoder.spec), tmp_path / f"{name}.onnx")
        for name, module in (("before", encoder.torch_module()), ("after", model.module))
    )
    products = [sum(node.op_type == "Mul" for node in onnx.load(item.path).graph.node) for item in (before, after)]
    assert products[1] - products[0] == told["multiplications"]


def test_only_what_costs_nothing(tmp_path: Path) -> None:
    model, told = smoothed(BASE, tmp_path, where="folded")
    assert told == {"multiplied": [], "layers": 3, "folded": 2, "multiplications": 0}
    assert model.module.state_dict().keys() == BASE.teacher.state_dict().keys()
    with pytest.raises(PassFailed, match="no linear layer that it may change; set where: everywhere"):
        smoothed(tiny_encoder_base(), tmp_path, where="folded")


def test_a_layer_that_is_left_out_keeps_what_it_reads(tmp_path: Path) -> None:
    model, told = smoothed(BASE, tmp_path, targets={"exclude": ["right"]})
    assert ["left"] in told["multiplied"]
    for name in ("norm.weight", "right.weight"):
        assert torch.equal(model.module.state_dict()[name], BASE.teacher.state_dict()[name])
    assert torch.equal(answers(model.module, BASE, torch.float64), answers(BASE.teacher, BASE, torch.float64))


def test_a_rebuilt_module_takes_the_weights(tmp_path: Path) -> None:
    base = tiny_encoder_base()
    model, told = smoothed(base, tmp_path)
    fresh = Smooth().rebuild_structure(TinyEncoder().eval(), told)
    fresh.load_state_dict(model.module.state_dict())
    assert torch.equal(answers(fresh, base), answers(model.module, base))


def test_eight_bits_lose_less_afterwards(tmp_path: Path) -> None:
    def error(model: TorchModel) -> float:
        quantized = QuantizeStatic(observer="minmax").apply(model, context_of(BASE, tmp_path)).model
        assert isinstance(quantized, OnnxModel)
        (got,) = open_session(quantized.path).run(None, {"row": INPUTS})
        wanted = answers(BASE.teacher, BASE).numpy()
        return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))

    assert error(smoothed(BASE, tmp_path)[0]) < 0.7 * error(TorchModel(BASE.torch_module(), ROW))


def test_what_it_cannot_work_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PassFailed, match="calibration split is empty"):
        smoothed(replace(BASE, inputs=(INPUTS[:0],)), tmp_path)
    assert Smooth().needs == {"calibration"}
    assert find_violation([FoldBn(), Smooth(), QuantizeStatic()]) is None
    violation = find_violation([QuantizeStatic(), Smooth()])
    assert violation is not None
    assert "smooth -> quantize_static" in violation.message
