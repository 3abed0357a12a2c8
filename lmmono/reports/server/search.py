"""Units of a run as a list: sorted, filtered, found by a token, a text or what is said of them."""

import importlib.util
import threading
from dataclasses import dataclass
from typing import Any

import duckdb

from activation_store.lake.lake_place import extension_files
from lmmono.errors import RunError, nearest
from lmmono.reports.server.served import ServedRun

STATISTICS = ("density", "max_act", "mean", "variance", "skewness", "kurtosis", "q99", "n_active")
"""Columns of `unit_stats` that a list shows and sorts by."""
PAGE = 50
"""Units of one page of a list."""
FURTHEST = 20_000
"""Units that can be paged through; nobody reads further, and a large offset costs a sort."""


@dataclass(frozen=True, slots=True)
class UnitList:
    """One page of a list of units."""

    rows: list[dict[str, Any]]
    """hook, unit, the statistics, value, ci_low, ci_high, control, token, excerpt."""
    n: int
    """Units that fit, over all pages."""
    metric: str | None
    """Whose scores stand in `value`; None for none."""


def metrics(run: ServedRun) -> list[str]:
    """Return the metrics that units of a run are scored by."""
    rows = run.store.sql(
        "SELECT DISTINCT metric FROM scores WHERE unit IS NOT NULL ORDER BY metric"
    ).fetchall()
    return [metric for (metric,) in rows]


_LIST = """
WITH scored AS (
    SELECT
        s.hook, s.unit, max(s.value) FILTER (s.control IS NULL) AS value,
        arg_max(s.ci_low, s.value) FILTER (s.control IS NULL) AS ci_low,
        arg_max(s.ci_high, s.value) FILTER (s.control IS NULL) AS ci_high,
        max(s.value) FILTER (s.control IS NOT NULL) AS control
    FROM all_scores s
    WHERE s.metric = $metric AND s.unit IS NOT NULL AND isfinite(s.value)
    GROUP BY s.hook, s.unit
),
fitting AS (
    SELECT
        u.hook, u.unit, {statistics},
        scored.value, scored.ci_low, scored.ci_high, scored.control,
        scored.value - scored.control AS gain
    FROM unit_stats u
    LEFT JOIN scored ON scored.hook = u.hook AND scored.unit = u.unit
    WHERE ($hook IS NULL OR u.hook = $hook)
        AND ($n_least IS NULL OR u.n_active >= $n_least)
        AND ($picked IS NULL OR list_contains($picked, u.hook || ':' || u.unit))
),
shown AS (
    SELECT *, count(*) OVER () AS n FROM fitting
    ORDER BY {key} {order} NULLS LAST, hook, unit LIMIT $most OFFSET $first
)
SELECT s.*, v.token
FROM shown s
LEFT JOIN exemplars e ON e.hook = s.hook AND e.unit = s.unit AND e.kind = 'top' AND e.rank = 1
LEFT JOIN token_ids t ON t.seq_id = e.seq_id AND t.pos = e.pos
LEFT JOIN vocabulary v ON v.token_id = t.token_id
ORDER BY s.{key} {order} NULLS LAST, s.hook, s.unit
"""


def list_units(
    run: ServedRun,
    *,
    hook: str | None = None,
    sort: str = "kurtosis",
    ascending: bool = False,
    metric: str | None = None,
    n_least: int | None = 20,
    first: int = 0,
    picked: list[str] | None = None,
) -> UnitList:
    """Return a page of the units of a run.

    Args:
        run: The run.
        hook: Units of this hook alone.
        sort: A statistic, `unit`, `score`, or `gain`: the score minus its best control.
        ascending: The smallest first.
        metric: The scorer whose values are shown.
        n_least: Units that are active at fewer tokens are left out.
        first: How many units of the list come before.
        picked: Only these, each as HOOK:UNIT.

    Raises:
        RunError: There is nothing of that name to sort by.
    """
    keys = {name: name for name in (*STATISTICS, "unit", "gain")} | {"score": "value"}
    if sort not in keys:
        raise RunError(f"sort: {sort!r}: no such statistic; {nearest(sort, keys)}")
    query = _LIST.format(
        key=keys[sort],  # a name of our own, never the text of a request
        order="ASC" if ascending else "DESC",
        statistics=", ".join(f"u.{name}" for name in STATISTICS),
    )
    given = {"hook": hook, "metric": metric, "n_least": n_least, "picked": picked}
    first = min(max(first, 0), FURTHEST)
    result = run.store.sql(query, **given, most=PAGE, first=first)
    names = result.columns
    rows = [dict(zip(names, row, strict=True)) for row in result.fetchall()]
    return UnitList(rows, rows[0]["n"] if rows else 0, metric)


_SAID = """
SELECT hook, unit, explainer, text FROM explanations
WHERE coalesce(rank, 1) = 1 AND text IS NOT NULL AND contains(lower(text), lower($text))
ORDER BY length(text), hook, unit LIMIT $most
"""


class Explained:
    """Search in what is said of units: by words where DuckDB's FTS is installed, else by a part."""

    def __init__(self, run: ServedRun) -> None:
        self._run = run
        self._turn = threading.Lock()
        self._index: duckdb.DuckDBPyConnection | None = None
        self.has_index = importlib.util.find_spec("duckdb_extension_fts") is not None
        """Whether words are ranked (BM25), with their endings cut off."""

    def find(self, text: str, most: int = PAGE) -> list[dict[str, Any]]:
        """Return hook, unit, explainer and text of the explanations that fit best."""
        if not text.strip():
            return []
        if self.has_index:
            con = self._connection().cursor()
            rows = con.execute(
                "SELECT hook, unit, explainer, text, fts_main_said.match_bm25(id, $1) AS score "
                "FROM said WHERE score IS NOT NULL ORDER BY score DESC, id LIMIT $2",
                [text, most],
            ).fetchall()
        else:
            rows = self._run.store.sql(_SAID, text=text.strip(), most=most).fetchall()
        return [dict(zip(("hook", "unit", "explainer", "text"), row, strict=False)) for row in rows]

    def _connection(self) -> duckdb.DuckDBPyConnection:
        """Return a database in memory with the explanations and their index, made once."""
        with self._turn:
            if self._index is None:
                said = self._run.store.sql(
                    "SELECT row_number() OVER () AS id, hook, unit, explainer, text "
                    "FROM explanations WHERE coalesce(rank, 1) = 1 AND text IS NOT NULL"
                ).to_arrow_table()
                (file,) = extension_files(["fts"])
                con = duckdb.connect(":memory:", config={"autoinstall_known_extensions": False})
                con.load_extension(str(file))
                con.register("incoming", said)
                con.execute("CREATE TABLE said AS FROM incoming")
                con.unregister("incoming")
                con.execute("PRAGMA create_fts_index('said', 'id', 'text')")
                con.execute("SET enable_external_access = false")
                con.execute("SET lock_configuration = true")
                self._index = con
        return self._index
