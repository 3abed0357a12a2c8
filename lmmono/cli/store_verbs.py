"""The verbs of `lmmono store`: they look after stores, and write them for other tools."""

from pathlib import Path
from typing import Annotated

import typer

from activation_store.printable import printable
from lmmono.cli.output import OutputTable, prints_rows

store_app = typer.Typer(help="Inspect, check and export activation stores.", no_args_is_help=True)

RunOrStore = Annotated[
    str,
    typer.Argument(metavar="RUN|STORE|LAKE", help="A run folder, a store, or ducklake:ADDRESS."),
]
DataPath = Annotated[
    str | None, typer.Option(metavar="FOLDER|s3://...", help="Where a lake keeps its data.")
]


@store_app.command()
@prints_rows
def info(place: RunOrStore, data_path: DataPath = None) -> OutputTable:
    """Summarise a store: hooks, tokens, activations, bytes.

    Example: lmmono store info runs/quickstart/crate
    """
    from dataclasses import asdict

    from lmmono.cli.querying import open_stores

    with open_stores([place], data_path) as store:
        about = asdict(store.info()) | {"path": str(store.path)}
    rows = [(name, list(v) if isinstance(v, tuple) else v) for name, v in about.items()]
    return OutputTable(("what", "value"), rows, is_report=True)


@store_app.command()
def verify(
    place: RunOrStore,
    repair: Annotated[
        bool, typer.Option("--repair", help="Drop what cannot be read, and say what was dropped.")
    ] = False,
    data_path: DataPath = None,
) -> None:
    """Check every byte of a store; exit code 2 if it is not whole.

    Example: lmmono store verify runs/quickstart/crate
    """
    import activation_store as astore
    from lmmono.cli.querying import store_address

    report = astore.verify(store_address(place), repair=repair, data_path=data_path)
    print(printable(str(report)))
    raise typer.Exit(0 if report.ok else 2)


@store_app.command("compact")
def store_compact(place: RunOrStore, data_path: DataPath = None) -> None:
    """Merge the small shards that many commits leave behind; the rows stay the same.

    Example: lmmono store compact runs/quickstart/crate
    """
    import activation_store as astore
    from lmmono.cli.querying import store_address

    print(printable(str(astore.compact(store_address(place), data_path=data_path))))


@store_app.command("export")
def store_export(
    place: RunOrStore,
    to: Annotated[
        str,
        typer.Option(help="Format: parquet, delphi, openai, openai-simulations or neuronpedia."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write; must be new or empty.")],
    hook: Annotated[
        list[str] | None, typer.Option(help="Hooks to export; openai and neuronpedia take one.")
    ] = None,
    data_path: DataPath = None,
) -> None:
    """Export a store for another tool, explanations and scores too where it has a place for them.

    Example: lmmono store export runs/quickstart/crate --to parquet --out exported
    """
    from lmmono.cli.querying import open_stores
    from lmmono.interop.store_export import export_store

    with open_stores([place], data_path) as store:
        print(printable(str(export_store(store, to, out, tuple(hook or ())))))
