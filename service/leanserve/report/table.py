"""Whether a compressed variant still answers right, and what it costs: the report, as tables and as one page.

The numbers come from the manifests alone, so a report needs neither the model nor its data. Excluded variants are shown
with the gate's reason: a variant that silently vanished would be the worst result of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.measure import Measurement, measure_renderables
from rich.table import Table
from rich.text import Text

from leanserve.artifacts.manifest import VariantReport
from leanserve.report.columns import AT_WORST, Column, OutputMeasure, answers, by_output, footprint, speed, waterfall
from leanserve.report.headline import hardware, headline
from leanserve.report.summary import HourlyPrice, MeasuredArtifact, Summary, VariantSummary, summarise

if TYPE_CHECKING:
    from rich.console import Console

NAME, NAME_IN_FILE, ANY = 4, 15, 10_000
"""Characters that a name has at least, on a terminal and elsewhere; and a width for anything."""
STYLES = {"serving": "", "excluded": "red", "reference": "dim"}


def print_table(
    reports: Sequence[VariantReport],
    console: Console,
    caveats: Sequence[str] = (),
    elsewhere: str = "",
    price: HourlyPrice | None = None,
) -> None:
    """Print the verdict, tables of answers and of cost, and every variant's gains pass by pass.

    Nothing is cut off at any width: where the console is narrow, names wrap, and where that is not enough, lines are
    longer than it. `elsewhere` tells that the numbers were measured on another machine; it is printed, and what depends
    on the machine is marked.

    Raises:
        ValueError: there is no variant to report.
    """
    summary = summarise(reports, caveats, elsewhere, price)
    console.print(_verdict(summary))
    _print(console, _variants_table(summary))
    told = answers(summary.measured)
    _print(console, _numbers_table("Answers", [column for column in told if column not in AT_WORST], summary))
    _print(console, _numbers_table("Answers, at worst", [column for column in told if column in AT_WORST], summary))
    if by_output(summary.measured):
        _print(console, _outputs_table(summary))
    _print(
        console,
        _numbers_table(f"Cost: speed{summary.mark}", speed(summary.measured, summary.batches, summary.price), summary),
    )
    _print(console, _numbers_table(f"Cost: size and building{summary.mark}", footprint(summary.measured), summary))
    for variant in summary.variants:
        if variant.passes:
            _print(console, _waterfall_table(variant, summary))
    for line in hardware(summary):
        console.print(Text(line, style="dim"))


def write_html(
    reports: Sequence[VariantReport],
    path: Path,
    title: str,
    caveats: Sequence[str] = (),
    elsewhere: str = "",
    price: HourlyPrice | None = None,
) -> None:
    """Write the report as one HTML file that needs nothing else: styles and plots are inside.

    The same reports give the same bytes. Missing parent folders are made. `elsewhere` as for `print_table`.

    Raises:
        ValueError: there is no variant to report.
        OSError: the file cannot be written.
    """
    from leanserve.report.page import render

    text = render(summarise(reports, caveats, elsewhere, price), title)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _verdict(summary: Summary) -> Text:
    words = headline(summary)
    text = Text()
    if words.name:
        text.append(words.name, style="bold green").append(" ")
    text.append(words.claim, style="bold")
    text.append(f"\n{words.rule}", style="dim")
    for doubt in filter(None, (summary.elsewhere, words.caveat, words.caution)):
        text.append(f"\n{doubt}", style="yellow")
    return text


def _variants_table(summary: Summary) -> Table:
    table = _table("Variants", ("variant", "passes", "state"), ())
    for variant in summary.variants:
        state = Text(variant.state, style=STYLES[variant.state])
        if variant.reason:
            state.append(f": {variant.reason}")
        if variant.doubt:
            state.append(f"; {variant.doubt}", style="yellow")
        table.add_row(_name(variant, summary), Text(variant.flow), state)
    for unmade in summary.unmade:
        table.add_row(
            Text(unmade.name), Text("–"), Text("excluded", style=STYLES["excluded"]).append(f": {unmade.reason}")
        )
    return table


def _numbers_table(title: str, columns: Sequence[Column], summary: Summary) -> Table:
    table = _table(title, ("variant",), columns)
    for variant in summary.variants:
        table.add_row(_name(variant, summary), *_cells(columns, variant.measured))
    return table


def _outputs_table(summary: Summary) -> Table:
    """A row for every output of every variant."""
    measures = by_output(summary.measured)
    table = _table("Answers, output by output", ("variant", "output", "meaning"), measures)
    for variant in summary.variants:
        for output in variant.measured.quality.outputs:
            cells = [measure.cell(output) for measure in measures]
            table.add_row(_name(variant, summary), Text(output.name), Text(output.meaning), *cells)
    return table


def _waterfall_table(variant: VariantSummary, summary: Summary) -> Table:
    columns = waterfall(summary.measured, summary.batches)
    table = _table(f"{variant.name}, pass by pass{summary.mark}", ("after",), columns)
    for step in variant.steps:
        table.add_row(Text(step.measured.label), *_cells(columns, step.measured))
    return table


def _name(variant: VariantSummary, summary: Summary) -> Text:
    return Text(variant.name, style="bold green" if variant is summary.cheapest else STYLES[variant.state])


def _cells(columns: Iterable[Column], measured: MeasuredArtifact) -> list[str]:
    return [column.cell(measured) for column in columns]


def _print(console: Console, table: Table) -> None:
    """Where numbers would leave too little for names, the lines are longer than the console is wide."""
    name = NAME if console.is_terminal else NAME_IN_FILE
    width, options = console.width, console.options.update(max_width=ANY)
    found = [measure_renderables(console, options, tuple(column.cells)) for column in table.columns]
    between = Measurement.get(console, options, table).minimum - sum(cells.minimum for cells in found)
    least = [
        cells.maximum if column.no_wrap else min(cells.minimum, name)
        for column, cells in zip(table.columns, found, strict=True)
    ]
    console.width = max(width, between + sum(least))
    console.print(table)
    console.width = width


def _table(title: str, words: Iterable[str], columns: Iterable[Column | OutputMeasure]) -> Table:
    """An empty table: columns of words may wrap, columns of numbers may not."""
    table = Table(
        title=Text(title, style="bold"), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for word in words:
        table.add_column(word, overflow="fold")
    for column in columns:
        table.add_column(column.title, justify="right", no_wrap=True)
    return table
