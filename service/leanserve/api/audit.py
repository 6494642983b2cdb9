"""The audit log: one line of JSON for every admin action, with who did what, and the state before and after.

Also where its client left meanwhile: an action is done to its end. What was not admitted was no action.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextvars import ContextVar

import orjson

from leanserve.contracts import Json
from leanserve.errors import ServiceError

logger = logging.getLogger("leanserve.audit")
CALLER: ContextVar[str] = ContextVar("caller", default="unknown")
"""Who asked for an admin verb: `key NAME`, or the address where no keys are configured."""


def remember_caller(key: str | None, address: str = "unknown") -> None:
    """Say in the task that answers who asked: by which key, else from where."""
    CALLER.set(address if key is None else f"key {key}")


class AuditLog:
    """Does admin actions, and tells of each."""

    def __init__(self) -> None:
        self._doing: set[asyncio.Task[None]] = set()

    async def do(self, action: str, target: str, state: Callable[[], Json], act: Callable[[], Awaitable[None]]) -> None:
        """Do what was asked for; `state` is asked before and after. Raises what `act` raises."""
        doing = asyncio.create_task(_audited(action, target, state, act))
        self._doing.add(doing)
        doing.add_done_callback(self._doing.discard)
        await asyncio.shield(doing)


async def _audited(action: str, target: str, state: Callable[[], Json], act: Callable[[], Awaitable[None]]) -> None:
    before, outcome = state(), ServiceError.code
    try:
        await act()
        outcome = "ok"
    except ServiceError as error:
        outcome = error.code
        raise
    finally:
        entry = {"who": CALLER.get(), "action": action, "target": target, "before": before, "after": state()}
        logger.info("%s", orjson.dumps(entry | {"outcome": outcome}).decode())
