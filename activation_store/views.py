"""Views and macros over the listed shards, as persistent SQL with paths relative to the store."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import PurePath

import duckdb

_EMPTY = {
    "acts": "NULL::VARCHAR AS hook, NULL::INTEGER AS unit, NULL::BIGINT AS seq_id,"
    " NULL::INTEGER AS pos, NULL::FLOAT AS act",
    "tokens": "NULL::BIGINT AS seq_id, NULL::INTEGER AS pos, NULL::INTEGER AS doc_id,"
    " NULL::VARCHAR AS split, NULL::INTEGER AS token_id",
    "vectors": "NULL::VARCHAR AS hook, NULL::BIGINT AS seq_id, NULL::INTEGER AS pos,"
    " NULL::FLOAT[] AS vector",
}


def create_views(con: duckdb.DuckDBPyConnection, folder: str) -> None:
    """Rebuild every view and macro of the catalogue; shards are looked for in `folder`."""
    for kind in _EMPTY:
        names = con.execute("SELECT file FROM shards WHERE kind = $1 ORDER BY file", [kind])
        paths = [str(PurePath(folder, name)) for (name,) in names.fetchall()]
        con.execute(f"CREATE OR REPLACE VIEW {kind}_shards AS {source(kind, paths)}")
    con.execute(files("activation_store").joinpath("views.sql").read_text())


def source(kind: str, paths: Sequence[str]) -> str:
    """Return the query that reads the shards of one kind; typed and empty for no paths."""
    if not paths:
        return f"SELECT {_EMPTY[kind]} WHERE false"
    listing = ", ".join("'" + path.replace("'", "''") + "'" for path in paths)
    return f"SELECT * FROM read_parquet([{listing}])"
