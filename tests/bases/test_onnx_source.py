"""ONNX files as bases: what is read from them, what is mended, what is refused and with which advice."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from leanserve.bases.loaded import LoadedBase
from leanserve.bases.opening import open_base
from leanserve.bases.origin import Origin
from leanserve.bases.sources import onnx_file
from leanserve.bases.sources.onnx_reading import read_onnx
from leanserve.codecs.arrays import ArrayCodec
from leanserve.codecs.images import ImageCodec
from leanserve.config.schema import read_config
from leanserve.contracts import Array, Arrays, OnnxModel, TensorSpec
from leanserve.errors import ConfigError, PassFailed
from leanserve.passes.families.quantize.quantize_static import QuantizeStatic
from tiny_base import context_of
from tiny_checkpoints import write_tokenizer
from tiny_graphs import CNN, CNN_WEIGHTS, ENCODER, ENCODER_WEIGHTS, cnn, graph, random, write

IMAGE = {"mode": "L", "size": [8, 8], "mean": [0], "std": [1]}


def opened(path: Path, **declared: Any) -> LoadedBase:
    base = {"onnx": path.name, **declared}
    return open_base(Origin.model_validate({"base": base, "data": {"synthetic": 8}, "folder": path.parent}))


def answers(path: Path, *inputs: Array) -> Arrays:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    return tuple(np.asarray(output) for output in session.run(None, dict(zip(names, inputs, strict=True))))


def served(base: LoadedBase, *inputs: Array) -> Array:
    model = base.model()
    assert isinstance(model, OnnxModel)
    return np.asarray(answers(model.path, *inputs)[0])


def test_names_dtypes_and_shapes_are_the_graphs_own(tmp_path: Path) -> None:
    base = opened(write(tmp_path / "my model.v2.onnx", cnn()))
    assert base.name == "my-model.v2"
    assert base.spec.inputs == (TensorSpec("img", "float32", (1, 8, 8)),)
    assert base.spec.outputs == (TensorSpec("scores", "float32", (3,)),)
    assert isinstance(base.codec, ArrayCodec)
    assert base.caveats == ("synthetic data",)


def test_symbolic_axes_stay_dynamic(tmp_path: Path) -> None:
    base = opened(write(tmp_path / "encoder.onnx", graph(ENCODER, ENCODER_WEIGHTS)))
    assert base.spec.inputs == (
        TensorSpec("input_ids", "int64", (None,)),
        TensorSpec("attention_mask", "int64", (None,)),
    )
    assert base.spec.outputs == (TensorSpec("embedding", "float32", (4,), meaning="embedding"),)


@pytest.mark.parametrize("opset", [9, 11, 13, 17])
def test_a_batch_of_one_written_into_the_graph_is_made_dynamic(tmp_path: Path, opset: int) -> None:
    path = write(tmp_path / "fixed.onnx", cnn(batch=1, reshape=1, opset=opset))
    rows = random(3, 1, 8, 8, seed=9)
    expected = np.concatenate([answers(path, row[None])[0] for row in rows])
    np.testing.assert_allclose(served(opened(path), rows), expected, rtol=1e-5, atol=1e-6)


def test_a_reshape_of_the_newer_exporter_is_mended_too(tmp_path: Path) -> None:
    model = cnn(batch=1, reshape=1)
    reshape = next(node for node in model.graph.node if node.op_type == "Reshape")
    reshape.attribute.append(helper.make_attribute("allowzero", 1))
    assert served(opened(write(tmp_path / "fixed.onnx", model)), random(5, 1, 8, 8)).shape == (5, 3)


def test_what_cannot_be_made_dynamic_is_refused_with_the_way_to_export_it(tmp_path: Path) -> None:
    text = "agraph (float[1, 4] x) => (float[1, 8] y) { y = Concat <axis = 1> (x, extra) }"
    path = write(tmp_path / "fixed.onnx", graph(text, {"extra": random(1, 4)}))
    with pytest.raises(
        ConfigError, match=r"base\.rows: one.*rows \(1\) written into it .* dynamic_axes=\{'x': \{0: 'rows'\}\}"
    ):
        opened(path)
    assert served(opened(path, rows="one"), random(1, 4)).shape == (1, 8)


def test_weights_listed_among_the_inputs_are_no_inputs(tmp_path: Path) -> None:
    model = cnn()
    model.ir_version = 3
    for weight in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims))
    base = opened(write(tmp_path / "old.onnx", model))
    assert [item.name for item in base.spec.inputs] == ["img"]
    assert served(base, random(2, 1, 8, 8)).shape == (2, 3)


def test_a_format_newer_than_the_runtime_is_read(tmp_path: Path) -> None:
    model = cnn(batch=1, reshape=1)
    model.ir_version = onnx.IR_VERSION
    assert served(opened(write(tmp_path / "new.onnx", model)), random(2, 1, 8, 8)).shape == (2, 3)


def test_tensors_beside_the_file_are_folded_in_and_part_of_the_digest(tmp_path: Path) -> None:
    path = tmp_path / "large.onnx"
    onnx.save(cnn(), path, save_as_external_data=True, location="large.data", size_threshold=0)
    before = opened(path)
    model = before.model()
    assert isinstance(model, OnnxModel)
    assert not any(item.external_data for item in onnx.load(model.path, load_external_data=False).graph.initializer)
    np.testing.assert_allclose(served(before, random(2, 1, 8, 8)), answers(path, random(2, 1, 8, 8))[0], rtol=1e-5)
    content = bytearray((tmp_path / "large.data").read_bytes())
    content[0] ^= 1
    (tmp_path / "large.data").write_bytes(content)
    assert opened(path).digest != before.digest
    (tmp_path / "large.data").unlink()
    with pytest.raises(ConfigError, match=r"has tensors in large\.data, which is not beside it"):
        opened(path)


def test_tensors_elsewhere_are_refused(tmp_path: Path) -> None:
    model = cnn()
    (tmp_path / "secret").write_bytes(bytes(1000))
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../secret")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ConfigError, match="must lie beside it"):
        opened(tmp_path / "models" / "m.onnx")


def test_a_model_too_large_for_one_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "large.onnx"
    onnx.save(cnn(), path, save_as_external_data=True, location="large.data", size_threshold=0)
    with (tmp_path / "large.data").open("r+b") as stream:
        stream.truncate(2**31)  # a hole: takes no room
    with pytest.raises(ConfigError, match=r"takes 2\.0 GiB with its tensors, a single ONNX file holds less than 2"):
        read_onnx(path)


@pytest.mark.parametrize("content", [b"", b"not onnx at all", b"\x08\x07"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ConfigError, match=r"m\.onnx is not an ONNX file"):
        opened(tmp_path / "m.onnx")
    with pytest.raises(ConfigError, match=r"base\.onnx: there is no file .*none\.onnx"):
        opened(tmp_path / "none.onnx")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("agraph (float[N, 2] x) => (float[N, 2] y) { y = Softmax <axis = 0> (x) }", "depends on the other rows"),
        (
            "agraph (complex64[N] x) => (complex64[N] y) { y = Identity (x) }",
            "takes complex64, which",
        ),
        ("agraph (bfloat16[N] x) => (bfloat16[N] y) { y = Identity (x) }", "'x' takes bfloat16"),
        ("agraph (float x) => (float y) { y = Neg (x) }", "'x' is a single value; the first axis must count the rows"),
        ("agraph (seq(float[N]) x) => (float y) { y = ReduceSum (x) }", "damaged|'x' is a sequence_type, not a tensor"),
        ("agraph (float[N, 2] x) => (float y) { y = ReduceSum <keepdims = 0> (x) }", r"'y' has shape \[\] for 3 rows"),
        (
            "agraph (float[N, 2] x) => (seq(float[N, 2]) y) { y = SequenceConstruct (x) }",
            "'y' has neither numbers",
        ),
        ("agraph (float[N, 2] x) => (float[N, 2] y) { y = Nag (x) }", "is damaged: .*Nag"),
        ("agraph (float[2, A] x, float[3, A] z) => (float[2, A] y) { y = Neg (x) }", "different fixed first axes"),
        ("agraph (float[N, 2] x) => (float[N, 2] y) { y = LSTM (x, x, x) }", "onnxruntime does not load it"),
    ],
)
def test_graphs_that_cannot_be_served(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        opened(write(tmp_path / "m.onnx", graph(text)))


def test_operators_of_ones_own_are_named(tmp_path: Path) -> None:
    node = helper.make_node("Swizzle", ["x"], ["y"], domain="com.acme")
    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 2]) for name in "xy"]
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.acme", 1)]
    model = helper.make_model(helper.make_graph([node], "g", value[:1], value[1:]), opset_imports=opsets, ir_version=8)
    with pytest.raises(ConfigError, match=r"operators that onnxruntime does not have \(com\.acme::Swizzle\)"):
        opened(write(tmp_path / "m.onnx", model))


def test_functions_inside_the_file_are_no_foreign_operators(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17, "mine" : 1]>
    agraph (float[N, 2] x) => (float[N, 2] y) { y = mine.Twice (x) }
    <opset_import: ["" : 17], domain: "mine"> Twice (a) => (b) { b = Add (a, a) }"""
    base = opened(write(tmp_path / "m.onnx", onnx.parser.parse_model(text)))
    np.testing.assert_array_equal(served(base, np.ones((3, 2), np.float32)), np.full((3, 2), 2, np.float32))


