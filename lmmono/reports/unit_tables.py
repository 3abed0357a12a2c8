"""Tables of units: what is said of them, what that scores beside controls; one unit whole."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import activation_store as astore
from lmmono.errors import RunError, nearest
from lmmono.registry.scorers import SCORERS
from lmmono.reports.table import Controls, Interval, ReportTable

N_SHOWN = 3
"""Best units, and worst ones, of a table."""

_HEADLINES = {scorer.metrics[0]: scorer for scorer in SCORERS.values()}
"""The metric that each scorer is named by; the others are more detail than a table has room for."""

_KEY = ("metric", "preset", "explainer", "judge", "hook")

_MEANS = """
SELECT metric, preset, explainer, judge, hook, control, value, ci_low, ci_high, n, nan_fraction
FROM all_scores
WHERE unit IS NULL AND dictionary IS NULL AND list_contains($metrics, metric)
    AND value IS NOT NULL
QUALIFY row_number() OVER (
    PARTITION BY metric, preset, explainer, judge, hook, control ORDER BY created_at DESC) = 1
ORDER BY explainer NULLS FIRST, metric, preset NULLS FIRST, judge, hook, control NULLS FIRST
"""

# the latest score of each unit where the units were asked about again, with its controls beside it
_UNITS = """
WITH latest AS (
    FROM all_scores
    WHERE metric = $metric AND unit IS NOT NULL
        AND preset IS NOT DISTINCT FROM $preset AND explainer IS NOT DISTINCT FROM $explainer
        AND judge IS NOT DISTINCT FROM $judge AND control IS DISTINCT FROM 'untrained_model'
    QUALIFY row_number() OVER (PARTITION BY hook, unit, control ORDER BY created_at DESC) = 1
),
scored AS (
    SELECT
        hook, unit,
        any_value(value) FILTER (control IS NULL) AS value,
        any_value(ci_low) FILTER (control IS NULL) AS ci_low,
        any_value(ci_high) FILTER (control IS NULL) AS ci_high,
        list(control ORDER BY control) FILTER (control IS NOT NULL) AS control_names,
        list(value ORDER BY control) FILTER (control IS NOT NULL) AS control_values
    FROM latest
    GROUP BY hook, unit
    HAVING bool_or(control IS NULL AND value IS NOT NULL AND NOT coalesce(nan_fraction > 0, false))
),
placed AS (
    SELECT
        *,
        row_number() OVER (ORDER BY coalesce(ci_low, value) DESC, hook, unit) AS place,
        count(*) OVER () AS n
    FROM scored
)
FROM placed WHERE place <= $k OR place > n - $k ORDER BY place
"""

_EXCERPTS = """
SELECT u.hook, u.unit, e.excerpt
FROM (SELECT DISTINCT unnest($hooks::VARCHAR[]) AS hook, unnest($units::INTEGER[]) AS unit) u,
    LATERAL exemplars(u.hook, u.unit, 1, before := $before, after := $after) e
"""

_SAID = """
SELECT text, failure FROM explanations
WHERE hook = $hook AND unit = $unit AND explainer = $explainer AND coalesce(rank, 1) = 1
ORDER BY created_at DESC LIMIT 1
"""

_EXPLAINED = """
SELECT e.hook, e.unit, e.text, s.density
FROM explanations e JOIN unit_stats s USING (hook, unit)
WHERE e.explainer = $explainer AND coalesce(e.rank, 1) = 1 AND e.text IS NOT NULL
ORDER BY s.kurtosis DESC NULLS LAST, e.hook, e.unit LIMIT $k
"""

_COUNTS = """
SELECT
    count(*) FILTER (failure IS NULL) AS explained,
    list(DISTINCT failure) FILTER (failure IS NOT NULL) AS reasons,
    count(*) FILTER (failure IS NOT NULL) AS failed
FROM explanations WHERE explainer = $explainer AND coalesce(rank, 1) = 1
"""

_TOKENS = """
SELECT token, n_acts, n_tokens, density, mean_act, max_act FROM token_profile($hook, $unit)
ORDER BY n_acts * mean_act DESC LIMIT 10
"""

_UNIT_EXPLANATIONS = """
SELECT explainer, seed, text, failure, n_records FROM explanations
WHERE hook = $hook AND unit = $unit AND coalesce(rank, 1) = 1 ORDER BY explainer, seed
"""

_UNIT_SCORES = """
SELECT metric, preset, explainer, judge, control, value, ci_low, ci_high, n, nan_fraction, failure
FROM all_scores
WHERE hook = $hook AND unit = $unit AND control IS DISTINCT FROM 'untrained_model'
ORDER BY explainer NULLS FIRST, metric, preset NULLS FIRST, judge, control NULLS FIRST, created_at
"""

_PROMOTES = """
SELECT hook || ':' || unit AS unit, max(promotes.logit) AS logit,
    any_value(control) FILTER (rank = 1),
    list(coalesce(token, '[' || token_id || ']') ORDER BY rank)[:5] AS promoted
