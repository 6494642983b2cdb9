"""Whose turn it is on a device, played on a clock of events; and what a request is told to wait."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from leanserve.runtime.turns import DeviceShare, Rival, Turns


@dataclass
class Player:
    """A variant whose batches take so long, and which has some: always, or one from time to time."""

    batch_s: float
    weight: float = 1.0
    every_s: float = 0.0
    """Seconds from one arrival to the next; 0: there is always a batch waiting."""
    begins: float = 0.0
    predicted: float = 1.0
    """What its batches are taken to cost, by what they do."""
    had_s: float = 0.0
    waits: list[float] = field(default_factory=list)


def play(players: list[Player], lanes: int, seconds: float) -> None:
    """Who runs when on a device of so many lanes, by the same calls as the device's."""
    turns: Turns[int] = Turns()
    shares = [DeviceShare(str(number), player.weight) for number, player in enumerate(players)]
    free_at = [0.0] * lanes
    arrivals = [player.begins for player in players]
    waiting = [False] * len(players)
    running: list[tuple[float, int, float]] = []  # end, player, what was not charged
    now = 0.0
    while now < seconds:
        for number in range(len(players)):
            if not waiting[number] and arrivals[number] <= now:
                turns.add(number, shares[number])
                waiting[number] = True
        for end, number, correction in [each for each in running if each[0] <= now]:
            shares[number].charge(correction)
            running.remove((end, number, correction))
        lane = min(range(lanes), key=free_at.__getitem__)
        if free_at[lane] <= now and len(turns):
            number = turns.next()
            player = players[number]
            waiting[number] = False
            shares[number].charge(player.batch_s * player.predicted)
            player.had_s += player.batch_s
            player.waits.append(now - arrivals[number])
            arrivals[number] += player.every_s
            if not player.every_s:
                arrivals[number] = now
            free_at[lane] = now + player.batch_s
            running.append((free_at[lane], number, player.batch_s * (1 - player.predicted)))
            continue
        later = [at for at in (*free_at, *(a for a, w in zip(arrivals, waiting, strict=True) if not w)) if at > now]
        now = min(later, default=seconds)


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize(
    ("players", "shares"),
    [
        ([Player(0.1), Player(0.001)], [1 / 2, 1 / 2]),
        ([Player(0.1), Player(0.02), Player(0.003)], [1 / 3, 1 / 3, 1 / 3]),
        ([Player(0.01, weight=3.0), Player(0.05)], [3 / 4, 1 / 4]),
        ([Player(0.05, predicted=0.1), Player(0.05, predicted=2.0)], [1 / 2, 1 / 2]),
        ([Player(0.01), Player(0.05, begins=5.0)], [1 / 2 + 1 / 4, 1 / 4]),
    ],
    ids=["by seconds, not by batches", "three", "by weight", "wrongly predicted", "nobody saves up for later"],
)
def test_the_device_is_shared_in_seconds(players: list[Player], shares: list[float], lanes: int) -> None:
    fresh = [Player(each.batch_s, each.weight, each.every_s, each.begins, each.predicted) for each in players]
    play(fresh, lanes, 10.0)
    total = sum(player.had_s for player in fresh)
    assert [player.had_s / total for player in fresh] == pytest.approx(shares, abs=0.03)


@pytest.mark.parametrize("lanes", [1, 2])
def test_who_wants_little_waits_for_the_batches_that_run_and_for_nobody_s_queue(lanes: int) -> None:
    heavy, light = Player(0.1), Player(0.0006, every_s=0.05)
    play([heavy, light], lanes, 20.0)
    assert len(light.waits) > 390
    assert max(light.waits) <= heavy.batch_s + light.batch_s


def test_of_equals_the_first_one_goes() -> None:
    turns: Turns[str] = Turns()
    for name in "abc":
        turns.add(name, DeviceShare(name))
    assert [turns.next() for _ in range(3)] == ["a", "b", "c"]


def test_seconds_had_alone_do_not_count_against_anybody_later() -> None:
    turns: Turns[str] = Turns()
    alone, other = DeviceShare("alone"), DeviceShare("other")
    for _ in range(100):
        turns.begin(alone)
        alone.charge(1.0)
    turns.add("other", other)
    assert turns.next() == "other"
    assert other.tag == 99.0


def busy(tag: float, backlog_s: float, turn_s: float, rate: float = 0.0, weight: float = 1.0) -> Rival:
    share = DeviceShare("rival", weight)
    share.tag = tag
    share._rate = rate
    return Rival(share, backlog_s, turn_s)


@pytest.mark.parametrize(
    ("own_s", "rivals", "lanes", "wait_s"),
    [
        (3.0, [], 1, 3.0),
        (3.0, [], 2, 1.5),
        (0.0, [busy(0.0, 9.0, 0.1)], 1, 0.0),
        (3.0, [busy(0.0, 9.0, 0.1, rate=1.0)], 1, 6.1),
        (3.0, [busy(0.0, 1.0, 0.1)], 1, 4.0),
        (3.0, [busy(0.0, 1.0, 0.1, rate=0.5)], 1, 6.1),
        (3.0, [busy(2.0, 9.0, 0.1, rate=1.0)], 1, 4.1),
        (3.0, [busy(0.0, 99.0, 0.1, weight=2.0)], 1, 9.1),
        (3.0, [busy(0.0, 99.0, 0.0), busy(0.0, 0.6, 0.0)], 2, (3 + 3 + 0.6) / 2),
    ],
    ids=[
        "alone",
        "two lanes",
        "nothing before it",
        "behind one who has as much",
        "whose queue is short",
        "and is filled again",
        "who is ahead",
        "who has twice the weight",
        "several",
    ],
)
def test_the_wait_counts_the_turns_of_others(own_s: float, rivals: list[Rival], lanes: int, wait_s: float) -> None:
    turns: Turns[str] = Turns()
    for rival in rivals:
        rival.share._seen_at = 100.0
    assert turns.seconds_before(own_s, DeviceShare("own"), rivals, lanes, 100.0) == pytest.approx(wait_s, rel=0.06)


def test_what_was_used_of_late_is_forgotten_in_seconds() -> None:
    share = DeviceShare("v")
    for tenth in range(1, 101):
        share.charge(0.05)
        share.rate(tenth / 10)
    assert share.rate(10.0) == pytest.approx(0.5, rel=0.02)
    assert share.rate(20.0) < 0.01
