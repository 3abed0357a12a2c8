"""Questions to the stores of one or several runs, and to lakes, in SQL."""

import re
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from activation_store.printable import printable
from lmmono.cli.output import Format, OutputTable, write_tables
from lmmono.errors import RecipeError, RunError, nearest
from lmmono.recipe.tree import read_override
from lmmono.runs.folder import open_run
from lmmono.runs.schema_names import schema_names

if TYPE_CHECKING:
    from pyarrow import RecordBatch

    from activation_store import QueryResult, Store
else:  # for annotations only
    QueryResult = RecordBatch = Store = object

LAKE = "ducklake:"
"""How the address of a lake begins."""
MOST_SHOWN = 100
"""Rows of a table for people, without --limit; CSV, JSON and Arrow give all."""

_NUMBERS = re.compile(r"U?(TINY|SMALL|BIG)?INT(EGER)?|FLOAT|DOUBLE|BOOLEAN")
"""Types that Arrow, CSV and JSON hold as they are."""
_NESTED = re.compile(r".*\]|(STRUCT|MAP|UNION)\(.*", re.DOTALL)


def read_question(words: Sequence[str], file: Path | None = None) -> tuple[list[str], str]:
    """Return the places and the text of `lmmono sql RUN... QUERY`.

    The text is the last word, or comes from `file`, from stdin where the last word is `-` or there
    is no query among the words, or is `.help` with what to help about.

    Raises:
        RunError: There is no query.
    """
    if file is not None:
        return list(words), file.read_text(encoding="utf-8")
    if ".help" in words[1:]:
        at = words.index(".help")
        return list(words[:at]), " ".join(words[at:])
    *places, last = words
    if last == "-" and places:
        return places, sys.stdin.read()
    if not _is_place(last) and places:
        return places, last
    if _is_place(last) and not sys.stdin.isatty() and (text := sys.stdin.read()).strip():
        return list(words), text
    what = f"{words[0]!r} alone" if len(words) == 1 else "only runs"
    raise RunError(
        f"want a run and a query, got {what}; `lmmono sql {words[0]} .help` lists the tables, and "
        "--file FILE or a pipe gives a query too"
    )


def _is_place(word: str) -> bool:
    """Say whether a word names a run, a store or a lake, and is no query."""
    try:
        return word.startswith(LAKE) or Path(word).exists()
    except OSError:  # too long for a name
        return False


def write_answer(
    places: Sequence[str | Path],
    query: str,
    parameters: Sequence[str] = (),
    data_path: str | None = None,
    format: Format = "table",
    limit: int | None = None,
    wide: bool = False,
) -> None:
    """Write to stdout what a query gives over the stores at `places`, opened for reading.

    Args:
        places: Run folders, store folders or store files; the first may be a lake's address. Of
            several, each store is a schema named by `schema_names`, and the first place is found
            without a name too. Of one run its kept steps are schemas: `step640.unit_stats`.
        query: SQL, one statement or several, none of which may write; `$name` stands for a
            parameter. `.help` lists tables and macros, `.help NAME` the columns of a table.
        parameters: `name=value` each; the value as a recipe would hold it.
        data_path: Folder or s3:// prefix of the lake's data.
        format: `csv` and `arrow` stream; two columns of one name are told apart as `name_1`.
        limit: Most rows of a result; by default `MOST_SHOWN` of a table, and all for programs.
        wide: Show a table in lines as long as its rows.

    Raises:
        RunError: A place holds no store, or a parameter is no `name=value`, missing or not used.
        StoreError: A store cannot be opened, or the query fails, also while its rows are read.
    """
    try:
        query.encode()
    except UnicodeEncodeError:
        raise RunError("the query holds bytes that are no UTF-8 text; type it again") from None
    with open_stores(places, data_path) as store, _told_as_query_error():
        for step, file in _kept_steps(places, query).items():
            store.attach(file, f"step{step}")
        if query.lstrip().startswith(".help"):
            tables = help_tables(store, query.split()[1:])
            write_tables(tables, format, wide=wide, is_one=False)
            return
        statements = _statements(query, _values(parameters))
        # all are parsed and bound before the first is shown
        relations = [store.sql(text, **values) for text, values in statements]
        if format == "arrow" and len(relations) > 1:
            raise RunError(f"--arrow takes one statement, got {len(relations)}; use --json")
        if format == "arrow":
            _write_arrow(relations[0], limit)
            return
        if format == "csv":
            for i, relation in enumerate(relations):
                sys.stdout.write("\n" * (i > 0))
                _write_csv(relation, limit)
            return
        most = (limit or MOST_SHOWN) if format == "table" else limit
        titles = [text.strip() for text, _ in statements] if len(statements) > 1 else [""]
        tables = [
            _rows(relation, most, title) for relation, title in zip(relations, titles, strict=True)
        ]
        write_tables(tables, format, wide=wide)


