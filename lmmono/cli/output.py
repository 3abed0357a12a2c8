"""What verbs print: tables for people, CSV, JSON and Arrow for programs; all on stdout.

A table fits the terminal, or `REPORT_WIDTH` columns where it is a report in a pipe: first intervals
go under their values, then long words lose their middle to an ellipsis, and at last each row is a
block of lines. No digit is ever cut off.
"""

import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from activation_store.printable import UNSAFE, number, printable
from lmmono.reports.table import Interval, ReportTable

if TYPE_CHECKING:
    from pyarrow import Table as ArrowTable
else:  # for annotations only: `lmmono check` needs no arrow
    ArrowTable = object

Format = Literal["table", "csv", "json", "arrow"]
REPORT_WIDTH = 100
"""Columns of a report that goes to a file or a pipe."""
READABLE = 24
"""Running text, which is wider than this, keeps so many columns while there are other ways."""
SHORTEST_WORD = 12
"""A value of a row that is shown as a block has at least this many columns."""
GAP = "  "
_PEAK = re.compile("«[^«»]+»")
"""The token of an excerpt that a unit fires on, which a terminal shows in bold yellow."""


@dataclass(frozen=True, slots=True)
class OutputTable:
    """OutputTable that a verb prints."""

    columns: Sequence[str]
    """Column heads."""
    rows: Sequence[Sequence[object]]
    """One sequence of cells per row; None is an empty cell."""
    title: str = ""
    """What they are."""
    note: str = ""
    """How numbers were made."""
    spare: Sequence[str] = ()
    """Columns that a narrow terminal may leave out, the first one first; a line says which."""
    is_report: bool = False
    """A pipe gets it in `REPORT_WIDTH` columns; else every row is one line there."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a verb prints that has done some work."""

    tables: Sequence[OutputTable]
    """What came of it, on stdout."""
    after: Sequence[str]
    """Lines for stderr at the end: where it lies, what comes next."""


def prints_rows(
    verb: Callable[..., "OutputTable | Sequence[OutputTable] | Outcome | None"],
) -> Callable[..., None]:
    """Give a verb that returns rows the options --wide, --csv, --json and --arrow.

    A verb with parameters `format` and `wide` is told which was chosen, and may write by itself.
    """
    own = inspect.signature(verb, eval_str=True).parameters.values()
    passed_on = {parameter.name for parameter in own} & {"format", "wide"}

    @wraps(verb)
    def print_rows(
        *,
        wide: bool = False,
        csv: bool = False,
        json: bool = False,
        arrow: bool = False,
        **arguments: Any,
    ) -> None:
        if csv + json + arrow > 1:
            raise typer.BadParameter("want at most one of --csv, --json, --arrow")
        format: Format = "csv" if csv else "json" if json else "arrow" if arrow else "table"
        chosen = {"format": format, "wide": wide}
        result = verb(**arguments, **{name: chosen[name] for name in passed_on})
        after: Sequence[str] = ()
        if isinstance(result, Outcome):
            result, after = result.tables, result.after
        if result is not None:
            is_one = isinstance(result, OutputTable)
            write_tables([result] if is_one else list(result), format, wide=wide, is_one=is_one)
            sys.stdout.flush()
        for line in after:
            print(printable(line), file=sys.stderr)

    shown = [parameter for parameter in own if parameter.name not in passed_on]
    options = [
        _option("wide", "One line per row, however long."),
        _option("csv", "CSV on stdout."),
        _option("json", "JSON on stdout."),
        _option("arrow", "An Arrow IPC stream on stdout."),
    ]
    print_rows.__signature__ = inspect.Signature([*shown, *options])  # pyright: ignore[reportAttributeAccessIssue]
    return print_rows


def _option(name: str, text: str) -> inspect.Parameter:
    annotation = Annotated[bool, typer.Option(f"--{name}", help=text)]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation
    )


def write_tables(
    tables: Sequence[OutputTable],
    format: Format,
    *,
    wide: bool = False,
    is_one: bool | None = None,
) -> None:
    """Write tables; CSV of several is parted by empty lines, JSON of several lists their titles.

    Args:
        tables: What to write.
        format: In which form.
        wide: Lines of a table may be longer than the terminal.
        is_one: Whether JSON is the rows of one table alone; by default where there is one. A verb
            that may print several says no, so that its JSON has one shape.
    """
    is_one = len(tables) == 1 if is_one is None else is_one
    if format == "table":
        for table in tables:
            show_table(table, wide=wide)
        return
    if format == "arrow" and len(tables) != 1:
        titles = ", ".join(table.title for table in tables)
        raise typer.BadParameter(
            f"--arrow takes one table, got {len(tables)}: {titles}; use --json"
        )
    if format == "json" and not is_one:
        listed = [{"title": table.title, "rows": _records(table)} for table in tables]
        _write_json(listed)
        return
    for i, table in enumerate(tables):
        if i:
            sys.stdout.write("\n")
        if format == "csv":
            write_csv(table.columns, table.rows)
        elif format == "json":
            _write_json(_records(table))
        else:
            import pyarrow as pa

            write_arrow(pa.Table.from_pylist(_records(table)))


