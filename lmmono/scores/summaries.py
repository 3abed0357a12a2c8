"""Scores of hooks and of models: means over the units whose rows a store holds.

Each mean comes twice: `simulation_tar` counts a unit without a defined score as 0, and
`simulation_tar_defined` leaves it out, as some papers do. The first is the one to compare: which
units are left out depends on the model.
"""

import re
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray

import activation_store as astore
from lmmono.registry.metrics import METRICS
from lmmono.scores.scorer_registry import Row
from lmmono.stats.estimate import LEVEL
from lmmono.stats.intervals import student_interval

_QUERY = """SELECT hook, metric, control, value, nan_fraction, n_records, n_tokens
    FROM scores WHERE unit IS NOT NULL AND list_contains($metrics, metric)
        AND list_contains($hooks, hook) AND seed IS NOT DISTINCT FROM $seed
        AND preset IS NOT DISTINCT FROM $preset AND explainer IS NOT DISTINCT FROM $explainer
        AND judge IS NOT DISTINCT FROM $judge
    ORDER BY metric, control, hook, unit"""


@dataclass(frozen=True, slots=True)
class Origin:
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
    split: str | None = "score"
    """Split of the documents."""


@dataclass(frozen=True, slots=True)
class HookScores:
    """The scores of the units of one hook under one metric and control."""

    values: Float[ndarray, " units"]
    """Value of each unit; 0 where it is not defined."""
    defined: Float[ndarray, " defined"]
    """Values that are defined."""
    n_failed: int
    """Units without a value."""
    n_records: int
    """Records of all units."""
    n_tokens: int
    """Tokens of all units' records."""


def read_scores(
    store: astore.Store, hooks: list[str], origin: Origin
) -> dict[tuple[str, str | None], dict[str, HookScores]]:
    """Return the scores of units by metric and control, then by hook."""
    params = {"metrics": list(origin.metrics), "hooks": hooks, "seed": origin.seed}
    params |= {"preset": origin.preset, "explainer": origin.explainer, "judge": origin.judge}
    table = store.sql(_QUERY, **params).to_arrow_table()
    keys = [table[name].to_numpy(zero_copy_only=False) for name in ("metric", "control", "hook")]
    numbers = {
        name: table[name].to_numpy(zero_copy_only=False).astype(np.float64)
        for name in ("value", "nan_fraction", "n_records", "n_tokens")
    }
    found: dict[tuple[str, str | None], dict[str, HookScores]] = {}
    if not table.num_rows:
        return found
    texts = np.array(["\0".join(str(part) for part in row) for row in zip(*keys, strict=True)])
    bounds = np.flatnonzero(np.append(texts[1:] != texts[:-1], True)) + 1
    for first, last in zip([0, *bounds[:-1]], bounds, strict=True):
        metric, control, hook = (column[first] for column in keys)
        mine = {name: column[first:last] for name, column in numbers.items()}
        has_value = ~np.isnan(mine["value"])
        values = mine["value"][has_value]
        found.setdefault((metric, control), {})[hook] = HookScores(
            values,
            values[~(mine["nan_fraction"][has_value] > 0)],
            int((~has_value).sum()),
            int(np.nansum(mine["n_records"])),
            int(np.nansum(mine["n_tokens"])),
        )
    return found


def summary_rows(store: astore.Store, hooks: list[str], origin: Origin) -> list[Row]:
    """Return rows for each hook, and for all blocks' hooks of one kind, named `blocks.*. ...`.

    The mean of a model is the mean over its hooks of their means over units.
    """
    rows: list[Row] = []
    for (metric, control), by_hook in read_scores(store, hooks, origin).items():
        families: dict[str, dict[str, HookScores]] = {}
        for hook, scores in by_hook.items():
            family = re.sub(r"^blocks\.\d+\.", "blocks.*.", hook)
            for name in {hook, family}:
                families.setdefault(name, {})[hook] = scores
        for name, groups in families.items():
            known = {"metric": metric, "control": control, "hook": name}
            rows += [known | row for row in _means(metric, groups, origin)]
    return rows


def _means(metric: str, by_hook: dict[str, HookScores], origin: Origin) -> list[Row]:
    """Return the row with all units, and where there is a metric for it, the one with defined."""
    shared = {"preset": origin.preset, "explainer": origin.explainer, "judge": origin.judge}
    shared |= {"seed": origin.seed, "split": origin.split, "ci_level": LEVEL}
    groups = by_hook.values()
    shared |= {"n_records": sum(group.n_records for group in groups)}
    shared |= {"n_tokens": sum(group.n_tokens for group in groups)}
    shared |= {"n_failures": sum(group.n_failed for group in groups)}
    n_all, n_defined = (sum(map(len, side)) for side in zip(*map(_sides, groups), strict=True))
    if n_all:
        shared["nan_fraction"] = 1 - n_defined / n_all
    rows = [_mean(metric, {hook: group.values for hook, group in by_hook.items()})]
    if f"{metric}_defined" in METRICS:
        defined = {hook: group.defined for hook, group in by_hook.items()}
        rows.append(_mean(f"{metric}_defined", defined))
    return [shared | row for row in rows]


def _sides(group: HookScores) -> tuple[ndarray, ndarray]:
    return group.values, group.defined


def _mean(metric: str, values: dict[str, ndarray]) -> Row:
    n = sum(map(len, values.values()))
    known: Row = {"metric": metric, "metric_version": METRICS[metric].version, "n": n}
    if not all(map(len, values.values())):
        return known | {"failure": "no_defined_unit"}
    mean, low, high = student_interval(list(values.values()))
    known["value"] = mean
    known["details"] = {
        "median": float(np.median(np.concatenate(list(values.values())))),
        "share_above_0.2": float(np.mean([(each > 0.2).mean() for each in values.values()])),
        "mean_of_hook": {hook: float(each.mean()) for hook, each in values.items()},
    }
    if np.isnan(low):
        return known
    method = "Student t over units within hooks; one model, no variation between training seeds"
    return known | {"ci_low": low, "ci_high": high, "ci_method": method}
