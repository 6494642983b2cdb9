"""Locust users who send rows to every variant in turn and check the answers; variants show apart.

    locust -f loadtest/locustfile.py --host http://localhost:8000                            # with locust's page
    locust -f loadtest/locustfile.py --host http://localhost:8000 --headless -u 16 -r 16 -t 30s
    locust -f loadtest/locustfile.py --host http://localhost:8000 --rows photos/             # see loadtest/rows.py

Run from the repository root. Every user asks one variant after the other, so all variants meet the same load and any
number of users loads all of them; their throughput alone is what `compare.py` measures. One locust process makes a few
thousand requests per second; where that is the limit, add `--processes -1`.
"""

# mypy: disable-error-code="no-untyped-call, untyped-decorator"
# (locust types its classes, but neither its events nor its responses)

from __future__ import annotations

import itertools
import json
import logging
import random
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gevent  # type: ignore[import-untyped]
from locust import FastHttpUser, events, task
from locust.contrib.fasthttp import ResponseContextManager
from locust.env import Environment
from locust.rpc.protocol import Message
from locust.runners import MasterRunner, WorkerRunner
from rich.console import Console
from rich.table import Table

from loadtest.rows import LoadRow, rows_for
from loadtest.tally import Tally
from loadtest.target import TargetError, digits, serving_variants

log = logging.getLogger("leanserve.loadtest")
# Encoded on import: before the run time starts to count, and once for all worker processes, which are forks.
digits("png")


class Run:
    """The current test: what is sent to whom, and what came back. Locust gives its listeners no other shared place."""

    def __init__(self) -> None:
        self.options = Namespace()
        self.names: list[str] = []
        self.tallies: dict[str, Tally] = {}
        self.rows: list[LoadRow] = []
        self._rows_of = ""

    def load(self, host: str) -> None:
        """Read what is sent there, once. Raises `TargetError`."""
        if self._rows_of != host:
            self.rows, self._rows_of = rows_for(host, self.options.rows), host

    def start(self, host: str) -> None:
        """Look up the variants that this test is to load. Raises `TargetError`."""
        wanted = [name.strip() for name in self.options.variants.split(",") if name.strip()]
        self.names = serving_variants(host, wanted)
        self.load(host)
        self.tallies = {name: Tally() for name in self.names}

    def conclude(self) -> None:
        """Print the table and write the numbers, if a test was started at all."""
        if self.tallies:
            Console(width=100).print(summary(self.tallies))
            if self.options.summary_json:
                numbers = {name: tally.to_json() for name, tally in self.tallies.items()}
                Path(self.options.summary_json).write_text(json.dumps(numbers))

    def turns(self) -> Iterator[str]:
        """The variants in turn, for ever, from a random one on."""
        return itertools.islice(itertools.cycle(self.names), random.randrange(len(self.names)), None)


RUN = Run()


@events.init_command_line_parser.add_listener
def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--variants", default="", help="comma-separated names; default: all that are serving")
    parser.add_argument("--rows", default="auto", help="what is sent: auto, digits, random, a file or a folder")
    parser.add_argument("--wait-ms", type=float, default=0.0, help="pause of a user between two requests")
    parser.add_argument("--summary-json", default="", help="file for the numbers of each variant")


@events.init.add_listener
def prepare(environment: Environment, **_: Any) -> None:
    RUN.options = environment.parsed_options or Namespace()
    if isinstance(environment.runner, MasterRunner):
        environment.runner.register_message("tallies", collect)
    if environment.host and RUN.options.headless and not isinstance(environment.runner, MasterRunner):
        with suppress(TargetError):  # which the start of the test will meet again, and tell
            RUN.load(environment.host)  # before the run time starts to count
    gevent.sleep(0)  # lets gevent's clock catch up with the import, or the run time would end that much early


@events.test_start.add_listener
def start(environment: Environment, **_: Any) -> None:
    try:
        RUN.start(environment.host or "")
    except TargetError as error:
        log.error("%s", error)
        environment.process_exit_code = 2
        if environment.runner:
            environment.runner.quit()


@events.test_stop.add_listener
def stop(environment: Environment, **_: Any) -> None:
    """The page shows the table at the end of every test; a worker process hands over what it counted."""
    if isinstance(environment.runner, WorkerRunner):
        environment.runner.send_message("tallies", {name: tally.to_json() for name, tally in RUN.tallies.items()})
    elif not RUN.options.headless:
        RUN.conclude()


@events.quit.add_listener
def finish(**_: Any) -> None:
    """Without the page there is one test; only now have all worker processes handed over their counts."""
    if RUN.options.headless and not RUN.options.worker:
        RUN.conclude()


def collect(msg: Message, **_: Any) -> None:
    for name, tally in msg.data.items():
        RUN.tallies.setdefault(name, Tally()).add(Tally.from_json(tally))


def summary(tallies: dict[str, Tally]) -> Table:
    """One line per variant."""
    table = Table("variant", title="Variants under the same load")
    for column in ("requests", "req/s", "p50 ms", "p95 ms", "p99 ms", "errors", "right %"):
        table.add_column(column, justify="right")
    for name, tally in tallies.items():
        percentiles = [f"{tally.percentile(share):.2f}" for share in (0.5, 0.95, 0.99)]
        requests = str(tally.answers + tally.errors)
        table.add_row(name, requests, f"{tally.rate:.1f}", *percentiles, str(tally.errors), tally.right_percent)
    return table


class Visitor(FastHttpUser):
    """A caller who sends one row after the other."""

    def on_start(self) -> None:
        self.turns = RUN.turns()

    def wait_time(self) -> float:
        """Seconds between two requests, as locust asks."""
        return float(RUN.options.wait_ms) / 1e3

    @task
    def predict(self) -> None:
        name, row = next(self.turns), random.choice(RUN.rows)
        headers = {**row.headers, "x-variant": name}
        body: Any = row.body  # bytes, which locust's documentation allows and its types forget
        path = row.path.format(variant=name)
        with self.client.post(
            path, name=f"predict {name}", data=body, headers=headers, catch_response=True
        ) as response:
            judge(response, name, row)


def judge(response: ResponseContextManager, name: str, row: LoadRow) -> None:
    """Count a response for its variant; what is not an answer of that variant is an error to locust, too."""
    began, milliseconds = response.request_meta["start_time"], response.request_meta["response_time"]
    try:
        response.raise_for_status()
        variant = None if response.headers is None else response.headers.get("x-variant")
        if variant != name:
            raise ValueError(f"answered by {variant!r}")
        right = None if row.label is None else str(json.loads(response.content).get("label")) == row.label
    except Exception as error:  # whatever is wrong with an answer, this test is there to count it
        RUN.tallies[name].error(began)
        response.failure(error)
    else:
        RUN.tallies[name].answer(began, milliseconds, right=right)
