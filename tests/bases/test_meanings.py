"""What an output means: declared, by its last operator, by its looks, by its name; and which one the labels name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from torch import nn
from torch.export import Dim, export, save

from leanserve.bases.description import Tensor
from leanserve.bases.loaded import LoadedBase
from leanserve.bases.meanings import guessed, proven, settled
from leanserve.bases.opening import open_base
from leanserve.bases.origin import Origin
from leanserve.bases.probing import spec_of_inputs
from leanserve.bases.sources.onnx_reading import last_nodes
from leanserve.bases.tracing import traced
from leanserve.config.schema import read_config
from leanserve.contracts import Array, Meaning
from leanserve.errors import ConfigError
from tiny_graphs import graph, random, write

LABELS = ("a", "b", "c")
ROW = Tensor(name="x", dtype="float32", shape=(4,))


def output(name: str = "y", shape: tuple[int | None, ...] = (3,), dtype: str = "float32", **known: Any) -> Tensor:
    return Tensor(name=name, dtype=dtype, shape=shape, **known)


def opened(folder: Path, **base: Any) -> LoadedBase:
    declared = {"base": base, "data": {"synthetic": 8}, "folder": folder}
    return open_base(Origin.model_validate(declared))


def meanings(base: LoadedBase) -> dict[str, Meaning]:
    return {item.name: item.meaning for item in base.spec.outputs}


# By its looks


def rows(width: int) -> Array:
    return np.random.default_rng(0).standard_normal((5, width))


@pytest.mark.parametrize(
    ("values", "meaning"),
    [
        (np.exp(rows(3)) / np.exp(rows(3)).sum(1, keepdims=True), "probabilities"),
        (np.log(np.exp(rows(3)) / np.exp(rows(3)).sum(1, keepdims=True)), "log_probabilities"),
        (rows(20) / np.linalg.norm(rows(20), axis=1, keepdims=True), "embedding"),
        (rows(4) / np.linalg.norm(rows(4), axis=1, keepdims=True), "values"),
        (1 / (1 + np.exp(-rows(3))), "values"),
        (rows(3), "values"),
        (np.ones((5, 1)), "values"),
        (np.full((5, 3), np.nan), "values"),
    ],
)
def test_numbers_on_random_rows_suggest_a_meaning(values: Array, meaning: Meaning) -> None:
    found = guessed(output(shape=(values.shape[1],)), (values[:3], values[3:]))
    assert (found.meaning, found.evidence) == (meaning, "numbers" if meaning != "values" else "none")


def test_so_does_a_name() -> None:
    found = [guessed(output(name), (rows(3),)) for name in ("sentence_embedding", "my_logits", "y")]
    assert [item.meaning for item in found] == ["embedding", "logits", "values"]
    assert guessed(output("embeddings", (None, 3)), (rows(3),)).meaning == "values"
    assert guessed(output("logits", dtype="int64"), (rows(3),)).meaning == "values"


def shares(*shape: int, axis: int) -> Array:
    numbers = np.exp(np.random.default_rng(0).standard_normal(shape))
    return np.asarray(numbers / numbers.sum(axis=axis, keepdims=True))


@pytest.mark.parametrize(
    ("name", "shape", "values", "meaning", "evidence"),
    [
        ("y", (3, None, None), shares(2, 3, 4, 5, axis=1), "classes_first", "numbers"),
        ("y", (None, 6), np.log(shares(2, 4, 6, axis=2)), "classes_last", "numbers"),
        ("logits", (None, 6), rows(24).reshape(5, 4, 6), "classes_last", "name"),
        ("logits", (3, 8, 8), rows(192).reshape(5, 3, 8, 8), "classes_first", "name"),
        ("logits", (8, 8, 3), rows(192).reshape(5, 8, 8, 3), "classes_last", "name"),
        ("y", (3, 8), rows(24).reshape(5, 3, 8), "values", "none"),
        ("y", (1, 8), np.ones((5, 1, 8)), "values", "none"),
    ],
)
def test_maps_of_classes_are_told_by_numbers_or_name(
    name: str, shape: tuple[int | None, ...], values: Array, meaning: Meaning, evidence: str
) -> None:
    found = guessed(output(name, shape), (values[:1], values[1:]))
    assert (found.meaning, found.evidence) == (meaning, evidence)
    if evidence == "numbers":
        assert proven(found, "softmax").evidence == "operator"


def test_a_declared_map_needs_a_fixed_number_of_classes() -> None:
    [told], _ = settle(output("mask", (21, None, None)), labels=(), declared={"mask": "classes_first"})
    assert told == ("mask", "classes_first")
    with pytest.raises(ConfigError, match=r"on the last one a fixed number of classes.* 'mask' \[21, None, None\]"):
        settle(output("mask", (21, None, None)), labels=(), declared={"mask": "classes_last"})


# By the last operator


class Ending(nn.Module):
    """A linear layer with something behind it."""

    def __init__(self, ending: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.ending = ending

    def forward(self, x: torch.Tensor) -> Any:
        return self.ending(self.layer(x))


class InPlace(nn.Module):
    """Works on its input, and has no weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2).softmax(1)


