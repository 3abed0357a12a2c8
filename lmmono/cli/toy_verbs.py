"""The verbs of `lmmono toy`: studies so small that every part of them is known."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lmmono.toy.superposition import ToySettings

toy_app = typer.Typer(help="Small studies whose every part is known.", no_args_is_help=True)


@toy_app.callback()
def toy() -> None:
    """Small studies whose every part is known."""


@toy_app.command("superposition")
def toy_superposition(
    p: Annotated[float, typer.Option(help="Probability that a feature is there.")] = 0.05,
    targets: Annotated[
        str, typer.Option(help="all, or coded: what monosemantic codes keep.")
    ] = "all",
    n_train: Annotated[list[int] | None, typer.Option(help="Training samples.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions.")] = 5,
    steps: Annotated[int, typer.Option(min=1, help="Steps in which codes are learned.")] = 2_000,
    store: Annotated[Path | None, typer.Option(help="Store to write the rows to.")] = None,
) -> None:
    """Ask whether codes that keep features apart learn better under noise; errors and moments."""
    from lmmono.toy.superposition import toy_settings

    _run(toy_settings(p, targets, n_train, seeds, steps), store)


def _run(settings: "ToySettings", store: Path | None) -> None:
    """Run the study, write its rows where there is a store, and show its tables."""
    from lmmono.cli.terminal import show_table, shown_progress
    from lmmono.reports.toy_tables import superposition_tables
    from lmmono.toy.superposition import superposition

    with shown_progress() as progress:
        found = superposition(settings, into=store, progress=progress)
    for table in superposition_tables(found):
        show_table(table.columns, table.rows, title=table.title, note=table.note)
