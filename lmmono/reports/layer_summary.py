"""Layers of runs by their numbers, each with an interval and its controls."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

import activation_store as astore
from lmmono.reports.table import Interval
from lmmono.runs.folder import Run

N_RESAMPLES = 400
"""An end of the interval then moves by about a tenth of its width."""
UNTRAINED = "untrained"

_STATS = "SELECT hook, unit, n_active, density, kurtosis FROM unit_stats ORDER BY hook, unit"

_UNIT_SCORES = """
SELECT hook, metric, preset, explainer, judge, control, list(value) AS values FROM all_scores
WHERE unit IS NOT NULL AND dictionary IS NULL AND value IS NOT NULL AND hook IS NOT NULL
GROUP BY ALL ORDER BY ALL
"""

_MEANS = """
SELECT hook, metric, preset, explainer, judge, control, value, ci_low, ci_high FROM all_scores
WHERE unit IS NULL AND dictionary IS NULL AND value IS NOT NULL AND hook IS NOT NULL
    AND NOT contains(hook, '*')
QUALIFY row_number() OVER (
    PARTITION BY hook, metric, preset, explainer, judge, control ORDER BY created_at DESC) = 1
ORDER BY ALL
"""


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """One hook of one run."""

    run: str
    hook: str
    n_units: int
    measures: Mapping[str, Interval]
    """density (mean over units), dead share, kurtosis (median), and each score by its label."""
    controls: Mapping[str, Mapping[str, float]]
    """By measure, then by the control's name."""


def layer_summaries(runs: Sequence[Run]) -> list[LayerSummary]:
    """Return the captured hooks of runs; an untrained control that lies in a run is its control.

    A score's value is the mean that the scorer wrote for the hook; where it wrote none, the median
    over units with the interval of resampled units.

    Raises:
        StoreError: A store cannot be opened.
    """
    layers: list[LayerSummary] = []
    for run in runs:
        with run.reading() as store:
            stats, (scores, controls) = _stats(store), _scores(store)
        beside: dict[str, dict[str, Interval]] = {}
        if (control := run.dir / "untrained" / "store.duckdb").is_file():
            with astore.open(control) as store:
                beside = {hook: measures for hook, (_, measures) in _stats(store).items()}
        for hook, (n_units, measures) in stats.items():
            of_hook: dict[str, dict[str, float]] = defaultdict(dict)
            for (score, name), value in controls.get(hook, {}).items():
                of_hook[score][name] = value
            for name, interval in beside.get(hook, {}).items():
                of_hook[name][UNTRAINED] = interval.value
            measures = {**measures, **scores.get(hook, {})}
            layers.append(LayerSummary(run.name, hook, n_units, measures, dict(of_hook)))
    return layers


def _stats(store: astore.Store) -> dict[str, tuple[int, dict[str, Interval]]]:
    rows = store.sql(_STATS).fetchnumpy()
    measures: dict[str, tuple[int, dict[str, Interval]]] = {}
    for hook in dict.fromkeys(rows["hook"]):
        here = rows["hook"] == hook
        density, kurtosis = (np.ma.filled(rows[name], np.nan)[here].astype(np.float64)
                             for name in ("density", "kurtosis"))  # fmt: skip
        dead = (np.asarray(rows["n_active"])[here] == 0).astype(np.float64)
        measures[str(hook)] = (
            len(dead),
            {
                "density": _resampled(density, np.mean),
                "dead share": _resampled(dead, np.mean),
                "kurtosis": _resampled(kurtosis, np.median),
            },
        )
    return measures


def _scores(
    store: astore.Store,
) -> tuple[dict[str, dict[str, Interval]], dict[str, dict[tuple[str, str], float]]]:
    """Return the scores by hook, and their controls by hook and score."""
    scores: dict[str, dict[str, Interval]] = defaultdict(dict)
    controls: dict[str, dict[tuple[str, str], float]] = defaultdict(dict)
    for hook, *key, control, values in store.sql(_UNIT_SCORES).fetchall():
        if control is None:
            scores[hook][score_label(*key)] = _resampled(np.array(values), np.median)
        else:
            controls[hook][score_label(*key), control] = float(np.median(values))
    for hook, *key, control, value, low, high in store.sql(_MEANS).fetchall():
        if control is None:
            ends = (np.nan if end is None else end for end in (low, high))
            scores[hook][score_label(*key)] = Interval(value, *ends)
        else:
            controls[hook][score_label(*key), control] = value
    return scores, controls


def score_label(metric: str, *about: str | None) -> str:
    """Return a score's name with what decides its result: preset, explainer, judge.

    >>> score_label("detection", "delphi", "token_lookup", None)
    'detection, delphi, token_lookup'
    """
    return ", ".join([metric, *(part for part in about if part is not None)])


def _resampled(values: Float[ndarray, " units"], summary: Any) -> Interval:
    """Return a summary over units with its 95 % interval over resampled units."""
    data = values[np.isfinite(values)]
    if len(data) == 0:
        return Interval(np.nan, np.nan, np.nan)
    draws = np.random.default_rng(0).integers(len(data), size=(N_RESAMPLES, len(data)))
    low, high = np.quantile(summary(data[draws], axis=1), [0.025, 0.975])
    return Interval(float(summary(data)), float(low), float(high))
