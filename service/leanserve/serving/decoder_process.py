"""A process that decodes what is large: a body that needs a second of it stops nobody, and its memory ends with it.

Threads would not do. Parsers and image filters hold Python's lock for as long as they work on one value, and what a
bomb made an allocator take stays with the process. Here the lock is the child's own, its memory is bounded by the
kernel, it is killed at the deadline of its request, and a decoder that crashes takes nothing along.

The two processes are one program and trust each other: they exchange pickles, with arrays beside them uncopied.
"""

from __future__ import annotations

import os
import pickle
import resource
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from leanserve import child
from leanserve.contracts import Weighed
from leanserve.errors import BadInput, BodyTooLarge, QueueTimeout, ServiceError

Wire = TypeVar("Wire")
Result_co = TypeVar("Result_co", covariant=True)
NICENESS = 5
"""The model and the event loop go first."""
_PROTOCOL = 5


class Decoding(Protocol[Result_co]):
    """A body with what reads it, in a form that another process can be sent."""

    def prepare(self) -> Weighed[Any]:
        """Look at it; the work gives a `Result_co`. Raises any `ServiceError`."""


class DecoderProcess(Generic[Wire]):
    """The child, started when it is first needed. Use it from one thread at a time."""

    def __init__(self, memory: int) -> None:
        """`memory`: bytes that one body may take there."""
        self._memory = memory
        self._child: subprocess.Popen[bytes] | None = None
        self._pipe: Connection

    def run(self, decoding: Decoding[Wire], deadline: float) -> Wire:
        """Decode. Blocks, without Python's lock, until `deadline` (by `time.perf_counter`) at most.

        Raises:
            QueueTimeout: it was not done by then.
            ServiceError: whatever is wrong with the body, its size among it.
        """
        if self._child is None:
            self._start()
        try:
            _send(self._pipe, decoding)
            if not self._pipe.poll(max(0.0, deadline - time.perf_counter())):
                self.end()
                raise QueueTimeout("the body was not decoded before the deadline of its request")
            made, failure = _received(self._pipe)
        except (EOFError, ConnectionError):
            assert self._child is not None
            how = child.how_it_ended(self._child.wait())
            self.end()
            raise BadInput(f"the body cannot be decoded: its decoder {how}") from None
        if failure is not None:
            raise failure
        return made  # type: ignore[no-any-return]

    def end(self) -> None:
        """End the child, whatever it does. The next `run` starts another one."""
        if self._child is not None:
            self._pipe.close()
            self._child.kill()
            self._child.wait()
            self._child = None

    @property
    def pid(self) -> int | None:
        """Of the child; `None` where there is none."""
        return None if self._child is None else self._child.pid

    def _start(self) -> None:
        self._pipe, theirs = Pipe()
        arguments = (str(theirs.fileno()), str(self._memory))
        command = child.command("leanserve.serving.decoder_process", *arguments)
        with theirs:
            self._child = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)


def _send(pipe: Connection, sent: Any) -> None:
    """Send anything; large parts of it, as bodies and arrays are, are not copied for that."""
    parts: list[pickle.PickleBuffer] = []
    head = pickle.dumps(sent, _PROTOCOL, buffer_callback=parts.append)
    pipe.send_bytes(len(parts).to_bytes(4, "little"))
    for part in parts:
        pipe.send_bytes(part.raw())
    pipe.send_bytes(head)


def _received(pipe: Connection) -> Any:
    count = int.from_bytes(pipe.recv_bytes(), "little")
    parts = [pipe.recv_bytes() for _ in range(count)]
    return pickle.loads(pipe.recv_bytes(), buffers=parts)


def _answer(decoding: Decoding[Any], memory: int) -> tuple[Any, Exception | None]:
    try:
        return decoding.prepare().finish(), None
    except ServiceError as error:
        return None, error.with_traceback(None)
    except MemoryError:
        text = f"decoding the body takes more than {memory // 2**20} MB of memory (limits.decode_mb)"
        return None, BodyTooLarge(text)
    except Exception:  # the parent logs it under an id
        return None, RuntimeError(traceback.format_exc())


def _bound_memory(memory: int) -> None:
    """Have the kernel refuse what is beyond that, counted from what the libraries have taken (Linux)."""
    if sys.platform != "linux":
        return
    status = Path("/proc/self/status").read_text(encoding="ascii")
    taken = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (taken + memory, taken + memory))


def main(descriptor: str, memory: str) -> None:
    """Decode what comes until nobody is there any more."""
    from leanserve.codecs import arrays, images, text  # noqa: F401 - before memory is bounded

    give_back = _memory_returner()
    os.nice(NICENESS)
    warnings.filterwarnings("ignore", module=r"PIL\.")  # images are not ours
    _bound_memory(int(memory))
    pipe = Connection(int(descriptor))
    while True:
        try:
            decoding = _received(pipe)
        except EOFError:
            return
        _send(pipe, _answer(decoding, int(memory)))
        del decoding
        give_back()


def _memory_returner() -> Callable[[], object]:
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return (lambda: None) if trim is None else (lambda: trim(0))


if __name__ == "__main__":
    main(*sys.argv[1:])
