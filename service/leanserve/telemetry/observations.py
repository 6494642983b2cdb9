"""What the request path writes: plain adds on one `VariantMetrics` per variant, cheaper than any metrics library.

prometheus_client's own counters take a lock and a label look-up per observation, which other servers measured as a
large share of their throughput. Nothing here knows a metric's name or how it is exported: that is `metrics.py`, which
reads these numbers when Prometheus scrapes.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

from leanserve.contracts import Json
from leanserve.errors import ServiceError

SECONDS = (*(round(step * 10.0**power, 10) for power in range(-4, 1) for step in (1, 1.5, 2, 3, 5, 7)), 10.0)
"""Bucket bounds from 0.1 ms to 10 s, at most a factor 1.67 apart: fine enough to tell variants apart by percentile."""
ROWS = tuple(float(2**power) for power in range(11))
"""Bucket bounds of the batch size, 1 to 1024 rows."""


def _codes(family: type[ServiceError]) -> Iterator[str]:
    yield family.code
    for child in family.__subclasses__():
        yield from _codes(child)


OUTCOMES = ("ok", *dict.fromkeys(_codes(ServiceError)))
"""How a request can end: answered, or the `code` of the error that refused it."""


SequenceEnd = Literal["ended", "expired", "restarted", "unloaded", "failed"]
"""How a sequence ends: as the client wishes, idle for too long, by another start of the same id, with its variant, or
because its first request failed."""
SEQUENCE_ENDS: tuple[SequenceEnd, ...] = get_args(SequenceEnd)
VariantState = Literal["serving", "restarting", "loading", "unloading", "unloaded", "failed", "excluded"]
"""Failed: a batch of it did not end. Excluded: by its gate, since the start. The others have passed it and are
loaded, or not, or on the way; `restarting` is a variant whose worker process was lost."""


class BucketCounts:
    """Counts per bucket and the sum of the values. One thread writes and reads."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count one observation; a bucket includes its upper bound."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def add_all(self, values: Sequence[float]) -> None:
        """The same for several."""
        bounds, counts = self.bounds, self.counts
        for value in values:
            counts[bisect_left(bounds, value)] += 1
        self.total += sum(values)

    @property
    def count(self) -> int:
        """Observations so far."""
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class VariantFacts:
    """What is known about a variant before its first request.

    `quality` is the manifest's quality report as plain values: `None` is left out, nested numbers get joined names
    (`latency_ms: {8: ..}` becomes the measure `latency_ms_8`), and `outputs` is a list with the measures of each.
    `build_seconds` has one entry per pass, in order. `cpu` and `threads` are those that it was measured on.
    """

    passes: Sequence[str] = ()
    parents: Sequence[str] = ()
    """The variants that it is made of; none: the base."""
    simulated: Sequence[str] = ()
    """Those of the passes whose gain is computed, not had."""
    backend: str = ""
    device: str = ""
    lanes: int = 1
    """Batches that its device runs at a time."""
    state: VariantState = "serving"
    reason: str = ""
    doubt: str = ""
    """What its gate could not decide, of a variant that serves."""
    quality: Mapping[str, Json] = field(default_factory=dict)
    build_seconds: Sequence[float] = ()
    cpu: str = ""
    threads: int = 0


@dataclass(slots=True)
class CostCounts:
    """Sums over batches of their device seconds and rows, from which follow the seconds per row and how far they vary
    (`experiments.mean.RatioSums`)."""

    batches: int = 0
    seconds: float = 0.0
    rows: int = 0
    seconds_squares: float = 0.0
    products: float = 0.0
    rows_squares: int = 0

    def add(self, rows: int, seconds: float) -> None:
        """Count a batch of `rows` real rows that had the whole device for so long."""
        self.batches += 1
        self.seconds += seconds
        self.rows += rows
        self.seconds_squares += seconds * seconds
        self.products += seconds * rows
        self.rows_squares += rows * rows


@dataclass(slots=True)
class BatchTimes:
    """Executions of one batch size: how many there were, and seconds in all per phase."""

    count: int = 0
    infer_s: float = 0.0
    input_s: float = 0.0
    output_s: float = 0.0


