"""The catalogue's tables: their columns and keys, and how new rows are checked and put in.

A row whose key is there already is replaced, so writing the same rows twice changes nothing.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple, cast

import duckdb
import pyarrow as pa

from activation_store.catalog.views import quoted
from activation_store.errors import ContentError


def schema_sql(*, has_checks: bool = True) -> str:
    """Return the text of `schema.sql`; without its CHECK clauses for DuckLake, which has none."""
    text = files("activation_store").joinpath("catalog/schema.sql").read_text("utf-8")
    return text if has_checks else re.sub(r" CHECK \([^\n]*\)(?=,?\n)", "", text)


(_number,) = re.findall(r"schema version (\d+)\.", schema_sql())
SCHEMA_VERSION = int(_number)
"""Version of the tables, which the first line of `schema.sql` names."""


class Column(NamedTuple):
    """Type of a column, and whether every row must have a value there."""

    kind: str
    required: bool


def expected_tables() -> dict[str, dict[str, Column]]:
    """Return every column by table and name, as `schema.sql` makes them."""
    return _expected()[0]


def expected_checks() -> frozenset[str]:
    """Return the CHECK clauses of `schema.sql` as DuckDB writes them."""
    return _expected()[1]


@cache
def _expected() -> tuple[dict[str, dict[str, Column]], frozenset[str]]:
    # without its two hundred comments DuckDB makes the schema in a fifth of the time
    bare = re.sub(r"^COMMENT ON .*;$", "", schema_sql(), flags=re.MULTILINE)
    with duckdb.connect(":memory:") as con:
        con.execute(bare)
        return actual_tables(con, "memory"), actual_checks(con, "memory")


def actual_checks(con: duckdb.DuckDBPyConnection, database: str) -> frozenset[str]:
    """Return the CHECK clauses of a database, each with its table."""
    rows = con.execute(
        "SELECT 'table ' || table_name || ': ' || constraint_text FROM duckdb_constraints()"
        f" WHERE database_name = {quoted(database)} AND constraint_type = 'CHECK'"
    ).fetchall()
    return frozenset(text for (text,) in rows)


def actual_tables(con: duckdb.DuckDBPyConnection, database: str) -> dict[str, dict[str, Column]]:
    """Return every column of the base tables of a database; runs no view of it."""
    rows = con.execute(
        "SELECT t.table_name, c.column_name, c.data_type, NOT c.is_nullable"
        " FROM duckdb_tables() t"
        " JOIN duckdb_columns() c USING (database_oid, schema_oid, table_oid)"
        f" WHERE t.database_name = {quoted(database)} ORDER BY t.table_name, c.column_index"
    ).fetchall()
    tables: dict[str, dict[str, Column]] = {}
    for table, column, kind, is_required in rows:
        tables.setdefault(table, {})[column] = Column(kind, is_required)
    return tables


def column_faults(con: duckdb.DuckDBPyConnection, database: str) -> Iterator[str]:
    """Yield which tables, columns and checks of a database are missing or others than a store's.

    Where there is no fault, DuckDB itself holds the values to types, NOT NULL and checks; of these
    a DuckLake knows no checks.
    """
    actual = actual_tables(con, database)
    for table, columns in expected_tables().items():
        if table not in actual:
            yield f"table {table}: is missing"
            continue
        for name, column in columns.items():
            if name not in actual[table]:
                yield f"table {table}: column {name} is missing"
            elif (kind := actual[table][name].kind) != column.kind:
                yield f"table {table}: column {name} is {kind}, want {column.kind}"
            elif column.required and not actual[table][name].required:
                yield f"table {table}: column {name} may be NULL, want NOT NULL"
    query = f"SELECT type FROM duckdb_databases() WHERE database_name = {quoted(database)}"
    if con.execute(query).fetchall() == [("ducklake",)]:
        return
    for check in sorted(expected_checks() - actual_checks(con, database)):
        yield f"{check} is missing"


KEYS: dict[str, tuple[str, ...]] = {
    "meta": ("key",),
    "runs": ("run",),
    "documents": ("doc_id",),
    "vocabulary": ("token_id",),
    "hooks": ("hook", "kind"),
    "shards": ("file",),
    "unit_stats": ("hook", "unit"),
    "unit_steps": ("hook", "unit", "step"),
    "unit_lives": ("hook", "unit"),
    "exemplars": ("hook", "unit", "kind", "rank"),
    "dictionaries": ("hook", "name"),
    "neighbours": ("hook", "unit", "kind", "rank"),
    "promotes": ("hook", "unit", "sign", "rank"),
    "explanations": ("hook", "unit", "explainer", "seed", "rank", "prompt_hash"),
    "all_scores": (
        "metric",
        "metric_version",
        "preset",
        "control",
        "hook",
        "unit",
        "dictionary",
        "seed",
        "split",
        "explainer",
        "judge",
        "prompt_hash",
    ),
    "robustness": (
        "suite",
        "task",
        "feature",
        "corruption",
        "level",
        "probe",
        "n_shots",
        "metric",
        "metric_version",
        "seed",
        "split",
    ),
    "writer_state": ("key",),
}
"""Columns by which a row of each table is known; NULL equals NULL."""

APPENDABLE = (
    "all_scores",
    "dictionaries",
    "documents",
    "explanations",
    "neighbours",
    "promotes",
    "robustness",
    "runs",
    "unit_lives",
    "unit_steps",
    "vocabulary",
)
"""Tables that callers add rows to; the others belong to the writer."""

COUNTED = ("documents", "exemplars", "hooks", "shards", "unit_stats", "vocabulary")
"""Tables whose rows every commit of a folder counts in `meta`, so that `verify` sees what went
missing. Only those that no program but ours writes: anyone may add rows of scores with plain
DuckDB."""

_ARROW = {
    "VARCHAR": pa.string(),
    "JSON": pa.string(),
    "INTEGER": pa.int32(),
    "BIGINT": pa.int64(),
    "FLOAT": pa.float32(),
    "DOUBLE": pa.float64(),
    "BOOLEAN": pa.bool_(),
    "TIMESTAMP": pa.timestamp("us"),
    "BLOB": pa.binary(),
    "INTEGER[]": pa.list_(pa.int32()),
}


def arrow_rows(table: str, rows: Any) -> pa.Table:
    """Return `rows` with exactly the columns and types of `table`; columns not given are NULL.

    Args:
        table: name of a table of the catalogue.
        rows: Arrow data, whatever gives an Arrow stream (polars, DuckDB), or a list of dicts.
            `created_at` is the present time where it is not given; JSON columns take Python values.

    Raises:
        ContentError: an unknown column, a value of another type, or none where one must be.
    """
    columns = expected_tables()[table]
    incoming = _columns(rows, columns)
    if unknown := [name for name in incoming if name not in columns]:
        close = get_close_matches(unknown[0], columns, n=1) or [", ".join(columns)]
        raise ContentError(f"{table}: no column {unknown[0]!r}; did you mean {close[0]}?")
    n_rows = len(next(iter(incoming.values()), []))
    if "created_at" in columns and "created_at" not in incoming:
        incoming["created_at"] = pa.array([datetime.now(UTC).replace(tzinfo=None)] * n_rows)
    filled = {
        name: _typed(f"{table}.{name}", column, incoming.get(name, pa.nulls(n_rows)))
        for name, column in columns.items()
    }
    return pa.table(filled)


def _columns(rows: Any, columns: Mapping[str, Column]) -> dict[str, Any]:
    """Return the values by column name, as Arrow arrays or lists."""
    if isinstance(rows, Sequence) and not isinstance(rows, str | bytes):
        items = cast(Sequence[Mapping[str, Any]], rows)
        names = list(dict.fromkeys(name for row in items for name in row))
        return {name: [_json(row.get(name), columns.get(name)) for row in items] for name in names}
    table = pa.table(rows)
    return dict(zip(table.column_names, table.columns, strict=True))


def _json(value: Any, column: Column | None) -> Any:
    if column is None or column.kind != "JSON" or value is None or isinstance(value, str):
        return value
    return json.dumps(value)


def _typed(where: str, column: Column, values: Any) -> pa.ChunkedArray | pa.Array:
    wanted = _ARROW[column.kind]
    try:
        typed = values.cast(wanted) if hasattr(values, "cast") else pa.array(values, wanted)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as fault:
        raise ContentError(
            f"{where}: want {column.kind}, got other values: {str(fault).splitlines()[0]}"
        ) from fault
    if column.required and typed.null_count:
        raise ContentError(f"{where}: {typed.null_count} rows have no value; every row needs one.")
    return typed


def replace(con: duckdb.DuckDBPyConnection, table: str, rows: Any) -> int:
    """Put rows into a catalogue open for a commit, in place of those with the same keys.

    Returns:
        The number of rows put in.

    Raises:
        ContentError: the rows do not fit the table, or two of them have the same key.
    """
    incoming = arrow_rows(table, rows)
    if incoming.num_rows == 0:
        return 0
    keys = KEYS[table]
    con.register("incoming", incoming)
    try:
        _refuse_twins(con, table)
        same = " AND ".join(f"t.{key} IS NOT DISTINCT FROM i.{key}" for key in keys)
        con.execute(f"DELETE FROM {table} t USING incoming i WHERE {same}")
        con.execute(
            f"INSERT INTO {table} BY NAME SELECT * FROM incoming ORDER BY {', '.join(keys)}"
        ).fetchall()
    except (duckdb.ConstraintException, duckdb.ConversionException) as fault:
        raise ContentError(f"{table}: {str(fault).splitlines()[0]}") from fault
    finally:
        with suppress(duckdb.TransactionException):  # DuckDB 2, where a row did not fit
            con.unregister("incoming")
    return incoming.num_rows


def count_rows(con: duckdb.DuckDBPyConnection) -> None:
    """Note in `meta` how many rows the tables have, as the last change of a commit."""
    con.execute("DELETE FROM meta WHERE starts_with(key, 'n_rows ')")
    counts = ", ".join(f"('n_rows {t}', (SELECT count(*) FROM {t})::VARCHAR)" for t in COUNTED)
    con.execute(f"INSERT INTO meta VALUES {counts}")


def _refuse_twins(con: duckdb.DuckDBPyConnection, table: str) -> None:
    keys = ", ".join(KEYS[table])
    twins = con.execute(
        f"SELECT {keys}, count(*) FROM incoming GROUP BY {keys} HAVING count(*) > 1 LIMIT 1"
    ).fetchall()
    if twins:
        twin = twins[0]
        named = ", ".join(f"{k}={v!r}" for k, v in zip(KEYS[table], twin, strict=False))
        raise ContentError(f"{table}: {twin[-1]} of the rows have the same key: {named}.")
