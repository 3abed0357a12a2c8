"""The tables and views in the catalogue of a lake: made, checked, brought to today's version."""

import re
import secrets
from datetime import UTC, datetime
from importlib.resources import files

import duckdb

from activation_store.catalog import catalogue, migrations
from activation_store.catalog.catalogue import SCHEMA_VERSION
from activation_store.catalog.views import Listing, bulk_query
from activation_store.errors import NotAStoreError, SchemaError, StoreError
from activation_store.lake.lake_files import LakeFiles
from activation_store.lake.lake_place import LAKE, LakePlace

_BULK = {"acts": "acts", "token_ids": "tokens", "vectors": "vectors"}
_COPIED = {
    "meta": "key",
    "hooks": "hook, kind",
    "shards": "kind, hook, file",
    "vocabulary": "token_id",
    "unit_stats": "hook, unit",
    "exemplars": "hook, unit, kind, rank",
}
COPIED_ROWS = 1_000_000
"""Rows up to which a table is copied into memory: about 50 MB of exemplars."""
METADATA = "__ducklake_metadata"
"""How the name of the catalogue's own database begins."""
_CHECK = re.compile(r" CHECK \([^\n]*\)(?=,?\n)")


def lake_sql() -> str:
    """Return the statements that make the tables of a lake."""
    own = files("activation_store").joinpath("lake/lake.sql").read_text()
    return _CHECK.sub("", catalogue.schema_sql()) + own


def read_meta(con: duckdb.DuckDBPyConnection, place: LakePlace) -> dict[str, str] | None:
    """Return table `meta` of the lake; None for an empty DuckLake.

    Raises:
        NotAStoreError: a DuckLake with tables of others.
    """
    query = "SELECT table_name FROM duckdb_tables() WHERE database_name = $1"
    found = {name for (name,) in con.execute(query, [LAKE]).fetchall()}
    if not found:
        return None
    if not {"meta", "shards", "publications"} <= found:
        raise NotAStoreError(
            f"{place.name}: a DuckLake with other tables ({', '.join(sorted(found)[:5])}), not "
            "one of activations; give the lake a catalogue of its own."
        )
    return dict(con.execute(f"SELECT key, value FROM {LAKE}.meta").fetchall())


def check_version(place: LakePlace, meta: dict[str, str]) -> int:
    """Return the schema version of a lake.

    Raises:
        SchemaError: the lake was written by a newer version of this package.
    """
    written = int(meta["schema_version"])
    if written > SCHEMA_VERSION:
        raise SchemaError(
            f"{place.name}: written under schema version {written}, this package reads up to "
            f"{SCHEMA_VERSION}; upgrade it: pip install -U lmmono."
        )
    return written


def create(con: duckdb.DuckDBPyConnection, place: LakePlace) -> None:
    """Make the tables and views of an empty lake in the transaction of `con`.

    Raises:
        StoreError: there is a lake already.
    """
    if read_meta(con, place) is not None:
        raise StoreError(f"{place.name}: there is a lake already; open it with mode='a'.")
    con.execute(lake_sql())
    facts = {
        "schema_version": str(SCHEMA_VERSION),
        "store_id": secrets.token_hex(6),
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "created_by": f"duckdb {duckdb.__version__}",
    }
    con.executemany("INSERT INTO meta VALUES ($1, $2)", [list(fact) for fact in facts.items()])
    write_views(con, LakeFiles(place))


