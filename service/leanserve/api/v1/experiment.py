"""`/v1/experiment`: who gets the traffic, and the experiment on it; and `/v1/live`: what variants do now.

Reading asks for the role `read`, all else for `admin`; every admin verb is one line of the audit log and answers the
whole document as it is afterwards.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import TypeVar

import orjson
from pydantic import BaseModel

from leanserve.api.audit import CALLER, AuditLog
from leanserve.api.bodies import plain_body
from leanserve.api.endpoint import Declaration, Endpoint, endpoint, in_body
from leanserve.api.service import Service
from leanserve.contracts import Json
from leanserve.errors import BadInput
from leanserve.http.messages import Request, Response, Route, json_response
from leanserve.live.asked import EndWish, StartWish, TrafficWish, read_wish
from leanserve.live.documents import experiment_document, experiment_in_short, traffic_document

EXPERIMENT = "/v1/experiment"
LIVE = "/v1/live"
MOST_BYTES = 64 * 2**10
"""Of the body of an admin verb."""
_Wish = TypeVar("_Wish", bound=BaseModel)


class ExperimentEndpoints:
    """The verbs on one service's director."""

    def __init__(self, service: Service) -> None:
        self._director = service.experiments
        self._live = service.live
        self._audit = AuditLog()

    def endpoints(self) -> list[Endpoint]:
        """Their rows in the table."""
        director = self._director
        return [
            self._read(EXPERIMENT, "Traffic and the experiment on it", self._document),
            self._admin("PUT", "", "Share traffic out", (TrafficWish, director.direct)),
            self._admin("POST", "/start", "Start an experiment", (StartWish, _as_caller(director.start))),
            self._admin("POST", "/promote", "Promote the candidate", (EndWish, _as_caller(director.promote))),
            self._admin("POST", "/abort", "Abort the experiment", (EndWish, _as_caller(director.abort))),
            self._read(f"{EXPERIMENT}/disagreements", "Rows that were answered differently", self._disagreements),
            self._read(LIVE, "What every variant does now", self._live.snapshot),
        ]

    def _document(self) -> Json:
        return experiment_document(self._director, self._live.hardware.price_per_hour)

    def _disagreements(self) -> Json:
        record = self._director.record
        return {
            "experiment": record.name if record else None,
            "keeps_payloads": self._director.config.keep_payloads,
            "disagreements": self._director.disagreements(),
        }

    def _state(self) -> Json:
        """What the audit log has of before and after."""
        traffic = traffic_document(self._director)
        kept = {key: traffic[key] for key in ("weights", "shares", "caps")}
        return kept | {"experiment": experiment_in_short(self._director)}

    def _read(self, path: str, summary: str, tell: Callable[[], Json]) -> Endpoint:
        async def answer(_: Request) -> Response:
            return json_response(tell(), [(b"cache-control", b"no-store")])

        return endpoint(path, Route("GET", "read", answer), Declaration(summary))

    def _admin(
        self, method: str, verb: str, summary: str, takes: tuple[type[_Wish], Callable[[_Wish], Awaitable[None]]]
    ) -> Endpoint:
        kind, act = takes

        async def answer(request: Request) -> Response:
            wish = read_wish(kind, _parsed(await plain_body(request, MOST_BYTES)))
            action = f"experiment {verb[1:]}" if verb else "traffic"
            await self._audit.do(action, wish.model_dump_json(exclude_unset=True), self._state, partial(act, wish))
            return json_response(self._document(), [(b"cache-control", b"no-store")])

        return endpoint(
            f"{EXPERIMENT}{verb}", Route(method, "admin", answer), Declaration(summary, {"body": in_body(kind)})
        )


def _as_caller(act: Callable[[_Wish, str], Awaitable[None]]) -> Callable[[_Wish], Awaitable[None]]:
    """The same, in the name of whoever asks."""
    return lambda wish: act(wish, CALLER.get())


def _parsed(body: bytes | memoryview) -> Json:
    try:
        return orjson.loads(body or b"{}")
    except orjson.JSONDecodeError as error:
        raise BadInput(f"the body is no JSON: {error}") from None
