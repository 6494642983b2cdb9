"""What runs in a worker: opens one backend, then answers batches until the service closes the channels.

Every lane of the service that may run batches here at once has a channel, and a thread of this process that stands for
it. The first of them opens the backend, as a lane does. The worker ends with the service (`child.py`), and by nothing
that a terminal or a supervisor sends to all processes at once: the service drains first.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress

from leanserve.contracts import Backend, Result
from leanserve.errors import BadInput, DeviceLost
from leanserve.memory import forget, is_out_of_memory
from leanserve.runtime.isolation.channel import BatchChannel
from leanserve.runtime.linux.denormals import flush_denormals
from leanserve.runtime.linux.processors import keep_on
from leanserve.runtime.unused_memory import give_back

NICE = 10
"""While it reads a model, which is the main thread's work; what runs batches has the usual priority."""
IDLE_S = 1.0
"""After the first so long pause, what warming up has left behind is given back."""
ReadModel = Callable[[], Callable[[], Backend]]
"""Reads a model, which may take long, and returns what is left to do: to open a backend for it."""


def serve_backend(descriptors: str, read: ReadModel, seat: Sequence[int] = ()) -> None:
    """Answer batches on the channels with these `descriptors`; returns when the service has closed them.

    The backend is run on the processors of `seat`, where that says any.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    numbers = [int(number) for number in descriptors.split(",")]
    channels = [BatchChannel.inherited(*numbers[start : start + 3]) for start in range(0, len(numbers), 3)]
    with suppress(EOFError, OSError):  # the service closed it, or is gone
        _Worker(channels, seat).run(read)


class _Worker:
    """The backend of this process, and the threads that run it."""

    def __init__(self, channels: Sequence[BatchChannel], seat: Sequence[int]) -> None:
        self._first, *self._others = channels
        self._seat = seat
        self._ready = threading.Event()
        self._read_done = threading.Event()
        self._open: Callable[[], Backend] | None = None
        self._backend: Backend | None = None
        self._tidy = False

    def run(self, read: ReadModel) -> None:
        # These threads are there before the main one steps back, and what they start inherits the usual priority.
        threads = [threading.Thread(target=self._open_and_serve)]
        threads += [threading.Thread(target=self._serve, args=(channel,)) for channel in self._others]
        for thread in threads:
            thread.start()
        _step_back()
        try:
            self._open = read()
        except BaseException as error:
            self._fail(error)
        self._read_done.set()
        for thread in threads:
            thread.join()

    def _fail(self, error: BaseException) -> None:
        self._first.refuse(error, _last_words(error))
        os._exit(1)

    def _open_and_serve(self) -> None:
        self._read_done.wait()
        assert self._open is not None
        try:
            self._backend = backend = self._open()
            told = {"name": backend.name, "device": backend.device, "row_buckets": list(backend.row_buckets)}
        except BaseException as error:
            self._fail(error)
        self._open = None
        self._first.tell(told | {"self_contained": backend.self_contained})
        self._ready.set()
        self._serve(self._first)

    def _serve(self, channel: BatchChannel) -> None:
        self._ready.wait()
        flush_denormals()
        if self._seat:
            keep_on(threading.get_native_id(), self._seat)
        used = False
        with suppress(EOFError, OSError):
            while True:
                if used and not select.select([channel.link], [], [], IDLE_S)[0]:
                    give_back()
                    used = False
                    self._tidy = True
                self._run_next(channel)
                used = not self._tidy

    def _run_next(self, channel: BatchChannel) -> None:
        places = channel.receive()
        assert self._backend is not None
        try:
            result = self._backend.run(channel.inputs.read(places))
            channel.answer(Result(tuple(result.outputs), result.facts))
        except BaseException as error:
            told = traceback.format_exc()
            if isinstance(error, DeviceLost):  # the service finds the worker gone, and starts another
                sys.stderr.write(told)
                sys.stderr.flush()
                os._exit(1)
            channel.refuse(error, str(error) if isinstance(error, BadInput) or is_out_of_memory(error) else told)
            if is_out_of_memory(error):
                forget(error)


def _last_words(error: BaseException) -> str:
    return "".join(traceback.format_exception_only(error)).strip()


def _step_back() -> None:
    if sys.platform == "linux":
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
