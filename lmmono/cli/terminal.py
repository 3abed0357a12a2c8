"""What a person sees: progress of long work, tables, and results for other programs.

Progress goes to stderr, so that stdout holds results only. On a terminal it is a bar with rate and
time left; elsewhere it is plain lines, one every few seconds at most.
"""

import json
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from lmmono.types import Progress

if TYPE_CHECKING:
    from pyarrow import Table as ArrowTable
else:  # for annotations only: `lmmono check` needs no arrow
    ArrowTable = object

Format = Literal["table", "csv", "json", "arrow"]
PLAIN_WIDTH = 1000
"""Columns of a table that goes to a file or a pipe: wide enough that nothing is cut."""
FOLD_WIDTH = 32
"""A column is folded to fit a terminal only when it holds longer cells than this."""
LINE_EVERY_SECONDS = 5.0


@contextmanager
def shown_progress(
    console: Console | None = None, every_seconds: float | int = LINE_EVERY_SECONDS
) -> Generator[Progress]:
    """Yield a `Progress` that shows itself on stderr until the block ends.

    Args:
        console: Where to show it; stderr by default.
        every_seconds: Least time between two plain lines, where it is no terminal.
    """
    console = console or Console(stderr=True)
    if console.is_terminal:
        with _bars(console) as bars:
            yield _BarProgress(bars)
    else:
        yield LineProgress(console, every_seconds)


class LineProgress:
    """Progress as plain lines: `train: 200 of 1000 (20 %), 41/s, 20 s left, loss 3.21`."""

    def __init__(self, console: Console, every_seconds: float | int) -> None:
        self._console = console
        self._every = every_seconds
        self._last = time.monotonic()
        self._first: dict[str, tuple[float, int]] = {}

    def __call__(self, what: str, done: int, total: int, **facts: float | int) -> None:
        """Write a line, if the last one is old enough or the work is done."""
        now = time.monotonic()
        began, before = self._first.setdefault(what, (now, done))
        if now - self._last < self._every and done < total:
            return
        self._last = now
        rate = (done - before) / (now - began) if now > began else 0.0
        share = f"{done / total:.0%}" if total else "-"
        parts = [f"{what}: {done} of {total} ({share})"]
        if rate and done < total:
            parts += [f"{_short(rate)}/s", f"{(total - done) / rate:.0f} s left"]
        parts += _facts(facts)
        self._console.print(", ".join(parts), highlight=False, markup=False, soft_wrap=True)


class _BarProgress:
    """Progress as bars, one per kind of work."""

    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars
        self._tasks = {}

    def __call__(self, what: str, done: int, total: int, **facts: float | int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total, completed=done, facts="")
        self._bars.update(
            self._tasks[what], completed=done, total=total, facts=", ".join(_facts(facts))
        )


class _RateColumn(ProgressColumn):
    """Units per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{_short(speed)}/s" if speed else "")


def show_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    title: str = "",
    note: str = "",
    console: Console | None = None,
) -> None:
    """Show a table on stdout; in a pipe no cell is cut and no line wrapped."""
    console = console or Console()
    if not console.is_terminal:
        console = Console(file=console.file, width=PLAIN_WIDTH)
    table = Table(
        title=escape(title) or None,  # [x] is text, not a style
        title_justify="left",
        caption=escape(note) or None,
        box=box.SIMPLE,
    )
    table.caption_justify = "left"
    for i, name in enumerate(columns):
        cells = [row[i] for row in rows]
        numbers = bool(cells) and all(isinstance(cell, int | float) for cell in cells)
        narrow = all(len(_cell(cell)) <= FOLD_WIDTH for cell in cells)
        justify = "right" if numbers else "left"
        table.add_column(name, justify=justify, overflow="fold", no_wrap=narrow)
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    console.print(table, crop=False)


def write_result(table: ArrowTable, format: Format) -> None:
    """Write a query's result to stdout: for people, or as CSV, JSON (one array) or Arrow (IPC)."""
    match format:
        case "table":
            columns = table.column_names
            show_table(columns, [[row[name] for name in columns] for row in _records(table)])
        case "csv":
            from pyarrow import csv

            csv.write_csv(_flat(table), sys.stdout.buffer)
        case "json":
            json.dump(_records(table), sys.stdout, default=str, ensure_ascii=False)
            sys.stdout.write("\n")
        case "arrow":
            from pyarrow import ipc

            with ipc.new_stream(sys.stdout.buffer, table.schema) as stream:
                stream.write_table(table)


def _bars(console: Console) -> RichProgress:
    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}"),
        console=console,
        refresh_per_second=4,
    )


def _records(table: ArrowTable) -> list[dict[str, Any]]:
    assert len(set(table.column_names)) == len(table.column_names), "DuckDB names columns apart"
    return table.to_pylist()


def _flat(table: ArrowTable) -> ArrowTable:
    """Return the table with lists and structs as JSON text, which CSV cannot hold otherwise."""
    import pyarrow as pa

    for i, field in enumerate(table.schema):
        if pa.types.is_nested(field.type):
            text = [json.dumps(value, default=str) for value in table.column(i).to_pylist()]
            table = table.set_column(i, field.name, pa.array(text, pa.string()))
    return table


def _facts(facts: Mapping[str, float | int]) -> list[str]:
    return [f"{name.replace('_', ' ')} {_short(value)}" for name, value in facts.items()]


def _cell(value: object) -> str:
    if value is None:
        return ""
    return _short(value) if isinstance(value, float) else str(value)


def _short(value: float | int) -> str:
    """Return a number in four digits, large ones whole.

    >>> _short(0.123456), _short(12345.6)
    ('0.1235', '12,346')
    """
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
