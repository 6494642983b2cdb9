"""Arrays as requests: what is taken, what is refused and where the text says the mistake is."""

from __future__ import annotations

import io
import zipfile
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.arrays import JSON, NPY, NPZ, OCTETS, ArrayCodec
from leanserve.contracts import Array, Decoded, ModelSpec, TensorSpec
from leanserve.errors import BadInput, BodyTooLarge, UnsupportedMediaType

POINT = TensorSpec("point", "float32", (2,))
TOKENS = TensorSpec("ids", "int64", (None,), pad=7)
MASK = TensorSpec("mask", "int64", (None,))
SURFACE = TensorSpec("surface", "float32", (None, None))


def codec(*fields: TensorSpec, **options: Any) -> ArrayCodec:
    return ArrayCodec(AnswerEncoder(ModelSpec(fields, (TensorSpec("out", "float32", (2,)),))), **options)


def sent(made: ArrayCodec, inputs: Any) -> Decoded:
    return made.decode(JSON, orjson.dumps({"inputs": inputs}))


def npy(array: Array) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def npz(**arrays: Array) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


def test_depth_tells_one_row_from_many() -> None:
    single, several = sent(codec(POINT), [1, 2.5]), sent(codec(POINT), [[1, 2], [3, 4]])
    assert (single.many, several.many) == (False, True)
    np.testing.assert_array_equal(single.inputs[0], np.array([[1, 2.5]], np.float32))
    np.testing.assert_array_equal(several.inputs[0], np.array([[1, 2], [3, 4]], np.float32))
    assert several.inputs[0].dtype == np.float32


def test_a_single_number_per_row() -> None:
    made = codec(TensorSpec("age", "int16", ()))
    single, several = sent(made, 5), sent(made, [5, 6])
    assert (single.inputs[0].tolist(), single.many) == ([5], False)
    assert (several.inputs[0].tolist(), several.many) == ([5, 6], True)
    with pytest.raises(BadInput, match=r"inputs\[1\]: 40000 is out of the range of int16"):
        sent(made, [5, 40000])


def test_several_inputs_go_by_their_names_in_any_order() -> None:
    decoded = sent(codec(POINT, MASK), {"mask": [[1, 1, 0]], "point": [[0, 1]]})
    assert [array.tolist() for array in decoded.inputs] == [[[0, 1]], [[1, 1, 0]]]
    assert sent(codec(POINT), {"point": [0, 1]}).inputs[0].tolist() == [[0, 1]]


def test_shorter_rows_are_padded_with_the_value_of_their_field() -> None:
    decoded = sent(codec(TOKENS, MASK), {"ids": [[1, 2, 3], [4]], "mask": [[1, 1, 1], [1]]})
    assert decoded.inputs[0].tolist() == [[1, 2, 3], [4, 7, 7]]
    assert decoded.inputs[1].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert [array.dtype for array in decoded.inputs] == [np.int64, np.int64]


def test_a_dynamic_axis_takes_any_length() -> None:
    assert sent(codec(TOKENS), list(range(300))).inputs[0].shape == (1, 300)
    assert sent(codec(SURFACE), [[[1, 2, 3]], [[4, 5, 6]]]).inputs[0].shape == (2, 1, 3)


