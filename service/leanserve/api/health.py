"""`GET /healthz` and `GET /readyz`: whether the process lives, and whether it answers predictions.

Probes ask often, and many at once where a service has many replicas: they have no key and no turn to wait for, and
cost as little as a prediction.
"""

from __future__ import annotations

from leanserve.api.endpoint import Declaration, Endpoint, endpoint
from leanserve.api.service import Service
from leanserve.http.messages import Request, Response, Route, json_response

LIVE, READY = "/healthz", "/readyz"
_LIVE = "200 while the process lives; 503 once every variant has failed, which only a new process can mend"
_READY = "200 when variants are warm; 503 before, once draining has begun, and if all were unloaded"


def health_endpoints(service: Service) -> list[Endpoint]:
    """Their rows in the table of endpoints."""
    fleet = service.fleet

    async def live(_: Request) -> Response:
        fleet.check_live()
        return json_response({"live": True})

    async def ready(_: Request) -> Response:
        fleet.check_ready()
        return json_response({"ready": True})

    return [
        endpoint(LIVE, Route("GET", "open", live), Declaration(_LIVE)),
        endpoint(READY, Route("GET", "open", ready), Declaration(_READY)),
    ]
