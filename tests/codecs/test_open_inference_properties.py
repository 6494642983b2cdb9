"""For every datatype: what an independent encoder (struct) writes is what the codec reads, and the other way round.

And for arbitrary bytes: an answer is a request that fits the spec, or a refusal; never anything else.
"""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from leanserve.codecs.open_inference import InferDecoder, encode_infer
from leanserve.contracts import ModelSpec, TensorSpec
from leanserve.errors import BadInput

few = settings(deadline=None, max_examples=80)
many = settings(deadline=None, max_examples=600)

# datatype: dtype of the field, struct format, and the range of integers or the width of floats
CODES = {8: "b", 16: "h", 32: "i", 64: "q"}
SIGNED = {f"INT{n}": (f"int{n}", code, (-(2 ** (n - 1)), 2 ** (n - 1) - 1)) for n, code in CODES.items()}
INTEGERS = SIGNED | {f"UINT{n}": (f"uint{n}", code.upper(), (0, 2**n - 1)) for n, code in CODES.items()}
FLOATS: dict[str, tuple[str, str, Literal[16, 32, 64]]] = {
    "FP16": ("float16", "e", 16),
    "FP32": ("float32", "f", 32),
    "FP64": ("float64", "d", 64),
}
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 3))


def spec(dtype: str) -> ModelSpec:
    field = TensorSpec("t", dtype, (None,))
    return ModelSpec((field,), (field,))


def request(
    datatype: str, shape: tuple[int, int], *, data: Any = None, binary: bytes | None = None
) -> tuple[bytes, int]:
    tensor: dict[str, Any] = {"name": "t", "shape": shape, "datatype": datatype}
    tensor |= {"data": data} if binary is None else {"parameters": {"binary_data_size": len(binary)}}
    header = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": binary is not None}}).encode()
    return header + (binary or b""), len(header)


def values_of(datatype: str, count: int) -> st.SearchStrategy[list[Any]]:
    if datatype in INTEGERS:
        low, high = INTEGERS[datatype][2]
        return st.lists(st.integers(low, high), min_size=count, max_size=count)
    if datatype == "BOOL":
        return st.lists(st.booleans(), min_size=count, max_size=count)
    return st.lists(st.floats(width=FLOATS[datatype][2], allow_nan=False), min_size=count, max_size=count)


FIXED = {"BOOL": ("bool", "?"), **{n: k[:2] for n, k in INTEGERS.items()}, **{n: k[:2] for n, k in FLOATS.items()}}


@pytest.mark.parametrize("datatype", FIXED)
@few
@given(draw=st.data())
def test_binary_round_trip(datatype: str, draw: st.DataObject) -> None:
    dtype, code = FIXED[datatype]
    shape = draw.draw(SHAPES)
    values = draw.draw(values_of(datatype, shape[0] * shape[1]))
    binary = struct.pack(f"<{len(values)}{code}", *values)
    decoded = InferDecoder(spec(dtype)).decode(*request(datatype, shape, binary=binary))
    (array,) = decoded.inputs
    assert (array.shape, array.dtype.name, array.ravel().tolist()) == (shape, dtype, values)
    reply = encode_infer(decoded.options, decoded.inputs, "m", "1")
    assert reply.body[reply.json_length :] == binary


@pytest.mark.parametrize("datatype", [name for name in FIXED if name != "FP16"])
@few
@given(draw=st.data())
def test_json_round_trip(datatype: str, draw: st.DataObject) -> None:
    rows, columns = shape = draw.draw(SHAPES)
    values = draw.draw(
        values_of(datatype, rows * columns).filter(lambda flat: all(abs(v) != float("inf") for v in flat))
    )
    nested = [values[row * columns : (row + 1) * columns] for row in range(rows)]
    for data in (values, nested):
        decoded = InferDecoder(spec(FIXED[datatype][0])).decode(request(datatype, shape, data=data)[0])
        assert decoded.inputs[0].tolist() == nested
        reply = json.loads(encode_infer(decoded.options, decoded.inputs, "m", "1").body)
        (output,) = reply["outputs"]
        # a float32 is written with as few digits as tell it apart, so that it reads as the same float32
        assert np.array(output["data"], dtype=decoded.inputs[0].dtype).tolist() == values
        assert (output["shape"], output["datatype"]) == (list(shape), datatype)


@pytest.mark.parametrize("datatype", INTEGERS)
@pytest.mark.parametrize("beyond", [-1, 1])
def test_the_range_of_an_integer_datatype_is_exact(datatype: str, beyond: int) -> None:
    dtype, _, (low, high) = INTEGERS[datatype]
    decoder, edge = InferDecoder(spec(dtype)), high if beyond > 0 else low
    assert decoder.decode(request(datatype, (1, 1), data=[edge])[0]).inputs[0].tolist() == [[edge]]
    with pytest.raises(BadInput, match=r"input 't'.*out of the range|input 't'.*is a float"):
        decoder.decode(request(datatype, (1, 1), data=[edge + beyond])[0])


TEXT = st.characters(exclude_characters="\0", exclude_categories=["Cs"])
"""What texts are made of: a NUL would end them in runtimes written in C."""