def test_one_scale_per_batch_is_refused_where_a_stranger_can_make_it_huge(tmp_path: Path) -> None:
    text = """agraph (float[N, 4] x) => (float[N, 3] y) {
        whole, scale, zero = DynamicQuantizeLinear (x)
        product = MatMulInteger (whole, weight, zero)
        values = Cast <to = 1> (product)
        y = Mul (values, scale)
    }"""
    weight = np.arange(12, dtype=np.int8).reshape(4, 3)
    path = write(tmp_path / "m.onnx", graph(text, {"weight": weight}))
    with pytest.raises(
        ConfigError, match=r"depends on the other rows of its batch.*say base\.rows: one, and every row"
    ):
        opened(path)
    assert opened(path, rows="one").spec.outputs[0].shape == (3,)


def test_an_image_must_fit_the_only_input(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", cnn())
    base = opened(path, image=IMAGE, labels=["a", "b", "c"])
    assert isinstance(base.codec, ImageCodec)
    assert base.spec.inputs[0].name == "img"
    assert base.spec.labels == ("a", "b", "c")
    with pytest.raises(ConfigError, match=r"rows of \[1, 9, 9\] for the input 'img', which takes \[1, 8, 8\]"):
        opened(path, image=IMAGE | {"size": [9, 9]})
    with pytest.raises(ConfigError, match=r"base\.image: the model takes 2 inputs"):
        opened(write(tmp_path / "two.onnx", graph(ENCODER, ENCODER_WEIGHTS)), image=IMAGE)
    with pytest.raises(ConfigError, match=r"base\.labels: 2 labels, and no output has 2 numbers .* 'scores' \[3\]"):
        opened(path, labels=["a", "b"])


def test_the_config_may_fix_what_the_graph_leaves_open(tmp_path: Path) -> None:
    text = CNN.format(batch="N", reshape=0).replace("8, 8", "h, w")
    path = write(tmp_path / "m.onnx", graph(text, CNN_WEIGHTS))
    assert opened(path, rows="one_length").spec.inputs[0].shape == (1, None, None)
    assert opened(path, image=IMAGE).spec.inputs[0].shape == (1, 8, 8)
    declared = {"img": {"shape": [1, 8, None]}}
    assert opened(path, rows="one_length", inputs=declared).spec.inputs[0].shape == (1, 8, None)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"image": {"shape": [1, 8, 8]}}, r"base\.inputs: the model takes img, not image"),
        ({"img": {"shape": [1, 8]}}, r"rows of \[1, 8\] for the input 'img', which takes \[1, 8, 8\]"),
        ({"img": {"shape": [1, 8, 8], "dtype": "uint8"}}, "declares uint8 for the input 'img', which takes float32"),
    ],
)
def test_declared_inputs_must_be_those_of_the_graph(tmp_path: Path, inputs: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        opened(write(tmp_path / "m.onnx", cnn()), inputs=inputs)


def test_texts_become_the_tokens_of_the_graph(tmp_path: Path) -> None:
    path = write(tmp_path / "encoder.onnx", graph(ENCODER, ENCODER_WEIGHTS))
    tokenizer = write_tokenizer(tmp_path)
    base = opened(path, text={"tokenizer": tokenizer.name})
    decoded = base.codec.decode("application/json", b'{"inputs": ["the cat sat", "a dog"]}')
    assert [array.shape for array in decoded.inputs] == [(2, 5), (2, 5)]
    alone = base.codec.decode("text/plain", b"a dog")
    np.testing.assert_allclose(served(base, *decoded.inputs)[1:], served(base, *alone.inputs), rtol=1e-5)


def test_texts_need_a_dynamic_length(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", graph(ENCODER.replace("length]", "12]"), ENCODER_WEIGHTS))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"base\.text: the input 'input_ids' takes rows of \[12\]"):
        opened(path, text={"tokenizer": "tokenizer.json"})