@pytest.mark.parametrize(
    ("module", "meaning", "evidence"),
    [
        (nn.Sequential(nn.Linear(4, 3), nn.Softmax(dim=1)), "probabilities", "operator"),
        (nn.Sequential(nn.Linear(4, 3), nn.LogSoftmax(dim=1)), "log_probabilities", "operator"),
        (nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()), "independent_probabilities", "operator"),
        (Ending(lambda y: y.softmax(1)[:, :, None].flatten(1).double().float()), "probabilities", "operator"),
        (Ending(lambda y: y.softmax(1).detach()), "probabilities", "numbers"),
        (Ending(lambda y: y.reshape(-1, 3, 1).softmax(2)[:, :, 0]), "values", "none"),
        (nn.Linear(4, 3), "values", "none"),
        (nn.Softmax(dim=1), "probabilities", "operator"),
        (InPlace(), "probabilities", "numbers"),
    ],
)
def test_autograd_tells_how_a_module_ends(module: nn.Module, meaning: Meaning, evidence: str) -> None:
    [found] = traced(module.eval().requires_grad_(requires_grad=False), spec_of_inputs((ROW,), "any")).outputs
    assert (found.meaning, found.evidence) == (meaning, evidence)
    assert not any(weight.requires_grad for weight in module.parameters())


HEAD = "agraph (float[rows, 4] x) => ({outputs}) {{ y = MatMul (x, w) {nodes} }}"
WEIGHTS = {"w": random(4, 3)}


def saved(folder: Path, outputs: str, nodes: str = "") -> Path:
    return write(folder / "m.onnx", graph(HEAD.format(outputs=outputs, nodes=nodes), WEIGHTS))


@pytest.mark.parametrize(
    ("nodes", "meaning"),
    [
        ("p = Softmax <axis = 1> (y)", "probabilities"),
        ("p = Softmax <axis = -1> (y)", "probabilities"),
        ("l = LogSoftmax (y) p = Identity (l)", "log_probabilities"),
        ("s = Sigmoid (y) p = Cast <to = 1> (s)", "independent_probabilities"),
        ("s = Softmax (y) d = Cast <to = 11> (s) f = Flatten (d) p = Cast <to = 1> (f)", "probabilities"),
        ("e = Exp (y) k = Constant <value = int64[1] {1}> () t = ReduceSum (e, k) p = Div (e, t)", "probabilities"),
        ("p = Relu (y)", "logits"),
    ],
)
def test_a_graph_tells_how_it_ends(nodes: str, meaning: Meaning) -> None:
    model = graph(HEAD.format(outputs="float[rows, 3] p", nodes=nodes), WEIGHTS)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    [values] = session.run(None, {"x": random(3, 4, seed=1)})
    [operator] = last_nodes(model.graph)
    assert settle(proven(guessed(output("p"), (np.asarray(values),)), operator)) == ([("p", meaning)], 0)


def test_a_softmax_over_parts_of_a_row_is_no_distribution() -> None:
    parts = output("p", (4,))
    seen = guessed(parts, (np.full((3, 4), 0.5),))
    assert proven(seen, "softmax") == parts


