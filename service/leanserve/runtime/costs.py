"""What a batch costs: measured at warm-up, kept current while serving, and the knee with it.

Admission asks it how long the queue will take, the batcher asks it for the *knee*: the smallest batch whose throughput
is close to the best. On CPUs throughput often falls beyond a few rows, because activations no longer fit the caches; of
long rows fewer do, so models whose rows vary in length have a table, and a knee, per length bucket.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

SMOOTHING = 0.1
"""Weight of a new observation against the old estimate (exponential moving average)."""
OUTLIER = 2.0
"""A batch that took longer than so many times the estimate counts as one that took just that: it was interrupted, or if
all of them are like it the estimate will follow soon."""
KNEE = 0.99
"""A batch at the knee reaches at least this share of the best measured throughput."""
WORTH = 1.03
"""The knee moves where that brings at least so many times the throughput."""
FORGETTING = 0.02
"""Share of what is known of batches beyond the knee that is forgotten at each look: nothing corrects it any more."""
OVERHEAD_S = 50e-6
"""What a batch costs besides its run, whatever its size: it is formed, handed over, handed out and counted."""
SHORTEST = 16
"""The first length bucket."""
TYPICAL = 64
"""The length at which models are timed and compared where lengths vary."""


def length_buckets(longest: int) -> tuple[int, ...]:
    """Upper ends of the length buckets: the powers of two from `SHORTEST` up, and the longest."""
    sizes = [min(SHORTEST, longest)]
    while sizes[-1] < longest:
        sizes.append(min(2 * sizes[-1], longest))
    return tuple(sizes)


def buckets_up_to(max_rows: int, compiled: Sequence[int] = ()) -> tuple[int, ...]:
    """Batch buckets: those a backend was `compiled` for, else the powers of two below the maximum, and the maximum.

    Of the compiled ones at least the smallest is used, even if it has more rows than the maximum.
    """
    if compiled:
        return tuple(rows for rows in sorted(compiled) if rows <= max_rows) or (min(compiled),)
    sizes = [1]
    while sizes[-1] * 2 < max_rows:
        sizes.append(sizes[-1] * 2)
    return tuple(sizes) if max_rows == 1 else (*sizes, max_rows)


def rate(rows: int, seconds: float) -> float:
    """Rows per second in batches of `rows` that run for so long."""
    return rows / (seconds + OVERHEAD_S)


class CostTable:
    """Seconds per batch, by batch bucket. Written by one thread, read by any."""

    def __init__(
        self, measured: Mapping[int, float], most: int | None = None, shapes: Literal["any", "compiled"] = "any"
    ) -> None:
        """`measured`: rows -> seconds, one entry per bucket, at least one. A batch never has more than `most` rows.

        With `compiled` shapes every batch is padded to its bucket, and costs what that costs.
        """
        self.buckets = tuple(sorted(measured))
        self._seconds = [measured[rows] for rows in self.buckets]
        self._at_first = tuple(self._seconds)
        self._compiled = shapes == "compiled"
        self.knee = self._find_knee() if most is None else min(most, self._find_knee())
        self.reach = self.knee
        """Rows of the largest batch that is ever run; there is memory for it, and it was run at warm-up."""

    def bucket(self, rows: int) -> int:
        """The smallest bucket that holds `rows` (the largest one for more)."""
        return self.buckets[self._index(rows)]

    def seconds(self, rows: int) -> float:
        """Predicted seconds for one batch of `rows`, interpolated between buckets unless they are compiled shapes."""
        upper = self._index(rows)
        if upper == 0 or rows >= self.buckets[upper] or self._compiled:
            return self._seconds[upper]
        low, high = self.buckets[upper - 1], self.buckets[upper]
        share = (rows - low) / (high - low)
        return self._seconds[upper - 1] * (1 - share) + self._seconds[upper] * share

    def drain_seconds(self, rows: int) -> float:
        """Predicted seconds until `rows` queued rows are done, in batches of the knee size."""
        full, rest = divmod(rows, self.knee)
        return (full * self.seconds(self.knee) if full else 0.0) + (self.seconds(rest) if rest else 0.0)

    def observe(self, rows: int, seconds: float) -> None:
        """Correct the estimate by a batch that was run; only exact bucket sizes teach, and nothing at once by much."""
        index = self._index(rows)
        if self.buckets[index] == rows:
            known = self._seconds[index]
            self._seconds[index] += SMOOTHING * (min(seconds, OUTLIER * known) - known)

    def follow(self) -> bool:
        """Have the knee follow what was observed, within reach; whether it moved. Call it about once a second.

        Of batches beyond the knee none is run, and what is known of them goes back to what it was at first beside one
        at the knee: so they are tried again after minutes.
        """
        if self.reach not in self.buckets:
            return False
        rates = {rows: rate(rows, self.seconds(rows)) for rows in self.buckets if rows <= self.reach}
        best = max(rates.values())
        found = next(rows for rows, reached in rates.items() if reached >= KNEE * best)
        moves = found != self.knee and rates[found] >= WORTH * rates[self.knee]
        if moves:
            self.knee = found
        self._forget_beyond(self._index(self.knee))
        return moves

    def _forget_beyond(self, knee: int) -> None:
        now = self._seconds[knee] / self._at_first[knee]
        for index in range(knee + 1, self._index(self.reach) + 1):
            self._seconds[index] += FORGETTING * (now * self._at_first[index] - self._seconds[index])

    def table(self) -> dict[int, float]:
        """Rows -> seconds, as known now."""
        return dict(zip(self.buckets, self._seconds, strict=True))

    def _index(self, rows: int) -> int:
        return min(bisect_left(self.buckets, rows), len(self.buckets) - 1)

    def _find_knee(self) -> int:
        rates = {rows: rate(rows, seconds) for rows, seconds in self.table().items()}
        return next(rows for rows in self.buckets if rates[rows] >= KNEE * max(rates.values()))


class Costs:
    """The cost tables of a variant: one per length bucket, or a single one where all rows have the same length.

    What takes rows per bucket takes them in the order of `tables`.
    """

    def __init__(self, tables: Sequence[CostTable], lengths: Sequence[int] = ()) -> None:
        """`lengths`: the upper ends of the length buckets, ascending; none for rows of the same length."""
        self.tables = tuple(tables)
        self.lengths = tuple(lengths)

    def drain_seconds(self, rows: Sequence[int]) -> float:
        """Predicted seconds of a lane until these rows per length bucket are done, in batches of the knee size."""
        if len(self.tables) == 1:  # every request asks this
            return self.tables[0].drain_seconds(rows[0])
        return sum(table.drain_seconds(count) for table, count in zip(self.tables, rows, strict=True) if count)

    def turn_seconds(self, rows: Sequence[int]) -> float:
        """Predicted seconds of the costliest batch among these rows per length bucket."""
        if len(self.tables) == 1:  # every short batch asks this
            [table], [count] = self.tables, rows
            return table.seconds(min(count, table.knee)) if count else 0.0
        batches = ((table, min(count, table.knee)) for table, count in zip(self.tables, rows, strict=True) if count)
        return max((table.seconds(count) for table, count in batches), default=0.0)

    def follow(self) -> bool:
        """As `CostTable.follow`, of all tables."""
        moved = [table.follow() for table in self.tables]
        return any(moved)

    def table(self) -> dict[int, float]:
        """Rows -> seconds, as known now; of rows of a typical length where they vary."""
        return self.tables[min(bisect_left(self.lengths, TYPICAL), len(self.tables) - 1)].table()


def costs_like(
    known: Costs, ratio: Callable[[int], float], most: int, compiled: Sequence[int], lengths: Sequence[int]
) -> Costs:
    """A first guess for a model whose batches cost `ratio(rows)` times those of a known one: none has more than `most`
    rows, or others than it was `compiled` for (empty: any), and rows have these `lengths` (empty: all the same).
    """
    shapes: Literal["any", "compiled"] = "compiled" if compiled else "any"
    tables = []
    for length in lengths or (0,):
        place = min(bisect_left(known.lengths, length), len(known.tables) - 1)
        table, longer = known.tables[place], length / known.lengths[place] if length and known.lengths else 1.0
        rows = buckets_up_to(most, compiled) if compiled else [size for size in table.buckets if size <= most] or [most]
        guess = {count: longer * ratio(count) * _beyond(table, count) for count in rows}
        tables.append(CostTable(guess, most, shapes))
    return Costs(tables, lengths)


def _beyond(table: CostTable, rows: int) -> float:
    """Seconds of a batch, also of one that is larger than any of the table."""
    largest = table.buckets[-1]
    return table.seconds(rows) * max(1.0, rows / largest)
