"""`POST /v1/predict`: a prediction in the base's own formats, which the codec knows; here is what HTTP adds to them."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping, Sequence
from functools import partial
from pickle import PickleBuffer
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field, WithJsonSchema, create_model

from leanserve.api.bodies import HttpSession, how_headers
from leanserve.api.endpoint import Declaration, Endpoint, endpoint, in_query, which_variant
from leanserve.api.service import Service
from leanserve.api.v1.answer_forms import DEFAULT_WISH, MOST_TOP, NPZ, AnswerForms, OutputRows, archive
from leanserve.codecs.audio_files import AUDIO_FORMATS, audio_types
from leanserve.codecs.image_formats import FORMAT_NAMES, media_types
from leanserve.codecs.json_pieces import json_text
from leanserve.codecs.postprocess.chain import PostChain
from leanserve.codecs.tensors import Buffer
from leanserve.contracts import Codec, Decoded, Json, Place, Weighed
from leanserve.http.messages import Request, Response, Route
from leanserve.serving.decoder_process import Decoding
from leanserve.serving.length_groups import in_order
from leanserve.serving.session import Answered, ModelRequest, VariantChoice, grouped_rows
from leanserve.serving.variant import Variant

PREDICT = "/v1/predict"
_FILE: Json = {"type": "string", "format": "binary"}
_BODIES: Mapping[str, Json] = {
    **{kind: {"schema": _FILE} for kind in (*media_types(FORMAT_NAMES), "image/*", "application/octet-stream")},
    **{kind: {"schema": _FILE} for kind in (*audio_types(AUDIO_FORMATS), "audio/*")},
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
    """What is told of one row: label and scores, an embedding, or outputs by name; where it lies in what was sent."""

    label: str | None = None
    scores: dict[str, float] | None = None
    embedding: list[float] | None = None
    outputs: dict[str, Any] | None = None
    image: PlacedImage | None = None
    file: int | None = None
    start_s: float | None = None
    end_s: float | None = None


class HowItRan(BaseModel):
    """Who answered, milliseconds in the queue and on the device, rows of the batch."""

    variant: str
    queue_ms: float
    inference_ms: float
    batch_rows: int


def predict_endpoint(service: Service) -> Endpoint:
    """Predictions in the base's own formats."""
    forms = AnswerForms(service.base.spec, service.post)
    media = {media_type: _BODIES.get(media_type, {}) for media_type in service.base.codec.media_types}
    names = in_query(list[str], f"answer only these: {', '.join(forms.names)}; several with commas between")
    asked = {
        **which_variant(service),
        "outputs": names,
        "top": in_query(Annotated[int, Field(ge=1, le=MOST_TOP)], "of every list only the largest numbers"),
    }
    told = Declaration("Predict", asked, media, _answers(service.post), gives_media={NPZ: {"schema": _FILE}})
    return endpoint(PREDICT, Route("POST", "predict", partial(predict, service, forms)), told)


def _answers(post: PostChain) -> Any:
    """The answer to a single row, or to a list of rows in its order, with what post-processing tells."""
    written: dict[str, Any] = {
        name: (Annotated[Any, WithJsonSchema(schema)], None) for name, schema in post.schema().items()
    }
    row: Any = create_model("RowAnswers", __base__=RowAnswer, **written)
    one: Any = create_model("OneAnswer", __base__=(row, HowItRan))
    return one | create_model("ManyAnswers", __base__=HowItRan, predictions=(list[row], ...))


def predict(service: Service, forms: AnswerForms, request: Request) -> Awaitable[Response]:
    """Answer one request.

    Raises:
        ServiceError: whatever kept it from being answered.
    """
    return _Predict(service, forms, request).run()


class CodecDecoding(NamedTuple):
    """A body for a codec."""

    codec: Codec
    content_type: str
    body: Buffer

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process: the body beside the rest, uncopied."""
        return type(self), (self.codec, self.content_type, PickleBuffer(self.body))

    def prepare(self) -> Weighed[Decoded]:
        """Look at it."""
        return self.codec.prepare(self.content_type, bytes(self.body))


class CodecSession(HttpSession):
    """The session of a request whose body is one of the variant's codec."""

    many = False
    """Whether a list of rows was sent."""
    places: Sequence[Place] = ()
    """Where rows lie in what was sent, and whether that is told; empty where the codec does not say."""
    tells_places = False

    def asked(self) -> VariantChoice:
        return self.http.header(b"x-variant"), self.http.header(self.fleet.sticky_header)

    def decodes_quickly(self) -> bool:
        return False  # an image takes milliseconds

    def decoding(self, variant: Variant) -> Decoding[Decoded]:
        content_type = self.http.header(b"content-type") or ""  # with its parameters: a form names its boundary there
        return CodecDecoding(variant.codec, content_type, self.body or b"")

    def take(self, variant: Variant, made: Decoded) -> ModelRequest:
        self.many, self.places, self.tells_places = made.many, made.places, made.tells_places
        return grouped_rows(made, variant.spec)


class _Predict(CodecSession):
    _wish = DEFAULT_WISH

    def __init__(self, service: Service, forms: AnswerForms, request: Request) -> None:
        super().__init__(service, request)
        self._forms = forms
        self.encodes_quickly = not forms.is_costly

    def asked(self) -> VariantChoice:
        self._wish = self._forms.wished(self.http)
        return super().asked()

    def encode(self, answered: Answered) -> Response:
        if self._wish.form == "npz":
            return self._archive(answered)
        variant = answered.variant
        parts = [self._told(answered, part) for part in range(len(answered.parts))]
        answers = in_order(parts, answered.groups) if answered.groups else parts[0]
        if self.tells_places:
            answers = [{**answer, **place.told()} for answer, place in zip(answers, self.places, strict=True)]
        how: dict[str, Json] = {"variant": variant.name, **answered.how_it_ran()}
        body = {"predictions": answers, **how} if self.many else {**answers[0], **how}
        numbers = sum([output.size for part in answered.parts for output in part.outputs])
        headers = [(b"content-type", b"application/json"), (b"x-variant", variant.name.encode())]
        return Response(json_text(body, numbers), headers)

    def _told(self, answered: Answered, part: int) -> list[dict[str, Json]]:
        if self._forms.tells_classes(self._wish):
            return answered.variant.codec.encode(answered.parts[part].outputs, self._wish.top)
        return self._forms.told(self._rows(answered, part), self._wish)

    def _archive(self, answered: Answered) -> Response:
        numbers = range(len(answered.parts))
        parts = [self._forms.columns(self._rows(answered, part), self._wish) for part in numbers]
        groups = answered.groups or [range(len(answered.parts[0].outputs[0]))]
        body = archive(parts, groups, self.places if self.tells_places else ())
        return Response(body, [(b"content-type", NPZ.encode()), *how_headers(answered)])

    def _rows(self, answered: Answered, part: int) -> OutputRows:
        places = self.places
        if places and answered.groups:
            places = [places[row] for row in answered.groups[part]]
        return OutputRows(answered.parts[part].outputs, answered.variant.spec, places)
