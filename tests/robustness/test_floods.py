"""Hundreds of cheap requests in one moment (`floods.py`): nobody else waits for all of them.

A few are part of every run, all of them are `make soak`. What was measured stands in `docs/measurements/bombs.md`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from floods import (
    GRPC_FLOODS,
    OTHER_FLOODS,
    PREDICT_FLOODS,
    TEXT_FLOODS,
    all_at_once,
    all_calls_at_once,
)
from loop_lag import STALL_MS, loop_lag
from rule_service import RuleService, serving

TRIES = 3
HTTP_FLOODS = {**PREDICT_FLOODS, **OTHER_FLOODS}
QUICK = frozenset({"GET with too many headers", "embeddings: one text", "embeddings: lists", "embeddings: lists, 3 MB"})
"""Beside those in `test_bombs.py`."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RuleService]:
    with serving(tmp_path_factory.mktemp("texts"), program="text_server.py") as service:
        yield service


def rarely_run(names: Any) -> list[Any]:
    """All that are not quick under `soak`."""
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.soak) for name in names]


def stops_nobody(service: RuleService, name: str, at_once: Callable[[], Coroutine[Any, Any, Counter[Any]]]) -> None:
    """Flood while another client asks; where others had the cores, once more."""
    lags: list[float] = []
    for _ in range(TRIES):
        with loop_lag(service.port, service.process.pid) as lag:
            told = asyncio.run(at_once())
        lags.append(lag.worst_ms)
        if lag.worst_ms < STALL_MS:
            break
    statuses = ", ".join(f"{count} x {status}" for status, count in sorted(told.items()))
    print(f"| {name} | {statuses} | {', '.join(f'{lag:.0f}' for lag in lags)} |")
    assert min(lags) < STALL_MS


@pytest.mark.parametrize("name", rarely_run(HTTP_FLOODS))
def test_a_flood_stops_nobody(service: RuleService, name: str) -> None:
    flood = HTTP_FLOODS[name]
    stops_nobody(service, name, lambda: all_at_once(service.port, flood))


@pytest.mark.parametrize("name", rarely_run(TEXT_FLOODS))
def test_a_flood_of_texts_stops_nobody(texts: RuleService, name: str) -> None:
    flood = TEXT_FLOODS[name]
    stops_nobody(texts, name, lambda: all_at_once(texts.port, flood))


@pytest.mark.parametrize("name", rarely_run(GRPC_FLOODS))
def test_a_flood_of_calls_stops_nobody(service: RuleService, name: str) -> None:
    flood = GRPC_FLOODS[name]
    stops_nobody(service, name, lambda: all_calls_at_once(service.grpc_port, flood))
