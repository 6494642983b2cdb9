"""What a head asks for besides its request (another protocol, a tunnel, trailers) changes nobody's answer.

An upgrade is ignored, as HTTP allows (RFC 9110, 7.8): stock clients offer HTTP/2 with every request.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from raw_http import HOST, Connection, PendingResult, ask, connected, infer_request, post, read_reply
from rule_service import RuleService, serving
from rules import row

INFER = "/v2/models/rules/infer"
CURL = "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
JDK = (
    "Connection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAAAAQBAAAAAAUAAEAAAAYABgAA\r\n"
    "Upgrade: h2c\r\nUser-Agent: Java-http-client/17.0.15\r\n"
)
WEBSOCKET = (
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
UPGRADES = {
    "curl": CURL,
    "jdk": JDK,
    "websocket": WEBSOCKET,
    "tls": "Connection: keep-alive, Upgrade\r\nUpgrade: TLS/1.0\r\n",
    "unknown": "connection: upgrade\r\nupgrade: foo\r\n",
    "two": "Connection: keep-alive\r\nUpgrade: h2c\r\nConnection: Upgrade\r\nUpgrade: foo\r\n",
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RuleService]:
    folder = tmp_path_factory.mktemp("upgrades")
    with serving(folder, "rule", "rule2") as running:
        yield running
    assert "Traceback" not in (folder / "log").read_text()


def body_of(number: float) -> bytes:
    """An infer request's body for a row that is answered with ten times this number."""
    return infer_request("rule", row(number)).partition(b"\r\n\r\n")[2]


def request(
    number: float, headers: str = "", *, path: str = INFER, method: str = "POST", coding: str = "length"
) -> tuple[bytes, bytes]:
    """Head and body of an infer request."""
    body = body_of(number)
    length = f"Content-Length: {len(body)}" if coding == "length" else "Transfer-Encoding: chunked"
    if coding == "chunked":
        body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:7], body[7:], b""))
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\n{headers}{length}\r\n\r\n".encode(), body


async def send(connection: Connection, *packets: bytes) -> None:
    for packet in packets:
        connection[1].write(packet)
        await connection[1].drain()
        await asyncio.sleep(0.01 if len(packet) > 1 else 0)


async def is_closed(connection: Connection) -> bool:
    async with asyncio.timeout(5):
        return await connection[0].read(1) == b""


async def answers(service: RuleService, packets: Sequence[bytes], count: int = 1) -> list[PendingResult]:
    """The replies to these packets, and that the next request on their connection is answered as itself."""
    async with asyncio.timeout(20), connected(service.port) as connection:
        await send(connection, *packets)
        replies = [await read_reply(connection[0]) for _ in range(count)]
        await send(connection, infer_request("rule", row(9)))
        assert (await read_reply(connection[0])).outputs()[0] == 90
    return replies


@pytest.mark.parametrize("coding", ["length", "chunked"])
@pytest.mark.parametrize("packets", ["one", "two", "bytes", "pipelined"])
@pytest.mark.parametrize("upgrade", UPGRADES.values(), ids=UPGRADES)
def test_a_request_that_offers_an_upgrade_is_answered_over_http_1_1(
    service: RuleService, upgrade: str, packets: str, coding: str
) -> None:
    head, body = request(3, upgrade, coding=coding)
    whole = head + body
    split = {
        "one": [whole],
        "two": [head, body],
        "bytes": [head, *(body[place : place + 1] for place in range(len(body)))],
        "pipelined": [infer_request("rule", row(2)) + whole + whole + infer_request("rule", row(4))],
    }[packets]
    wanted = [20, 30, 30, 40] if packets == "pipelined" else [30]
    replies = asyncio.run(answers(service, split, len(wanted)))
    assert [reply.outputs()[0] for reply in replies] == wanted


def test_a_head_with_an_upgrade_may_come_byte_by_byte(service: RuleService) -> None:
    whole = b"".join(request(3, JDK))
    (reply,) = asyncio.run(answers(service, [whole[place : place + 1] for place in range(len(whole))]))
    assert reply.outputs()[0] == 30


@pytest.mark.parametrize("upgrade", UPGRADES.values(), ids=UPGRADES)
@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/healthz", 200), ("GET", INFER, 405)])
def test_a_handshake_gets_the_ordinary_reply_of_its_path_on_every_request(
    service: RuleService, upgrade: str, method: str, path: str, status: int
) -> None:
    handshake = f"{method} {path} HTTP/1.1\r\nHost: x\r\n{upgrade}\r\n".encode()

    async def scenario() -> None:
        async with asyncio.timeout(20), connected(service.port) as connection:
            for number in range(3):
                await send(connection, handshake)
                reply = await read_reply(connection[0])
                assert reply.status == status
                assert "upgrade" not in reply.headers
                await send(connection, infer_request("rule", row(number)))
                assert (await read_reply(connection[0])).outputs()[0] == 10 * number
            await send(connection, handshake * 50)
            assert [(await read_reply(connection[0])).status for _ in range(50)] == [status] * 50

    asyncio.run(scenario())


