"""One request, from the choice of its variant to its count: the walk of every front, written once.

    choose -> admit -> decode -> predict -> encode -> count

A front (REST, gRPC, OpenAI's API) brings a `WireRequest`: what was asked, and how that is read, decoded and answered in
its wire format. All else is here, and whoever wants a say in every request (limits, tracing, experiments) gets it here.
Bad input never reaches a queue. What would hold up the event loop is decoded and encoded on a thread, and not at all
for a variant that could not take the request anyway.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, NamedTuple, NoReturn, Protocol, TypeVar, TypeVarTuple

from leanserve.contracts import Arrays, Decoded, ModelSpec
from leanserve.errors import ClientGone, ServiceError
from leanserve.serving.batch_runner import Prediction
from leanserve.serving.fleet import Fleet
from leanserve.serving.incidents import unexpected_failure
from leanserve.serving.length_groups import cut_to_length, length_groups
from leanserve.serving.variant import Variant

DECODER_THREADS = 2
"""Threads of the loop's default executor, which decode and encode what would hold up the loop."""
QUICK_BYTES = 64 * 2**10
"""Bytes of outputs up to which they are encoded on the event loop; a thread costs 50 microseconds."""

Reply = TypeVar("Reply")
_Reply_co = TypeVar("_Reply_co", covariant=True)
_Args = TypeVarTuple("_Args")
_Result = TypeVar("_Result")


class VariantChoice(NamedTuple):
    """Which variant a request asks for: by its name, else by the caller's key, else by the traffic split."""

    variant: str | None
    caller_key: str | None = None


class Terms(NamedTuple):
    """How urgent a request is (0: as the default; `None`: not known yet), and the longest wait that it allows itself,
    which can shorten the queue's own limit."""

    priority: int | None = 0
    timeout_s: float | None = None


DEFAULT_TERMS = Terms()
UNKNOWN_TERMS = Terms(None)
"""Of a request that does not say so before it is decoded: it may be the most urgent one."""


class ModelRequest(NamedTuple):
    """A decoded request: one sample of all its rows, or one per group of rows that must queue apart."""

    samples: Sequence[Arrays]
    groups: Sequence[Sequence[int]] = ()
    """Numbers of the rows in each sample, where there are several."""
    terms: Terms = DEFAULT_TERMS


class Answered(NamedTuple):
    """An answered request; `parts` are as many as its samples were."""

    variant: Variant
    parts: Sequence[Prediction]
    groups: Sequence[Sequence[int]]

    def how_it_ran(self) -> dict[str, float]:
        """What every reply tells: milliseconds in the queue and on the device, rows of the (largest) batch."""
        queue_s, infer_s, rows = self.parts[0][2:]
        if len(self.parts) > 1:
            queue_s = max(part.queue_s for part in self.parts)
            infer_s = sum(part.infer_s for part in self.parts)
            rows = max(part.batch_size for part in self.parts)
        return {"queue_ms": round(queue_s * 1000, 3), "inference_ms": round(infer_s * 1000, 3), "batch_rows": rows}


class WireRequest(Protocol[_Reply_co]):
    """A request in the wire format of its front, and its reply. Methods may raise any `ServiceError`."""

    async def asked(self) -> VariantChoice:
        """Who is to answer. Reads only what is needed to know."""

    @property
    def is_read(self) -> bool:
        """Whether the body is here."""

    def terms(self, variant: Variant) -> Terms:
        """What is known of its terms before it is decoded."""

    async def read(self) -> None:
        """Read the body."""

    def decodes_quickly(self) -> bool:
        """Whether decoding takes less than about half a millisecond."""

    def decode(self, variant: Variant) -> ModelRequest:
        """Check and decode the body, on any thread; again where another variant must answer after all."""

    def is_disconnected(self) -> bool:
        """Whether the client left; asked from any thread."""

    @property
    def encodes_quickly(self) -> bool:
        """Whether encoding takes no longer than the outputs are large."""

    def encode(self, outcome: Answered) -> _Reply_co:
        """The reply, on any thread."""