@pytest.mark.parametrize(
    ("fields", "inputs", "reason"),
    [
        ((POINT,), [1, 2, 3], r"inputs: expected 2 entries, got 3"),
        ((POINT,), [[1, 2], [3]], r"inputs\[1\]: expected 2 entries, got 1"),
        ((POINT,), [[1, 2], [3, "4"]], r"inputs\[1\]\[1\]: expected a number, got '4'"),
        ((POINT,), [[1, 2], 3], r"inputs\[1\]: expected a row of shape \[2\], got 3"),
        ((POINT,), [[1, 2], [3, True]], r"inputs\[1\]\[1\]: expected a number, got True"),
        ((POINT,), [1, None], r"inputs\[1\]: expected a number, got None"),
        ((POINT,), [1, 1e39], r"inputs\[1\]: 1e\+39 is out of the range of float32"),
        ((POINT,), [], r"inputs: expected one row of shape \[2\] or a list of rows, got an empty list"),
        ((POINT,), "12", r"inputs: expected one row of shape \[2\] or a list of rows, got '12'"),
        ((POINT,), [[[1, 2]]], r"got 3 levels of lists"),
        ((TOKENS,), [[1, 2.0]], r"inputs\[0\]\[1\]: expected a whole number, got 2.0"),
        ((TOKENS,), [[1], []], r"inputs\[1\]: expected a row of shape \[any\], got \[\]"),
        ((SURFACE,), [[[1]], [[1, 2]]], r"'surface': rows of one request must have the same shape, got \[1, 1\]"),
        ((SURFACE,), [[1, 2], [3]], r"inputs\[1\]: expected 2 entries, got 1"),
        ((TensorSpec("on", "bool", (2,)),), [1, 0], r"inputs\[0\]: expected true or false, got 1"),
        ((TensorSpec("byte", "uint8", (2,)),), [1, -1], r"inputs\[1\]: -1 is out of the range of uint8"),
        ((POINT, MASK), [1, 2], r"several inputs, by their names: point, mask"),
        ((POINT, MASK), {"point": [1, 2]}, r"the input 'mask' is missing"),
        ((POINT,), {"pint": [1, 2]}, r"unknown input 'pint'; the model takes point"),
        ((POINT, MASK), {"point": [1, 2], "mask": [[1]]}, r"'point' is a single row, 'mask' is a list of 1 rows"),
        ((POINT, MASK), {"point": [[1, 2]], "mask": [[1], [1]]}, r"'mask' is a list of 2 rows; they must match"),
        ((TOKENS, MASK), {"ids": [[1, 2], [1]], "mask": [[1], [1, 2]]}, r"'ids' and 'mask' differ in length"),
    ],
)
def test_json_that_does_not_fit_is_refused_with_the_place(
    fields: tuple[TensorSpec, ...], inputs: Any, reason: str
) -> None:
    with pytest.raises(BadInput, match=reason):
        sent(codec(*fields), inputs)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"{", "not valid JSON"),
        (b"[1, 2]", 'must be a JSON object with the key "inputs"'),
        (b'{"inputs": [1, NaN]}', "not valid JSON"),
        (b'{"inputs": [1, 2], "input": 1}', "unknown key 'input'"),
        (b'{"inputs": ' + b"[" * 5000, "not valid JSON"),
    ],
)
def test_a_body_that_is_no_request(body: bytes, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        codec(POINT).decode(JSON, body)


def test_padding_cannot_make_a_small_body_large() -> None:
    rows = [[1] * 1000, *([1] for _ in range(1000))]
    with pytest.raises(BodyTooLarge, match="1001000 elements, padding included; at most 100000"):
        sent(codec(TOKENS, max_elements=100_000), rows)


def test_raw_bytes_are_rows_of_a_fixed_shape() -> None:
    rows = np.arange(4, dtype="<f4").reshape(2, 2)
    decoded = codec(POINT).decode(OCTETS, rows.tobytes())
    np.testing.assert_array_equal(decoded.inputs[0], rows)
    assert decoded.many
    assert not codec(POINT).decode(OCTETS, rows[:1].tobytes()).many
    for body in (b"", b"123", rows.tobytes()[:-1]):
        with pytest.raises(BadInput, match=r"not a whole number of rows of 8 \(float32 of shape \[2\], little-endian"):
            codec(POINT).decode(OCTETS, body)
    with pytest.raises(BadInput, match=r"the body: input 'point' holds nan at \[0, 1\]; every number must be finite"):
        codec(POINT).decode(OCTETS, np.array([1, np.nan], "<f4").tobytes())
    with pytest.raises(BadInput, match="byte 0 or 1"):
        codec(TensorSpec("on", "bool", (2,))).decode(OCTETS, b"\x01\x02")


def test_numpy_files() -> None:
    rows = np.arange(6, dtype=np.float64).reshape(3, 2)
    for array in (rows, np.asfortranarray(rows), rows.astype(np.int8), rows.astype(">f8")):
        decoded = codec(POINT).decode(NPY, npy(array))
        np.testing.assert_array_equal(decoded.inputs[0], rows)
        assert decoded.inputs[0].dtype == np.float32
        assert decoded.many
    assert not codec(POINT).decode(NPY, npy(rows[0])).many
    decoded = codec(TOKENS, MASK).decode(NPZ, npz(mask=np.ones((2, 5), np.uint8), ids=np.ones((2, 5), np.int64)))
    assert [array.shape for array in decoded.inputs] == [(2, 5), (2, 5)]
    assert decoded.inputs[1].dtype == np.int64


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"", r"not a \.npy file"),
        (b"\x93NUMPY\x03\x00", r"version \(3, 0\)"),
        (npy(np.zeros((2, 3), np.float32)), r"expected rows of shape \[2\], got \[3\]"),
        (npy(np.zeros((2, 2, 2), np.float32)), r"an array of \[2, 2, 2\]"),
        (npy(np.zeros((0, 2), np.float32)), r"an array of \[0, 2\]"),
        (npy(np.array(["a", "b"])), "the model takes float32, got <U1"),
        (npy(np.array([{}, {}])), "holds object, neither numbers nor texts"),
        (npy(np.zeros(2, np.complex64)), "holds complex64, neither numbers nor texts"),
        (npy(np.array([True, False])), "the model takes float32, got bool"),
        (npy(np.array([1, 1e300])), "finite and in the range of float32"),
        (npy(np.zeros((2, 2), np.float32))[:-1], r"15 bytes of data, which float32 of shape \[2, 2\] does not take"),
        (npy(np.zeros((2, 2), np.float32)).replace(b"(2, 2)", b"(-2,2)"), "does not take"),
        (npy(np.zeros((2, 2), np.float32)).replace(b"(2, 2)", b"(2,a )"), r"not a \.npy file"),
    ],
)
def test_numpy_files_that_do_not_fit(body: bytes, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        codec(POINT).decode(NPY, body)


def test_a_header_cannot_ask_for_memory() -> None:
    honest = npy(np.zeros((2, 2), np.float32))
    huge = honest.replace(b"(2, 2), }         ", b"(99999999999, 2),}")
    assert len(huge) == len(honest)
    with pytest.raises(BodyTooLarge, match="199999999998 elements"):
        codec(POINT).decode(NPY, huge)


def test_an_archive_is_bound_before_it_is_inflated() -> None:
    body = npz(point=np.zeros((500_000, 2)))
    assert len(body) < 20_000
    with pytest.raises(BodyTooLarge, match="inflates to 8000128 bytes, more than 100000 elements"):
        codec(POINT, max_elements=100_000).decode(NPZ, body)


@pytest.mark.parametrize("body", [b"", b"PK", npz(point=np.zeros(2))[:-30], npz(point=np.zeros(2))[30:]])
def test_a_damaged_archive(body: bytes) -> None:
    with pytest.raises(BadInput, match=r"not a \.npz file"):
        codec(POINT).decode(NPZ, body)


def test_an_archive_with_other_members() -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("point.npy", b"not numpy")
    with pytest.raises(BadInput, match=r"not a \.npy file"):
        codec(POINT).decode(NPZ, stream.getvalue())
    with pytest.raises(BadInput, match="unknown input 'points'"):
        codec(POINT).decode(NPZ, npz(points=np.zeros(2)))


def test_each_model_names_the_formats_that_fit_it() -> None:
    assert codec(POINT).media_types == (JSON, NPZ, NPY, OCTETS)
    assert codec(TOKENS).media_types == (JSON, NPZ, NPY)
    assert codec(POINT, MASK).media_types == (JSON, NPZ)
    with pytest.raises(UnsupportedMediaType, match="'image/png' is none of application/json"):
        codec(POINT).decode("image/png", b"")
    with pytest.raises(UnsupportedMediaType):
        codec(TOKENS).decode(OCTETS, b"12345678")
    assert codec(POINT).decode("Application/JSON; charset=utf-8", b'{"inputs": [1, 2]}').inputs[0].shape == (1, 2)


def test_answers_are_those_of_the_base() -> None:
    answers = codec(POINT).encode((np.array([[1, 2]], np.float32),))
    assert [answer["outputs"]["out"].tolist() for answer in answers] == [[1.0, 2.0]]


FIELDS = (
    TensorSpec("a", "float32", (2,)),
    TensorSpec("b", "int8", (None,)),
    TensorSpec("c", "float16", (None, 2)),
    TensorSpec("d", "bool", ()),
    TensorSpec("e", "uint64", (1, None)),
    TensorSpec("f", "float64", (None, None)),
)
LEAVES = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=3)
NESTED = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4), max_leaves=20)


