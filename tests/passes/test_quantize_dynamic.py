from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from leanserve.contracts import Array, ModelSpec, OnnxModel, TensorSpec, TorchModel
from leanserve.errors import PassFailed
from leanserve.evaluation.batch_dependence import batch_dependence
from leanserve.hardware import isa_flags
from leanserve.passes.families.quantize.quantize_dynamic import QuantizeDynamic
from leanserve.passes.toolkit.int8_graph import weight_bits
from leanserve.passes.toolkit.lowering import export_onnx, feeds, open_session
from leanserve.runtime.backends.onnx_runtime import OnnxRuntimeBackend
from tiny_base import TinyBase, context_of, lively, tiny_base
from tiny_encoder import tiny_encoder_base

VALUES = ModelSpec((TensorSpec("values", "float32", (64,)),), (TensorSpec("logits", "float32", (10,)),))


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
    return export_onnx(TorchModel(MLP.torch_module(), MLP.spec), tmp_path_factory.mktemp("mlp") / "model.onnx")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    return export_onnx(
        TorchModel(ENCODER.torch_module(), ENCODER.spec), tmp_path_factory.mktemp("encoder") / "model.onnx"
    )


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
    products = {"MatMulInteger", "MatMulIntegerToFloat"}
    return [node.name for node in onnx.load(model.path).graph.node if node.op_type in products]


def int8_weights(model: OnnxModel) -> list[Array]:
    initializers = onnx.load(model.path).graph.initializer
    arrays = [onnx.numpy_helper.to_array(item) for item in initializers]
    return [array for array in arrays if array.dtype == np.int8 and array.ndim == 2]


@pytest.mark.parametrize("scale", ["row", "tensor"])
def test_linear_layers_become_a_quarter_and_answer_the_same(mlp: OnnxModel, tmp_path: Path, scale: str) -> None:
    int8 = quantize(mlp, tmp_path, scale=scale)
    assert cosine(answers(int8, *MLP.inputs), answers(mlp, *MLP.inputs)) > 0.99
    assert len(int8_products(int8)) == 2
    assert int8.path.stat().st_size < 0.4 * mlp.path.stat().st_size


@pytest.mark.parametrize("scale", ["row", "tensor"])
def test_a_transformer_keeps_its_attention_float(encoder: OnnxModel, tmp_path: Path, scale: str) -> None:
    int8 = quantize(encoder, tmp_path, scale=scale)
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


@pytest.mark.parametrize("scale", ["row", "tensor"])
@pytest.mark.parametrize(("reduce_range", "largest"), [("on", 64), ("off", 127)])
def test_reduced_weights_use_seven_bits(
    mlp: OnnxModel, tmp_path: Path, reduce_range: str, largest: int, scale: str
) -> None:
    weights = int8_weights(quantize(mlp, tmp_path, reduce_range=reduce_range, scale=scale))
    assert [int(np.abs(array.astype(int)).max()) for array in weights] == [largest, largest]


def test_weights_have_a_scale_per_channel_or_one(mlp: OnnxModel, tmp_path: Path) -> None:
    def scales(**options: object) -> set[tuple[int, ...]]:
        graph = onnx.load(quantize(mlp, tmp_path, **options).path).graph
        named = ((item.name, tuple(item.dims)) for item in graph.initializer)
        return {dims for name, dims in named if name.endswith("_steps") or ("weight" in name and "_scale" in name)}

    for scale in ("row", "tensor"):
        assert scales(scale=scale) == {(256,), (10,)}
        assert scales(scale=scale, weights="per_tensor") <= {(), (1,)}
        per_tensor = quantize(mlp, tmp_path, scale=scale, weights="per_tensor")
        assert cosine(answers(per_tensor, *MLP.inputs), answers(mlp, *MLP.inputs)) > 0.99


def test_the_same_input_gives_the_same_bytes_and_keeps_its_own(mlp: OnnxModel, tmp_path: Path) -> None:
    before = mlp.path.read_bytes()
    first = quantize(mlp, tmp_path).path.read_bytes()
    assert quantize(mlp, tmp_path).path.read_bytes() == first
    assert mlp.path.read_bytes() == before


