"""Sequences: state that is kept between requests, for models that take it beside their input and give the next.

A streaming model (audio, a cursor over a text) is asked again and again, each time with the state of the last answer.
In a sequence the client sends that neither way: the first request says `sequence_start`, the last one `sequence_end`,
and whatever is in between has the id of the sequence. To the model, state is an input like any other, so that requests
of many sequences share batches; within one they run one after the other, in the order in which they were read.

What is kept is bounded in number and in bytes, and is forgotten when nobody has asked for a while. A request that fails
leaves the state as it was. Source: the sequence extension of the Open Inference Protocol (Triton's `sequence_id`).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import numpy as np

from leanserve.contracts import Array, Arrays, ModelSpec, SequenceStep
from leanserve.errors import BadInput, QueueFull, QueueTimeout
from leanserve.serving.batch_runner import Prediction
from leanserve.serving.expiry import ExpiryTimer
from leanserve.telemetry.observations import SequenceEnd

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from leanserve.serving.opening import SequenceLimits
    from leanserve.serving.variant import Variant

MOST_WAITING = 32
"""Requests of one sequence that may wait for each other."""


class OpenSequence:
    """One sequence; `state` is `None` until its first request is answered."""

    __slots__ = ("is_over", "state", "turn", "used_at", "variant", "waiting")

    def __init__(self, variant: Variant) -> None:
        self.variant = variant
        self.state: Arrays | None = None
        """By the position of the pair in `state_pairs`."""
        self.turn = asyncio.Lock()
        self.waiting = 0
        self.used_at = time.perf_counter()
        self.is_over = False


def state_pairs(spec: ModelSpec) -> tuple[tuple[int, int], ...]:
    """Positions of the inputs that are state, and of the outputs that are their next values."""
    outputs = [item.name for item in spec.outputs]
    inputs = enumerate(spec.inputs)
    return tuple((position, outputs.index(item.next_from)) for position, item in inputs if item.next_from is not None)


def state_size(spec: ModelSpec) -> int:
    """Bytes of the state of one sequence."""
    states = [spec.inputs[position] for position, _ in state_pairs(spec)]
    return sum(math.prod(size or 0 for size in item.shape) * np.dtype(item.dtype).itemsize for item in states)


class Sequences:
    """All sequences of a fleet, on its loop."""

    def __init__(self, limits: SequenceLimits) -> None:
        self._limits = limits
        self._open: dict[int | str, OpenSequence] = {}
        """Those used last are last."""
        self._bytes = 0
        self._timer = ExpiryTimer(asyncio.get_running_loop(), self._expire)

    def entered(self, step: SequenceStep, variant: Variant, asked: str | None) -> OpenSequence:
        """The sequence of a request; `variant` is to answer a new one, `asked` is the name that the request gave.

        Raises:
            BadInput: it is not open, or is answered by another variant.
            QueueFull: no more can be opened.
        """
        known = self._open.get(step.id)
        if step.start:
            if known is not None:
                self._end(step.id, "restarted")
            return self._begun(step.id, variant)
        if known is None:
            raise BadInput(
                f"sequence {step.id!r} is not open: its first request says sequence_start, and one that nobody asks "
                f"for {self._limits.idle_s:g} s is forgotten"
            )
        if asked not in {None, known.variant.name}:
            raise BadInput(f"sequence {step.id!r} is answered by '{known.variant.name}', not by '{asked}'")
        return known

    async def answered(
        self,
        sequence: OpenSequence,
        step: SequenceStep,
        sample: Arrays,
        predict: Callable[[Arrays, float], Awaitable[Prediction]],
        timeout_s: float,
    ) -> Prediction:
        """What the model predicts for a sample in its turn; what `step.keeps` names of it is the kept state.

        `predict` is given the sample with the state and the seconds that are left of `timeout_s`.

        Raises:
            BadInput: the sequence ended while the request waited. QueueFull, QueueTimeout: too many wait, or too long.
        """
        began = time.perf_counter()
        async with self._turn_of(sequence, timeout_s):
            if sequence.is_over:
                raise BadInput(f"sequence {step.id!r} ended while the request waited for the one before it")
            pairs = state_pairs(sequence.variant.spec)
            try:
                prediction = await predict(
                    _filled(sample, step, pairs, sequence), began + timeout_s - time.perf_counter()
                )
            except BaseException:
                if sequence.state is None and not sequence.is_over:
                    self._end(step.id, "failed")
                raise
            # Copied: an output is a part of its batch's, which would be kept whole.
            sequence.state = tuple(np.array(prediction.outputs[output]) for _, output in pairs)
            if not sequence.is_over:
                self._used(step, sequence)
            return prediction

    def forget(self, variant: Variant) -> None:
        """End all sequences that this variant answers."""
        for key in [key for key, sequence in self._open.items() if sequence.variant is variant]:
            self._end(key, "unloaded")

    @asynccontextmanager
    async def _turn_of(self, sequence: OpenSequence, timeout_s: float) -> AsyncIterator[None]:
        if sequence.waiting >= MOST_WAITING:
            text = f"{sequence.waiting} requests of this sequence wait for each other already"
            raise QueueFull(text, retry_after_s=1.0)
        sequence.waiting += 1
        try:
            async with asyncio.timeout(timeout_s):
                await sequence.turn.acquire()
        except TimeoutError:
            raise QueueTimeout(f"waited {timeout_s:g} s for the request before it in its sequence") from None
        finally:
            sequence.waiting -= 1
        try:
            yield
        finally:
            sequence.turn.release()

    def _begun(self, key: int | str, variant: Variant) -> OpenSequence:
        size = state_size(variant.spec)
        if len(self._open) >= self._limits.most or self._bytes + size > self._limits.state_bytes:
            oldest = next((item.used_at for item in self._open.values()), time.perf_counter())
            wait = max(1.0, oldest + self._limits.idle_s - time.perf_counter())
            text = (
                f"{len(self._open)} sequences with {self._bytes} bytes of state are open, and more are not (sequences)"
            )
            raise QueueFull(text, retry_after_s=wait)
        sequence = self._open[key] = OpenSequence(variant)
        self._bytes += size
        variant.metrics.sequences += 1
        return sequence

    def _used(self, step: SequenceStep, sequence: OpenSequence) -> None:
        if step.end:
            self._end(step.id, "ended")
            return
        sequence.used_at = time.perf_counter()
        self._open[step.id] = self._open.pop(step.id)
        self._timer.by(sequence.used_at + self._limits.idle_s)

    def _end(self, key: int | str, how: SequenceEnd) -> None:
        sequence = self._open.pop(key)
        sequence.is_over = True
        self._bytes -= state_size(sequence.variant.spec)
        metrics = sequence.variant.metrics
        metrics.sequences -= 1
        metrics.sequences_ended[how] += 1

    def _expire(self, now: float) -> float:
        """Forget what nobody has asked for; when the next may be forgotten."""
        idle = [(key, item.used_at) for key, item in self._idle()]
        for key, used_at in idle:
            if used_at + self._limits.idle_s > now:
                return used_at + self._limits.idle_s
            self._end(key, "expired")
        return math.inf

    def _idle(self) -> Iterator[tuple[int | str, OpenSequence]]:
        """Those of which no request is answered now, the one that was used first at the front."""
        return ((key, item) for key, item in list(self._open.items()) if not item.turn.locked())


def _filled(sample: Arrays, step: SequenceStep, pairs: tuple[tuple[int, int], ...], sequence: OpenSequence) -> Arrays:
    """The sample with the kept state; what a first request does not send is 0, as it was decoded."""
    if sequence.state is None:
        return sample
    kept: dict[int, Array] = {
        position: value for (position, _), value in zip(pairs, sequence.state, strict=True) if position in step.keeps
    }
    return tuple(kept.get(position, array) for position, array in enumerate(sample))
