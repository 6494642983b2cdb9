"""One client connection: uvicorn's, with a short way for the requests that matter.

The route decides which way a request takes. Once its head is parsed, `find` is asked for what answers its method and
path. Where there is something (predictions), the body is collected and the request answered by one task and one write,
without an ASGI scope, events, a timer per response, or a copy of a large body. Everything else (descriptions, chunked
bodies, pipelined requests, clients that do not read their responses) takes uvicorn's way, which is the same to the
client.

An upgrade to another protocol is ignored, as HTTP allows (RFC 9110, 7.8): the request is answered over HTTP/1.1, body
and all. httptools ends a message at the head of an upgrade, so that head is given to it again, without the upgrade.
Trailers are dropped. What is no request that can be read in one way only is refused, and ends the connection.

What is used of uvicorn beyond its public interface is the class `HttpToolsProtocol` with its attributes `parser`,
`url`, `headers`, `cycle`, `pipeline`, `flow`, `tasks`, `scheme`, `server_state`, `expect_100_continue` and
`timeout_keep_alive_task`; `tests/http/test_connection.py` fails if a new uvicorn lacks one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from leanserve.errors import BadInput
from leanserve.http.body_reader import LARGE, BodyReader
from leanserve.http.exchange import Answer, Exchange
from leanserve.http.messages import Response, acknowledge, error_response, send_response
from leanserve.request_identity import RequestIdentities, RequestIdentity

Find = Callable[[bytes, bytes], Answer | None]
"""What answers a method and a raw path; `None`: uvicorn's way does."""

_ONE_WRITE = 2**16
"""Bytes of a body up to which copying it behind its head is cheaper than a second write."""


