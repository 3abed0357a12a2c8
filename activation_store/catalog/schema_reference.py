"""What SQL finds in a store: tables, views and macros, as `schema.sql` and `views.sql` say."""

import re
from functools import cache
from typing import Literal, NamedTuple

from activation_store.catalog.tables import schema_sql
from activation_store.catalog.views import BULK, views_sql

_PRIVATE = {"writer_state"}
"""Tables that mean something to the writer alone."""


class Entry(NamedTuple):
    """One table, view or macro."""

    name: str
    kind: Literal["table", "view", "macro"]
    call: str
    """How a query names it: a macro with its parameters and their defaults."""
    about: str
    """What its rows are."""


@cache
def entries() -> tuple[Entry, ...]:
    """Return everything that a query can read from, each kind in the order of its names."""
    tables = dict(re.findall(r"COMMENT ON TABLE (\w+) IS '(.*)';", schema_sql()))
    views = dict(re.findall(r"COMMENT ON VIEW \{at\}(\w+) IS '(.*)';", views_sql()))
    views |= {name: about for name, (_, about) in BULK.items()}
    macros = dict(re.findall(r"COMMENT ON MACRO TABLE \{at\}(\w+) IS '(.*)';", views_sql()))
    calls = dict(re.findall(r"MACRO \{at\}(\w+)\(([^)]*)\) AS TABLE", views_sql()))
    return (
        *(Entry(n, "table", n, a) for n, a in sorted(tables.items()) if n not in _PRIVATE),
        *(Entry(name, "view", name, about) for name, about in sorted(views.items())),
        *(
            Entry(name, "macro", f"{name}({' '.join(calls[name].split())})", about)
            for name, about in sorted(macros.items())
        ),
    )


@cache
def column_comments() -> dict[tuple[str, str], str]:
    """Return what each column of a table holds, by table and column."""
    comments_of = re.findall(r"COMMENT ON COLUMN (\w+)\.(\w+) IS '(.*)';", schema_sql())
    comments = {(table, column): about for table, column, about in comments_of}
    for (table, column), about in list(comments.items()):
        if table == "all_scores":  # whose columns the two views have
            comments |= {(view, column): about for view in ("scores", "hook_scores")}
    return comments
