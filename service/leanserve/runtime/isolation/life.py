"""One life of a worker: the process from its start to its end, and the batches that are in it.

Whoever runs a batch holds a channel. The descriptors of all channels are closed by the last one who held any after the
end, because a number that is closed earlier may be another file's by then.
"""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import IO, NamedTuple

from leanserve.child import command, how_it_ended
from leanserve.contracts import Arrays, Json, Result
from leanserve.errors import StartupError, WorkerLost
from leanserve.runtime.isolation.channel import BatchChannel, raise_refusal

logger = logging.getLogger(__name__)

FIRST_S = 600.0
"""How long a worker may take to open its model, and for a batch before it is known what batches take."""


BatchPatience = Callable[[int], float]


class WorkerProgram(NamedTuple):
    """What a worker runs: a module that hands its first argument to `worker_side.serve_backend`; others are its own.

    The variant's name is for the log.
    """

    variant: str
    module: str
    arguments: tuple[str, ...] = ()


class WorkerEnd(NamedTuple):
    """Why a worker is there no more: the cause in one word for counting, and the same in words."""

    cause: str
    why: str


class WorkerLife:
    """A worker that was started. Callable from any thread."""

    def __init__(self, program: WorkerProgram, lanes: int) -> None:
        """`lanes`: the number of batches that it can run at once."""
        self._variant = program.variant
        pairs = [BatchChannel.pair() for _ in range(lanes)]
        self._channels = [channel for channel, _ in pairs]
        numbers = [
            n for here, there in pairs for n in (there.fileno(), here.inputs.descriptor, here.outputs.descriptor)
        ]
        arguments = (",".join(map(str, numbers)), *program.arguments)
        self._process = subprocess.Popen(
            command(program.module, *arguments), pass_fds=numbers, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for _, there in pairs:
            there.close()
        assert self._process.stdout is not None
        threading.Thread(target=self._relay, args=(self._process.stdout,), name="worker-log", daemon=True).start()
        self._free: SimpleQueue[BatchChannel] = SimpleQueue()
        self._changing = threading.Lock()
        self._inside = 0
        self._runs = 0
        self._dead = False
        self._alone = False
        self._stuck = ""

    @property
    def process_id(self) -> int:
        """That of its process."""
        return self._process.pid

    def opened(self) -> Json:
        """What the worker tells of its backend, once it has opened it.

        Raises:
            StartupError: it could not; the text says why. MemoryError: for lack of memory.
        """
        first = self._channels[0]
        first.link.settimeout(FIRST_S)
        try:
            told = first.receive()
        except (EOFError, ConnectionResetError):
            raise StartupError(f"its worker {how_it_ended(self._process.wait())}") from None
        except TimeoutError:
            raise StartupError(f"its worker has not opened the model within {FIRST_S:.0f} s") from None
        raise_refusal(told, StartupError)
        for channel in self._channels:
            self._free.put(channel)
        return told

    def run(self, batch: Arrays, patience: BatchPatience) -> Result:
        """Have a batch run, within the seconds that `patience` says after so many others: else the worker is stuck.

        Raises:
            WorkerLost: the worker ended or got stuck. Else what the backend raised there.
        """
        channel = self._enter()
        patience_s = patience(self._runs)
        self._runs += 1
        try:
            channel.link.settimeout(patience_s)
            return channel.ask(batch)
        except (EOFError, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                self._stuck = f"was stuck for {patience_s:.1f} s in a batch of {len(batch[0])} rows and was killed"
                self._process.kill()
            alone = self._lost() or isinstance(error, TimeoutError)
            how = self._stuck or how_it_ended(self._process.wait())
            raise WorkerLost(f"variant '{self._variant}': its worker {how}", alone=alone) from None
        finally:
            self._leave(channel)

    def kill(self) -> None:
        """End it now."""
        self._process.kill()

    def end(self) -> WorkerEnd:
        """Wait until it has ended."""
        status = self._process.wait()
        self._lost()
        self._close_when_left()
        if self._stuck:
            return WorkerEnd("stuck", self._stuck)
        return WorkerEnd(signal.Signals(-status).name if status < 0 else "exit", how_it_ended(status))

    def _enter(self) -> BatchChannel:
        channel = self._free.get()
        with self._changing:
            if not self._dead:
                self._inside += 1
                return channel
        self._free.put(channel)
        raise WorkerLost(f"variant '{self._variant}': its worker was lost", ran=False)

    def _leave(self, channel: BatchChannel) -> None:
        with self._changing:
            self._inside -= 1
        self._free.put(channel)
        self._close_when_left()

    def _lost(self) -> bool:
        """From now on no batch is begun. Whether only one was in it when this was first noticed."""
        with self._changing:
            if not self._dead:
                self._dead, self._alone = True, self._inside == 1
            return self._alone

    def _close_when_left(self) -> None:
        with self._changing:
            if self._dead and not self._inside:
                while self._channels:
                    self._channels.pop().close()

    def _relay(self, said: IO[bytes]) -> None:
        """What the worker, its libraries and their last words (`faulthandler`) write, into the log of the service."""
        with said:
            for line in said:
                text = line.decode(errors="replace").rstrip()
                logger.warning("worker of variant '%s': %s", self._variant, text)
