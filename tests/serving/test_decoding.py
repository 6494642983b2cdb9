"""Decoding on a budget of seconds: what is large in a process, what is small beside it, and who is refused."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bombs import empty_jpeg, encoded, png
from leanserve.api.v1.predict import CodecDecoding
from leanserve.codecs.answers import AnswerEncoder
from leanserve.codecs.images import ImageCodec
from leanserve.codecs.open_inference import InferDecoder, InferDecoding
from leanserve.codecs.openai import WrongParameter
from leanserve.contracts import ModelSpec, TensorSpec, Weighed
from leanserve.errors import (
    BadInput,
    BodyTooLarge,
    ClientGone,
    DeadlineUnreachable,
    MethodNotAllowed,
    QueueTimeout,
    ServiceError,
)
from leanserve.runtime.short_switches import ShortSwitches
from leanserve.serving import decoding
from leanserve.serving.decoding import MEMORY, QUICK_S, Decoders, Patience, Work

SPEC = ModelSpec((TensorSpec("x", "float32", (4,)),), (TensorSpec("logits", "float32", (2,)),))
CODEC = ImageCodec(mode="L", size=(8, 8), mean=(0.0,), std=(1.0,), answers=AnswerEncoder(SPEC))


def image(body: bytes, media_type: str = "image/png") -> CodecDecoding:
    return CodecDecoding(CODEC, media_type, body)


LARGE, SMALL = image(png(2000, 2000, 4)), image(png(20, 20))
HUGE = image(png(5000, 5000))


def patience(seconds: float = 60.0, *, left: bool = False) -> Patience:
    return Patience(time.perf_counter() + seconds, lambda: left)


def work(made: Any) -> Work[Any]:
    return Work(made, lambda result: result, 100)


def run(scenario: Callable[[Decoders], Awaitable[None]], memory: int = MEMORY) -> None:
    async def body() -> None:
        decoders = Decoders(ShortSwitches(), memory)
        try:
            await scenario(decoders)
        finally:
            decoders.close()

    asyncio.run(body())


def test_what_is_large_is_decoded_in_a_process_to_the_same_bits() -> None:
    document = json.dumps(
        {"inputs": [{"name": "x", "datatype": "FP32", "shape": [99_000, 4], "data": [0.1] * 396_000}]}
    )
    infer = InferDecoding(InferDecoder(SPEC), memoryview(document.encode()), None)

    async def scenario(decoders: Decoders) -> None:
        assert SMALL.prepare().seconds < QUICK_S < min(LARGE.prepare().seconds, infer.prepare().seconds)
        small = await decoders.run(work(SMALL), patience())
        assert all(process.pid is None for process in decoders._processes), "small ones need none"
        large = await decoders.run(work(LARGE), patience())
        assert [process.pid is None for process in decoders._processes].count(False) == 1
        for made, asked in ((small, SMALL), (large, LARGE)):
            np.testing.assert_array_equal(made.inputs[0], asked.prepare().finish().inputs[0])
        there, here = await decoders.run(work(infer), patience()), infer.prepare().finish()
        np.testing.assert_array_equal(there.inputs[0], here.inputs[0])
        assert (there.rows, there.options) == (here.rows, here.options)

    run(scenario)


def test_what_is_wrong_is_told_as_if_it_were_decoded_here() -> None:
    damaged = image(LARGE.body[:3000])  # type: ignore[arg-type]

    async def scenario(decoders: Decoders) -> None:
        with pytest.raises(BadInput, match=r"the body: the PNG image \(2000 x 2000\) cannot be decoded"):
            await decoders.run(work(damaged), patience())
        await decoders.run(work(LARGE), patience())

    run(scenario)


def _kinds(of: type[ServiceError]) -> Iterator[type[ServiceError]]:
    yield of
    for kind in of.__subclasses__():
        yield from _kinds(kind)


def test_every_refusal_comes_back_from_a_process_as_it_was() -> None:
    """Whatever its constructor takes."""
    kinds = set(_kinds(ServiceError))
    assert {WrongParameter, MethodNotAllowed} < kinds
    for kind in kinds:
        error = kind.__new__(kind, "too many")
        error.__dict__ |= {"retry_after_s": 2.0, "variant": "a", "param": "input", "allow": "GET"}
        back = pickle.loads(pickle.dumps(error))
        assert (type(back), str(back), back.__dict__) == (kind, "too many", error.__dict__)


def test_memory_is_bounded() -> None:
    async def scenario(decoders: Decoders) -> None:
        with pytest.raises(BodyTooLarge, match=r"more than 64 MB of memory \(limits.decode_mb\)"):
            await decoders.run(work(image(png(5000, 5000, 4))), patience())
        await decoders.run(work(image(png(2500, 2500))), patience())

    run(scenario, 64 * 2**20)


def test_a_decoder_that_crashes_takes_nothing_along() -> None:
    async def scenario(decoders: Decoders) -> None:
        await decoders.run(work(LARGE), patience())
        (pid,) = [process.pid for process in decoders._processes if process.pid]
        crashing = asyncio.create_task(decoders.run(work(HUGE), patience()))
        while not decoders._running:
            await asyncio.sleep(0)
        os.kill(pid, signal.SIGSEGV)
        with pytest.raises(BadInput, match="its decoder was ended by SIGSEGV"):
            await crashing
        await decoders.run(work(LARGE), patience())

    run(scenario)


def test_small_ones_pass_by_large_ones_and_cheap_ones_go_first() -> None:
    async def scenario(decoders: Decoders) -> None:
        done: list[str] = []

        async def ask(name: str, body: CodecDecoding) -> None:
            await decoders.run(work(body), patience())
            done.append(name)

        bombs = [asyncio.create_task(ask("huge", HUGE)) for _ in range(6)]
        await asyncio.sleep(0.05)
        await asyncio.gather(ask("small", SMALL), ask("large", LARGE))
        assert done.index("small") == 0
        assert done.count("huge") < 2 * decoding.PROCESSES, "those that ran when it came, and what ran beside it"
        await asyncio.gather(*bombs)

    run(scenario)


class Slow:
    """Takes a thread five milliseconds; counts how many of them were begun since the loop looked last."""

    def __init__(self) -> None:
        self.begun = 0

    def prepare(self) -> Weighed[int]:
        self.begun += 1
        time.sleep(0.005)
        return Weighed(0.0, lambda: 1)


def test_threads_are_given_only_a_little_in_advance() -> None:
    """However long the loop looks away: what comes at once does not keep Python's lock from it until all is done."""

    async def scenario(decoders: Decoders) -> None:
        slow = Slow()
        everything = asyncio.gather(*(decoders.run(work(slow), patience()) for _ in range(40)))
        leaving = asyncio.create_task(decoders.run(work(slow), patience()))
        await asyncio.sleep(0)
        leaving.cancel()
        while not everything.done():
            await asyncio.sleep(0.01)
            before = slow.begun
            time.sleep(0.06)
            assert slow.begun - before <= 4, "in that time two threads could do 24"
            await asyncio.sleep(0)
        assert await everything == [1] * 40
        assert await asyncio.wait_for(decoders.run(work(slow), patience()), 5) == 1

    run(scenario)


