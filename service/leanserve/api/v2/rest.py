"""The Open Inference Protocol V2 over REST: its table of paths, and the wire format of the infer call.

All paths are known when the service starts, for the model and its variants are; so routing is one look-up of the whole
path, and whatever is not in the table does not exist. Small bodies are decoded where they are; only what would hold up
the event loop for more than about a millisecond is sent to a thread, for the way there and back costs some 50
microseconds.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import partial

from leanserve.api.bodies import HttpBody, plain_body
from leanserve.api.service import Service
from leanserve.api.v2.open_inference import OpenInference, terms_of
from leanserve.codecs.infer_plan import InferOptions
from leanserve.codecs.json_body import json_object
from leanserve.codecs.open_inference import InferReply, encode_infer, parse_json_length
from leanserve.contracts import Json
from leanserve.errors import BadInput, NotFound
from leanserve.http.content_encoding import compress, encoding_of_reply
from leanserve.http.messages import Request, Response, Route, json_response
from leanserve.serving.fleet import Fleet
from leanserve.serving.session import UNKNOWN_TERMS, Answered, ModelRequest, Session, Terms, VariantChoice
from leanserve.serving.variant import Variant

SMALL = 64 * 2**10
"""Bytes of JSON, or of a tensor of strings, that are decoded on the event loop."""
SMALL_BINARY = 2**20
"""Bytes of numbers in binary: they are looked at, not copied (FP16, BF16 and BOOL are converted or checked)."""
_JSON_LENGTH = b"inference-header-content-length"


def open_inference_routes(service: Service) -> dict[str, Route]:
    """Every path of the protocol on this server."""
    protocol, fleet = OpenInference(service), service.fleet
    routes = {
        "/v2": _described(protocol.server_metadata),
        "/v2/": _described(protocol.server_metadata),
        "/v2/health/live": _described(protocol.health),
        "/v2/health/ready": _described(partial(_ready, protocol)),
        "/v2/models/stats": _described(protocol.statistics),
        "/v2/repository/index": Route("POST", "description", partial(_index, protocol)),
    }
    model = protocol.name
    for version in (None, *fleet.plans):
        path = f"/v2/repository/models/{model}" + (f"/versions/{version}" if version else "")
        routes[f"{path}/load"] = _swapped(partial(protocol.load, model, version))
        routes[f"{path}/unload"] = _swapped(partial(protocol.unload, model, version))
    for version in (None, *fleet.plans):
        path = f"/v2/models/{model}" + (f"/versions/{version}" if version else "")
        routes[path] = _described(partial(protocol.metadata, model, version))
        routes[f"{path}/config"] = _described(partial(protocol.config, model, version))
        routes[f"{path}/stats"] = _described(partial(protocol.statistics, model, version))
        routes[f"{path}/ready"] = _described(partial(_model_ready, protocol, version))
        routes[f"{path}/infer"] = Route("POST", "prediction", partial(infer, protocol, version))
    return routes


def no_such_path(fleet: Fleet, path: str) -> NotFound:
    """Why a path below /v2/ is not in the table, as exactly as can be told."""
    model, variants = fleet.name, ", ".join(fleet.plans)
    parts = path.removeprefix("/v2/").removeprefix("repository/").split("/")
    if parts[0] == "models" and len(parts) > 1:
        if parts[1] != model:
            return NotFound(f"no model '{parts[1][:80]}'; this server has '{model}'")
        if len(parts) > 3 and parts[2] == "versions" and parts[3] not in fleet.plans:
            return NotFound(f"no version '{parts[3][:80]}' of '{model}'; there are {variants}")
    return NotFound(f"no such path: {path[:200]}")


def _described(describe: Callable[[], Json]) -> Route:
    async def answer(_: Request) -> Response:
        return json_response(describe())

    return Route("GET", "description", answer)


def _ready(protocol: OpenInference) -> Json:
    protocol.check_ready()
    return protocol.health()


def _model_ready(protocol: OpenInference, version: str | None) -> Json:
    protocol.check_ready(protocol.name, version)
    return {"name": protocol.name, "ready": True}


async def _index(protocol: OpenInference, request: Request) -> Response:
    ready = (await _told(request)).get("ready", False)
    if type(ready) is not bool:
        raise BadInput("the body must be a JSON object; its only key 'ready' is true or false")
    return json_response(protocol.repository_index(ready_only=ready))


def _swapped(swap: Callable[[Iterable[str]], Awaitable[None]]) -> Route:
    async def answer(request: Request) -> Response:
        parameters = (await _told(request)).get("parameters", {})
        if not isinstance(parameters, dict):
            raise BadInput("the body must be a JSON object; its only key 'parameters' is one, too")
        await swap(parameters)
        return json_response({})

    return Route("POST", "description", answer)


async def _told(request: Request) -> dict[str, Json]:
    """The JSON of a small request; no body stands for an empty object."""
    return json_object(await plain_body(request, SMALL) or b"{}")


def infer(protocol: OpenInference, version: str | None, request: Request) -> Awaitable[Response]:
    """Answer an infer request.

    Raises:
        ServiceError: whatever kept it from being answered.
    """
    return Session(protocol.fleet, _Infer(protocol, version, request)).run()


class _Infer(HttpBody):
    def __init__(self, protocol: OpenInference, version: str | None, request: Request) -> None:
        super().__init__(request, protocol.body_bytes)
        self._protocol = protocol
        self._version = version
        self._json_length: int | None = None
        self._options: InferOptions
        self._compression = encoding_of_reply(request.header(b"accept-encoding"))

    @property
    def encodes_quickly(self) -> bool:
        return self._compression is None

    async def asked(self) -> VariantChoice:
        self._json_length = parse_json_length(self.http.headers.get(_JSON_LENGTH))
        wanted = self._version or self.http.header(b"x-variant")
        return VariantChoice(wanted, self.http.header(self._protocol.fleet.sticky_header))

    def terms(self, variant: Variant) -> Terms:
        decoder = self._protocol.decoder(variant)
        options = decoder.options(self.http.begun, self._json_length)
        return UNKNOWN_TERMS if options is None else terms_of(options)

    def decodes_quickly(self) -> bool:
        body, json_length = self.body or b"", self._json_length
        parsed = len(body) if json_length is None or self._protocol.takes_strings else json_length
        return parsed <= SMALL and len(body) <= SMALL_BINARY

    def decode(self, variant: Variant) -> ModelRequest:
        decoded = self._protocol.decoder(variant).decode(self.body or b"", self._json_length)
        self._options = decoded.options
        return ModelRequest((decoded.inputs,), terms=terms_of(decoded.options))

    def encode(self, outcome: Answered) -> Response:
        model, variant = self._protocol.name, outcome.variant.name
        reply = encode_infer(self._options, outcome.parts[0].outputs, model, variant, outcome.how_it_ran())
        headers = _headers(reply, variant)
        if self._compression is None:
            return Response(reply.body, headers)
        body = compress(reply.body, self._compression)
        return Response(body, (*headers, (b"content-encoding", self._compression.encode())))


def _headers(reply: InferReply, variant: str) -> tuple[tuple[bytes, bytes], ...]:
    name = (b"x-variant", variant.encode())
    if reply.json_length is None:
        return name, (b"content-type", b"application/json")
    return name, (b"content-type", b"application/octet-stream"), (_JSON_LENGTH, b"%d" % reply.json_length)
