"""Views and macros over the listed shards.

They exist twice: in the catalogue file, with paths relative to its folder, for anyone who opens it
with DuckDB alone; and in memory for each open `Store`, with absolute paths.
"""

import re
from collections.abc import Callable, Iterable
from functools import cache
from importlib.resources import files
from pathlib import PurePath
from typing import NamedTuple

import duckdb


class Listing(NamedTuple):
    """Which hook's rows a shard holds, and where it lies."""

    hook: str | None
    file: str


_COLUMNS = {
    "acts": {"unit": "INTEGER", "seq_id": "INTEGER", "pos": "INTEGER", "act": "FLOAT"},
    "token_ids": {
        "seq_id": "INTEGER",
        "pos": "INTEGER",
        "doc_id": "INTEGER",
        "split": "VARCHAR",
        "token_id": "INTEGER",
    },
    "vectors": {"seq_id": "INTEGER", "pos": "INTEGER", "vector": "FLOAT[]"},
}
BULK = {
    "acts": ("acts", "Stored acts alone, above hooks.threshold: faster than activations"),
    "token_ids": ("tokens", "Tokens in order, by id: faster than tokens"),
    "vectors": ("vectors", "Dense vectors, one per token"),
}
"""Views over shards: the kind of the shards, and what the rows are."""
_HOOKLESS = {"token_ids"}


def create_views(
    con: duckdb.DuckDBPyConnection,
    folder: PurePath,
    at: str = "",
    source: str = "",
    store_id: str | None = None,
    has_macros: bool = True,
) -> None:
    """Make or replace every view and macro in the catalogue `at`.

    Args:
        con: a connection that may create views.
        folder: where the shards are, absolute or relative to the search path of `con`.
        at: prefix of the names that are made, such as `"other".`; empty for the current catalogue.
        source: prefix of the table `shards` that lists the files.
        store_id: of the store whose rows alone the macros may give; None where `at` settles that.
        has_macros: False makes the views alone.
    """
    queries = bulk_queries(con, lambda file: str(folder / file), source or at)
    bulk = [
        f"CREATE OR REPLACE VIEW {at}{view} AS {query};"
        f"COMMENT ON VIEW {at}{view} IS {quoted(BULK[view][1])};"
        for view, query in queries.items()
    ]
    views, macros = further_views(at, store_id)
    con.execute("\n".join([*bulk, views, macros if has_macros else ""]))


def further_views(at: str = "", store_id: str | None = None) -> tuple[str, str]:
    """Return the statements of `views.sql`: the views on top of the bulk views, and the macros."""
    own = "true" if store_id is None else _OWN.format(store_id=store_id)
    views, first, rest = views_sql().partition("CREATE OR REPLACE MACRO")
    return views.replace("{at}", at), (first + rest).replace("{at}", at).replace("{own}", own)


def score_views() -> list[str]:
    """Return the statements of `views.sql` that make views over tables alone, for any catalogue."""
    text = views_sql().replace("{at}", "")
    return re.findall(r"CREATE OR REPLACE VIEW (?:\w*scores|unit_history)\b[^;]*", text)


@cache
def views_sql() -> str:
    """Return the text of `views.sql`."""
    return files("activation_store").joinpath("catalog/views.sql").read_text("utf-8")


_OWN = """(
    SELECT CASE WHEN max(m.value) = '{store_id}' THEN true ELSE error(
        'this macro is of store {store_id}, the tables found here are not: '
        || 'USE the catalogue that it belongs to, or attach with store.attach(...) in Python'
    ) END
    FROM meta m WHERE m.key = 'store_id'
)"""

VIEWS, MACROS = (
    frozenset(re.findall(rf"CREATE OR REPLACE {kind} \{{at\}}(\w+)", views_sql())) | names
    for kind, names in (("VIEW", BULK.keys()), ("MACRO", frozenset[str]()))
)
"""Names of all views and macros that a catalogue file holds."""


def bulk_queries(
    con: duckdb.DuckDBPyConnection, url: Callable[[str], str], source: str
) -> dict[str, str]:
    """Return the query behind each bulk view, over the files that `<source>shards` lists."""
    of_kind: dict[str, list[Listing]] = {kind: [] for kind, _ in BULK.values()}
    for kind, hook, file in listed_files(con, source):
        of_kind[kind].append(Listing(hook, url(file)))
    return {view: bulk_query(view, of_kind[kind]) for view, (kind, _) in BULK.items()}


def listed_files(
    con: duckdb.DuckDBPyConnection, source: str = ""
) -> list[tuple[str, str | None, str]]:
    """Return kind, hook and file of every shard with rows: all that the views depend on."""
    return con.execute(
        f"SELECT kind, hook, file FROM {source}shards WHERE n_rows > 0 ORDER BY hook, file"
    ).fetchall()


def bulk_query(view: str, listings: Iterable[Listing]) -> str:
    """Return the query behind a bulk view: one reader per hook, typed and empty for no shards.

    A reader per hook, with the hook as a constant, lets DuckDB drop the others before it opens a
    file: 6 ms instead of 15 ms for one unit of 100 M rows in 6 hooks.
    """
    columns = _COLUMNS[view]
    of_hook: dict[str | None, list[str]] = {}
    for hook, file in listings:
        of_hook.setdefault(None if view in _HOOKLESS else hook, []).append(quoted(file))
    if not of_hook:
        nulls = [f"NULL::{kind} AS {name}" for name, kind in columns.items()]
        named = [] if view in _HOOKLESS else ["NULL::VARCHAR AS hook"]
        return f"SELECT {', '.join(named + nulls)} WHERE false"
    readers = [
        f"SELECT {'' if hook is None else quoted(hook) + ' AS hook, '}{', '.join(columns)}"
        f" FROM read_parquet([{', '.join(paths)}])"
        for hook, paths in of_hook.items()
    ]
    return " UNION ALL ".join(readers)


def quoted(text: str) -> str:
    """Return `text` as an SQL string literal, for statements that take no parameters.

    >>> quoted("it's")
    "'it''s'"
    """
    return "'" + text.replace("'", "''") + "'"


def identifier(name: str) -> str:
    """Return `name` as an SQL identifier.

    >>> identifier('gpt"2')
    '"gpt""2"'
    """
    return '"' + name.replace('"', '""') + '"'
