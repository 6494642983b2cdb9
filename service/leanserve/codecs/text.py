"""Texts in: the codec of models of token ids.

Bodies:
- `text/plain`: the body is one text, in UTF-8 whatever its `charset` says.
- `application/json`: `{"inputs": text}` or `{"inputs": [text, ...]}`.

A text longer than `max_length` tokens is cut to it, special tokens included, as the libraries that trained these models
do; an empty text is its special tokens. Tokenizing costs time by the character, so characters are bounded before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.json_body import inputs_of
from leanserve.codecs.json_weight import json_seconds
from leanserve.contracts import Array, Arrays, Decoded, Json, TensorSpec, Weighed
from leanserve.errors import BadInput, BodyTooLarge, ConfigError, UnsupportedMediaType

JSON, PLAIN = "application/json", "text/plain"
UTF8_BYTES = 4
"""Of the longest character."""
CHARACTER_S = 0.5e-6
"""Seconds to tokenize a character."""
IDS, MASK, TYPES = "input_ids", "attention_mask", "token_type_ids"


@dataclass(frozen=True)
class TextCodec:
    """Codec of a base that takes `input_ids`, and if it likes `attention_mask` and `token_type_ids`, each [length].

    `tokenizer` is a `tokenizer.json`; it is opened when the first text comes, and shared by all codecs that name it.
    `max_characters` bounds one text, `max_total` the texts of a body together, `max_rows` their number.
    """

    tokenizer: Path
    max_length: int
    answers: AnswerEncoder
    max_characters: int = 100_000
    max_total: int = 1_000_000
    max_rows: int = 2048

    media_types: ClassVar[tuple[str, ...]] = (PLAIN, JSON)

    def __post_init__(self) -> None:
        names = [item.name for item in self.fields]
        unknown = [name for name in names if name not in {IDS, MASK, TYPES}]
        if unknown or IDS not in names:
            raise ConfigError(
                f"base.text: a model of texts takes {IDS}, and if it likes {MASK} and {TYPES}; this one takes "
                f"{', '.join(names)}. Declare base.inputs instead; clients then send token ids themselves"
            )

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process: what was declared, without what was worked out from it."""
        return type(self), tuple(getattr(self, item.name) for item in fields(self))

    @property
    def fields(self) -> tuple[TensorSpec, ...]:
        """The inputs of the model, in its order."""
        return self.answers.spec.inputs

    @cached_property
    def token_ids(self) -> frozenset[int]:
        """All that the tokenizer has; there may be gaps between them."""
        return frozenset(_opened(self.tokenizer, self.max_length).get_vocab().values())

    def values_of(self, field: TensorSpec) -> tuple[int, int]:
        """The least and the greatest value of an input's elements: token ids, or 0 and 1."""
        return (0, max(self.token_ids)) if field.name == IDS else (0, 1)

    def open(self) -> None:
        """Open the tokenizer now, rather than with the first text. Raises `ConfigError` if it cannot be read."""
        _opened(self.tokenizer, self.max_length)

    def prepare(self, media_type: str, body: bytes) -> Weighed[Decoded]:
        """What tokenizing takes, by the bytes of the texts. Raises as `decode`."""
        kind = media_type.partition(";")[0].strip().lower()
        if kind not in self.media_types:
            raise UnsupportedMediaType(f"content type {media_type!r} is none of {', '.join(self.media_types)}")
        if kind == JSON:
            return Weighed(json_seconds(body) + len(body) * CHARACTER_S, partial(self._of_json, body))
        if len(body) > UTF8_BYTES * self.max_characters:
            most = f"the {self.max_characters} characters that are taken"
            raise BodyTooLarge(f"the body has {len(body)} bytes, which are more than {most}")
        return Weighed(len(body) * CHARACTER_S, partial(self._of_text, body))

    def decode(self, media_type: str, body: bytes) -> Decoded:
        """Body -> the model's inputs, [rows, length of the longest text] each.

        Raises:
            BadInput: the body is not what its media type says; the text says where.
            BodyTooLarge: more texts or characters than are taken.
            UnsupportedMediaType: none of `media_types`; parameters such as `charset` are ignored.
        """
        return self.prepare(media_type, body).finish()

    def _of_text(self, body: bytes) -> Decoded:
        return Decoded(self.arrays(self.tokens([_utf8(body)])), many=False)

    def _of_json(self, body: bytes) -> Decoded:
        inputs = inputs_of(body)
        if holds_token_ids(inputs):
            raise BadInput(
                "inputs: expected texts, got token ids. Send the texts, which are tokenized here; ids of this model's "
                f"tokenizer go through V2 tensors ({', '.join(item.name for item in self.fields)})"
            )
        texts = checked_texts(inputs, "inputs")
        tokens = self.tokens(texts)
        return Decoded(self.arrays(tokens), isinstance(inputs, list), tuple(map(len, tokens)))

    def encode(self, outputs: Arrays, most: int | None = None) -> list[dict[str, Json]]:
        """One answer per row, see `leanserve.codecs.answers`."""
        return self.answers.encode(outputs, most)

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, special ones included, at most `max_length` of them.

        Raises:
            BodyTooLarge: more texts or characters than are taken.
            BadInput: a text becomes no token at all, which only happens with tokenizers without special tokens.
        """
        self._bound(texts)
        found = [encoding.ids for encoding in _opened(self.tokenizer, self.max_length).encode_batch_fast(texts)]
        for index, ids in enumerate(found):
            if not ids:
                raise BadInput(f"text {index} holds nothing that this model's tokenizer knows")
        return found

    def arrays(self, rows: Sequence[Sequence[int]]) -> Arrays:
        """Token ids of each row (at least one row, each with at least one id) -> the model's inputs.

        Rows are padded at their end to the longest one, each input with its own padding.
        """
        length = max(map(len, rows))
        return tuple(_padded(item, rows, length) for item in self.fields)

    def _bound(self, texts: Sequence[str]) -> None:
        if len(texts) > self.max_rows:
            raise BodyTooLarge(f"{len(texts)} texts are more than the {self.max_rows} that one request may hold")
        lengths = list(map(len, texts))
        if max(lengths) > self.max_characters:
            where = next(index for index, length in enumerate(lengths) if length > self.max_characters)
            raise BodyTooLarge(
                f"text {where} has {lengths[where]} characters; at most {self.max_characters} are taken, of which the "
                f"model reads the first {self.max_length} tokens"
            )
        if sum(lengths) > self.max_total:
            raise BodyTooLarge(f"the texts have {sum(lengths)} characters together; at most {self.max_total} are taken")


def holds_token_ids(value: Json) -> bool:
    """Whether a JSON value is a list of whole numbers, or of lists of such, by what stands first."""
    for _ in range(2):
        value = value[0] if isinstance(value, list) and value else value
    return type(value) is int


def checked_texts(value: Json, where: str) -> list[str]:
    """A text, or a list of at least one text, as a list. Raises `BadInput` naming the place."""
    texts = value if isinstance(value, list) else [value]
    if not texts:
        raise BadInput(f"{where} is an empty list; at least one text is needed")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            place = f"{where}[{index}]" if isinstance(value, list) else where
            raise BadInput(f"{place}: expected a text, got {_kind(text)}")
    return texts


@cache
def _opened(path: Path, max_length: int) -> Any:
    """The tokenizer of a file, set to cut at `max_length` tokens; it is not changed later, so threads may share it.

    Raises:
        ConfigError: the file is missing or damaged, or the library is not installed.
    """
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError as error:
        raise ConfigError("a model of texts needs the extra 'text': pip install 'leanserve[text]'") from error
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception for whatever is wrong
        raise ConfigError(f"base.text.tokenizer: cannot read {path}: {error}") from error
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer


def _padded(item: TensorSpec, rows: Sequence[Sequence[int]], length: int) -> Array:
    padded = np.full((len(rows), length), item.pad, dtype=item.dtype)
    for target, ids in zip(padded, rows, strict=True):
        target[: len(ids)] = ids if item.name == IDS else item.name == MASK
    return padded


def _utf8(body: bytes) -> str:
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        raise BadInput(f"the body is not UTF-8: {error.reason} at byte {error.start}") from error


def _kind(value: Json) -> str:
    kinds = {dict: "an object", list: "a list", bool: "a boolean", int: "a number", float: "a number"}
    return kinds.get(type(value), "null")
