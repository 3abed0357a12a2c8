"""Statistics of units that need labels: how well a unit keeps to one concept.

`semantic_consistency` is the largest share of a concept among the items on which the unit fires,
raw and beyond chance; see `lmmono.stats.formulas`. The `top` variants take the same number of
items for each unit, its strongest, so that dense and sparse codes can be compared.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from lmmono.records.seeds import stream
from lmmono.registry.scorer_settings import LabelledSettings
from lmmono.scores.labelled_items import LabelledItems, read_labelled
from lmmono.scores.score_job import Row, ScoreJob
from lmmono.scores.unit_statistics import METHOD, N_GROUPS
from lmmono.stats.formulas import MIN_SUPPORT, beyond_chance, consistency, fires
from lmmono.stats.intervals import jackknife_interval


def strongest(acts: Float[ndarray, "items units"], share: float) -> Bool[ndarray, "items units"]:
    """Return each unit's strongest items, the same number for each, at least one; none if 0."""
    k = max(1, int(np.ceil(share * len(acts))))
    top = np.argpartition(-acts, k - 1, axis=0)[:k]
    chosen = np.zeros(acts.shape, bool)
    np.put_along_axis(chosen, top, True, axis=0)
    return chosen & fires(acts)


def selectivity(
    acts: Float[ndarray, "items units"],
    labels: Bool[ndarray, "items concepts"],
    concepts: Int[ndarray, " units"],
) -> Float[ndarray, " units"]:
    """Return (mean with - mean without) / (mean with + mean without) of each unit's concept.

    Morcos et al. 2018 (arXiv 1803.06959). NaN where the unit is silent or the concept is missing.
    """
    has_concept = labels[:, concepts].astype(np.float64)
    n_with = has_concept.sum(axis=0)
    n_without = len(has_concept) - n_with
    with_it = (acts * has_concept).sum(axis=0) / np.maximum(n_with, 1)
    without = (acts * (1 - has_concept)).sum(axis=0) / np.maximum(n_without, 1)
    total = with_it + without
    defined = (total > 0) & (n_with > 0) & (n_without > 0)
    return np.where(defined, (with_it - without) / np.where(defined, total, 1), np.nan)


def mean_differences(
    acts: Float[ndarray, "items units"], labels: Bool[ndarray, "items concepts"]
) -> Float[ndarray, "concepts units"]:
    """Return for each concept how much larger each unit's mean is on items that have it."""
    has_concept = labels.T.astype(np.float32)
    n = has_concept.sum(axis=1, keepdims=True)
    sums = has_concept @ acts
    total = acts.sum(axis=0)
    return sums / np.maximum(n, 1) - (total - sums) / np.maximum(len(acts) - n, 1)


@dataclass(frozen=True, slots=True, eq=False)
class _Measured:
    """Values of all units by metric: over all documents, then without each group of them."""

    parts: dict[str, Float[ndarray, "units parts"]]
    support: dict[str, Int[ndarray, " units"]]


def score_labelled(job: ScoreJob) -> list[Row]:
    """Score units by selectivity and consistency, raw and corrected; control `shuffled_labels`."""
    scored, learned = read_labelled(job, "score"), read_labelled(job, "explain")
    by_control: dict[str | None, _Measured] = {None: _measure(job, scored, scored.labels, learned)}
    if job.controls:
        labels = scored.shuffled(stream("shuffled labels", job.seed))
        by_control["shuffled_labels"] = _measure(job, scored, labels, learned)
    units = list(range(scored.acts.shape[1])) if job.units is None else sorted(job.units)
    rows: list[Row] = []
    for control, measured in by_control.items():
        for metric, parts in measured.parts.items():
            low, high = jackknife_interval(parts[:, 0], parts[:, 1:])
            for i, unit in enumerate(units):
                support = int(measured.support[metric][i])
                columns = _columns(metric, parts[i, 0], low[i], high[i], support)
                counts = {"n": support, "n_documents": len(np.unique(scored.doc_ids))}
                rows.append(job.row(metric, unit, control=control, **counts, **columns))
    return rows


def _columns(metric: str, value: float, low: float, high: float, support: int) -> Row:
    if support < MIN_SUPPORT or np.isnan(value):
        failure = "too_few_records" if support else "silent"
        return {"value": None, "n_failures": 1, "failure": failure}
    columns: Row = {"value": float(value), "n_failures": 0}
    if np.isnan(low):
        return columns
    least = 0.0 if metric.endswith("raw") else -1.0
    method = METHOD if metric != "semantic_consistency" else f"{METHOD}, shuffled labels held fast"
    ends = np.clip([low, high], least, 1.0)
    return columns | {"ci_low": float(ends[0]), "ci_high": float(ends[1]), "ci_method": method}


def _measure(
    job: ScoreJob,
    scored: LabelledItems,
    labels: Bool[ndarray, "items concepts"],
    learned: LabelledItems,
) -> _Measured:
    concepts = _best_concepts(learned)
    groups = np.searchsorted(np.unique(scored.doc_ids), scored.doc_ids) % N_GROUPS
    kept = [np.ones(len(groups), bool), *(groups != g for g in np.unique(groups))]
    parts = {
        "class_selectivity": np.stack(
            [selectivity(scored.acts[k], labels[k], concepts) for k in kept], axis=1
        )
    }
    firing, settings = fires(scored.acts), job.settings_as(LabelledSettings)
    support = {"class_selectivity": firing.sum(axis=0)}
    shuffles = [
        scored.shuffled(stream("shuffled classes", job.seed, i))
        for i in range(settings.permutations)
    ]
    tops = strongest(scored.acts, settings.top_share)
    for name, active in (("semantic_consistency", firing), ("semantic_consistency_top", tops)):
        raw = np.stack([consistency(active[k], labels[k]) for k in kept], axis=1)
        chance = np.mean([consistency(active, labels) for labels in shuffles], axis=0)[:, None]
        parts |= {name: beyond_chance(raw, chance), f"{name}_raw": raw}
        support |= dict.fromkeys((name, f"{name}_raw"), active.sum(axis=0))
    return _Measured(parts, support)


def _best_concepts(learned: LabelledItems) -> Int[ndarray, " units"]:
    """Return the concept that each unit selects best on the explain split."""
    n_concepts, n_units = learned.labels.shape[1], learned.acts.shape[1]
    selectivities = [
        selectivity(learned.acts, learned.labels, np.full(n_units, concept))
        for concept in range(n_concepts)
    ]
    return np.nan_to_num(np.stack(selectivities), nan=-np.inf).argmax(axis=0)
