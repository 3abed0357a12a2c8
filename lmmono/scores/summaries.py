"""Scores of hooks and of models: means over the units whose rows a store holds.

Each mean comes twice: `simulation_tar` counts a unit without a defined score as chance, and
`simulation_tar_defined` leaves it out, as some papers do. The first is the one to compare: which
units are left out depends on the model.
"""

import re
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float
from numpy import ndarray

import activation_store as astore
from lmmono.registry.metrics import METRICS
from lmmono.scores.score_job import Row, over_documents
from lmmono.stats.estimate import LEVEL
from lmmono.stats.intervals import student_interval


@dataclass(frozen=True, slots=True)
class ScoreKey:
    """What tells the rows of one scorer and its settings apart from others."""

    metrics: tuple[str, ...]
    """Metrics of the scorer."""
    preset: str | None
    """Preset and changed settings."""
    explainer: str | None
    """Explainer as stored."""
    judge: str | None
    """Judge."""
    seed: int | None
    """Seed."""

    LATEST: ClassVar[str] = """(
        FROM all_scores
        WHERE list_contains($formulas, metric || ' ' || metric_version)
            AND preset IS NOT DISTINCT FROM $preset AND explainer IS NOT DISTINCT FROM $explainer
            AND judge IS NOT DISTINCT FROM $judge AND seed IS NOT DISTINCT FROM $seed
        QUALIFY row_number() OVER (
            PARTITION BY metric, control, hook, unit ORDER BY created_at DESC) = 1)"""
    """The rows of this key in SQL, with parameters of `parameters`: those of the present formulas,
    and of several for one unit (asked again with other prompts) the latest."""

    def columns(self) -> dict[str, Any]:
        """Return the columns of table `all_scores` that it names."""
        return {name: getattr(self, name) for name in ("preset", "explainer", "judge", "seed")}

    def parameters(self) -> dict[str, Any]:
        """Return the parameters of `LATEST`."""
        formulas = [f"{metric} {METRICS[metric].version}" for metric in self.metrics]
        return {"formulas": formulas, **self.columns()}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.columns().items())


@dataclass(frozen=True, slots=True)
class HookScores:
    """The scores of the units of one hook under one metric and control."""

    values: Float[ndarray, " units"]
    """Value of each unit that has one; chance where it is not defined."""
    defined: Float[ndarray, " defined"]
    """Values that are defined."""
    n_failed: int
    """Units without a value."""
    n_below: int
    """Units left out, since they fire too rarely for the metric."""
    n_records: int
    """Records of all units."""
    n_tokens: int
    """Tokens of all units' records."""
    n_documents: int
    """Documents behind the unit that has the most of them; units share documents."""


def read_scores(
    store: astore.Store, hooks: list[str], key: ScoreKey
) -> dict[tuple[str, str | None], dict[str, HookScores]]:
    """Return the scores of units by metric and control, then by hook."""
    query = f"""SELECT metric, control, hook, value, nan_fraction, n_records, n_tokens,
            n_documents, coalesce(is_below, false)
        FROM {ScoreKey.LATEST} WHERE unit IS NOT NULL AND list_contains($hooks, hook)
        ORDER BY metric, control, hook, unit"""
    rows = store.sql(query, hooks=hooks, **key.parameters()).fetchall()
    by_metric: dict[tuple[str, str | None], dict[str, HookScores]] = {}
    for (metric, control, hook), of_hook in groupby(rows, key=lambda row: row[:3]):
        numbers = np.array([row[3:] for row in of_hook], np.float64)  # None becomes NaN
        value, nan_fraction, n_records, n_tokens, n_documents, is_below = numbers.T
        counts, has_value = is_below == 0, ~np.isnan(value)
        by_metric.setdefault((metric, control), {})[hook] = HookScores(
            value[counts & has_value],
            value[counts & has_value & ~(nan_fraction > 0)],
            int((counts & ~has_value).sum()),
            int((~counts).sum()),
            int(np.nansum(n_records[counts])),
            int(np.nansum(n_tokens[counts])),
            int(np.nanmax(n_documents[counts], initial=0)),
        )
    return by_metric


