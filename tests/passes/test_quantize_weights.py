from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from leanserve.contracts import Array, OnnxModel, Share, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.composition import find_violation
from leanserve.passes.families.quantize.quantize_weights import QuantizeWeights
from leanserve.passes.families.runtime.openvino import OpenVino
from leanserve.passes.toolkit.lowering import export_onnx, feeds, open_session
from leanserve.runtime.formats import open_backend
from structural_nets import Residual, image_base
from tiny_base import TinyBase, context_of
from tiny_encoder import tiny_encoder_base

BASE = tiny_encoder_base()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    """The tiny encoder, exported once."""
    return export_onnx(TorchModel(BASE.torch_module(), BASE.spec), tmp_path_factory.mktemp("encoder") / "model.onnx")


@pytest.fixture(autouse=True)
def untimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanserve.passes.families.quantize.quantize_weights._speedup", lambda *_: 1.0)


def quantize(model: OnnxModel, folder: Path, base: TinyBase = BASE, **options: object) -> OnnxModel:
    applied = QuantizeWeights.model_validate(options).apply(model, context_of(base, folder))
    assert isinstance(applied.model, OnnxModel)
    return applied.model


def answers(model: OnnxModel, *inputs: Array) -> Array:
    (output,) = open_session(model.path).run(None, feeds(model.spec, inputs))
    return np.asarray(output)


def error(model: OnnxModel, reference: OnnxModel) -> float:
    ours, theirs = (answers(item, *BASE.inputs) for item in (model, reference))
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


@pytest.mark.parametrize(
    ("bits", "most"), [(8, 0.02), (4, 0.15), (3, 0.35), (2, 1.0)], ids=["8 bits", "4 bits", "3 bits", "2 bits"]
)
def test_fewer_bits_answer_less_well_and_take_less_room(
    encoder: OnnxModel, tmp_path: Path, bits: int, most: float
) -> None:
    model = quantize(encoder, tmp_path, bits=bits)
    assert 0 < error(model, encoder) < most
    graph = onnx.load(model.path).graph
    codes = [item for item in graph.initializer if item.name.endswith(("MatMul.codes", "Gemm.codes"))]
    stored = sum(len(item.raw_data) for item in codes)
    products = [node for node in graph.node if node.op_type == "MatMulNBits"]
    weights = sum(
        np.prod([attribute.i for attribute in node.attribute if attribute.name in {"K", "N"}]) for node in products
    )
    assert len(products) == 7
    assert stored == weights * bits / 8
    assert {node.op_type for node in graph.node} & {"MatMul", "Gemm"} <= {"MatMul"}, "attention's own products stay"


@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq", "awq"])
def test_every_method_answers_and_a_row_alone_as_in_company(encoder: OnnxModel, tmp_path: Path, method: str) -> None:
    model = quantize(encoder, tmp_path, method=method)
    together = answers(model, *BASE.inputs)
    assert error(model, encoder) < 0.25
    alone = np.concatenate([answers(model, *(array[row : row + 1] for array in BASE.inputs)) for row in range(4)])
    np.testing.assert_allclose(alone, together[:4], atol=1e-5)


def test_what_layers_see_makes_the_codes_better(encoder: OnnxModel, tmp_path: Path) -> None:
    errors = {method: error(quantize(encoder, tmp_path, bits=3, method=method), encoder) for method in ("rtn", "gptq")}
    assert errors["gptq"] < errors["rtn"]


def test_scales_of_awq_are_undone_once_for_all_layers_that_read_a_tensor(encoder: OnnxModel, tmp_path: Path) -> None:
    graph = onnx.load(quantize(encoder, tmp_path, method="awq").path).graph
    scaled = [node for node in graph.node if node.name.endswith(".scaled")]
    readers = [node for node in graph.node if node.op_type == "MatMulNBits"]
    assert len(scaled) == len({node.input[0] for node in readers}) < len(readers)


@pytest.mark.parametrize(("embeddings", "lookups"), [(8, 1), (4, 1), ("float", 0)])
def test_embeddings_have_bits_of_their_own(
    encoder: OnnxModel, tmp_path: Path, embeddings: object, lookups: int
) -> None:
    model = quantize(encoder, tmp_path, bits=8, embeddings=embeddings)
    nodes = onnx.load(model.path).graph.node
    assert sum(node.op_type == "GatherBlockQuantized" for node in nodes) == lookups
    assert error(model, encoder) < (0.15 if embeddings == 4 else 0.03)


def test_kept_layers_stay_float_and_a_wrong_name_is_an_error(encoder: OnnxModel, tmp_path: Path) -> None:
    applied = QuantizeWeights(keep_float=("up/*", "Gather")).apply(encoder, context_of(BASE, tmp_path))
    assert applied.decisions["float_layers"] == ["up/MatMul", "tokens/Gather"]
    assert (applied.facts["layers"], applied.facts["embeddings"]) == (6, 0)
    with pytest.raises(PassFailed, match=r"keep_float: 'nothing' matches no node"):
        quantize(encoder, tmp_path, keep_float=["nothing"])


def test_a_convolutional_net_without_linear_layers_is_refused(tmp_path: Path) -> None:
    base = image_base(Residual())
    with pytest.raises(PassFailed, match=r"no linear layer to quantize: .*stem.*take quantize_static"):
        QuantizeWeights(keep_float=("head/*",)).apply(
            TorchModel(base.torch_module(), base.spec), context_of(base, tmp_path)
        )


def test_only_methods_that_look_at_data_need_some(encoder: OnnxModel, tmp_path: Path) -> None:
    assert QuantizeWeights(method="gptq").needs == {"calibration"}
    assert not QuantizeWeights(method="hqq").needs
    broken = TinyBase(BASE.teacher, tuple(array[:0] for array in BASE.inputs), None, BASE.spec)
    with pytest.raises(PassFailed, match=r"method gptq calibrates with data.* take rtn or hqq"):
        quantize(encoder, tmp_path, broken)
    quantize(encoder, tmp_path, broken, method="rtn")


def test_openvino_answers_as_onnxruntime_does_but_reads_no_3_bits(encoder: OnnxModel, tmp_path: Path) -> None:
    context = context_of(BASE, tmp_path)
    coded = quantize(encoder, tmp_path, bits=4)
    backend = open_backend(OpenVino().apply(coded, context).model, Share(1))
    ours, theirs = backend.run(BASE.inputs).outputs[0], answers(coded, *BASE.inputs)
    backend.close()
    assert np.linalg.norm(ours - theirs) < 0.05 * np.linalg.norm(theirs)
    with pytest.raises(PassFailed, match="take the runtime onnxruntime"):
        OpenVino().apply(quantize(encoder, tmp_path, bits=3), context)


def test_it_is_the_only_quantization_of_a_variant() -> None:
    assert find_violation([QuantizeWeights(), QuantizeWeights()]) is not None
    assert find_violation([QuantizeWeights(), OpenVino()]) is None
