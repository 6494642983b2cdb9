"""`GET /v1/live`: what every variant does now, read from the numbers that `/metrics` exports.

Rates and quantiles are over the last ten seconds: every two seconds the sums are noted, and a snapshot tells by how
much they have grown since the oldest note. The notes cost some 35 us of a fleet of seven, whoever looks.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate
from typing import NamedTuple

from leanserve.config.experiment_section import HardwareConfig
from leanserve.contracts import Json
from leanserve.experiments.cost import price_per_million
from leanserve.experiments.mean import RatioSums
from leanserve.live.plain import plain
from leanserve.serving.fleet import Fleet
from leanserve.telemetry.observations import VariantMetrics

WINDOW_S, PERIOD_S = 10.0, 2.0
"""What rates are over, and how often the sums are noted."""
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


class _Sums(NamedTuple):
    """What one variant has counted since the start."""

    requests: int = 0
    latencies: tuple[int, ...] = ()
    rows: float = 0.0
    batches: int = 0
    infer_s: float = 0.0
    waited_s: float = 0.0
    waits: int = 0
    lane_s: float = 0.0

    @classmethod
    def of(cls, metrics: VariantMetrics) -> _Sums:
        batches = metrics.rows.count
        return cls(
            sum(seen.count for seen in metrics.requests.values()),
            tuple(metrics.requests["ok"].counts),
            metrics.rows.total,
            batches,
            metrics.infer.total,
            metrics.queue.total,
            metrics.queue.count,
            metrics.lane_s,
        )

    def since(self, before: _Sums) -> _Sums:
        """How much was added; all of it where the variant was made anew meanwhile."""
        if not before.latencies or self.requests < before.requests or self.batches < before.batches:
            return self
        latencies = tuple(now - then for now, then in zip(self.latencies, before.latencies, strict=True))
        rest = (now - then for now, then in zip(self[2:], before[2:], strict=True))
        return _Sums._make((self.requests - before.requests, latencies, *rest))


class _Note(NamedTuple):
    at: float
    sums: Mapping[str, _Sums]


class LiveNumbers:
    """The numbers of one fleet. On the event loop only."""

    def __init__(self, fleet: Fleet, hardware: HardwareConfig, experiment: Callable[[], Json]) -> None:
        """`experiment` tells of the one that runs, in short, or `None`."""
        self.hardware = hardware
        """What the machine costs; may be replaced."""
        self._fleet = fleet
        self._experiment = experiment
        self._notes: deque[_Note] = deque(maxlen=round(WINDOW_S / PERIOD_S) + 1)
        self._loop = asyncio.get_running_loop()
        fleet.metrics.experiment.prices = self._prices
        self._note()

    def snapshot(self) -> Json:
        """All of it, as plain values; takes some 0.3 ms."""
        fleet, now = self._fleet, time.monotonic()
        fleet.metrics.catch_up()
        before = next(note for note in self._notes if now - note.at <= WINDOW_S or note is self._notes[-1])
        seconds = max(now - before.at, 1e-3)
        grown = {
            name: _Sums.of(metrics).since(before.sums.get(name, _Sums()))
            for name, metrics in fleet.metrics.variants.items()
        }
        device, shares = fleet.device, fleet.split.shares
        lane_s = seconds * len(device.lanes)
        variants = [self._variant(name, grown[name], seconds, lane_s) for name in fleet.plans]
        return plain(
            {
                "at": time.time(),
                "model": fleet.name,
                "window_s": round(seconds, 3),
                "draining": fleet.draining,
                "device": {
                    "name": device.name,
                    "lanes": len(device.lanes),
                    "threads": device.threads,
                    "busy": min(1.0, sum(each.lane_s for each in grown.values()) / lane_s),
                },
                "price_per_hour": self.hardware.price_per_hour,
                "currency": self.hardware.currency,
                "experiment": self._experiment(),
                "variants": [variant | {"share": shares.get(variant["name"], 0.0)} for variant in variants],
            }
        )

    def _prices(self) -> dict[str, float]:
        """By variant, where known."""
        prices = {
            name: price_of(each, self.hardware.price_per_hour) for name, each in self._fleet.metrics.variants.items()
        }
        return {name: price["per_million"] for name, price in prices.items() if price is not None}

    def _note(self) -> None:
        sums = {name: _Sums.of(metrics) for name, metrics in self._fleet.metrics.variants.items()}
        self._notes.append(_Note(time.monotonic(), sums))
        self._loop.call_later(PERIOD_S, self._note)

    def _variant(self, name: str, grown: _Sums, seconds: float, lane_s: float) -> dict[str, Json]:
        fleet, metrics = self._fleet, self._fleet.metrics.variants[name]
        (state, reason), facts, ok = fleet.status_of[name], metrics.facts, metrics.requests["ok"]
        quality = facts.quality
        return {
            "name": name,
            "state": state,
            "reason": reason or None,
            "passes": list(facts.passes),
            "parents": list(facts.parents),
            "backend": facts.backend or None,
            "requests": _requests(metrics, grown, seconds),
            "latency_ms": {word: _quantile_ms(ok.bounds, grown.latencies, share) for word, share in QUANTILES.items()},
            "latency": {"bounds_s": ok.bounds, "counts": ok.counts},
            "batch": {
                "rows_mean": _mean(grown.rows, grown.batches),
                "inference_ms_mean": _mean(1000 * grown.infer_s, grown.batches),
            },
            "queue": {
                "rows": metrics.queue_rows(),
                "requests": metrics.queue_requests(),
                "wait_ms_mean": _mean(1000 * grown.waited_s, grown.waits),
            },
            "utilisation": min(1.0, grown.lane_s / lane_s),
            "device_ms_per_row": _mean(1000 * metrics.cost.seconds, metrics.cost.rows),
            "cost": price_of(metrics, self.hardware.price_per_hour),
            "quality": quality or None,
            "size_bytes": quality.get("disk_bytes"),
            "memory_bytes": quality.get("peak_memory_bytes"),
            "joules_per_row": self._joules_per_row(name, metrics),
        }

    def _joules_per_row(self, name: str, metrics: VariantMetrics) -> float | None:
        """As of the last scrape of `/metrics`, which shares the energy out."""
        joules = self._fleet.metrics.joules(name)
        return None if joules is None else _mean(joules, metrics.cost.rows)


def price_of(metrics: VariantMetrics, price_per_hour: float | None) -> Json:
    """Of a million rows of a variant since the start, with its interval; `None` where no price is known, or no row."""
    sums = RatioSums(**{name: float(value) for name, value in _as_ratio(metrics).items()})
    price = None if price_per_hour is None else price_per_million(sums, price_per_hour)
    return None if price is None else {"per_million": price.per_million, **price.interval._asdict()}


def _as_ratio(metrics: VariantMetrics) -> Mapping[str, float]:
    counted = asdict(metrics.cost)
    return {
        "batches": counted["batches"],
        "value": counted["seconds"],
        "rows": counted["rows"],
        "value_squares": counted["seconds_squares"],
        "products": counted["products"],
        "rows_squares": counted["rows_squares"],
    }


def _requests(metrics: VariantMetrics, grown: _Sums, seconds: float) -> Json:
    by_outcome = {outcome: seen.count for outcome, seen in metrics.requests.items() if seen.count}
    total, ok = sum(by_outcome.values()), by_outcome.get("ok", 0)
    return {
        "total": total,
        "ok": ok,
        "failed": total - ok,
        "by_outcome": by_outcome,
        "per_s": grown.requests / seconds,
        "rows_per_s": grown.rows / seconds,
    }


def _quantile_ms(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """As Prometheus' `histogram_quantile` tells it: evenly spread within a bucket, at most the last bound."""
    cumulative = list(accumulate(counts))
    if not cumulative or not cumulative[-1]:
        return None
    rank = share * cumulative[-1]
    bucket = next(index for index, seen in enumerate(cumulative) if seen >= rank)
    if bucket == len(bounds):
        return 1000 * bounds[-1]
    low, within = (bounds[bucket - 1] if bucket else 0.0), counts[bucket]
    return 1000 * (low + (bounds[bucket] - low) * (rank - (cumulative[bucket] - within)) / within)


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None
