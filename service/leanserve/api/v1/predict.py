"""A prediction in the base's own formats, from request to reply: the straight line that every request walks.

choose a variant -> body -> decode and check -> queue and run -> encode. Bad input never reaches a queue; bodies are
decoded in a small thread pool, so that a large image cannot hold up the event loop, and not at all for a variant that
could not take the request anyway.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

from leanserve.api.by_length import cut_to_length, in_order, joined, length_groups, predict_groups
from leanserve.contracts import Base, Decoded, Json
from leanserve.http.content_encoding import encoding_of_body, inflate
from leanserve.http.messages import Request, Response, disconnect_check, json_response, read_body
from leanserve.serving.batch_runner import Prediction
from leanserve.serving.fleet import Fleet
from leanserve.serving.variant import IsDisconnected, Variant

DECODER_THREADS = 2
"""Threads of the loop's default executor, which decode and encode what would hold up the loop."""
DEFAULT_PRIORITY = 0

_Args = TypeVarTuple("_Args")
_Result = TypeVar("_Result")


async def off_loop(work: Callable[[*_Args], _Result], *args: *_Args) -> _Result:
    """Do work that takes more than a few hundred microseconds where it does not hold up the event loop."""
    return await asyncio.get_running_loop().run_in_executor(None, work, *args)


async def decode_for(
    variant: Variant, priority: int | None, decode: Callable[[*_Args], _Result], *args: *_Args
) -> _Result:
    """Decode off the loop for a variant, unless that could not take a request of this priority anyway.

    Raises:
        QueueFull, DeadlineUnreachable: it could not. Whatever `decode` raises.
    """
    with variant.expecting(priority):
        return await off_loop(decode, *args)


async def plain_body(caller: Request, limit: int) -> bytes | memoryview:
    """The whole request body, inflated if its `Content-Encoding` says that it is compressed.

    Raises:
        BodyTooLarge: above `limit` bytes, compressed or inflated. UnsupportedMediaType: an unknown encoding.
        BadInput: the compressed body is damaged. ClientGone: the client left while sending.
    """
    if caller.body is not None:
        return caller.body
    encoding = encoding_of_body(caller.header(b"content-encoding"))
    body = await read_body(caller, limit)
    return body if encoding is None else await off_loop(inflate, bytes(body), encoding, limit)


async def predict(fleet: Fleet, caller: Request) -> Response:
    """Answer one request.

    Raises:
        ServiceError: whatever kept it from being answered.
    """
    asked = caller.header(b"x-variant"), caller.header(fleet.sticky_header)
    variant = fleet.choose(*asked)
    caller.variant = variant.name
    if caller.body is None:
        variant.check_open()
    body = bytes(await plain_body(caller, fleet.config.limits.body_bytes))
    content_type = caller.header(b"content-type") or ""  # with its parameters: a form names its boundary there
    decoded: Decoded = await decode_for(variant, DEFAULT_PRIORITY, fleet.base.codec.decode, content_type, body)
    variant = fleet.confirm(variant, *asked)
    caller.variant = variant.name
    prediction, answers = await _answered(variant, fleet.base, decoded, disconnect_check(caller.receive))
    how: dict[str, Json] = {"variant": prediction.variant, **how_it_ran(prediction)}
    return json_response(
        {"predictions": answers, **how} if decoded.many else {**answers[0], **how},
        [(b"x-variant", variant.name.encode())],
    )


async def _answered(
    variant: Variant, base: Base, decoded: Decoded, gone: IsDisconnected
) -> tuple[Prediction, list[dict[str, Json]]]:
    """The prediction and one answer per row. Rows of different length run apart where they must."""
    spec = base.spec
    if spec.rows == "any" or len(set(decoded.lengths)) < 2:
        prediction = await variant.predict(decoded.inputs, gone)
        return prediction, base.codec.encode(prediction.outputs)
    groups = length_groups(decoded.lengths, spec.rows)
    parts = await predict_groups(variant, [cut_to_length(decoded, spec, group) for group in groups], gone)
    answers = in_order([base.codec.encode(part.outputs) for part in parts], groups)
    return joined(parts, ()), answers


def how_it_ran(prediction: Prediction) -> dict[str, float]:
    """What every reply tells about its prediction: milliseconds in the queue and on the device, rows of its batch."""
    return {
        "queue_ms": _milliseconds(prediction.queue_s),
        "inference_ms": _milliseconds(prediction.infer_s),
        "batch_rows": prediction.batch_size,
    }


def _milliseconds(seconds: float) -> float:
    """To the microsecond. `round(..., 3)` goes by decimal text, and takes as long as the rest of a reply's JSON."""
    return int(seconds * 1e6 + 0.5) / 1000
