from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from pydantic import ValidationError
from tiny_base import TinyBase, context_of, lively, tiny_base
from tiny_encoder import tiny_encoder_base
from torch import nn

from service.compression.passes.quantize.quantize_dynamic import QuantizeDynamic
from service.compression.tools.lowering import export_onnx, feeds, open_session
from service.contracts import Array, Field, InputSpec, OnnxModel, TorchModel
from service.errors import PassFailed

VALUES = InputSpec((Field("values", "float32", (64,)),), (Field("logits", "float32", (10,)),))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 256), nn.Linear(256, 10)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.second(torch.relu(self.first(values)))
        return logits


MLP = TinyBase(lively(Mlp(), seed=1), VALUES.example(24), None, VALUES)
ENCODER = tiny_encoder_base()


@pytest.fixture(scope="module")
def mlp(tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    return export_onnx(TorchModel(MLP.build(), MLP.spec), tmp_path_factory.mktemp("mlp") / "model.onnx")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    return export_onnx(TorchModel(ENCODER.build(), ENCODER.spec), tmp_path_factory.mktemp("encoder") / "model.onnx")


def quantize(model: OnnxModel, folder: Path, **options: object) -> OnnxModel:
    applied = QuantizeDynamic.model_validate(options).apply(model, context_of(MLP, folder))
    assert isinstance(applied.model, OnnxModel)
    return applied.model


def answers(model: OnnxModel, *inputs: Array) -> Array:
    (output,) = open_session(model.path).run(None, feeds(model.spec, inputs))
    return np.asarray(output)


def cosine(left: Array, right: Array) -> float:
    return float((left * right).sum() / np.linalg.norm(left) / np.linalg.norm(right))


def int8_products(model: OnnxModel) -> list[str]:
    return [node.name for node in onnx.load(model.path).graph.node if node.op_type == "MatMulInteger"]


def int8_weights(model: OnnxModel) -> list[Array]:
    initializers = onnx.load(model.path).graph.initializer
    arrays = [onnx.numpy_helper.to_array(item) for item in initializers]
    return [array for array in arrays if array.dtype == np.int8 and array.ndim == 2]


def test_linear_layers_become_a_quarter_and_answer_the_same(mlp: OnnxModel, tmp_path: Path) -> None:
    int8 = quantize(mlp, tmp_path)
    assert cosine(answers(int8, *MLP.inputs), answers(mlp, *MLP.inputs)) > 0.99
    assert len(int8_products(int8)) == 2
    assert int8.path.stat().st_size < 0.4 * mlp.path.stat().st_size


def test_a_transformer_keeps_its_attention_float(encoder: OnnxModel, tmp_path: Path) -> None:
    int8 = quantize(encoder, tmp_path)
    assert cosine(answers(int8, *ENCODER.inputs), answers(encoder, *ENCODER.inputs)) > 0.99
    assert len(int8_products(int8)) == 7
    assert sum(node.op_type == "MatMul" for node in onnx.load(int8.path).graph.node) == 2, "scores and their sum"


@pytest.mark.parametrize(("ops", "count"), [(("MatMul",), 6), (("Gemm",), 1)])
def test_only_the_chosen_operators_are_quantized(
    encoder: OnnxModel, tmp_path: Path, ops: tuple[str, ...], count: int
) -> None:
    applied = QuantizeDynamic.model_validate({"ops": ops}).apply(encoder, context_of(ENCODER, tmp_path))
    assert isinstance(applied.model, OnnxModel)
    assert len(int8_products(applied.model)) == count
    assert applied.facts == {"int8_nodes": count, "float_layers": 7 - count}
    assert len(applied.decisions["float_layers"]) == 7 - count


def test_keep_float_keeps_by_name(encoder: OnnxModel, tmp_path: Path) -> None:
    products = int8_products(quantize(encoder, tmp_path, keep_float=("up/*", "down/*")))
    assert len(products) == 5
    assert not [name for name in products if name.startswith(("up", "down"))]
    with pytest.raises(PassFailed, match="keep_float: 'middle' matches no node"):
        quantize(encoder, tmp_path, keep_float=("middle",))


@pytest.mark.parametrize(("reduce_range", "largest"), [("on", 64), ("off", 127)])
def test_reduced_weights_use_seven_bits(mlp: OnnxModel, tmp_path: Path, reduce_range: str, largest: int) -> None:
    weights = int8_weights(quantize(mlp, tmp_path, reduce_range=reduce_range))
    assert [int(np.abs(array.astype(int)).max()) for array in weights] == [largest, largest]


def test_weights_have_a_scale_per_channel_or_one(mlp: OnnxModel, tmp_path: Path) -> None:
    def scales(**options: object) -> set[tuple[int, ...]]:
        graph = onnx.load(quantize(mlp, tmp_path, **options).path).graph
        named = ((item.name, tuple(item.dims)) for item in graph.initializer)
        return {dims for name, dims in named if "weight" in name and name.endswith("_scale")}

    assert scales() == {(256,), (10,)}
    assert scales(weights="per_tensor") <= {(), (1,)}


def test_the_same_input_gives_the_same_bytes_and_keeps_its_own(mlp: OnnxModel, tmp_path: Path) -> None:
    before = mlp.path.read_bytes()
    first = quantize(mlp, tmp_path).path.read_bytes()
    assert quantize(mlp, tmp_path).path.read_bytes() == first
    assert mlp.path.read_bytes() == before


def test_a_torch_model_is_exported(tmp_path: Path) -> None:
    applied = QuantizeDynamic().apply(TorchModel(MLP.build(), VALUES), context_of(MLP, tmp_path))
    assert isinstance(applied.model, OnnxModel)
    assert applied.facts == {"int8_nodes": 2, "float_layers": 0}


def test_convolutions_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="convolution is slower than a float32 one; use quantize_static"):
        QuantizeDynamic.model_validate({"ops": ["MatMul", "Conv"]})
    base = tiny_base()
    with pytest.raises(PassFailed, match=r"convolutions do \d+% of this model's arithmetic.*use quantize_static"):
        QuantizeDynamic().apply(TorchModel(base.build(), base.spec), context_of(base, tmp_path))


def test_a_pass_that_would_do_nothing_is_refused(mlp: OnnxModel, tmp_path: Path) -> None:
    with pytest.raises(PassFailed, match="would quantize nothing: ops MatMul"):
        quantize(mlp, tmp_path, ops=("MatMul",))
    with pytest.raises(PassFailed, match=r"leave every layer float \(first/Gemm, second/Gemm\)"):
        quantize(mlp, tmp_path, keep_float=("Gemm",))
    with pytest.raises(ValidationError, match="at least 1 item"):
        QuantizeDynamic(ops=())
