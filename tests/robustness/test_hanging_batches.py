""" "One hanging request took the server": a batch that does not end, in a process of its own, and SIGTERM on top."""

from __future__ import annotations

import asyncio
from pathlib import Path

from raw_http import ask, connected, infer_request
from rule_service import serving, until
from rules import HOLD, row


def test_a_batch_of_microseconds_that_hangs_on_the_loop_ends_the_process_and_sigterm_is_obeyed(tmp_path: Path) -> None:
    async def hang(port: int) -> None:
        async with connected(port) as (_, writer):
            writer.write(infer_request("short", row(HOLD)))
            await until((tmp_path / "holding").exists)

    with serving(tmp_path, "short", exit_status=70, watchdog={"loop_s": 1.0}) as service:
        (tmp_path / "gate").touch()
        asyncio.run(hang(service.port))
    log = (tmp_path / "log").read_text()
    assert "the event loop has not turned for 1 s; batches of short are running: the process ends with status 70" in log
    assert "_hold" in log, "where its threads are"


def test_an_isolated_variant_fails_and_the_rest_of_the_service_lives(tmp_path: Path) -> None:
    async def scene(port: int) -> None:
        stuck = await ask(port, infer_request("short", row(HOLD)))
        assert (stuck.status, stuck.json()["error"]) == (503, "variant 'short' has failed: a batch of it did not end")
        assert (await ask(port, infer_request("short", row(1)))).status == 503
        replies = await asyncio.gather(*(ask(port, infer_request("rule", row(number))) for number in range(9)))
        assert [reply.outputs()[0] for reply in replies] == [10 * number for number in range(9)]

    with serving(tmp_path, "short", "rule", watchdog={"batch_s": 1.0, "on_stuck": "isolate"}) as service:
        (tmp_path / "gate").touch()
        asyncio.run(scene(service.port))
        states = {item["name"]: item["state"] for item in service.get("/v1/variants")["variants"]}
        assert states == {"short": "failed", "rule": "serving"}
        assert service.get("/readyz") == {"ready": True}
        assert service.get("/healthz") == {"live": True}
        assert service.metric("leanserve_stuck_batches_total", version="short") == 1
