"""What the service tells a worker process arrives there as it was."""

from __future__ import annotations

from leanserve.contracts import Share
from leanserve.worker import WorkerTask


def test_a_task_passes_through_an_argument() -> None:
    task = WorkerTask(
        "/a/store",
        "key",
        '{"base": "digits"}',
        Share(3, ("cuda:0", "cuda:1"), alone=True, callers=2, processors=(0, 1)),
    )
    assert WorkerTask.from_argument(task.to_argument()) == task
