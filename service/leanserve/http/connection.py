"""One client connection: uvicorn's, with a short way for a request whose head was seen before.

A client that keeps its connection sends the same head again, byte for byte, and only the body behind it differs. Yet
parsing the head, a scope, a task, two events, a timer and two writes per reply cost more than everything this service
does for a small model. So the head of a prediction request is remembered with what the parser made of it (`heads.py`);
when the same bytes come again, whole and between two requests, the body is cut off behind them, in as many pieces as it
comes (`body.py` reads large ones), and the request is answered straight away, in the same turn of the event loop, with
one write. The answer begins with the head, so that the body of a request that is refused anyway is read past.
Everything else (descriptions, chunked bodies, pipelining, `Connection: close`, HTTP/1.0, clients that do not read their
replies) takes uvicorn's way, which is the same to the client.

An upgrade to another protocol is ignored, as HTTP allows (RFC 9110, 7.8): the request is answered over HTTP/1.1, body
and all. httptools ends a message at the head of an upgrade, so that head is given to it again, without the upgrade.
Trailers are dropped. What is no request that can be read in one way only is refused, and ends the connection.

`tests/api/test_connection.py` holds both ways against each other; it fails if a new uvicorn lacks what is used here.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Generator
from types import coroutine
from typing import Any, Literal

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from leanserve.api.front import Predictions
from leanserve.errors import BadInput
from leanserve.http.body_reader import LARGE, BodyReader
from leanserve.http.heads import Head, KnownHeads
from leanserve.http.messages import Caller, Reply, acknowledge, error_reply, send_reply

logger = logging.getLogger(__name__)

_ONE_WRITE = 2**16
"""Bytes of a body up to which copying it behind its head is cheaper than a second write."""
_BODY = object()
"""What the coroutine of a request hands to its `Exchange` while it waits for its body."""


class Connection(HttpToolsProtocol):
    """uvicorn's connection of one client to what answers predictions."""

    heads: KnownHeads
    hot: Predictions

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=False)  # what follows is refused, not swallowed
        self._answered_at = 0.0
        self._event = asyncio.Event()
        # The request that the parser reads: where in it, its head if it may be worth remembering, how many bytes came
        # since, and how many requests began in them.
        self._place: Literal["between", "head", "body"] = "between"
        self._head = b""
        self._received = self._begun = 0
        # Bytes of a body on the short way that are still to come, those that came, and who reads them if not this.
        self._missing = 0
        self._parts: list[bytes] = []
        self._reader: BodyReader | None = None

    def data_received(self, data: bytes) -> None:
        if self._missing:
            self._go_on(data)
            return
        if self._place == "between":
            end = data.find(b"\r\n\r\n") + 4
            self._head, self._received, self._begun = data[:end], 0, 0
            if (self.cycle is not None and not self.cycle.response_complete) or self.flow.write_paused or end == 3:
                self._head = b""
            known = self.heads.get(self._head)
            if known is not None and len(data) - end <= known.length:
                self._begin(known, data[end:])
                return
        self._received += len(data)
        self._parse(data)
        # Exactly one request, whole: its head is what stands before the first empty line.
        if self._place == "between" and self._head and self._begun == 1 and self.cycle.keep_alive and not self.pipeline:
            self.heads.learn(self._head, self.cycle.scope, self._received - len(self._head))  # type: ignore[arg-type]

    def _parse(self, data: bytes) -> None:
        """What uvicorn does with data, but for upgrades and refusals."""
        self._unset_keepalive_if_required()
        rest = memoryview(data)
        try:
            while (end := self._upgrade_in(rest)) is not None:
                rest = rest[end:]
                self.parser.feed_data(self._head_without_upgrade())
        except httptools.HttpParserError as error:
            cause = error.__context__  # where a callback below raised it
            self._refuse(cause if isinstance(cause, BadInput | httptools.HttpParserError) else error)

    def _upgrade_in(self, data: memoryview) -> int | None:
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
        reply = error_reply(BadInput(f"this is no valid HTTP/1.1 request: {reason}"))
        if due and self._place != "body":  # earlier requests are still to be answered; the last of them closes
            self.cycle.keep_alive = False
        elif due and self.pipeline:  # it is the last in the line
            self.cycle.keep_alive = False
            self.pipeline[0] = (self.cycle, lambda _scope, _receive, send: send_reply(send, reply))
        else:
            if due or self._place != "body":  # else it was answered before its body was through
                self.transport.write(self._written(reply, keep_alive=False) + reply.body)
            self.transport.close()

    def on_message_begin(self) -> None:
        self._place = "head"
        self._begun += 1
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise BadInput("CONNECT asks a proxy for a tunnel, and this is none")
            return
        hosts = [name for name, _ in self.headers].count(b"host")
        if hosts > 1 or (hosts == 0 and self.parser.get_http_version() == "1.1"):
            raise BadInput(f"it has {hosts} Host headers instead of one")  # RFC 9112, 3.2
        super().on_headers_complete()
        self._place = "body"
        self.headers = []  # for trailers; those of the request are in its scope

    def on_message_complete(self) -> None:
        if self._place == "head":  # of an upgrade, and given to the parser again
            return
        self._place = "between"
        if not self.parser.should_keep_alive():  # a trailer may have said so
            self.cycle.keep_alive = False
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._reader = None  # nothing else would end that circle, and the body in it, soon
        if self._missing:
            self._came(None)  # by which the client counts as gone

    def _begin(self, known: Head, body: bytes) -> None:
        """Answer a request as far as can be without the rest of its body; see to it that this is read, or skipped."""
        exchange = Exchange(self, self._event)
        self.cycle = exchange  # type: ignore[assignment]
        self._missing = known.length - len(body)
        caller = Caller(known.path, known.headers, exchange.receive, None if self._missing else body, body)
        exchange.begin(self.hot.answer(known.route, caller))
        if not self._missing or self.transport.is_closing():
            return
        if self._reader is None and self._missing >= LARGE:
            self._reader = BodyReader(self, self.transport, known.length)
        if self._reader is None:
            self._parts = [body]
        elif exchange.response_complete:
            self._reader.skip(self._missing, self._came)
        else:
            self._reader.read(body, known.length, self._came)
        if not body:
            acknowledge(self.transport)

    def _go_on(self, data: bytes) -> None:
        self._parts.append(data[: self._missing])
        self._missing -= len(self._parts[-1])
        if self._missing:
            return
        body, rest = b"".join(self._parts), data[len(self._parts[-1]) :]
        self._parts = []
        self._came(body)
        if rest:
            self.data_received(rest)

    def _came(self, body: bytes | memoryview | None) -> None:
        """The body is here, or it will never be."""
        self._missing = 0
        exchange: Exchange = self.cycle  # type: ignore[assignment]  # on the short way it is one
        if not exchange.response_complete:
            exchange.feed(body)

    def reply(self, exchange: Exchange, reply: Reply | None) -> None:
        """Send the reply, if there is one, and be ready for the next request."""
        exchange.response_complete = True
        if exchange.disconnected:
            return
        if reply is None:
            self.transport.close()
            return
        body, head = reply.body, self._written(reply, keep_alive=exchange.keep_alive)
        if len(body) <= _ONE_WRITE:
            self.transport.write(head + body)
        else:
            self.transport.write(head)
            self.transport.write(body)
        if not exchange.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _written(self, reply: Reply, *, keep_alive: bool) -> bytes:
        """The head of a reply."""
        lines = b"".join([b"%b: %b\r\n" % header for header in (*self.server_state.default_headers, *reply.headers)])
        if not keep_alive:
            lines += b"connection: close\r\n"
        return b"%b%bcontent-length: %d\r\n\r\n" % (STATUS_LINE[reply.status], lines, len(reply.body))

    def on_response_complete(self) -> None:
        """After each reply. One timer watches an idle connection, instead of a new one after every reply."""
        self._answered_at = self.loop.time()
        if self.pipeline or self.timeout_keep_alive_task is None:
            super().on_response_complete()
        else:
            self.server_state.total_requests += 1

    def timeout_keep_alive_handler(self) -> None:
        """Close the connection if it was idle for long enough; else look again when it may have been."""
        rest: float = self.timeout_keep_alive
        if self.cycle.response_complete and not self._missing:
            rest = self._answered_at + rest - self.loop.time()
        if rest > 0:
            self.timeout_keep_alive_task = self.loop.call_later(rest, self.timeout_keep_alive_handler)
        else:
            super().timeout_keep_alive_handler()


