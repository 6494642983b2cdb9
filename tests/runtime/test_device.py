"""Lanes: one queue for all of them, every lane by name for opening and closing, none of them mortal."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from leanserve.runtime.device import Device, Lane


@pytest.fixture
def device() -> Iterator[Device]:
    made = Device("test", 5, 2)
    yield made
    made.close()


def test_the_threads_are_shared_out(device: Device) -> None:
    assert [(lane.index, lane.threads) for lane in device.lanes] == [(0, 2), (1, 2)]
    assert device.lane_threads == 2


def test_every_lane_is_called_on_its_own_thread_at_the_same_time(device: Device) -> None:
    meeting = threading.Barrier(2)

    def meet(lane: Lane) -> tuple[int, str]:
        meeting.wait(5)
        return lane.index, threading.current_thread().name

    assert device.call_on_each(meet) == [(0, "device-test-0"), (1, "device-test-1")]


def test_of_idle_lanes_the_first_goes(device: Device) -> None:
    def where(lane: Lane) -> int:
        time.sleep(0.002)  # the other one is idle meanwhile
        return lane.index

    for _ in range(20):
        _until_idle(device)
        assert device.call(where) == 0
    occupied, release = threading.Event(), threading.Event()

    def occupy(_: Lane) -> None:
        occupied.set()
        assert release.wait(5)

    _until_idle(device)
    device.post(occupy)
    assert occupied.wait(5)
    assert device.call(where) == 1
    release.set()
    _until_idle(device)
    assert device.call(where) == 0


def _until_idle(device: Device) -> None:
    deadline = time.monotonic() + 5
    while device.waiting() or any(lane.held.locked() for lane in device.lanes):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(0.01)


def test_callers_on_several_threads_do_not_lock_each_other_out(device: Device) -> None:
    counted: list[int] = []

    def call() -> None:
        for _ in range(50):
            counted.extend(device.call_on_each(lambda lane: lane.index))

    callers = [threading.Thread(target=call) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(20)
    assert sorted(counted) == [0] * 200 + [1] * 200


def test_an_exception_on_any_lane_reaches_the_caller_after_all_are_done(device: Device) -> None:
    finished: list[int] = []

    def fail_on_the_first(lane: Lane) -> None:
        if lane.index == 0:
            raise ValueError("lane 0")
        time.sleep(0.05)
        finished.append(lane.index)

    with pytest.raises(ValueError, match="lane 0"):
        device.call_on_each(fail_on_the_first)
    assert finished == [1]


def test_a_stuck_lane_does_not_stop_the_other(device: Device) -> None:
    unstick = threading.Event()
    done: list[int] = []
    arrived = threading.Event()

    def stuck(lane: Lane) -> None:
        arrived.set()
        unstick.wait(10)

    device.post(stuck)
    assert arrived.wait(5)
    last = threading.Event()
    for number in range(5):
        device.post(lambda lane, number=number: done.append(number))  # type: ignore[misc]
    device.post(lambda lane: last.set())
    assert last.wait(5)
    assert done == [0, 1, 2, 3, 4]
    assert device.waiting() == 0
    unstick.set()


def test_a_lane_outlives_whatever_a_job_throws(device: Device, caplog: pytest.LogCaptureFixture) -> None:
    def leave(lane: Lane) -> None:
        raise SystemExit

    for _ in range(4):
        device.post(leave)
    assert device.call_on_each(lambda lane: lane.index) == [0, 1]
    assert caplog.text.count("failed") == 4


def test_what_is_left_is_that_of_the_lane_that_is_free_first(device: Device) -> None:
    now = time.perf_counter()
    first, second = device.lanes
    first.due_at, second.due_at = now + 5, now + 2
    assert 1.9 < device.remaining_s() <= 2
    second.due_at = 0.0
    assert device.remaining_s() == 0.0


def test_a_free_lane_can_be_borrowed_and_its_thread_waits_meanwhile(device: Device) -> None:
    first = device.borrow()
    second = device.borrow()
    assert first is not None
    assert second is not None
    assert first is not second
    assert device.borrow() is None
    ran = threading.Event()
    device.post(lambda lane: ran.set())
    assert not ran.wait(0.05)
    second.held.release()
    first.held.release()
    assert ran.wait(5)


def test_no_lane_is_borrowed_before_jobs_that_wait(device: Device) -> None:
    leave = threading.Event()

    def work(lane: Lane) -> None:
        leave.wait(10)

    for _ in range(3):
        device.post(work)
    deadline = time.monotonic() + 5
    while device.waiting() != 1 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert device.borrow() is None
    leave.set()


def test_a_lane_widens_only_where_no_other_works_and_holds_them_until_it_is_given_back(device: Device) -> None:
    lane = device.borrow()
    other = device.borrow()
    assert lane is not None
    assert other is not None
    assert not device.widen(lane)
    device.give_back(other)
    assert device.widen(lane)
    assert other.held.locked()
    device.give_back(lane)
    assert not other.held.locked()
    assert not lane.held.locked()


def test_a_lane_that_cannot_have_all_others_lets_those_go_that_it_has() -> None:
    device = Device("three", 3, 3)
    first, second, third = (device.borrow() for _ in range(3))
    assert first is not None
    assert second is not None
    assert third is not None
    second.held.release()
    assert not device.widen(first)
    assert not second.held.locked()
    first.held.release()
    third.held.release()
    device.close()


def test_a_call_returns_what_the_function_does_or_raises(device: Device) -> None:
    assert device.call(lambda lane: lane.threads) == 2
    with pytest.raises(ZeroDivisionError):
        device.call(lambda lane: 1 // 0)