def test_what_an_onnx_file_computed_is_what_it_answers(tmp_path: Path) -> None:
    saved(tmp_path, "float[rows, 3] p", "p = Softmax (y)")
    base = opened(tmp_path, onnx="m.onnx", labels=LABELS)
    assert meanings(base) == {"p": "probabilities"}
    computed = (np.array([[0.03, 0.912, 0.058]], np.float32),)
    assert base.codec.encode(computed)[0]["scores"] == {"b": 0.912, "c": 0.058, "a": 0.03}


def test_a_sigmoid_without_labels_may_be_anything() -> None:
    sigmoid = output("p", meaning="independent_probabilities", evidence="operator")
    assert settle(sigmoid, labels=())[0] == [("p", "values")]
    assert settle(sigmoid, labels=(), declared={"p": "independent_probabilities"})[0][0][1] == sigmoid.meaning


def forest(transform: str, values: list[float]) -> onnx.ModelProto:
    """A tree of one split as skl2onnx writes a classifier: class numbers, and behind them probabilities."""
    tree: dict[str, Any] = {
        "nodes_treeids": [0] * 3, "nodes_nodeids": [0, 1, 2], "nodes_featureids": [0] * 3,
        "nodes_values": [0.0] * 3, "nodes_modes": ["BRANCH_LEQ", "LEAF", "LEAF"], "nodes_truenodeids": [1, 0, 0],
        "nodes_falsenodeids": [2, 0, 0], "class_treeids": [0] * 6, "class_nodeids": [1] * 3 + [2] * 3,
        "class_ids": [0, 1, 2] * 2, "class_weights": values, "classlabels_int64s": [0, 1, 2],
        "post_transform": transform,
    }  # fmt: skip
    nodes = [
        helper.make_node("TreeEnsembleClassifier", ["x"], ["label", "scores"], domain="ai.onnx.ml", **tree),
        helper.make_node("Identity", ["scores"], ["probabilities"]),
    ]
    tensor = helper.make_tensor_value_info
    outputs = [tensor("label", 7, ["rows"]), tensor("probabilities", 1, ["rows", 3])]
    made = helper.make_graph(nodes, "forest", [tensor("x", 1, ["rows", 4])], outputs)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(made, opset_imports=opsets, ir_version=8)


def test_classifiers_of_scikit_learn_answer_by_their_second_output(tmp_path: Path) -> None:
    assert last_nodes(forest("SOFTMAX", [0.0] * 6).graph)[1] == "softmax"
    write(tmp_path / "m.onnx", forest("NONE", [0.7, 0.2, 0.1, 0.0, 0.5, 0.5]))
    base = opened(tmp_path, onnx="m.onnx", labels=LABELS)
    assert meanings(base) == {"label": "values", "probabilities": "probabilities"}
    assert base.spec.labelled == 1
    outputs = (np.array([1]), np.array([[0.088, 0.912, 0.0]], np.float32))
    assert base.codec.encode(outputs)[0]["scores"]["b"] == 0.912
    assert base.score(outputs, np.array([1])) == 1.0


def test_an_exported_program_tells_its_last_operator_too(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 3), nn.Softmax(dim=1)).eval()
    save(export(module, (torch.randn(2, 4),), dynamic_shapes=({0: Dim.AUTO},)), tmp_path / "m.pt2")
    base = opened(tmp_path, torch_export="m.pt2", labels=LABELS)
    assert meanings(base) == {"probabilities": "probabilities"}
    assert base.outputs[0].evidence == "operator"


# Which one the labels name


def settle(*found: Tensor, **how: Any) -> tuple[list[tuple[str, Meaning]], int]:
    tensors, labelled = settled(found, how.pop("labels", LABELS), **how)
    return [(item.name, item.meaning) for item in tensors], labelled


PROVEN: dict[str, Any] = {"meaning": "probabilities", "evidence": "operator"}


def test_the_labels_name_the_output_that_has_as_many_classes() -> None:
    boxes = output("boxes", (10, 4))
    assert settle(boxes, output()) == ([("boxes", "values"), ("y", "logits")], 1)
    assert settle(output("raw"), output("p", **PROVEN)) == ([("raw", "values"), ("p", "probabilities")], 1)
    named = output("logits", meaning="logits", evidence="name")
    assert settle(named, output("p", **PROVEN))[1] == 1, "a proof is better than a name"
    sigmoid = output("p", meaning="independent_probabilities", evidence="operator")
    assert settle(sigmoid) == ([("p", "independent_probabilities")], 0)


