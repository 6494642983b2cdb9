from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from leanserve.contracts import Array, Model, ModelSpec, OnnxModel, TensorSpec, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.families.quantize.qat import Qat
from leanserve.passes.families.quantize.quantize_static import QuantizeStatic
from leanserve.passes.toolkit.learned_ranges import LearnedRanges, Point, RoundedLayers, rounded
from leanserve.passes.toolkit.lowering import open_session
from leanserve.passes.toolkit.static_quantization import StaticOptions
from structural_nets import Residual, image_base
from tiny_base import TinyBase, context_of, lively

SPEC = ModelSpec((TensorSpec("row", "float32", (16,)),), (TensorSpec("values", "float32", (4,)),))
COARSE = StaticOptions(weights="per_tensor", observer="minmax")


class Three(nn.Module):
    """Linear layers with ReLUs; two of them read the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Linear(16, 32), nn.Linear(32, 4), nn.Linear(32, 4)

    def forward(self, row: Tensor) -> Tensor:
        x = torch.relu(self.first(row))
        values: Tensor = self.left(x) + torch.tanh(self.right(x))
        return values


def coarse_base() -> TinyBase:
    """One output of its first layer is ten times the others: a scale for all is coarse for them."""
    random = np.random.default_rng(0)
    module = lively(Three(), seed=1)
    with torch.no_grad():
        module.get_parameter("first.weight")[0] *= 10
        for layer in ("left", "right"):
            module.get_parameter(f"{layer}.weight")[:, 0] /= 10
    return TinyBase(module, (random.standard_normal((256, 16)).astype(np.float32),), None, SPEC)


BASE = coarse_base()


def error(model: Model) -> float:
    assert isinstance(model, OnnxModel)
    (rows,) = BASE.inputs
    (got,) = open_session(model.path).run(None, {"row": rows})
    with torch.no_grad():
        wanted: Array = BASE.teacher(torch.from_numpy(rows)).numpy()
    return float(np.linalg.norm(np.asarray(got) - wanted) / np.linalg.norm(wanted))


def test_training_makes_up_for_the_rounding(tmp_path: Path) -> None:
    model, context = TorchModel(BASE.torch_module(), SPEC), context_of(BASE, tmp_path)
    static = QuantizeStatic(weights="per_tensor", observer="minmax").apply(model, context).model
    before = error(static)
    applied = Qat(epochs=30, learning_rate=3e-3, precision="float32", quantize=COARSE).apply(model, context)
    assert error(applied.model) < 0.8 * before
    assert applied.facts["last_loss"] < 0.7 * applied.facts["first_loss"]
    assert applied.facts["trained_layers"] == 3
    assert torch.equal(model.module.state_dict()["first.weight"], BASE.teacher.state_dict()["first.weight"])
    assert isinstance(applied.model, OnnxModel)
    operators = {node.op_type for node in onnx.load(applied.model.path).graph.node}
    assert {"QuantizeLinear", "DequantizeLinear"} <= operators


def test_ranges_are_those_that_were_trained_and_one_for_all_that_read_a_tensor(tmp_path: Path) -> None:
    def scales(freeze: float) -> dict[str, float]:
        pass_ = Qat(epochs=4, learning_rate=0.02, warmup=0, precision="float32", freeze=freeze, quantize=COARSE)
        (tmp_path / f"{freeze}").mkdir()
        made = pass_.apply(TorchModel(BASE.torch_module(), SPEC), context_of(BASE, tmp_path / f"{freeze}")).model
        assert isinstance(made, OnnxModel)
        graph = onnx.load(made.path).graph
        found = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
        return {name: float(value) for name, value in found.items() if name == "row_scale"}

    still, moved = scales(1e-9), scales(1.0)
    calibrated = (BASE.inputs[0].max() - BASE.inputs[0].min()) / 255
    assert still["row_scale"] == pytest.approx(calibrated, rel=1e-4), "frozen from the first step on"
    assert abs(moved["row_scale"] / calibrated - 1) > 0.02


def test_layers_round_as_the_graph_does_and_are_left_as_they_were() -> None:
    module = BASE.torch_module()
    names = set(module.state_dict())
    ranges = LearnedRanges({"row": (-2.0, 1.0), "x": (0.0, 3.0)})
    assert ranges.found() == {"row": pytest.approx((-2.0, 1.0)), "x": pytest.approx((0.0, 3.0))}
    points = [Point("first", "row"), Point("left", "x"), Point("right", "x")]
    layers = RoundedLayers(module, points, ranges, 127, "per_channel")
    weight: Tensor = getattr(module.get_submodule("first"), "weight")  # noqa: B009 - it is no parameter just now
    steps = weight.detach().abs().amax(1, keepdim=True) / 127
    assert torch.allclose((weight / steps).round(), weight / steps, atol=1e-3)
    values = torch.tensor([-5.0, -2.0, -0.003, 0.0, 0.5, 9.0])
    step = 3 / 255
    wanted = torch.round(values.clamp(-2, 1) / step) * step
    assert torch.allclose(rounded(values, *ranges.ends("row")), wanted, atol=step / 2 + 1e-6)
    assert rounded(values, *ranges.ends("row"))[3] == 0
    module(torch.from_numpy(BASE.inputs[0])).square().sum().backward()
    assert ranges.reach.grad is not None
    assert ranges.reach.grad.abs().sum() > 0
    assert ranges.reach.grad[2] == 0, "what a ReLU gives stays above zero"
    layers.remove()
    assert set(module.state_dict()) == names
    assert torch.equal(module.state_dict()["first.weight"], BASE.teacher.state_dict()["first.weight"])


def test_a_sparse_model_stays_sparse(tmp_path: Path) -> None:
    module = BASE.torch_module()
    mask = torch.rand(32, 16, generator=torch.Generator().manual_seed(0)) > 0.5
    with torch.no_grad():
        module.get_parameter("first.weight").mul_(mask)
    model = TorchModel(module, SPEC, {"first.weight": mask})
    made = Qat(epochs=1, precision="float32").apply(model, context_of(BASE, tmp_path)).model
    assert isinstance(made, OnnxModel)
    graph = onnx.load(made.path).graph
    [stored] = [item for item in graph.initializer if item.name == "first.weight_quantized"]
    assert not onnx.numpy_helper.to_array(stored).reshape(32, 16)[~mask.numpy()].any()


def test_batch_norms_are_folded_before(tmp_path: Path) -> None:
    images = image_base(Residual())
    with pytest.raises(PassFailed, match=r"put fold_bn before it \(the first norm is stem\.1\)"):
        Qat().apply(images.model(), context_of(images, tmp_path))
    with pytest.raises(PassFailed, match="or keep_float keeps all"):
        Qat(keep_float=("Gemm",)).apply(BASE.model(), context_of(BASE, tmp_path))
    assert Qat().needs == {"train", "batches", "calibration"}
