"""The verbs of `lmmono toy`: studies so small that every part of them is known."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lmmono.cli.output import OutputTable, prints_rows

toy_app = typer.Typer(help="Toy experiments with known ground truth.", no_args_is_help=True)


@toy_app.callback()
def toy() -> None:
    """Toy experiments with known ground truth."""


@toy_app.command("superposition")
@prints_rows
def toy_superposition(
    p: Annotated[float, typer.Option(help="Probability that a feature is present.")] = 0.05,
    targets: Annotated[
        str,
        typer.Option(help="What to predict: all features, or those that the code keeps (coded)."),
    ] = "all",
    n_train: Annotated[
        list[int] | None, typer.Option(help="Number of training samples; repeatable.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of repetitions.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of each code.")] = 2_000,
    store: Annotated[Path | None, typer.Option(help="Store to append the rows to.")] = None,
) -> Sequence[OutputTable]:
    """Ask whether codes that keep features apart learn better under noise; errors and moments.

    Example: lmmono toy superposition --p 0.05 --n-train 200 --n-train 1000
    """
    from lmmono.cli.terminal import shown_progress
    from lmmono.reports.toy_tables import superposition_tables
    from lmmono.toy.superposition import superposition, toy_settings

    settings = toy_settings(p, targets, n_train, seeds, steps)
    with shown_progress() as progress:
        study = superposition(settings, into=store, progress=progress)
    return [
        OutputTable(t.columns, t.rows, t.title, t.note, is_report=True)
        for t in superposition_tables(study)
    ]
