"""Rows of different length in one request: cut to their own length where they must not meet, and put in order again."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from fakes import PixelBase, planned, serving
from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.arrays import ArrayCodec
from leanserve.config.schema import ServiceConfig
from leanserve.contracts import Arrays, Decoded, ModelSpec, Result, RowsTogether, TensorSpec
from leanserve.runtime.device import Device
from leanserve.serving.length_groups import cut_to_length, in_order, length_groups
from text_fleet import CLS, SEP, WORDS, embedded, live_texts
from text_fleet import SPEC as TEXTS

SPEC = ModelSpec(
    (TensorSpec("x", "float32", (None, 1)), TensorSpec("n", "float32", (2,))),
    (TensorSpec("mean", "float32", (1,)), TensorSpec("each", "float32", (None, 1))),
    rows="one_length",
)


class Means:
    """Answers with the mean over the sequence, padding included, and the sequence; remembers the shapes it ran."""

    name = "means"
    self_contained = False
    device = "cpu"
    row_buckets: tuple[int, ...] = ()

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def run(self, batch: Arrays) -> Result:
        self.shapes.append(batch[0].shape)
        return Result((batch[0].mean(1), batch[0]))

    def close(self) -> None: ...


def test_rows_are_grouped_by_like_length_or_by_their_very_length() -> None:
    lengths = [17, 16, 1, 32, 17]
    assert length_groups(lengths) == [[1, 2], [0, 3, 4]]
    for rows in ("one_length", "one"):
        assert length_groups(lengths, rows) == [[2], [1], [0, 4], [3]]


def test_a_group_is_cut_to_its_length_where_the_length_varies() -> None:
    inputs = (np.arange(12, dtype=np.float32).reshape(3, 4, 1), np.arange(6, dtype=np.float32).reshape(3, 2))
    x, n = cut_to_length(Decoded(inputs, many=True, lengths=(2, 4, 2)), SPEC, [0, 2])
    assert x.tolist() == [[[0], [1]], [[8], [9]]]
    assert n.tolist() == [[0, 1], [4, 5]]
    assert in_order(["ac", "b"], [[0, 2], [1]]) == ["a", "b", "c"]


@pytest.mark.parametrize("rows", ["one_length", "one"])
def test_ragged_arrays_of_one_request_are_not_padded(rows: RowsTogether) -> None:
    spec, backend, gate = replace(SPEC, rows=rows), Means(), threading.Event()
    config = ServiceConfig.model_validate({"base": "means", "variants": [{"name": "a"}], "drain": {"delay_s": 0}})
    base = PixelBase()
    base.spec, base.codec = spec, ArrayCodec(AnswerEncoder(spec))
    opened = planned(config, base, Device("cpu", 1))
    opened.warm.open("a", lambda threads: backend)
    backend.shapes.clear()
    sequences = [[1, 2, 3], [5], [4, 4, 4], [2, 4]]
    inputs = {"x": [[[value] for value in values] for values in sequences], "n": [[0, 0]] * 4}
    with serving(opened, gate) as live:
        reply = httpx.post(f"http://{live.http}/v1/predict", json={"inputs": inputs}).json()
    assert [answer["outputs"]["mean"] for answer in reply["predictions"]] == [[2], [5], [4], [3]]
    assert [answer["outputs"]["each"] for answer in reply["predictions"]] == inputs["x"]
    assert {shape[1] for shape in backend.shapes} == {1, 2, 3}
    assert max(shape[0] for shape in backend.shapes) == (2 if rows == "one_length" else 1)


@pytest.mark.parametrize("rows", ["one_length", "one"])
def test_texts_of_one_request_are_not_padded(tmp_path: Path, rows: RowsTogether) -> None:
    texts = ["a b", "a", "one two three", "b c"]
    right = [embedded([CLS, *map(WORDS.index, text.split()), SEP]) for text in texts]
    with live_texts(tmp_path, spec=replace(TEXTS, rows=rows)) as live:
        predicted = httpx.post(f"http://{live.http}/v1/predict", json={"inputs": texts}).json()["predictions"]
        body = {"model": "words", "input": texts}
        data = httpx.post(f"http://{live.http}/v1/embeddings", json=body).json()["data"]
        batches = live.fleet.variants["a"].metrics.padding_tokens + live.fleet.variants["b"].metrics.padding_tokens
    np.testing.assert_allclose([answer["embedding"] for answer in predicted], right, rtol=1e-5)
    np.testing.assert_allclose([item["embedding"] for item in data], right, rtol=1e-5)
    assert batches == 0
