"""One client connection: uvicorn's, with a short way for the requests that matter.

The route decides which way a request takes. Once its head is parsed, `find` is asked for what answers its method and
path. Where there is something (predictions), the body is collected and the request answered by one task and one write,
without an ASGI scope, events, a timer per response, or a copy of a large body. Everything else (descriptions, chunked
bodies, pipelined requests, clients that do not read their responses) takes uvicorn's way, which is the same to the
client.

An upgrade to another protocol is ignored, as HTTP allows (RFC 9110, 7.8): the request is answered over HTTP/1.1, body
and all. httptools ends a message at the head of an upgrade, so that head is given to it again, without the upgrade.
Trailers are dropped. What is no request that can be read in one way only, or is beyond a bound, is refused, and ends
the connection.

Nothing that one client sends holds up the loop: what comes is parsed in pieces, and between two of them the loop turns
to others. How long a connection may take and how much it may hold is watched by `OpenConnections`.

What is used of uvicorn beyond its public interface is the class `HttpToolsProtocol` with its attributes `parser`,
`url`, `headers`, `cycle`, `pipeline`, `flow`, `tasks`, `scheme`, `server_state`, `expect_100_continue` and the method
`_start_asgi_task`; `tests/http/test_connection.py` fails if a new uvicorn lacks one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httptools

from leanserve.http.body_reader import LARGE, BodyReader
from leanserve.http.ending import EndingConnection
from leanserve.http.exchange import Answer, Exchange
from leanserve.http.leaving import BEGINNING
from leanserve.http.messages import Response, acknowledge
from leanserve.http.open_connections import OpenConnections
from leanserve.http.refusals import Refused, check_coding, check_head, headers_too_large, no_http
from leanserve.request_identity import RequestIdentities, RequestIdentity

Find = Callable[[bytes, bytes], Answer | None]
"""What answers a method and a raw path; `None`: uvicorn's way does."""

PIECE = 2**14
"""Bytes that are parsed at once where a head may be among them: of the smallest requests about 600, 15 ms of work."""
_ONE_WRITE = 2**16
"""Bytes of a body up to which copying it behind its head is cheaper than a second write."""
_UNWANTED = 2**26
"""Bytes of a body that nobody wants up to which reading past them is cheaper than a new connection."""


