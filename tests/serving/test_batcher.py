"""The batcher as a table: what arrives when, and which batches come of it. No clock, no threads."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest

from leanserve.contracts import Arrays
from leanserve.errors import BadInput, QueueFull
from leanserve.serving.batcher import Batcher, QueueLimits, Ticket


def ticket(name: str, rows: int = 1, deadline: float = math.inf, *, is_disconnected: bool = False) -> Ticket[str]:
    sample: Arrays = (np.zeros((rows, 1), np.float32),)
    return Ticket(sample, name, deadline=deadline, is_disconnected=lambda: is_disconnected)


def of_level(
    name: str, level: int, rows: int = 1, deadline: float = math.inf, *, is_disconnected: bool = False
) -> Ticket[str]:
    sample: Arrays = (np.zeros((rows, 1), np.float32),)
    return Ticket(sample, name, deadline=deadline, is_disconnected=lambda: is_disconnected, level=level)


def names(tickets: list[Ticket[str]]) -> list[str]:
    return [item.reply for item in tickets]


@dataclass
class Case:
    """Arrivals (name, rows, deadline, is_disconnected) at time 0; batches taken at the given times."""

    arrivals: list[tuple[str, int, float, bool]]
    batches: list[list[str]]
    expired: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    now: float = 1.0


CASES = {
    "rows are counted, not requests": Case(
        [("a", 3, 9, False), ("b", 3, 9, False), ("c", 1, 9, False), ("d", 4, 9, False)], [["a"], ["b", "c"], ["d"]]
    ),
    "a burst of singles fills whole batches": Case(
        [(str(i), 1, 9, False) for i in range(10)], [list("0123"), list("4567"), list("89")]
    ),
    "order is kept even when a later one would fit": Case(
        [("a", 3, 9, False), ("b", 2, 9, False), ("c", 1, 9, False)], [["a"], ["b", "c"]]
    ),
    "an oversized ticket goes alone": Case(
        [("a", 1, 9, False), ("big", 7, 9, False), ("b", 1, 9, False)], [["a"], ["big"], ["b"]]
    ),
    "expired ones are not run": Case([("a", 1, 0.5, False), ("b", 1, 9, False)], [["b"]], expired=["a"]),
    "a deadline counts as passed when it is reached": Case([("a", 1, 1.0, False)], [[]], expired=["a"]),
    "those who left are not run and do not count": Case(
        [("a", 2, 9, True), ("b", 2, 9, False), ("c", 2, 9, False)], [["b", "c"]], left=["a"]
    ),
    "nothing queued, nothing taken": Case([], [[]]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_arrivals_become_batches(case: Case) -> None:
    batcher: Batcher[str] = Batcher(QueueLimits(max_rows=4, queue_rows=100))
    for name, rows, deadline, is_disconnected in case.arrivals:
        batcher.offer([ticket(name, rows, deadline, is_disconnected=is_disconnected)], now=0.0)
    formed = [batcher.take(case.now) for _ in case.batches]
    assert [names(item.batch) for item in formed] == case.batches
    assert [name for item in formed for name in names(item.expired)] == case.expired
    assert [name for item in formed for name in names(item.left)] == case.left
    assert batcher.waiting_rows == 0


def test_a_full_queue_refuses_all_parts_of_a_request() -> None:
    batcher: Batcher[str] = Batcher(QueueLimits(max_rows=4, queue_rows=5))
    batcher.offer([ticket("a", 4)], 0.0)
    with pytest.raises(QueueFull, match="holds 4 of at most 5 rows; 2 more"):
        batcher.offer([ticket("b"), ticket("c")], 0.0)
    assert (batcher.waiting_rows, batcher.waiting_requests()) == (4, 1)
    batcher.offer([ticket("d")], 0.0)
    assert names(batcher.take(0.0).batch) == ["a"]


def test_what_no_queue_can_hold_is_a_mistake_and_not_to_be_tried_again() -> None:
    batcher: Batcher[str] = Batcher(QueueLimits(max_rows=4, queue_rows=5))
    with pytest.raises(BadInput, match=r"has 6 rows; the queue holds at most 5 \(batch.queue_rows\)"):
        batcher.offer([ticket("a", 4), ticket("a", 2)], 0.0)
    assert batcher.waiting_rows == 0


def test_exactly_one_claim_at_a_time() -> None:
    batcher: Batcher[str] = Batcher(QueueLimits(max_rows=1, queue_rows=9))
    assert batcher.offer([ticket("a")], 0.0)
    assert not batcher.offer([ticket("b")], 0.0)
    assert batcher.take(0.0).more  # b is waiting: whoever took a sees to it
    assert not batcher.offer([ticket("c")], 0.0)
    assert batcher.take(0.0).more
    assert not batcher.take(0.0).more
    assert batcher.offer([ticket("d")], 0.0), "although c may still be running"


LANES: dict[str, tuple[list[tuple[float, int]], list[tuple[float, float, str]]]] = {
    "the next free lane takes what is left": (
        [(0.0, 9)],
        [(0.0, 1.0, "0123"), (0.0, 1.0, "4567"), (1.0, 2.0, "8")],
    ),
    "an idle lane adds no wait to who comes while the other is busy": (
        [(0.0, 1), (0.4, 2)],
        [(0.0, 1.0, "0"), (0.4, 1.4, "12")],
    ),
    "while both are busy the batch grows": (
        [(0.0, 1), (0.1, 1), (0.2, 2), (0.9, 1), (1.05, 1)],
        [(0.0, 1.0, "0"), (0.1, 1.1, "1"), (1.0, 2.0, "234"), (1.1, 2.1, "5")],
    ),
}


@pytest.mark.parametrize(("arrivals", "batches"), LANES.values(), ids=LANES.keys())
def test_two_lanes_take_turns(arrivals: list[tuple[float, int]], batches: list[tuple[float, float, str]]) -> None:
    """Played with a clock of events: a batch takes a second, and a lane comes when it is asked to and free."""
    batcher: Batcher[str] = Batcher(QueueLimits(max_rows=4, queue_rows=100))
    free_at, asked_at, count = [0.0, 0.0], math.inf, 0
    ran: list[tuple[float, float, str]] = []
    while arrivals or asked_at < math.inf:
        lane_at = max(asked_at, min(free_at))
        if arrivals and arrivals[0][0] <= lane_at:
            now, rows = arrivals.pop(0)
            offered = [ticket(str(count + index)) for index in range(rows)]
            asked_at = now if batcher.offer(offered, now) else asked_at
            count += rows
        else:
            formed = batcher.take(lane_at)
            ran.append((lane_at, lane_at + 1, "".join(names(formed.batch))))
            free_at[free_at.index(min(free_at))] = lane_at + 1
            asked_at = lane_at if formed.more else math.inf
    assert [who for *_, who in ran] == [who for *_, who in batches]
    assert [time for *times, _ in ran for time in times] == pytest.approx([t for *times, _ in batches for t in times])


def test_no_delay_means_due_at_once_and_a_delay_counts_from_the_oldest() -> None:
    prompt: Batcher[str] = Batcher(QueueLimits(max_rows=4, queue_rows=9))
    prompt.offer([ticket("a")], 10.0)
    assert prompt.due(10.0) == 0.0

    patient: Batcher[str] = Batcher(QueueLimits(max_rows=4, queue_rows=9, max_delay_s=0.5))
    patient.offer([ticket("a")], 10.0)
    patient.offer([ticket("b")], 10.4)
    assert patient.due(10.4) == pytest.approx(0.1)
    assert patient.due(10.6) == 0.0
    patient.offer([ticket("c", 2)], 10.4)  # full: no reason to wait
    assert patient.due(10.4) == 0.0


def test_expire_removes_the_late_and_tells_the_next_deadline() -> None:
    batcher: Batcher[str] = Batcher(QueueLimits(max_rows=4, queue_rows=9))
    batcher.offer([ticket("a", deadline=1.0)], 0.0)
    batcher.offer([ticket("b", deadline=3.0)], 0.0)
    batcher.offer([ticket("c", deadline=2.0)], 0.0)
    expired, earliest = batcher.expire(1.5)
    assert (names(expired), earliest, batcher.waiting_rows) == (["a"], 2.0, 2)
    assert batcher.expire(9.0)[1] == math.inf


LEVELS = QueueLimits(max_rows=4, queue_rows=100, levels=3, default_level=2)
PRIORITIES: dict[str, tuple[list[Ticket[str]], list[list[str]]]] = {
    "urgent ones first, within a level the oldest": (
        [of_level("c1", 3), of_level("b1", 2), of_level("a1", 1), of_level("b2", 2), of_level("a2", 1)],
        [["a1", "a2", "b1", "b2"], ["c1"]],
    ),
    "a batch is filled up with less urgent ones": ([of_level("c", 3, 2), of_level("a", 1, 2)], [["a", "c"]]),
    "none is passed over for a less urgent one that would fit": (
        [of_level("c", 3, 1), of_level("b", 2, 3), of_level("a", 1, 2)],
        [["a"], ["b", "c"]],
    ),
    "who left or expired makes room for the next level": (
        [of_level("gone", 1, is_disconnected=True), of_level("late", 1, deadline=0.5), of_level("c", 3, 4)],
        [["c"]],
    ),
}


@pytest.mark.parametrize(("arrivals", "batches"), PRIORITIES.values(), ids=PRIORITIES.keys())
def test_priorities_order_the_queue(arrivals: list[Ticket[str]], batches: list[list[str]]) -> None:
    batcher: Batcher[str] = Batcher(LEVELS)
    for arrival in arrivals:
        batcher.offer([arrival], now=0.0)
    assert [names(batcher.take(1.0).batch) for _ in batches] == batches
    assert (batcher.waiting_rows, batcher.rows_before(3)) == (0, 0)


def test_an_overtaken_request_waits_no_longer_than_its_deadline() -> None:
    batcher: Batcher[str] = Batcher(LEVELS)
    batcher.offer([of_level("patient", 3, deadline=3.0)], 0.0)
    for second in range(1, 4):
        batcher.offer([of_level(f"urgent {second}", 1, rows=4)], float(second))
        formed = batcher.take(float(second))
        assert names(formed.batch) == [f"urgent {second}"]
        assert names(formed.expired) == (["patient"] if second == 3 else [])


def test_what_goes_before_a_request_depends_on_its_level() -> None:
    batcher: Batcher[str] = Batcher(LEVELS)
    batcher.offer([of_level("a", 1, 1), of_level("b", 2, 2), of_level("c", 3, 4, deadline=1.0)], 0.0)
    assert [batcher.rows_before(level) for level in (1, 2, 3)] == [1, 3, 7]
    assert names(batcher.expire(2.0)[0]) == ["c"]
    assert [batcher.rows_before(level) for level in (1, 2, 3)] == [1, 3, 3]


def test_the_delay_counts_from_the_oldest_of_all_levels() -> None:
    batcher: Batcher[str] = Batcher(QueueLimits(max_rows=4, queue_rows=9, max_delay_s=0.5, levels=2))
    batcher.offer([of_level("b", 2)], 10.0)
    batcher.offer([of_level("a", 1)], 10.4)
    assert batcher.due(10.4) == pytest.approx(0.1)


@pytest.mark.parametrize(("priority", "level"), [(0, 2), (1, 1), (3, 3), (4, 2), (2**40, 2)])
def test_no_priority_and_one_beyond_the_levels_mean_the_default(priority: int, level: int) -> None:
    assert LEVELS.level(priority) == level


LENGTHS = QueueLimits(max_rows=4, queue_rows=100, levels=2, lengths=(16, 32, 64), rows_at=(4, 3, 1))
MIXTURES: dict[str, tuple[list[tuple[str, int, int, int]], list[str]]] = {
    # arrivals (name, rows, length, level), one after the other -> batches
    "rows of one length bucket go together": (
        [("a", 1, 5, 1), ("b", 1, 16, 1), ("c", 1, 1, 1)],
        ["abc"],
    ),
    "others are passed over, and go next": (
        [("a", 1, 10, 1), ("L", 1, 50, 1), ("b", 1, 12, 1), ("m", 1, 20, 1), ("c", 1, 16, 1)],
        ["abc", "L", "m"],
    ),
    "the foremost always goes, however many short ones arrive": (
        [("L", 1, 64, 1), *((name, 1, 8, 1) for name in "abcdef"), ("M", 1, 60, 1)],
        ["L", "abcd", "ef", "M"],
    ),
    "long rows make small batches": (
        [(name, 1, 30, 1) for name in "abcde"] + [(name, 1, 40, 1) for name in "xy"],
        ["abc", "de", "x", "y"],
    ),
    "beyond the last bucket is the last bucket": ([("a", 1, 65, 1), ("b", 1, 64, 1)], ["a", "b"]),
    "none of the bucket is passed over for a later one that would fit": (
        [("a", 3, 8, 1), ("b", 2, 8, 1), ("c", 1, 8, 1)],
        ["a", "bc"],
    ),
    "an urgent one decides the length, less urgent ones of it fill up": (
        [("m", 1, 20, 2), ("a", 1, 8, 2), ("U", 1, 10, 1), ("b", 1, 8, 2)],
        ["Uab", "m"],
    ),
}


@pytest.mark.parametrize(("arrivals", "batches"), MIXTURES.values(), ids=MIXTURES.keys())
def test_a_batch_holds_one_length_bucket(arrivals: list[tuple[str, int, int, int]], batches: list[str]) -> None:
    batcher: Batcher[str] = Batcher(LENGTHS)
    for now, (name, rows, length, level) in enumerate(arrivals):
        sample: Arrays = (np.zeros((rows, length), np.int64),)
        batcher.offer([Ticket(sample, name, level=level, length=length)], float(now))
    formed = [batcher.take(50.0) for _ in batches]
    assert ["".join(names(item.batch)) for item in formed] == batches
    assert [item.more for item in formed] == [True] * (len(batches) - 1) + [False]
    assert (batcher.waiting_rows, batcher.waiting_requests(), batcher.rows_by_length(2)) == (0, 0, [0, 0, 0])


def test_when_the_foremost_is_dead_the_next_oldest_decides_the_length() -> None:
    batcher: Batcher[str] = Batcher(LENGTHS)
    row: Arrays = (np.zeros((1, 1), np.int64),)
    batcher.offer([Ticket(row, "late", deadline=2.0, length=8)], 0.0)
    batcher.offer([Ticket(row, "M", length=30)], 1.0)
    batcher.offer([Ticket(row, "a", length=8)], 2.0)
    formed = batcher.take(3.0)
    assert (names(formed.expired), names(formed.batch)) == (["late"], ["M"])


def test_waiting_rows_are_known_by_length_bucket_and_level() -> None:
    batcher: Batcher[str] = Batcher(LENGTHS)
    for level, length, rows in ((1, 8, 1), (1, 64, 2), (2, 8, 4), (2, 17, 8)):
        batcher.offer([Ticket((np.zeros((rows, length)),), "x", level=level, length=length)], 0.0)
    assert (batcher.rows_by_length(1), batcher.rows_by_length(2)) == ([1, 0, 2], [5, 8, 2])
    assert (batcher.rows_before(1), batcher.rows_before(2)) == (3, 15)


def test_a_delay_ends_when_the_rows_of_one_bucket_fill_a_batch() -> None:
    limits = QueueLimits(max_rows=4, queue_rows=9, max_delay_s=0.5, lengths=(16, 32), rows_at=(4, 2))
    batcher: Batcher[str] = Batcher(limits)
    row: Arrays = (np.zeros((1, 1), np.int64),)
    for length in (8, 8, 8, 30):
        batcher.offer([Ticket(row, "x", length=length)], 10.0)
    assert batcher.due(10.1) == pytest.approx(0.4)
    batcher.offer([Ticket(row, "x", length=31)], 10.1)
    assert batcher.due(10.1) == 0.0


COMPANIES: dict[str, tuple[list[tuple[str, int, int]], list[str]]] = {
    "only tickets of the same company share a batch": (
        [("a", 1, 1), ("b", 2, 1), ("c", 1, 1), ("d", 2, 1)],
        ["ac", "bd"],
    ),
    "who is passed over keeps his place": (
        [("a", 1, 1), ("b", 2, 1), ("c", 3, 1), ("d", 1, 1), ("e", 2, 1), ("f", 3, 1)],
        ["ad", "be", "cf"],
    ),
    "none of the same company is passed over for a later one that would fit": (
        [("a", 1, 3), ("b", 2, 1), ("c", 1, 2), ("d", 1, 1)],
        ["a", "b", "cd"],
    ),
    "companies of one": ([("a", 1, 1), ("b", 2, 1), ("c", 3, 1)], ["a", "b", "c"]),
    "a batch that is full leaves the others as they were": (
        [("a", 1, 4), ("b", 2, 1), ("c", 1, 1), ("d", 2, 1)],
        ["a", "bd", "c"],
    ),
}


@pytest.mark.parametrize(("arrivals", "batches"), COMPANIES.values(), ids=COMPANIES.keys())
def test_a_batch_holds_one_company(arrivals: list[tuple[str, int, int]], batches: list[str]) -> None:
    batcher: Batcher[str] = Batcher(QueueLimits(max_rows=4, queue_rows=100))
    for name, company, rows in arrivals:
        item = ticket(name, rows)
        item.company = company
        batcher.offer([item], 0.0)
    formed = [batcher.take(1.0) for _ in batches]
    assert ["".join(names(item.batch)) for item in formed] == batches
    assert [item.more for item in formed] == [True] * (len(batches) - 1) + [False]
    assert (batcher.waiting_rows, batcher.waiting_requests()) == (0, 0)


def test_who_left_or_came_too_late_is_found_among_those_passed_over() -> None:
    batcher: Batcher[str] = Batcher(QueueLimits(max_rows=4, queue_rows=100))
    arrivals = [
        ticket("a"),
        ticket("b"),
        ticket("late", deadline=0.5),
        ticket("left", is_disconnected=True),
        ticket("c"),
    ]
    for item, company in zip(arrivals, (1, 2, 2, 2, 1), strict=True):
        item.company = company
        batcher.offer([item], 0.0)
    formed = batcher.take(1.0)
    assert (names(formed.batch), names(formed.expired), names(formed.left)) == (["a", "c"], ["late"], ["left"])
    assert names(batcher.take(1.0).batch) == ["b"]
