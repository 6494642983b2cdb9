"""Run one artifact in a fresh process: what it answers on the gate split, alone and in company, and its memory.

A process of its own, because the builder's heap and thread pools would colour the memory; and on a device thread,
because that is where the server runs models. Started by `quality.py` as a child; prints one JSON line.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np

from leanserve.artifacts.load import load_model
from leanserve.artifacts.store import ArtifactStore
from leanserve.bases.opening import reopen_base
from leanserve.contracts import Array, Arrays, Backend, Base, Data, Share
from leanserve.evaluation.batch_dependence import COMPANY, batch_dependence
from leanserve.hardware import Hardware
from leanserve.memory import exit_when_out, largest_that_fits, run_in_parts
from leanserve.runtime.device import Device
from leanserve.runtime.formats import open_backend
from leanserve.runtime.linux.processors import own_processors
from leanserve.texts import of_fixed_width

ROWS = 32
"""Rows of the batch whose memory is measured, where there is memory for it."""


class MeasuringTask(NamedTuple):
    """What is measured: an artifact of a store, on its share of the machine, with batches of at most `rows` rows."""

    store: ArtifactStore
    base: Base
    key: str
    share: Share
    rows: int


def main(cache: str, key: str, origin: str, share: str, rows: str, answers: str) -> None:
    """Measure the artifact `key`: write its outputs on the gate split to `answers` (.npz), print the rest as JSON.

    OpenMP's threads sleep while they wait for each other: nothing is timed here, and on a busy machine those that wait
    busily keep the processors from those that they wait for.
    """
    os.putenv("OMP_WAIT_POLICY", "passive")  # libgomp reads it when torch is loaded, which is later
    task = MeasuringTask(ArtifactStore(Path(cache)), reopen_base(origin), key, read_share(share), int(rows))
    device = Device("measure", task.share.threads)
    try:
        [cost] = device.call_on_each(lambda _: _measure(task, Path(answers)))
    finally:
        device.close()
    sys.stdout.write(json.dumps(cost) + "\n")


def share_argument(hardware: Hardware) -> str:
    """What a child gets that measures: all threads, and the first device, as `read_share` reads it."""
    return f"{hardware.threads}@{hardware.devices[0]}"


def read_share(argument: str) -> Share:
    """What `share_argument` wrote."""
    threads, _, device = argument.partition("@")
    processors = own_processors(int(threads)) if device == "cpu" else ()
    return Share(int(threads), (device,), processors=processors)


def outputs_on(backend: Backend, data: Data, size: int = 8) -> Arrays:
    """Run a whole data split; the outputs of all batches joined. What varies in length is filled up with NaN, or 0."""
    batches = [part for batch in data.batches(size) for part in run_in_parts(_outputs_of(backend), batch.inputs)]
    return tuple(_joined(parts) for parts in zip(*batches, strict=True))


def _outputs_of(backend: Backend) -> Callable[[Arrays], Arrays]:
    return lambda batch: backend.run(batch).outputs


def _joined(parts: Sequence[Array]) -> Array:
    shape = tuple(max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True))
    if all(part.shape[1:] == shape for part in parts):
        return np.concatenate(parts)
    blank = {"f": np.nan, "O": ""}.get(parts[0].dtype.kind, 0)
    joined = np.full((sum(map(len, parts)), *shape), blank, parts[0].dtype)
    start = 0
    for part in parts:
        joined[(slice(start, start + len(part)), *(slice(0, size) for size in part.shape[1:]))] = part
        start += len(part)
    return joined


def _measure(task: MeasuringTask, answers: Path) -> dict[str, object]:
    spec = task.store.ancestry(task.key)[-1].spec
    gate = task.base.data("gate", spec=spec)
    first = _first_rows(gate)  # reading and decoding files is not the artifact's memory
    wanted = spec.most_rows(task.rows)
    batch = _repeated(first, wanted)
    _import_runtime(task.store, task.key)
    before = _resident_bytes()
    _reset_peak()
    backend = open_backend(load_model(task.store, task.base, task.key), task.share)
    try:
        loaded = _peak_bytes()
        rows, peak = largest_that_fits(wanted, lambda rows: _peak_of(backend, tuple(array[:rows] for array in batch)))
        np.savez(answers, *map(of_fixed_width, outputs_on(backend, gate, min(8, rows))))
        dependence = batch_dependence(backend, spec, first, min(COMPANY, rows))
    finally:
        backend.close()
    return {
        "peak_memory_bytes": max(0, max(loaded, peak) - before),
        "samples": len(gate),
        "batch_dependence": dependence,
        "memory_rows": rows if rows < spec.most_rows(ROWS) else None,
    }


def _repeated(batch: Arrays, rows: int) -> Arrays:
    """Exactly so many rows, over and over again."""
    return tuple(array[np.arange(rows) % len(array)] for array in batch)


def _peak_of(backend: Backend, batch: Arrays) -> int:
    """Peak resident bytes of the process while it runs a batch; not those of one before it that was too large."""
    _reset_peak()
    backend.run(batch)
    return _peak_bytes()


def _first_rows(data: Data) -> Arrays:
    """Up to `ROWS` rows; where they come one by one, each as long as it is, cut to the shortest."""
    found: list[Arrays] = []
    for batch in data.batches(ROWS):
        found.append(batch.inputs)
        if sum(len(inputs[0]) for inputs in found) >= ROWS:
            break
    return tuple(_stacked(arrays) for arrays in zip(*found, strict=True))


def _stacked(arrays: Sequence[Array]) -> Array:
    least = np.min([array.shape[1:] for array in arrays], axis=0)
    return np.concatenate([array[(slice(None), *map(slice, least))] for array in arrays])


def _import_runtime(store: ArtifactStore, key: str) -> None:
    """Import what the backend needs, so that the library itself is not counted as the artifact's memory."""
    import_module(store.format_of(key).runtime_module)
    gc.collect()


def _resident_bytes() -> int:
    return _status_kib("VmRSS") * 1024


def _peak_bytes() -> int:
    return _status_kib("VmHWM") * 1024


def _status_kib(name: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(name + ":")), 0)


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return  # not Linux, or not allowed: the peak since the start of the process is an upper bound


if __name__ == "__main__":
    with exit_when_out():
        main(*sys.argv[1:])
    os._exit(0)  # skip the teardown of thread pools: nothing is left to lose
