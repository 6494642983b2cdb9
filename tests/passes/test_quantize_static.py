from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from leanserve.contracts import Array, ArrayData, Batch, ModelSpec, OnnxModel, Split, TensorSpec, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.families.quantize.quantize_static import QuantizeStatic
from leanserve.passes.toolkit.lowering import export_onnx, feeds, open_session
from tiny_base import IMAGES, TinyBase, context_of, lively, no_progress, tiny_base
from tiny_encoder import tiny_encoder_base
from tiny_graphs import graph, random, write

BASE = tiny_base()


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    """The tiny CNN, exported once."""
    return export_onnx(TorchModel(BASE.torch_module(), IMAGES), tmp_path_factory.mktemp("net") / "model.onnx")


def quantize(model: OnnxModel, folder: Path, base: TinyBase = BASE, **options: object) -> OnnxModel:
    applied = QuantizeStatic.model_validate(options).apply(model, context_of(base, folder))
    assert isinstance(applied.model, OnnxModel)
    return applied.model


def answers(model: OnnxModel, *inputs: Array) -> Array:
    (output,) = open_session(model.path).run(None, feeds(model.spec, inputs))
    return np.asarray(output)


def cosine(left: Array, right: Array) -> float:
    return float((left * right).sum() / np.linalg.norm(left) / np.linalg.norm(right))


