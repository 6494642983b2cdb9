"""Weights in few bits on disk: answers are those of the rounded weights, wherever they are loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from leanserve.contracts import Array, OnnxModel, Share, TorchModel
from leanserve.errors import PassFailed
from leanserve.passes.composition import find_violation
from leanserve.passes.families.precision.store_weights import StoreWeights
from leanserve.passes.families.quantize.quantize_static import QuantizeStatic
from leanserve.passes.families.runtime.openvino import OpenVino
from leanserve.passes.toolkit.lowering import export_onnx
from leanserve.runtime.formats import format_named, open_backend
from structural_nets import Perceptron, row_base
from tied_nets import TiedLanguage
from tiny_base import context_of, lively


def perceptron(seed: int) -> nn.Module:
    """Without batch norm: an export folds it into a layer, whose weights are then rounded no more."""
    module = Perceptron()
    module.set_submodule("norm", nn.Identity())
    return lively(module, seed)


BASE = replace(row_base(), teacher=perceptron(seed=2))
BITS = {"bf16": 16, "fp16": 16, "fp8": 8}
WORST = {"bf16": 2**-8, "fp16": 2**-11, "fp8": 2**-4}
"""By type, half of the step between two numbers, of a number."""


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> OnnxModel:
    return export_onnx(BASE.model(), tmp_path_factory.mktemp("graph") / "model.onnx")


def stored(model: TorchModel | OnnxModel, folder: Path, **options: object) -> TorchModel | OnnxModel:
    made = StoreWeights.model_validate(options).apply(model, context_of(BASE, folder)).model
    assert isinstance(made, TorchModel | OnnxModel)
    return made


def loaded(model: TorchModel, folder: Path) -> TorchModel:
    """Saved, and read into a network with other weights."""
    format_ = format_named("torch")
    format_.save(model, folder)
    made: TorchModel = format_.load(folder, BASE.spec, lambda: perceptron(seed=9))
    return made


def answers(model: TorchModel | OnnxModel) -> Array:
    backend = open_backend(model, Share(1))
    found = backend.run(BASE.inputs).outputs[0]
    backend.close()
    return found


@pytest.mark.parametrize("dtype", BITS)
def test_a_module_is_smaller_on_disk_and_answers_as_its_rounded_weights_do(tmp_path: Path, dtype: str) -> None:
    given = BASE.model()
    made = stored(given, tmp_path, dtype=dtype)
    assert isinstance(made, TorchModel)
    again = loaded(made, tmp_path)
    for (name, before), after in zip(given.module.named_parameters(), again.module.parameters(), strict=True):
        assert after.dtype == torch.float32
        if before.ndim == 1:
            assert torch.equal(before, after), name
        else:
            off = (after - before).abs() > WORST[dtype] * before.abs() + 1e-3 * before.abs().max() * (dtype == "fp8")
            assert not off.any(), name
    np.testing.assert_array_equal(answers(made), answers(again))
    matrices = sum(item.numel() for item in given.module.parameters() if item.ndim > 1)
    sizes = {}
    for name, model in {"before": given, "after": made}.items():
        (tmp_path / name).mkdir()
        format_named("torch").save(model, tmp_path / name)
        sizes[name] = (tmp_path / name / "model.safetensors").stat().st_size
    assert sizes["before"] - sizes["after"] == pytest.approx(matrices * (32 - BITS[dtype]) / 8, rel=0.02, abs=600)


@pytest.mark.parametrize("dtype", BITS)
def test_a_graph_is_smaller_and_answers_as_the_module(graph: OnnxModel, tmp_path: Path, dtype: str) -> None:
    made = stored(graph, tmp_path, dtype=dtype)
    assert isinstance(made, OnnxModel)
    np.testing.assert_allclose(answers(made), answers(stored(BASE.model(), tmp_path, dtype=dtype)), atol=1e-4)
    assert made.path.stat().st_size < graph.path.stat().st_size * (0.65 if dtype != "fp8" else 0.45)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_exported_afterwards_it_stays_small_and_openvino_reads_it(tmp_path: Path, dtype: str) -> None:
    made = stored(BASE.model(), tmp_path, dtype=dtype)
    assert isinstance(made, TorchModel)
    exported = export_onnx(made, tmp_path / "model.onnx")
    kinds = {item.name: item.data_type for item in onnx.load(exported.path).graph.initializer if len(item.dims) > 1}
    assert len(kinds) == 3
    assert onnx.TensorProto.FLOAT not in kinds.values()
    np.testing.assert_allclose(answers(exported), answers(made), atol=1e-4)
    backend = open_backend(OpenVino().apply(exported, context_of(BASE, tmp_path)).model, Share(1))
    np.testing.assert_allclose(backend.run(BASE.inputs).outputs[0], answers(made), atol=1e-4)
    backend.close()


def test_kept_weights_stay_as_they_are_and_a_wrong_name_is_an_error(graph: OnnxModel, tmp_path: Path) -> None:
    made = stored(BASE.model(), tmp_path, keep=["head.*"])
    assert isinstance(made, TorchModel)
    assert torch.equal(made.module.get_parameter("head.weight"), BASE.model().module.get_parameter("head.weight"))
    assert set(made.storage) == {"first.weight", "second.weight"}
    for model in (BASE.model(), graph):
        with pytest.raises(PassFailed, match=r"keep: 'haed.\*' matches no weight; near names: head.weight"):
            stored(model, tmp_path, keep=["haed.*"])
        with pytest.raises(PassFailed, match="no matrix, kernel or table to store"):
            stored(model, tmp_path, keep=["*"])


def test_what_overflows_is_named(graph: OnnxModel, tmp_path: Path) -> None:
    model = BASE.model()
    with torch.no_grad():
        model.module.get_parameter("second.weight")[0, 0] = 1e6
    large = export_onnx(model, tmp_path / "large.onnx")
    for given in (model, large):
        with pytest.raises(PassFailed, match=r"fp16 overflows in 'second.weight'; take bf16"):
            stored(given, tmp_path, dtype="fp16")
        stored(given, tmp_path, dtype="fp8")


@pytest.mark.parametrize("dtype", BITS)
def test_tied_and_masked_weights_are_stored_once_and_come_back(tmp_path: Path, dtype: str) -> None:
    module = lively(TiedLanguage(), seed=3)
    made = stored(TorchModel(module, BASE.spec), tmp_path, dtype=dtype)
    assert isinstance(made, TorchModel)
    format_ = format_named("torch")
    format_.save(made, tmp_path)
    again = format_.load(tmp_path, BASE.spec, lambda: lively(TiedLanguage(), seed=4))
    state = made.module.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.module.state_dict().items())
    assert len(list(again.module.parameters())) == len(list(module.parameters()))


def test_a_mask_is_kept_beside_it(tmp_path: Path) -> None:
    given = BASE.model()
    weight = given.module.get_parameter("second.weight")
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    with torch.no_grad():
        weight.mul_(mask)
    made = stored(TorchModel(given.module, given.spec, {"second.weight": mask}), tmp_path, dtype="fp8")
    assert isinstance(made, TorchModel)
    again = loaded(made, tmp_path)
    assert torch.equal(again.masks["second.weight"], mask)
    assert torch.equal(again.module.get_parameter("second.weight"), made.module.get_parameter("second.weight"))
    assert again.storage == made.storage


def test_it_is_the_last_to_change_weights() -> None:
    assert find_violation([StoreWeights(), QuantizeStatic()]) is not None
    assert find_violation([StoreWeights(), OpenVino()]) is None


def test_nothing_is_lost_in_8_bits_by_the_scale() -> None:
    from leanserve.runtime.formats.torch_storage import narrowed, rounded_to

    for scale in (1e-12, 1.0, 3e7):
        values = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * scale
        once = rounded_to(values, "fp8")
        assert torch.equal(rounded_to(once, "fp8"), once)
        assert 224 <= float(narrowed(values, "fp8")[0].float().abs().max()) <= 448
    assert torch.equal(rounded_to(torch.zeros(3), "fp8"), torch.zeros(3))
