"""`POST /v1/embeddings` for clients of OpenAI's API.

`model` names the base (the traffic split chooses, as everywhere), a variant, or both as `base:variant`. The texts of a
request are cut into groups of similar length that queue apart (`serving/length_groups.py`).
"""

from __future__ import annotations

import time
from collections.abc import Awaitable
from functools import partial
from pickle import PickleBuffer
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, create_model

from leanserve.api.bodies import HttpSession, how_headers
from leanserve.api.endpoint import Declaration, Endpoint, OpenAiErrorReply, endpoint, in_body, one_of, which_variant
from leanserve.api.openai.models import gives_embeddings, no_embeddings, refusal, served_models, variant_of
from leanserve.api.service import Service
from leanserve.codecs.json_weight import json_seconds
from leanserve.codecs.openai import (
    EmbeddingRequest,
    GivenRows,
    InputTerms,
    Tokens,
    encode_reply,
    parse_request,
    token_rows,
)
from leanserve.codecs.tensors import Buffer, clip
from leanserve.codecs.text import CHARACTER_S, TextCodec
from leanserve.contracts import Array, Weighed
from leanserve.errors import BackendFailed, BadInput, ConfigError
from leanserve.http.messages import Request, Response, Route
from leanserve.serving.decoder_process import Decoding
from leanserve.serving.decoding import Patience, Work
from leanserve.serving.length_groups import length_groups
from leanserve.serving.session import (
    Answered,
    ModelRequest,
    VariantChoice,
    unrouted,
)
from leanserve.serving.variant import Variant

EMBEDDINGS = "/v1/embeddings"
SMALL = 2 * 2**10
"""Bytes of a body that is tokenized on the event loop: half a millisecond, where a thread costs 50 microseconds."""
MEDIUM = 64 * 2**10
"""Bytes of one that is parsed there, in its turn."""
_TEXT_WEIGHT, _REQUEST_WEIGHT = 10, 5_000
"""What tokenizing a byte, and answering at all, weigh in a turn of the loop, in bytes of JSON that are parsed there."""


class EmbeddingRow(BaseModel):
    """One embedding: numbers, or base64 of float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingList(BaseModel):
    """The embeddings, in the order of the texts."""

    object: Literal["list"]
    data: list[EmbeddingRow]
    model: str
    usage: EmbeddingUsage


def embeddings_endpoint(service: Service) -> Endpoint:
    """That of this service; of a base that gives no embeddings of texts, one that says so.

    Raises:
        ConfigError: the config says how embeddings are asked for, and the base gives none.
    """
    if gives_embeddings(service.base):
        asked = {"body": in_body(_embedding_query(service)), **which_variant(service)}
        told = Declaration("Embeddings, as of OpenAI's API", asked, {}, EmbeddingList, OpenAiErrorReply)
        return endpoint(
            EMBEDDINGS, Route("POST", "predict", partial(embed, service, _input_terms(service)), refusal), told
        )
    if service.config.embeddings.token_ids != "refuse":
        raise ConfigError(f"embeddings.token_ids: the base '{service.base.name}' gives no embeddings of texts")

    async def refuse(_: Request) -> Response:
        raise unrouted(service.fleet, no_embeddings(service.base))

    return endpoint(EMBEDDINGS, Route("POST", "predict", refuse, refusal))


def _embedding_query(service: Service) -> type[BaseModel]:
    """A request for embeddings, with the models that may be named."""
    base, names = service.base, served_models(service.fleet) or [service.base.name]
    ids: Any = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    taken: Any = str | Annotated[list[str], Field(min_length=1)]
    if service.config.embeddings.token_ids == "own":
        taken = taken | ids | Annotated[list[ids], Field(min_length=1)]
        taken = Annotated[taken, Field(description="texts, or token ids with the special ones")]
    example: Any = {"example": {"input": ["one text", "another"], "model": base.name}}
    fields: dict[str, Any] = {
        "input": (taken, ...),
        "model": (one_of(names), ...),
        "encoding_format": (one_of(["float", "base64"]), "float"),
        "dimensions": (one_of([base.spec.outputs[0].shape[0] or 0]) | None, None),
        "user": (Annotated[str, Field(description="not used")], ""),
    }
    return create_model("EmbeddingQuery", __config__=ConfigDict(extra="forbid", json_schema_extra=example), **fields)


def _input_terms(service: Service) -> InputTerms:
    base = service.base
    assert isinstance(base.codec, TextCodec)  # `gives_embeddings`
    return InputTerms(base.spec.outputs[0].shape[0] or 0, base.codec.max_rows, service.config.embeddings.token_ids)


def embed(service: Service, terms: InputTerms, request: Request) -> Awaitable[Response]:
    """Answer one request.

    Raises:
        ServiceError: whatever kept it from being answered.
    """
    return _Embeddings(service, terms, request).run()


class RequestParsing(NamedTuple):
    """A large body. What a process sends back of it is a request of no more rows than are taken, whatever came."""

    body: Buffer
    terms: InputTerms

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process: the body beside the rest, uncopied."""
        return type(self), (PickleBuffer(self.body), self.terms)

    def prepare(self) -> Weighed[EmbeddingRequest]:
        """Count what is in it. Raises `BodyTooLarge` where that is too much."""
        return Weighed(json_seconds(self.body), partial(parse_request, self.body, self.terms))


