"""Messages of ModelInfer are looked at before they are parsed: what is in them, and what it would cost."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from bombs import GRPC_HEAVY, GRPC_TOO_MANY, field
from leanserve.api.v2.grpc_messages import message
from leanserve.api.v2.grpc_wire import MOST_FIELDS, SMALL, glance, parse
from leanserve.errors import BadInput, BodyTooLarge
from leanserve.serving.decoding import QUICK_S

Request = message("ModelInferRequest")
MANY = np.arange(40_000, dtype=np.float32)


def request(**contents: Any) -> Any:
    made = Request(model_name="m", model_version="v", id="7")
    made.parameters["priority"].int64_param = 1
    made.inputs.add(name="x", datatype="FP32", shape=[40_000], contents=contents or None)
    return made


def test_raw_tensors_stay_where_they_came() -> None:
    made = request()
    made.raw_input_contents.extend([MANY.tobytes(), b"", b"\x3a\x02"])
    data = made.SerializeToString()
    found, parsed = glance(data), parse(data)
    assert (found.model_name, found.model_version, found.form, found.parsed) == ("m", "v", "raw", None)
    assert found.seconds < 1e-3
    assert [bytes(raw) for raw in parsed.raw] == list(made.raw_input_contents)
    np.testing.assert_array_equal(np.frombuffer(parsed.raw[0], np.float32), MANY)
    made.ClearField("raw_input_contents")
    assert parsed.head == made


@pytest.mark.parametrize("times", [1, 100])
def test_typed_tensors_cost_what_their_numbers_do(times: int) -> None:
    made = request(fp32_contents=np.tile(MANY, times))
    data = made.SerializeToString()
    found = glance(data)
    assert (found.form, found.model_name) == ("typed", "m")
    assert found.seconds == pytest.approx(len(MANY) * times * 70e-9, rel=0.01)
    assert (found.seconds > QUICK_S) == (times > 1), "others decode what is large"
    assert parse(data) == (made, [])


def test_small_messages_are_parsed_at_once() -> None:
    made = request(fp32_contents=[1, 2])
    found = glance(made.SerializeToString())
    assert found.parsed == (made, [])
    assert found.parsed == parse(found.data)


def test_a_small_message_has_no_more_tensors_than_a_large_one() -> None:
    data = b"\x2a\x00" * (MOST_FIELDS + 1)
    assert len(data) < SMALL
    for look in (glance, parse):
        with pytest.raises(BodyTooLarge, match=f"at most {MOST_FIELDS} tensors"):
            look(data)
    assert len(parse(data[2:]).head.inputs) == MOST_FIELDS


@pytest.mark.parametrize("name", [*GRPC_HEAVY, *GRPC_TOO_MANY])
def test_bombs_are_known_before_they_are_parsed(name: str) -> None:
    data = {**GRPC_HEAVY, **GRPC_TOO_MANY}[name]()
    began = time.thread_time()
    if name in GRPC_HEAVY:
        assert glance(data).seconds > 4 * QUICK_S
    else:
        with pytest.raises(BodyTooLarge, match=f"at most {MOST_FIELDS} tensors"):
            glance(data)
    assert time.thread_time() - began < 0.2


@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 20,
        b"\x0a",
        b"\x0a\x05m",
        b"\x0b\x00",
        b"\x0d\x00",
        b"\x0e\x00",
        b"\x08",
        b"\x0a\xff\xff\xff\xff\x0f",
        field(1, b"\xff\xfe"),
    ],
)
@pytest.mark.parametrize("size", [0, SMALL + 1])
def test_what_is_no_message_is_refused_in_the_same_way_in_any_size(data: bytes, size: int) -> None:
    data = field(7, bytes(size)) + data if size else data
    with pytest.raises(BadInput, match="this is no ModelInferRequest"):
        parse(data)
    with pytest.raises(BadInput, match="this is no ModelInferRequest"):
        glance(data)