POISON = {
    "a thousand": np.float32(1000),
    "near the largest float": np.float32(1e30),
    "NaN": np.float32(np.nan),
    "infinity": np.float32(np.inf),
    "minus infinity": np.float32(-np.inf),
}


@pytest.mark.parametrize("poison", POISON.values(), ids=POISON.keys())
@pytest.mark.parametrize("place", [slice(None), slice(3, 4)], ids=["a whole row", "one number"])
def test_a_stranger_changes_no_answer(mlp: OnnxModel, tmp_path: Path, poison: np.float32, place: slice) -> None:
    int8 = quantize(mlp, tmp_path)
    (rows,) = MLP.inputs
    alone = np.concatenate([answers(int8, rows[index : index + 1]) for index in range(6)])
    poisoned = rows[:8].copy()
    poisoned[6, place] = poison
    together = answers(int8, poisoned)
    np.testing.assert_allclose(together[:6], alone, rtol=0, atol=1e-6 * np.abs(alone).max())
    assert np.isnan(together[6]).all() == (not np.isfinite(poison)), "as in float, what is no number gives none"


def test_with_one_scale_per_tensor_a_stranger_changes_every_answer(mlp: OnnxModel, tmp_path: Path) -> None:
    int8 = quantize(mlp, tmp_path, scale="tensor")
    (rows,) = MLP.inputs
    alone = answers(int8, rows[:1])
    poisoned = rows[:2].copy()
    poisoned[1] = 1000
    assert np.abs(answers(int8, poisoned)[0] - alone).max() > 0.1 * np.abs(alone).max()


def test_padding_and_company_change_no_embedding(encoder: OnnxModel, tmp_path: Path) -> None:
    backend = OnnxRuntimeBackend(quantize(encoder, tmp_path), 1)
    assert batch_dependence(backend, ENCODER.spec, ENCODER.inputs) < 1e-6


def test_rows_of_zeros_and_of_tiny_numbers_are_answered_like_any_other(mlp: OnnxModel, tmp_path: Path) -> None:
    int8 = quantize(mlp, tmp_path)
    rows = np.zeros((3, 64), np.float32)
    rows[1], rows[2] = 1e-40, 1e-20
    right = answers(mlp, rows)
    error = 0.02 if weight_bits("auto", isa_flags()) == 8 else 0.04
    np.testing.assert_allclose(answers(int8, rows), right, rtol=0, atol=error * np.abs(right).max())


GRAPHS = {
    "more axes": ((5, 4), "agraph (float[N, 5, 4] x) => (float[N, 5, 3] y) { y = MatMul (x, w) }"),
    "an open length": ((None, 4), "agraph (float[N, L, 4] x) => (float[N, L, 3] y) { y = MatMul (x, w) }"),
    "one input of two layers": (
        (4,),
        "agraph (float[N, 4] x) => (float[N, 3] y) { a = MatMul (x, w) b = MatMul (x, v) y = Add (a, b) }",
    ),
    "a bias of one row": ((4,), "agraph (float[N, 4] x) => (float[N, 3] y) { y = Gemm (x, w, c) }"),
}


@pytest.mark.parametrize("opset", [13, 20])
@pytest.mark.parametrize(("shape", "text"), GRAPHS.values(), ids=GRAPHS.keys())
def test_graphs_of_others_are_quantized_by_row(
    tmp_path: Path, shape: tuple[int | None, ...], text: str, opset: int
) -> None:
    model = graph_of(tmp_path, text, opset, shape)
    (rows,) = model.spec.example(6, length=7)
    int8 = quantize(model, tmp_path)
    found, right = answers(int8, rows), answers(model, rows)
    assert found.shape == right.shape
    assert cosine(found, right) > 0.999
    quantizations = [node for node in onnx.load(int8.path).graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantizations) == 1, "what two layers read is quantized once"


