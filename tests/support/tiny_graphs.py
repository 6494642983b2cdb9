"""ONNX files in miniature, written in ONNX's own text form as exporters would have written them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.parser import parse_model

HEAD = '<ir_version: {ir}, opset_import: ["" : {opset}]>'

CNN = """
agraph (float[{batch}, 1, 8, 8] img) => (float[{batch}, 3] scores) {{
    features = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (img, kernel)
    positive = Relu (features)
    pooled = GlobalAveragePool (positive)
    target = Constant <value = int64[2] {{{reshape}, -1}}> ()
    flat = Reshape (pooled, target)
    scores = Gemm (flat, weight, bias)
}}
"""
"""A convolutional net; with a fixed `batch` its reshape is fixed too, as a traced `view(1, -1)` is."""

ENCODER = """
agraph (int64[rows, length] input_ids, int64[rows, length] attention_mask) => (float[rows, 4] embedding) {
    vectors = Gather (table, input_ids)
    mask = Cast <to = 1> (attention_mask)
    last = Constant <value = int64[1] {2}> ()
    weights = Unsqueeze (mask, last)
    masked = Mul (vectors, weights)
    one = Constant <value = int64[1] {1}> ()
    total = ReduceSum <keepdims = 0> (masked, one)
    tokens = ReduceSum <keepdims = 1> (mask, one)
    embedding = Div (total, tokens)
}
"""
"""The mean of the vectors of all tokens that are not padding."""


def random(*shape: int, seed: int = 0) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


CNN_WEIGHTS = {"kernel": random(4, 1, 3, 3), "weight": random(4, 3, seed=1), "bias": random(3, seed=2)}
ENCODER_WEIGHTS = {"table": random(30, 4)}


def graph(
    text: str,
    weights: dict[str, np.ndarray] | None = None,
    opset: int = 17,
    ir: int = 8,
) -> onnx.ModelProto:
    """A model from its text form and its weights."""
    model = parse_model(HEAD.format(ir=ir, opset=opset) + text)
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in (weights or {}).items())
    return model


def write(path: Path, model: onnx.ModelProto) -> Path:
    onnx.save(model, path)
    return path


def cnn(batch: int | str = "rows", reshape: int = 0, opset: int = 17) -> onnx.ModelProto:
    """`CNN` with a fixed or a dynamic batch axis."""
    return graph(CNN.format(batch=batch, reshape=reshape), CNN_WEIGHTS, opset)
