"""Running a module of this package in a process of its own, whose memory and threads nothing else has used.

A child prints lines of JSON: how far it is, if it tells, and at last its result.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import tempfile

from leanserve import child, memory
from leanserve.contracts import Json, Progress
from leanserve.errors import PassFailed


class ChildEnded(PassFailed):
    """A child that ended without a result: its exit status, and what it said last."""

    def __init__(self, status: int, said: str) -> None:
        self.status = status
        self.last = said.splitlines()[-1] if said else f"the process {child.how_it_ended(status)}"
        super().__init__(f"what was built does not run: {self.last}" + (f"\n{said}" if "\n" in said else ""))

    @property
    def out_of_memory(self) -> bool:
        """Whether it said so, or was killed, as the kernel does then."""
        return self.status in {memory.EXIT_STATUS, -signal.SIGKILL}


def nobody_told(done: float, total: float, note: str = "") -> None:
    """A `contracts.Progress` of which nobody hears."""


def in_fresh_process(module: str, *arguments: str, progress: Progress = nobody_told) -> Json:
    """Run `leanserve.evaluation.MODULE` with these arguments; what it printed last.

    Raises:
        ChildEnded: it failed, or was killed. OSError: a disk or a permission failed it.
    """
    command = child.command(f"leanserve.evaluation.{module}", *arguments)
    last: Json = None
    with tempfile.TemporaryFile("w+") as said:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as running:
            assert running.stdout is not None
            for line in running.stdout:
                last = json.loads(line)
                if last.keys() == {"share", "note"}:
                    progress(last["share"], 1.0, last["note"])
        if running.returncode != 0:
            said.seek(0)
            text = said.read().strip()
            if met := re.search(r"Error: \[Errno (\d+)\] ([^:\n]+)(?:: '(.+)')?$", text):
                raise OSError(int(met[1]), met[2], met[3])  # a full disk says nothing of a model
            raise ChildEnded(running.returncode, text)
    return last