def up_to_date() -> None:
    """What is counted at once need not catch up."""


def no_queue() -> int:
    """The queue of what has none."""
    return 0


class WorkerCounts(NamedTuple):
    """The worker processes of a variant: how often one was lost, by cause, and whether all are there."""

    losses: Mapping[str, int]
    are_there: bool


def no_workers() -> WorkerCounts | None:
    """A variant in the service's own process has none."""
    return None


class VariantMetrics:
    """The numbers of one variant.

    The thread of the event loop writes and reads. Batches are counted a moment after their replies; who reads calls
    `catch_up` first. `queue_rows`, `queue_requests` and `workers` are called at scrape. `batches` has an entry per
    batch size (rows) that occurred; `sequences` are those that are open now; `backend_facts` are sums of what backends
    told of their batches.
    `lane_s`, `cost` and `padding_tokens` are added to by who calls `batch_done`; the first are the seconds of all lanes
    that a batch had for itself. `last_batch_at` is in seconds since the epoch, 0 before the first batch.
    """

    __slots__ = (
        "backend_facts",
        "batches",
        "catch_up",
        "cost",
        "facts",
        "infer",
        "infer_request_s",
        "input_request_s",
        "lane_s",
        "last_batch_at",
        "name",
        "output_request_s",
        "padding_rows",
        "padding_tokens",
        "queue",
        "queue_requests",
        "queue_rows",
        "requests",
        "rows",
        "sequences",
        "sequences_ended",
        "stuck_batches",
        "workers",
    )

    def __init__(self, name: str, facts: VariantFacts) -> None:
        self.name = name
        self.facts = facts
        self.catch_up: Callable[[], None] = up_to_date
        self.queue_rows: Callable[[], int] = no_queue
        self.queue_requests: Callable[[], int] = no_queue
        self.workers: Callable[[], WorkerCounts | None] = no_workers
        self.requests = {outcome: BucketCounts(SECONDS) for outcome in OUTCOMES}
        self.queue = BucketCounts(SECONDS)
        self.infer = BucketCounts(SECONDS)
        self.rows = BucketCounts(ROWS)
        self.padding_rows = 0
        self.padding_tokens = 0
        self.batches: dict[int, BatchTimes] = {}
        self.backend_facts: dict[str, float] = {}
        self.last_batch_at = 0.0
        self.lane_s = 0.0
        self.cost = CostCounts()
        self.stuck_batches = 0
        self.sequences = 0
        self.sequences_ended: dict[SequenceEnd, int] = dict.fromkeys(SEQUENCE_ENDS, 0)
        # Summed over requests, as Triton counts: every request of a batch spent the whole batch's time.
        self.infer_request_s = 0.0
        self.input_request_s = 0.0
        self.output_request_s = 0.0

    def request_done(self, outcome: str, seconds: float) -> None:
        """A request ended after `seconds` in the service; `outcome` is one of `OUTCOMES` (else `KeyError`)."""
        self.requests[outcome].add(seconds)

    def add_backend_facts(self, facts: Mapping[str, float]) -> None:
        """Add what a backend told of a batch (`contracts.Result.facts`)."""
        for name, value in facts.items():
            self.backend_facts[name] = self.backend_facts.get(name, 0.0) + value

    def batch_done(
        self,
        rows: int,
        padding_rows: int,
        infer_s: float,
        queue_seconds: Sequence[float],
        input_s: float = 0.0,
        output_s: float = 0.0,
    ) -> None:
        """A batch of `rows` real rows was executed, for one request per entry of `queue_seconds`.

        `infer_s` is the time on the device, `input_s` that of forming the batch, `output_s` that of splitting it.
        """
        requests = len(queue_seconds)
        self.rows.add(rows)
        self.infer.add(infer_s)
        self.padding_rows += padding_rows
        self.infer_request_s += infer_s * requests
        self.input_request_s += input_s * requests
        self.output_request_s += output_s * requests
        self.queue.add_all(queue_seconds)
        times = self.batches.get(rows)
        if times is None:
            times = self.batches[rows] = BatchTimes()
        times.count += 1
        times.infer_s += infer_s
        times.input_s += input_s
        times.output_s += output_s
        self.last_batch_at = time.time()