@pytest.mark.parametrize("upgrade", UPGRADES.values(), ids=UPGRADES)
def test_a_handshake_behind_a_prediction_says_the_same_to_other_clients_afterwards(
    service: RuleService, upgrade: str
) -> None:
    """The body behind it is as long as the prediction's, so that the one could be taken for the other."""
    prediction = b"".join(request(5))
    handshake = f"GET /healthz HTTP/1.1\r\nHost: x\r\n{upgrade}Content-Length: {len(body_of(5))}\r\n\r\n".encode()

    async def scenario() -> None:
        for _ in range(2):
            async with asyncio.timeout(20), connected(service.port) as connection:
                await send(connection, prediction)
                assert (await read_reply(connection[0])).outputs()[0] == 50
                await send(connection, handshake + body_of(6))
                assert (await read_reply(connection[0])).json() == {"live": True}

    asyncio.run(scenario())


@pytest.mark.parametrize("upgrade", ["websocket", "h2c"])
def test_a_handshake_that_ends_its_connection_gets_its_reply_first(service: RuleService, upgrade: str) -> None:
    head, body = request(3, f"Connection: Upgrade, close\r\nUpgrade: {upgrade}\r\n")

    async def scenario() -> None:
        async with asyncio.timeout(20), connected(service.port) as connection:
            await send(connection, head + body)
            reply = await read_reply(connection[0])
            assert (reply.outputs()[0], reply.headers["connection"]) == (30, "close")
            assert await is_closed(connection)

    asyncio.run(scenario())


SMUGGLED = b"POST /v2/models/rules/versions/rule2/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b"


@pytest.mark.parametrize("upgrade", UPGRADES.values(), ids=UPGRADES)
@pytest.mark.parametrize("apart", [False, True], ids=["one packet", "two packets"])
def test_a_body_that_looks_like_a_request_is_a_body(service: RuleService, upgrade: str, apart: bool) -> None:  # noqa: FBT001
    body = SMUGGLED % (len(body_of(1)), body_of(1))
    head = post(INFER, body, *upgrade.strip().split("\r\n")).removesuffix(body)
    ran, _ = service.executed("rule2")
    (reply,) = asyncio.run(answers(service, [head, body] if apart else [head + body]))
    assert reply.status == 400
    assert service.executed("rule2")[0] == ran


@pytest.mark.parametrize("target", ["x:80", INFER, "http://x/healthz"])
@pytest.mark.parametrize("upgrade", ["", CURL], ids=["plain", "upgrade"])
@pytest.mark.parametrize("apart", [False, True], ids=["one packet", "two packets"])
def test_a_tunnel_is_refused_and_nothing_in_it_is_run(
    service: RuleService,
    target: str,
    upgrade: str,
    apart: bool,  # noqa: FBT001
) -> None:
    head = f"CONNECT {target} HTTP/1.1\r\nHost: x\r\n{upgrade}\r\n".encode()
    tunnelled = SMUGGLED % (len(body_of(1)), body_of(1))
    ran, _ = service.executed("rule2")

    async def scenario() -> None:
        for before in (b"", infer_request("rule", row(2))):
            async with asyncio.timeout(20), connected(service.port) as connection:
                await send(connection, before)
                assert not before or (await read_reply(connection[0])).outputs()[0] == 20
                await send(connection, *([head, tunnelled] if apart else [head + tunnelled]))
                reply = await read_reply(connection[0])
                assert (reply.status, reply.headers["connection"]) == (400, "close")
                assert reply.json()["code"] == "bad_input"
                assert await is_closed(connection)

    asyncio.run(scenario())
    assert service.executed("rule2")[0] == ran