@few
@given(texts=st.lists(st.text(TEXT, max_size=20), min_size=1, max_size=8))
def test_bytes_round_trip(texts: list[str]) -> None:
    elements = [text.encode() for text in texts]
    binary = b"".join(struct.pack("<I", len(element)) + element for element in elements)
    decoded = InferDecoder(spec("string")).decode(*request("BYTES", (len(texts), 1), binary=binary))
    assert decoded.inputs[0].ravel().tolist() == texts
    reply = encode_infer(decoded.options, decoded.inputs, "m", "1")
    assert reply.body[reply.json_length :] == binary


@few
@given(texts=st.lists(st.text(TEXT, max_size=20), min_size=1, max_size=8))
def test_text_round_trip(texts: list[str]) -> None:
    decoded = InferDecoder(spec("string")).decode(request("BYTES", (len(texts), 1), data=texts)[0])
    assert decoded.inputs[0].ravel().tolist() == texts
    assert json.loads(encode_infer(decoded.options, decoded.inputs, "m", "1").body)["outputs"][0]["data"] == texts


@pytest.mark.parametrize(("dtype", "same"), [("bfloat16", True), ("float32", False)])
@few
@given(patterns=st.lists(st.integers(0, 0xFFFF), min_size=1, max_size=8))
def test_bf16_is_the_upper_half_of_a_float32(dtype: str, *, same: bool, patterns: list[int]) -> None:
    binary = struct.pack(f"<{len(patterns)}H", *patterns)
    decoded = InferDecoder(spec(dtype)).decode(*request("BF16", (len(patterns), 1), binary=binary))
    assert decoded.inputs[0].dtype == np.float32
    wide = b"".join(b"\0\0" + struct.pack("<H", pattern) for pattern in patterns)
    assert decoded.inputs[0].tobytes() == wide
    reply = encode_infer(decoded.options, decoded.inputs, "m", "1")
    quiet = [pattern | 0x40 if pattern & 0x7FFF > 0x7F80 else pattern for pattern in patterns]
    assert reply.body[reply.json_length :] == (struct.pack(f"<{len(quiet)}H", *quiet) if same else wide)


@few
@given(bits=st.integers(0, 2**32 - 1))
@example(bits=0x3F80_8000)  # a tie above an even pattern: down
@example(bits=0x3F81_8000)  # a tie above an odd pattern: up
@example(bits=0x7F7F_FFFF)  # the largest float32: infinity
@example(bits=0xFF80_0001)  # a NaN whose payload is all in the half cut off
def test_bf16_rounds_to_nearest_even_and_keeps_nan(bits: int) -> None:
    decoded = InferDecoder(spec("bfloat16")).decode(*request("BF16", (1, 1), binary=b"\0\0"))
    value = np.frombuffer(struct.pack("<I", bits), "<f4").reshape(1, 1)
    reply = encode_infer(decoded.options, (value,), "m", "1")
    (found,) = struct.unpack("<H", reply.body[reply.json_length :])
    above, below = bits >> 16, bits & 0xFFFF
    if bits & 0x7FFF_FFFF > 0x7F80_0000:
        assert found == above | 0x40
    else:
        assert found == (above + 1 if below > 0x8000 or (below == 0x8000 and above % 2) else above)


def test_half_floats_widen_exactly_into_a_float32_field() -> None:
    decoded = InferDecoder(spec("float32")).decode(*request("FP16", (2, 1), binary=struct.pack("<2e", 0.1, -6e-8)))
    assert decoded.inputs[0].dtype == np.float32
    assert decoded.inputs[0].ravel().tolist() == list(struct.unpack("<2e", struct.pack("<2e", 0.1, -6e-8)))


def fuzz_module() -> ModuleType:
    path = Path(__file__).parents[1] / "fuzz" / "fuzz_open_inference.py"
    module_spec = importlib.util.spec_from_file_location("fuzz_open_inference", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


FUZZ = fuzz_module()
CHECK = FUZZ.target()


def test_every_fuzz_seed_is_a_good_request() -> None:
    assert [CHECK(seed) for seed in FUZZ.seeds()] == ["answered"] * len(FUZZ.seeds())


@many
@given(data=st.binary(max_size=300))
def test_arbitrary_bytes_are_answered_or_refused(data: bytes) -> None:
    assert CHECK(data) in ("answered", "refused")


@many
@given(draw=st.data())
def test_damaged_requests_are_answered_or_refused(draw: st.DataObject) -> None:
    data = bytearray(draw.draw(st.sampled_from(FUZZ.seeds())))
    for _ in range(draw.draw(st.integers(1, 4))):
        place = draw.draw(st.integers(0, len(data) - 1))
        junk = st.binary(max_size=3) | st.sampled_from(
            [b"-1", b"[", b"]", b"null", b"true", b"1e9", b"0", b'"', b"9" * 19]
        )
        data[place : place + draw.draw(st.integers(0, 3))] = draw.draw(junk)
    assert CHECK(bytes(data)) in ("answered", "refused")
