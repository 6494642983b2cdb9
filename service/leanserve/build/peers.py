"""The other processes of a pass that several run together, as torchrun would start them: one machine, gloo.

Each is told where the store is, what the base is and which pass to apply to which artifacts, applies it as this process
does and throws the result away: in between they have told each other their gradients, or what their shares of the
layers answer. They end with this process, whatever becomes of it; if one of them ends too soon, the pass fails here,
because gloo loses its connection.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, TypeAdapter

from leanserve import child
from leanserve.artifacts.load import OneByOne, load_model
from leanserve.artifacts.store import ArtifactStore
from leanserve.bases.opening import reopen_base
from leanserve.contracts import BuildContext
from leanserve.evaluation.candidates import CandidateEvaluator
from leanserve.hardware import this_hardware
from leanserve.passes import AnyPass
from leanserve.passes.base import Pass
from leanserve.runtime.formats.torch import training_device

ENDS_WITHIN_S = 60
"""How long after this process the others may take to be done."""
_PASS: TypeAdapter[Pass] = TypeAdapter(AnyPass)


class PeerTask(BaseModel):
    """What every process of a pass has to know."""

    model_config = ConfigDict(frozen=True)

    cache: Path
    origin: str
    """Of the base, as `Base.origin` tells it."""
    parents: tuple[str, ...]
    options: str
    """The pass, as JSON."""
    seed: int
    threads: int
    """Of each process."""
    processes: int
    rendezvous: str
    """The file by which they find each other."""


class SharedPass(NamedTuple):
    """A pass and what it is applied to, for all processes that run it together."""

    pass_: Pass
    parents: tuple[str, ...]
    store: ArtifactStore


@contextmanager
def beside_peers(shared: SharedPass, context: BuildContext) -> Iterator[BuildContext]:
    """While the block runs, other processes apply the pass too; the context with this one's share of the threads."""
    processes = shared.pass_.processes_needed
    if processes == 1:
        yield context
        return
    import torch.distributed as dist

    threads = max(1, context.threads // processes)
    with TemporaryDirectory(prefix="leanserve-peers-") as folder:
        task = PeerTask(
            cache=shared.store.root,
            origin=context.base.origin,
            parents=shared.parents,
            options=shared.pass_.model_dump_json(),
            seed=context.seed,
            threads=threads,
            processes=processes,
            rendezvous=f"file://{folder}/rendezvous",
        )
        peers = [_start(task, rank, _scratch(context, Path(folder), rank)) for rank in range(1, processes)]
        try:
            _join(task, 0)
            yield replace(context, hardware=replace(context.hardware, threads=threads))
            for peer in peers:
                peer.wait(ENDS_WITHIN_S)
        finally:
            for peer in peers:
                peer.kill()
                peer.wait()
            if dist.is_initialized():
                dist.destroy_process_group()


def _start(task: PeerTask, rank: int, scratch: Path) -> subprocess.Popen[bytes]:
    arguments = (task.model_dump_json(), str(rank), str(scratch))
    return subprocess.Popen(child.command(__name__, *arguments), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def _scratch(context: BuildContext, folder: Path, rank: int) -> Path:
    """A scratch folder of its own, with the checkpoint from which all of them go on."""
    own = folder / str(rank)
    shutil.copytree(context.scratch, own)
    return own


def _join(task: PeerTask, rank: int) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=task.rendezvous, rank=rank, world_size=task.processes)


def main(told: str, rank: str, scratch: str) -> None:
    """A process beside the one that builds: apply the pass of the task `told` (JSON) and keep nothing."""
    task = PeerTask.model_validate_json(told)
    base, store = reopen_base(task.origin), ArtifactStore(task.cache)
    hardware = this_hardware(task.threads)
    evaluate = CandidateEvaluator(base, task.threads)
    device = training_device(hardware)
    context = BuildContext(base, task.seed, hardware, Path(scratch), _unheard, evaluate, device)
    load = [partial(load_model, store, base, key) for key in task.parents]
    _join(task, int(rank))
    _PASS.validate_json(task.options).join(OneByOne(load) if len(load) > 1 else [load[0]()], context)
    evaluate.close()


def _unheard(done: float, total: float, note: str = "") -> None:
    """The first process tells how far all of them are."""


if __name__ == "__main__":
    main(*sys.argv[1:])
