"""Accepting clients under TLS: each counts among the connections, and has a bounded time, before its first packet.

asyncio would tell of a client once its handshake is done. Until then nobody would count it, and it would have a minute
to say nothing in. Here a handshake also begins with the certificate that is shown by then, and only a few do in one
turn of the loop, for each takes it about a millisecond.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from leanserve.http.loop_turns import LoopTurns
from leanserve.http.open_connections import ConnectionState, OpenConnections
from leanserve.http.refusals import Refused

if TYPE_CHECKING:
    from leanserve.http.ending import EndingConnection

_AT_ONCE = 8
"""Clients accepted in one turn of the loop."""
_AGAIN_S = 0.1
"""After so long it is tried again to accept, where there is no descriptor left for a connection."""


class Listening(Protocol):
    """What takes connections until it is closed, as an `asyncio.Server` does."""

    def close(self) -> None:
        """Take no more of them."""


class TlsServer:
    """Accepts on a socket. `make` gives the protocol of a client, `context` what its handshake begins with."""

    def __init__(
        self,
        listening: socket.socket,
        make: Callable[[], EndingConnection],
        context: Callable[[], ssl.SSLContext],
        everyone: OpenConnections,
    ) -> None:
        self._listening = listening
        self._make = make
        self._context = context
        self._all = everyone

    def start(self, backlog: int) -> TlsServer:
        """Accept from now on, on the running loop."""
        self._listening.settimeout(0)
        self._listening.listen(backlog)
        self._accepting = asyncio.get_running_loop().create_task(self._accept())
        return self

    def close(self) -> None:
        """Accept no more."""
        self._accepting.cancel()

    async def _accept(self) -> None:
        loop, turns = asyncio.get_running_loop(), LoopTurns(_AT_ONCE)
        while True:
            await turns.wait(1)
            try:
                client, _ = await loop.sock_accept(self._listening)
            except OSError:
                await asyncio.sleep(_AGAIN_S)
                continue
            handshake = Handshake(client, self._make, self._all)
            handshake.begin(self._context())


class Handshake:
    """One client up to the end of its handshake; then its connection takes this place among all of them."""

    held = 0

    def __init__(self, client: socket.socket, make: Callable[[], EndingConnection], everyone: OpenConnections) -> None:
        self.loop = asyncio.get_running_loop()
        self._client = client
        self._make = make
        self._all = everyone
        self._since = self.loop.time()
        self._is_begun = False

    def begin(self, context: ssl.SSLContext) -> None:
        """Shake hands, if there is room for one more."""
        self._shaking = self.loop.create_task(self._shake_hands(context))
        self._shaking.add_done_callback(self._done)
        self._all.admit(self)

    async def _shake_hands(self, context: ssl.SSLContext) -> None:
        self._is_begun = True
        # `OpenConnections` ends what takes longer than `head_s`; asyncio's own bound would be a minute.
        never_first = 2 * self._all.limits.head_s
        await self.loop.connect_accepted_socket(
            self._made, self._client, ssl=context, ssl_handshake_timeout=never_first
        )

    def _made(self) -> EndingConnection:
        connection = self._make()
        connection.handshake = self
        return connection

    def _done(self, shaking: asyncio.Task[None]) -> None:
        self._all.forget(self)
        if not self._is_begun:
            self._client.close()
        if not shaking.cancelled():
            shaking.exception()  # it was no TLS, has no certificate of ours, or has left

    @property
    def peer(self) -> str:
        """The client's address, for the log."""
        try:
            return ":".join(map(str, self._client.getpeername()))
        except OSError:
            return "a client"

    @property
    def unread(self) -> int:
        """Nothing was replied."""
        return 0

    def waits(self) -> tuple[ConnectionState, float]:
        """For the end of the handshake."""
        return "handshake", self._since

    def abort(self) -> None:
        """Close it."""
        self._shaking.cancel()

    def refuse(self, refused: Refused) -> None:
        """Close it; but who is only one too many is told so by the connection: after its handshake it can be."""
        if refused.bound != "connections":
            self._all.log.tell("handshake", f"closed {self.peer}: {refused}")
            self.abort()

    def close_if_idle(self) -> None:
        """It is not."""

    def announce_end(self) -> None:
        """There is no reply that could tell."""
