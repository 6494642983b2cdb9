"""Lanes and the threads of sessions stay on processors of their own, and whatever they start may go anywhere."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from leanserve.contracts import ModelSpec, OnnxModel, Share, TensorSpec
from leanserve.runtime.device import Device, Lane
from leanserve.runtime.formats import open_backend
from leanserve.runtime.linux.processors import keep_on, own_processors
from tiny_graphs import graph, write

ALL = tuple(sorted(os.sched_getaffinity(0))) if sys.platform == "linux" else ()
TASKS = Path("/proc/self/task")
pytestmark = pytest.mark.skipif(len(ALL) < 2, reason="there is one processor, or no kernel that tells")


@pytest.fixture
def device() -> Iterator[Device]:
    made = Device("test", len(ALL), len(ALL), ALL)
    yield made
    made.close()


def test_they_are_ours_alone_where_they_are_as_many_as_our_threads() -> None:
    assert own_processors(len(ALL)) == ALL
    assert own_processors(len(ALL) + 1) == ()
    assert own_processors(1) == ()


def test_a_thread_that_is_gone_or_a_processor_that_is_not_there_is_no_error() -> None:
    assert not keep_on(2**22 + 1, ALL)
    assert not keep_on(0, (2**14,))


def test_what_a_lane_may_use_is_that_of_the_process_and_not_of_the_lane(device: Device) -> None:
    def look(lane: Lane) -> tuple[int, ...]:
        device.seat(lane, seated=True)
        assert os.sched_getaffinity(0) == {ALL[lane.index]}
        return own_processors(len(ALL))

    assert device.call_on_each(look) == [ALL] * len(ALL)


def test_a_lane_is_let_go_before_it_opens_anything(device: Device) -> None:
    def seated(lane: Lane) -> set[int]:
        device.seat(lane, seated=True)
        return os.sched_getaffinity(0)

    assert device.call_on_each(seated) == [{number} for number in ALL]
    assert device.call_on_each(lambda _: os.sched_getaffinity(0)) == [set(ALL)] * len(ALL)
    assert device.call(seated) == {ALL[0]}
    assert device.call(lambda _: os.sched_getaffinity(0)) == set(ALL)


def test_without_processors_of_its_own_a_device_leaves_lanes_alone() -> None:
    device = Device("test", len(ALL), len(ALL))
    try:
        device.call_on_each(lambda lane: device.seat(lane, seated=True))
        assert device.call(lambda lane: (lane.is_seated, os.sched_getaffinity(0))) == (False, set(ALL))
    finally:
        device.close()


@pytest.mark.parametrize("placed", [True, False])
def test_threads_of_a_session_are_where_the_lane_is_not(tmp_path: Path, placed: bool) -> None:  # noqa: FBT001
    write(tmp_path / "model.onnx", graph("agraph (float[rows, 4] x) => (float[rows, 4] y) { y = Relu (x) }", {}))
    spec = ModelSpec((TensorSpec("x", "float32", (4,)),), (TensorSpec("y", "float32", (4,)),))
    before = set(TASKS.iterdir())
    share = Share(len(ALL), processors=ALL if placed else ())
    backend = open_backend(OnnxModel(tmp_path / "model.onnx", spec), share)
    try:
        places = [os.sched_getaffinity(int(task.name)) for task in set(TASKS.iterdir()) - before]
        wanted = [{number} for number in ALL[1:]] if placed else [set(ALL)] * (len(ALL) - 1)
        assert sorted(places, key=sorted) == sorted(wanted, key=sorted)
        [answer] = backend.run((np.array([[-1, 0, 1, 2]], np.float32),)).outputs
        assert answer.tolist() == [[0, 0, 1, 2]]
    finally:
        backend.close()
