"""Progress of a build: bars with time left on a terminal, one plain line now and then elsewhere; and for who waits."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from leanserve.telemetry.startup import BuildNews

PLAIN_INTERVAL_S = 10.0
TOLD_INTERVAL_S = 0.2

Tell = Callable[[BuildNews], None]


def tell_by(descriptor: int | None) -> Tell:
    """Writes every news as a line to this file descriptor; the build ends when its other end is closed."""
    if descriptor is None:
        return _nobody
    lines = os.fdopen(descriptor, "w", buffering=1, encoding="utf-8")

    def write(news: BuildNews) -> None:
        try:
            lines.write(news.to_line())
        except BrokenPipeError:
            sys.exit(1)

    return write


def _nobody(_: BuildNews) -> None:
    """Nobody waits to be told."""


class BuildProgress:
    """Shows all artifacts to be made, and the inside of the pass at work. It is the `Progress` that passes call.

    `tell` is told the same, a few times a second: whoever started the build waits for it.
    """

    def __init__(self, console: Console, total: int, tell: Tell = _nobody) -> None:
        self._tell = tell
        self._news = BuildNews(None, "", 0, total)
        self._told_at = 0.0
        self._console = console
        self._done = 0
        self._total = total
        self._label = ""
        self._shown_at = time.monotonic()
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._all: TaskID = self._bars.add_task("artifacts", total=total, note="")
        self._inner: TaskID | None = None

    @contextmanager
    def running(self) -> Iterator[BuildProgress]:
        """Show the bars while the block runs."""
        with self._bars:
            yield self

    @contextmanager
    def artifact(self, variant: str | None, step: str) -> Iterator[None]:
        """One artifact is being made, for a variant; or, without one, all are being timed."""
        label = f"{variant}: {step}" if variant else step
        self._label = label
        self._news = BuildNews(variant, step, self._done, self._total)
        self._tell(self._news)
        self._inner = self._bars.add_task(f"  {escape(label)}", total=None, note="")
        started = time.monotonic()
        try:
            yield
        finally:
            self._bars.remove_task(self._inner)
            self._inner = None
        self._done += 1
        self._bars.update(self._all, completed=self._done)
        self.say(f"[{self._done}/{self._total}] {label}: {time.monotonic() - started:.1f} s")

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._console.print(escape(text), highlight=False, soft_wrap=True)

    def __call__(self, done: float, total: float, note: str = "") -> None:
        """Told by a pass how far it is."""
        if self._inner is not None:
            self._bars.update(self._inner, completed=done, total=total, note=escape(note))
        now = time.monotonic()
        if now - self._told_at > TOLD_INTERVAL_S:
            self._told_at = now
            self._tell(replace(self._news, share=min(1.0, done / max(total, 1e-9))))
        if not self._console.is_terminal and now - self._shown_at > PLAIN_INTERVAL_S:
            self._shown_at = now
            self.say(f"  {self._label}: {done / max(total, 1e-9):.0%} {note}")