class Connection(EndingConnection):
    """uvicorn's connection of one client, with a short way to what `find` finds."""

    find: Find

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=False)  # what follows is refused, not swallowed
        self.limits = limits = self.everyone.limits
        self._unchecked = limits.header_bytes - PIECE
        """Bytes of a head that came before its last piece, up to which it cannot be too large."""
        self._most_headers = limits.headers
        self._seen = 0
        """Bytes so far of the head, or of what is no content in a chunked body."""
        self._content = 0
        """Bytes so far of the body of a request on uvicorn's way."""

    def data_received(self, data: bytes) -> None:
        if len(data) > PIECE or self._rest or self._refusal is not None:
            self._take(data)
            return
        self._feed(data)
        if self._place != "between":
            self._follow_up()

    def _take(self, data: bytes) -> None:
        """Have what is too much to be parsed at once, or behind something else, parsed in its turn."""
        if self._refusal is not None:
            return
        if self._rest:  # what parses that goes on with this
            self._rest = bytes(self._rest) + data
            return
        self._rest = memoryview(data)
        self.go_on()

    def go_on(self) -> None:
        """Parse a piece of the rest, and the whole body that begins in it; then let the loop turn to others."""
        if not self._rest or self._refusal is not None or self.transport.is_closing():
            return
        turns = self.all.parsing
        if turns.left <= 0:
            self.flow.pause_reading()
            turns.wait(self)
            return
        turns.took(PIECE)
        self._feed(self._next(PIECE))
        if self._rest and self._arriving is not None:
            self._feed(self._next(self._arriving.missing))
        if self._place != "between":
            self._follow_up()
        if not self._rest:
            self._read_on()
            return
        self.flow.pause_reading()
        if not self.pipeline:  # else the end of a response goes on
            self.loop.call_soon(self.go_on)

    def _next(self, length: int) -> bytes | memoryview:
        piece, self._rest = self._rest[:length], self._rest[length:]
        return piece

    def _read_on(self) -> None:
        if self._ended and not self._owes():
            self.transport.close()
        elif not self.pipeline:
            self.flow.resume_reading()

    def _feed(self, data: bytes | memoryview) -> None:
        """Parse this, and refuse what is wrong with it."""
        try:
            while True:
                try:
                    self.parser.feed_data(data)
                    break
                except httptools.HttpParserUpgrade as upgrade:
                    data = memoryview(data)[int(upgrade.args[0]) :]
                    head = self._head_without_upgrade()
                    self._forget_the_message()  # which may have been the last one, by `Connection: close`
                    self.parser.feed_data(head)
            if self._place != "between":
                self._check_size(len(data))
        except Refused as refused:
            self.refuse(refused)
        except httptools.HttpParserError as error:
            cause = error.__context__  # where a callback below raised it
            if isinstance(cause, Refused):
                self.refuse(cause)
            else:
                self.refuse(no_http(cause if isinstance(cause, httptools.HttpParserError) else error))

    def _head_without_upgrade(self) -> bytes:
        version = self.parser.get_http_version().encode()
        lines = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        return b"%b %b HTTP/%b\r\n%b\r\n" % (self.parser.get_method(), self.url, version, b"".join(lines))

    def _check_size(self, nbytes: int) -> None:
        """Refuse what is too large already before it has come as a whole; `nbytes` came last."""
        if self._place == "body" and self._arriving is not None:
            return
        self._seen += nbytes
        limits = self.limits
        check_head(self.url, self.headers, limits)
        if self._seen > limits.header_bytes + limits.url_bytes + PIECE:
            raise headers_too_large(limits)

    def _follow_up(self) -> None:
        """A request has not come as a whole: answer what can be answered, and note what is still to come."""
        exchange = self._arriving
        if exchange is not None and not exchange.started:
            self._begin(exchange)
        self._note_arrival()

    def _note_arrival(self) -> None:
        """A head or a body has not come as a whole; what there is of it is held."""
        if not self._since:
            self._since = self.loop.time()
        cycle = self.cycle
        if self._place == "head":
            held = self._seen
        elif cycle.response_complete:
            held = 0
        else:
            held = cycle.length - cycle.missing if isinstance(cycle, Exchange) else self._content
        self.all.hold(self, held)

    def arrived(self, nbytes: int) -> None:
        """So many bytes more of a body that is read in place."""
        self.all.hold(self, self.held + nbytes)

    # What the parser calls

    def on_message_begin(self) -> None:
        self._place = "head"
        self._since = 0.0
        self._seen = 0
        self.url = b""
        self.headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        headers = self.headers
        headers.append((name.lower(), value))
        if len(headers) > self._most_headers:
            check_head(self.url, headers, self.limits)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise no_http("CONNECT asks a proxy for a tunnel, and this is none")
            return
        headers, limits = self.headers, self.limits
        if self._seen > self._unchecked or len(self.url) > limits.url_bytes or len(headers) > limits.headers:
            check_head(self.url, headers, limits)
        fields = dict(headers)
        if b"host" not in fields or len(fields) < len(headers):
            self._check_hosts(headers)
        if b"transfer-encoding" in fields:
            check_coding(headers)
        self.headers = []  # trailers come after them, and are none of them
        path = self.url.partition(b"?")[0]
        answer = None if self._must_wait() else self.find(self.parser.get_method(), path)
        if answer is None or b"content-length" not in fields:
            self._take_uvicorns_way(headers)
        else:
            exchange = Exchange(self, answer, self.url, fields)
            self.cycle = self._arriving = self._running = exchange  # type: ignore[assignment]
        self._place = "body"

    def _check_hosts(self, headers: list[tuple[bytes, bytes]]) -> None:
        hosts = [name for name, _ in headers].count(b"host")
        if hosts > 1 or (hosts == 0 and self.parser.get_http_version() == "1.1"):
            raise no_http(f"it has {hosts} Host headers instead of one")  # RFC 9112, 3.2

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
        self._content = self._seen = 0
        if self.pipeline:  # reading is paused
            self._watch()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)
        if self.all.draining:
            self.announce_end()

    def on_body(self, body: bytes) -> None:
        if self._arriving is not None:
            self._arriving.extend(body)
            return
        self._content += len(body)
        self._seen = 0
        if self._content > self.limits.body_bytes + _UNWANTED and self.cycle.response_complete:
            raise Refused(413, "body_too_large", "the body goes on and on", "body_bytes")
        super().on_body(body)

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

    # Large bodies

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
        if self._rest and self._arriving is exchange:  # it came before the transport was paused, and waits for a turn
            self._feed(self._next(exchange.missing))
        if self.transport.is_closing() or self._refusal is not None:
            return
        if self._arriving is not exchange:  # the rest has come
            self.transport.resume_reading()
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

    # What goes

    def respond(self, exchange: Exchange, response: Response | None, identity: RequestIdentity) -> None:
        """Send the response, if there is one, and be ready for the next request."""
        exchange.response_complete = True
        if exchange.disconnected:
            return
        if response is None:
            self.transport.close()
            return
        if self.all.draining:
            self.announce_end()
        if exchange.missing > _UNWANTED:
            exchange.keep_alive = False
        body, head = response.body, self._head(response, identity, keep_alive=exchange.keep_alive)
        if self._begun:
            head = head[len(BEGINNING) :]
            self._begun = False
        if len(body) <= _ONE_WRITE:
            self.transport.write(head + body)
        else:
            self.transport.write(head)
            self.transport.write(body)
        if not exchange.keep_alive:
            if exchange.missing:
                self._hang_up()
            else:
                self.transport.close()
        self.on_response_complete()

    def on_response_complete(self) -> None:
        """After each response: what comes next on this connection."""
        self._answered_at = self.loop.time()
        self.server_state.total_requests += 1
        if self.pipeline or self._rest or self._ended or self._refusal is not None or self.held:
            self._go_to_next()
        elif self.flow.read_paused and not self.transport.is_closing():
            self.flow.resume_reading()

    def _go_to_next(self) -> None:
        """Something was held, or comes behind the response: a request, a refusal, the end."""
        self.all.hold(self, 0)
        if self.transport.is_closing() or self._hung_up:
            return
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
        elif self._refusal is not None:
            self._end_refused()
        elif self._rest:
            self.loop.call_soon(self.go_on)
        elif self._ended:
            self.transport.close()
        else:
            self.flow.resume_reading()


def connections_to(find: Find, everyone: OpenConnections) -> type[Connection]:
    """The class of all connections, as uvicorn wants it, with a short way to what `find` finds."""
    own = {"find": staticmethod(find), "everyone": everyone, "identities": RequestIdentities()}
    return type("Connection", (Connection,), own)
