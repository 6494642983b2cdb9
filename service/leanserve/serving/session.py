"""One request, from the choice of its variant to its count: the walk of every front, written once.

    choose -> admit -> decode -> predict -> encode -> count

A front (REST, gRPC, OpenAI's API) has a `Session` of its own, which says what was asked, and how that is read, decoded
and answered in its wire format. All else is here, and whoever wants a say in every request (limits, tracing,
experiments) gets it here.
Bad input never reaches a queue. What would hold up the event loop is decoded and encoded apart from it (`decoding.py`),
and not at all for a variant that could not take the request anyway. The time of a request begins when all of it is
here: what decoding took of it is no longer there to queue.
"""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from leanserve.contracts import Arrays, Decoded, ModelSpec, SequenceStep
from leanserve.errors import ClientGone, QueueTimeout, ServiceError
from leanserve.memory import forget
from leanserve.serving.batch_runner import Prediction
from leanserve.serving.decoder_process import Decoding
from leanserve.serving.decoding import Patience, Work, off_loop
from leanserve.serving.fleet import Fleet
from leanserve.serving.incidents import unexpected_failure
from leanserve.serving.length_groups import cut_to_length, length_groups
from leanserve.serving.variant import Variant
from leanserve.texts import size_of

QUICK_BYTES = 64 * 2**10
"""Bytes of outputs up to which they are encoded on the event loop; a thread costs 50 microseconds."""

Reply = TypeVar("Reply")

VariantChoice: TypeAlias = tuple[str | None, str | None]
"""Which variant a request asks for: by its name, else by the caller's key, else (both `None`) by the traffic split."""


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
    sequence: SequenceStep | None = None
    """Its place in a sequence, where the server keeps the state; then it has one sample."""


class Answered(NamedTuple):
    """An answered request; `parts` are as many as its samples were."""

    variant: Variant
    parts: Sequence[Prediction]
    groups: Sequence[Sequence[int]]

    def nbytes(self) -> int:
        """Bytes of all outputs."""
        if len(self.parts) > 1:
            return sum(size_of(array) for part in self.parts for array in part.outputs)
        return sum([size_of(array) for array in self.parts[0].outputs])

    def how_it_ran(self) -> dict[str, float]:
        """What every reply tells: milliseconds in the queue and on the device, rows of the (largest) batch."""
        queue_s, infer_s, rows = self.parts[0][2:]
        if len(self.parts) > 1:
            queue_s = max(part.queue_s for part in self.parts)
            infer_s = sum(part.infer_s for part in self.parts)
            rows = max(part.batch_size for part in self.parts)
        return {"queue_ms": _milliseconds(queue_s), "inference_ms": _milliseconds(infer_s), "batch_rows": rows}


def _milliseconds(seconds: float) -> float:
    """To the microsecond. `round(..., 3)` goes by decimal text, and takes as long as the rest of a reply's JSON."""
    return int(seconds * 1e6 + 0.5) / 1000


