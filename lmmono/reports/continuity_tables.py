"""Tables of suite `continuity`: ways to tune side by side, one table per task."""

from collections.abc import Sequence

import activation_store as astore
from lmmono.reports.seed_means import difference, over_seeds
from lmmono.reports.table import ReportTable
from lmmono.suites.results import CONTINUITY

_VALUES = """SELECT task, feature,
        concat_ws(' ', metric, nullif(corruption, 'clean'),
            CASE WHEN split <> 'test' THEN split END, level) AS measure, seed, value
    FROM robustness
    WHERE suite = $suite AND seed IS NOT NULL AND value IS NOT NULL
    ORDER BY task, metric, corruption, level, split, feature, seed"""


Measures = dict[str, dict[str, dict[int, float]]]
"""Values by measure, then by way to tune, then by seed."""


def continuity_tables(store: astore.Store, ways: Sequence[str] = ()) -> list[ReportTable]:
    """Return a table of values per task, a row per measure, and tables of differences.

    Empty where the suite was not run.

    Args:
        store: Open store.
        ways: Ways to tune in the order of the columns; others come behind. Differences are from
            the first two, such as no constraint, and the noise alone.
    """
    values: dict[str, Measures] = {}
    for task, feature, measure, seed, value in store.sql(_VALUES, suite=CONTINUITY).fetchall():
        rows = values.setdefault(task, {})
        rows.setdefault(measure, {}).setdefault(feature, {})[seed] = value
    tables: list[ReportTable] = []
    for task, rows in values.items():
        stored = list(dict.fromkeys(feature for row in rows.values() for feature in row))
        features = [*(way for way in ways if way in stored), *(f for f in stored if f not in ways)]
        tables.append(_table(task, rows, features))
        tables += [_less(task, rows, features, of) for of in ways[:2] if of in stored]
    return tables


def _table(task: str, rows: Measures, features: Sequence[str]) -> ReportTable:
    return ReportTable(
        title=f"Continuity, {task}",
        columns=("measure", *features),
        rows=tuple(
            (
                measure,
                *(
                    over_seeds(row.get(feature, {}).values(), measure.split()[0])
                    for feature in features
                ),
            )
            for measure, row in rows.items()
        ),
        note="Means over seeds with their 95 % intervals (Student t). A small distance is good "
        "only where the meaning stays: see meaning_ratio and confidence beside it.",
    )


def _less(task: str, rows: Measures, features: Sequence[str], of: str) -> ReportTable:
    others = [feature for feature in features if feature != of]
    return ReportTable(
        title=f"Continuity, {task}: less {of}",
        columns=("measure", *others),
        rows=tuple(
            (measure, *(difference(row.get(feature, {}), row.get(of, {})) for feature in others))
            for measure, row in rows.items()
        ),
        note=f"Difference from {of}, seed by seed, with its 95 % interval (Student t); of 100 such "
        "intervals about 5 leave 0 out by chance.",
    )