def running_operators(model: OnnxModel, folder: Path) -> Counter[str]:
    """Operator types that really run, after all of onnxruntime's fusions."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "running.onnx")
    onnxruntime.InferenceSession(str(model.path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "running.onnx").graph.node)


def constants(model: OnnxModel, ending: str) -> dict[str, Array]:
    initializers = onnx.load(model.path).graph.initializer
    return {item.name: onnx.numpy_helper.to_array(item) for item in initializers if item.name.endswith(ending)}


@pytest.mark.parametrize("observer", ["minmax", "percentile", "entropy", "mse"])
def test_answers_stay_close_alone_and_in_company(net: OnnxModel, tmp_path: Path, observer: str) -> None:
    int8 = quantize(net, tmp_path, observer=observer)
    (images,) = BASE.inputs
    together = answers(int8, images)
    assert cosine(together, answers(net, images)) > 0.99
    alone = np.concatenate([answers(int8, images[row : row + 1]) for row in range(5)])
    assert np.allclose(alone, together[:5], atol=1e-5)


def test_everything_between_the_layers_runs_in_int8(net: OnnxModel, tmp_path: Path) -> None:
    operators = running_operators(quantize(net, tmp_path), tmp_path)
    assert operators["QLinearConv"] == 2
    assert operators["QLinearAdd"] == 1
    assert operators["QGemm"] == 1
    assert operators["QuantizeLinear"] == 1, "the input alone is converted"
    assert operators["DequantizeLinear"] == 0, "the last layer gives float itself"
    assert not {"Conv", "Add", "Relu", "Gemm", "AveragePool"} & set(operators)


def test_a_torch_model_is_exported_and_left_as_it_was(tmp_path: Path) -> None:
    given = TorchModel(BASE.torch_module(), IMAGES)
    applied = QuantizeStatic().apply(given, context_of(BASE, tmp_path))
    assert isinstance(applied.model, OnnxModel)
    assert applied.facts == {"int8_nodes": 8, "float_layers": 0, "calibration_rows": 67}
    trained = BASE.teacher.state_dict()
    assert all(torch.equal(tensor, trained[name]) for name, tensor in given.module.state_dict().items())


def test_the_same_input_gives_the_same_bytes_and_keeps_its_own(net: OnnxModel, tmp_path: Path) -> None:
    before = net.path.read_bytes()
    files = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        files.append(quantize(net, tmp_path / name).path.read_bytes())
    assert files[0] == files[1]
    assert net.path.read_bytes() == before


def test_observers_decide_the_scales(net: OnnxModel, tmp_path: Path) -> None:
    images = np.random.default_rng(0).standard_t(3, size=(2000, 1, 8, 8)).astype(np.float32)
    tailed = replace(BASE, inputs=(images,), labels=None)
    scales = {}
    for observer in ("minmax", "percentile", "entropy", "mse"):
        found = constants(quantize(net, tmp_path, tailed, observer=observer, samples=2000, batch=500), "image_scale")
        scales[observer] = float(found["image_scale"])
    assert len(set(scales.values())) == 4
    assert max(scales, key=lambda observer: scales[observer]) == "minmax"


def test_the_percentile_is_honoured_and_refused_elsewhere(net: OnnxModel, tmp_path: Path) -> None:
    wide, narrow = (
        constants(quantize(net, tmp_path, observer="percentile", percentile=share), "image_scale")["image_scale"]
        for share in (99.9, 90.0)
    )
    assert narrow < 0.8 * wide
    with pytest.raises(ValidationError, match="percentile has no effect with observer 'mse'"):
        QuantizeStatic(observer="mse", percentile=99.0)


@pytest.mark.parametrize(("glob", "floats"), [("conv/*", {"Conv": 1}), ("Gemm", {"Gemm": 1}), ("*", None)])
def test_keep_float_keeps_by_name_and_by_type(
    net: OnnxModel, tmp_path: Path, glob: str, floats: dict[str, int] | None
) -> None:
    if floats is None:
        with pytest.raises(PassFailed, match=r"keep_float keeps every layer float \(stem/Conv, conv/Conv, head/Gemm\)"):
            quantize(net, tmp_path, keep_float=(glob,))
        return
    int8 = quantize(net, tmp_path, keep_float=(glob,))
    operators = running_operators(int8, tmp_path)
    assert {kind: operators[kind] for kind in ("Conv", "Gemm") if operators[kind]} == floats
    assert cosine(answers(int8, *BASE.inputs), answers(net, *BASE.inputs)) > 0.99


def test_keep_float_that_matches_nothing_is_an_error(net: OnnxModel, tmp_path: Path) -> None:
    with pytest.raises(PassFailed, match=r"keep_float: 'haed/\*' matches no node .* head/Gemm"):
        quantize(net, tmp_path, keep_float=("haed/*",))


def test_carriers_stay_float_behind_a_float_layer(net: OnnxModel, tmp_path: Path) -> None:
    """With the head kept float nobody takes the pooled features as int8, so pooling gives them in full precision."""
    operators = running_operators(quantize(net, tmp_path, keep_float=("head/*",)), tmp_path)
    assert operators["QLinearAdd"] == 1
    assert operators["AveragePool"] == 1


@pytest.mark.parametrize(("reduce_range", "largest"), [("on", 64), ("off", 127)])
def test_reduced_weights_use_seven_bits(net: OnnxModel, tmp_path: Path, reduce_range: str, largest: int) -> None:
    weights = constants(quantize(net, tmp_path, reduce_range=reduce_range), "weight_quantized")
    assert len(weights) == 3
    assert all(np.abs(array.astype(int)).max() == largest for array in weights.values())


def test_weights_have_a_scale_per_channel_or_one(net: OnnxModel, tmp_path: Path) -> None:
    per_channel = constants(quantize(net, tmp_path), "stem.weight_scale")["stem.weight_scale"]
    per_tensor = constants(quantize(net, tmp_path, weights="per_tensor"), "stem.weight_scale")["stem.weight_scale"]
    assert per_channel.shape == (8,)
    assert len(set(per_channel.tolist())) == 8
    assert per_tensor.shape == ()


@dataclass(frozen=True)
class Watched(ArrayData):
    """Data that notes which batches were asked for."""

    sizes: list[int] = field(default_factory=list)

    def batches(self, size: int, shuffle_seed: int | None = None) -> Iterator[Batch]:
        for batch in super().batches(size, shuffle_seed):
            self.sizes.append(len(batch.inputs[0]))
            yield batch


@dataclass(frozen=True)
class WatchedBase(TinyBase):
    watched: list[Watched] = field(default_factory=list)

    def data(self, split: Split, n: int | None = None, spec: ModelSpec | None = None) -> ArrayData:
        assert split == "calibration"
        self.watched.append(Watched(super().data(split, n, spec).inputs))
        return self.watched[-1]


def test_only_so_many_samples_are_read_in_batches_and_told(net: OnnxModel, tmp_path: Path) -> None:
    base = WatchedBase(BASE.teacher, BASE.inputs, BASE.labels)
    told: list[tuple[float, float]] = []
    context = replace(context_of(base, tmp_path), progress=lambda done, total, note="": told.append((done, total)))
    applied = QuantizeStatic(samples=20, batch=8, observer="mse").apply(net, context)
    assert [data.sizes for data in base.watched] == [[8, 8, 4, 8, 8, 4]], "once for the ranges, once for the histograms"
    assert applied.facts["calibration_rows"] == 20
    assert told == [(8, 20), (16, 20), (20, 20)] * 2


def test_data_without_a_range_is_refused(net: OnnxModel, tmp_path: Path) -> None:
    images = BASE.inputs[0].copy()
    images[50, 0, 3, 3] = np.nan
    with pytest.raises(PassFailed, match="'image' cannot be calibrated: it contains NaN"):
        quantize(net, tmp_path, replace(BASE, inputs=(images,)))
    with pytest.raises(PassFailed, match="calibration split is empty"):
        quantize(net, tmp_path, replace(BASE, inputs=(images[:0],)))


def test_a_transformer_computes_its_linear_layers_in_int8_and_the_rest_in_float(tmp_path: Path) -> None:
    base = tiny_encoder_base()
    model = export_onnx(TorchModel(base.torch_module(), base.spec), tmp_path / "float.onnx")
    int8 = quantize(model, tmp_path, base)
    assert cosine(answers(int8, *base.inputs), answers(model, *base.inputs)) > 0.99
    operators = running_operators(int8, tmp_path)
    assert operators["MatMulIntegerToFloat"] == 6
    assert operators["QGemm"] == 1
    assert not {"QLinearAdd", "QLinearMul", "QLinearMatMul"} & set(operators), "residual sums stay float"


class Bounded(nn.Module):
    """A convolution whose output is clipped."""

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 6)
        self.low, self.high = low, high

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.second(torch.clamp(self.first(image), self.low, self.high)).flatten(1)
        return logits


@pytest.mark.parametrize(("low", "clips"), [(0.0, 0), (0.5, 1)])
def test_a_clip_is_absorbed_where_an_int8_range_can_do_it(tmp_path: Path, low: float, clips: int) -> None:
    base = TinyBase(lively(Bounded(low, 1.0), seed=2), BASE.inputs, None)
    model = export_onnx(TorchModel(base.torch_module(), IMAGES), tmp_path / "float.onnx")
    int8 = quantize(model, tmp_path, base)
    assert running_operators(int8, tmp_path)["Clip"] == clips
    assert cosine(answers(int8, *base.inputs), answers(model, *base.inputs)) > 0.99


class Means(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return image.mean(dim=(1, 2))[:, :2]


def test_a_model_without_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PassFailed, match="no convolution or linear layer"):
        QuantizeStatic().apply(TorchModel(Means().eval(), IMAGES), context_of(BASE, tmp_path, no_progress))


def test_layers_that_share_a_bias_get_one_each(net: OnnxModel, tmp_path: Path) -> None:
    """Quantizers copy a shared one to a name that may be taken, and fail on a matrix of one row."""
    model = onnx.load(net.path)
    layers = [node for node in model.graph.node if node.op_type in {"Conv", "Gemm"} and len(node.input) == 3]
    sizes = {item.name: list(item.dims) for item in model.graph.initializer}
    alike = next(
        (one, other)
        for one in layers
        for other in layers
        if one is not other and sizes[one.input[2]] == sizes[other.input[2]]
    )
    alike[1].input[2] = alike[0].input[2]
    [gemm] = [node for node in layers if node.op_type == "Gemm"]
    bias = next(item for item in model.graph.initializer if item.name == gemm.input[2])
    bias.dims[:] = [1, *bias.dims]
    del model.graph.value_info[:]
    taken = f"{alike[0].input[2]}1"
    model.graph.node.append(onnx.helper.make_node("Identity", [gemm.output[0]], [taken]))
    model.graph.output.append(onnx.helper.make_tensor_value_info(taken, onnx.TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "shared.onnx")
    shared = replace(net, path=tmp_path / "shared.onnx")
    int8 = quantize(shared, tmp_path)
    (images,) = BASE.inputs
    one, other = (open_session(item.path).run(None, feeds(net.spec, (images,)))[0] for item in (int8, shared))
    assert cosine(np.asarray(one), np.asarray(other)) > 0.99


def test_symmetric_ranges_have_their_zero_in_the_middle_or_at_an_end(net: OnnxModel, tmp_path: Path) -> None:
    def zeros(model: OnnxModel) -> set[int]:
        return {int(item) for item in constants(model, "_zero_point").values() if item.dtype == np.uint8}

    symmetric = quantize(net, tmp_path, activations="symmetric")
    assert zeros(symmetric) <= {0, 127, 128}, "what a ReLU gives needs no room below zero"
    assert cosine(answers(symmetric, *BASE.inputs), answers(net, *BASE.inputs)) > 0.99
    assert not zeros(quantize(net, tmp_path)) <= {0, 127, 128}


def test_rounding_moves_weights_by_less_than_a_step(net: OnnxModel, tmp_path: Path) -> None:
    whole = {
        kind: constants(quantize(net, tmp_path, rounding=kind), "weight_quantized")
        for kind in ("nearest", "stochastic", "adaround")
    }
    again = constants(quantize(net, tmp_path, rounding="stochastic"), "weight_quantized")
    for name, nearest in whole["nearest"].items():
        assert (again[name] == whole["stochastic"][name]).all()
        for kind in ("stochastic", "adaround"):
            change = whole[kind][name].astype(int) - nearest
            assert np.abs(change).max() == 1, kind
            assert abs(change.mean()) < 0.2, kind
    near, fitted = (quantize(net, tmp_path, rounding=kind, reduce_range="on") for kind in ("nearest", "adaround"))
    wanted = answers(net, *BASE.inputs)
    errors = [np.abs(answers(item, *BASE.inputs) - wanted).mean() for item in (near, fitted)]
    assert errors[1] < 1.2 * errors[0]


def test_attention_and_embeddings_are_quantized_where_they_are_asked_for(tmp_path: Path) -> None:
    base = tiny_encoder_base()
    model = export_onnx(TorchModel(base.torch_module(), base.spec), tmp_path / "float.onnx")
    wanted = answers(model, *base.inputs)
    plain = quantize(model, tmp_path, base)
    small = plain.path.stat().st_size
    operators = running_operators(quantize(model, tmp_path, base, attention="int8"), tmp_path)
    assert operators["MatMulIntegerToFloat"] + operators["QLinearMatMul"] == 8
    assert cosine(answers(quantize(model, tmp_path, base, attention="int8"), *base.inputs), wanted) > 0.98
    tables = quantize(model, tmp_path, base, embeddings="int8")
    assert small - tables.path.stat().st_size > 0.5 * 50 * 32 * 3
    assert cosine(answers(tables, *base.inputs), wanted) > 0.99
    [table] = constants(tables, "tokens.weight.int8").values()
    assert table.dtype == np.int8
    assert table.shape == (50, 32)
    kept = quantize(model, tmp_path, base, embeddings="int8", keep_float=("Gather",))
    assert not constants(kept, "tokens.weight.int8")


def test_a_graph_of_one_layer_is_quantized(tmp_path: Path) -> None:
    text = "agraph (float[N, 4] x) => (float[N, 4] y) { y = MatMul (x, w) }"
    path = write(tmp_path / "m.onnx", graph(text, {"w": random(4, 4)}))
    (x,) = inputs = (np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32),)
    spec = ModelSpec((TensorSpec("x", "float32", (4,)),), (TensorSpec("y", "float32", (4,)),))
    base = TinyBase(nn.Linear(4, 4), inputs, None, spec)
    int8 = quantize(OnnxModel(path, spec), tmp_path, base)
    assert cosine(answers(int8, x), answers(OnnxModel(path, spec), x)) > 0.99