def test_what_the_labels_name_must_be_clear() -> None:
    with pytest.raises(ConfigError, match=r"classes of 'one' \[3\] or of 'two' \[3\]; .*`outputs: \{one: logits\}`"):
        settle(output("one"), output("two"))
    declared = {"two": "logits", "one": "logits"}
    assert settle(output("one"), output("two"), declared=declared)[1] == 1, "the first declared answers"
    assert settle(output("one"), output("two"), declared={"one": "values"})[1] == 1
    with pytest.raises(ConfigError, match=r"3 labels, and no output has 3 numbers per row: .* 'y' \[4\], 'z' \[\]"):
        settle(output(shape=(4,)), output("z", (), "int64"))
    with pytest.raises(ConfigError, match=r"'y' \[3\] is declared as values, but base.labels names its classes"):
        settle(output(), declared={"y": "values"})


def test_what_is_declared_must_fit() -> None:
    with pytest.raises(ConfigError, match=r"base.outputs: the model has no output 'z'; it gives 'y' \[3\]"):
        settle(output(), declared={"z": "logits"})
    with pytest.raises(ConfigError, match=r"base.outputs: declares 1 outputs; the model gives 'y' \[3\], 'z' \[3\]"):
        settle(output(), output("z"), declared=("logits",))
    for wrong in (output(shape=(3, 4)), output(shape=(None,)), output(dtype="int64")):
        with pytest.raises(ConfigError, match=r"base.outputs: embedding are one list of floats per row"):
            settle(wrong, declared={"y": "embedding"}, labels=())


def test_outputs_without_a_name_are_called_after_what_they_mean() -> None:
    nameless = output("")
    assert settle(nameless) == ([("logits", "logits")], 0)
    assert settle(output("", **PROVEN)) == ([("probabilities", "probabilities")], 0)
    two = (output("", (4,)), output("", **PROVEN))
    assert settle(*two) == ([("output", "values"), ("probabilities", "probabilities")], 1)
    assert settle(*two, labels=())[0] == [("output", "values"), ("output_1", "probabilities")]
    assert settle(*two, declared={"box": "values", "p": "probabilities"})[0] == [
        ("box", "values"),
        ("p", "probabilities"),
    ]
    assert settle(*two, declared=("embedding", "log_probabilities"))[0] == [
        ("embedding", "embedding"),
        ("log_probabilities", "log_probabilities"),
    ]


def test_of_texts_without_labels_a_list_is_an_embedding() -> None:
    tokens = output("tokens", (None, 8))
    assert settle(output(), tokens, labels=(), otherwise="embedding")[0] == [("y", "embedding"), ("tokens", "values")]
    assert settle(output(), labels=(), otherwise="embedding", declared=("values",))[0] == [("y", "values")]


def test_the_config_declares_outputs_of_any_form(tmp_path: Path) -> None:
    saved(tmp_path, "float[rows, 3] y")
    base = opened(tmp_path, onnx="m.onnx", labels=LABELS, outputs={"y": "probabilities"})
    assert meanings(base) == {"y": "probabilities"}
    assert opened(tmp_path, onnx="m.onnx", labels=LABELS).digest != base.digest


@pytest.mark.parametrize(
    ("written", "error"),
    [
        (
            "{y: chances}",
            "c.yaml:1: base.outputs: 'chances' is no meaning of an output; there are logits, probabilities",
        ),
        ("[logits, 1]", "c.yaml:1: base.outputs: 1 is no meaning of an output"),
        ("logits", "c.yaml:1: base.outputs: write a mapping from the name of an output to its meaning, or a list"),
    ],
)
def test_what_is_no_meaning_is_refused_when_the_config_is_read(tmp_path: Path, written: str, error: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"base: {{onnx: m.onnx, outputs: {written}}}\nvariants: [{{name: a}}]\n")
    with pytest.raises(ConfigError) as refused:
        read_config(path)
    assert error in str(refused.value)
    assert str(refused.value).count("\n") == 0
