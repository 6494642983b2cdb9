"""A backend in a worker process: what it answers and raises, what ends the worker, and that another takes its place."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from fragile_worker import EXHAUST, HANG, LOSE, REFUSE, SEGFAULT
from leanserve.contracts import Array
from leanserve.errors import BadInput, StartupError, WorkerLost
from leanserve.runtime.costs import Costs, CostTable
from leanserve.runtime.isolation.backend import IsolatedBackend
from leanserve.runtime.isolation.channel import IsolatedRunFailed
from leanserve.runtime.isolation.life import WorkerProgram
from leanserve.runtime.isolation.slab import Slab
from leanserve.runtime.isolation.workers import WorkerEvent, Workers
from rules import RAISE, row

SUPPORT = Path(__file__).parent.parent / "support"
STUCK_S = 0.3


def program_in(folder: Path) -> WorkerProgram:
    return WorkerProgram("fragile", "fragile_worker", (str(folder),))


@pytest.fixture(scope="module", autouse=True)
def workers_find_the_program() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{SUPPORT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        yield


@pytest.fixture
def program(tmp_path: Path) -> WorkerProgram:
    return program_in(tmp_path)


@pytest.fixture(scope="module")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Iterator[IsolatedBackend]:
    """For tests that leave the worker as it is."""
    opened = IsolatedBackend(program_in(tmp_path_factory.mktemp("steady")), 2, Workers("fragile", STUCK_S))
    process = opened.process_id
    yield opened
    assert opened.process_id == process
    opened.close()


class Heard:
    """What the listener of a variant's workers was told."""

    def __init__(self) -> None:
        self.events: list[tuple[WorkerEvent, str]] = []

    def __call__(self, event: WorkerEvent, why: str) -> None:
        self.events.append((event, why))

    def wait_for(self, event: WorkerEvent, times: int = 1) -> None:
        until(lambda: [kind for kind, _ in self.events].count(event) >= times)


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def backend(program: WorkerProgram, heard: Heard) -> Iterator[IsolatedBackend]:
    workers = Workers("fragile", stuck_after_s=STUCK_S)
    opened = IsolatedBackend(program, 2, workers)
    warmed: list[float] = []
    workers.settle(Costs([CostTable({1: 0.001})]), 0, lambda backend: warmed.append(answer(backend)))
    workers.listener = heard
    yield opened
    opened.close()
    assert opened.process_id is None


def until(happened: Callable[[], bool], seconds: float = 20.0) -> None:
    give_up = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < give_up
        time.sleep(0.005)


def answer(backend: object, value: float = 3.0) -> float:
    outputs = backend.run((row(value),)).outputs  # type: ignore[attr-defined]
    return float(outputs[0][0, 0])


def test_a_worker_answers_like_a_backend_of_this_process(steady: IsolatedBackend) -> None:
    assert (steady.name, steady.device, steady.self_contained, steady.row_buckets) == ("fragile", "cpu", True, ())
    for rows in (1, 3, 700, 2):  # the memory grows in between
        batch = np.random.default_rng(rows).standard_normal((rows, 1, 2, 4)).astype(np.float32)
        result = steady.run((batch,))
        np.testing.assert_array_equal(result.outputs[0], batch.reshape(rows, 8) * np.float32(10))
        assert result.facts == {"rows": rows, "process": steady.process_id}
        assert result.facts["process"] != os.getpid()


def test_outputs_stay_what_they_were_when_the_next_batch_is_run(steady: IsolatedBackend) -> None:
    first = steady.run((row(1),)).outputs[0]
    steady.run((row(2),))
    assert first[0, 0] == 10