FROM promotes LEFT JOIN vocabulary USING (token_id)
WHERE sign = 'up'
GROUP BY hook, promotes.unit
ORDER BY max(promotes.logit) - any_value(control) FILTER (rank = 1) DESC, hook, promotes.unit
LIMIT $k
"""

Row = dict[str, Any]


def score_tables(store: astore.Store, name: str) -> list[ReportTable]:
    """Return the means of each scorer beside their controls, then its best and worst units.

    Args:
        store: Open store.
        name: What the title calls the run.
    """
    rows = _read(store, _MEANS, metrics=list(_HEADLINES))
    if not rows:
        return []
    by_key: dict[tuple[Any, ...], dict[str | None, Row]] = {}
    for row in rows:
        by_key.setdefault(tuple(row[part] for part in _KEY), {})[row["control"]] = row
    by_key = {key: by_control for key, by_control in by_key.items() if None in by_control}
    means = [
        (_label(row), row["hook"], _interval(row), _controls(by_control), row["n"], _undefined(row))
        for by_control in by_key.values()
        for row in (by_control[None],)
    ]
    tables = [
        ReportTable(
            title=f"Scores of {name}",
            columns=("scorer", "hook", "mean", "controls", "units", "not defined"),
            rows=tuple(means),
            note="mean: over units, with its 95 % interval; blocks.*: the mean over the hooks of "
            f"all blocks. {_about_controls(row[3] for row in means)}not defined: share of units "
            "without a score of their own, such as silent ones, and what each counts as.",
            spare=("units",),
        )
    ]
    asked = dict.fromkeys(key[:-1] for key in by_key)
    for metric, preset, explainer, judge in asked:
        table = _placed_table(store, name, metric, preset, explainer, judge)
        tables += [table] if table.rows else []
    return tables


def _placed_table(
    store: astore.Store,
    name: str,
    metric: str,
    preset: str | None,
    explainer: str | None,
    judge: str | None,
) -> ReportTable:
    """Return the best and the worst units of one scorer, with what is said of them and a text."""
    key: Row = {"metric": metric, "preset": preset, "explainer": explainer, "judge": judge}
    rows = _read(store, _UNITS, k=N_SHOWN, **key)
    controls = [
        Controls(zip(row["control_names"] or [], row["control_values"] or [], strict=True))
        for row in rows
    ]
    cells: list[tuple[object, ...]] = []
    texts = excerpts(store, [(row["hook"], row["unit"]) for row in rows])
    for row, beside, text in zip(rows, controls, texts, strict=True):
        explanation = (
            [] if explainer is None else [_said(store, row["hook"], row["unit"], explainer)]
        )
        cells.append(
            (
                row["place"],
                f"{row['hook']}:{row['unit']}",
                _interval(row),
                beside,
                *explanation,
                text,
            )
        )
    n = rows[0]["n"] if rows else 0
    return ReportTable(
        title=f"Best and worst units of {name} by {_label(key)}",
        columns=(
            *("place", "unit", "score", "controls"),
            *(() if explainer is None else ("explanation",)),
            "excerpt",
        ),
        rows=tuple(cells),
        note=f"Of {n:,} units with a score, ranked by the lower end of its 95 % interval where it "
        f"has one. {_about_controls(controls)}« » mark the token of the largest activation.",
        spare=("place",),
    )


def explanation_tables(store: astore.Store, name: str) -> list[ReportTable]:
    """Return for each explainer how many units it explains, and what it says of the most peaked.

    Args:
        store: Open store.
        name: What the title calls the run.
    """
    query = "SELECT DISTINCT explainer FROM explanations ORDER BY explainer"
    tables: list[ReportTable] = []
    for (explainer,) in store.sql(query).fetchall():
        ((explained, reasons, failed),) = store.sql(_COUNTS, explainer=explainer).fetchall()
        rows = _read(store, _EXPLAINED, explainer=explainer, k=2 * N_SHOWN)
        texts = excerpts(store, [(row["hook"], row["unit"]) for row in rows])
        why = f", {failed:,} are not ({', '.join(sorted(reasons))})" if failed else ""
        tables.append(
            ReportTable(
                title=f"Units of {name} explained by {explainer}",
                columns=("unit", "density", "explanation", "excerpt"),
                rows=tuple(
                    (f"{row['hook']}:{row['unit']}", row["density"], row["text"], text)
                    for row, text in zip(rows, texts, strict=True)
                ),
                note=f"{explained:,} units are explained{why}; shown are those with the largest "
                "kurtosis. Scores on other documents say how far to believe them.",
            )
        )
    return tables


def promotes_table(store: astore.Store, name: str) -> ReportTable:
    """Return the units whose most promoted token stands out most from random mixtures of units."""
    rows = store.sql(_PROMOTES, k=2 * N_SHOWN).fetchall()
    return ReportTable(
        title=f"Units of {name} by what they promote",
        columns=("unit", "logit", "random", "promoted tokens"),
        rows=tuple((*numbers, " ".join(map(repr, tokens))) for *numbers, tokens in rows),
        note="logit: of the most promoted token, less the mean over the vocabulary, from the "
        "unit's direction alone at a root mean square of 1. random: the same of mixtures of units.",
    )


def hook_table(store: astore.Store, name: str) -> ReportTable:
    """Return what a store has captured: a row per hook."""
    query = """SELECT hook, kind, d, n_tokens, n_acts,
        CASE kind WHEN 'rows' THEN n_acts / (n_tokens::DOUBLE * d) END AS density
        FROM hooks ORDER BY hook, kind"""
    result = store.sql(query)
    return ReportTable(
        title=f"Captured of {name}",
        columns=("hook", "stored as", "units", "tokens", "values", "density"),
        rows=tuple(result.fetchall()),
        note="density: share of pairs (token, unit) that are stored.",
    )


def unit_tables(store: astore.Store, hook: str, unit: int, *, k: int = 8) -> list[ReportTable]:
    """Return one unit whole: statistics, exemplars, tokens, explanations, scores with controls.

    Args:
        store: Open store.
        hook: Hook stored as rows.
        unit: Index of the unit.
        k: Exemplars shown.

    Raises:
        ContentError: The store has no such unit.
    """
    stored = store.unit(hook, unit)
    stats = {name: value for name, value in stored.stats.items() if name not in ("hook", "unit")}
    shown = [(e.rank, e.act, e.doc_id, e.text) for e in stored.exemplars(k, before=24, after=12)]
    tokens = store.sql(_TOKENS, hook=hook, unit=unit).fetchall()
    explanations = _read(store, _UNIT_EXPLANATIONS, hook=hook, unit=unit)
    title = f"{hook}:{unit}"
    tables = [
        ReportTable(f"{title}, statistics", ("statistic", "value"), tuple(stats.items())),
        ReportTable(
            f"{title}, strongest exemplars",
            ("rank", "act", "document", "excerpt"),
            tuple(shown),
            note="At most one per document; « » mark the token.",
        ),
        ReportTable(
            f"{title}, tokens",
            ("token", "fires", "of", "share", "mean act", "max act"),
            tuple((repr(token or ""), *numbers) for token, *numbers in tokens),
            note="Those that carry most of its activation.",
        ),
        ReportTable(
            f"{title}, explanations",
            ("explainer", "seed", "explanation", "records"),
            tuple(
                (row["explainer"], row["seed"], row["text"] or row["failure"], row["n_records"])
                for row in explanations
            ),
        ),
        _unit_score_table(title, _read(store, _UNIT_SCORES, hook=hook, unit=unit)),
    ]
    return [table for table in tables if table.rows]


def _unit_score_table(title: str, rows: Sequence[Row]) -> ReportTable:
    """Return the scores of one unit, each with its controls in its row."""
    by_key: dict[tuple[Any, ...], dict[str | None, Row]] = {}
    for row in rows:
        key = tuple(row[part] for part in _KEY if part != "hook")
        by_key.setdefault(key, {})[row["control"]] = row
    cells: list[tuple[object, ...]] = []
    beside: list[Controls] = []
    for by_control in by_key.values():
        row = by_control.get(None)
        if row is None:
            continue
        beside.append(_controls(by_control))
        is_undefined = bool(row["nan_fraction"]) and row["nan_fraction"] >= 1
        cells.append(
            (
                _label(row),
                _interval(row) if row["value"] is not None else None,
                beside[-1],
                row["n"],
                row["failure"] or ("not defined: counts as chance" if is_undefined else ""),
            )
        )
    return ReportTable(
        f"{title}, scores",
        ("scorer", "score", "controls", "items", "why none"),
        tuple(cells),
        note=f"{_about_controls(beside)}With 95 % intervals. A score with a reason beside it is "
        "not defined, and counts as chance.",
        spare=("items",),
    )


def find_unit(store: astore.Store, text: str) -> tuple[str, int]:
    """Return the hook and the index that `HOOK:UNIT` names; the hook as a part of it or a glob.

    >>> find_unit(store, "blocks.1.mlp:17")  # doctest: +SKIP
    ('blocks.1.mlp.hook_post', 17)

    Raises:
        RunError: It names no unit, or several hooks.
    """
    part, _, index = text.rpartition(":")
    if not re.fullmatch(r"\d{1,9}", index):
        raise RunError(f"{text}: want HOOK:UNIT, such as blocks.1.mlp.hook_post:17")
    rows = store.sql("SELECT DISTINCT hook FROM unit_stats ORDER BY hook").fetchall()
    hooks = [hook for (hook,) in rows]
    fitting = [part] if part in hooks else [h for h in hooks if part in h or fnmatchcase(h, part)]
    if len(fitting) != 1:
        several = f"several hooks fit: {', '.join(fitting)}" if fitting else nearest(part, hooks)
        raise RunError(f"{text}: want one hook of {store.path.parent}; {several}")
    return fitting[0], int(index)


def best_unit(store: astore.Store) -> str:
    """Return a unit worth a look, as `HOOK:UNIT`: the most peaked of those that fire often enough.

    "" where the store has none.
    """
    query = """SELECT hook || ':' || unit FROM unit_stats WHERE n_active >= 20
        ORDER BY kurtosis DESC NULLS LAST, hook, unit LIMIT 1"""
    rows = store.sql(query).fetchall()
    return rows[0][0] if rows else ""


def _read(store: astore.Store, query: str, **parameters: Any) -> list[Row]:
    result = store.sql(query, **parameters)
    names = result.columns
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]


def _label(row: Mapping[str, Any]) -> str:
    """Return the name of a scorer with what decides its result: preset, explainer, judge."""
    about = (row["preset"], row["explainer"], row["judge"])
    parts = [row["metric"], *(str(part) for part in about if part is not None)]
    return ", ".join(parts)


def _interval(row: Mapping[str, Any]) -> Interval:
    ends = [math.nan if row[name] is None else row[name] for name in ("ci_low", "ci_high")]
    return Interval(row["value"], *ends)


def _controls(by_control: Mapping[str | None, Row]) -> Controls:
    """Return the values of a score's controls, by their names in order."""
    names = sorted(name for name in by_control if name is not None)
    return Controls(
        {n: by_control[n]["value"] for n in names if by_control[n]["value"] is not None}
    )


