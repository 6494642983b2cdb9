"""The program of a worker process (`isolation: process`): one artifact, opened from the store, run for the service.

Of the base it opens only what the artifact needs: a graph in the store nothing at all, a torch module its structure; no
rows, no tokenizer. Started by `runtime.isolation`, in the installation of the service.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

import orjson

from leanserve.artifacts.load import load_model
from leanserve.artifacts.store import ArtifactStore
from leanserve.contracts import Backend, ModelSpec, Share
from leanserve.runtime.formats import open_backend
from leanserve.runtime.isolation.worker_side import serve_backend

if TYPE_CHECKING:
    from torch import nn


class WorkerTask(NamedTuple):
    """What a worker opens: an artifact of a store, made of the base with this origin, for a share of the machine."""

    store: str
    key: str
    origin: str
    share: Share

    def to_argument(self) -> str:
        """As an argument of a command."""
        return orjson.dumps([self.store, self.key, self.origin, list(self.share)]).decode()

    @classmethod
    def from_argument(cls, text: str) -> Self:
        """What `to_argument` wrote."""
        store, key, origin, share = orjson.loads(text)
        threads, devices, alone, callers, processors = share
        own = Share(threads, tuple(devices), alone, callers, tuple(processors))
        return cls(store, key, origin, own)


class _Structure:
    """The base's module, made when it is asked for."""

    def __init__(self, origin: str, spec: ModelSpec) -> None:
        self._origin = origin
        self._spec = spec

    def torch_module(self) -> nn.Module:
        from leanserve.bases.opening import reopen_module

        return reopen_module(self._origin, self._spec)


def read_artifact(task: WorkerTask) -> Callable[[], Backend]:
    """Read the model; the result opens a backend for it, on the thread that will run it."""
    store = ArtifactStore(Path(task.store))
    base = _Structure(task.origin, store.ancestry(task.key)[0].spec)
    return partial(open_backend, load_model(store, base, task.key), task.share)


def main(descriptors: str, task: str) -> None:
    """Serve until the service closes the channels."""
    asked = WorkerTask.from_argument(task)
    serve_backend(descriptors, partial(read_artifact, asked), asked.share.processors[:1])


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # skip the teardown of thread pools: nothing is left to lose
