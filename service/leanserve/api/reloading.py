"""SIGHUP: the config file is read again, and what it says is served; a service that cannot take it goes on as it was.

    read, refuse -> build in a child -> plan, gate -> open and warm beside what serves -> swap -> drain the old

Each reload is one line in the log, with what changed, or with why nothing did.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Protocol, TypeVar

from leanserve.api.access import Key
from leanserve.api.service import Service
from leanserve.codecs.open_inference import InferDecoder
from leanserve.config.changes import config_changes
from leanserve.config.schema import ServiceConfig
from leanserve.errors import ServiceError, StartupError
from leanserve.serving.fleet import Fleet
from leanserve.serving.replanning import FleetPlan

logger = logging.getLogger(__name__)
Adopt = Callable[[ServiceConfig, Sequence[Key]], None]
_Result = TypeVar("_Result")


class Reload(Protocol):
    """One reading of the config file. None of its methods touches what serves; each belongs on a thread beside."""

    def read(self) -> ServiceConfig:
        """The config.

        Raises:
            StartupError: it is wrong, or differs in what cannot change.
        """

    def keys(self) -> Sequence[Key]:
        """The keys of that config, read again from where they are.

        Raises:
            StartupError: one is not there.
        """

    def build(self) -> None:
        """Build what is missing; may take hours.

        Raises:
            Exception: it could not be built.
        """

    def plan(self, lanes: int) -> FleetPlan:
        """What is to be served, on so many lanes.

        Raises:
            StartupError: a gate says that it must not be.
        """


async def reload_config(reload: Reload, service: Service, adopt: Adopt) -> None:
    """Serve what the file says; `adopt` is called in the moment of the swap. Never raises."""
    fleet, began = service.fleet, time.monotonic()
    try:
        config = await fleet.threads.do(reload.read, "usual")
        keys = await fleet.threads.do(reload.keys, "usual")
        changed = config_changes(service.config, config)
        await _apart(reload.build)
        planned = await fleet.threads.do(partial(reload.plan, len(fleet.device.lanes)), "usual")
        for plan in planned.plans:
            InferDecoder(plan.spec or service.base.spec)  # raises for what the protocol cannot carry
        before = _shares(fleet)
        await fleet.replan(planned, partial(adopt, config, keys))
    except (StartupError, ServiceError) as error:
        _refused(str(error))
    except Exception as error:
        _refused(str(error), error)
    else:
        what = "; ".join(changed) if changed else "nothing has changed in the file"
        logger.warning("reloaded in %.1f s: %s; %s -> %s", time.monotonic() - began, what, before, _shares(fleet))


def _refused(why: str, error: Exception | None = None) -> None:
    text = "reload refused, everything is as it was: %s"
    logger.error(text, "; ".join(why.splitlines()), exc_info=error)


def _shares(fleet: Fleet) -> str:
    """Who gets which share of the traffic."""
    total = sum(fleet.weights.values())
    return ", ".join(f"{name} {weight / total:.0%}" for name, weight in fleet.weights.items()) or "nobody serves"


async def _apart(work: Callable[[], _Result]) -> _Result:
    """Do work that waits, on a thread of its own: a child ends with the thread that has started it."""
    done: Future[_Result] = Future()
    done.set_running_or_notify_cancel()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    threading.Thread(target=run, name="reload", daemon=True).start()
    return await asyncio.wrap_future(done)
