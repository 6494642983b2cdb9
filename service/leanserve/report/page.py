"""The report as one HTML page that can be mailed, archived or opened without a network.

Everything is inside the file: style, plots and text. There is no script, so the page is also safe to open, and every
name and reason is escaped by the template.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from leanserve.artifacts.manifest import Manifest
from leanserve.contracts import Json
from leanserve.report.columns import ABSENT, Column, answers, by_output, footprint, speed
from leanserve.report.columns import waterfall as waterfall_columns
from leanserve.report.headline import hardware, headline, tiles
from leanserve.report.summary import Summary


def render(summary: Summary, title: str) -> str:
    """The page as text. The same summary and title give the same text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    from leanserve.report import plots

    folder = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(
        title=title,
        style=Markup((folder / "style.css").read_text(encoding="utf-8")),
        summary=summary,
        headline=headline(summary),
        tiles=tiles(summary),
        hardware=hardware(summary),
        samples=summary.reference.quality.samples,
        tables=_tables(summary),
        output_measures=by_output(summary.measured),
        steps=waterfall_columns(summary.measured, summary.batches),
        tradeoff=Markup(plots.tradeoff(summary)),
        sizes=Markup(plots.sizes(summary)),
        waterfalls={
            variant.number: Markup(plots.waterfall_plot(variant, summary.yardstick))
            for variant in summary.variants
            if variant.passes
        },
        barriers={variant.number: Markup(plots.barriers(variant)) for variant in summary.variants},
        details=_details,
        findings=_findings,
    )


def _tables(summary: Summary) -> tuple[tuple[str, tuple[Column, ...]], ...]:
    """Caption and columns of each table of numbers."""
    return (
        ("Does it still answer right?", answers(summary.measured)),
        (f"How fast is it?{summary.mark}", speed(summary.measured, summary.batches, summary.price)),
        (f"What else does it take?{summary.mark}", footprint(summary.measured)),
    )


def _findings(manifest: Manifest) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """What a pass found out, as it stands in its decisions under `tables`: name, columns, and the cells of each row."""
    for name, rows in manifest.decisions.get("tables", {}).items():
        columns = list(rows[0]) if rows else []
        yield name, columns, [[_cell(row[column]) for column in columns] for row in rows]


def _cell(value: Json) -> str:
    if value is None:
        return ABSENT
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _details(manifest: Manifest) -> str:
    """The options of a pass and the facts that it recorded, on one line."""
    options = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in manifest.options.items()]
    facts = [f"{name} {value:.4g}" for name, value in manifest.facts.items()]
    return " · ".join([*options, *facts])
