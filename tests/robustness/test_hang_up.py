""" "A reload drops requests", "a typo in the config takes the service down": SIGHUP under constant load."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from raw_http import ask, connected, infer_request, post, read_reply
from rule_service import RuleService, serving, until
from rules import row

CLIENTS = 4


class Reloaded:
    """A service, and what its config says."""

    def __init__(self, service: RuleService, **config: Any) -> None:
        self.service = service
        self.config = {"base": "rules", "drain": {"delay_s": 0}} | config

    def log(self) -> str:
        return (self.service.folder / "log").read_text()

    async def change(self, text: str | None = None, **config: Any) -> str:
        """Write the config with these changes, or as this text, and send SIGHUP; the line that the log has then."""
        changed = self.config | config
        (self.service.folder / "config.yaml").write_text(text or yaml.safe_dump(changed, sort_keys=False))
        before = self.lines()
        self.service.process.send_signal(signal.SIGHUP)
        await until(lambda: len(self.lines()) > len(before))
        (line,) = self.lines()[len(before) :]
        if "reloaded in" in line:
            self.config = changed
        return line

    def lines(self) -> list[str]:
        return [line for line in self.log().splitlines() if "reload refused" in line or "reloaded in" in line]

    def states(self) -> dict[str, tuple[str, float]]:
        """State and share of the traffic, by variant."""
        listed = self.service.get("/v1/variants")["variants"]
        return {item["name"]: (item["state"], round(item["traffic_share"], 3)) for item in listed}


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reloaded]:
    limits, both = {"body_bytes": 100_000}, {"weights": {"rule": 1, "onnx1": 1}}
    with serving(tmp_path_factory.mktemp("reloaded"), "rule", "onnx1", limits=limits, traffic=both) as service:
        yield Reloaded(service, variants=variants("rule", "onnx1"), limits=limits)


def variants(*names: str) -> list[dict[str, Any]]:
    return [{"name": name} for name in names]


@asynccontextmanager
async def load(service: RuleService, named: str) -> AsyncIterator[Counter[str]]:
    """Clients of a variant that stays, and others that leave the choice to the service; who answered how often."""
    seen: Counter[str] = Counter()
    over = asyncio.Event()
    unnamed = infer_request(named, row(3)).replace(f"/versions/{named}".encode(), b"")

    async def client(number: int) -> None:
        async with connected(service.port) as (reader, writer):
            while not over.is_set():
                writer.write(infer_request(named, row(3)) if number % 2 else unnamed)
                reply = await read_reply(reader)
                seen[reply.json()["model_version"] if reply.status == 200 else str(reply.status)] += 1

    clients = [asyncio.create_task(client(number)) for number in range(CLIENTS)]
    try:
        yield seen
    finally:
        over.set()
        await asyncio.gather(*clients)


def test_variants_come_and_go_under_load_and_no_request_fails(reloaded: Reloaded) -> None:
    async def scenario() -> Counter[str]:
        service = reloaded.service
        async with load(service, "rule") as seen:
            await until(lambda: seen["onnx1"] > 20)
            line = await reloaded.change(
                variants=variants("rule", "onnx2", "fragile"),
                traffic={"weights": {"rule": 1, "onnx2": 2, "fragile": 1}},
            )
            assert "variant 'onnx2' is new" in line
            assert "variant 'onnx1' is removed" in line
            assert line.endswith("rule 50%, onnx1 50% -> rule 25%, onnx2 50%, fragile 25%")
            shown = {"rule": ("serving", 0.25), "onnx2": ("serving", 0.5), "fragile": ("serving", 0.25)}
            assert reloaded.states() == shown
            gone = await ask(service.port, infer_request("onnx1", row(1)))
            assert (gone.status, gone.json()["code"]) == (404, "not_found")
            await until(lambda: min(seen["onnx2"], seen["fragile"]) > 20)
            # The removed one is closed and forgotten once nobody can be on the way to it any more.
            await until(lambda: service.metric("leanserve_variant_info", version="onnx1") == 0)
            line = await reloaded.change(variants=variants("onnx1", "rule"), traffic={})
            assert line.endswith("-> onnx1 100%, rule 0%")
            reloaded.config["traffic"] = {}
        return seen

    seen = asyncio.run(scenario())
    assert set(seen) == {"rule", "onnx1", "onnx2", "fragile"}, "answers alone"


def test_the_numbers_of_a_variant_that_stays_go_on(reloaded: Reloaded) -> None:
    async def scenario() -> None:
        service = reloaded.service
        before, _ = service.executed("rule")
        assert (await ask(service.port, infer_request("rule", row(1)))).status == 200
        await reloaded.change(batch={"queue_rows": 77, "timeout_ms": 5000})
        assert (await ask(service.port, infer_request("rule", row(1)))).status == 200
        await until(lambda: service.executed("rule")[0] == before + 2)
        too_many = await ask(service.port, infer_request("rule", row(1).repeat(78, axis=0)))
        assert (too_many.status, "at most 77" in too_many.json()["error"]) == (400, True)

    asyncio.run(scenario())


def test_limits_of_clients_change(reloaded: Reloaded) -> None:
    async def scenario() -> None:
        port = reloaded.service.port
        large = post("/v2/models/rules/infer", b"{" + b" " * 2000 + b"}")
        assert (await ask(port, large)).status == 400
        await reloaded.change(limits={"body_bytes": 1000})
        assert (await ask(port, large)).status == 413
        await reloaded.change(limits={"body_bytes": 100_000})
        assert (await ask(port, large)).status == 400

    asyncio.run(scenario())


def test_keys_come_change_and_go(reloaded: Reloaded) -> None:
    async def scenario() -> None:
        service, file = reloaded.service, reloaded.service.folder / "client.key"

        async def answered(key: str = "") -> int:
            request = infer_request("rule", row(1))
            return (await ask(service.port, request.replace(b"\r\n", f"\r\nx-api-key: {key}\r\n".encode(), 1))).status

        one = [{"name": "client", "roles": ["predict"], "file": "client.key"}]
        assert await answered() == 200
        assert "client.key cannot be read: No such file" in await reloaded.change(auth={"keys": one})
        assert await answered() == 200
        for key, other, told in (("first-" * 4, "second-" * 4, "is new"), ("second-" * 4, "first-" * 4, "has changed")):
            file.write_text(key)
            await reloaded.change(auth={"keys": one})
            assert [await answered(key), await answered(other), await answered()] == [200, 401, 401]
            assert f"keys: 'client' {told}" in reloaded.log()
        await reloaded.change(auth={})
        assert await answered() == 200
        assert "keys: 'client' is withdrawn" in reloaded.log()
        assert "first-" not in reloaded.log()

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("changes", "text", "told"),
    [
        ({}, "base: rules\nvariants:\n  - {name: rule, pases: []}\n", "config.yaml:3: variants.0.pases: unknown key"),
        ({}, "base: rules\nvariants: [{name: rule}\n", "config.yaml:3: not valid YAML"),
        ({"seed": 3, "threads": 1}, None, "'seed' cannot change while the service runs"),
        ({"base": "digits"}, None, "config.yaml:1: 'base' cannot change while the service runs"),
        ({"traffic": {"weights": {"nobody": 1}}}, None, "traffic.weights names 'nobody'"),
        ({"variants": variants("rule", "unknown")}, None, "unknown"),
    ],
)
def test_what_is_wrong_changes_nothing_and_is_one_line(
    reloaded: Reloaded, changes: dict[str, Any], text: str | None, told: str
) -> None:
    async def scenario() -> None:
        before = reloaded.states()
        line = await reloaded.change(text, **changes)
        assert "reload refused, everything is as it was: " in line
        assert told in line
        assert reloaded.states() == before
        assert (await ask(reloaded.service.port, infer_request("rule", row(1)))).status == 200

    asyncio.run(scenario())


def test_where_it_says_so_sighup_drains(tmp_path: Path) -> None:
    with serving(tmp_path, "rule", on_sighup="drain") as service:
        began = time.monotonic()
        service.process.send_signal(signal.SIGHUP)
        assert service.process.wait(10) == 0
        assert time.monotonic() - began < 10
        assert "SIGHUP: draining" in (tmp_path / "log").read_text()
