"""The Open Inference Protocol V2 over gRPC: the same core as REST, on a port of its own.

Runs on the event loop that serves HTTP, so that both fronts share the variants, their queues and their metrics. A call
that the client cancels, or whose deadline passes, cancels the coroutine here, by which its rows leave the queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Final, NamedTuple, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

from leanserve.api.access import Access
from leanserve.api.audit import remember_caller
from leanserve.api.service import Service
from leanserve.api.starting import refused
from leanserve.api.v2.grpc_answers import Context, GrpcAnswer, answering, model_answers
from leanserve.api.v2.grpc_health import HEALTH, REQUEST, RESPONSE, Health
from leanserve.api.v2.grpc_messages import SERVICE, message, message_pool
from leanserve.api.v2.grpc_refusals import call_refusal, refuse_call
from leanserve.api.v2.grpc_room import MessageRoom
from leanserve.api.v2.grpc_streams import OpenStreams
from leanserve.api.v2.grpc_wire import glance
from leanserve.api.v2.open_inference import OpenInference
from leanserve.errors import BadInput, BodyTooLarge, NotReady, ServiceError, StartupError
from leanserve.http.limits import HttpLimits
from leanserve.http.messages import Role
from leanserve.live.director import Director
from leanserve.request_identity import CURRENT_REQUEST, RequestIdentities
from leanserve.serving.fleet import Fleet
from leanserve.serving.incidents import unexpected_failure
from leanserve.telemetry.startup import Startup

Parse: TypeAlias = Callable[[bytes], Any]

_SMALL = 2**16
"""Bytes of any message but those of ModelInfer, as in REST."""
_CALLS_PER_CONNECTION = 1024
_TOLD_S = 0.3
"""In this time at the end clients are told one by one to go elsewhere."""
_ARRIVAL_S = 5.0
"""How long a message that is not here as a whole may still arrive at the end, as in REST."""
_DEAD_MS = 20_000
"""After so long without an answer to a ping a connection is dead."""
METHODS: Final[Mapping[str, Role]] = MappingProxyType(
    {
        "ServerLive": "open",
        "ServerReady": "open",
        "ModelReady": "read",
        "ServerMetadata": "read",
        "ModelMetadata": "read",
        "ModelConfig": "read",
        "ModelStatistics": "read",
        "RepositoryIndex": "read",
        "RepositoryModelLoad": "admin",
        "RepositoryModelUnload": "admin",
        "ModelInfer": "predict",
    }
)
"""The calls of the protocol, each with the role that it asks for."""
REFLECTION = ("grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection")
"""The same messages under two names: of the first clients ask now, of the second they used to."""


class _Call(NamedTuple):
    """The name of a call, the role that it asks for, and what makes a request of its message."""

    name: str
    role: Role
    parse: Parse


class GrpcPort(NamedTuple):
    """Where to listen, and within which limits; without credentials in plain text."""

    host: str
    port: int
    limits: HttpLimits
    credentials: grpc.ServerCredentials | None = None


@dataclass(frozen=True, slots=True)
class GrpcServer:
    """A listening server; `port` is the real one where 0 was asked for."""

    server: aio.Server
    port: int
    calls: _Calls
    health: Health
    room: MessageRoom
    streams: OpenStreams

    def serve(self, service: Service) -> None:
        """From now on the service answers, on the loop that runs this."""
        self.calls.serve(service)
        service.fleet.on_change(self.health.changed)
        self.health.changed()

    def serve_again(self, service: Service) -> None:
        """The same with another config, or other variants."""
        self.calls.serve(service)
        self.room.keep(service.config.limits.http)
        self.streams.keep(service.config.limits.http)
        self.health.changed()

    async def stop(self, grace_s: float) -> None:
        """Take no more calls, and let those that are open finish for at most `grace_s` seconds.

        At first new ones are still read, and told UNAVAILABLE: gRPC itself would tell those that it has, and nobody
        has read, that they were cancelled. Then it sends GOAWAY.
        """
        self.health.stop()
        self.calls.end()
        told_s = min(_TOLD_S, grace_s / 2)
        await asyncio.sleep(told_s)
        asyncio.get_running_loop().call_later(min(_ARRIVAL_S, grace_s / 2), self.room.end_asking)
        await self.server.stop(grace_s - told_s)


async def start_grpc(at: GrpcPort, startup: Startup, access: Access) -> GrpcServer:
    """Listen on the running loop; alive, but not ready until it has a fleet.

    Raises:
        StartupError: the address cannot be had.
    """
    server = aio.server(options=_options(at.limits))
    calls, room = _Calls(startup), MessageRoom(at.limits)
    streams = OpenStreams(at.limits)
    door, health = _Door(access, room, streams), Health(calls.ready)
    methods = {
        name: _handler(partial(_answered, door, _Call(name, role, _parser(name)), partial(calls.answer, name)))
        for name, role in METHODS.items()
    }
    services = {SERVICE: methods, HEALTH: _health_methods(health, door)}
    services |= dict.fromkeys(REFLECTION, _reflection_methods(tuple(services), door))
    server.add_generic_rpc_handlers((_Methods(services, room),))
    address = f"[{at.host}]:{at.port}" if ":" in at.host else f"{at.host}:{at.port}"
    try:
        if at.credentials is None:
            claimed = server.add_insecure_port(address)
        else:
            claimed = server.add_secure_port(address, at.credentials)
    except RuntimeError as error:
        raise StartupError(f"cannot listen for gRPC on {address}; choose another port") from error
    await server.start()
    return GrpcServer(server, claimed, calls, health, room, streams)


def _options(limits: HttpLimits) -> tuple[tuple[str, int], ...]:
    """gRPC's own names for the bounds (`grpc/impl/channel_arg_names.h`)."""
    return (
        ("grpc.max_receive_message_length", limits.body_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_metadata_size", limits.header_bytes),
        ("grpc.absolute_max_metadata_size", limits.header_bytes),  # beyond it what comes is thrown away as it comes
        ("grpc.so_reuseport", 0),  # else a second server would share the port without a word
        ("grpc.server_handshake_timeout_ms", round(limits.head_s * 1000)),
        ("grpc.max_connection_idle_ms", round(limits.keep_alive_s * 1000)),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        ("grpc.max_concurrent_streams", _CALLS_PER_CONNECTION),
        ("grpc.keepalive_time_ms", round(limits.keep_alive_s * 1000)),  # finds those that vanished in a call
        ("grpc.keepalive_timeout_ms", _DEAD_MS),
    )


def _reflection_methods(services: Sequence[str], door: _Door) -> dict[str, grpc.RpcMethodHandler]:
    """What tells `grpcurl` and the like which calls there are: of the package, behind the same door."""
    from grpc_reflection.v1alpha import reflection, reflection_pb2

    told = reflection.aio.ReflectionServicer(services, pool=message_pool())
    asked = partial(_small, reflection_pb2.ServerReflectionRequest)

    async def answer(requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
        try:
            door.admit(_Call("ServerReflectionInfo", "read", asked), context)
            with door.streams.one_more(context):
                async for reply in told.ServerReflectionInfo((asked(data) async for data in requests), context):
                    yield reply
            return
        except ServiceError as error:
            refusal = call_refusal(error)
        await refuse_call(refusal, context)

    serialize = reflection_pb2.ServerReflectionResponse.SerializeToString
    handler = grpc.stream_stream_rpc_method_handler(answer, response_serializer=serialize)
    return {"ServerReflectionInfo": handler}


def _health_methods(health: Health, door: _Door) -> dict[str, grpc.RpcMethodHandler]:
    asked = partial(_small, message(REQUEST))
    watched = _Call("Watch", "open", asked)

    async def watch(nothing: Any, context: Context) -> AsyncIterator[Any]:
        with ExitStack() as following:

            async def begin(request: Any, _: Context) -> Any:
                following.enter_context(door.streams.one_more(context))
                return request

            request = await _answered(door, watched, begin, nothing, context)
            async for reply in health.watch(request, context):
                yield reply

    # As if clients sent several: so it is read when it is asked for, and not before the call is admitted.
    watching = grpc.stream_stream_rpc_method_handler(watch, response_serializer=message(RESPONSE).SerializeToString)
    check = partial(_answered, door, _Call("Check", "open", asked), health.check)
    return {"Check": _handler(check), "Watch": watching}


def _handler(answer: GrpcAnswer) -> grpc.RpcMethodHandler:
    """As if clients sent several messages: so one is read when it is asked for, and not before the call is admitted."""
    return grpc.stream_unary_rpc_method_handler(answer, response_serializer=_serialized)


def _serialized(reply: Any) -> bytes:
    """What a reply is on the wire; a prediction was made so already, apart from the loop where it is large."""
    return reply if isinstance(reply, bytes) else reply.SerializeToString()


def _parser(name: str) -> Parse:
    """What makes the request of a message: of ModelInfer, what can be known of it at once."""
    return glance if name == "ModelInfer" else partial(_small, message(f"{name}Request"))


def _small(kind: Any, data: bytes) -> Any:
    if len(data) > _SMALL:
        raise BodyTooLarge(f"the message has {len(data)} bytes; at most {_SMALL} are taken here")
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise BadInput(f"this is no {kind.DESCRIPTOR.name}: {error}") from None


async def _answered(door: _Door, call: _Call, answer: GrpcAnswer, _: Any, context: Context) -> Any:
    """The reply to a call, or the status that refuses it; both tell the identity of the call."""
    try:
        return await _admitted(door, call, answer, context)
    except ServiceError as error:
        refusal = call_refusal(error)
    except Exception as error:
        refusal = call_refusal(unexpected_failure(error, f"a gRPC call of {call.name}"))
    return await refuse_call(refusal, context)


async def _admitted(door: _Door, call: _Call, answer: GrpcAnswer, context: Context) -> Any:
    door.admit(call, context)
    async with door.room.message(context) as data:
        reply = await answer(call.parse(data), context)
    if isinstance(reply, bytes):
        door.room.keep_reply(context, len(reply))
    return reply


class _Methods:
    """A `grpc.GenericRpcHandler`: finds what answers a call.

    One with more metadata than HTTP takes headers is refused before anybody looks at them. gRPC itself ends such a
    call, by their size, but hands all of them over first; a dictionary of a hundred thousand stops the loop for 0.1 s.
    """

    def __init__(self, services: Mapping[str, Mapping[str, grpc.RpcMethodHandler]], room: MessageRoom) -> None:
        self._methods = {
            f"/{service}/{name}": handler
            for service, handlers in services.items()
            for name, handler in handlers.items()
        }
        self._room = room
        self._refusing = grpc.stream_stream_rpc_method_handler(self._refuse)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """The handler of a call, if there is that method."""
        if len(handler_call_details.invocation_metadata) > self._room.most_headers:
            return self._refusing
        return self._methods.get(handler_call_details.method)

    async def _refuse(self, _: Any, context: Context) -> None:
        text = f"the call has more than {self._room.most_headers} fields of metadata (limits.headers)"
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, text)


class _Door:
    """What every call passes before it is answered: it gets its identity, is admitted, and has `room` for a message.

    A call that lasts is one of few `streams`.
    """

    def __init__(self, access: Access, room: MessageRoom, streams: OpenStreams) -> None:
        self.room = room
        self.streams = streams
        self._access = access
        self._identities = RequestIdentities()

    def admit(self, call: _Call, context: Context) -> None:
        """Give a call its identity, and that to its trailing metadata. Raises as `Access.admit`."""
        headers = {
            name.encode(): value.encode(errors="replace")
            for name, value in context.invocation_metadata()
            if isinstance(value, str)
        }
        identity = self._identities.of(headers)
        CURRENT_REQUEST.set(identity)
        context.set_trailing_metadata(tuple((name.decode(), value.decode()) for name, value in identity))
        name = self._access.admit(call.role, headers)
        if call.role == "admin":
            remember_caller(name, context.peer())


class _Calls:
    """What answers every call of the protocol now: nothing but the two of health, until there is a fleet."""

    def __init__(self, startup: Startup) -> None:
        async def refuse(_request: Any, _context: Context) -> Any:
            raise refused(startup)

        self._fleet: Fleet | None = None
        self._experiments: Director | None = None
        self._health = {
            "ServerLive": answering("ServerLive", lambda _: {"live": self.live()}),
            "ServerReady": answering("ServerReady", lambda _: {"ready": self.ready()}),
        }
        self._answers: dict[str, GrpcAnswer] = dict.fromkeys(METHODS, refuse) | self._health

    async def answer(self, name: str, request: Any, context: Context) -> Any:
        """The reply to a call of that name."""
        if self._experiments is not None and (told := self._experiments.headers):
            every = (*(CURRENT_REQUEST.get() or ()), *told)
            context.set_trailing_metadata(tuple((each.decode(), value.decode()) for each, value in every))
        return await self._answers[name](request, context)

    def live(self) -> bool:
        """Whether the service lives, as a starting one does."""
        return self._fleet is None or self._fleet.is_live()

    def ready(self) -> bool:
        """Whether the service is ready: the one place where that is known on this side."""
        return self._fleet is not None and self._fleet.is_ready()

    def serve(self, service: Service) -> None:
        self._fleet, self._experiments = service.fleet, service.experiments
        self._answers = model_answers(OpenInference(service)) | self._health

    def end(self) -> None:
        """From now on nothing is answered any more."""

        async def refuse(_request: Any, _context: Context) -> Any:
            raise NotReady("draining: the service is shutting down")

        self._answers = dict.fromkeys(METHODS, refuse) | self._health