class Session(Generic[Reply]):
    """One request on its way; `run` it once."""

    __slots__ = ("_choice", "_fleet", "_request", "variant")

    def __init__(self, fleet: Fleet, request: WireRequest[Reply]) -> None:
        self._fleet = fleet
        self._request = request
        self._choice = VariantChoice(None)
        self.variant: Variant | None = None
        """Who answers, once that is chosen."""

    async def run(self) -> Reply:
        """Answer the request, and count what became of it.

        Raises:
            ServiceError: whatever kept it from being answered; it names the variant, where one was chosen.
        """
        started = time.perf_counter()
        outcome = ServiceError.code
        try:
            reply = await self._walk()
            outcome = "ok"
            return reply
        except asyncio.CancelledError:
            outcome = ClientGone.code
            raise
        except Exception as error:
            failure = error if isinstance(error, ServiceError) else unexpected_failure(error, "a request")
            outcome = failure.code
            failure.variant = None if self.variant is None else self.variant.name
            raise failure from None
        finally:
            counted = self._fleet.metrics.unrouted if self.variant is None else self.variant.metrics
            counted.request_done(outcome, time.perf_counter() - started)

    async def _walk(self) -> Reply:
        request = self._request
        self._choice = await request.asked()
        variant = self.variant = self._fleet.choose(*self._choice)
        if not request.is_read:
            terms = request.terms(variant)
            variant.check_open(terms.priority, variant.timeout_s(terms.timeout_s))
            await request.read()
            variant = self._confirmed(variant)
        if request.decodes_quickly():
            asked = request.decode(variant)
        else:
            variant, asked = await self._decoded_apart(variant)
        if len(asked.samples) == 1:
            parts: Sequence[Prediction] = (await self._predict(variant, asked.samples[0], asked.terms),)
        else:
            parts = await self._predict_apart(variant, asked)
        outcome = Answered(variant, parts, asked.groups)
        if request.encodes_quickly and sum([array.nbytes for part in parts for array in part.outputs]) <= QUICK_BYTES:
            return request.encode(outcome)
        return await off_loop(request.encode, outcome)

    def _confirmed(self, variant: Variant) -> Variant:
        """After the loop turned to others: another variant if this one was unloaded since."""
        self.variant = self._fleet.confirm(variant, *self._choice)
        return self.variant

    async def _decoded_apart(self, variant: Variant) -> tuple[Variant, ModelRequest]:
        """Decode on a thread; it counts as waiting meanwhile."""
        request = self._request
        while True:
            with variant.expecting(request.terms(variant).priority):
                asked = await off_loop(request.decode, variant)
            before, variant = variant, self._confirmed(variant)
            if variant is before or (variant.spec == before.spec and variant.codec == before.codec):
                return variant, asked

    def _predict(self, variant: Variant, sample: Arrays, terms: Terms) -> Coroutine[Any, Any, Prediction]:
        return variant.predict(
            sample, self._request.is_disconnected, variant.timeout_s(terms.timeout_s), terms.priority or 0
        )

    async def _predict_apart(self, variant: Variant, asked: ModelRequest) -> Sequence[Prediction]:
        """The prediction of each sample; if one fails the others are taken back."""
        variant.batcher.limits.check(sum(len(sample[0]) for sample in asked.samples))
        tasks = [asyncio.ensure_future(self._predict(variant, sample, asked.terms)) for sample in asked.samples]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            raise


def refuse_unrouted(fleet: Fleet, error: ServiceError) -> NoReturn:
    """Refuse a prediction that no variant can answer, whatever it says: an unknown path, a wrong method. Counts it."""
    fleet.metrics.unrouted.request_done(error.code, 0.0)
    raise error


def grouped_rows(decoded: Decoded, spec: ModelSpec) -> ModelRequest:
    """A decoded body as it is to queue: rows of different length apart, where these must not share a batch."""
    if spec.rows == "any" or len(set(decoded.lengths)) < 2:
        return ModelRequest((decoded.inputs,))
    groups = length_groups(decoded.lengths, spec.rows)
    return ModelRequest([cut_to_length(decoded, spec, group) for group in groups], groups)


async def off_loop(work: Callable[[*_Args], _Result], *args: *_Args) -> _Result:
    """Do work that takes more than a few hundred microseconds where it does not hold up the event loop."""
    return await asyncio.get_running_loop().run_in_executor(None, work, *args)
