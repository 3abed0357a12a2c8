"""Tables of suite `continuity`: ways to tune side by side, one table per task."""

import activation_store as astore
from lmmono.reports.flint_tables import over_seeds
from lmmono.reports.table import ReportTable
from lmmono.suites.results import CONTINUITY

_VALUES = """SELECT task, feature,
        concat_ws(' ', metric, nullif(corruption, 'clean'),
            CASE WHEN split <> 'test' THEN split END, level) AS measure, seed, value
    FROM robustness
    WHERE suite = $suite AND seed IS NOT NULL AND value IS NOT NULL
    ORDER BY task, metric, corruption, level, split, feature, seed"""


def continuity_tables(store: astore.Store) -> list[ReportTable]:
    """Return a table per task, a row per measure; none where the suite was not run."""
    values: dict[str, dict[str, dict[str, dict[int, float]]]] = {}
    for task, feature, measure, seed, value in store.sql(_VALUES, suite=CONTINUITY).fetchall():
        rows = values.setdefault(task, {})
        rows.setdefault(measure, {}).setdefault(feature, {})[seed] = value
    return [_table(task, rows) for task, rows in values.items()]


def _table(task: str, rows: dict[str, dict[str, dict[int, float]]]) -> ReportTable:
    features = list(dict.fromkeys(feature for row in rows.values() for feature in row))
    return ReportTable(
        title=f"Continuity, {task}",
        columns=("measure", *features),
        rows=tuple(
            (measure, *(over_seeds(row.get(feature, {})) for feature in features))
            for measure, row in rows.items()
        ),
        note="Means over seeds with their 95 % intervals (Student t). A small distance is good "
        "only where the meaning stays: see meaning_ratio and confidence beside it.",
    )
