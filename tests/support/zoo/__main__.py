"""`make zoo`: bring every model of the zoo and print the table.

A run may be stopped at any time: each result is stored and told as soon as it is there, the table is written anew with
it, and what was served right before is not tried again.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from zoo.catalogue import MODELS, ZooModel
from zoo.trial import Outcome, Trial, stored
from zoo.wheels import cache_folder

out = Console()
COLUMNS = (
    "model",
    "what",
    "accepted",
    "built",
    "serve / excluded",
    "error of the base",
    "answers",
    "speed-up",
    "seconds",
)


def main(
    only: Annotated[list[str] | None, typer.Option(help="Names of models (repeat the option).")] = None,
    again: Annotated[bool, typer.Option("--again", help="Also those whose results are stored.")] = False,  # noqa: FBT002
    keep: Annotated[Path | None, typer.Option(help="Folder that keeps configs, caches and logs.")] = None,
    measure_s: Annotated[
        float, typer.Option("--measure-seconds", help="Timing per model; 60 for speeds to quote.")
    ] = 5.0,
    limit_s: Annotated[
        float, typer.Option("--limit-seconds", help="Longest that a model may take, from init to its last answer.")
    ] = 900.0,
    markdown: Annotated[
        Path | None, typer.Option(help="The table's file; by default table.md in the zoo's folder.")
    ] = None,
) -> None:
    """Try the models, and end with status 1 if one that was tried is not served right."""
    models = [model for model in MODELS if not only or model.name in only]
    outcomes: list[Outcome] = []
    table_path = markdown or cache_folder() / "table.md"
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("zoo", total=len(models))
        for model in models:
            progress.update(task, description=model.name)
            outcome = _outcome(model, keep, Trial(measure_s, limit_s), fresh=again)
            outcomes.append(outcome)
            table_path.write_text(_markdown(models, outcomes), encoding="utf-8")
            progress.console.print(_line(outcome), highlight=False, markup=False)
            progress.advance(task)
    out.print(_table(models, outcomes))
    raise typer.Exit(int(not all(outcome.right for outcome in outcomes)))


def _line(outcome: Outcome) -> str:
    """What became of a model, in a line."""
    told = "right" if outcome.right else outcome.said or "its base answers otherwise"
    return f"{outcome.name}: {told} ({outcome.seconds:.0f} s)"


def _outcome(model: ZooModel, keep: Path | None, trial: Trial, *, fresh: bool) -> Outcome:
    path = cache_folder() / "results" / f"{model.name}.json"
    known = None if fresh else stored(path)
    if known is not None and known.right and (known.answers is None) == (model.answers is None):
        return known
    path.parent.mkdir(parents=True, exist_ok=True)
    if keep is None:
        with tempfile.TemporaryDirectory(prefix="leanserve-zoo-") as temporary:
            outcome = trial.of(model, Path(temporary))
    else:
        folder = keep.resolve() / model.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        outcome = trial.of(model, folder)
    path.write_text(outcome.model_dump_json(), encoding="utf-8")
    return outcome


def _cells(model: ZooModel, outcome: Outcome) -> tuple[str, ...]:
    return (
        model.name,
        model.what,
        "yes" if outcome.accepted else "no",
        "yes" if outcome.built else "no",
        f"{len(outcome.serving)} / {len(outcome.excluded)}",
        "" if outcome.error is None else f"{outcome.error:.1g}",
        "" if outcome.answers is None else "{} of {}".format(*outcome.answers),
        f"{outcome.speed:.1f}x",
        f"{outcome.seconds:.0f}",
    )


def _table(models: Sequence[ZooModel], outcomes: Sequence[Outcome]) -> Table:
    right = sum(outcome.right for outcome in outcomes)
    table = Table(*COLUMNS, title=f"{right} of {len(outcomes)} models are served and answer like the original")
    for model, outcome in zip(models, outcomes, strict=False):
        table.add_row(*_cells(model, outcome))
    return table


def _markdown(models: Sequence[ZooModel], outcomes: Sequence[Outcome]) -> str:
    rows = [COLUMNS, ("---",) * len(COLUMNS), *map(_cells, models, outcomes)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


if __name__ == "__main__":
    typer.run(main)
