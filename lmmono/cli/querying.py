"""Questions to the stores of one or several runs, and to lakes, in SQL."""

import re
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmmono.cli.output import Format, OutputTable, write_tables
from lmmono.errors import RecipeError, RunError
from lmmono.files.printable import printable
from lmmono.recipe.tree import read_override
from lmmono.runs.folder import open_run

if TYPE_CHECKING:
    from duckdb import DuckDBPyRelation
    from pyarrow import RecordBatch

    from activation_store import Store
else:  # for annotations only
    DuckDBPyRelation = RecordBatch = Store = object

LAKE = "ducklake:"
"""How the address of a lake begins."""
MOST_SHOWN = 1000
"""OutputTable of a table for people; CSV, JSON and Arrow give all."""

_NUMBERS = re.compile(r"U?(TINY|SMALL|BIG)?INT(EGER)?|FLOAT|DOUBLE|BOOLEAN")
"""Types that Arrow, CSV and JSON hold as they are."""
_NESTED = re.compile(r".*\]|(STRUCT|MAP|UNION)\(.*", re.DOTALL)


def write_answer(
    places: Sequence[str | Path],
    query: str,
    parameters: Sequence[str] = (),
    data_path: str | None = None,
    format: Format = "table",
) -> None:
    """Write to stdout what a query gives over the stores at `places`, opened for reading.

    Args:
        places: Run folders, store folders or store files; the first may be a lake's address. Of
            several, each store is a schema named after its folder, and the first place is found
            without a name too.
        query: SQL; `$name` stands for a parameter.
        parameters: `name=value` each; the value as a recipe would hold it.
        data_path: Folder or s3:// prefix of the lake's data.
        format: `csv` and `arrow` stream; two columns of one name are told apart as `name_1`.

    Raises:
        RunError: A place holds no store, or a parameter is no `name=value`.
        StoreError: A store cannot be opened, or the query fails, also while its rows are read.
    """
    try:
        query.encode()
    except UnicodeEncodeError:
        raise RunError("the query holds bytes that are no UTF-8 text; type it again") from None
    with open_stores(places, data_path) as store, _told_as_query_error():
        relation = store.sql(query, **_values(parameters))
        names = _told_apart(relation.columns)
        if format == "arrow":
            from pyarrow import ipc

            plain = [f"#{i} AS {_quoted(name)}" for i, name in enumerate(names, start=1)]
            reader = relation.project(", ".join(plain)).to_arrow_reader()
            with ipc.new_stream(sys.stdout.buffer, reader.schema) as stream:
                for batch in reader:
                    stream.write_batch(batch)
        elif format == "csv":
            from pyarrow import csv

            heads = _told_apart([printable(name) for name in names])
            reader = _as_text(relation, heads).to_arrow_reader()
            options = csv.WriteOptions(include_header=True)
            sys.stdout.flush()
            with csv.CSVWriter(sys.stdout.buffer, reader.schema, write_options=options) as writer:
                for batch in reader:
                    writer.write_batch(_printable_batch(batch))
        else:
            limit = MOST_SHOWN + 1 if format == "table" else None
            write_tables([_rows(relation, names, limit)], format)


def _rows(relation: DuckDBPyRelation, names: Sequence[str], limit: int | None) -> OutputTable:
    """Return the rows of a relation with nested values as lists and dictionaries."""
    import json

    is_nested = [bool(_NESTED.fullmatch(str(kind))) for kind in relation.types]
    is_wide = [str(kind) in ("HUGEINT", "UHUGEINT") for kind in relation.types]
    text = _as_text(relation, names)
    rows = (text if limit is None else text.limit(limit)).fetchall()
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
        for row in rows
    ]
    note = ""
    if limit is not None and len(cells) == limit:
        cells.pop()
        note = f"The first {limit - 1:,} rows; --csv, --json and --arrow give all."
    return OutputTable(names, cells, note=note)


def _as_text(relation: DuckDBPyRelation, names: Sequence[str]) -> DuckDBPyRelation:
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
    import pyarrow.compute as pc

    return pc.all(pc.match_substring_regex(column, r"^[\n\x20-\x7e]*$")).as_py() is not False


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

    files = [store_address(place) for place in places]
    store = astore.open(files[0], data_path=data_path)
    for file in files if len(files) > 1 else ():
        if file != files[0] or not file.startswith(LAKE):
            store.attach(file, schema_name(Path(file)))
    return store


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


def schema_name(file: Path) -> str:
    """Return the name under which a store's tables are found: that of its folder.

    >>> schema_name(Path("runs/sweep/crate-seed0/store.duckdb"))
    'crate_seed0'
    """
    name = re.sub(r"\W", "_", file.resolve().parent.name)
    return name if name.isidentifier() else f"run_{name}"


def _values(parameters: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for text in parameters:
        try:
            values |= read_override(text).values
        except RecipeError:
            raise RunError(f"--param {text}: want name=value such as unit=17") from None
    return values