def upgrade(con: duckdb.DuckDBPyConnection, had: int) -> None:
    """Bring the lake that `con` is in from version `had` to today's."""
    statements = con.extract_statements(lake_sql())
    for statement in statements:
        if statement.type == duckdb.StatementType.CREATE:
            con.execute(statement)
    rows = con.execute(
        "SELECT table_name, column_name FROM duckdb_columns() WHERE database_name = $1", [LAKE]
    ).fetchall()
    for table, columns in migrations.expected_tables().items():
        for name, column in columns.items():
            if (table, name) not in rows:
                con.execute(f"ALTER TABLE {table} ADD COLUMN {name} {column.kind}")
    for statement in statements:
        if statement.type != duckdb.StatementType.CREATE:
            con.execute(statement)
    for number in range(had, SCHEMA_VERSION):
        con.execute(migrations.STEPS.get(number, "SELECT 1"))
    con.execute("UPDATE meta SET value = $1 WHERE key = 'schema_version'", [str(SCHEMA_VERSION)])


def write_views(con: duckdb.DuckDBPyConnection, shards: LakeFiles) -> None:
    """Replace the views over the shards that the lake lists, for any DuckLake client.

    This also tells those who hold a copy that it is out of date: see `version_of_shards`.
    """
    for view, query in _bulk_queries(con, shards, "").items():
        con.execute(f"CREATE OR REPLACE VIEW {view} AS {query}")


def _bulk_queries(con: duckdb.DuckDBPyConnection, shards: LakeFiles, source: str) -> dict[str, str]:
    queries: dict[str, str] = {}
    for view, kind in _BULK.items():
        rows = con.execute(
            f"SELECT hook, file FROM {source}shards WHERE kind = $1 AND n_rows > 0"
            " ORDER BY hook, file",
            [kind],
        ).fetchall()
        listings = [Listing(hook, shards.url(file)) for hook, file in rows]
        queries[view] = bulk_query(view, listings)
    return queries


def version_of_shards(con: duckdb.DuckDBPyConnection) -> int:
    """Return a number that changes whenever `write_views` was committed."""
    row = con.execute(
        f"SELECT schema_version FROM {METADATA}_{LAKE}.ducklake_snapshot"
        " ORDER BY snapshot_id DESC LIMIT 1"
    ).fetchone()
    assert row is not None
    return int(row[0])


def mirror(con: duckdb.DuckDBPyConnection, shards: LakeFiles) -> int:
    """Make every table, view and macro of the lake known without the name of its catalogue.

    Returns:
        The version of the shards that `copy` took.
    """
    con.execute("CREATE SCHEMA copied")
    for name in (*migrations.expected_tables(), "publications"):
        con.execute(f"CREATE VIEW {name} AS SELECT * FROM {LAKE}.{name}")
    version = copy(con, shards)
    text = files("activation_store").joinpath("catalog/views.sql").read_text()
    con.execute(text.replace("{at}", ""))
    return version


def copy(con: duckdb.DuckDBPyConnection, shards: LakeFiles) -> int:
    """Take the list of shards, and the tables that publications write, into memory.

    So a query sees them as of one commit. And asking DuckLake costs some trips to the catalogue per
    table and query: 10 to 40 ms where the rest of a query of one unit takes 15 ms.

    Returns:
        The version of the shards that was copied, or an older one.
    """
    version = version_of_shards(con)
    con.execute("BEGIN")
    try:
        for view, query in _bulk_queries(con, shards, f"{LAKE}.").items():
            con.execute(f"CREATE OR REPLACE VIEW {view} AS {query}")
        for table, order in _COPIED.items():
            _copy_table(con, table, order)
        con.execute("COMMIT")
    except BaseException:
        con.execute("ROLLBACK")
        raise
    return version


def _copy_table(con: duckdb.DuckDBPyConnection, table: str, order: str) -> None:
    """Stand a view of this name over a copy, or over the lake where a copy would be too large."""
    row = con.execute(f"SELECT count(*) FROM {LAKE}.{table}").fetchone()
    assert row is not None
    source = LAKE
    if row[0] <= COPIED_ROWS:
        source = "copied"
        con.execute(
            f"CREATE OR REPLACE TABLE copied.{table} AS FROM {LAKE}.{table} ORDER BY {order}"
        )
    con.execute(f"CREATE OR REPLACE VIEW {table} AS SELECT * FROM {source}.{table}")