def test_who_would_be_too_late_is_refused_at_once() -> None:
    async def scenario(decoders: Decoders) -> None:
        waiting = [asyncio.create_task(decoders.run(work(HUGE), patience())) for _ in range(8)]
        await asyncio.sleep(0.2)
        began = time.perf_counter()
        with pytest.raises(DeadlineUnreachable, match="to be decoded") as refusal:
            await decoders.run(work(HUGE), patience(1.0))
        assert time.perf_counter() - began < 1.0
        assert refusal.value.retry_after_s is not None
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    run(scenario)


def test_what_is_not_decoded_by_its_deadline_is_decoded_no_further() -> None:
    async def scenario(decoders: Decoders) -> None:
        began = time.perf_counter()
        with pytest.raises(QueueTimeout):
            await decoders.run(work(HUGE), patience(0.2))
        assert time.perf_counter() - began < 1.0
        await decoders.run(work(LARGE), patience())
        with pytest.raises((QueueTimeout, DeadlineUnreachable)):
            await decoders.run(work(SMALL), patience(-1.0))

    run(scenario)


class Unread:
    """A body at which nobody may look."""

    def prepare(self) -> Weighed[Any]:
        raise AssertionError("nobody waits for it")


def test_a_client_that_left_costs_nothing() -> None:
    async def scenario(decoders: Decoders) -> None:
        with pytest.raises(ClientGone):
            await decoders.run(work(Unread()), patience(left=True))
        assert all(process.pid is None for process in decoders._processes)

    run(scenario)


def test_processes_end_when_there_is_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "IDLE_S", 0.2)

    async def scenario(decoders: Decoders) -> None:
        await decoders.run(work(LARGE), patience())
        (pid,) = [process.pid for process in decoders._processes if process.pid]
        await asyncio.sleep(1.0)
        assert all(process.pid is None for process in decoders._processes)
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
        await decoders.run(work(LARGE), patience())

    run(scenario)


def test_bodies_travel_beside_the_pickle() -> None:
    parts: list[pickle.PickleBuffer] = []
    head = pickle.dumps(LARGE, 5, buffer_callback=parts.append)
    assert len(head) < 10_000
    assert [bytes(part.raw()) for part in parts] == [LARGE.body]


def test_a_large_photo_is_decoded_at_a_reduced_size() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (30, 40), np.uint8)
    photo = Image.fromarray(noise).resize((2400, 1800), Image.Resampling.BICUBIC)
    codec = ImageCodec(mode="L", size=(64, 48), mean=(0.0,), std=(1 / 255,), answers=AnswerEncoder(SPEC))
    stream = BytesIO()
    photo.save(stream, "JPEG", quality=95)
    whole = BytesIO()
    Image.open(BytesIO(stream.getvalue())).save(whole, "PNG")
    small = codec.decode("image/jpeg", stream.getvalue()).inputs[0]
    exact = codec.decode("image/png", whole.getvalue()).inputs[0]
    assert 0 < np.abs(small - exact).max() <= 4, "of 255"
    assert np.abs(small - exact).mean() < 0.5


def test_what_is_small_is_announced_to_be_quick_and_bombs_are_not() -> None:
    assert image(encoded("JPEG", 640, 480), "image/jpeg").prepare().seconds < QUICK_S
    for body, media_type in ((empty_jpeg(7000, 7000), "image/jpeg"), (png(7000, 7000, 4), "image/png")):
        assert image(body, media_type).prepare().seconds > 0.1
