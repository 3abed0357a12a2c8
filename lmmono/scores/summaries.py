"""Scores of hooks and of models: means over the units whose rows a store holds.

Each mean comes twice: `simulation_tar` counts a unit without a defined score as 0, and
`simulation_tar_defined` leaves it out, as some papers do. The first is the one to compare: which
units are left out depends on the model.
"""

import re
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from numpy import ndarray

import activation_store as astore
from lmmono.registry.metrics import METRICS
from lmmono.scores.score_job import Row
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

    MATCHES: ClassVar[str] = " AND ".join(
        f"{name} IS NOT DISTINCT FROM ${name}" for name in ("preset", "explainer", "judge", "seed")
    )
    """The condition on rows of table `scores`, whose parameters `parameters` returns."""

    def parameters(self) -> dict[str, Any]:
        """Return the parameters of `MATCHES`, which are also columns of a row."""
        return {name: getattr(self, name) for name in ("preset", "explainer", "judge", "seed")}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.parameters().items())


@dataclass(frozen=True, slots=True)
class HookScores:
    """The scores of the units of one hook under one metric and control."""

    values: Float[ndarray, " units"]
    """Value of each unit that has one; chance where it is not defined."""
    defined: Float[ndarray, " defined"]
    """Values that are defined."""
    n_failed: int
    """Units without a value."""
    n_records: int
    """Records of all units."""
    n_tokens: int
    """Tokens of all units' records."""


def read_scores(
    store: astore.Store, hooks: list[str], key: ScoreKey
) -> dict[tuple[str, str | None], dict[str, HookScores]]:
    """Return the scores of units by metric and control, then by hook."""
    query = f"""SELECT metric, control, hook, value, nan_fraction, n_records, n_tokens
        FROM scores WHERE unit IS NOT NULL AND list_contains($metrics, metric)
            AND list_contains($hooks, hook) AND {ScoreKey.MATCHES}
        ORDER BY metric, control, hook, unit"""
    rows = store.sql(query, metrics=list(key.metrics), hooks=hooks, **key.parameters()).fetchall()
    by_metric: dict[tuple[str, str | None], dict[str, HookScores]] = {}
    for (metric, control, hook), of_hook in groupby(rows, key=lambda row: row[:3]):
        numbers = np.array([row[3:] for row in of_hook], np.float64)  # None becomes NaN
        value, nan_fraction, n_records, n_tokens = numbers.T
        has_value = ~np.isnan(value)
        by_metric.setdefault((metric, control), {})[hook] = HookScores(
            value[has_value],
            value[has_value & ~(nan_fraction > 0)],
            int((~has_value).sum()),
            int(np.nansum(n_records)),
            int(np.nansum(n_tokens)),
        )
    return by_metric


def summary_rows(store: astore.Store, hooks: list[str], key: ScoreKey) -> list[Row]:
    """Return rows for each hook, and for all blocks' hooks of one kind, named `blocks.*. ...`.

    The mean of a model is the mean over its hooks of their means over units.
    """
    rows: list[Row] = []
    for (metric, control), by_hook in read_scores(store, hooks, key).items():
        groups: dict[str, dict[str, HookScores]] = {}
        for hook, scores in by_hook.items():
            for name in {hook, re.sub(r"^blocks\.\d+\.", "blocks.*.", hook)}:
                groups.setdefault(name, {})[hook] = scores
        for name, members in groups.items():
            shared = {"control": control, "hook": name, "split": "score"} | key.parameters()
            rows += [shared | row for row in _means(metric, members)]
    return rows


def _means(metric: str, by_hook: dict[str, HookScores]) -> list[Row]:
    """Return the row with all units, and where there is a metric for it, the one with defined."""
    groups = by_hook.values()
    shared: Row = {
        "ci_level": LEVEL,
        "n_records": sum(group.n_records for group in groups),
        "n_tokens": sum(group.n_tokens for group in groups),
        "n_failures": sum(group.n_failed for group in groups),
    }
    n_all = sum(len(group.values) for group in groups)
    if n_all:
        shared["nan_fraction"] = 1 - sum(len(group.defined) for group in groups) / n_all
    rows = [_mean(metric, {hook: group.values for hook, group in by_hook.items()})]
    if f"{metric}_defined" in METRICS:
        defined = {hook: group.defined for hook, group in by_hook.items()}
        rows.append(_mean(f"{metric}_defined", defined))
    return [shared | row for row in rows]


def _mean(metric: str, values: dict[str, ndarray]) -> Row:
    n = sum(map(len, values.values()))
    row: Row = {"metric": metric, "metric_version": METRICS[metric].version, "n": n}
    if not all(map(len, values.values())):
        return row | {"failure": "no_defined_unit"}
    row["value"], low, high = student_interval(list(values.values()))
    row["details"] = {
        "median": float(np.median(np.concatenate(list(values.values())))),
        "share_above_0.2": float(np.mean([(scores > 0.2).mean() for scores in values.values()])),
        "mean_of_hook": {hook: float(scores.mean()) for hook, scores in values.items()},
    }
    if np.isnan(low):
        return row
    method = "Student t over units within hooks; one model, no variation between training seeds"
    return row | {"ci_low": low, "ci_high": high, "ci_method": method}
