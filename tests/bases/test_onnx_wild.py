"""ONNX files as strangers export them: unknown sizes, no axis of rows, weights in nodes, maps as outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from leanserve.bases.loaded import LoadedBase
from leanserve.bases.opening import open_base
from leanserve.bases.origin import Origin
from leanserve.contracts import Array, BuildContext, OnnxModel
from leanserve.errors import ConfigError, PassFailed
from leanserve.hardware import this_hardware
from leanserve.init.model_argument import Hints
from leanserve.init.writing import write_config
from leanserve.passes.base import Pass
from leanserve.passes.families.quantize.quantize_dynamic import QuantizeDynamic
from leanserve.passes.families.quantize.quantize_static import QuantizeStatic
from leanserve.runtime.formats.onnx_size import graph_size
from tiny_graphs import cnn, graph, random, write

STREAM = """
agraph (float[batch, samples] audio, float[2, batch, 4] state, int64 rate)
    => (float[batch, 1] speech, float[2, batch, 4] next) {
    fast = Equal (rate, kilo)
    level = ReduceMean <axes = [1], keepdims = 1> (audio)
    scaled = If (fast) <
        then_branch = then () => (float[batch, 1] same) { same = Identity (level) },
        else_branch = else () => (float[batch, 1] twice) { twice = Add (level, level) }
    >
    decayed = Sigmoid (state)
    next = Add (decayed, scaled)
    summed = ReduceSum <keepdims = 0> (next, first)
    speech = MatMul (summed, weight)
}
"""
DENSE = "agraph (float[N, 64] x) => (float[N, 64] y) { y = MatMul (x, w) }"
STREAM_WEIGHTS = {"weight": random(4, 1), "kilo": np.array(16000), "first": np.array([0])}


def opened(path: Path, **declared: Any) -> LoadedBase:
    base = {"onnx": path.name, **declared}
    return open_base(Origin.model_validate({"base": base, "data": {"synthetic": 8}, "folder": path.parent}))


def answers(path: Path, *inputs: Array) -> list[Array]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    return [np.asarray(output) for output in session.run(None, dict(zip(names, inputs, strict=True)))]


def prepared_file(base: LoadedBase) -> Path:
    model = base.model()
    assert isinstance(model, OnnxModel)
    return model.path


def test_sizes_that_a_graph_can_halve_are_found(tmp_path: Path) -> None:
    text = "agraph (float[N, L] x) => (float[N, 32] y) { z = Reshape (x, to) y = ReduceMax <axes=[1], keepdims=0> (z) }"
    base = opened(write(tmp_path / "m.onnx", graph(text, {"to": np.array([0, -1, 32])})), rows="one_length")
    assert (base.spec.inputs[0].shape, base.spec.step) == ((None,), 32)
    assert [batch.inputs[0].shape for batch in base.data("gate", 4).batches(4)] == [(4, 32)]


def test_a_graph_that_runs_on_one_size_only_has_it(tmp_path: Path) -> None:
    text = "agraph (float[N, L] x) => (float[N, 2, 80] y) { y = Reshape (x, to) }"
    base = opened(write(tmp_path / "m.onnx", graph(text, {"to": np.array([0, 2, 80])})))
    assert base.spec.inputs[0].shape == (160,)
    assert "takes x as [160], the first sizes on which it ran (base.inputs)" in base.caveats
    [value] = onnx.load(prepared_file(base)).graph.input
    assert value.type.tensor_type.shape.dim[1].dim_value == 160


def test_a_size_that_an_exporter_left_in_a_graph_is_tried(tmp_path: Path) -> None:
    text = "agraph (float[N, L, 4] x) => (float[N, 2, 26] y) { y = Reshape (x, to) }"
    weights = {"to": np.array([0, 2, 26]), "traced": np.array([13])}
    base = opened(write(tmp_path / "m.onnx", graph(text, weights)))
    assert base.spec.inputs[0].shape == (13, 4)


def test_weights_of_an_old_file_need_not_be_inputs(tmp_path: Path) -> None:
    text = "agraph (float[1, 4] x) => (float[1, 3] y) { y = MatMul (x, w) }"
    base = opened(write(tmp_path / "m.onnx", graph(text, {"w": random(4, 3)}, opset=7, ir=3)))
    assert [item.name for item in base.spec.inputs] == ["x"]


@pytest.mark.parametrize("size", [0, -1])
def test_sizes_below_one_mean_that_they_are_not_known(tmp_path: Path, size: int) -> None:
    model = graph("agraph (float[N, 4] x) => (float[N, 4] y) { y = Relu (x) }")
    for value in (*model.graph.input, *model.graph.output):
        for axis in value.type.tensor_type.shape.dim:
            axis.dim_value = size
    base = opened(write(tmp_path / "m.onnx", model))
    assert base.spec.inputs[0].shape == (None,)
    assert answers(prepared_file(base), random(3, 5))[0].shape == (3, 5)


@pytest.mark.parametrize("opset", [11, 15])
def test_without_an_axis_of_rows_a_row_is_all_that_the_graph_takes(tmp_path: Path, opset: int) -> None:
    text = (
        STREAM if opset == 15 else STREAM.replace("<keepdims = 0> (next, first)", "<keepdims = 0, axes = [0]> (next)")
    )
    path = write(tmp_path / "m.onnx", graph(text, STREAM_WEIGHTS, opset))
    with pytest.raises(ConfigError, match=r"'rate' is a single value.*base\.rows: one the graph runs once per row"):
        opened(path)
    base = opened(path, rows="one")
    assert [item.shape for item in base.spec.inputs] == [(1, None), (2, 1, 4), ()]
    assert [item.shape for item in base.spec.outputs] == [(1, 1), (2, 1, 4)]
    audio, state = random(1, 7), random(2, 1, 4, seed=1)
    for rate in (8000, 16000):
        expected = answers(path, audio, state, np.array(rate))
        given = answers(prepared_file(base), audio[None], state[None], np.array([rate]))
        for one, other in zip(given, expected, strict=True):
            np.testing.assert_array_equal(one[0], other)


def test_time_before_rows_is_served_one_by_one(tmp_path: Path) -> None:
    text = "agraph (float[1, T, 4] x) => (float[T, 1, 4] y) { y = Transpose <perm = [1, 0, 2]> (x) }"
    path = write(tmp_path / "m.onnx", graph(text))
    base = opened(path, rows="one")
    assert (base.spec.inputs[0].shape, base.spec.outputs[0].shape) == ((1, None, 4), (None, 1, 4))
    x = random(1, 5, 4)
    np.testing.assert_array_equal(answers(prepared_file(base), x[None])[0][0], answers(path, x)[0])


def test_inputs_of_which_only_some_count_rows_are_taken_whole(tmp_path: Path) -> None:
    text = "agraph (float[T, 4] x, float[1, 1, 4] h) => (float[T, 4] y) { z = Squeeze (h, first) y = Add (x, z) }"
    base = opened(write(tmp_path / "m.onnx", graph(text, {"first": np.array([0])})), rows="one")
    assert [item.shape for item in base.spec.inputs] == [(None, 4), (1, 1, 4)]


def test_a_config_may_declare_all_axes_of_a_graph(tmp_path: Path) -> None:
    declared = {
        "audio": {"shape": [1, 512]},
        "state": {"shape": [2, 1, 4]},
        "rate": {"dtype": "int64", "shape": []},
    }
    path = write(tmp_path / "m.onnx", graph(STREAM, STREAM_WEIGHTS, 15))
    assert opened(path, rows="one", inputs=declared).spec.inputs[0].shape == (1, 512)
    with pytest.raises(
        ConfigError, match=r"declares float32 \[3\] for the input 'audio', which takes float32 \[1, any\]"
    ):
        opened(path, rows="one", inputs=declared | {"audio": {"shape": [3]}})


def test_init_keeps_such_rows_apart_by_itself_and_sees_the_state(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", graph(STREAM, STREAM_WEIGHTS, 15))
    write_config(str(path), tmp_path / "leanserve.yaml", Hints(), None)
    written = (tmp_path / "leanserve.yaml").read_text()
    assert "  rows: one\n" in written
    assert "  state: {state: next}\n" in written


def test_a_state_has_the_same_sizes_coming_and_going(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", graph(STREAM, STREAM_WEIGHTS, 15))
    base = opened(path, rows="one", state={"state": "next"})
    assert [item.next_from for item in base.spec.inputs] == [None, "next", None]
    with pytest.raises(ConfigError, match=r"base\.state: 'audio' is float32 \[1, None\] per row and 'speech' float32"):
        opened(path, rows="one", state={"audio": "speech"})
    with pytest.raises(ConfigError, match=r"base\.state: the model has no 'h' there; it has speech, next"):
        opened(path, rows="one", state={"state": "h"})


def test_weights_in_nodes_are_initializers_afterwards(tmp_path: Path) -> None:
    model = cnn()
    weights = list(model.graph.initializer)
    del model.graph.initializer[:]
    nodes = [helper.make_node("Constant", [], [item.name], value=item) for item in weights]
    others = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(nodes + others)
    path = write(tmp_path / "m.onnx", model)
    base = opened(path)
    inside = onnx.load(prepared_file(base)).graph
    assert {"kernel", "weight", "bias"} <= {item.name for item in inside.initializer}
    assert not [node for node in inside.node if node.op_type == "Constant"]
    x = random(2, 1, 8, 8)
    np.testing.assert_array_equal(answers(prepared_file(base), x)[0], answers(path, x)[0])


def test_maps_of_a_classic_classifier_are_taken_as_the_tensor_they_are_made_of(tmp_path: Path) -> None:
    classifier = helper.make_node(
        *("LinearClassifier", ["x"], ["label", "scores"]),
        domain="ai.onnx.ml",
        coefficients=[float(value) for value in random(3, 2).ravel()],
        intercepts=[0.1, 0.2, 0.3],
        classlabels_strings=["a", "b", "c"],
        post_transform="SOFTMAX",
    )
    zipped = helper.make_node("ZipMap", ["scores"], ["named"], domain="ai.onnx.ml", classlabels_strings=["a", "b", "c"])
    maps = helper.make_map_type_proto(TensorProto.STRING, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    outputs = [
        helper.make_tensor_value_info("label", TensorProto.STRING, ["N"]),
        helper.make_value_info("named", helper.make_sequence_type_proto(maps)),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    model = helper.make_model(helper.make_graph([classifier, zipped], "g", [x], outputs), opset_imports=opsets)
    model.ir_version = 8
    path = write(tmp_path / "m.onnx", model)
    base = opened(path)
    label, output = base.spec.outputs
    assert (label.name, label.dtype, label.shape) == ("label", "string", ())
    assert base.spec.labels == ("a", "b", "c")
    assert (output.name, output.shape, output.meaning) == ("named", (3,), "probabilities")
    rows = random(4, 2)
    given: Any = onnxruntime.InferenceSession(path).run(["named"], {"x": rows})
    expected = [[row[name] for name in "abc"] for row in given[0]]
    classes, scores = answers(prepared_file(base), rows)
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    assert classes.tolist() == ["abc"[best] for best in scores.argmax(axis=1)]


@pytest.mark.parametrize("opset", [7, 10, 13, 18, 21, 23])
def test_opsets_old_and_new(tmp_path: Path, opset: int) -> None:
    path = write(tmp_path / "m.onnx", cnn(opset=opset))
    x = random(3, 1, 8, 8)
    base = opened(path)
    np.testing.assert_allclose(answers(prepared_file(base), x)[0], answers(path, x)[0], rtol=1e-5, atol=1e-6)


def test_what_cannot_be_converted_is_served_in_its_own_opset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The converter turns some graphs into ones that do not load."""
    from onnx import version_converter

    def wrong(model: onnx.ModelProto, _: int) -> onnx.ModelProto:
        broken = type(model)()
        broken.CopyFrom(model)
        broken.graph.node[0].input[0] = "nothing"
        return broken

    def never(model: onnx.ModelProto, _: int) -> onnx.ModelProto:
        raise RuntimeError("no adapter")

    path = write(tmp_path / "m.onnx", cnn(opset=11))
    for convert in (wrong, never):
        monkeypatch.setattr(version_converter, "convert_version", convert)
        base = opened(path)
        assert onnx.load(prepared_file(base)).opset_import[0].version == 11


