"""`leanserve experiment`: the verbs of `/v1/experiment` on a service that runs, and a table of how it goes."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import NamedTuple

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from leanserve.contracts import Json
from leanserve.errors import StartupError

TIMEOUT_S = 30.0
_COLOURS = {"passed": "green", "failed": "red", "open": "yellow", "promoted": "green", "rejected": "red"}


class RunningService(NamedTuple):
    """Where a service listens, and the key for it, if it asks for one."""

    url: str
    key: str | None = None

    def document(self) -> Json:
        """Traffic and the experiment on it."""
        return self._asked("GET", "", None)

    def act(self, verb: str, body: Mapping[str, Json]) -> Json:
        """Start, promote or abort; the document afterwards."""
        return self._asked("POST", f"/{verb}", body)

    def _asked(self, method: str, path: str, body: Mapping[str, Json] | None) -> Json:
        """A reply's JSON. Raises `StartupError` in words for whoever typed the command."""
        sent = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {self.key}"} if self.key else {})
        try:
            address = f"{self.url.rstrip('/')}/v1/experiment{path}"
            request = urllib.request.Request(address, sent, headers, method=method)
            if request.type not in {"http", "https"}:
                raise StartupError(f"--url {self.url}: it starts with http:// or https://")
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise StartupError(f"{self.url} refuses ({error.code}): {_error_text(error)}") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise StartupError(f"{self.url} does not answer: {reason}; is it running, and is --url right?") from None


def _error_text(error: urllib.error.HTTPError) -> str:
    try:
        return str(json.load(error)["error"])
    except (ValueError, KeyError, TypeError):
        return error.reason


def watch(service: RunningService, console: Console, every_s: float) -> None:
    """Show how it goes until the experiment is over, or for as long as somebody looks where there is none."""
    with Live(console=console, auto_refresh=False) as shown:
        while True:
            document = service.document()
            shown.update(overview(document), refresh=True)
            experiment = document["experiment"]
            if experiment is not None and experiment["state"] != "running":
                return
            time.sleep(every_s)


def overview(document: Json) -> RenderableType:
    """Traffic and experiment for the terminal."""
    experiment = document["experiment"]
    if experiment is None:
        could = ", ".join(document["candidates"]) or "no variant"
        return Group(_traffic(document["traffic"]), Text(f"no experiment yet; {could} could be a candidate"))
    return Group(_traffic(document["traffic"]), _heading(experiment), _questions(experiment), _footing(experiment))


def _traffic(traffic: Json) -> Text:
    shares = ", ".join(f"{name} {100 * share:.4g} %" for name, share in traffic["shares"].items() if share)
    return Text(f"traffic: {shares or 'nobody serves'} (by the {traffic['decided_by']})")


def _heading(told: Json) -> Text:
    colour = _COLOURS.get(told["state"], "yellow")
    text = Text.from_markup(f"[bold]{escape(told['name'])}[/]: [bold]{escape(told['candidate'])}[/] ")
    text.append(f"beside {told['base']} is ")
    text.append(told["state"], style=f"bold {colour}")
    stages = " ".join(f"[{100 * s:g}]" if n == told["stage"] else f"{100 * s:g}" for n, s in enumerate(told["stages"]))
    return text.append(f" with {100 * told['share']:.4g} % of the traffic (stages {stages} %)")


def _questions(told: Json) -> Table:
    table = Table("question", "answer", "seen", "interval", "limit", "evidence", "of")
    for item in told["questions"]:
        form = _percent if item["unit"] == "share" else _times
        colour = _COLOURS.get(item["answer"], "default")
        limit = f"{'≥' if item['good'] == 'above' else '≤'} {form(item['limit'])}"
        table.add_row(
            item["question"],
            f"[{colour}]{item['answer']}[/]",
            form(item["estimate"]),
            f"{form(item['low'])} … {form(item['high'])}",
            limit,
            _evidence(item["evidence"]),
            f"{item['observations']:,.0f}",
        )
    return table


def _evidence(evidence: Json) -> str:
    if evidence is None:
        return "–"
    promote, reject = (max(0.0, min(1.0, evidence[side] or 0.0)) for side in ("promote", "reject"))
    return f"{100 * promote:.0f} % for, {100 * reject:.0f} % against"


def _footing(told: Json) -> Text:
    pairs, shadow = told["counts"]["pairs"], told["counts"]["shadow"]
    foreseen = told["requests_to_decision"]
    when = "" if foreseen is None or told["state"] != "running" else f", a decision is foreseen after {foreseen:,.0f}"
    dropped = sum(shadow["dropped"].values())
    lines = [
        f"{told['requests']:,.0f} requests{when}; {pairs['rows']:,.0f} rows compared, {dropped:,} batches dropped, "
        f"{100 * shadow['time_share']:.2g} % of the device's time",
        *(f"{name}: {item['per_million']:.4g} per million rows" for name, item in told["cost"].items() if item),
        *told["self_check"]["problems"],
        told["reason"] if told["state"] != "running" else told["verdict_reason"],
    ]
    return Text("\n".join(lines))


def _percent(value: float | None) -> str:
    return "?" if value is None else f"{100 * value:.4g} %"


def _times(value: float | None) -> str:
    return "?" if value is None else f"{value:.3g}×"