class EmbeddingDecoding(NamedTuple):
    """The texts (or token ids) of a request, to be tokenized."""

    codec: TextCodec
    rows: GivenRows

    def prepare(self) -> Weighed[Tokens]:
        """Count their characters."""
        return Weighed(sum(map(len, self.rows)) * CHARACTER_S, partial(token_rows, self.rows, self.codec))


class _Embeddings(HttpSession):
    is_chosen_by_body = True

    def __init__(self, service: Service, terms: InputTerms, request: Request) -> None:
        super().__init__(service, request)
        self._terms = terms
        self._asked: EmbeddingRequest
        self._tokens = 0

    async def read(self) -> None:
        """Read the body and parse it: it names the variant."""
        if self.body is None:
            await super().read()
        body, decoders = self.body or b"", self.fleet.decoders
        parsing = RequestParsing(body, self._terms)
        if len(body) > MEDIUM:
            patience = Patience(time.perf_counter() + self.fleet.longest_wait_s, self.is_disconnected)
            self._asked = await decoders.run(Work(parsing, lambda asked: asked, len(body)), patience)
            return
        if len(body) > SMALL:
            await decoders.turn_for(len(body))
        self._asked = parse_request(*parsing)

    def asked(self) -> VariantChoice:
        """The variant that `model` asks for, and the caller's key where it leaves the choice.

        Raises:
            NotFound: no such model. BadInput: the header asks for another one.
        """
        fleet, model = self.fleet, self._asked.model
        name, named = variant_of(fleet, model), self.http.header(b"x-variant")
        if name is None:
            return named, self.http.header(fleet.sticky_header)
        if named not in {None, name}:
            raise BadInput(f"the model {clip(model)} and the header x-variant name two variants")
        return name, None

    def decodes_quickly(self) -> bool:
        size = len(self.body or b"")
        self.heavy = _REQUEST_WEIGHT + _TEXT_WEIGHT * size if size <= SMALL else 0
        return False

    def decoding(self, variant: Variant) -> Decoding[Tokens]:
        codec = variant.codec
        assert isinstance(codec, TextCodec)  # `gives_embeddings`; a pass changes what a text becomes, not what is sent
        return EmbeddingDecoding(codec, self._asked.rows)

    def take(self, variant: Variant, made: Tokens) -> ModelRequest:
        codec, tokens = variant.codec, made
        assert isinstance(codec, TextCodec)
        self._tokens = sum(map(len, tokens))
        groups = length_groups(list(map(len, tokens)), variant.spec.rows)
        samples = [codec.arrays([tokens[row] for row in group]) for group in groups]
        return ModelRequest(samples, groups)

    def encode(self, answered: Answered) -> Response:
        rows = np.concatenate([np.asarray(group) for group in answered.groups])
        found: Array = np.concatenate([part.outputs[0] for part in answered.parts])
        embeddings = np.empty_like(found)
        embeddings[rows] = found
        if not np.isfinite(embeddings).all():
            raise BackendFailed("the model's embeddings are not finite")
        variant = answered.variant.name
        headers = [(b"content-type", b"application/json"), *how_headers(answered)]
        return Response(encode_reply(embeddings, self._asked.form, variant, self._tokens), headers)
