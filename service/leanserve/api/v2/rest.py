"""The Open Inference Protocol V2 over REST: its table of paths, and the wire format of the infer call.

All paths are known when the service starts, for the model and its variants are; so routing is one look-up of the whole
path, and whatever is not in the table does not exist. Small bodies are decoded where they are; only what would hold up
the event loop for more than about a millisecond is sent to a thread, for the way there and back costs some 50
microseconds.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import TypeAlias

from leanserve.api.bodies import HttpSession, plain_body
from leanserve.api.endpoint import Declaration, Endpoint, endpoint, in_body, in_header, in_path, which_variant
from leanserve.api.service import Service
from leanserve.api.v2.described import IndexQuery, InferAnswer, SwapQuery, infer_query
from leanserve.api.v2.open_inference import OpenInference, terms_of
from leanserve.codecs.infer_plan import InferOptions
from leanserve.codecs.json_body import json_object
from leanserve.codecs.open_inference import (
    JSON_LENGTH_HEADER,
    InferDecoding,
    InferReply,
    InferRequest,
    encode_infer,
    parse_json_length,
)
from leanserve.contracts import Json
from leanserve.errors import BadInput, NotFound
from leanserve.http.content_encoding import compress, encoding_of_reply
from leanserve.http.messages import Request, Response, Role, Route, json_response
from leanserve.serving.decoder_process import Decoding
from leanserve.serving.decoding import LIGHT
from leanserve.serving.fleet import Fleet
from leanserve.serving.session import UNKNOWN_TERMS, Answered, ModelRequest, Terms, VariantChoice
from leanserve.serving.variant import Variant

SMALL = 64 * 2**10
"""Bytes of JSON, or of a tensor of strings, that are decoded on the event loop."""
SMALL_BINARY = 2**20
"""Bytes of numbers in binary: they are looked at, not copied (FP16, BF16 and BOOL are converted or checked)."""
_JSON_LENGTH = b"inference-header-content-length"
_Routing: TypeAlias = Callable[[str | None], Route]


def open_inference_endpoints(service: Service) -> list[Endpoint]:
    """Every endpoint of the protocol on this server."""
    protocol = OpenInference(service)
    metadata = _described(protocol.server_metadata)
    index = Route("POST", "read", partial(_index, protocol))
    return [
        endpoint("/v2", metadata, Declaration("Server metadata")),
        endpoint("/v2/", metadata),
        endpoint("/v2/health/live", _described(partial(_live, protocol), "open"), Declaration("Is the process alive")),
        endpoint(
            "/v2/health/ready",
            _described(partial(_ready, protocol), "open"),
            Declaration("Are all variants warm, and is the service not draining"),
        ),
        endpoint("/v2/models/stats", _described(protocol.statistics), Declaration("Statistics of all variants")),
        endpoint(
            "/v2/repository/index",
            index,
            Declaration("The variants and their states", {"body": in_body(IndexQuery)}),
        ),
        *_model_endpoints(service, protocol),
        *_swap_endpoints(service, protocol),
    ]


def _model_endpoints(service: Service, protocol: OpenInference) -> list[Endpoint]:
    model = protocol.name
    length = in_header(JSON_LENGTH_HEADER, "bytes of JSON before the binary tensors; 0: the body is the only tensor")
    asked = {
        "body": in_body(infer_query(service.base.spec)),
        **which_variant(service),
        "json_length": length,
    }
    infers = Declaration("Infer", asked, {"application/octet-stream": {}}, InferAnswer)

    def describe(summary: str, told: Callable[[str, str | None], Json]) -> tuple[_Routing, Declaration]:
        return (lambda version: _described(partial(told, model, version))), Declaration(summary)

    rows: dict[str, tuple[_Routing, Declaration]] = {
        "": describe("Metadata of the model", protocol.metadata),
        "/config": describe("Configuration of the model", protocol.config),
        "/stats": describe("Statistics of the model", protocol.statistics),
        "/ready": describe("Is the model ready", partial(_model_ready, protocol)),
        "/infer": (lambda version: Route("POST", "predict", partial(infer, protocol, version)), infers),
    }
    return [
        found
        for end, (route, told) in rows.items()
        for found in _by_version(service.fleet, "/v2/models", end, route, told)
    ]


def _swap_endpoints(service: Service, protocol: OpenInference) -> list[Endpoint]:
    """Loading and unloading; nothing is told of it where the config does not allow it."""
    model, taken = protocol.name, {"body": in_body(SwapQuery)}
    is_told = service.config.model_control == "explicit"
    rows: dict[str, tuple[_Routing, Declaration]] = {
        "/load": (lambda version: _swapped(partial(protocol.load, model, version)), Declaration("Load", taken)),
        "/unload": (lambda version: _swapped(partial(protocol.unload, model, version)), Declaration("Unload", taken)),
    }
    found = [
        item
        for end, (route, told) in rows.items()
        for item in _by_version(service.fleet, "/v2/repository/models", end, route, told)
    ]
    return found if is_told else [item._replace(declared=None) for item in found]


def _by_version(fleet: Fleet, root: str, end: str, route: _Routing, told: Declaration) -> list[Endpoint]:
    """The endpoint of the model, which leaves the choice of the version to the service, and that of each version."""
    model, versions = {"model": in_path([fleet.name])}, list(fleet.plans)
    both = model | {"version": in_path(list(fleet.opened))}
    each = {f"{root}/{fleet.name}/versions/{version}{end}": route(version) for version in versions}
    return [
        Endpoint(
            f"{root}/{{model}}{end}",
            {f"{root}/{fleet.name}{end}": route(None)},
            told._replace(takes=model | dict(told.takes)),
        ),
        Endpoint(f"{root}/{{model}}/versions/{{version}}{end}", each, told._replace(takes=both | dict(told.takes))),
    ]


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


def _described(describe: Callable[[], Json], role: Role = "read") -> Route:
    async def answer(_: Request) -> Response:
        return json_response(describe())

    return Route("GET", role, answer)


def _live(protocol: OpenInference) -> Json:
    protocol.check_live()
    return protocol.health()


def _ready(protocol: OpenInference) -> Json:
    protocol.check_ready()
    return protocol.health()


def _model_ready(protocol: OpenInference, model: str, version: str | None) -> Json:
    protocol.check_ready(model, version)
    return {"name": model, "ready": True}


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

    return Route("POST", "admin", answer)


async def _told(request: Request) -> dict[str, Json]:
    """The JSON of a small request; no body stands for an empty object."""
    return json_object(await plain_body(request, SMALL) or b"{}")


def infer(protocol: OpenInference, version: str | None, request: Request) -> Awaitable[Response]:
    """Answer an infer request.

    Raises:
        ServiceError: whatever kept it from being answered.
    """
    return _Infer(protocol, version, request).run()


class _Infer(HttpSession):
    _json_length: int | None = None
    _options: InferOptions

    def __init__(self, protocol: OpenInference, version: str | None, request: Request) -> None:
        super().__init__(protocol.service, request)
        self._protocol = protocol
        self._version = version
        self._compression = encoding_of_reply(request.header(b"accept-encoding"))
        self.encodes_quickly = self._compression is None

    def asked(self) -> VariantChoice:
        self._json_length = parse_json_length(self.http.headers.get(_JSON_LENGTH))
        wanted = self._version or self.http.header(b"x-variant")
        return wanted, self.http.header(self.fleet.sticky_header)

    def terms(self, variant: Variant) -> Terms:
        options = self._protocol.decoder_of(variant).options(self.http.begun, self._json_length)
        return UNKNOWN_TERMS if options is None else terms_of(options)

    def decodes_quickly(self) -> bool:
        body, json_length = self.body or b"", self._json_length
        parsed = len(body) if json_length is None or self._protocol.takes_strings else json_length
        self.heavy = parsed if LIGHT < parsed <= SMALL and len(body) <= SMALL_BINARY else 0
        return parsed <= LIGHT and len(body) <= SMALL_BINARY

    def decoding(self, variant: Variant) -> Decoding[InferRequest]:
        return InferDecoding(self._protocol.decoder_of(variant), self.body or b"", self._json_length)

    def take(self, _: Variant, made: InferRequest) -> ModelRequest:
        self._options = options = made.options
        if options.is_postprocessed and self._protocol.service.post.costly:
            self.encodes_quickly = False
        return ModelRequest((made.inputs,), terms=terms_of(options), sequence=options.sequence)

    def decode(self, variant: Variant) -> ModelRequest:
        """Without a look at what it takes: `decodes_quickly` had one."""
        return self.take(variant, self._protocol.decoder_of(variant).decode(self.body or b"", self._json_length))

    def encode(self, answered: Answered) -> Response:
        model, variant = self._protocol.name, answered.variant.name
        options, outputs = self._options, answered.parts[0].outputs
        if options.is_postprocessed:
            options, outputs = self._protocol.postprocessed(options, outputs, answered.variant.spec)
        reply = encode_infer(options, outputs, model, variant, answered.how_it_ran())
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
