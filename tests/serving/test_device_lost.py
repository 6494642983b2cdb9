"""A device that answers nothing right any more ends its process, and is not asked again for parts of the batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from leanserve.contracts import Arrays, ModelSpec, Result, TensorSpec
from leanserve.errors import BackendFailed, DeviceLost
from leanserve.runtime.costs import Costs, CostTable
from leanserve.runtime.device import Lane
from leanserve.runtime.lanes import LanePlacement, LoadedVariant
from leanserve.serving.batch_runner import BatchPlace, BatchRunner, CompletedBatch, PendingResult
from leanserve.serving.batcher import Ticket
from leanserve.serving.watchdog import EXIT_STATUS

SPEC = ModelSpec((TensorSpec("x", "float32", (1,)),), (TensorSpec("y", "float32", (1,)),))


class Lost:
    """Runs out of memory, and is lost with the next batch."""

    name, device, self_contained, row_buckets = "spoilt", "cuda:0", True, ()

    def run(self, batch: Arrays) -> Result:
        raise DeviceLost(f"cuda:0 is lost to this process, at {len(batch[0])} rows")

    def close(self) -> None: ...


class Ended(Exception):
    """In the place of the end."""


def ended(status: int) -> None:
    raise Ended(status)


def ticket(rows: int) -> Ticket[PendingResult]:
    sample = (np.zeros((rows, 1), np.float32),)
    return cast("Ticket[PendingResult]", SimpleNamespace(sample=sample, rows=rows, bucket=0, length=0, identity=None))


PLACE = BatchPlace((Lane(0, 1),), LanePlacement(Lost(), Costs([CostTable({1: 0.001})])))


def never(_: list[Ticket[PendingResult]]) -> list[CompletedBatch]:
    raise AssertionError("asked again")


@pytest.mark.parametrize(
    ("error", "rows"), [(DeviceLost("cuda:0 is lost to this process"), (1, 1)), (MemoryError(), (4,))]
)
def test_the_process_ends(error: Exception, rows: tuple[int, ...], caplog: pytest.LogCaptureFixture) -> None:
    runner = BatchRunner("v", SPEC, cast(LoadedVariant, None), ended)
    with pytest.raises(Ended, match=str(EXIT_STATUS)):
        runner.run_apart(error, [ticket(count) for count in rows], PLACE, never)
    assert "variant v: cuda:0 is lost to this process" in caplog.text


def test_other_failures_end_nothing() -> None:
    runner = BatchRunner("v", SPEC, cast(LoadedVariant, None), ended)
    [batch] = runner.run_apart(ValueError("wrong"), [ticket(1)], PLACE, never)
    assert isinstance(batch.outcomes[0], BackendFailed)
