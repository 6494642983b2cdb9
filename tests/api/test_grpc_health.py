"""gRPC's health checks by the stubs of `grpcio-health-checking`: asked once, followed, and at the end of a server."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fakes import Live, live_server, open_variants
from leanserve.api.access import Access
from leanserve.api.v2.grpc_messages import SERVICE, message
from leanserve.api.v2.grpc_server import GrpcPort, GrpcServer, start_grpc
from leanserve.config.limits_section import LimitsConfig
from leanserve.serving.fleet import Fleet
from leanserve.telemetry.startup import Startup

LIMITS = LimitsConfig(body_bytes=2**20).http

SERVING, NOT_SERVING, UNKNOWN = "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"


def asked(service: str) -> Any:
    return health_pb2.HealthCheckRequest(service=service)


def status(reply: Any) -> str:
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(reply.status))


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_server() as server:
        yield server


@pytest.fixture
def stub(live: Live) -> Iterator[Any]:
    with grpc.insecure_channel(live.grpc) as channel:
        yield health_pb2_grpc.HealthStub(channel)


@pytest.mark.parametrize("service", ["", SERVICE])
def test_the_whole_server_and_its_service_are_asked_for(live: Live, stub: Any, service: str) -> None:
    assert status(stub.Check(asked(service))) == SERVING
    live.fleet.draining = True
    try:
        assert status(stub.Check(asked(service))) == NOT_SERVING
    finally:
        live.fleet.draining = False
    assert status(stub.Check(asked(service))) == SERVING


@pytest.mark.parametrize("service", ["pixels", "inference", f"{SERVICE} ", "x" * 9000])
def test_a_service_that_is_not_there_is_not_found_and_unknown_to_who_watches(stub: Any, service: str) -> None:
    with pytest.raises(grpc.RpcError) as refused:
        stub.Check(asked(service))
    assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    assert SERVICE in refused.value.details()
    assert len(refused.value.details()) < 500
    watched = stub.Watch(asked(service), timeout=10)
    assert status(next(watched)) == UNKNOWN
    watched.cancel()


MANY = "RESOURCE_EXHAUSTED"
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


def test_one_connection_follows_little_and_all_of_them_what_connections_allows() -> None:
    """18,000 calls that followed the health of a server took 420 MB of it."""
    with live_server(limits={"connections": 10}) as live, ExitStack() as opened:
        stubs = [
            health_pb2_grpc.HealthStub(opened.enter_context(grpc.insecure_channel(live.grpc, OWN_CONNECTION)))
            for _ in range(2)
        ]
        followed = [stubs[0].Watch(asked(""), timeout=20) for _ in range(8)]
        assert {status(next(each)) for each in followed} == {SERVING}
        assert refusal_of(stubs[0]) == f"{MANY}: this connection has 8 calls open that follow something; end one first"
        others = [stubs[1].Watch(asked(""), timeout=20) for _ in range(2)]
        assert {status(next(each)) for each in others} == {SERVING}
        assert refusal_of(stubs[1]) == f"{MANY}: 10 calls that follow something are open (limits.connections)"
        followed.pop().cancel()
        give_up = time.monotonic() + 5
        while refusal_of(stubs[1]):
            assert time.monotonic() < give_up
            time.sleep(0.02)
        assert status(stubs[0].Check(asked(""))) == SERVING


def refusal_of(stub: Any) -> str:
    """Why nothing may be followed; empty if it may."""
    watched = stub.Watch(asked(""), timeout=20)
    try:
        next(watched)
    except grpc.RpcError as error:
        return f"{error.code().name}: {error.details()}"
    watched.cancel()
    return ""


def test_the_bytes_are_those_of_the_protocol(live: Live) -> None:
    with grpc.insecure_channel(live.grpc) as channel:
        assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"") == b"\x08\x01"
        assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"\n\x1e" + SERVICE.encode()) == b"\x08\x01"


def test_our_messages_are_those_of_the_package() -> None:
    for name, theirs in health_pb2.DESCRIPTOR.message_types_by_name.items():
        ours = message(f"grpc.health.v1.{name}").DESCRIPTOR
        assert [(f.name, f.number, f.type) for f in ours.fields] == [(f.name, f.number, f.type) for f in theirs.fields]
    values = message("grpc.health.v1.HealthCheckResponse").DESCRIPTOR.enum_types_by_name["ServingStatus"].values
    assert {value.name: value.number for value in values} == dict(health_pb2.HealthCheckResponse.ServingStatus.items())


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Fleet, GrpcServer, Any]]:
    gate = threading.Event()
    gate.set()
    service = open_variants(gate).service()
    fleet = service.fleet
    server = await start_grpc(GrpcPort("127.0.0.1", 0, LIMITS), Startup(()), Access())
    server.serve(service)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield fleet, server, health_pb2_grpc.HealthStub(channel)
    finally:
        await server.stop(0)
        fleet.close()


def run(scenario: Callable[[Fleet, GrpcServer, Any], Coroutine[Any, Any, None]]) -> None:
    async def within() -> None:
        async with asyncio.timeout(20), serving() as parts:
            await scenario(*parts)

    asyncio.run(within())


def test_who_watches_is_told_of_every_change_and_of_nothing_else() -> None:
    async def scenario(fleet: Fleet, _: GrpcServer, stub: Any) -> None:
        watched = [stub.Watch(asked(service)) for service in ("", SERVICE, "other")]
        gone = stub.Watch(asked(""))
        assert [status(await stream.read()) for stream in (*watched, gone)] == [SERVING, SERVING, UNKNOWN, SERVING]
        gone.cancel()  # which must not end what others follow
        await fleet.unload("a")  # others serve
        for change in (fleet.unload, fleet.load):
            await change()
            wanted = SERVING if fleet.variants else NOT_SERVING
            assert [status(await stream.read()) for stream in watched[:2]] == [wanted] * 2
        fleet.drain()
        assert [status(await stream.read()) for stream in watched[:2]] == [NOT_SERVING] * 2
        assert status(await stub.Check(asked(""))) == NOT_SERVING

    run(scenario)


def test_streams_end_with_the_server_and_do_not_hold_it_up() -> None:
    async def scenario(_: Fleet, server: GrpcServer, stub: Any) -> None:
        watched = [stub.Watch(asked(service)) for service in ("", "other")]
        for stream in watched:
            await stream.read()
        started = time.monotonic()
        await server.stop(15)
        assert time.monotonic() - started < 5
        for stream in watched:
            assert await stream.read() is grpc.aio.EOF
            assert await stream.code() is grpc.StatusCode.OK

    run(scenario)
