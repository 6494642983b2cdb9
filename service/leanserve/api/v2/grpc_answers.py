"""Answers to the calls of the protocol that are about a model: the same core as REST, in messages of gRPC."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from pickle import PickleBuffer
from typing import Any, NamedTuple, TypeAlias

from google.protobuf.json_format import ParseDict

from leanserve.api.v2.grpc_infer import GrpcInferDecoder, encode
from leanserve.api.v2.grpc_messages import message
from leanserve.api.v2.grpc_wire import SeenMessage, glance, parse
from leanserve.api.v2.open_inference import OpenInference, terms_of
from leanserve.codecs.infer_plan import InferOptions
from leanserve.codecs.open_inference import InferRequest
from leanserve.contracts import Json, ModelSpec, Weighed
from leanserve.errors import NotReady
from leanserve.serving.decoder_process import Decoding
from leanserve.serving.session import UNKNOWN_TERMS, Answered, ModelRequest, Session, Terms, VariantChoice
from leanserve.serving.variant import Variant

Context: TypeAlias = Any
GrpcAnswer: TypeAlias = Callable[[Any, Context], Awaitable[Any]]

SMALL_RAW = 2**20
"""Bytes of a message with raw tensors that is decoded on the event loop, as in REST."""
_QUICK_S = 1e-3
"""Seconds that this may take there."""


def model_answers(protocol: OpenInference) -> dict[str, GrpcAnswer]:
    """What answers each call of the protocol that is about a model."""
    index, config = protocol.repository_index, protocol.config
    return {
        "ModelReady": answering("ModelReady", partial(_model_ready, protocol)),
        "ServerMetadata": answering("ServerMetadata", lambda _: protocol.server_metadata()),
        "ModelMetadata": answering("ModelMetadata", lambda r: protocol.metadata(r.name, r.version)),
        "ModelConfig": answering("ModelConfig", lambda r: {"config": config(r.name, r.version)}),
        "ModelStatistics": answering("ModelStatistics", lambda r: protocol.statistics(r.name, r.version)),
        "RepositoryIndex": answering("RepositoryIndex", lambda r: {"models": index(ready_only=r.ready)}),
        "RepositoryModelLoad": _swapped("RepositoryModelLoad", protocol.load),
        "RepositoryModelUnload": _swapped("RepositoryModelUnload", protocol.unload),
        "ModelInfer": partial(_infer, protocol, {}),
    }


def _model_ready(protocol: OpenInference, request: Any) -> Json:
    try:
        protocol.check_ready(request.name, request.version)
    except NotReady:
        return {"ready": False}
    return {"ready": True}


def _infer(
    protocol: OpenInference, decoders: dict[ModelSpec, GrpcInferDecoder], request: Any, context: Context
) -> Awaitable[Any]:
    headers = dict(context.invocation_metadata())
    return _Infer(protocol, decoders, request, headers).run()


class GrpcDecoding(NamedTuple):
    """A message to be decoded."""

    decoder: GrpcInferDecoder
    asked: SeenMessage

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process: the message beside the rest, uncopied, and not what was parsed of it."""
        return _sent, (self.decoder, PickleBuffer(self.asked.data))

    def prepare(self) -> Weighed[InferRequest]:
        """It was looked at already."""
        return Weighed(self.asked.seconds, self.decode)

    def decode(self) -> InferRequest:
        """Here and now. Raises `BadInput`."""
        return self.decoder.decode(self.asked.parsed or parse(self.asked.data))


def _sent(decoder: GrpcInferDecoder, data: bytes) -> GrpcDecoding:
    return GrpcDecoding(decoder, glance(bytes(data)))


class _Infer(Session[Any]):
    """The session of a request in the messages of gRPC, which have come whole before it begins."""

    _options: InferOptions

    def __init__(
        self,
        protocol: OpenInference,
        decoders: dict[ModelSpec, GrpcInferDecoder],
        asked: SeenMessage,
        headers: Mapping[str, str],
    ) -> None:
        self.fleet = protocol.fleet
        self.body = asked
        self.is_disconnected = _stays
        self._form = asked.form
        self._protocol = protocol
        self._decoders = decoders
        self._headers = headers

    def asked(self) -> VariantChoice:
        self._protocol.check_model(self.body.model_name)
        wanted = self.body.model_version or self._headers.get("x-variant")
        return wanted, self._headers.get(self.fleet.sticky_header.decode())

    def terms(self, _: Variant) -> Terms:
        return UNKNOWN_TERMS

    async def read(self) -> None:
        """Nothing is left to read."""

    def body_size(self) -> int:
        return len(self.body.data)

    def decodes_quickly(self) -> bool:
        asked: SeenMessage = self.body
        return asked.form == "raw" and len(asked.data) <= SMALL_RAW and asked.seconds <= _QUICK_S

    def decoding(self, variant: Variant) -> Decoding[InferRequest]:
        decoder = self._decoders.get(variant.spec) or self._decoders.setdefault(
            variant.spec, GrpcInferDecoder(variant.spec)
        )
        return GrpcDecoding(decoder, self.body)

    def take(self, _: Variant, made: InferRequest) -> ModelRequest:
        self._options = options = made.options
        self.encodes_quickly = not (options.is_postprocessed and self._protocol.service.post.costly)
        return ModelRequest((made.inputs,), terms=terms_of(options), sequence=options.sequence)

    def encode(self, answered: Answered) -> Any:
        names = (self._protocol.name, answered.variant.name)
        options, outputs = self._options, answered.parts[0].outputs
        if options.is_postprocessed:
            options, outputs = self._protocol.postprocessed(options, outputs, answered.variant.spec)
        return encode(options, outputs, self._form, names, answered.how_it_ran())


def _stays() -> bool:
    """A cancelled call ends the coroutine, which the variant sees by itself."""
    return False


def _swapped(name: str, swap: Callable[[str, str | None, Iterable[str]], Awaitable[None]]) -> GrpcAnswer:
    reply = message(f"{name}Response")

    async def answer(request: Any, _context: Context) -> Any:
        # As in the paths of REST: `N` is the whole model, `N/versions/V` one version of it.
        model, _, version = request.model_name.partition("/versions/")
        await swap(model, version or None, request.parameters)
        return reply()

    return answer


def answering(name: str, describe: Callable[[Any], Json]) -> GrpcAnswer:
    """Answers a call with the document that is made of its request."""
    reply = message(f"{name}Response")

    async def answer(request: Any, _: Context) -> Any:
        return ParseDict(describe(request), reply())

    return answer
