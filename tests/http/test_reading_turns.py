"""Large bodies share the turns of the loop: so much of all of them is read in each, and then it turns to others."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest

from fakes import live_server
from leanserve.http.reading_turns import AT_ONCE, LEAST, ReadingTurns
from raw_client import Client

EACH = 100_000
"""Bytes that are read in a turn, in a test of how many turns it takes."""


class Reader:
    """Has something to read in every turn in which it may."""

    def __init__(self) -> None:
        self.turns = 0

    def go_on(self) -> None:
        self.turns += 1


def test_who_comes_when_nothing_is_left_reads_in_a_later_turn() -> None:
    async def scenario() -> None:
        turns, waiting = ReadingTurns(), [Reader() for _ in range(20)]
        assert turns.took(AT_ONCE - 1)
        assert not turns.took(1)
        for reader in waiting:
            turns.wait(reader)
        turns.forget(waiting[0])
        await asyncio.sleep(0)
        went_on = [reader.turns for reader in waiting]
        assert (turns.left, went_on) == (AT_ONCE, [0] + [1] * 16 + [0] * 3)
        await asyncio.sleep(0)
        assert [reader.turns for reader in waiting] == [0] + [1] * 19
        assert turns.took(AT_ONCE - 1)

    asyncio.run(scenario())


def test_bodies_of_many_clients_are_read_in_as_many_turns_as_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []

    class Watched(ReadingTurns):
        def __init__(self, at_once: int = EACH) -> None:
            super().__init__(at_once)

        def _next(self) -> None:
            if self._at_once == EACH:  # those that parse are of the same class
                read.append(EACH - self.left)
            super()._next()

    monkeypatch.setattr("leanserve.http.open_connections.ReadingTurns", Watched)
    clients, body = 8, b" " * 2_000_000
    request = b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"

    with live_server(limits={"body_bytes": 2**24}) as live:

        def ask(_: int) -> int:
            client = Client(live)
            client.send(request % len(body) + body)
            status = client.reply()[0]
            client.close()
            return status

        leaver = Client(live)
        leaver.send(request % len(body) + body[: len(body) // 2])
        with ThreadPoolExecutor(clients) as pool:
            statuses = list(pool.map(ask, range(clients)))
        leaver.close()
    assert statuses == [400] * clients
    assert sum(read) > 0.8 * clients * len(body), "these bodies were read in place"
    assert max(read) < EACH + clients * LEAST
