from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from pydantic import ValidationError

from leanserve.contracts import ModelSpec, OnnxModel, Share, TensorSpec, TorchModel
from leanserve.errors import PassFailed
from leanserve.evaluation.fidelity import fidelity
from leanserve.hardware import Hardware, this_hardware
from leanserve.passes.composition import find_violation
from leanserve.passes.families.quantize.quantize_dynamic import QuantizeDynamic
from leanserve.passes.families.quantize.quantize_static import QuantizeStatic
from leanserve.passes.families.runtime import openvino as pass_module
from leanserve.passes.families.runtime.fold_bn import FoldBn
from leanserve.passes.families.runtime.onnxruntime import OnnxRuntime
from leanserve.passes.families.runtime.openvino import OpenVino
from leanserve.runtime.formats import open_backend
from leanserve.runtime.formats.openvino import OpenVinoModel
from structural_nets import Residual, image_base, row_base
from tiny_base import context_of, tiny_base


def test_a_torch_model_is_converted_and_gets_the_options(tmp_path: Path) -> None:
    base = tiny_base()
    applied = OpenVino().apply(TorchModel(base.torch_module(), base.spec), context_of(base, tmp_path))
    assert isinstance(applied.model, OpenVinoModel)
    assert applied.model.settings == {"precision": "f32"}
    stored = OpenVinoModel(applied.model.path, base.spec)
    assert OpenVino().on_load(stored, applied.decisions, tmp_path) == applied.model


def test_integers_of_quantize_static_stay_integers(tmp_path: Path) -> None:
    base = image_base(Residual())
    context = context_of(base, tmp_path)
    quantized = QuantizeStatic(samples=32).apply(TorchModel(base.torch_module(), base.spec), context).model
    model = OpenVino().apply(quantized, context).model
    backend = open_backend(model, Share(1))
    kinds = {
        node.get_rt_info()["runtimePrecision"].astype(str)
        for node in backend._compiled.get_runtime_model().get_ops()  # type: ignore[attr-defined]
        if node.get_rt_info()["layerType"].astype(str) == "Convolution"
    }
    assert kinds
    assert kinds <= {"u8", "i8"}
    rows = (base.inputs[0][:32],)
    wanted = open_backend(TorchModel(base.torch_module(), base.spec), Share(1)).run(rows).outputs
    assert fidelity(backend.run(rows).outputs, wanted, base.spec.outputs)[0].agreement > 0.9


@pytest.mark.skipif("avx512_bf16" not in this_hardware().isa, reason="needs a CPU that computes in bfloat16")
def test_bfloat16_is_computed_only_where_it_is_asked_for(tmp_path: Path) -> None:
    base = row_base()
    model = OpenVino().apply(TorchModel(base.torch_module(), base.spec), context_of(base, tmp_path)).model
    rows = (base.inputs[0][:16],)
    wanted = open_backend(TorchModel(base.torch_module(), base.spec), Share(1)).run(rows).outputs[0]
    errors = {}
    for precision in ("f32", "bf16"):
        loaded = OpenVino.model_validate({"precision": precision}).on_load(model, {}, tmp_path)
        errors[precision] = abs(open_backend(loaded, Share(1)).run(rows).outputs[0] - wanted).max() / abs(wanted).max()
    assert errors["f32"] < 1e-5
    assert 1e-4 < errors["bf16"] < 0.05


def test_ranges_found_while_running_are_refused_in_the_config_and_in_a_graph(tmp_path: Path) -> None:
    violation = find_violation([QuantizeDynamic(), OpenVino()])
    assert violation is not None
    assert "'openvino' forbids ranges that are found while running (quantize_static fixes them beforehand)" in str(
        violation
    )
    assert "'quantize_dynamic' has already chosen" in violation.message
    spec = ModelSpec((TensorSpec("x", "float32", (4,)),), (TensorSpec("y", "uint8", (4,)),))
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["y", "scale", "zero"])
    graph = helper.make_graph(
        [node], "dynamic",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 4])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, ["rows", 4])],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), tmp_path / "x.onnx")
    with pytest.raises(
        PassFailed, match=r"\(DynamicQuantizeLinear\).*take quantize_static, or the runtime onnxruntime"
    ):
        OpenVino().apply(OnnxModel(tmp_path / "x.onnx", spec), context_of(tiny_base(), tmp_path))


def test_a_file_that_is_no_graph_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    node = helper.make_node("Nothing", ["x"], ["y"], domain="nobody")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", 4]) for name in "xy"]
    graph = helper.make_graph([node], "unknown", ends[:1], ends[1:])
    imports = [helper.make_opsetid("", 20), helper.make_opsetid("nobody", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), tmp_path / "x.onnx")
    spec = ModelSpec((TensorSpec("x", "float32", (4,)),), (TensorSpec("y", "float32", (4,)),))
    with pytest.raises(PassFailed, match="take the runtime onnxruntime"):
        OpenVino().apply(OnnxModel(tmp_path / "x.onnx", spec), context_of(tiny_base(), tmp_path))


def test_a_machine_that_cannot_is_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    old = Hardware("an old processor", 2, ("avx2",))
    assert OpenVino().unsupported_reason(old) is None
    reason = OpenVino(precision="bf16").unsupported_reason(old)
    assert reason is not None
    assert "an old processor has not" in reason
    monkeypatch.setattr(pass_module, "find_spec", lambda _: None)
    assert OpenVino().unsupported_reason(old) == "OpenVINO is not installed: pip install 'leanserve[openvino]'"


def test_where_it_may_stand() -> None:
    assert find_violation([FoldBn(), QuantizeStatic(), OpenVino()]) is None
    assert find_violation([OpenVino(), FoldBn()]) is not None
    assert find_violation([OnnxRuntime(), OpenVino()]) is not None
    assert find_violation([OpenVino(), OnnxRuntime()]) is not None


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ValidationError):
        OpenVino.model_validate({"precision": "int8"})
