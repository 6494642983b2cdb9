"""The text codec: what becomes of texts, clear refusals, and nothing else on any text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.text import TextCodec
from leanserve.contracts import ModelSpec, TensorSpec
from leanserve.errors import BadInput, BodyTooLarge, ConfigError, UnsupportedMediaType
from text_fleet import tokenizer_file

FIELDS = (TensorSpec("attention_mask", "int32", (None,)), TensorSpec("input_ids", "int64", (None,), pad=9))
SPEC = ModelSpec(FIELDS, (TensorSpec("embedding", "float32", (3,), meaning="embedding"),))
PLAIN, JSON = "text/plain", "application/json"
CLS, SEP, A, B, UNK = 2, 3, 4, 5, 1


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> TextCodec:
    """Of a base that takes the mask first and pads ids with 9; at most six tokens per text."""
    return TextCodec(tokenizer_file(tmp_path_factory.mktemp("tokenizer")), 6, AnswerEncoder(SPEC))


def body(inputs: object) -> bytes:
    return orjson.dumps({"inputs": inputs})


def test_a_plain_text_is_one_row(codec: TextCodec) -> None:
    decoded = codec.decode("Text/Plain; charset=latin-1", "A  b é".encode())
    mask, ids = decoded.inputs
    assert not decoded.many
    assert ids.tolist() == [[CLS, A, B, UNK, SEP]]
    assert mask.tolist() == [[1, 1, 1, 1, 1]]
    assert [str(array.dtype) for array in (ids, mask)] == ["int64", "int32"]


def test_texts_are_padded_to_the_longest_each_field_with_its_own_padding(codec: TextCodec) -> None:
    decoded = codec.decode(JSON, body(["a b", "", "b"]))
    assert decoded.many
    assert decoded.inputs[1].tolist() == [[CLS, A, B, SEP], [CLS, SEP, 9, 9], [CLS, B, SEP, 9]]
    assert decoded.inputs[0].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]]


def test_one_text_in_json_is_like_a_plain_one(codec: TextCodec) -> None:
    one = codec.decode(JSON, body("a"))
    assert not one.many
    np.testing.assert_array_equal(one.inputs[1], codec.decode(PLAIN, b"a").inputs[1])


def test_a_long_text_is_cut_and_keeps_its_special_tokens(codec: TextCodec) -> None:
    assert codec.tokens(["a " * 50]) == [[CLS, A, A, A, A, SEP]]


def test_types_are_zeros(codec: TextCodec) -> None:
    spec = ModelSpec((*FIELDS, TensorSpec("token_type_ids", "int64", (None,))), SPEC.outputs)
    typed = replace(codec, answers=AnswerEncoder(spec))
    assert typed.arrays([[1, 2], [3]])[2].tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"{", "not valid JSON"),
        (b"[]", 'object with the key "inputs"'),
        (b'{"inputs": "a", "texts": "b"}', "unknown key 'texts'"),
        (b'{"inputs": []}', "inputs is an empty list"),
        (b'{"inputs": ["a", 7]}', r"inputs\[1\]: expected a text, got a number"),
        (b'{"inputs": true}', "inputs: expected a text, got a boolean"),
        (b'{"inputs": [["a"]]}', r"inputs\[0\]: expected a text, got a list"),
        (b'{"inputs": null}', "got null"),
        (
            b'{"inputs": [1, 2]}',
            r"inputs: expected texts, got token ids. Send the texts.*V2 tensors \(attention_mask, input_ids",
        ),
        (b'{"inputs": [[1, 2], [3]]}', "inputs: expected texts, got token ids"),
        (b'{"inputs": "\\ud800"}', "not valid JSON"),
    ],
)
def test_what_is_no_text_is_refused_with_its_place(codec: TextCodec, sent: bytes, said: str) -> None:
    with pytest.raises(BadInput, match=said):
        codec.decode(JSON, sent)


def test_bytes_that_are_no_utf8_are_refused(codec: TextCodec) -> None:
    with pytest.raises(BadInput, match="not UTF-8: invalid start byte at byte 2"):
        codec.decode(PLAIN, b"ab\xff")


def test_another_media_type_is_refused(codec: TextCodec) -> None:
    with pytest.raises(UnsupportedMediaType, match="none of text/plain, application/json"):
        codec.decode("image/png", b"a")


def test_rows_and_characters_are_bounded(codec: TextCodec) -> None:
    small = replace(codec, max_characters=10, max_total=15, max_rows=3)
    assert len(small.tokens(["a" * 10, "b" * 5])) == 2
    with pytest.raises(BodyTooLarge, match="4 texts are more than the 3"):
        small.tokens(["a"] * 4)
    with pytest.raises(BodyTooLarge, match="text 1 has 11 characters; at most 10 are taken"):
        small.tokens(["a", "a" * 11])
    with pytest.raises(BodyTooLarge, match="16 characters together; at most 15"):
        small.tokens(["a" * 8, "a" * 8])


def test_a_tokenizer_without_special_tokens_finds_nothing_in_an_empty_text(codec: TextCodec, tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?")).save(str(tmp_path / "bare.json"))
    bare = replace(codec, tokenizer=tmp_path / "bare.json")
    with pytest.raises(BadInput, match="text 1 holds nothing"):
        bare.tokens(["a", ""])


def test_token_ids_may_have_gaps(codec: TextCodec, tmp_path: Path) -> None:
    """The highest bounds the tensors of clients; ids in between that the tokenizer lacks are none of it."""
    Tokenizer(models.WordLevel({"a": 0, "b": 7, "?": 3}, unk_token="?")).save(str(tmp_path / "gaps.json"))
    gaps = replace(codec, tokenizer=tmp_path / "gaps.json")
    assert gaps.token_ids == {0, 3, 7}
    assert gaps.values_of(FIELDS[1]) == (0, 7)
    assert gaps.values_of(FIELDS[0]) == (0, 1)


def test_a_damaged_tokenizer_is_named(codec: TextCodec, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"base.text.tokenizer: cannot read .*tokenizer.json"):
        replace(codec, tokenizer=path).open()


def test_a_model_of_other_inputs_is_no_model_of_texts() -> None:
    spec = ModelSpec((TensorSpec("image", "float32", (3, 2, 2)),), SPEC.outputs)
    with pytest.raises(ConfigError, match="this one takes image"):
        TextCodec(Path("tokenizer.json"), 6, AnswerEncoder(spec))


@settings(deadline=None)
@given(st.lists(st.text(), min_size=1, max_size=4))
def test_any_texts_become_tokens_within_the_bounds(codec: TextCodec, texts: list[str]) -> None:
    # Only lone surrogates cannot be sent: UTF-8 has no form for them.
    texts = [text.encode("utf-8", "ignore").decode() for text in texts]
    mask, ids = codec.decode(JSON, body(texts)).inputs
    assert ids.shape == mask.shape
    assert ids.shape[0] == len(texts)
    assert 2 <= ids.shape[1] <= 6
    assert (ids[:, 0] == CLS).all()
    assert ((ids == 9) == (mask == 0)).all()


@settings(deadline=None)
@given(st.binary(max_size=40), st.sampled_from([PLAIN, JSON]))
def test_any_bytes_are_decoded_or_refused(codec: TextCodec, sent: bytes, media_type: str) -> None:
    try:
        decoded = codec.decode(media_type, sent)
    except BadInput:
        return
    assert len(decoded.inputs[0]) >= 1