@pytest.mark.parametrize("wrong", [b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n", b"no HTTP at all\r\n\r\n"])
def test_what_is_wrong_behind_requests_that_are_still_run_is_refused_in_its_turn(
    service: RuleService, wrong: bytes
) -> None:
    async def scenario() -> None:
        async with asyncio.timeout(20), connected(service.port) as connection:
            async with service.busy():
                await send(connection, infer_request("rule", row(7)), infer_request("rule", row(8)) + wrong, SMUGGLED)
            for number in (7, 8):
                assert (await read_reply(connection[0])).outputs()[0] == 10 * number
            assert (await read_reply(connection[0])).status == 400
            assert await is_closed(connection)

    asyncio.run(scenario())


def test_a_broken_body_behind_requests_that_are_still_run_is_refused_in_its_turn(service: RuleService) -> None:
    head, body = request(3, coding="chunked")

    async def scenario() -> None:
        async with asyncio.timeout(20), connected(service.port) as connection:
            async with service.busy():
                await send(connection, infer_request("rule", row(7)) + infer_request("rule", row(8)) + head)
                await send(connection, body[:5] + b"zz\r\n", SMUGGLED)
            for number in (7, 8):
                assert (await read_reply(connection[0])).outputs()[0] == 10 * number
            assert (await read_reply(connection[0])).status == 400
            assert await is_closed(connection)

    asyncio.run(scenario())


def test_a_broken_body_of_a_request_that_was_answered_before_is_no_second_reply(service: RuleService) -> None:
    head, body = request(3, coding="chunked", path="/v2/nothing")

    async def scenario() -> None:
        async with asyncio.timeout(20), connected(service.port) as connection:
            await send(connection, head)
            assert (await read_reply(connection[0])).status == 404
            await send(connection, body[:5] + b"zz\r\n", SMUGGLED)
            assert await is_closed(connection)

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "trailer",
    [
        "x-variant: rule2",
        "X-Variant: nobody",
        "inference-header-content-length: 3",
        "content-encoding: gzip",
        "host: y",
        "connection: upgrade\r\nupgrade: h2c",
        "expect: 100-continue",
    ],
)
@pytest.mark.parametrize("apart", [False, True], ids=["one packet", "two packets"])
def test_trailers_change_nothing(service: RuleService, trailer: str, apart: bool) -> None:  # noqa: FBT001
    head, body = request(3, "x-variant: rule\r\nTrailer: x-variant\r\n", coding="chunked")
    rest = f"{trailer}\r\n\r\n".encode()
    packets = [head, body[:-2], rest] if apart else [head + body[:-2] + rest]
    for reply in asyncio.run(answers(service, packets * 2, 2)):
        assert reply.outputs()[0] == 30
        assert reply.headers["x-variant"] == "rule"


def test_a_trailer_may_end_its_connection(service: RuleService) -> None:
    head, body = request(3, coding="chunked")

    async def scenario() -> None:
        async with asyncio.timeout(20), connected(service.port) as connection:
            await send(connection, head + body[:-2] + b"connection: close\r\n\r\n" + infer_request("rule", row(4)))
            reply = await read_reply(connection[0])
            assert (reply.outputs()[0], reply.headers["connection"]) == (30, "close")
            assert await is_closed(connection)

    asyncio.run(scenario())


@pytest.mark.parametrize("trailer", ["content-length: 5", "transfer-encoding: chunked"])
def test_a_trailer_that_tells_another_length_is_refused_and_ends_the_connection(
    service: RuleService, trailer: str
) -> None:
    head, body = request(3, coding="chunked")

    async def scenario() -> None:
        async with asyncio.timeout(20), connected(service.port) as connection:
            await send(connection, head + body[:-2] + f"{trailer}\r\n\r\n".encode() + SMUGGLED)
            assert (await read_reply(connection[0])).status == 400
            assert await is_closed(connection)

    asyncio.run(scenario())


ANSWERED = {
    "letter case": request(3, "X-VARIANT: rule2\r\n"),
    "spaces": request(3, "x-variant:\t rule2 \t\r\n"),
    "two variants": request(3, "x-variant: rule\r\nx-variant: rule2\r\n"),
    "connection": request(3, "x-variant: rule2\r\nConnection: keep-alive, Upgrade\r\n"),
    "two connections": request(3, "x-variant: rule2\r\nConnection: Upgrade\r\nConnection: keep-alive\r\n"),
    "upgrade alone": request(3, "x-variant: rule2\r\nUpgrade: h2c\r\n"),
    "settings alone": request(3, "x-variant: rule2\r\nHTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"),
    "te": request(3, "x-variant: rule2\r\nTE: trailers\r\n"),
    "trailer": request(3, "x-variant: rule2\r\nTrailer: x-variant\r\n"),
    "absolute": request(3, "x-variant: rule2\r\n", path=f"http://elsewhere{INFER}"),
    "percent": request(3, "x-variant: rule2\r\n", path="/v2/models/%72ules/infer"),
    "query": request(3, "x-variant: rule2\r\n", path=f"{INFER}?x-variant=rule"),
    "empty lines before": (b"\r\n\r\n" + request(3, "x-variant: rule2\r\n")[0], body_of(3)),
}


@pytest.mark.parametrize("sent", ANSWERED.values(), ids=ANSWERED)
def test_an_odd_head_means_the_same_the_first_time_and_ever_after(
    service: RuleService, sent: tuple[bytes, bytes]
) -> None:
    for _ in range(2):
        for reply in asyncio.run(answers(service, [b"".join(sent), *sent], 2)):
            assert reply.outputs()[0] == 30
            assert reply.headers["x-variant"] == "rule2"


REFUSED = {
    "two hosts": request(3, "Host: y\r\n")[0],
    "no host": request(3)[0].replace(b"Host: x\r\n", b""),
    "folded": request(3, "x-variant: rule\r\n 2\r\n")[0],
    "bare line feed": request(3, "x-a: 1\nx-variant: rule2\r\n")[0],
    "bare carriage return": request(3, "x-a: 1\rx-variant: rule2\r\n")[0],
    "head ends with line feeds": request(3)[0].replace(b"\r\n\r\n", b"\n\n"),
    "two lengths": request(3, "Content-Length: 1\r\n")[0],
    "both codings": request(3, "Transfer-Encoding: chunked\r\n")[0],
    "space before the colon": request(3, "x-variant : rule2\r\n")[0],
    "nul": request(3, "x-a: \0\r\n")[0],
    "http/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "target": request(3, path="v2/models/rules/infer")[0],
    "path of no letters": request(3, path="/é")[0],
}


@pytest.mark.parametrize("head", REFUSED.values(), ids=REFUSED)
def test_a_head_that_could_be_read_in_two_ways_is_refused_the_first_time_and_ever_after(
    service: RuleService, head: bytes
) -> None:
    async def scenario() -> None:
        for before in (b"", infer_request("rule", row(2))):
            async with asyncio.timeout(20), connected(service.port) as connection:
                await send(connection, before)
                assert not before or (await read_reply(connection[0])).outputs()[0] == 20
                await send(connection, head + body_of(3))
                reply = await read_reply(connection[0])
                assert (reply.status, reply.headers["connection"]) == (400, "close")
                assert set(reply.json()) == {"error", "code"}
                assert await is_closed(connection)

    asyncio.run(scenario())


def has_http_2() -> bool:
    curl = shutil.which("curl")
    return curl is not None and "HTTP2" in subprocess.check_output([curl, "--version"], text=True)


@pytest.mark.skipif(not has_http_2(), reason="curl with HTTP/2 is not installed")
@pytest.mark.parametrize("options", [[], ["-H", "transfer-encoding: chunked"]], ids=["length", "chunked"])
def test_curl_offers_http_2_and_is_answered(service: RuleService, tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "body").write_bytes(body_of(3))
    url = f"http://{HOST}:{service.port}{INFER}"
    transfer = ["-s", "--http2", *options, "--data-binary", f"@{tmp_path / 'body'}", url]
    replies = subprocess.check_output(["curl", *transfer, "--next", *transfer], text=True, timeout=20)
    assert [json.loads(reply + "}]}")["outputs"][0]["data"][0] for reply in replies.split("}]}")[:-1]] == [30, 30]


CLIENT = """
import java.net.URI;
import java.net.http.*;
class Client {
  public static void main(String[] arguments) throws Exception {
    var client = HttpClient.newHttpClient();
    for (int turn = 0; turn < 3; turn++) {
      var body = HttpRequest.BodyPublishers.ofString(arguments[1]);
      var request = HttpRequest.newBuilder(URI.create(arguments[0])).POST(body).build();
      System.out.println(client.send(request, HttpResponse.BodyHandlers.ofString()).body());
    }
  }
}
"""


@pytest.mark.skipif(shutil.which("javac") is None, reason="no JDK is installed")
def test_javas_client_offers_http_2_and_is_answered(service: RuleService, tmp_path: Path) -> None:
    (tmp_path / "Client.java").write_text(CLIENT)
    command = ["java", "Client.java", f"http://{HOST}:{service.port}{INFER}", body_of(3).decode()]
    replies = subprocess.check_output(command, cwd=tmp_path, text=True, timeout=60).splitlines()
    assert [json.loads(reply)["outputs"][0]["data"][0] for reply in replies] == [30, 30, 30]


def test_a_new_client_is_answered_after_all_of_this(service: RuleService) -> None:
    assert asyncio.run(ask(service.port, infer_request("rule", row(3)))).outputs()[0] == 30
