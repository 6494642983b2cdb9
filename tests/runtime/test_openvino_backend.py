"""OpenVINO's format and backend: several callers at once, the order of the spec, settings that are really taken."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from leanserve.contracts import Array, Arrays, ModelSpec, OnnxModel, Share, TensorSpec
from leanserve.passes.toolkit.openvino_graph import convert
from leanserve.runtime.backends.openvino import OpenVinoBackend
from leanserve.runtime.formats import format_named, open_backend
from leanserve.runtime.formats.openvino import OpenVinoModel

SPEC = ModelSpec(
    (TensorSpec("left", "float32", (64,)), TensorSpec("right", "float32", (64,))),
    (TensorSpec("product", "float32", (64,)), TensorSpec("sum", "float32", (64,))),
)


@pytest.fixture(scope="module")
def weights() -> Array:
    return np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, weights: Array) -> OpenVinoModel:
    """left @ W and left + right, its outputs declared in the other order than the spec has them."""
    tensor = helper.make_tensor_value_info
    ends = [tensor(name, TensorProto.FLOAT, ["rows", 64]) for name in ("left", "right")]
    outs = [tensor(name, TensorProto.FLOAT, ["rows", 64]) for name in ("sum", "product")]
    nodes = [
        helper.make_node("MatMul", ["left", "weights"], ["product"]),
        helper.make_node("Add", ["left", "right"], ["sum"]),
    ]
    graph = helper.make_graph(nodes, "two", ends, outs, [onnx.numpy_helper.from_array(weights, "weights")])
    folder = tmp_path_factory.mktemp("graph")
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "model.onnx"
    )
    return convert(OnnxModel(folder / "model.onnx", SPEC), folder, 1)


def test_a_batch_answers_like_its_rows_alone_in_the_order_of_the_spec(model: OpenVinoModel, weights: Array) -> None:
    left, right = SPEC.example(5)
    backend = open_backend(model, Share(2))
    product, total = backend.run((left, right)).outputs
    np.testing.assert_allclose(product, left @ weights, atol=1e-4)
    np.testing.assert_allclose(total, left + right, atol=1e-6)
    for row in range(5):
        alone = backend.run((left[row : row + 1], right[row : row + 1])).outputs
        np.testing.assert_allclose(alone[0], product[row : row + 1], atol=1e-5)
    backend.close()


def test_answers_stay_when_the_next_batch_runs(model: OpenVinoModel) -> None:
    backend = open_backend(model, Share(1))
    first = backend.run(SPEC.example(3)).outputs[0]
    kept = first.copy()
    backend.run(SPEC.example(3, seed=1))
    assert np.array_equal(first, kept)


def test_more_callers_at_once_than_were_told_each_get_their_own_answers(model: OpenVinoModel) -> None:
    backend = open_backend(model, Share(1, callers=2))
    given = [SPEC.example(4, seed=seed) for seed in range(6)]
    wrong: list[int] = []

    def ask(batch: Arrays) -> None:
        wrong.append(sum(not np.array_equal(backend.run(batch).outputs[1], batch[0] + batch[1]) for _ in range(100)))

    threads = [threading.Thread(target=ask, args=(batch,)) for batch in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [0] * 6


def test_threads_streams_precision_and_pinning_are_set(model: OpenVinoModel) -> None:
    backend = OpenVinoBackend(model.path, model.spec, "f32", threads=1, callers=2)
    taken = {name: backend._compiled.get_property(name) for name in ("NUM_STREAMS", "INFERENCE_NUM_THREADS")}
    assert taken == {"NUM_STREAMS": 2, "INFERENCE_NUM_THREADS": 2}
    assert backend._compiled.get_property("ENABLE_CPU_PINNING") is False
    assert backend._compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() == "f32"


def test_what_is_saved_is_loaded_and_sized(model: OpenVinoModel, tmp_path: Path) -> None:
    form = format_named("openvino")
    form.save(model, tmp_path)
    loaded = form.load(tmp_path, SPEC, lambda: pytest.fail("no torch module is needed"))
    assert form.size(loaded).parameters == 64 * 64
    first, second = (open_backend(item, Share(1)).run(SPEC.example(2)).outputs for item in (model, loaded))
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))
