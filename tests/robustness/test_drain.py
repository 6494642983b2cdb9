""" "Drain loses replies": a constant rate and SIGTERM, on kept and on fresh connections, with work still in flight."""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import AsyncExitStack
from pathlib import Path

from raw_http import ask, connected, infer_request, read_reply
from rule_service import RuleService, serving, until
from rules import row

DELAY_S = 1.0
BEFORE_S = 0.4
PERIOD_S = 0.01
MOST_ROWS, LONG_ROWS = 4, 500
"""The variant `slow` takes 10 ms for at most four rows, 1.25 s for all of the long request."""


async def constant_rate(service: RuleService, *, fresh: bool) -> int:
    """One request per period until just before the drain delay ends; all must be answered. SIGTERM comes within."""
    loop = asyncio.get_running_loop()
    end = loop.time() + BEFORE_S + DELAY_S - 0.15
    answers: list[asyncio.Task[None]] = []

    async def on_a_fresh_connection(number: int) -> None:
        reply = await ask(service.port, infer_request("rule", row(number)))
        assert (reply.status, reply.outputs()[0]) == (200, 10 * number)

    async with AsyncExitStack() as stack:
        reader, writer = await stack.enter_async_context(connected(service.port))
        while loop.time() < end:
            number = len(answers)
            if fresh:
                answers.append(asyncio.create_task(on_a_fresh_connection(number)))
            else:
                writer.write(infer_request("rule", row(number)))
                reply = await read_reply(reader)
                assert reply.outputs()[0] == 10 * number
                if reply.headers.get("connection") == "close":
                    reader, writer = await stack.enter_async_context(connected(service.port))
                answers.append(asyncio.create_task(asyncio.sleep(0)))
            await asyncio.sleep(PERIOD_S)
    await asyncio.gather(*answers)
    return len(answers)


def test_what_is_sent_before_the_delay_ends_is_answered(tmp_path: Path) -> None:
    async def scenario(service: RuleService) -> None:
        rates = [asyncio.create_task(constant_rate(service, fresh=fresh)) for fresh in (True, False)]
        await asyncio.sleep(BEFORE_S)
        service.process.send_signal(signal.SIGTERM)
        signalled = time.monotonic()
        await until(lambda: service.http.get("/readyz").status_code == 503, seconds=DELAY_S / 2)
        # Longer on the device than the delay has left: it is finished, not cut off.
        long = asyncio.create_task(ask(service.port, infer_request("slow", row(7).repeat(LONG_ROWS, axis=0))))
        sent = await asyncio.gather(*rates)
        assert min(sent) > 20
        assert (await long).status == 200
        assert time.monotonic() > signalled + DELAY_S

    batch, drain = {"max_rows": MOST_ROWS, "queue_rows": 2 * LONG_ROWS}, {"delay_s": DELAY_S, "timeout_s": 10}
    with serving(tmp_path, "rule", "slow", batch=batch, drain=drain) as service:
        asyncio.run(scenario(service))
        assert service.process.wait(10) == 0
