"""Requests and replies of the Open Inference Protocol against what an independent client writes and reads.

The golden requests are the bytes that `tritonclient.http` 2.73 wrote for these tensors; where it is installed, it is
asked again, and reads our replies.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from leanserve.codecs.open_inference import InferDecoder, InferReply, encode_infer
from leanserve.contracts import Arrays, ModelSpec, TensorSpec
from leanserve.errors import BadInput

SPEC = ModelSpec(
    inputs=(TensorSpec("x", "float32", (3,)), TensorSpec("ids", "int64", (None,)), TensorSpec("text", "string", ())),
    outputs=(
        TensorSpec("scores", "float32", (2,)),
        TensorSpec("name", "string", ()),
        TensorSpec("half", "float16", ()),
    ),
)
X = np.arange(6, dtype=np.float32).reshape(2, 3) / 4
IDS = np.array([[7, -1], [2**40, 0]])
TEXT = np.array(["a", "ézz"], dtype=object)
TEXT_BYTES = b"\x01\x00\x00\x00a\x04\x00\x00\x00\xc3\xa9zz"

GOLDEN_BINARY = (
    b'{"inputs":[{"name":"x","shape":[2,3],"datatype":"FP32","parameters":{"binary_data_size":24}},'
    b'{"name":"ids","shape":[2,2],"datatype":"INT64","parameters":{"binary_data_size":32}},'
    b'{"name":"text","shape":[2],"datatype":"BYTES","parameters":{"binary_data_size":13}}],'
    b'"parameters":{"binary_data_output":true}}',
    b"\x00\x00\x00\x00\x00\x00\x80>\x00\x00\x00?\x00\x00@?\x00\x00\x80?\x00\x00\xa0?"
    b"\x07\x00\x00\x00\x00\x00\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff"
    b"\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00" + TEXT_BYTES,
)
GOLDEN_MIXED = (
    b'{"id":"r-1","inputs":[{"name":"text","shape":[2],"datatype":"BYTES","parameters":{"binary_data_size":13}},'
    b'{"name":"ids","shape":[2,2],"datatype":"INT64","data":[7,-1,1099511627776,0]},'
    b'{"name":"x","shape":[2,3],"datatype":"FP32","parameters":{"binary_data_size":24}}],'
    b'"outputs":[{"name":"name","parameters":{"binary_data":true}},{"name":"scores","parameters":{"binary_data":false}}],'
    b'"parameters":{"priority":2,"timeout":1500,"caller":"ann"}}',
    TEXT_BYTES + b"\x00\x00\x00\x00\x00\x00\x80>\x00\x00\x00?\x00\x00@?\x00\x00\x80?\x00\x00\xa0?",
)


def assert_same(found: Arrays, *wanted: np.ndarray[Any, Any]) -> None:
    assert len(found) == len(wanted)
    for have, want in zip(found, wanted, strict=True):
        assert have.dtype == want.dtype
        assert have.shape == want.shape
        assert have.tolist() == want.tolist()


@pytest.mark.parametrize("buffer", [bytes, bytearray, memoryview])
@pytest.mark.parametrize(("header", "data"), [GOLDEN_BINARY, GOLDEN_MIXED])
def test_golden_requests(buffer: Callable[[bytes], bytes], header: bytes, data: bytes) -> None:
    request = InferDecoder(SPEC).decode(buffer(header + data), len(header))
    assert_same(request.inputs, X, IDS, TEXT)
    assert request.rows == 2


def test_options_of_the_golden_requests() -> None:
    decoder = InferDecoder(SPEC)
    plain = decoder.decode(b"".join(GOLDEN_BINARY), len(GOLDEN_BINARY[0])).options
    assert (plain.id, plain.timeout_us, plain.priority) == ("", None, None)
    assert [(wanted.port.name, wanted.form) for wanted in plain.outputs] == [
        ("scores", "binary"),
        ("name", "binary"),
        ("half", "binary"),
    ]
    rich = decoder.decode(b"".join(GOLDEN_MIXED), len(GOLDEN_MIXED[0])).options
    assert (rich.id, rich.timeout_us, rich.priority, rich.parameters["caller"]) == ("r-1", 1500, 2, "ann")
    assert [(wanted.port.name, wanted.form) for wanted in rich.outputs] == [("name", "binary"), ("scores", "json")]


def test_a_known_header_reads_new_data_and_binary_inputs_are_views() -> None:
    decoder = InferDecoder(ModelSpec((TensorSpec("x", "float32", (3,)),), SPEC.outputs))
    header = json_body(tensor("x", [2, 3], "FP32", size=24))
    for scale in (1, 2, 3):
        body = header + (X * scale).tobytes()
        (array,) = decoder.decode(body, len(header)).inputs
        assert_same((array,), X * np.float32(scale))
        assert np.shares_memory(array, np.frombuffer(body, np.uint8))


def test_kept_headers_are_bounded_and_never_carry_data_or_an_id() -> None:
    decoder = InferDecoder(ModelSpec((TensorSpec("x", "float32", (3,)),), SPEC.outputs))

    def send(**more: Any) -> None:
        header = json_body(tensor("x", [1, 3], "FP32", size=12), **more)
        decoder.decode(header + bytes(12), len(header))

    for number in range(1000):
        send(parameters={"n": number})
        assert 1 <= len(decoder._plans) <= 256
    kept = set(decoder._plans)
    send(id="one of a kind")
    send(parameters={"long": "x" * 5000})
    inline = json_body(tensor("x", [1, 3], "FP32", data=[1, 2, 3]))
    decoder.decode(inline, len(inline))
    assert set(decoder._plans) == kept


def tensor(name: str, shape: Any, datatype: Any, *, data: Any = None, size: Any = None) -> dict[str, Any]:
    sent: dict[str, Any] = {"name": name, "shape": shape, "datatype": datatype}
    if data is not None:
        sent["data"] = data
    if size is not None:
        sent["parameters"] = {"binary_data_size": size}
    return sent


def json_body(*inputs: Any, **more: Any) -> bytes:
    return json.dumps({"inputs": list(inputs), **more}).encode()


X_JSON = tensor("x", [2, 3], "FP32", data=X.tolist())
IDS_JSON = tensor("ids", [2, 2], "INT64", data=IDS.tolist())
TEXT_JSON = tensor("text", [2], "BYTES", data=["a", "é"])


@pytest.mark.parametrize("data", [X.tolist(), X.ravel().tolist()], ids=["nested", "flat"])
def test_json_data_nested_or_flat_in_any_order_of_inputs(data: list[Any]) -> None:
    body = json_body(
        TEXT_JSON, tensor("x", [2, 3], "FP32", data=data), IDS_JSON, id=None, parameters=None, outputs=None
    )
    for json_length in (None, len(body)):
        request = InferDecoder(SPEC).decode(body, json_length)
        assert_same(request.inputs, X, IDS, np.array(["a", "é"], dtype=object))
        assert [wanted.form for wanted in request.options.outputs] == ["json"] * 3


OUTPUTS = (
    np.array([[0.1, 2], [3, -4.5]], dtype=np.float32),
    np.array(["zero", "é"], dtype=object),
    np.array([1, 0.5], dtype=np.float16),
)


def reply_to(reply_parameters: Any = None, answers: Arrays = OUTPUTS, **request: Any) -> InferReply:
    options = InferDecoder(SPEC).decode(json_body(X_JSON, IDS_JSON, TEXT_JSON, **request)).options
    return encode_infer(options, answers, "digits", "int8", reply_parameters)


def test_a_json_reply() -> None:
    body, json_length = reply_to(id="42", outputs=[{"name": "name"}, {"name": "scores"}])
    assert json_length is None
    assert json.loads(body) == {
        "model_name": "digits",
        "model_version": "int8",
        "id": "42",
        "outputs": [
            {"name": "name", "datatype": "BYTES", "shape": [2], "data": ["zero", "é"]},
            {"name": "scores", "datatype": "FP32", "shape": [2, 2], "data": [0.1, 2.0, 3.0, -4.5]},
        ],
    }


def test_a_binary_reply_carries_its_tensors_behind_the_json() -> None:
    body, json_length = reply_to({"rows": 2}, parameters={"binary_data_output": True})
    assert json_length is not None
    reply = json.loads(body[:json_length])
    assert "id" not in reply
    assert reply["parameters"] == {"rows": 2}
    assert [item["parameters"] for item in reply["outputs"]] == [{"binary_data_size": size} for size in (16, 14, 4)]
    assert all("data" not in item for item in reply["outputs"])
    assert body[json_length:] == (
        struct.pack("<4f", 0.1, 2, 3, -4.5) + b"\x04\0\0\0zero\x02\0\0\0\xc3\xa9" + struct.pack("<2e", 1, 0.5)
    )


def test_an_output_says_itself_whether_it_is_binary() -> None:
    wanted = [
        {"name": "half"},
        {"name": "scores", "parameters": {"binary_data": False}},
        {"name": "name", "parameters": {"binary_data": True}},
    ]
    body, json_length = reply_to(parameters={"binary_data_output": True}, outputs=wanted)
    outputs = json.loads(body[:json_length])["outputs"]
    assert [item["name"] for item in outputs] == ["half", "scores", "name"]
    assert ["data" in item for item in outputs] == [False, True, False]
    assert body[json_length:] == struct.pack("<2e", 1, 0.5) + b"\x04\0\0\0zero\x02\0\0\0\xc3\xa9"


def test_arrays_that_are_not_contiguous_or_wider_are_sent_right() -> None:
    transposed = np.asfortranarray(OUTPUTS[0]).astype(np.float64, order="K")
    binary, start = reply_to(None, (transposed, *OUTPUTS[1:]), parameters={"binary_data_output": True})
    assert (binary, start) == reply_to(parameters={"binary_data_output": True})
    one = [{"name": "scores"}]
    assert reply_to(None, (transposed, *OUTPUTS[1:]), outputs=one) == reply_to(outputs=one)


@pytest.mark.parametrize(
    ("name", "answers", "text"),
    [
        ("scores", (np.array([[1, np.nan]], dtype=np.float32), *OUTPUTS[1:]), "'scores' holds NaN or infinity"),
        ("scores", (np.array([[np.inf, 1]], dtype=np.float32), *OUTPUTS[1:]), "'scores' holds NaN or infinity"),
        ("half", OUTPUTS, "'half': FP16"),
    ],
)
def test_what_json_cannot_carry_is_refused_as_json_and_sent_as_binary(name: str, answers: Arrays, text: str) -> None:
    with pytest.raises(BadInput, match=f"{text}.*JSON cannot carry.*binary_data") as refusal:
        reply_to(None, answers, outputs=[{"name": name}])
    assert refusal.value.status == 400
    binary = reply_to(None, answers, outputs=[{"name": name, "parameters": {"binary_data": True}}])
    assert binary.json_length is not None
    assert len(binary.body) > binary.json_length


def test_tritonclient_writes_the_golden_requests_and_reads_our_replies() -> None:
    http = pytest.importorskip("tritonclient.http", reason="the extra oracle; the golden bytes do without it")

    def sent(name: str, array: Any, datatype: str, *, binary: bool) -> Any:
        item = http.InferInput(name, list(array.shape), datatype)
        return item.set_data_from_numpy(array, binary_data=binary)

    x, text = sent("x", X, "FP32", binary=True), sent("text", TEXT, "BYTES", binary=True)
    write = http.InferenceServerClient.generate_request_body
    assert write([x, sent("ids", IDS, "INT64", binary=True), text]) == (b"".join(GOLDEN_BINARY), len(GOLDEN_BINARY[0]))
    wanted = [http.InferRequestedOutput("name"), http.InferRequestedOutput("scores", binary_data=False)]
    options = {"outputs": wanted, "request_id": "r-1", "priority": 2, "timeout": 1500, "parameters": {"caller": "ann"}}
    mixed = write([text, sent("ids", IDS, "INT64", binary=False), x], **options)
    assert mixed == (b"".join(GOLDEN_MIXED), len(GOLDEN_MIXED[0]))

    request = InferDecoder(SPEC).decode(*mixed)
    reply = encode_infer(request.options, OUTPUTS, "digits", "int8")
    result = http.InferenceServerClient.parse_response_body(reply.body, header_length=reply.json_length)
    names = np.array([name.encode() for name in OUTPUTS[1]], dtype=object)  # as these clients give texts
    assert_same((result.as_numpy("scores"), result.as_numpy("name")), OUTPUTS[0], names)
    assert result.get_response()["id"] == "r-1"