def connections_to(hot: Predictions) -> type[Connection]:
    """The class of all connections to `hot`, as uvicorn wants it; they share what they know of heads."""
    return type("Connection", (Connection,), {"hot": hot, "heads": KnownHeads(hot)})


@coroutine
def _until_fed() -> Generator[object, None, None]:
    yield _BODY


class Exchange:
    """A request on the short way, where uvicorn keeps its own `cycle`: it has the attributes that are asked for there.

    It also drives the coroutine that answers: as a task would, but from where it stands, and without a turn of the
    loop before the first step or when the body has come. The coroutine must not ask for the current task.
    """

    __slots__ = (
        "_body",
        "_connection",
        "_coroutine",
        "_waits",
        "disconnected",
        "keep_alive",
        "message_event",
        "response_complete",
    )

    def __init__(self, connection: Connection, event: asyncio.Event) -> None:
        self._connection = connection
        self._coroutine: Coroutine[Any, None, Reply | None]
        self._body: bytes | memoryview | None = None
        self._waits = False
        self.disconnected = False
        self.keep_alive = True
        self.response_complete = False
        self.message_event = event

    async def receive(self) -> dict[str, Any]:
        """ASGI's, for a body that did not come with the head: all of it in one message, once.

        It is not kept: an exchange lasts until the next one on its connection, which may idle for long.
        """
        if self._body is None and not self.disconnected:
            await _until_fed()
        body, self._body = self._body, None
        if body is None:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": body, "more_body": False}

    def begin(self, coroutine: Coroutine[Any, None, Reply | None]) -> None:
        """Answer the request by this coroutine, at once as far as it does not wait."""
        self._coroutine = coroutine
        self._step()

    def feed(self, body: bytes | memoryview | None) -> None:
        """Here is the body; `None`: it will never come."""
        self._body = body
        if self._waits:
            self._step()

    def _step(self, _: object = None) -> None:
        """Go on until the coroutine waits for something, or is done."""
        try:
            waited = self._coroutine.send(None)
        except StopIteration as done:
            self._connection.reply(self, done.value)
        except BaseException:
            logger.exception("a request was left without a reply")
            self._connection.reply(self, None)
        else:
            self._waits = waited is _BODY
            if not self._waits:
                # What a task does with the future that an `await` hands to it.
                waited._asyncio_future_blocking = False
                waited.add_done_callback(self._step)
