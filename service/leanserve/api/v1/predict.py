"""`POST /v1/predict`: a prediction in the base's own formats, which the codec knows; here is what HTTP adds to them."""

from __future__ import annotations

from collections.abc import Awaitable

from leanserve.api.bodies import HttpBody
from leanserve.api.service import Service
from leanserve.contracts import Json
from leanserve.http.messages import Request, Response, json_response
from leanserve.serving.length_groups import in_order
from leanserve.serving.session import DEFAULT_TERMS, Answered, ModelRequest, Session, Terms, VariantChoice, grouped_rows
from leanserve.serving.variant import Variant


def predict(service: Service, request: Request) -> Awaitable[Response]:
    """Answer one request.

    Raises:
        ServiceError: whatever kept it from being answered.
    """
    return Session(service.fleet, _Predict(service, request)).run()


class _Predict(HttpBody):
    encodes_quickly = True

    def __init__(self, service: Service, request: Request) -> None:
        super().__init__(request, service.config.limits.body_bytes)
        self._sticky_header = service.fleet.sticky_header
        self._many = False

    async def asked(self) -> VariantChoice:
        return VariantChoice(self.http.header(b"x-variant"), self.http.header(self._sticky_header))

    def terms(self, _: Variant) -> Terms:
        return DEFAULT_TERMS

    def decodes_quickly(self) -> bool:
        return False  # an image takes milliseconds

    def decode(self, variant: Variant) -> ModelRequest:
        content_type = self.http.header(b"content-type") or ""  # with its parameters: a form names its boundary there
        decoded = variant.codec.decode(content_type, bytes(self.body or b""))
        self._many = decoded.many
        return grouped_rows(decoded, variant.spec)

    def encode(self, outcome: Answered) -> Response:
        variant = outcome.variant
        parts = [variant.codec.encode(part.outputs) for part in outcome.parts]
        answers = in_order(parts, outcome.groups) if outcome.groups else parts[0]
        how: dict[str, Json] = {"variant": variant.name, **outcome.how_it_ran()}
        body = {"predictions": answers, **how} if self._many else {**answers[0], **how}
        return json_response(body, [(b"x-variant", variant.name.encode())])
