"""Which of some ways to run a model is faster here? For passes that measure to decide, or record what they gain."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from leanserve.timing import take_turns, timed

LEAST_ROUNDS = 5


def seconds_per_call(ways: Mapping[str, Callable[[], object]], seconds: float = 0.5) -> dict[str, float]:
    """Median seconds of one call of each way, in turns for about `seconds` in all after two calls of warm-up."""
    return {name: statistics.median(times) for name, times in _sampled(ways, seconds).items()}


def least_seconds(ways: Mapping[str, Callable[[], object]], seconds: float = 0.5) -> dict[str, float]:
    """As `seconds_per_call`, of the quickest call: what a machine takes that is busy with nothing else, for other work
    only ever adds."""
    return {name: min(times) for name, times in _sampled(ways, seconds).items()}


def _sampled(ways: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    for _ in range(2):
        for run in ways.values():
            run()
    samples: dict[str, list[float]] = {name: [] for name in ways}
    end = time.perf_counter() + seconds
    for count, measured in enumerate(take_turns({name: partial(timed, run) for name, run in ways.items()}), start=1):
        for name, taken in measured.items():
            samples[name].append(taken)
        if count >= LEAST_ROUNDS and time.perf_counter() >= end:
            break
    return samples


@contextmanager
def inference(threads: int) -> Iterator[None]:
    """Torch as the serving thread runs it: no gradients, this many threads. The thread count is put back afterwards."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before)