def test_torch_passes_are_refused_when_the_config_is_read(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "base: {onnx: m.onnx}\nvariants:\n  - {name: a, passes: [{kind: fold_bn}, {kind: onnxruntime}]}\n"
    )
    with pytest.raises(ConfigError, match=r"c\.yaml:3: .*'fold_bn'.*of the form 'onnx' apply only: .*onnxruntime"):
        read_config(tmp_path / "c.yaml")


def test_describing_imports_neither_torch_nor_the_runtime(tmp_path: Path) -> None:
    write(tmp_path / "m.onnx", cnn())
    program = (
        "import sys; from leanserve.bases.opening import *;"
        f"origin = dict(base=dict(onnx='m.onnx'), data=dict(synthetic=8), folder={str(tmp_path)!r});"
        "base = open_base(Origin.model_validate(origin)); base.digest; base.model();"
        "print(*{'torch', 'onnxruntime'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_half_precision_is_left_alone_by_quantization(tmp_path: Path) -> None:
    text = "agraph (float16[N, 4] x) => (float16[N, 3] y) { y = MatMul (x, weight) }"
    base = opened(write(tmp_path / "m.onnx", graph(text, {"weight": random(4, 3).astype(np.float16)})))
    context = context_of(base, tmp_path)
    with pytest.raises(PassFailed, match="no convolution or linear layer with constant weights"):
        QuantizeStatic().apply(base.model(), context)


def test_the_prepared_file_goes_with_its_base(tmp_path: Path) -> None:
    base = opened(write(tmp_path / "m.onnx", cnn()))
    model = base.model()
    assert isinstance(model, OnnxModel)
    assert model.path.exists()
    del base
    gc.collect()
    assert not model.path.parent.exists()


def test_a_file_that_was_replaced_meanwhile_is_refused(tmp_path: Path) -> None:
    base = opened(write(tmp_path / "m.onnx", cnn()))
    write(tmp_path / "m.onnx", graph("agraph (float[N, 4] x) => (float[N, 4] y) { y = Relu (x) }"))
    with pytest.raises(ConfigError, match="its files have changed since it was opened"):
        base.model()


def test_another_runtime_is_another_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = opened(write(tmp_path / "m.onnx", cnn())).digest
    monkeypatch.setattr(onnx_file, "library_version", lambda library: "0.0" if library == "onnxruntime" else "1.0")
    after = opened(tmp_path / "m.onnx").digest
    monkeypatch.setattr(onnx_file, "library_version", lambda _: "1.0")
    assert len({before, after, opened(tmp_path / "m.onnx").digest}) == 3


def test_class_names_in_a_file_are_read_when_they_change(tmp_path: Path) -> None:
    write(tmp_path / "m.onnx", cnn())
    cache = {"cache": tmp_path / "cache", "data": {"synthetic": 8}, "folder": tmp_path}
    origin = Origin.model_validate({"base": {"onnx": "m.onnx", "labels": "labels.txt"}, **cache})
    for names in (("a", "b", "c"), ("a", "b", "d")):
        (tmp_path / "labels.txt").write_text("\n".join(names))
        assert open_base(origin).spec.labels == names
