"""Verbs that keep answering: pages for people, tools for programs."""

from pathlib import Path
from typing import Annotated

import typer

from activation_store.printable import printable

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or stores.")]
Seconds = Annotated[float, typer.Option(min=0.1, help="Longest time of a query.")]


def serve(
    runs: Runs,
    host: Annotated[
        str, typer.Option(help="Address to listen at; beyond loopback a token is needed.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8765,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="LMMONO_TOKEN",
            help="Secret that requests bring; one is made where it is needed and not given.",
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A name by which the server is reached; repeatable."),
    ] = None,
    seconds: Seconds = 10.0,
) -> None:
    """Look at runs in a browser: units, search, texts of your own, edits, a SQL console.

    Example: lmmono serve runs/quickstart/crate runs/quickstart/gpt2
    """
    from lmmono.reports.server.running import serve

    serve(
        runs, host=host, port=port, token=token, names=allow_host or (), seconds=seconds,
        tell=lambda address: print(printable(address), flush=True),
    )  # fmt: skip


def mcp(runs: Runs, seconds: Seconds = 10.0) -> None:
    """Answer a program's questions about runs in the Model Context Protocol, over stdio.

    Example: lmmono mcp runs/quickstart/crate
    """
    from lmmono.reports.server.running import serve_tools

    serve_tools(runs, seconds=seconds)