def test_half_precision_in_and_out(tmp_path: Path) -> None:
    text = "agraph (float16[N, 4] x) => (float16[N, 3] y) { y = MatMul (x, weight) }"
    weight = numpy_helper.from_array(random(4, 3).astype(np.float16), "weight")
    model = graph(text)
    model.graph.initializer.append(weight)
    base = opened(write(tmp_path / "m.onnx", model))
    assert (base.spec.inputs[0].dtype, base.spec.outputs[0].dtype) == ("float16", "float16")


def test_a_graph_is_tried_on_rows_of_the_users_own(tmp_path: Path) -> None:
    """Of values that it can look up, and of a size that nobody would guess."""
    text = """agraph (float[N, L] x) => (float[N, 2, 73] y) {
        large = Mul (x, thousand)
        places = Cast <to = 7> (large)
        found = Gather (table, places)
        y = Reshape (found, to)
    }"""
    weights = {"thousand": np.array(1000, np.float32), "table": random(5), "to": np.array([0, 2, 73])}
    path = write(tmp_path / "m.onnx", graph(text, weights, 17))
    with pytest.raises(ConfigError, match=r"does not run on \[1, 16\]"):
        opened(path)
    rows = np.random.default_rng(0).integers(0, 5, (40, 146)).astype(np.float32) / 1000 + 1e-4
    np.savez(tmp_path / "rows.npz", x=rows.astype(np.float32))
    asked = {"base": {"onnx": path.name}, "data": {"arrays": "rows.npz"}, "folder": tmp_path}
    base = open_base(Origin.model_validate(asked))
    assert base.spec.inputs[0].shape == (146,)
    assert "takes x as [146], the first sizes on which it ran (base.inputs)" in base.caveats
    np.testing.assert_array_equal(answers(prepared_file(base), rows[:3])[0], answers(path, rows[:3])[0])


