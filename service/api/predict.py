"""A prediction, from request to reply: the straight line that every request walks.

body -> choose a variant -> decode and check -> queue and run -> encode. Bad input never reaches a queue; bodies are
decoded in a small thread pool, so that a large picture cannot hold up the event loop.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

from service.api.wire import Receive, Scope, gone_check, header, read_body
from service.contracts import Decoded, Json
from service.serving.fleet import Fleet
from service.serving.variant import Prediction

DECODERS = ThreadPoolExecutor(2, thread_name_prefix="decode")
"""Threads start with the first picture, not with the import."""


@dataclass(slots=True)
class Caller:
    """One request; `variant` is the name of the variant that was chosen for it, once known."""

    scope: Scope
    receive: Receive
    variant: str | None = None


class Answer(NamedTuple):
    """The JSON body of a reply and the variant that gave it."""

    body: Json
    variant: str


async def predict(fleet: Fleet, caller: Caller) -> Answer:
    """Answer one request.

    Raises:
        ServiceError: whatever kept it from being answered.
    """
    scope = caller.scope
    body = await read_body(scope, caller.receive, fleet.config.limits.body_bytes)
    variant = fleet.choose(header(scope, b"x-variant"), header(scope, fleet.sticky_header))
    caller.variant = variant.name
    media_type = (header(scope, b"content-type") or "").partition(";")[0].strip().lower()
    loop = asyncio.get_running_loop()
    decoded: Decoded = await loop.run_in_executor(DECODERS, fleet.base.codec.decode, media_type, body)
    prediction = await variant.predict(decoded.inputs, gone_check(caller.receive))
    return Answer(_body(fleet.base.codec.encode(prediction.outputs), decoded.many, prediction), variant.name)


def _body(answers: list[dict[str, Json]], many: bool, prediction: Prediction) -> Json:  # noqa: FBT001
    how = {
        "variant": prediction.variant,
        "queue_ms": round(prediction.queue_s * 1000, 3),
        "inference_ms": round(prediction.infer_s * 1000, 3),
        "batch_rows": prediction.batch_size,
    }
    return {"predictions": answers, **how} if many else {**answers[0], **how}
