"""What an open page costs: throughput with and without one listener of `/v1/live/stream`, in turns.

`python -m loadtest.benchmarks.live_stream http://127.0.0.1:8000 FILE CONTENT_TYPE VARIANT` sends FILE again and again
to one variant over four connections, and prints the median ratio of neighbouring turns with its range.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx

TURN_S = 2.0
PAIRS = 8
CONNECTIONS = 4


async def main(host: str, file: str, content_type: str, variant: str) -> None:
    """Turns without and with, without and with; the first pair warms up."""
    body, headers = Path(file).read_bytes(), {"content-type": content_type, "x-variant": variant}
    ratios = []
    async with httpx.AsyncClient(base_url=host, timeout=30) as client:
        for number in range(PAIRS + 1):
            without = await turn(client, body, headers)
            listening = asyncio.create_task(listen(client))
            with_page = await turn(client, body, headers)
            listening.cancel()
            with suppress(asyncio.CancelledError):
                await listening
            if number:
                ratios.append(with_page / without)
                print(f"{without:8.1f} requests/s without, {with_page:8.1f} with a page: {ratios[-1]:.4f}")
    print(f"ratio {statistics.median(ratios):.4f} ({min(ratios):.4f} to {max(ratios):.4f}) of {PAIRS} pairs")


async def turn(client: httpx.AsyncClient, body: bytes, headers: dict[str, str]) -> float:
    """Requests per second."""
    until, began = time.perf_counter() + TURN_S, time.perf_counter()
    answered = await asyncio.gather(*(ask(client, body, headers, until) for _ in range(CONNECTIONS)))
    return sum(answered) / (time.perf_counter() - began)


async def ask(client: httpx.AsyncClient, body: bytes, headers: dict[str, str], until: float) -> int:
    """As many requests as fit, one after the other."""
    answered = 0
    while time.perf_counter() < until:
        (await client.post("/v1/predict", content=body, headers=headers)).raise_for_status()
        answered += 1
    return answered


async def listen(client: httpx.AsyncClient) -> None:
    """What a page does."""
    async with client.stream("GET", "/v1/live/stream") as reply:
        async for _ in reply.aiter_raw():
            pass


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
