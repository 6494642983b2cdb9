""" "One request takes the whole server down": crashes, hangs and kills in a worker, and what everybody else sees."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fragile_worker import HANG, SEGFAULT, SLOWLY
from raw_http import PendingResult, ask, connected, infer_request, post, read_reply
from rule_service import RuleService, needs_proc, serving, until
from rules import row

GOOD = 7
STUCK_S = 0.5
NEIGHBOUR_LATE_S = 1.0
"""What a request of another variant may take at most on a busy machine, besides a batch that is stuck on its lane. Two
starts of a worker and the pause between them take longer."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RuleService]:
    folder = tmp_path_factory.mktemp("isolated")
    with serving(folder, "rule", "fragile", stuck_after_s=STUCK_S, model_control="explicit") as running:
        yield running
        worker = newest_worker(running)
    asyncio.run(until(lambda: not is_running(worker)))  # a worker ends with the service


def is_running(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"  # who has no parent left may stay in the table as a zombie


def newest_worker(service: RuleService) -> int:
    return int((service.folder / "starts").read_text().split()[-1])


@dataclass
class Neighbour:
    """A client of another variant on the same device, one request after the other."""

    service: RuleService
    statuses: Counter[int] = field(default_factory=Counter)
    slowest_s: float = 0.0

    async def __aenter__(self) -> Neighbour:
        self._task = asyncio.create_task(self._load())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        assert self.statuses[200] > 20
        assert set(self.statuses) == {200}

    async def _load(self) -> None:
        async with connected(self.service.port) as (reader, writer):
            while True:
                started = time.perf_counter()
                writer.write(infer_request("rule", row(1)))
                self.statuses[(await read_reply(reader)).status] += 1
                self.slowest_s = max(self.slowest_s, time.perf_counter() - started)


def state(service: RuleService) -> str:
    return next(str(item["state"]) for item in service.get("/v1/variants")["variants"] if item["name"] == "fragile")


async def together(service: RuleService, poison: float) -> list[PendingResult]:
    """Good requests and a poisoned one in one batch, behind one that takes a while; the poisoned one's reply last."""
    numbers = [*range(GOOD), poison]
    first = asyncio.create_task(ask(service.port, infer_request("fragile", row(SLOWLY))))
    await asyncio.sleep(0.01)
    asked = [asyncio.create_task(ask(service.port, infer_request("fragile", row(number)))) for number in numbers]
    replies = await asyncio.gather(*asked)
    assert (await first).status == 200
    return replies


@pytest.mark.parametrize(
    ("poison", "cause", "why"), [(SEGFAULT, "SIGSEGV", "was ended by SIGSEGV"), (HANG, "stuck", "was stuck for")]
)
def test_who_shares_a_batch_with_a_killer_is_answered_and_the_killer_refused(
    service: RuleService, poison: float, cause: str, why: str
) -> None:
    async def scenario() -> tuple[list[PendingResult], float]:
        async with Neighbour(service) as neighbour:
            replies = await together(service, poison)
            await until(lambda: lost() == before + 2 and state(service) == "serving")
            assert (await ask(service.port, infer_request("fragile", row(5)))).status == 200
        return replies, neighbour.slowest_s

    def lost() -> float:
        return service.metric("leanserve_worker_restarts_total", version="fragile", cause=cause)

    before = lost()
    (*replies, killer), slowest_s = asyncio.run(scenario())
    assert [reply.status for reply in replies] == [200] * GOOD
    assert [reply.outputs()[0] for reply in replies] == [10 * number for number in range(GOOD)]
    assert (killer.status, killer.json()["code"]) == (503, "worker_lost")
    assert why in killer.json()["error"]
    assert killer.headers["retry-after"] == "1"
    assert lost() == before + 2, "once in company and once alone, however many were in the batch"
    assert slowest_s < NEIGHBOUR_LATE_S + (4 * STUCK_S if poison == HANG else 0)
    assert f"variant 'fragile': its worker {why}" in (service.folder / "log").read_text()


@needs_proc
def test_a_worker_that_is_killed_under_load_costs_nobody_an_answer_or_tells_when_to_come_again(
    service: RuleService,
) -> None:
    seen: Counter[int] = Counter()
    states: set[str] = set()

    async def client(number: int, end: float) -> None:
        async with connected(service.port) as (reader, writer):
            while time.monotonic() < end:
                writer.write(infer_request("fragile", row(SLOWLY if number % 2 else number)))
                reply = await read_reply(reader)
                seen[reply.status] += 1
                if reply.status == 503:
                    assert reply.headers["retry-after"] == "1"
                    assert "its worker was killed (SIGKILL)" in reply.json()["error"]
                    await asyncio.sleep(0.02)

    async def scenario() -> None:
        async with Neighbour(service):
            clients = [asyncio.create_task(client(number, time.monotonic() + 2.5)) for number in range(6)]
            await asyncio.sleep(0.5)
            os.kill(newest_worker(service), signal.SIGKILL)
            await until(lambda: states.add(state(service)) or "restarting" in states)  # type: ignore[func-returns-value]
            assert service.metric("leanserve_worker_up", version="fragile") == 0
            await until(lambda: state(service) == "serving")
            await asyncio.gather(*clients)
        assert service.metric("leanserve_worker_up", version="fragile") == 1

    asyncio.run(scenario())
    assert seen[200] > 50
    assert set(seen) <= {200, 503}


@needs_proc
def test_a_service_of_which_no_worker_is_there_is_not_ready_and_says_why(service: RuleService) -> None:
    async def control(what: str) -> None:
        reply = await ask(service.port, post(f"/v2/repository/models/rules/versions/rule/{what}", b""))
        assert reply.status == 200

    async def scenario() -> None:
        await control("unload")
        (service.folder / "broken").touch()
        os.kill(newest_worker(service), signal.SIGKILL)
        await until(lambda: service.http.get("/readyz").status_code == 503)
        ready = service.http.get("/readyz")
        assert "'fragile' is restarting: its worker" in ready.json()["error"]
        assert ready.headers["retry-after"] == "1"
        asked = await ask(service.port, infer_request("fragile", row(1)))
        assert (asked.status, asked.json()["code"]) == (503, "not_ready")
        (service.folder / "broken").unlink()
        await until(lambda: service.http.get("/readyz").status_code == 200)
        assert (await ask(service.port, infer_request("fragile", row(1)))).outputs()[0] == 10
        await control("load")

    asyncio.run(scenario())