def check_or_refuse(made: ArrayCodec, media_type: str, body: bytes) -> None:
    """Whatever the body, the answer is a batch that the spec describes, or a refusal."""
    try:
        decoded = made.decode(media_type, body)
    except (BadInput, BodyTooLarge, UnsupportedMediaType):
        return
    for item, array in zip(made.fields, decoded.inputs, strict=True):
        assert str(array.dtype) == item.dtype
        assert len(array) == len(decoded.inputs[0]) >= 1
        assert array.ndim == len(item.shape) + 1
        assert all(size in {None, has} for size, has in zip(item.shape, array.shape[1:], strict=True))
        assert array.dtype.kind != "f" or np.isfinite(array).all()


@given(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=2, unique=True), st.data())
def test_any_json_is_a_batch_or_a_refusal(fields: list[TensorSpec], data: st.DataObject) -> None:
    inputs = data.draw(NESTED | st.fixed_dictionaries({item.name: NESTED for item in fields}))
    check_or_refuse(codec(*fields), JSON, orjson.dumps({"inputs": inputs}))


@given(
    st.sampled_from(FIELDS),
    st.sampled_from((JSON, NPY, NPZ, OCTETS)),
    st.binary(max_size=60)
    | st.builds(
        lambda whole, cut, put: whole[:cut] + put + whole[cut + len(put) :],
        st.sampled_from((npy(np.zeros((2, 2))), npz(a=np.zeros((1, 2)), b=np.ones(3)), b'{"inputs":[[1,2],[3,4]]}')),
        st.integers(0, 200),
        st.binary(max_size=4),
    ),
)
def test_any_bytes_are_a_batch_or_a_refusal(field: TensorSpec, media_type: str, body: bytes) -> None:
    check_or_refuse(codec(field), media_type, body)