def _statements(query: str, values: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the statements of a text, each with the parameters that it names.

    Raises:
        RunError: There is none, or a parameter is missing or stands in no statement.
    """
    import duckdb

    with duckdb.connect(":memory:") as con:
        try:
            parsed = con.extract_statements(query)
        except duckdb.Error:
            return [(query, values)]  # the store says what is wrong
    if not parsed:
        raise RunError("the query is empty; want SQL such as: FROM unit_stats")
    wanted = {name: None for statement in parsed for name in sorted(statement.named_parameters)}
    if missing := [name for name in wanted if name not in values]:
        raise RunError(f"the query has ${missing[0]}: give its value by --param {missing[0]}=...")
    if unused := [name for name in values if name not in wanted]:
        raise RunError(f"--param {unused[0]}: the query has no ${unused[0]}")
    if len(parsed) == 1 or re.search(r"\bpivot\b", query, re.IGNORECASE):
        return [(query, values)]  # DuckDB makes several statements of one PIVOT
    return [
        (statement.query, {name: values[name] for name in statement.named_parameters})
        for statement in parsed
    ]


def _write_arrow(relation: QueryResult, limit: int | None) -> None:
    import pyarrow as pa
    from pyarrow import ipc

    from activation_store.errors import QueryError

    names = _told_apart(relation.columns)
    plain = [f"#{i} AS {_quoted(name)}" for i, name in enumerate(names, start=1)]
    rows = relation if limit is None else relation.limit(limit)
    try:
        reader = rows.project(", ".join(plain)).to_arrow_reader()
    except pa.ArrowException as fault:  # of a type that Arrow has not, such as 100 nested lists
        raise QueryError(f"Arrow cannot hold the result: {fault}; --json can") from fault
    with ipc.new_stream(sys.stdout.buffer, reader.schema) as stream:
        for batch in reader:
            stream.write_batch(batch)


def _write_csv(relation: QueryResult, limit: int | None) -> None:
    from pyarrow import csv

    heads = _told_apart([printable(name) for name in _told_apart(relation.columns)])
    rows = relation if limit is None else relation.limit(limit)
    reader = _as_text(rows, heads).to_arrow_reader()
    options = csv.WriteOptions(include_header=True)
    sys.stdout.flush()
    with csv.CSVWriter(sys.stdout.buffer, reader.schema, write_options=options) as writer:
        for batch in reader:
            writer.write_batch(_printable_batch(batch))


def help_tables(store: Store, names: Sequence[str] = ()) -> list[OutputTable]:
    """Return what `.help` shows: tables, views and macros, or the columns of those named.

    Raises:
        RunError: The store has no such table or macro.
    """
    from activation_store.catalog.schema_reference import column_comments, entries

    by_name = {entry.name: entry for entry in entries()}
    if not names:
        rows = [(entry.call, entry.kind, entry.about) for entry in entries()]
        note = (
            "`.help NAME` lists the columns of one. A macro is read like a table: "
            "FROM exemplars('blocks.1.mlp.hook_post', 17, 4). Of several runs each table has its "
            "run before its name, as in crate.unit_stats."
        )
        return [OutputTable(("name", "kind", "what its rows are"), rows, note=note, is_report=True)]
    tables: list[OutputTable] = []
    for name in names:
        if name not in by_name:
            raise RunError(f".help {name}: no such table or macro; {nearest(name, by_name)}")
        entry, comments = by_name[name], column_comments()
        if entry.kind == "macro":
            rows = [(entry.call, "macro", entry.about)]
            heads = ("call", "kind", "what its rows are")
        else:
            columns = store.sql(f"DESCRIBE FROM {name}").fetchall()
            rows = [
                (column, kind, comments.get((name, column), "")) for column, kind, *_ in columns
            ]
            heads = ("column", "type", "what it holds")
        tables.append(OutputTable(heads, rows, title=f"{name}: {entry.about}", is_report=True))
    return tables


def _rows(relation: QueryResult, limit: int | None, title: str = "") -> OutputTable:
    """Return the rows of a relation with nested values as lists and dictionaries."""
    import json

    names = _told_apart(relation.columns)
    is_nested = [bool(_NESTED.fullmatch(str(kind))) for kind in relation.types]
    is_wide = [str(kind) in ("HUGEINT", "UHUGEINT") for kind in relation.types]
    text = _as_text(relation, names)
    rows = (text if limit is None else text.limit(limit + 1)).fetchall()
    columns = range(len(names))
    cells = [
        [
            json.loads(row[i])
            if is_nested[i] and row[i] is not None
            else int(row[i])
            if is_wide[i] and row[i] is not None
            else row[i]
            for i in columns
        ]
        for row in rows[:limit]
    ]
    note = ""
    if limit is not None and len(rows) > limit:
        note = f"The first {limit:,} rows; --limit N shows more, --csv, --json and --arrow all."
    return OutputTable(names, cells, title=title, note=note)


def _as_text(relation: QueryResult, names: Sequence[str]) -> QueryResult:
    """Return a relation whose columns are numbers or text: nested values as JSON.

    Dates beyond Python's years, intervals, blobs, bits and rows without names have text in DuckDB
    and none in Arrow's tables of Python values.
    """
    columns: list[str] = []
    for i, (name, kind) in enumerate(zip(names, map(str, relation.types), strict=True), start=1):
        if _NUMBERS.fullmatch(kind):
            value = f"#{i}"
        elif kind.startswith("DECIMAL"):
            value = f"#{i}::DOUBLE"
        else:
            value = f"to_json(#{i})::VARCHAR" if _NESTED.fullmatch(kind) else f"#{i}::VARCHAR"
        columns.append(f"{value} AS {_quoted(name)}")
    return relation.project(", ".join(columns))


def _told_apart(names: Sequence[str]) -> list[str]:
    """Return column names that are all different, for JSON's keys.

    >>> _told_apart(["hook", "unit", "hook"])
    ['hook', 'unit', 'hook_1']
    """
    unique: list[str] = []
    for name in names:
        n = sum(1 for other in names[: len(unique)] if other == name)
        candidate = f"{name}_{n}" if n else name
        while candidate in unique or (n and candidate in names):
            n += 1
            candidate = f"{name}_{n}"
        unique.append(candidate)
    return unique


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _printable_batch(batch: RecordBatch) -> RecordBatch:
    """Return rows whose text drives no terminal."""
    import pyarrow as pa

    columns = [
        pa.array([None if text is None else printable(text) for text in column.to_pylist()])
        if pa.types.is_string(column.type) and not _is_plain(column)
        else column
        for column in batch.columns
    ]
    return pa.record_batch(
        [column.cast(field.type) for column, field in zip(columns, batch.schema, strict=True)],
        schema=batch.schema,
    )


def _is_plain(column: Any) -> bool:
    """Say at Arrow's speed that text needs no look: it is printable ASCII."""
    import pyarrow.compute

    compute: Any = pyarrow.compute  # its functions are made when it is imported
    is_ascii = compute.match_substring_regex(column, r"^[\n\x20-\x7e]*$")
    return compute.all(is_ascii).as_py() is not False


@contextmanager
def _told_as_query_error() -> Generator[None]:
    """Tell what DuckDB raises while rows are read as the store tells it of a query."""
    import duckdb

    from activation_store.errors import QueryError

    try:
        yield
    except duckdb.InterruptException:
        raise KeyboardInterrupt from None
    except duckdb.Error as fault:
        raise QueryError(str(fault).strip()) from fault


def open_stores(places: Sequence[str | Path], data_path: str | None = None) -> Store:
    """Open the first place for reading and, where there are several, attach all stores by name.

    Raises:
        RunError: A place holds no store.
        StoreError: A store cannot be opened, two folders have one name, or a lake is not the first.
    """
    import activation_store as astore

    files = list(dict.fromkeys(store_address(place) for place in places))
    store = astore.open(files[0], data_path=data_path)
    for lake in (file for file in files[1:] if file.startswith(LAKE)):
        store.attach(lake, "lake")  # says why it cannot be
    attached = [file for file in files if not file.startswith(LAKE)] if len(files) > 1 else []
    for file, name in zip(attached, schema_names(attached), strict=True):
        store.attach(file, name)
    return store


def _kept_steps(places: Sequence[str | Path], query: str) -> dict[int, Path]:
    """Return the stores of the kept steps of a run that a query names, by step.

    Only those: to attach a store takes a tenth of a second.
    """
    if len(places) != 1 or str(places[0]).startswith(LAKE):
        return {}
    folder = Path(places[0]) if Path(places[0]).is_dir() else Path(places[0]).parent
    stores = {int(p.parent.name): p for p in folder.glob("steps/[0-9]*/store.duckdb")}
    named = {int(step) for step in re.findall(r"\bstep(\d{1,9})\.", query)}
    return {step: stores[step] for step in sorted(named & stores.keys())}


def store_address(place: str | Path) -> str:
    """Return the address of a lake as it is, and else the store at a place.

    Raises:
        RunError: There is none.
    """
    text = str(place)
    if text.startswith(LAKE):
        return text
    folder = Path(place)
    if folder.is_file():
        return text
    if (folder / "store.duckdb").is_file():
        return str(folder / "store.duckdb")
    run = open_run(folder)
    raise RunError(f"{run.dir}: holds no store yet; run `lmmono capture {run.dir}` first")


def _values(parameters: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for text in parameters:
        try:
            values |= read_override(text).values
        except RecipeError:
            raise RunError(f"--param {text}: want name=value such as unit=17") from None
    return values
