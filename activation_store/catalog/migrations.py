"""How a catalogue written under an older schema becomes one of today.

Adding tables and columns needs no step: both are taken from `schema.sql`. What is more than that,
such as a changed meaning, is a step in `STEPS`.
"""

import atexit
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import duckdb

from activation_store.catalog import catalogue
from activation_store.catalog.catalogue import SCHEMA_VERSION, Place
from activation_store.catalog.views import quoted
from activation_store.errors import NotAStoreError, SchemaError

STEPS: dict[int, str] = {}
"""SQL that brings the rows of version n to version n + 1, run after new columns are there."""


class Column(NamedTuple):
    """Type of a column, and whether every row must have a value there."""

    kind: str
    required: bool


@cache
def expected_tables() -> dict[str, dict[str, Column]]:
    """Return every column by table and name, as `schema.sql` makes them."""
    with duckdb.connect(":memory:") as con:
        con.execute(catalogue.schema_sql())
        return _tables(con)


def _tables(con: duckdb.DuckDBPyConnection) -> dict[str, dict[str, Column]]:
    rows = con.execute(
        "SELECT c.table_name, c.column_name, c.data_type, NOT c.is_nullable FROM duckdb_columns() c"
        " JOIN duckdb_tables() t USING (database_name, schema_name, table_name)"
        " WHERE c.database_name = current_database() ORDER BY c.table_name, c.column_index"
    ).fetchall()
    tables: dict[str, dict[str, Column]] = {}
    for table, column, kind, required in rows:
        tables.setdefault(table, {})[column] = Column(kind, required)
    return tables


def version(place: Place, meta: Mapping[str, str]) -> int:
    """Return the schema version that the table `meta` of a store names.

    Raises:
        NotAStoreError: there is no store, or it names no version.
        SchemaError: it was written under a newer schema than this package knows.
    """
    written = meta.get("schema_version", "")
    if not written.isdigit() or "store_id" not in meta:
        raise NotAStoreError(f"{place.file}: table meta names no schema_version and store_id.")
    if int(written) > SCHEMA_VERSION:
        raise SchemaError(
            f"{place.file}: written under schema version {written}, this package reads up to "
            f"{SCHEMA_VERSION}; upgrade it: pip install -U lmmono."
        )
    return int(written)


def migrate(place: Place) -> int:
    """Bring the store to today's schema in one commit, and return the version it had."""
    had = version(place, catalogue.read_meta(place))
    if had < SCHEMA_VERSION:
        with catalogue.commit(place) as con:
            upgrade(con, had)
    return had


def upgrade(con: duckdb.DuckDBPyConnection, had: int) -> None:
    """Change the catalogue that `con` is in from version `had` to today's."""
    statements = con.extract_statements(catalogue.schema_sql())
    tables = [s for s in statements if s.type == duckdb.StatementType.CREATE]
    comments = [s for s in statements if s.type != duckdb.StatementType.CREATE]
    for statement in tables:
        con.execute(statement)
    found = _tables(con)
    for table, columns in expected_tables().items():
        for name, column in columns.items():
            if name not in found[table]:
                con.execute(f"ALTER TABLE {table} ADD COLUMN {name} {column.kind}")
    for statement in comments:
        con.execute(statement)
    for number in range(had, SCHEMA_VERSION):
        con.execute(STEPS.get(number, "SELECT 1"))
    con.execute("UPDATE meta SET value = $1 WHERE key = 'schema_version'", [str(SCHEMA_VERSION)])


def attach(con: duckdb.DuckDBPyConnection, place: Place, name: str) -> None:
    """Attach a store's catalogue as `name`: its file, or an upgraded private copy of an older one.

    Raises:
        StoreError: as `catalogue.attach` and `version` do.
    """
    had = version(place, catalogue.attach(con, place, name))
    if had < SCHEMA_VERSION:
        con.execute(f"DETACH {name}")
        con.execute(f"ATTACH {quoted(str(_upgraded(place, had)))} AS {name} (READ_ONLY)")


def _upgraded(place: Place, had: int) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="activation_store-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = Path(shutil.copy(place.file, folder))
    with duckdb.connect(copy) as con:
        upgrade(con, had)
    return copy
