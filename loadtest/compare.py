"""The A/B table: every variant alone under the same load, in interleaved rounds, against a reference variant.

    python -m loadtest.compare --host http://localhost:8000 --rounds 3 --users 16 --seconds 10 --markdown ab.md

Each measurement is a fresh headless locust. The order of the variants turns around with every round, so that a machine
that gets slower (heat, neighbours) does not favour whoever comes first, and gains are ratios *within* a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from loadtest.tally import Tally
from loadtest.target import TargetError, serving_variants

ROOT = Path(__file__).parents[1]
COLUMNS = ("variant", "req/s", "gain", "p50 ms", "p95 ms", "p99 ms", "errors", "right %")


@dataclass(frozen=True, slots=True)
class Load:
    """The load that every variant gets: `users` callers in a closed loop for `seconds`."""

    host: str
    users: int
    seconds: float
    rows: str = "auto"


def measure(load: Load, variant: str) -> Tally:
    """Load one variant with locust. Raises `TargetError` if locust could not do so."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "summary.json"
        options = {
            "--host": load.host,
            "--users": load.users,
            "--spawn-rate": load.users,
            "--run-time": f"{max(1, round(load.seconds))}s",
            "--variants": variant,
            "--rows": load.rows,
            "--summary-json": file,
        }
        command = [sys.executable, "-m", "locust", "-f", "loadtest/locustfile.py", "--headless", "--only-summary"]
        command += [str(part) for option in options.items() for part in option]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        # Locust exits with 1 where requests failed: these are counted. Without a summary it did not run.
        if not file.exists():
            raise TargetError(f"locust could not load {variant!r} (exit {done.returncode}):\n{done.stderr[-2000:]}")
        return Tally.from_json(json.loads(file.read_text())[variant])


def measure_rounds(load: Load, variants: Sequence[str], rounds: int) -> dict[str, list[Tally]]:
    """One tally per variant and round, the order turned around with every round."""
    results: dict[str, list[Tally]] = {name: [] for name in variants}
    for turn in range(rounds):
        for name in variants if turn % 2 == 0 else reversed(variants):
            tally = measure(load, name)
            results[name].append(tally)
            print(f"round {turn + 1}/{rounds}  {name}: {tally.rate:.1f} req/s", file=sys.stderr)
    return results


def table_rows(results: dict[str, list[Tally]], reference: str) -> list[tuple[str, ...]]:
    """The cells of the A/B table; rates and gains are medians over rounds, gains with their range."""
    return [_row(name, tallies, results[reference]) for name, tallies in results.items()]


def _row(name: str, tallies: list[Tally], reference: list[Tally]) -> tuple[str, ...]:
    whole = Tally()
    for tally in tallies:
        whole.add(tally)
    percentiles = (f"{whole.percentile(share):.2f}" for share in (0.5, 0.95, 0.99))
    rate = statistics.median(tally.rate for tally in tallies)
    return (name, f"{rate:.1f}", _gain(tallies, reference), *percentiles, str(whole.errors), whole.right_percent)


def _gain(tallies: list[Tally], reference: list[Tally]) -> str:
    if tallies is reference:
        return "1 (reference)"
    ratios = [one.rate / other.rate for one, other in zip(tallies, reference, strict=True) if other.rate]
    if not ratios:
        return "-"
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


def markdown(rows: Sequence[Sequence[str]], load: Load, rounds: int) -> str:
    """The table as GitHub markdown, with the load that it was measured under."""
    lines = [COLUMNS, ["---"] + ["---:"] * (len(COLUMNS) - 1), *rows]
    body = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    note = f"{load.users} users in a closed loop, rows: {load.rows}, {rounds} interleaved rounds of {load.seconds:g} s."
    return f"{body}\n\n{note} Gain: requests per second against the reference, median (range) over rounds.\n"


def _show(rows: Sequence[Sequence[str]]) -> None:
    table = Table(COLUMNS[0], title="Variants, each alone under the same load")
    for column in COLUMNS[1:]:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest.compare", description=__doc__.partition("\n")[0])
    parser.add_argument("--host", default="http://localhost:8000")
    parser.add_argument("--variants", default="", help="comma-separated names; default: all that are serving")
    parser.add_argument("--reference", default="", help="the variant that gains are relative to; default: the first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of one measurement")
    parser.add_argument("--rows", default="auto", help="see loadtest/rows.py")
    parser.add_argument("--markdown", type=Path, help="file for the table as markdown")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print and write the table; 2 if the server or the choice of variants is not usable."""
    options = _arguments(argv)
    load = Load(options.host, options.users, options.seconds, options.rows)
    try:
        wanted = [name.strip() for name in options.variants.split(",") if name.strip()]
        variants = serving_variants(load.host, wanted)
        reference = options.reference or variants[0]
        if reference not in variants:
            raise TargetError(f"reference {reference!r} is not among the variants measured: {', '.join(variants)}")
        results = measure_rounds(load, variants, options.rounds)
    except TargetError as error:
        print(error, file=sys.stderr)
        return 2
    rows = table_rows(results, reference)
    _show(rows)
    if options.markdown:
        options.markdown.write_text(markdown(rows, load, options.rounds))
    return 0


if __name__ == "__main__":
    sys.exit(main())