class Session(ABC, Generic[Reply]):
    """One request on its way; `run` it once.

    The class of a front says what its wire format makes of a request. Its methods may raise any `ServiceError`.
    """

    is_chosen_by_body = False
    """Whether the body has to be read to know what is asked."""
    heavy = 0
    """Bytes of text to be parsed, where that is too little for a thread, and too much to be done by the hundred."""
    encodes_quickly = True
    """Whether encoding takes no longer than the outputs are large."""
    fleet: Fleet
    body: Any
    """What came, once it is here; `None` before."""
    is_disconnected: Callable[[], bool]
    """Whether the client left; asked from any thread."""
    variant: Variant | None = None
    """Who answers, once that is chosen."""
    _choice: VariantChoice
    _ended = ServiceError.code
    """What became of it."""

    @abstractmethod
    def asked(self) -> VariantChoice:
        """Who is to answer."""

    @abstractmethod
    async def read(self) -> None:
        """Read the body."""

    def terms(self, _: Variant) -> Terms:
        """What is known of its terms before it is decoded."""
        return DEFAULT_TERMS

    def body_size(self) -> int:
        """Bytes of the body."""
        return len(self.body or b"")

    @abstractmethod
    def decodes_quickly(self) -> bool:
        """Whether decoding takes less than about half a millisecond."""

    @abstractmethod
    def decoding(self, variant: Variant) -> Decoding[Any]:
        """How the body becomes what `take` takes; anew where another variant must answer after all."""

    @abstractmethod
    def take(self, variant: Variant, made: Any) -> ModelRequest:
        """The request of what was decoded, on any thread."""

    def decode(self, variant: Variant) -> ModelRequest:
        """Check and decode the body here and now."""
        return self.take(variant, self.decoding(variant).prepare().finish())

    @abstractmethod
    def encode(self, answered: Answered) -> Reply:
        """The reply, on any thread."""

    async def run(self) -> Reply:
        """Answer the request, and count what became of it.

        Raises:
            ServiceError: whatever kept it from being answered; it names the variant, where one was chosen.
        """
        started = time.perf_counter()
        try:
            if self.is_chosen_by_body:
                await self.read()
            self._choice = choice = self.asked()
            variant = self.variant = self.fleet.choose(*choice)
            if self.body is None:
                variant = await self._read(variant)
            if self.decodes_quickly():
                request = self.decode(variant)
            else:
                variant, request = await self._decoded_apart(variant)
            samples, groups, terms, sequence = request
            if sequence is not None:
                answered = await self._predict_in_sequence(variant, request, sequence)
            elif len(samples) > 1:
                answered = Answered(variant, await self._predict_apart(variant, samples, terms), groups)
            else:
                one = await variant.predict(samples[0], self.is_disconnected, terms.timeout_s, terms.priority or 0)
                answered = Answered(variant, (one,), groups)
            if self.encodes_quickly and answered.nbytes() <= QUICK_BYTES:
                reply = self.encode(answered)
            else:
                with self.fleet.switches:
                    reply = await off_loop(self.encode, answered)
            self._ended = "ok"
            return reply
        except asyncio.CancelledError:
            self._ended = ClientGone.code
            raise
        except Exception as error:
            # Without a name: it holds this frame, and both would stay until the garbage collector looks.
            raise self._failure(error) from None
        finally:
            counted = self.fleet.metrics.unrouted if self.variant is None else self.variant.metrics
            counted.request_done(self._ended, time.perf_counter() - started)

    def _failure(self, error: Exception) -> ServiceError:
        """What the client is told. Lets go of the body, which the frames of an error would hold."""
        failure = _refusal(error)
        failure.variant = None if self.variant is None else self.variant.name
        self._ended = failure.code
        forget(error)
        self.body = None
        return failure

    async def _read(self, variant: Variant) -> Variant:
        """Read the body, unless its variant could not take the request anyway."""
        terms = self.terms(variant)
        variant.check_open(terms.priority, terms.timeout_s)
        await self.read()
        return self._confirmed(variant)

    def _confirmed(self, variant: Variant) -> Variant:
        """After the loop turned to others: another variant if this one was unloaded since."""
        self.variant = self.fleet.confirm(variant, *self._choice)
        return self.variant

    async def _decoded_apart(self, variant: Variant) -> tuple[Variant, ModelRequest]:
        """Decode apart from the loop, or in a turn of it; it counts as waiting meanwhile."""
        if self.heavy:
            await self.fleet.decoders.turn_for(self.heavy)
            variant = self._confirmed(variant)
            return variant, self.decode(variant)
        arrived = time.perf_counter()
        while True:
            terms = self.terms(variant)
            patience = Patience(arrived + _time_of(terms, variant), self.is_disconnected)
            with variant.expecting(terms.priority):
                work = Work(self.decoding(variant), partial(self.take, variant), self.body_size())
                asked = await self.fleet.decoders.run(work, patience)
            before, variant = variant, self._confirmed(variant)
            if variant is before or (variant.spec == before.spec and variant.codec == before.codec):
                return variant, asked._replace(terms=_what_is_left(asked.terms, variant, arrived))

    async def _predict_in_sequence(self, variant: Variant, request: ModelRequest, step: SequenceStep) -> Answered:
        """The prediction for one request of a sequence, by the variant that answered its first one."""
        kept = self.fleet.sequences
        sequence = kept.entered(step, variant, self._choice[0])
        if sequence.variant is not variant:
            before, variant = variant, sequence.variant
            self.variant = variant
            if variant.spec != before.spec:
                request = self.decode(variant)
        terms = request.terms

        def predict(sample: Arrays, left_s: float) -> Awaitable[Prediction]:
            return variant.predict(sample, self.is_disconnected, left_s, terms.priority or 0)

        longest = variant.batcher.limits.timeout_s
        timeout_s = longest if terms.timeout_s is None else min(longest, terms.timeout_s)
        return Answered(variant, (await kept.answered(sequence, step, request.samples[0], predict, timeout_s),), ())

    async def _predict_apart(self, variant: Variant, samples: Sequence[Arrays], terms: Terms) -> Sequence[Prediction]:
        """The prediction of each sample; if one fails the others are taken back."""
        variant.batcher.limits.check(sum(len(sample[0]) for sample in samples))
        gone, timeout_s, priority = self.is_disconnected, terms.timeout_s, terms.priority or 0
        tasks = [asyncio.ensure_future(variant.predict(sample, gone, timeout_s, priority)) for sample in samples]
        try:
            return await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            raise


def _time_of(terms: Terms, variant: Variant) -> float:
    """Seconds that a request may take until it runs."""
    longest = variant.batcher.limits.timeout_s
    return longest if terms.timeout_s is None else min(terms.timeout_s, longest)


def _what_is_left(terms: Terms, variant: Variant, arrived: float) -> Terms:
    """The terms of a request for the queue, after it was decoded."""
    took = time.perf_counter() - arrived
    if took >= (allowed := _time_of(terms, variant)):
        raise QueueTimeout(f"decoding took {took * 1000:.0f} ms; the request allows {allowed * 1000:.0f} ms")
    return terms._replace(timeout_s=allowed - took)


def _refusal(error: Exception) -> ServiceError:
    """What the client is told; a body is not wrong because there was no memory to decode it."""
    if isinstance(error, ServiceError) and not isinstance(error.__cause__, MemoryError):
        return error
    return unexpected_failure(error, "a request")


def unrouted(fleet: Fleet, refusal: ServiceError) -> ServiceError:
    """Count the refusal of a prediction that no variant can answer, whatever it says: an unknown path, a wrong method.

    What is returned is to be raised without a name, as everywhere: a frame that has one holds the error, which holds
    the frame, and both would stay until the garbage collector looks.
    """
    fleet.metrics.unrouted.request_done(refusal.code, 0.0)
    return refusal


def grouped_rows(decoded: Decoded, spec: ModelSpec) -> ModelRequest:
    """A decoded body as it is to queue: rows of different length apart, where these must not share a batch."""
    if spec.rows == "any" or len(set(decoded.lengths)) < 2:
        return ModelRequest((decoded.inputs,))
    groups = length_groups(decoded.lengths, spec.rows)
    return ModelRequest([cut_to_length(decoded, spec, group) for group in groups], groups)