WORDS = codec(TensorSpec("word", "string", (2,)))


def test_texts_are_taken_as_json_and_as_numpys_own() -> None:
    body = {"inputs": [["a", "Ä"], ["b", ""]]}
    decoded = WORDS.decode("application/json", orjson.dumps(body))
    assert decoded.inputs[0].dtype == np.object_
    assert decoded.inputs[0].tolist() == body["inputs"]
    assert WORDS.decode("application/x-npy", npy(np.array(body["inputs"]))).inputs[0].tolist() == body["inputs"]
    assert "application/octet-stream" not in WORDS.media_types


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (["a", 3], r"inputs\[1\]: expected a text, got 3"),
        (["a\0b", "c"], r"inputs\[0\]: the text has a NUL character in it"),
        (["a"], "expected 2 entries, got 1"),
    ],
)
def test_what_is_no_text_is_refused(row: list[Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        WORDS.decode("application/json", orjson.dumps({"inputs": row}))
    with pytest.raises(BadInput, match="the model takes string, got float64"):
        WORDS.decode("application/x-npy", npy(np.zeros(2)))
    with pytest.raises(BadInput, match="it holds what is no text"):
        WORDS.decode("application/x-npy", npy(np.array([[55296, 97]], np.uint32).view("<U2")[:, [0, 0]]))
