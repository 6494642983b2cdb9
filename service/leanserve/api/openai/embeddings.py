"""`POST /v1/embeddings` for clients of OpenAI's API.

`model` names the base (the traffic split chooses, as everywhere), a variant, or both as `base:variant`. The texts of a
request are cut into groups of similar length that queue apart (`serving/length_groups.py`).
"""

from __future__ import annotations

from collections.abc import Awaitable
from functools import partial

import numpy as np

from leanserve.api.bodies import HttpBody
from leanserve.api.openai.models import gives_embeddings, no_embeddings, refusal, variant_of
from leanserve.api.service import Service
from leanserve.codecs.openai import EmbeddingRequest, encode_reply, parse_request, token_rows
from leanserve.codecs.tensors import clip
from leanserve.codecs.text import TextCodec
from leanserve.contracts import Array
from leanserve.errors import BackendFailed, BadInput, ConfigError
from leanserve.http.messages import Request, Response, Route
from leanserve.serving.length_groups import length_groups
from leanserve.serving.session import (
    DEFAULT_TERMS,
    Answered,
    ModelRequest,
    Session,
    Terms,
    VariantChoice,
    off_loop,
    refuse_unrouted,
)
from leanserve.serving.variant import Variant

SMALL = 2 * 2**10
"""Bytes of a body that is tokenized on the event loop: half a millisecond, where a thread costs 50 microseconds."""


def embeddings_route(service: Service) -> Route:
    """The route of this service; of a base that gives no embeddings of texts, one that says so.

    Raises:
        ConfigError: the config says how embeddings are asked for, and the base gives none.
    """
    if gives_embeddings(service.base):
        return Route("POST", "prediction", partial(embed, service), refusal)
    if service.config.embeddings.token_ids != "refuse":
        raise ConfigError(f"embeddings.token_ids: the base '{service.base.name}' gives no embeddings of texts")

    async def refuse(_: Request) -> Response:
        refuse_unrouted(service.fleet, no_embeddings(service.base))

    return Route("POST", "prediction", refuse, refusal)


def embed(service: Service, request: Request) -> Awaitable[Response]:
    """Answer one request.

    Raises:
        ServiceError: whatever kept it from being answered.
    """
    return Session(service.fleet, _Embeddings(service, request)).run()


class _Embeddings(HttpBody):
    encodes_quickly = True

    def __init__(self, service: Service, request: Request) -> None:
        super().__init__(request, service.config.limits.body_bytes)
        self._service = service
        self._asked: EmbeddingRequest
        self._tokens = 0

    async def asked(self) -> VariantChoice:
        """The body names the variant, so that it is read and parsed first."""
        if self.body is None:
            await self.read()
        body, width = bytes(self.body or b""), self._service.base.spec.outputs[0].shape[0] or 0
        if len(body) <= SMALL:
            self._asked = parse_request(body, width)
        else:
            self._asked = await off_loop(parse_request, body, width)
        return self._choice(self._asked.model)

    def _choice(self, model: str) -> VariantChoice:
        """The variant that `model` asks for, and the caller's key where it leaves the choice.

        Raises:
            NotFound: no such model. BadInput: the header asks for another one.
        """
        fleet = self._service.fleet
        name, named = variant_of(fleet, model), self.http.header(b"x-variant")
        if name is None:
            return VariantChoice(named, self.http.header(fleet.sticky_header))
        if named not in {None, name}:
            raise BadInput(f"the model {clip(model)} and the header x-variant name two variants")
        return VariantChoice(name)

    def terms(self, _: Variant) -> Terms:
        return DEFAULT_TERMS

    def decodes_quickly(self) -> bool:
        return len(self.body or b"") <= SMALL

    def decode(self, variant: Variant) -> ModelRequest:
        codec = variant.codec
        assert isinstance(codec, TextCodec)  # `gives_embeddings`; a pass changes what a text becomes, not what is sent
        tokens = token_rows(self._asked.input, codec, self._service.config.embeddings.token_ids)
        self._tokens = sum(map(len, tokens))
        groups = length_groups(list(map(len, tokens)), variant.spec.rows)
        samples = [codec.arrays([tokens[row] for row in group]) for group in groups]
        return ModelRequest(samples, groups)

    def encode(self, outcome: Answered) -> Response:
        rows = np.concatenate([np.asarray(group) for group in outcome.groups])
        found: Array = np.concatenate([part.outputs[0] for part in outcome.parts])
        embeddings = np.empty_like(found)
        embeddings[rows] = found
        if not np.isfinite(embeddings).all():
            raise BackendFailed("the model's embeddings are not finite")
        variant = outcome.variant.name
        how = [
            (f"x-{name.replace('_', '-')}".encode(), str(value).encode())
            for name, value in outcome.how_it_ran().items()
        ]
        headers = [(b"content-type", b"application/json"), (b"x-variant", variant.encode()), *how]
        return Response(encode_reply(embeddings, self._asked.form, variant, self._tokens), headers)
