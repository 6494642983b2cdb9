"""Texts that are parsed on the loop share its turns: hundreds of them that come at once keep nobody else waiting."""

from __future__ import annotations

import asyncio

from leanserve.serving import decoding
from leanserve.serving.decoding import Decoders


def test_so_many_bytes_are_parsed_in_a_turn_first_come_first_served() -> None:
    async def scenario() -> None:
        decoders, done, turn = Decoders(), list[tuple[int, int]](), 0

        async def parse(number: int, size: int) -> None:
            await decoders.turn_for(size)
            done.append((number, turn))

        half = decoding._EACH_TURN // 2
        tasks = [asyncio.create_task(parse(number, half)) for number in range(7)]
        tasks.append(asyncio.create_task(parse(7, 10 * half)))
        tasks[3].cancel()
        while len(done) < len(tasks) - 1:
            await asyncio.sleep(0)
            turn += 1
        assert [number for number, _ in done] == [0, 1, 2, 4, 5, 6, 7]
        each = [sum(when == turn for _, when in done) for turn in range(turn + 1)]
        assert max(each) == 2
        await asyncio.wait_for(decoders.turn_for(half), 5)  # also after one that was larger than a turn
        decoders.close()

    asyncio.run(scenario())
