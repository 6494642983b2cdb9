"""Arithmetic and parameters of ONNX graphs, counted from shapes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from leanserve.runtime.formats.onnx_size import graph_size
from tiny_graphs import CNN, CNN_WEIGHTS, cnn, graph, random, write


def size(path: Path, model: onnx.ModelProto) -> tuple[int, int]:
    return graph_size(write(path / "m.onnx", model))


def test_convolutions_and_matrix_products_count_per_row(tmp_path: Path) -> None:
    parameters = 4 * 9 + 4 * 3 + 3
    assert size(tmp_path, cnn()) == (8 * 8 * 4 * 9 + 4 * 3, parameters)


def test_a_dynamic_axis_counts_as_sixteen(tmp_path: Path) -> None:
    model = graph(CNN.format(batch="N", reshape=0).replace("8, 8", "h, w"), CNN_WEIGHTS)
    assert size(tmp_path, model)[0] == 16 * 16 * 4 * 9 + 4 * 3


def test_products_of_activations_count(tmp_path: Path) -> None:
    text = """agraph (float[N, s, 4] x) => (float[N, s, 4] y) {
        turned = Transpose <perm = [0, 2, 1]> (x)
        scores = MatMul (x, turned)
        y = MatMul (scores, x)
    }"""
    assert size(tmp_path, graph(text)) == (2 * 16 * 16 * 4, 0)


def test_transposed_convolutions_and_matrices(tmp_path: Path) -> None:
    text = """agraph (float[N, 4, 5, 5] x) => (float[N, 2, 11, 11] y) {
        y = ConvTranspose <kernel_shape = [3, 3], strides = [2, 2]> (x, kernel)
    }"""
    assert size(tmp_path, graph(text, {"kernel": random(4, 2, 3, 3)})) == (4 * 5 * 5 * 2 * 9, 72)
    text = "agraph (float[4, N] x) => (float[N, 3] y) { y = Gemm <transA = 1> (x, weight) }"
    model = graph(text, {"weight": random(4, 3)})
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 1
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    assert size(tmp_path, model) == (12, 12)


@pytest.mark.parametrize(
    "text",
    [
        "agraph (float[N, 1, 2] x) => (float[N, 1, 1, 4] y) { y = LSTM <hidden_size = 4> (x, w, r) }",
        "agraph (float[N, 2] x) => (float[a, b] y) { places = NonZero (x) some = Cast <to = 1> (places)"
        " y = MatMul (some, w) }",
    ],
)
def test_what_cannot_be_told_is_unknown(tmp_path: Path, text: str) -> None:
    weights = {"w": random(1, 16, 2), "r": random(1, 16, 4)}
    assert size(tmp_path, graph(text, weights)) == (0, sum(array.size for array in weights.values()))


def test_sizes_that_the_graph_computes_are_worked_out(tmp_path: Path) -> None:
    """Exporters write the numbers of a padding as arithmetic on constants."""
    text = """agraph (float[N, 1, 4, 4] x) => (float[N, 2, 4, 4] y) {
        none = ConstantOfShape (six)
        pads = Concat <axis = 0> (none, ends)
        padded = Pad (x, pads)
        y = Conv <kernel_shape = [3, 3]> (padded, kernel)
    }"""
    weights = {"six": np.array([6]), "ends": np.array([2, 2]), "kernel": random(2, 1, 3, 3)}
    model = graph(text, weights)
    none = next(node for node in model.graph.node if node.op_type == "ConstantOfShape")
    none.attribute.append(onnx.helper.make_attribute("value", onnx.numpy_helper.from_array(np.zeros(1, np.int64))))
    assert size(tmp_path, model) == (4 * 4 * 2 * 9, 18)


def test_indices_are_no_parameters(tmp_path: Path) -> None:
    text = "agraph (int64[N] x) => (float[N, 2] y) { moved = Add (x, one) y = Gather (table, moved) }"
    weights = {"one": np.array([1]), "table": random(9, 2)}
    assert size(tmp_path, graph(text, weights)) == (0, 18)
