"""Every way in which an infer request can be wrong is refused with 400 and a text that names the place."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from leanserve.codecs.open_inference import InferDecoder, parse_json_length
from leanserve.codecs.tensors import MOST_TEXTS
from leanserve.contracts import ModelSpec, TensorSpec
from leanserve.errors import BadInput, BodyTooLarge, StartupError

SPEC = ModelSpec(
    inputs=(TensorSpec("x", "float32", (3,)), TensorSpec("ids", "int64", (None,)), TensorSpec("text", "string", ())),
    outputs=(
        TensorSpec("scores", "float32", (2,)),
        TensorSpec("name", "string", ()),
        TensorSpec("half", "float16", ()),
    ),
)
X_BYTES = np.arange(6, dtype=np.float32).tobytes()
TEXT_BYTES = b"\x01\x00\x00\x00a\x04\x00\x00\x00\xc3\xa9zz"


def tensor(name: str, shape: Any, datatype: Any, *, data: Any = None, size: Any = None) -> dict[str, Any]:
    sent: dict[str, Any] = {"name": name, "shape": shape, "datatype": datatype}
    if data is not None:
        sent["data"] = data
    if size is not None:
        sent["parameters"] = {"binary_data_size": size}
    return sent


def json_body(*inputs: Any, **more: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **more}).encode()


X_JSON = tensor("x", [2, 3], "FP32", data=[[0, 1, 2], [3, 4, 5.5]])
IDS_JSON = tensor("ids", [2, 2], "INT64", data=[[7, -1], [2**40, 0]])
TEXT_JSON = tensor("text", [2], "BYTES", data=["a", "é"])


def x(**changes: Any) -> bytes:
    """A request in which only `x` is out of the ordinary; a value `...` removes the key."""
    item = {key: value for key, value in (X_JSON | changes).items() if value is not ...}
    return json_body(item, IDS_JSON, TEXT_JSON)


def ask(**more: Any) -> bytes:
    return json_body(X_JSON, IDS_JSON, TEXT_JSON, **more)


BAD_JSON = {
    "not JSON": (b"{", "not valid JSON"),
    "not UTF-8": (b'{"id":"\xff"}', "not valid JSON"),
    "NaN": (x(data=[[float("nan")] * 3] * 2), "not valid JSON"),
    "nesting bomb": (b"[" * 100_000 + b"]" * 100_000, "not valid JSON"),
    "nested data bomb": (x(data=json.loads("[" * 90 + "]" * 90)), "at axis 0"),
    "not an object": (b"[]", "must be a JSON object"),
    "no inputs": (b"{}", "'inputs' must be an array"),
    "empty inputs": (json_body(), "'x' is missing"),
    "input not an object": (json_body(3), "each input must be an object"),
    "missing": (json_body(X_JSON, TEXT_JSON), "input 'ids' is missing"),
    "twice": (json_body(X_JSON, X_JSON, IDS_JSON, TEXT_JSON), "input 'x' is given twice"),
    "unknown": (json_body(X_JSON, tensor("y", [2], "FP32", data=[1, 2])), "unknown input 'y'"),
    "datatype": (x(datatype="INT32"), "'x' has datatype 'INT32', the model takes FP32 or FP16 or BF16"),
    "datatype of another kind": (x(datatype={"FP32": 1}), "has datatype"),
    "no datatype": (x(datatype=...), "has datatype None"),
    "half as JSON": (x(datatype="FP16"), "'x': FP16 can only be sent as binary data"),
    "no shape": (x(shape=...), "'x' has shape None"),
    "rank": (x(shape=[6]), "'x' has shape [6], the model takes [-1, 3]"),
    "axis": (x(shape=[3, 2]), "'x' has shape [3, 2], the model takes [-1, 3]"),
    "negative axis": (x(shape=[-2, 3]), "'x' has shape [-2, 3]"),
    "float axis": (x(shape=[2.0, 3]), "'x' has shape"),
    "boolean axis": (x(shape=[True, 3], data=[1, 2, 3]), "'x' has shape"),
    "no rows": (x(shape=[0, 3], data=[]), "'x' has shape [0, 3]"),
    "empty axis": (
        json_body(X_JSON, tensor("ids", [2, 0], "INT64", data=[[], []]), TEXT_JSON),
        "'ids' has shape [2, 0]",
    ),
    "overflow": (
        json_body(X_JSON, tensor("ids", [2**62, 2**62], "INT64", data=[1]), TEXT_JSON),
        "'ids' has 1 elements",
    ),
    "rows differ": (
        json_body(X_JSON, tensor("ids", [1, 2], "INT64", data=[1, 2]), TEXT_JSON),
        "differ in their number of rows, which is the first axis (x: 2, ids: 1, text: 2)",
    ),
    "no data": (x(data=...), "'x' has neither 'data' nor"),
    "data not an array": (x(data=5), "'x': 'data' must be an array"),
    "too few elements": (x(data=[1, 2]), "'x' has 2 elements, its shape [2, 3] takes 6"),
    "ragged": (x(data=[[1, 2, 3], [4, 5]]), "at axis 1"),
    "too deep": (x(data=[[[1], [2], [3]]] * 2), "element 0 is an array"),
    "half nested": (x(data=[[1, 2, 3], 4]), "at axis 1"),
    "boolean for a number": (x(data=[1, 2, 3, True, 5, 6]), "'x': element 3 is a boolean (True), not FP32"),
    "string for a number": (x(data=["1" * 10_000] * 6), "element 0 is a string"),
    "null for a number": (x(data=[None] * 6), "element 0 is null"),
    "FP32 out of range": (x(data=[1e39] * 6), "'x': a number is out of the range of FP32"),
    "float for an integer": (
        json_body(X_JSON, tensor("ids", [2, 1], "INT64", data=[1, 2.0]), TEXT_JSON),
        "'ids': element 1 is a float",
    ),
    "INT64 out of range": (
        json_body(X_JSON, tensor("ids", [2, 1], "INT64", data=[1, 2**63]), TEXT_JSON),
        "'ids': a number is out of the range of INT64",
    ),
    "number for BYTES": (json_body(X_JSON, IDS_JSON, tensor("text", [2], "BYTES", data=["a", 1])), "is an integer"),
    "size without header": (x(data=..., parameters={"binary_data_size": 24}), "has no header Inference-Header-Content"),
    "data and size": (x(parameters={"binary_data_size": 24}), "'x' has both 'data' and"),
    "size negative": (x(data=..., parameters={"binary_data_size": -1}), "'binary_data_size' must be an integer"),
    "size boolean": (x(data=..., parameters={"binary_data_size": True}), "'binary_data_size' must be an integer"),
    "size too small": (x(data=..., parameters={"binary_data_size": 23}), "FP32 of shape [2, 3] takes 24"),
    "size too large": (x(data=..., parameters={"binary_data_size": 25}), "FP32 of shape [2, 3] takes 24"),
    "parameters": (x(parameters=[1]), "'parameters' must be an object"),
    "shared memory": (x(data=..., parameters={"shared_memory_region": "r"}), "shared memory is not offered"),
    "id": (ask(id=7), "'id' must be a string"),
    "timeout": (ask(parameters={"timeout": -1}), "parameter 'timeout' must be an integer"),
    "timeout too large": (ask(parameters={"timeout": 2**63}), "parameter 'timeout' must be an integer"),
    "priority": (ask(parameters={"priority": "high"}), "parameter 'priority' must be an integer"),
    "binary_data_output": (ask(parameters={"binary_data_output": 1}), "must be true or false"),
    "sequence": (ask(parameters={"sequence_id": 3, "sequence_start": True}), "has no state to keep"),
    "outputs": (ask(outputs="scores"), "'outputs' must be an array"),
    "output unknown": (ask(outputs=[{"name": "y"}]), "unknown output 'y'; the model has scores, name, half"),
    "output without a name": (ask(outputs=["scores"]), "each output must be an object with a 'name'"),
    "output twice": (ask(outputs=[{"name": "scores"}] * 2), "output 'scores' is asked for twice"),
    "binary_data": (ask(outputs=[{"name": "scores", "parameters": {"binary_data": "yes"}}]), "must be true or false"),
    "classification": (
        ask(outputs=[{"name": "scores", "parameters": {"classification": 3}}]),
        "'classification' is not",
    ),
}


@pytest.mark.parametrize(("body", "text"), BAD_JSON.values(), ids=BAD_JSON)
def test_bad_json_is_refused_with_its_place(body: bytes, text: str) -> None:
    with pytest.raises(BadInput) as refusal:
        InferDecoder(SPEC).decode(body)
    assert text in str(refusal.value)
    assert len(str(refusal.value)) < 400


X_SENT = tensor("x", [2, 3], "FP32", size=24)
TEXT_SENT = tensor("text", [2], "BYTES", size=13)
BAD_BINARY = {
    "too few bytes": (
        json_body(X_SENT, IDS_JSON, TEXT_SENT),
        X_BYTES + TEXT_BYTES[:-1],
        "'text' announces 13 bytes, only 12",
    ),
    "no bytes": (json_body(X_SENT, IDS_JSON, TEXT_SENT), b"", "'x' announces 24 bytes, only 0"),
    "no bytes, first in the JSON": (json_body(TEXT_SENT, X_SENT, IDS_JSON), b"", "'text' announces 13 bytes, only 0"),
    "left over": (json_body(X_SENT, IDS_JSON, TEXT_SENT), X_BYTES + TEXT_BYTES + b"!!", "2 bytes are left over"),
    "left over without binary": (ask(), b"!", "1 bytes are left over"),
    "element too long": (
        ask_text := json_body(X_JSON, IDS_JSON, TEXT_SENT),
        b"\x0a" + bytes(12),
        "element 0 is longer",
    ),
    "elements missing": (ask_text, b"\x09\0\0\0" + b"a" * 9, "end before element 1 of the 2"),
    "no UTF-8": (ask_text, b"\x01\0\0\0\xff\x04\0\0\0abcd", "element 0 is not UTF-8 (invalid start byte)"),
    "a NUL": (ask_text, b"\x01\0\0\0a\x04\0\0\0ab\0d", "element 1 has a NUL character in it"),
    "element surplus": (ask_text, bytes(13), "5 bytes follow the last"),
    "many empty elements": (
        json_body(X_JSON, IDS_JSON, tensor("text", [2**40], "BYTES", size=13)),
        TEXT_BYTES,
        f"BYTES of shape [{2**40}] takes {2**42}",
    ),
    "overflow": (
        json_body(X_JSON, tensor("ids", [2**62, 2**62], "INT64", size=8), TEXT_JSON),
        bytes(8),
        "'ids': 'binary_data_size' is 8",
    ),
}


@pytest.mark.parametrize(("header", "data", "text"), BAD_BINARY.values(), ids=BAD_BINARY)
def test_bad_binary_data_is_refused_with_its_place(header: bytes, data: bytes, text: str) -> None:
    decoder = InferDecoder(SPEC)
    for _ in range(2):  # a kept header is as strict as a new one
        with pytest.raises(BadInput) as refusal:
            decoder.decode(header + data, len(header))
        assert text in str(refusal.value)


def test_more_texts_than_can_be_made_in_a_moment_are_refused() -> None:
    count = MOST_TEXTS + 1
    ask = json_body(X_JSON, IDS_JSON, tensor("text", [count], "BYTES", size=4 * count))
    with pytest.raises(BodyTooLarge, match=f"'text' has {count} texts; at most {MOST_TEXTS} are taken"):
        InferDecoder(SPEC).decode(ask + bytes(4 * count), len(ask))


@pytest.mark.parametrize("header", [b"12a", b"", b"-1", b"+5", b" 5", b"1_0", "12.0", "١٢", b"9" * 19, b"9" * 5000])
def test_a_json_length_that_is_no_plain_number(header: bytes | str) -> None:
    with pytest.raises(BadInput, match="Inference-Header-Content-Length must be a number of bytes"):
        parse_json_length(header)


def test_a_json_length_that_is_a_plain_number() -> None:
    assert [parse_json_length(header) for header in (None, b"0", b"0152", "152")] == [None, 0, 152, 152]


@pytest.mark.parametrize("json_length", [-1, 10**9])
def test_a_json_length_outside_the_body(json_length: int) -> None:
    with pytest.raises(BadInput, match=f"is {json_length}, the body has"):
        InferDecoder(SPEC).decode(ask(), json_length)


def raw_spec(dtype: str, *shape: int | None) -> ModelSpec:
    return ModelSpec((TensorSpec("x", dtype, shape),), SPEC.outputs)


def test_a_raw_body_is_rows_of_the_only_input_and_wants_binary_outputs() -> None:
    request = InferDecoder(raw_spec("float32", 3)).decode(X_BYTES, 0)
    assert request.rows == 2
    assert request.inputs[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert [wanted.form for wanted in request.options.outputs] == ["binary"] * 3
    assert InferDecoder(raw_spec("uint8")).decode(b"abc", 0).inputs[0].tolist() == [97, 98, 99]


@pytest.mark.parametrize(
    ("spec", "body", "text"),
    [
        (SPEC, X_BYTES, "fits one input, the model has 3"),
        (raw_spec("int64", None), bytes(16), "'x' cannot be sent raw"),
        (raw_spec("string"), TEXT_BYTES, "'x' cannot be sent raw"),
        (raw_spec("float32", 3), X_BYTES[1:], "'x': 23 raw bytes are not a whole number of rows of 12 bytes"),
        (raw_spec("float32", 3), b"", "'x': 0 raw bytes"),
    ],
)
def test_a_raw_body_whose_rows_cannot_be_told(spec: ModelSpec, body: bytes, text: str) -> None:
    with pytest.raises(BadInput, match=text):
        InferDecoder(spec).decode(body, 0)


def test_a_boolean_byte_must_be_0_or_1() -> None:
    decoder = InferDecoder(raw_spec("bool"))
    assert decoder.decode(b"\0\1", 0).inputs[0].tolist() == [False, True]
    with pytest.raises(BadInput, match="BOOL element must be the byte 0 or 1"):
        decoder.decode(b"\0\2", 0)


@pytest.mark.parametrize("dtype", ["complex64", "no such thing"])
def test_a_dtype_that_no_datatype_carries_stops_the_start(dtype: str) -> None:
    with pytest.raises(StartupError, match=f"field 'x' has dtype '{dtype}'.*use one of bfloat16, bool"):
        InferDecoder(raw_spec(dtype, 3))


@pytest.mark.parametrize(("values", "fits"), [([0, 11], True), ([12, 0], False), ([0, -1], False)])
@pytest.mark.parametrize("form", ["json", "binary"])
def test_values_that_the_model_cannot_run_with_are_refused(form: str, values: list[int], fits: bool) -> None:  # noqa: FBT001
    spec = ModelSpec((TensorSpec("ids", "int64", (None,), values=(0, 11)),), (TensorSpec("y", "float32", (2,)),))
    if form == "json":
        body, length = json_body(tensor("ids", [1, 2], "INT64", data=values)), None
    else:
        head = json_body(tensor("ids", [1, 2], "INT64", size=16))
        body, length = head + np.array(values, np.int64).tobytes(), len(head)
    decoder = InferDecoder(spec)
    if fits:
        assert decoder.decode(body, length).inputs[0].tolist() == [values]
    else:
        with pytest.raises(BadInput, match=rf"'ids' holds {min(values)} to {max(values)}; the model takes 0 to 11"):
            decoder.decode(body, length)
