"""What comes by the hundred at once shares the turns of the loop, and keeps nobody else waiting."""

from __future__ import annotations

import asyncio

from leanserve.http.loop_turns import LoopTurns


def test_so_much_is_begun_in_a_turn_first_come_first_served() -> None:
    async def scenario() -> None:
        turns, done, turn = LoopTurns(10), list[tuple[int, int]](), 0

        async def do(number: int, cost: int) -> None:
            await turns.wait(cost)
            done.append((number, turn))

        tasks = [asyncio.create_task(do(number, 5)) for number in range(7)]
        tasks.append(asyncio.create_task(do(7, 50)))
        tasks[3].cancel()
        while len(done) < len(tasks) - 1:
            await asyncio.sleep(0)
            turn += 1
        assert [number for number, _ in done] == [0, 1, 2, 4, 5, 6, 7]
        each = [sum(when == turn for _, when in done) for turn in range(turn + 1)]
        assert max(each) == 2
        await asyncio.wait_for(turns.wait(5), 5)  # also after one that was larger than a turn

    asyncio.run(scenario())