class Connection(HttpToolsProtocol):
    """uvicorn's connection of one client, with a short way to what `find` finds."""

    find: Find
    body_limit: int
    """Bytes up to which a body is handed over with its request."""
    identities: RequestIdentities
    """Of what is no valid request, and reaches nobody else."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=False)  # what follows is refused, not swallowed
        self.headers: list[tuple[bytes, bytes]] = []  # there is none yet where the first line is wrong
        self._answered_at = 0.0
        self._place: Literal["between", "head", "body"] = "between"
        """Where in a request the parser is."""
        self._arriving: Exchange | None = None
        """The exchange on the short way whose request is still arriving."""
        self._reader: BodyReader | None = None

    def data_received(self, data: bytes) -> None:
        rest: bytes | memoryview = data
        try:
            while (end := self._upgrade_in(rest)) is not None:
                rest = memoryview(rest)[end:]
                self.parser.feed_data(self._head_without_upgrade())
        except httptools.HttpParserError as error:
            cause = error.__context__  # where a callback below raised it
            self._refuse(cause if isinstance(cause, BadInput | httptools.HttpParserError) else error)
        exchange = self._arriving
        if exchange is not None and not exchange.started:
            self._begin(exchange)

    def _upgrade_in(self, data: bytes | memoryview) -> int | None:
        """Parse all, or up to the end of a head that asks for an upgrade: where that is."""
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            return int(upgrade.args[0])
        return None

    def _head_without_upgrade(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        return b"%b %b HTTP/%b\r\n%b\r\n" % (self.parser.get_method(), self.url, version, b"".join(lines))

    def _refuse(self, reason: BaseException) -> None:
        """Answer what is no request with 400, in its turn, and close.

        The parser takes nothing more after an error, so nothing that follows is run.
        """
        due = self.cycle is not None and not self.cycle.response_complete
        response = error_response(BadInput(f"this is no valid HTTP/1.1 request: {reason}"))
        identity = self.identities.of(dict(self.headers))
        response = response._replace(headers=(*response.headers, *identity))
        if due and self._place != "body":  # earlier requests are still to be answered; the last of them closes
            self.cycle.keep_alive = False
        elif due and self.pipeline:  # it is the last in the line
            self.cycle.keep_alive = False
            self.pipeline[0] = (self.cycle, lambda _scope, _receive, send: send_response(send, response))
        else:
            if due or self._place != "body":  # else it was answered before its body was through
                self.transport.write(self._head(response, (), keep_alive=False) + response.body)
            self.transport.close()

    def on_message_begin(self) -> None:
        self._place = "head"
        self.url = b""
        self.headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise BadInput("CONNECT asks a proxy for a tunnel, and this is none")
            return
        headers = self.headers
        fields = dict(headers)
        if b"host" not in fields or len(fields) < len(headers):
            self._check_hosts(headers)
        self.headers = []  # trailers come after them, and are none of them
        self._place = "body"
        path = self.url.partition(b"?")[0]
        answer = None if self._must_wait() else self.find(self.parser.get_method(), path)
        if answer is None or b"content-length" not in fields:
            self._take_uvicorns_way(headers)
        else:
            self.cycle = self._arriving = Exchange(self, answer, path.decode("ascii"), fields)  # type: ignore[assignment]

    def _check_hosts(self, headers: list[tuple[bytes, bytes]]) -> None:
        hosts = [name for name, _ in headers].count(b"host")
        if hosts > 1 or (hosts == 0 and self.parser.get_http_version() == "1.1"):
            raise BadInput(f"it has {hosts} Host headers instead of one")  # RFC 9112, 3.2

    def _must_wait(self) -> bool:
        """Whether something on this connection has to be answered first, or its client does not read."""
        return (self.cycle is not None and not self.cycle.response_complete) or self.flow.write_paused

    def _take_uvicorns_way(self, headers: list[tuple[bytes, bytes]]) -> None:
        url = self.url
        super().on_message_begin()  # makes the scope, which is given `self.headers`
        self.url = url
        for header in headers:
            super().on_header(*header)
        super().on_headers_complete()
        self.headers = []

    def on_body(self, body: bytes) -> None:
        if self._arriving is None:
            super().on_body(body)
        else:
            self._arriving.extend(body)

    def on_message_complete(self) -> None:
        if self._place == "head":  # of an upgrade, and given to the parser again
            return
        self._place = "between"
        if not self.parser.should_keep_alive():  # a trailer may have said so
            self.cycle.keep_alive = False
        if self._arriving is None:
            super().on_message_complete()
        else:
            self._arriving.complete()
            self._arriving = None

    def _begin(self, exchange: Exchange) -> None:
        """Answer a request as far as can be without the rest of its body."""
        exchange.start()
        if exchange.missing >= LARGE and self.scheme == "http":  # of TLS the socket has no bytes of the body
            self.transport.pause_reading()
            self.loop.call_soon(self._read_in_place, exchange)  # by then it may have been refused
        if exchange.missing == exchange.length:
            acknowledge(self.transport)

    def _read_in_place(self, exchange: Exchange) -> None:
        """Have the rest of a large body read into its place, or past it where nobody wants it any more."""
        if self.transport.is_closing():
            return
        self._arriving = None
        self._forget_the_message()
        if self._reader is None:
            self._reader = BodyReader(self, self.transport, exchange.length)
        if exchange.response_complete:
            self._reader.skip(exchange.missing, exchange.skipped)
        else:
            self._reader.read(exchange.begun, exchange.length, exchange.arrived)
        self.transport.resume_reading()

    def _forget_the_message(self) -> None:
        """The rest of this body does not go through the parser; the next request needs one that awaits a head."""
        self.parser = httptools.HttpRequestParser(self)
        self._place = "between"

    def connection_lost(self, exc: Exception | None) -> None:
        cycle = self.cycle
        super().connection_lost(exc)
        self._reader = None  # nothing else would end that circle, and the body in it, soon
        if isinstance(cycle, Exchange):
            cycle.lost()

    def respond(self, exchange: Exchange, response: Response | None, identity: RequestIdentity) -> None:
        """Send the response, if there is one, and be ready for the next request."""
        exchange.response_complete = True
        if exchange.disconnected:
            return
        if response is None:
            self.transport.close()
            return
        body, head = response.body, self._head(response, identity, keep_alive=exchange.keep_alive)
        if len(body) <= _ONE_WRITE:
            self.transport.write(head + body)
        else:
            self.transport.write(head)
            self.transport.write(body)
        if not exchange.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _head(self, response: Response, identity: RequestIdentity, *, keep_alive: bool) -> bytes:
        headers = (*self.server_state.default_headers, *response.headers, *identity)
        lines = b"".join([b"%b: %b\r\n" % header for header in headers])
        if not keep_alive:
            lines += b"connection: close\r\n"
        return b"%b%bcontent-length: %d\r\n\r\n" % (STATUS_LINE[response.status], lines, len(response.body))

    def on_response_complete(self) -> None:
        """After each response. One timer watches an idle connection, instead of a new one after every response."""
        self._answered_at = self.loop.time()
        if self.pipeline or self.timeout_keep_alive_task is None:
            super().on_response_complete()
        else:
            self.server_state.total_requests += 1
            self.flow.resume_reading()

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection if it was idle for long enough; else look again when it may have been."""
        rest: float = self.timeout_keep_alive
        if self.cycle.response_complete and self._place != "body" and not getattr(self.cycle, "missing", 0):
            rest = self._answered_at + rest - self.loop.time()
        if rest > 0:
            self.timeout_keep_alive_task = self.loop.call_later(rest, self.timeout_keep_alive_handler)
        else:
            super().timeout_keep_alive_handler()


def connections_to(find: Find, body_limit: int) -> type[Connection]:
    """The class of all connections, as uvicorn wants it, with a short way to what `find` finds."""
    own = {"find": staticmethod(find), "body_limit": body_limit, "identities": RequestIdentities()}
    return type("Connection", (Connection,), own)
