"""Metadata, configuration and statistics as the clients of the Open Inference Protocol read them."""

from __future__ import annotations

import orjson

from leanserve.codecs.description import Compute, Counters, model_config, model_metadata, statistics
from leanserve.contracts import ModelSpec, TensorSpec

SPEC = ModelSpec(
    inputs=(TensorSpec("ids", "int64", (None,)), TensorSpec("x", "float32", (3, 8))),
    outputs=(TensorSpec("label", "string", ()), TensorSpec("vector", "bfloat16", (4,))),
)


def test_metadata_leads_every_shape_with_the_rows() -> None:
    assert model_metadata(SPEC, "digits", ("fp32", "int8"), "onnxruntime") == {
        "name": "digits",
        "versions": ["fp32", "int8"],
        "platform": "onnxruntime",
        "inputs": [
            {"name": "ids", "datatype": "INT64", "shape": [-1, -1]},
            {"name": "x", "datatype": "FP32", "shape": [-1, 3, 8]},
        ],
        "outputs": [
            {"name": "label", "datatype": "BYTES", "shape": [-1]},
            {"name": "vector", "datatype": "BF16", "shape": [-1, 4]},
        ],
    }


def test_the_configuration_gives_the_dims_of_one_row() -> None:
    assert model_config(SPEC, "digits", "onnxruntime", max_rows=32, batch_rows=(8, 32), max_delay_us=500) == {
        "name": "digits",
        "platform": "onnxruntime",
        "max_batch_size": 32,
        "input": [
            {"name": "ids", "data_type": "TYPE_INT64", "dims": [-1]},
            {"name": "x", "data_type": "TYPE_FP32", "dims": [3, 8]},
        ],
        "output": [
            {"name": "label", "data_type": "TYPE_STRING", "dims": []},
            {"name": "vector", "data_type": "TYPE_BF16", "dims": [4]},
        ],
        "dynamic_batching": {"preferred_batch_size": [8, 32], "max_queue_delay_microseconds": 500},
    }


def test_statistics_add_up_what_was_counted() -> None:
    counters = Counters(last_inference_ms=1_700_000_000_000, inference_count=5, execution_count=2)
    for ns in (100, 250):
        counters.success.add(ns)
    counters.queue.add(40)
    counters.compute.compute_infer.add(60)
    counters.batches[4] = Compute()
    counters.batches[1] = Compute()
    counters.batches[4].compute_infer.add(60)
    body = orjson.loads(orjson.dumps(statistics([("digits", "int8", counters), ("digits", "fp32", Counters())])))
    busy, idle = body["model_stats"]
    none = {"count": 0, "ns": 0}
    assert busy == {
        "name": "digits",
        "version": "int8",
        "last_inference": 1_700_000_000_000,
        "inference_count": 5,
        "execution_count": 2,
        "inference_stats": {
            "success": {"count": 2, "ns": 350},
            "fail": none,
            "queue": {"count": 1, "ns": 40},
            "compute_input": none,
            "compute_infer": {"count": 1, "ns": 60},
            "compute_output": none,
            "cache_hit": none,
            "cache_miss": none,
        },
        "batch_stats": [
            {"batch_size": 1, "compute_input": none, "compute_infer": none, "compute_output": none},
            {
                "batch_size": 4,
                "compute_input": none,
                "compute_infer": {"count": 1, "ns": 60},
                "compute_output": none,
            },
        ],
    }
    assert (idle["version"], idle["last_inference"], idle["batch_stats"]) == ("fp32", 0, [])