def test_lanes_run_batches_in_a_worker_at_the_same_time(steady: IsolatedBackend) -> None:
    answers: dict[int, float] = {}

    def lane(number: int) -> None:
        for value in range(200):
            answers[number] = answer(steady, number * 1000 + value)

    threads = [threading.Thread(target=lane, args=(number,)) for number in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {1: 11_990, 2: 21_990}


@pytest.mark.parametrize(
    ("order", "kind", "text"),
    [
        (RAISE, IsolatedRunFailed, "RuntimeError: ordered to fail"),
        (EXHAUST, MemoryError, "^no memory for so many rows$"),
        (REFUSE, BadInput, "^an index beyond the table$"),
    ],
)
def test_what_the_backend_raises_is_raised_here(
    steady: IsolatedBackend, order: float, kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind, match=text):
        steady.run((row(order),))
    assert answer(steady) == 30


def test_a_crash_ends_the_run_and_another_worker_takes_over(
    backend: IsolatedBackend, heard: Heard, caplog: pytest.LogCaptureFixture
) -> None:
    before = backend.process_id
    with pytest.raises(WorkerLost, match="variant 'fragile': its worker was ended by SIGSEGV") as lost:
        backend.run((row(SEGFAULT),))
    assert (lost.value.ran, lost.value.alone) == (True, True)
    heard.wait_for("back")
    assert answer(backend) == 30
    assert backend.process_id != before
    assert heard.events == [("lost", "its worker was ended by SIGSEGV"), ("back", "")]
    until(lambda: "Fatal Python error: Segmentation fault" in caplog.text)  # faulthandler's last words
    assert all("'fragile'" in record.getMessage() for record in caplog.records if "isolation" in record.name)


def test_a_worker_that_has_lost_its_device_ends_and_another_takes_its_place(
    backend: IsolatedBackend, heard: Heard, caplog: pytest.LogCaptureFixture
) -> None:
    before = backend.process_id
    with pytest.raises(WorkerLost, match="variant 'fragile': its worker ended with status 1"):
        backend.run((row(LOSE),))
    heard.wait_for("back")
    assert answer(backend) == 30
    assert backend.process_id != before
    until(lambda: "cuda:0 is lost to this process: an illegal memory access" in caplog.text)


def test_a_batch_that_hangs_is_ended_and_its_neighbour_in_the_worker_is_not_to_blame(
    backend: IsolatedBackend, heard: Heard
) -> None:
    errors: dict[str, WorkerLost] = {}

    def run(name: str, batch: Array) -> None:
        with pytest.raises(WorkerLost) as lost:
            backend.run((batch,))
        errors[name] = lost.value

    thread = threading.Thread(target=run, args=("first", row(HANG)))
    thread.start()
    time.sleep(STUCK_S / 2)
    run("second", row(HANG))
    thread.join()
    assert errors["first"].alone
    assert not errors["second"].alone
    assert "was stuck for 0.3 s in a batch of 1 rows" in str(errors["second"])
    heard.wait_for("back")
    assert answer(backend) == 30


def test_a_worker_that_is_killed_while_nothing_runs_is_replaced(backend: IsolatedBackend, heard: Heard) -> None:
    assert backend.process_id is not None
    os.kill(backend.process_id, signal.SIGKILL)
    heard.wait_for("back")
    assert answer(backend) == 30
    assert "memory" in heard.events[0][1]  # whoever reads of SIGKILL should think of it


def test_while_there_is_no_worker_a_run_ends_at_once(backend: IsolatedBackend, heard: Heard, tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    with pytest.raises(WorkerLost):
        backend.run((row(SEGFAULT),))
    heard.wait_for("failing")
    started = time.monotonic()
    with pytest.raises(WorkerLost) as lost:
        answer(backend)
    assert not lost.value.ran
    assert time.monotonic() - started < 0.5
    assert "the disk is gone" in heard.events[-1][1]
    (tmp_path / "broken").unlink()
    heard.wait_for("back")
    assert answer(backend) == 30


def test_signals_to_the_whole_group_leave_the_worker_to_the_service(steady: IsolatedBackend) -> None:
    process = steady.process_id
    assert process is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(process, number)
    assert answer(steady) == 30
    assert steady.process_id == process


def test_a_model_that_cannot_be_opened_is_an_error_with_the_reason(program: WorkerProgram, tmp_path: Path) -> None:
    (tmp_path / "broken").touch()
    with pytest.raises(StartupError, match="RuntimeError: the disk is gone"):
        IsolatedBackend(program, 1, Workers("fragile", STUCK_S))


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_closing_leaves_no_process_and_no_descriptor(program: WorkerProgram) -> None:
    before = descriptors()
    opened = IsolatedBackend(program, 2, Workers("fragile", STUCK_S))
    process = opened.process_id
    assert process is not None
    answer(opened)
    opened.close()
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    until(lambda: descriptors() <= before)


def test_memory_grows_with_what_is_written_and_the_reader_follows() -> None:
    here = Slab.create()
    there = Slab(os.dup(here.descriptor))
    for count in (1, 100_000, 7):
        sent = (np.arange(count, dtype=np.int64), np.full((2, count), 0.5, np.float32))
        for got, want in zip(there.read(here.write(sent)), sent, strict=True):
            np.testing.assert_array_equal(got, want)
    here.close()
    there.close()


@pytest.fixture(autouse=True)
def info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


def test_texts_travel_as_their_bytes() -> None:
    slab = Slab.create()
    texts, numbers = np.array([["Bern", ""], ["Zürich", "x" * 5000]], object), np.arange(3)
    read = slab.read(slab.write([texts, numbers]))
    assert read[0].tolist() == texts.tolist()
    assert read[1].tolist() == [0, 1, 2]
    slab.close()
