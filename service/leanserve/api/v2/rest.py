"""The Open Inference Protocol V2 over REST: its table of paths, and the infer call from body to reply.

All paths are known when the service starts, for the model and its variants are; so routing is one look-up of the whole
path, and whatever is not in the table does not exist. The infer call reads as a straight line: choose -> body ->
decode -> queue and run -> encode. Small bodies are decoded where they are; only what would hold up the event loop for
more than about a millisecond is sent to a thread, for the way there and back costs some 50 microseconds.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import partial

import orjson

from leanserve.api.v1.predict import decode_for, how_it_ran, off_loop, plain_body
from leanserve.api.v2.open_inference import OpenInference
from leanserve.codecs.open_inference import InferDecoder, InferReply, encode_infer, parse_json_length
from leanserve.codecs.tensors import Buffer
from leanserve.contracts import Json
from leanserve.errors import BadInput, NotFound
from leanserve.http.content_encoding import compress, encoding_of_reply
from leanserve.http.messages import Request, Response, Route, disconnect_check, json_response
from leanserve.serving.fleet import Fleet

SMALL = 64 * 2**10
"""Bytes of JSON, or of a tensor of strings, that are decoded on the event loop; also of outputs encoded there."""
SMALL_BINARY = 2**20
"""Bytes of numbers in binary: they are looked at, not copied (FP16, BF16 and BOOL are converted or checked)."""
_JSON_LENGTH = b"inference-header-content-length"


def open_inference_routes(fleet: Fleet) -> dict[str, Route]:
    """Every path of the protocol on this server."""
    protocol = OpenInference(fleet)
    infer = _Infer(protocol)
    routes = {
        "/v2": _described(protocol.server_metadata),
        "/v2/": _described(protocol.server_metadata),
        "/v2/health/live": _described(protocol.health),
        "/v2/health/ready": _described(partial(_ready, protocol)),
        "/v2/models/stats": _described(protocol.statistics),
        "/v2/repository/index": Route("POST", "description", partial(_index, protocol)),
    }
    model = protocol.name
    for version in (None, *fleet.reports):
        path = f"/v2/repository/models/{model}" + (f"/versions/{version}" if version else "")
        routes[f"{path}/load"] = _swapped(partial(protocol.load, model, version))
        routes[f"{path}/unload"] = _swapped(partial(protocol.unload, model, version))
    for version in (None, *fleet.reports):
        path = f"/v2/models/{model}" + (f"/versions/{version}" if version else "")
        routes[path] = _described(partial(protocol.metadata, model, version))
        routes[f"{path}/config"] = _described(partial(protocol.config, model, version))
        routes[f"{path}/stats"] = _described(partial(protocol.statistics, model, version))
        routes[f"{path}/ready"] = _described(partial(_model_ready, protocol, version))
        routes[f"{path}/infer"] = Route("POST", "prediction", partial(infer.answer, version))
    return routes


def no_such_path(fleet: Fleet, path: str) -> NotFound:
    """Why a path below /v2/ is not in the table, as exactly as can be told."""
    model, variants = fleet.base.name, ", ".join(fleet.reports)
    parts = path.removeprefix("/v2/").removeprefix("repository/").split("/")
    if parts[0] == "models" and len(parts) > 1:
        if parts[1] != model:
            return NotFound(f"no model '{parts[1][:80]}'; this server has '{model}'")
        if len(parts) > 3 and parts[2] == "versions" and parts[3] not in fleet.reports:
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


async def _index(protocol: OpenInference, caller: Request) -> Response:
    asked = await _asked(caller)
    ready = asked.get("ready", False) if isinstance(asked, dict) else None
    if type(ready) is not bool:
        raise BadInput("the request must be a JSON object; its only key 'ready' is true or false")
    return json_response(protocol.repository_index(ready_only=ready))


def _swapped(swap: Callable[[Iterable[str]], Awaitable[None]]) -> Route:
    async def answer(caller: Request) -> Response:
        asked = await _asked(caller)
        parameters = asked.get("parameters", {}) if isinstance(asked, dict) else None
        if not isinstance(parameters, dict):
            raise BadInput("the request must be a JSON object; its only key 'parameters' is one, too")
        await swap(parameters)
        return json_response({})

    return Route("POST", "description", answer)


async def _asked(caller: Request) -> Json:
    """The JSON of a small request; no body stands for an empty object."""
    body = await plain_body(caller, SMALL)
    try:
        return orjson.loads(body or b"{}")
    except orjson.JSONDecodeError as error:
        raise BadInput(f"the request is not valid JSON: {error}") from None


class _Infer:
    """The infer call; keeps the decoder, which knows the JSON headers of recent requests."""

    def __init__(self, protocol: OpenInference) -> None:
        spec = protocol.fleet.base.spec
        self._protocol = protocol
        self._decoder = InferDecoder(spec)
        self._strings = any(field.dtype == "object" for field in spec.inputs)

    async def answer(self, version: str | None, caller: Request) -> Response:
        protocol, fleet = self._protocol, self._protocol.fleet
        asked = version or caller.header(b"x-variant"), caller.header(fleet.sticky_header)
        variant = fleet.choose(*asked)
        caller.variant = variant.name
        json_length = parse_json_length(caller.headers.get(_JSON_LENGTH))
        body: Buffer | None = caller.body
        if body is None:
            options = self._decoder.options(caller.begun, json_length)
            if options is None:
                variant.check_open(None)
            else:
                variant.check_open(options.priority or 0, protocol.timeout_s(variant, options))
            body = await plain_body(caller, fleet.config.limits.body_bytes)
            variant = fleet.confirm(variant, *asked)
            caller.variant = variant.name
        if self._is_small(body, json_length):
            request = self._decoder.decode(body, json_length)
        else:
            request = await decode_for(variant, None, self._decoder.decode, body, json_length)
            variant = fleet.confirm(variant, *asked)
            caller.variant = variant.name
        prediction = await protocol.infer(variant, request.inputs, request.options, disconnect_check(caller.receive))
        parts = (request.options, prediction.outputs, protocol.name, variant.name, how_it_ran(prediction))
        small = sum([output.nbytes for output in prediction.outputs]) <= SMALL
        reply = encode_infer(*parts) if small else await off_loop(encode_infer, *parts)
        encoding = encoding_of_reply(caller.header(b"accept-encoding"))
        if encoding is None:
            return Response(reply.body, _headers(reply, variant.name))
        body = await off_loop(compress, reply.body, encoding)
        return Response(body, (*_headers(reply, variant.name), (b"content-encoding", encoding.encode())))

    def _is_small(self, body: Buffer, json_length: int | None) -> bool:
        parsed = len(body) if json_length is None or self._strings else json_length
        return parsed <= SMALL and len(body) <= SMALL_BINARY


def _headers(reply: InferReply, variant: str) -> tuple[tuple[bytes, bytes], ...]:
    name = (b"x-variant", variant.encode())
    if reply.json_length is None:
        return name, (b"content-type", b"application/json")
    return name, (b"content-type", b"application/octet-stream"), (_JSON_LENGTH, b"%d" % reply.json_length)
