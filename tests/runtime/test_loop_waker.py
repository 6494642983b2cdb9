"""Lanes tell the loop through a pipe: nothing is lost, whoever rings and whenever."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from leanserve.runtime.linux.loop_waker import LoopWaker


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def new_loop(request: pytest.FixtureRequest) -> Callable[[], asyncio.AbstractEventLoop]:
    made: Callable[[], asyncio.AbstractEventLoop] = request.param
    return made


def test_every_ring_and_knock_is_answered_once_and_in_order(new_loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    loop = new_loop()
    waker = LoopWaker(loop)
    heard: list[tuple[int, int]] = []
    on: set[int] = set()

    def hear(ringer: int, count: int) -> None:
        on.add(threading.get_ident())
        heard.append((ringer, count))
        if len(heard) == 4 * 2000:
            loop.stop()

    def ring(ringer: int) -> None:
        for count in range(2000):
            (waker.wake_by_pipe, waker.wake_threadsafe)[count % 3 == 0](hear, ringer, count)

    threads = [threading.Thread(target=ring, args=(ringer,)) for ringer in range(4)]
    for thread in threads:
        thread.start()
    guard = loop.call_later(20, loop.stop)
    loop.run_forever()
    guard.cancel()
    for thread in threads:
        thread.join()
    loop.close()
    assert on == {threading.get_ident()}
    for ringer in range(4):
        assert [count for who, count in heard if who == ringer] == list(range(2000))


def test_a_callback_that_fails_keeps_no_other_from_being_called(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    loop = new_loop()
    failures: list[object] = []
    loop.set_exception_handler(lambda _, context: failures.append(context["exception"]))
    waker = LoopWaker(loop)
    error = ValueError("mine")

    def fail() -> None:
        raise error

    waker.wake_by_pipe(fail)
    waker.wake_by_pipe(loop.stop)
    guard = loop.call_later(20, loop.stop)
    loop.run_forever()
    guard.cancel()
    loop.close()
    assert failures == [error]


def test_a_loop_takes_its_bell_with_it_and_late_rings_do_nothing(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        loop = new_loop()
        waker = LoopWaker(loop)
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
        waker.wake_by_pipe(pytest.fail, "nobody is there to call this")
        del loop, waker
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) < open_before + 20