def write_csv(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write rows as CSV; nested values are JSON, None an empty field."""
    import csv

    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow([printable(name) for name in columns])
    for row in rows:
        texts = [_json_text(x) if isinstance(x, list | dict) else x for x in row]
        writer.writerow([printable(x) if isinstance(x, str) else x for x in texts])


def write_arrow(table: ArrowTable) -> None:
    """Write an Arrow IPC stream."""
    from pyarrow import ipc

    with ipc.new_stream(sys.stdout.buffer, table.schema) as stream:
        stream.write_table(table)


def _records(table: OutputTable) -> list[dict[str, object]]:
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def _write_json(value: object) -> None:
    sys.stdout.write(_json_text(value) + "\n")


def _json_text(value: object) -> str:
    text = json.dumps(_finite(value), default=str, ensure_ascii=False, allow_nan=False)
    # JSON has its own way to write these, so nothing of the data is lost
    return UNSAFE.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def _finite(value: Any) -> Any:
    """Return a value without NaN and infinity, which JSON cannot hold: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Interval):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def show_table(table: OutputTable, *, wide: bool = False) -> None:
    """Print a table that fits the terminal, or as wide as its rows are."""
    width = None
    if sys.stdout.isatty() and not wide:
        import shutil

        width = shutil.get_terminal_size().columns
    elif table.is_report and not wide:
        width = REPORT_WIDTH
    lines = [line.rstrip() for line in table_lines(table, width)]
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        lines = [_PEAK.sub("\x1b[1;33m\\g<0>\x1b[0m", line) for line in lines]
    sys.stdout.write("\n".join(lines) + "\n")


def reports(tables: Iterable[ReportTable]) -> list[OutputTable]:
    """Return tables of reports as a verb prints them."""
    return [OutputTable(t.columns, t.rows, t.title, t.note, t.spare, True) for t in tables]


def table_lines(table: OutputTable, width: int | None) -> list[str]:
    """Return the lines of a table that is at most `width` wide; None is no limit."""
    columns = [
        [printable(name).replace("\n", " "), *(cell_text(row[i]) for row in table.rows)]
        for i, name in enumerate(table.columns)
    ]
    shown, widths = _fitting_columns(table, columns, width)
    head, *rows = zip(*(columns[i] for i in shown), strict=True)
    lines = [printable(table.title), ""] if table.title else []
    if widths is None:
        lines += _tall(head, rows, width or REPORT_WIDTH)
    else:
        is_number = [
            bool(rows) and all(isinstance(row[i], int | float) for row in table.rows) for i in shown
        ]
        lines += _side_by_side(head, widths, is_number)
        lines.append(GAP.join("-" * n for n in widths))
        for row in rows:
            lines += _side_by_side(row, widths, is_number)
    hidden = [name for i, name in enumerate(table.columns) if i not in shown]
    if hidden:
        lines += ["", f"Not shown at this width: {', '.join(hidden)}; --wide shows all."]
    if table.note:
        lines += ["", *_wrapped(printable(table.note), width or REPORT_WIDTH)]
    return [*lines, ""]


def _fitting_columns(
    table: OutputTable, columns: Sequence[Sequence[str]], width: int | None
) -> tuple[list[int], list[int] | None]:
    """Return the columns that are shown side by side, with their widths; all and None if none can.

    Columns that can be spared go one after the other, before cells become hard to read.
    """
    for n in range(len(table.spare) + 1):
        shown = [i for i, name in enumerate(table.columns) if name not in table.spare[:n]]
        levels = _LEVELS if n == len(table.spare) else _LEVELS[:_N_READABLE]
        widths = _column_widths([columns[i] for i in shown], width, levels)
        if widths is not None:
            return shown, widths
    return list(range(len(columns))), None


def cell_text(value: object) -> str:
    """Return what a cell shows: numbers in four digits, text on one line."""
    if value is None:
        return ""
    text = number(value, 4) if isinstance(value, float) else str(value)
    return printable(text).replace("\n", "⏎").replace("\t", " ")


