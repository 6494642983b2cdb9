"""`POST /v1/predict`: a prediction in the base's own formats, which the codec knows; here is what HTTP adds to them."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from functools import partial
from typing import Any

from pydantic import BaseModel

from leanserve.api.bodies import HttpSession
from leanserve.api.endpoint import Declaration, Endpoint, endpoint, which_variant
from leanserve.api.service import Service
from leanserve.codecs.image_formats import FORMAT_NAMES, media_types
from leanserve.contracts import Json, Place
from leanserve.http.messages import Request, Response, Route, json_response
from leanserve.serving.length_groups import in_order
from leanserve.serving.session import Answered, ModelRequest, VariantChoice, grouped_rows
from leanserve.serving.variant import Variant

PREDICT = "/v1/predict"
_FILE: Json = {"type": "string", "format": "binary"}
_BODIES: Mapping[str, Json] = {
    **{kind: {"schema": _FILE} for kind in (*media_types(FORMAT_NAMES), "image/*", "application/octet-stream")},
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "properties": {"file": _FILE},
            "additionalProperties": _FILE,
            "description": "one file per part, under any names; several files get a list of predictions",
        }
    },
}
"""What a prediction takes by these media types; others have no schema."""


class PlacedImage(BaseModel):
    """How an image lies on the model's input: its point (x, y) is at (x, y) * scale + offset there, in pixels."""

    size: tuple[int, int]
    input: tuple[int, int]
    scale: tuple[float, float]
    offset: tuple[int, int]


class RowAnswer(BaseModel):
    """What is told of one row: label and scores, an embedding, or outputs by name."""

    label: str | None = None
    scores: dict[str, float] | None = None
    embedding: list[float] | None = None
    outputs: dict[str, Any] | None = None
    image: PlacedImage | None = None


class HowItRan(BaseModel):
    """Who answered, milliseconds in the queue and on the device, rows of the batch."""

    variant: str
    queue_ms: float
    inference_ms: float
    batch_rows: int


class OneAnswer(RowAnswer, HowItRan):
    """The answer to a single row."""


class ManyAnswers(HowItRan):
    """The answers to a list of rows, in its order."""

    predictions: list[RowAnswer]


def predict_endpoint(service: Service) -> Endpoint:
    """Predictions in the base's own formats."""
    media = {media_type: _BODIES.get(media_type, {}) for media_type in service.base.codec.media_types}
    told = Declaration("Predict", which_variant(service), media, OneAnswer | ManyAnswers)
    return endpoint(PREDICT, Route("POST", "predict", partial(predict, service)), told)


def predict(service: Service, request: Request) -> Awaitable[Response]:
    """Answer one request.

    Raises:
        ServiceError: whatever kept it from being answered.
    """
    return CodecSession(service, request).run()


class CodecSession(HttpSession):
    """The session of a request whose body and answer are those of the variant's codec."""

    many = False
    """Whether a list of rows was sent."""
    told: Sequence[Place] = ()
    """What an answer tells of where its row came from, by row; empty where that is nothing."""

    def asked(self) -> VariantChoice:
        return self.http.header(b"x-variant"), self.http.header(self.fleet.sticky_header)

    def decodes_quickly(self) -> bool:
        return False  # an image takes milliseconds

    def decode(self, variant: Variant) -> ModelRequest:
        content_type = self.http.header(b"content-type") or ""  # with its parameters: a form names its boundary there
        decoded = variant.codec.decode(content_type, bytes(self.body or b""))
        self.many = decoded.many
        self.told = decoded.places if decoded.tells_places else ()
        return grouped_rows(decoded, variant.spec)

    def encode(self, answered: Answered) -> Response:
        variant = answered.variant
        parts = [variant.codec.encode(part.outputs) for part in answered.parts]
        answers = in_order(parts, answered.groups) if answered.groups else parts[0]
        if self.told:
            answers = [{**answer, **place.told()} for answer, place in zip(answers, self.told, strict=True)]
        how: dict[str, Json] = {"variant": variant.name, **answered.how_it_ran()}
        body = {"predictions": answers, **how} if self.many else {**answers[0], **how}
        return json_response(body, [(b"x-variant", variant.name.encode())])
