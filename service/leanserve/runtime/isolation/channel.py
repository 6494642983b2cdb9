"""One batch at a time between the service and a worker: the rows in shared memory, a token of some bytes on a socket.

A batch of an encoder takes milliseconds; a token there and back takes 12 microseconds, through pipes of Python's own
multiprocessing 57. Messages are JSON of one packet each: no code travels, and whoever ends lets the other read an end.
"""

from __future__ import annotations

import socket
from typing import Any, NamedTuple, Self

import orjson

from leanserve.contracts import Arrays, Json, Result
from leanserve.errors import BadInput
from leanserve.memory import is_out_of_memory
from leanserve.runtime.isolation.slab import Slab

PACKET = 128 << 10
"""Bytes of the longest message, which is less than a socket takes at once."""
TEXT = 16_000
"""Characters of an error's text that are told."""


class IsolatedRunFailed(Exception):
    """The backend raised in its worker; the text is the stack there."""


class BatchChannel(NamedTuple):
    """One end of it: a socket, memory into which the service writes inputs, and memory into which the worker writes."""

    link: socket.socket
    inputs: Slab
    outputs: Slab

    @classmethod
    def pair(cls) -> tuple[Self, socket.socket]:
        """The service's end, and the socket of the worker's, whose memory is the same."""
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(here, Slab.create(), Slab.create()), there

    @classmethod
    def inherited(cls, link: int, inputs: int, outputs: int) -> Self:
        """The worker's end, from the descriptors that it was started with."""
        return cls(socket.socket(fileno=link), Slab(inputs), Slab(outputs))

    def ask(self, batch: Arrays) -> Result:
        """Have a batch run, and wait for what comes of it.

        Raises:
            EOFError: the worker has ended. TimeoutError: it took longer than the socket's timeout.
            BadInput, MemoryError, IsolatedRunFailed: what the backend raised.
        """
        try:
            self.link.send(orjson.dumps(self.inputs.write(batch), option=orjson.OPT_SERIALIZE_NUMPY))
            told = self.receive()
        except (BrokenPipeError, ConnectionResetError) as error:
            raise EOFError from error
        raise_refusal(told, IsolatedRunFailed)
        outputs = tuple([view.copy() for view in self.outputs.read(told["outputs"])])
        return Result(outputs, told["facts"])

    def answer(self, result: Result) -> None:
        """Tell the outputs of a batch."""
        self._send({"outputs": self.outputs.write(result.outputs), "facts": dict(result.facts)})

    def refuse(self, error: BaseException, text: str) -> None:
        """Tell that a batch failed, and how."""
        kind = "bad_input" if isinstance(error, BadInput) else "out_of_memory" if is_out_of_memory(error) else "other"
        self._send({"failure": kind, "text": text[-TEXT:]})

    def tell(self, what: Json) -> None:
        """Say something else."""
        self._send(what)

    def receive(self) -> Any:
        """The next message.

        Raises:
            EOFError: there will be none; the other end was closed. TimeoutError: it took too long.
        """
        message = self.link.recv(PACKET)
        if not message:
            raise EOFError
        return orjson.loads(message)

    def close(self) -> None:
        self.link.close()
        self.inputs.close()
        self.outputs.close()

    def _send(self, what: Json) -> None:
        self.link.send(orjson.dumps(what, option=orjson.OPT_SERIALIZE_NUMPY))


def raise_refusal(told: Json, otherwise: type[Exception]) -> None:
    """Raise what the worker refused with, if it did: `BadInput`, `MemoryError`, or anything else as `otherwise`."""
    if "failure" in told:
        kinds = {"bad_input": BadInput, "out_of_memory": MemoryError}
        raise kinds.get(told["failure"], otherwise)(told["text"])