_LEVELS = (
    (False, None, READABLE),
    (False, None, READABLE * 2 // 3),
    (False, 20, READABLE * 2 // 3),
    (True, 20, 0),
    (True, 12, 0),
)
"""How columns become narrower, one after the other: whether intervals are parted, how short names
may become, how narrow running text. Cells in several lines come first, then names lose their
middle, then intervals are parted."""
_N_READABLE = 3
"""How many of them leave a table that is good to read; columns that can be spared go before the
others."""


def _column_widths(
    columns: Sequence[Sequence[str]],
    limit: int | None,
    levels: Sequence[tuple[bool, int | None, int]],
) -> list[int] | None:
    """Return how wide each column is, or None where they cannot stand side by side."""
    widths = [max(map(_width, cells), default=0) for cells in columns]
    if limit is None:
        return widths
    room = limit - len(GAP) * (len(columns) - 1)
    for is_parted, shortest, text in levels:
        floors = [_least_width(cells, is_parted, shortest, text) for cells in columns]
        while sum(widths) > room:
            givers = [i for i, floor in enumerate(floors) if widths[i] > floor]
            if not givers:
                break
            widths[max(givers, key=widths.__getitem__)] -= 1
        if sum(widths) <= room:
            return widths
    return None


def _least_width(cells: Sequence[str], is_parted: bool, shortest: int | None, readable: int) -> int:
    """Return how narrow a column may be; what holds digits is never shortened."""
    pieces = [piece for cell in cells for piece in (cell.split() if is_parted else _pieces(cell))]
    longest = max(map(_width, pieces), default=0)
    is_text = max(map(_width, cells), default=0) > READABLE and any(" " in c for c in cells)
    if shortest is not None and not any(piece[:1].isdigit() for piece in pieces):
        longest = min(longest, shortest)
    return max(longest, readable) if is_text else longest


def _pieces(text: str) -> list[str]:
    """Return the words of a cell, an interval or an error in one piece.

    >>> _pieces("0.266 [0.238, 0.296] 2.6 ± 0.1")
    ['0.266', '[0.238, 0.296]', '2.6', '± 0.1']
    """
    return re.findall(r"± \S+|\[[^\[\]]*\](?!\S)|\S+", text)


def _side_by_side(
    cells: Sequence[str], widths: Sequence[int], is_number: Sequence[bool]
) -> list[str]:
    """Return one row as lines, each cell wrapped to the width of its column."""
    parts = [_wrapped(cell, n) if n else [""] for cell, n in zip(cells, widths, strict=True)]
    height = max(map(len, parts), default=1)
    lines: list[str] = []
    for i in range(height):
        texts = [part[i] if i < len(part) else "" for part in parts]
        padded = [
            " " * (n - _width(text)) + text if right else text + " " * (n - _width(text))
            for text, n, right in zip(texts, widths, is_number, strict=True)
        ]
        lines.append(GAP.join(padded))
    return lines


def _tall(head: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Return rows as blocks, a line or more per cell: for tables of too many columns."""
    names = max(map(_width, head), default=0)
    lines: list[str] = []
    for i, row in enumerate(rows, start=1):
        lines.append(f"-- {i} --")
        for name, cell in zip(head, row, strict=True):
            first, *more = _wrapped(cell, max(SHORTEST_WORD, width - names - len(GAP)))
            lines.append(f"{name}{' ' * (names - _width(name))}{GAP}{first}")
            lines += [" " * names + GAP + line for line in more]
    return lines


def _wrapped(text: str, width: int) -> list[str]:
    """Return text in lines of at most `width`, broken at spaces; longer words lose their middle."""
    if _width(text) <= width:
        return [text]
    lines = [""]
    for piece in _pieces(text):
        for word in [piece] if _width(piece) <= width else piece.split():
            word = _shortened(word, width)
            candidate = f"{lines[-1]} {word}" if lines[-1] else word
            if _width(candidate) <= width:
                lines[-1] = candidate
            else:
                lines.append(word)
    return lines if lines[0] else lines[1:]


def _shortened(word: str, width: int) -> str:
    """Return a word with an ellipsis for what does not fit; ends of names tell them apart.

    >>> _shortened("blocks.1.hook_resid_post.hook_sae_acts_post", 20)
    'blocks.1.h…acts_post'
    """
    if _width(word) <= width:
        return word
    head, tail = (width - 1) - (width - 1) // 2, (width - 1) // 2
    while _width(word[:head]) + 1 + _width(word[len(word) - tail :]) > width:  # wide characters
        head, tail = max(0, head - 1), max(0, tail - 1)
    return f"{word[:head]}…{word[len(word) - tail :]}"


def _width(text: str) -> int:
    """Return how many columns a terminal takes for a text."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)