@pytest.mark.parametrize("scale", ["row", "tensor"])
def test_a_gemm_that_does_more_than_multiply_stays_float(tmp_path: Path, scale: str) -> None:
    text = "agraph (float[N, 4] x) => (float[N, 3] y) { h = Gemm <alpha = 0.5> (x, w) y = MatMul (h, u) }"
    model = graph_of(tmp_path, text, 17, (4,))
    applied = QuantizeDynamic.model_validate({"scale": scale}).apply(model, context_of(MLP, tmp_path))
    assert applied.facts == {"int8_nodes": 1, "float_layers": 1}


def graph_of(folder: Path, text: str, opset: int, shape: tuple[int | None, ...]) -> OnnxModel:
    """A graph in ONNX's text form over the input `x`, with random constants w, v, u and c where it reads them."""
    random = np.random.default_rng(0)
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>{text}')
    read = {name for node in model.graph.node for name in node.input}
    for name, size in {"w": (4, 3), "v": (4, 3), "u": (3, 3), "c": (1, 3)}.items():
        if name in read:
            weights = random.standard_normal(size).astype(np.float32)
            model.graph.initializer.append(onnx.numpy_helper.from_array(weights, name))
    onnx.save(model, folder / "model.onnx")
    return OnnxModel(folder / "model.onnx", ModelSpec((TensorSpec("x", "float32", shape),), ()))


def test_a_torch_model_is_exported(tmp_path: Path) -> None:
    applied = QuantizeDynamic().apply(TorchModel(MLP.torch_module(), VALUES), context_of(MLP, tmp_path))
    assert isinstance(applied.model, OnnxModel)
    assert applied.facts == {"int8_nodes": 2, "float_layers": 0}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 32, 2, batch_first=True, bidirectional=True)
        self.gru, self.head = nn.GRU(64, 24, batch_first=True), nn.Linear(24, 5)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        tags: torch.Tensor = self.head(self.gru(self.lstm(frames)[0])[0])
        return tags


def test_lstms_of_any_length_are_quantized_and_grus_stay_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    frames, tags = TensorSpec("frames", "float32", (None, 16)), TensorSpec("tags", "float32", (None, 5))
    spec = ModelSpec((frames,), (tags,), rows="one_length")
    exported = export_onnx(TorchModel(Recurrent().eval(), spec), tmp_path / "float.onnx")
    int8 = quantize(exported, tmp_path, ops=("LSTM",), scale="tensor")
    operators = [node.op_type for node in onnx.load(int8.path).graph.node]
    assert (operators.count("DynamicQuantizeLSTM"), operators.count("LSTM"), operators.count("GRU")) == (2, 0, 1)
    for length in (3, 20):
        rows = spec.example(2, length, seed=length)
        assert cosine(answers(int8, *rows), answers(exported, *rows)) > 0.99
    with pytest.raises(ValidationError, match=r"one scale for all rows of a batch: say scale: tensor"):
        QuantizeDynamic.model_validate({"ops": ["LSTM"]})


def test_convolutions_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="convolution is slower than a float32 one; use quantize_static"):
        QuantizeDynamic.model_validate({"ops": ["MatMul", "Conv"]})
    base = tiny_base()
    with pytest.raises(PassFailed, match=r"convolutions do \d+% of this model's arithmetic.*use quantize_static"):
        QuantizeDynamic().apply(TorchModel(base.torch_module(), base.spec), context_of(base, tmp_path))


def test_a_pass_that_would_do_nothing_is_refused(mlp: OnnxModel, tmp_path: Path) -> None:
    with pytest.raises(PassFailed, match="would quantize nothing: ops MatMul"):
        quantize(mlp, tmp_path, ops=("MatMul",))
    with pytest.raises(PassFailed, match=r"leave every layer float \(first/Gemm, second/Gemm\)"):
        quantize(mlp, tmp_path, keep_float=("Gemm",))
    with pytest.raises(ValidationError, match="at least 1 item"):
        QuantizeDynamic(ops=())