_CONTROLS = {
    "matched_density": "the explanation of a unit of about the same density",
    "random_explanation": "the explanation of another unit",
    "shuffled": "the same activations on other tokens",
    "shuffled_pairing": "explanations beside records of other units",
    "untrained_model": "the same on a model that was never trained",
}


def _about_controls(controls: Iterable[Controls]) -> str:
    """Return a sentence for each kind of control that a table shows."""
    names = sorted({name for shown in controls for name in shown})
    return "".join(f"{name}: {_CONTROLS[name]}. " for name in names if name in _CONTROLS)


def _undefined(row: Mapping[str, Any]) -> str:
    """Return the share of units whose score is not defined, and what they count as.

    >>> _undefined({"nan_fraction": 0.25, "metric": "detection"})
    '25% as 0.5'
    """
    if not row["nan_fraction"]:
        return ""
    chance = _HEADLINES[row["metric"]].chance
    return f"{row['nan_fraction']:.0%} as {chance or 0.0:g}"


def _said(store: astore.Store, hook: str, unit: int, explainer: str) -> str:
    rows = store.sql(_SAID, hook=hook, unit=unit, explainer=explainer).fetchall()
    return (rows[0][0] or rows[0][1] or "") if rows else ""


def excerpts(
    store: astore.Store, units: Sequence[tuple[str, int]], before: int = 10, after: int = 4
) -> list[str]:
    """Return the strongest exemplar of each unit, given as hook and index; "" where it has none.

    One query for all: two for each take ten times as long.
    """
    if not units:
        return []
    hooks, indices = zip(*units, strict=True)
    arguments = {"hooks": list(hooks), "units": list(indices), "before": before, "after": after}
    texts = {
        (hook, unit): text for hook, unit, text in store.sql(_EXCERPTS, **arguments).fetchall()
    }
    return [texts.get(unit, "") for unit in units]
