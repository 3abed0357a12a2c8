"""Which SQL a store runs for a caller it does not trust: one query that only reads.

DuckDB itself is told to touch no file but the shards and to change no setting. That does not stop a
`SELECT` from table functions with effects (logging, profiling, raw memory addresses), so the parse
tree is checked too, and only functions known to be harmless pass.
"""

import json
import re
from collections.abc import Iterator
from typing import Any

import duckdb

from activation_store.errors import QueryError

_TABLE_FUNCTIONS = {
    "coactivation",
    "duckdb_columns",
    "duckdb_databases",
    "duckdb_functions",
    "duckdb_schemas",
    "duckdb_settings",
    "duckdb_tables",
    "duckdb_types",
    "duckdb_views",
    "excerpt",
    "exemplars",
    "generate_series",
    "histogram",
    "histogram_values",
    "json_each",
    "json_tree",
    "pragma_table_info",
    "pragma_version",
    "range",
    "repeat",
    "summary",
    "token_profile",
    "unit",
    "unnest",
}
_EXPLAIN = re.compile(r"\s*explain\s+(?:analyze\s+)?(?=select|from|with|values)", re.IGNORECASE)


def read_only(con: duckdb.DuckDBPyConnection, query: str) -> duckdb.Statement:
    """Parse `query` and return it as the one statement that may run.

    Raises:
        QueryError: it does not parse, is not exactly one query, or could do more than read.
    """
    statement = parsed(con, query)
    if statement.type == duckdb.StatementType.EXPLAIN:
        explained = _EXPLAIN.match(statement.query)
        text = statement.query[explained.end() :] if explained else ""
        _check(con, text or "EXPLAIN")
    elif statement.type == duckdb.StatementType.SELECT:
        _check(con, statement.query)
    else:
        kind = statement.type.name.replace("_", " ")
        raise QueryError(
            f"{kind} is not allowed here: the store is open for reading. Write with "
            "store.append(...) or a writer; for a PRAGMA use its table function, such as "
            "pragma_table_info('hooks'); open with trusted=True to run any SQL."
        )
    return statement


def parsed(con: duckdb.DuckDBPyConnection, query: str) -> duckdb.Statement:
    """Parse `query` and return its one statement.

    Raises:
        QueryError: it does not parse or is not exactly one statement.
    """
    try:
        statements = con.extract_statements(query)
    except duckdb.Error as fault:
        raise QueryError(f"{fault}") from fault
    if len(statements) != 1:
        raise QueryError(
            f"want one statement, got {len(statements)}; run them one by one. A PIVOT counts as "
            "one where it names its values: PIVOT ... ON unit IN (1, 2)."
        )
    return statements[0]


def _check(con: duckdb.DuckDBPyConnection, query: str) -> None:
    ((text,),) = con.execute("SELECT json_serialize_sql($1)", [query]).fetchall()
    tree = json.loads(text)
    if tree["error"]:
        raise QueryError(
            "only SELECT, FROM, WITH, VALUES, DESCRIBE, SUMMARIZE, SHOW and EXPLAIN of these run "
            "here; for a PRAGMA use its table function, such as pragma_table_info('hooks')."
        )
    for name in _table_functions(tree):
        if name not in _TABLE_FUNCTIONS:
            raise QueryError(
                f"table function {name} is not allowed here; allowed: "
                f"{', '.join(sorted(_TABLE_FUNCTIONS))}. Open with trusted=True to run any SQL."
            )


def _table_functions(tree: Any) -> Iterator[str]:
    """Yield the name of every table function in a serialized query, however deep."""
    if isinstance(tree, list):
        for branch in tree:
            yield from _table_functions(branch)
    elif isinstance(tree, dict):
        if tree.get("type") == "TABLE_FUNCTION":
            yield tree["function"]["function_name"].lower()
        for branch in tree.values():
            yield from _table_functions(branch)
