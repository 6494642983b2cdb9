"""The embeddings of OpenAI's API as its clients write and read them: request, reply and error as JSON.

Source: the API reference of `POST /v1/embeddings`, and what the package `openai` sends (it asks for base64 unless told
otherwise, because a float32 takes 5.3 bytes in it and some 11 in decimal).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final, Literal, NamedTuple, TypeAlias

import numpy as np

from leanserve.codecs.json_body import json_object
from leanserve.codecs.json_pieces import json_text
from leanserve.codecs.tensors import Buffer, clip
from leanserve.codecs.text import TextCodec, checked_texts, holds_token_ids
from leanserve.contracts import Array, Json
from leanserve.errors import BadInput, BodyTooLarge, NotFound, ServiceError

EncodingFormat = Literal["float", "base64"]
TokenIds = Literal["refuse", "own"]
GivenRows: TypeAlias = Sequence[str | list[int]]
"""Texts, or lists of token ids."""
Tokens: TypeAlias = Sequence[Sequence[int]]
REFUSED = (
    "input holds token ids, and those of another tokenizer would be embedded as other words: send the texts, which are "
    "tokenized here. LangChain's OpenAIEmbeddings sends them with check_embedding_ctx_length=False. Where clients have "
    "the tokenizer of this model, the config of the service may say embeddings: {token_ids: own}"
)
KEYS = ("input", "model", "encoding_format", "dimensions", "user")


class WrongParameter(BadInput):
    """A key of the request has a value that is not taken; `param` is its name."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class InputTerms(NamedTuple):
    """What a service takes: the `width` of an embedding, rows of a request, and whether token ids are rows."""

    width: int
    max_rows: int
    token_ids: TokenIds


class EmbeddingRequest(NamedTuple):
    """A request whose keys are right. Of token ids it is still to be seen whether the model has them."""

    rows: GivenRows
    model: str
    form: EncodingFormat


def parse_request(body: Buffer, terms: InputTerms) -> EmbeddingRequest:
    """Read a body for a model that gives embeddings.

    Raises:
        BadInput: not a JSON object, an unknown or missing key, or a value that is not taken.
        BodyTooLarge: too many rows.
    """
    content = json_object(body, f"with the keys {', '.join(KEYS)}")
    for key in content:
        if key not in KEYS:
            raise WrongParameter(key[:60], f"unknown key {clip(key)}; known are {', '.join(KEYS)}")
    content = {key: value for key, value in content.items() if value is not None}
    for key in ("input", "model"):
        if key not in content:
            raise WrongParameter(key, f"the key {key!r} is missing")
    form: EncodingFormat = content.get("encoding_format", "float")
    _require(form in ("float", "base64"), "encoding_format", "'float' or 'base64'")
    _require(isinstance(content["model"], str), "model", "a text")
    _require(isinstance(content.get("user"), str | None), "user", "a text; it is not used")
    dimensions, width = content.get("dimensions"), terms.width
    full = dimensions is None or (type(dimensions) is int and dimensions == width)
    _require(full, "dimensions", f"{width}, or left out: this model was not trained to be cut shorter")
    return EmbeddingRequest(_given_rows(content["input"], terms), content["model"], form)


def _given_rows(given: Json, terms: InputTerms) -> GivenRows:
    """The rows of `input`: a text, a list of texts, token ids, or a list of lists of token ids.

    Token ids are refused unless the config says that clients have the model's `own` tokenizer: some clients send those
    of OpenAI's models to every server, and a number says nothing of the tokenizer that it comes from.
    """
    own = terms.token_ids == "own"
    if not own and holds_token_ids(given):
        raise WrongParameter("input", REFUSED)
    first = given[0] if own and isinstance(given, list) and given else None
    if type(first) is int:
        _require_numbers(given, "input")
        return [given]
    if isinstance(given, list) and len(given) > terms.max_rows:
        raise BodyTooLarge(f"{len(given)} rows are more than the {terms.max_rows} that one request may hold")
    if not isinstance(first, list):
        return checked_texts(given, "input")
    for index, row in enumerate(given):
        _require_numbers(row, f"input[{index}]")
    return list(given)


def token_rows(rows: GivenRows, codec: TextCodec) -> Tokens:
    """The token ids of each row.

    Those that were sent are taken as they are; the special ones are the client's to add, as its tokenizer does.

    Raises:
        BadInput: token ids that the model does not know, or too many.
        BodyTooLarge: too long texts.
    """
    ids = [row for row in rows if isinstance(row, list)]
    if not ids:
        return codec.tokens([row for row in rows if isinstance(row, str)])
    if len(ids) == 1:
        return [_token_ids(ids[0], "input", codec)]
    return [_token_ids(row, f"input[{index}]", codec) for index, row in enumerate(ids)]


def encode_reply(embeddings: Array, form: EncodingFormat, model: str, tokens: int) -> bytes:
    """The reply for embeddings [rows, width]; `tokens` were read in all."""
    rows = np.ascontiguousarray(embeddings, np.float32)
    data = [
        {"object": "embedding", "index": index, "embedding": row if form == "float" else _base64(row)}
        for index, row in enumerate(rows)
    ]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    reply = {"object": "list", "data": data, "model": model, "usage": usage}
    return json_text(reply, rows.size)


_TYPES: Final = MappingProxyType({401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"})
"""What OpenAI's API calls errors of these statuses."""


def openai_error_body(error: ServiceError) -> Mapping[str, Json]:
    """An error as clients of OpenAI's API read it; `code` is ours, but for a model that does not exist."""
    kind = _TYPES.get(error.status, "invalid_request_error")
    missing = isinstance(error, NotFound)
    return {
        "error": {
            "message": str(error),
            "type": "server_error" if error.status >= 500 else kind,
            "param": "model" if missing else getattr(error, "param", None),
            "code": "model_not_found" if missing else error.code,
        }
    }


def _require(fits: bool, key: str, wanted: str) -> None:  # noqa: FBT001 - a condition, as of assert
    if not fits:
        raise WrongParameter(key, f"{key!r} must be {wanted}")


def _require_numbers(row: Json, where: str) -> None:
    if not isinstance(row, list) or not set(map(type, row)) <= {int}:
        text = f"{where} is not a list of token ids, and input does not mix them with texts"
        raise WrongParameter("input", text)


def _token_ids(row: Sequence[int], where: str, codec: TextCodec) -> Sequence[int]:
    if not 0 < len(row) <= codec.max_length:
        raise WrongParameter("input", f"{where} has {len(row)} token ids; the model takes 1 to {codec.max_length}")
    known = codec.token_ids
    wrong = next((token for token in row if token not in known), None)
    if wrong is not None:
        raise WrongParameter("input", f"{where}: {wrong} is no token id of this model; they go from 0 to {max(known)}")
    return row


def _base64(row: Array) -> str:
    return base64.b64encode(row.astype("<f4", copy=False).tobytes()).decode("ascii")