def quantized(base: LoadedBase, folder: Path, step: Pass) -> Path:
    evaluate: Any = None
    context = BuildContext(base, 0, this_hardware(), folder, lambda *_: None, evaluate)
    made = step.apply(base.model(), context).model
    assert isinstance(made, OnnxModel)
    return made.path


@pytest.mark.parametrize("step", [QuantizeDynamic(), QuantizeStatic()], ids=["dynamic", "static"])
def test_shared_weights_and_names_that_quantizers_want_survive(tmp_path: Path, step: Pass) -> None:
    """A weight and a bias of two layers, and tensors called as quantizers call theirs."""
    text = """agraph (float[N, 32] x) => (float[N, 32] y) {
        x_scale = MatMul (x, w)
        w_quantized = Add (x_scale, w_bias)
        w_zero_point = Relu (w_quantized)
        x_quantized = MatMul (w_zero_point, w)
        y = Add (x_quantized, w_bias)
    }"""
    path = write(tmp_path / "m.onnx", graph(text, {"w": random(32, 32) / 6, "w_bias": random(32)}))
    x = random(8, 32)
    made = quantized(opened(path), tmp_path, step)
    assert any(node.op_type in {"MatMulInteger", "QuantizeLinear"} for node in onnx.load(made).graph.node)
    for one, other in zip(answers(made, x), answers(path, x), strict=True):
        assert float((one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other)) > 0.99


