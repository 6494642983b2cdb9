"""`POST /v1/embeddings` for clients of OpenAI's API, from request to reply.

`model` names the base (the traffic split chooses, as everywhere), a variant, or both as `base:variant`. The texts of a
request are cut into groups of similar length that queue apart (`by_length.py`).
"""

from __future__ import annotations

import numpy as np

from leanserve.api.by_length import joined, length_groups, predict_groups
from leanserve.api.openai.models import gives_embeddings, no_embeddings, refusal, variant_of
from leanserve.api.v1.predict import DEFAULT_PRIORITY, decode_for, how_it_ran, off_loop, plain_body
from leanserve.codecs.openai import EmbeddingRequest, Tokens, encode_reply, parse_request, token_rows
from leanserve.codecs.tensors import clip
from leanserve.codecs.text import TextCodec
from leanserve.contracts import Array
from leanserve.errors import BackendFailed, BadInput, ConfigError
from leanserve.http.messages import Request, Response, Route, disconnect_check
from leanserve.serving.batch_runner import Prediction
from leanserve.serving.fleet import Fleet
from leanserve.serving.variant import IsDisconnected, Variant

SMALL = 2 * 2**10
"""Bytes of a body that is tokenized on the event loop: half a millisecond, where a thread costs 50 microseconds."""
SMALL_REPLY = 32 * 2**10
"""Numbers that are written as JSON on the event loop."""


def embeddings_route(fleet: Fleet) -> Route:
    """The route of this fleet; of a base that gives no embeddings of texts, one that says so.

    Raises:
        ConfigError: the config says how embeddings are asked for, and the base gives none.
    """
    codec = fleet.base.codec
    if isinstance(codec, TextCodec) and gives_embeddings(fleet):
        return Route("POST", "prediction", _Embeddings(fleet, codec).answer, refusal)
    if fleet.config.embeddings.token_ids != "refuse":
        raise ConfigError(f"embeddings.token_ids: the base '{fleet.base.name}' gives no embeddings of texts")

    async def refuse(_: Request) -> Response:
        raise no_embeddings(fleet)

    return Route("POST", "prediction", refuse, refusal)


class _Embeddings:
    def __init__(self, fleet: Fleet, codec: TextCodec) -> None:
        self._fleet = fleet
        self._codec = codec
        self._width = fleet.base.spec.outputs[0].shape[0] or 0
        codec.open()

    async def answer(self, caller: Request) -> Response:
        body = bytes(await plain_body(caller, self._fleet.config.limits.body_bytes))
        request = await self._parsed(body)
        asked = self._asked(request.model, caller)
        variant = self._fleet.choose(*asked)
        caller.variant = variant.name
        tokens = await self._tokenized(variant, request, len(body))
        variant = self._fleet.confirm(variant, *asked)
        caller.variant = variant.name
        prediction = await predict_by_length(variant, self._codec, tokens, disconnect_check(caller.receive))
        text = await self._encoded(prediction, request, sum(map(len, tokens)))
        how = [
            (f"x-{name.replace('_', '-')}".encode(), str(value).encode())
            for name, value in how_it_ran(prediction).items()
        ]
        return Response(text, [(b"content-type", b"application/json"), (b"x-variant", variant.name.encode()), *how])

    async def _parsed(self, body: bytes) -> EmbeddingRequest:
        if len(body) <= SMALL:
            return parse_request(body, self._width)
        return await off_loop(parse_request, body, self._width)

    async def _tokenized(self, variant: Variant, request: EmbeddingRequest, size: int) -> Tokens:
        asked = request.input, self._codec, self._fleet.config.embeddings.token_ids
        if size <= SMALL:
            return token_rows(*asked)
        return await decode_for(variant, DEFAULT_PRIORITY, token_rows, *asked)

    def _asked(self, model: str, caller: Request) -> tuple[str | None, str | None]:
        """The name of the variant that `model` asks for, and the caller's key where it leaves the choice.

        Raises:
            NotFound: no such model. BadInput: the header asks for another one.
        """
        name, named = variant_of(self._fleet, model), caller.header(b"x-variant")
        if name is None:
            return named, caller.header(self._fleet.sticky_header)
        if named not in {None, name}:
            raise BadInput(f"the model {clip(model)} and the header x-variant name two variants")
        return name, None

    async def _encoded(self, prediction: Prediction, request: EmbeddingRequest, tokens: int) -> bytes:
        embeddings = prediction.outputs[0]
        if not np.isfinite(embeddings).all():
            raise BackendFailed("the model's embeddings are not finite")
        if embeddings.size <= SMALL_REPLY:
            return encode_reply(embeddings, request.form, prediction.variant, tokens)
        return await off_loop(encode_reply, embeddings, request.form, prediction.variant, tokens)


async def predict_by_length(variant: Variant, codec: TextCodec, tokens: Tokens, gone: IsDisconnected) -> Prediction:
    """Predict the rows in groups of similar length; the outputs are in the order of the rows.

    Raises:
        BadInput: more rows than may wait at all.
        ServiceError: of the first group that failed; the others are taken back.
    """
    groups = length_groups(list(map(len, tokens)), codec.answers.spec.rows)
    parts = await predict_groups(variant, [codec.arrays([tokens[row] for row in group]) for group in groups], gone)
    if len(parts) == 1:
        return parts[0]
    rows = np.concatenate([np.asarray(group) for group in groups])
    found: Array = np.concatenate([part.outputs[0] for part in parts])
    outputs = np.empty_like(found)
    outputs[rows] = found
    return joined(parts, (outputs,))