def summary_rows(store: astore.Store, hooks: list[str], key: ScoreKey) -> list[Row]:
    """Return rows for each hook, and for all blocks' hooks of one kind, named `blocks.*. ...`.

    The mean of a model is the mean over its hooks of their means over units. That of the defined
    scores is the mean over units, whatever their hook: a hook with three of them counts as three.
    Units that fire more rarely than the least density of the metric are in none; details say how
    many that were.
    """
    rows: list[Row] = []
    for (metric, control), by_hook in read_scores(store, hooks, key).items():
        groups: dict[str, dict[str, HookScores]] = {}
        for hook, scores in by_hook.items():
            for name in {hook, re.sub(r"^blocks\.\d+\.", "blocks.*.", hook)}:
                groups.setdefault(name, {})[hook] = scores
        for name, members in groups.items():
            shared = {"control": control, "hook": name, "split": "score"} | key.columns()
            rows += [shared | row for row in _means(metric, members)]
    return rows


def _means(metric: str, by_hook: dict[str, HookScores]) -> list[Row]:
    """Return the row with all units, and where there is a metric for it, the one with defined."""
    groups = by_hook.values()
    n_all = sum(len(group.values) for group in groups)
    n_defined = sum(len(group.defined) for group in groups)
    shared: Row = {
        "ci_level": LEVEL,
        "n_documents": max(group.n_documents for group in groups) or None,
        "n_records": sum(group.n_records for group in groups),
        "n_tokens": sum(group.n_tokens for group in groups),
        "n_failures": sum(group.n_failed for group in groups),
        "nan_fraction": 1 - n_defined / n_all if n_all else None,
    }
    n_below = sum(group.n_below for group in groups)
    # a hook of which no unit counts has no mean, and takes no part in that of the model
    whole = {
        hook: group.values
        for hook, group in by_hook.items()
        if len(group.values) or not group.n_below
    }
    rows = [_mean(metric, whole, "hooks")]
    if f"{metric}_defined" in METRICS:
        defined = {hook: group.defined for hook, group in by_hook.items() if len(group.defined)}
        rows.append(_mean(f"{metric}_defined", defined, "units"))
    for row in rows:
        if n_below:
            share = n_below / (n_below + n_all + shared["n_failures"])
            row["details"] = row.get("details", {}) | {"n_below": n_below, "below_fraction": share}
            if not n_all:
                row["failure"] = "all_below_least_density"
        if "ci_method" in row and shared["n_documents"]:
            row["ci_method"] = over_documents(row["ci_method"], shared["n_documents"])
    return [shared | row for row in rows]


def _mean(metric: str, by_hook: dict[str, ndarray], over: Literal["hooks", "units"]) -> Row:
    n = sum(map(len, by_hook.values()))
    row: Row = {"metric": metric, "metric_version": METRICS[metric].version, "n": n}
    if not n or not all(map(len, by_hook.values())):
        return row | {"failure": "no_defined_unit"}
    pooled = np.concatenate(list(by_hook.values()))
    groups = list(by_hook.values()) if over == "hooks" else [pooled]
    row["value"], low, high = student_interval(groups)
    row["details"] = {
        "median": float(np.median(pooled)),
        "share_above_0.2": float(np.mean([(scores > 0.2).mean() for scores in groups])),
        "mean_of_hook": {hook: float(scores.mean()) for hook, scores in by_hook.items()},
        "n_of_hook": {hook: len(scores) for hook, scores in by_hook.items()},
    }
    if np.isnan(low):
        return row
    within = "units within hooks" if over == "hooks" else "units of all hooks"
    method = f"Student t over {within}; one model, its training and the documents held fast"
    return row | {"ci_low": low, "ci_high": high, "ci_method": method}
