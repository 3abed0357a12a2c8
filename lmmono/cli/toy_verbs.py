"""The verbs of `lmmono toy`: studies so small that every part of them is known."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from lmmono.cli.output import OutputTable, prints_rows

toy_app = typer.Typer(help="Small studies whose every part is known.", no_args_is_help=True)


@toy_app.callback()
def toy() -> None:
    """Small studies whose every part is known."""


@toy_app.command("superposition")
@prints_rows
def toy_superposition(
    p: Annotated[float, typer.Option(help="Probability that a feature is there.")] = 0.05,
    targets: Annotated[
        str, typer.Option(help="all, or coded: what monosemantic codes keep.")
    ] = "all",
    n_train: Annotated[list[int] | None, typer.Option(help="Training samples.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Steps in which codes are learned.")] = 2_000,
    store: Annotated[Path | None, typer.Option(help="Store to write the rows to.")] = None,
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