def test_a_model_that_is_quantized_already_is_served_and_not_quantized_again(tmp_path: Path) -> None:
    source = opened(write(tmp_path / "m.onnx", graph(DENSE, {"w": random(64, 64) / 8})))
    path = quantized(source, tmp_path, QuantizeDynamic())
    base = opened(path)
    x = random(3, 64)
    np.testing.assert_allclose(answers(prepared_file(base), x)[0], answers(path, x)[0], rtol=1e-5, atol=1e-6)
    folder = tmp_path / "again"
    folder.mkdir()
    with pytest.raises(PassFailed, match="would quantize nothing"):
        quantized(base, folder, QuantizeDynamic())


def test_symbolic_names_of_any_kind_are_dynamic_axes(tmp_path: Path) -> None:
    """Exporters write formulas where names belong."""
    model = graph("agraph (float[N, L] x) => (float[N, L] y) { y = Relu (x) }")
    for value in (*model.graph.input, *model.graph.output):
        first, second = value.type.tensor_type.shape.dim
        first.dim_param, second.dim_param = "unk__12", "floor(L/2 - 1) + 7"
    base = opened(write(tmp_path / "m.onnx", model))
    assert base.spec.inputs[0].shape == (None,)
    assert answers(prepared_file(base), random(3, 9))[0].shape == (3, 9)


def test_loops_and_branches_with_weights_inside_run_for_any_number_of_rows(tmp_path: Path) -> None:
    text = """agraph (float[N, 4] x) => (float[N, 4] y) {
        three = Constant <value = int64 {3}> ()
        yes = Constant <value = bool {1}> ()
        y = Loop (three, yes, x) <body = step (int64 i, bool go, float[N, 4] before) => (bool on, float[N, 4] after) {
            on = Identity (go)
            half = Constant <value = float {0.5}> ()
            smaller = Mul (before, half)
            after = Add (smaller, x)
        }>
    }"""
    path = write(tmp_path / "m.onnx", graph(text, opset=17))
    base = opened(path)
    x = random(5, 4)
    np.testing.assert_array_equal(answers(prepared_file(base), x)[0], answers(path, x)[0])


def test_weights_in_nodes_count_as_parameters(tmp_path: Path) -> None:
    model = graph(DENSE, {"w": random(64, 64)})
    weight = model.graph.initializer.pop()
    model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=weight))
    base = opened(write(tmp_path / "m.onnx", model))
    assert graph_size(prepared_file(base)).parameters == 64 * 64


def test_a_fault_of_our_copy_is_not_laid_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from leanserve.bases.sources import onnx_preparation

    def spoilt(model: onnx.ModelProto) -> onnx.ModelProto:
        model.graph.node[0].op_type = "Neg"
        return model

    monkeypatch.setattr(onnx_preparation, "_tidied", spoilt)
    path = write(tmp_path / "m.onnx", graph("agraph (float[N, 4] x) => (float[N, 4] y) { y = Relu (x) }"))
    with pytest.raises(ConfigError, match="as leanserve prepared it, it answers otherwise than the file") as refused:
        opened(path)
    assert "Export it again" not in str(refused.value)
