""" "Half-closed clients lose their answer, pipelining clients that leave are computed": who left, and who has said all.

A client that ends its side of the connection and waits looks like one that is gone. It must get its replies, and one
that is gone must cost nothing.
"""

from __future__ import annotations

import asyncio
import socket

import pytest

from raw_http import HOST, connected, infer_request, read_reply
from rule_service import RuleService, needs_proc, until
from rules import row

pytestmark = needs_proc
GET = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"


def everything(connection: socket.socket) -> bytes:
    data = b""
    while more := connection.recv(65536):
        data += more
    return data


def chunked(number: float) -> bytes:
    """A request that takes uvicorn's way."""
    head, _, body = infer_request("rule", row(number)).partition(b"\r\n\r\n")
    lines = [line for line in head.split(b"\r\n") if not line.startswith(b"content-length")]
    return b"\r\n".join([*lines, b"transfer-encoding: chunked"]) + b"\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


WAYS = {"short": lambda number: infer_request("rule", row(number)), "uvicorn": chunked}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("busy", [False, True], ids=["at once", "later"])
@pytest.mark.parametrize("count", [1, 5])
def test_who_sends_no_more_gets_all_replies(service: RuleService, way: str, count: int, *, busy: bool) -> None:
    sent = b"".join(WAYS[way](number) for number in range(1, count + 1))

    async def scenario() -> bytes:
        with socket.create_connection((HOST, service.port), timeout=20) as connection:
            if busy:
                async with service.busy():
                    connection.sendall(sent)
                    connection.shutdown(socket.SHUT_WR)
                    await asyncio.sleep(0.3)
            else:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
            return await asyncio.to_thread(everything, connection)

    data = asyncio.run(scenario())
    assert data.count(b"HTTP/1.1 ") == data.count(b"HTTP/1.1 200 OK\r\n") == count
    assert data.startswith(b"HTTP/1.1 200 OK\r\n")
    for number in range(1, count + 1):
        assert b"[%d.0,0.0" % (10 * number) in data


def test_a_half_closed_client_that_sent_thousands_of_requests_gets_as_many_replies(service: RuleService) -> None:
    with socket.create_connection((HOST, service.port), timeout=20) as connection:
        connection.sendall(GET * 3000)
        connection.shutdown(socket.SHUT_WR)
        assert everything(connection).count(b'{"live":true}') == 3000


@pytest.mark.parametrize(
    "half", [b"", b"GET /hea", infer_request("rule", row(1))[:-5], chunked(1)[:-5]], ids=["no", "head", "body", "chunk"]
)
def test_who_sends_no_more_in_the_middle_is_let_go(service: RuleService, half: bytes) -> None:
    with socket.create_connection((HOST, service.port), timeout=5) as connection:
        connection.sendall(GET + half)
        connection.shutdown(socket.SHUT_WR)
        assert everything(connection).count(b"HTTP/1.1 200 ") == 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("count", [1, 5, 500])
def test_who_left_with_its_requests_unanswered_is_not_executed(service: RuleService, way: str, count: int) -> None:
    """With 500 the server has stopped reading, and does not come to the end of the stream."""
    sent = b"".join(WAYS[way](number % 100) for number in range(count))
    rows, _ = service.executed()
    gone = service.left()

    async def scenario() -> None:
        async with service.busy():
            held = service.descriptors()
            for _ in range(3):
                async with connected(service.port) as (_, writer):
                    writer.write(sent)
                    await asyncio.sleep(0.2)
            await until(lambda: service.descriptors() == held, seconds=5)

    asyncio.run(scenario())
    assert service.executed()[0] == rows + 1
    assert service.left() == gone + 3
    assert service.queued() == 0


def test_who_left_and_who_waits_are_told_apart_on_one_server(service: RuleService) -> None:
    async def scenario() -> None:
        async with connected(service.port) as (reader, writer):
            async with service.busy():
                writer.write(infer_request("rule", row(7)))
                writer.write_eof()
                await asyncio.sleep(0.1)
                held = service.descriptors()
                for _ in range(50):
                    async with connected(service.port) as (_, leaver):
                        leaver.write(infer_request("rule", row(8)))
                await until(lambda: service.descriptors() == held, seconds=5)
            assert (await read_reply(reader)).outputs()[0] == 70

    rows, _ = service.executed()
    asyncio.run(scenario())
    assert service.executed()[0] == rows + 2
