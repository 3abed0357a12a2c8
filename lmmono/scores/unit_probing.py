"""Probes of few units: how much of a concept the best 1, 2 or 5 units of a hook hold.

Units and probes are chosen and fitted on split `explain` and measured on split `score`. Gurnee et
al. 2023 (arXiv 2305.01610) for sparse probing; Härle et al. 2025 (arXiv 2506.19382) for FMS, with
their reference's two faults mended: the unit is chosen on training data, and deeper trees see what
the first one saw.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from lmmono.errors import ExplainError
from lmmono.records.seeds import stream
from lmmono.registry.scorer_settings import FmsSettings
from lmmono.scores.labelled import mean_differences
from lmmono.scores.labelled_items import LabelledItems, read_labelled
from lmmono.scores.score_job import Row, ScoreJob
from lmmono.stats.intervals import student_interval
from lmmono.stats.rates import auroc

MIN_ITEMS = 20
"""A concept needs as many items with it, and without, in both splits."""

SIZES = (1, 2, 5)
"""Units that a probe reads."""

METHOD = "Student t over concepts; one draw of items"


def score_probes(job: ScoreJob) -> list[Row]:
    """Score a hook by the AUROC of logistic probes on the best units, the mean over concepts."""
    sides = read_labelled(job, "explain"), read_labelled(job, "score")
    rows: list[Row] = []
    for control, learned, scored in _with_control(job, *sides):
        areas_of: dict[int, dict[str, float]] = {k: {} for k in SIZES}
        differences = mean_differences(learned.acts, learned.labels)
        for concept in _usable(learned, scored):
            order = np.argsort(-np.abs(differences[concept]), kind="stable")
            for k in SIZES:
                areas_of[k][scored.names[concept]] = _probed(
                    learned.acts[:, order[:k]],
                    scored.acts[:, order[:k]],
                    learned.labels[:, concept],
                    scored.labels[:, concept],
                )
        for k, areas in areas_of.items():
            row = _row(job, f"sparse_probing_auc_{k}", control, list(areas.values()), scored)
            rows.append(row | {"details": areas})
    return rows


def score_fms(job: ScoreJob) -> list[Row]:
    """Score a hook by FMS, the mean over concepts; details say its parts for each."""
    sides = read_labelled(job, "explain"), read_labelled(job, "score")
    rows, settings = list[Row](), job.settings_as(FmsSettings)
    for control, learned, scored in _with_control(job, *sides):
        details: dict[str, dict[str, float]] = {}
        for concept in _usable(learned, scored):
            rng = np.random.default_rng((job.seed, 29, int(concept)))
            most = settings.per_class
            train = _balanced(learned.labels[:, concept], most, rng)
            test = _balanced(scored.labels[:, concept], most, rng)
            details[scored.names[concept]] = _parts(
                (learned.acts[train], learned.labels[train, concept]),
                (scored.acts[test], scored.labels[test, concept]),
                settings.depth,
            )
        for metric in ("fms", "fms_corrected"):
            values = [parts[metric] for parts in details.values()]
            rows.append(_row(job, metric, control, values, scored) | {"details": details})
    return rows


def monosemanticity(best: float, without: float, deeper: Sequence[float]) -> float:
    """Return FMS = best (local + global) / 2.

    local = clip(2 (best - without), 0, 1): how much is lost without the best unit.
    global = clip(1 - mean(deeper - best), 0, 1): how little more units add.
    """
    local = float(np.clip(2 * (best - without), 0, 1))
    total = float(np.clip(1 - np.mean(np.array(deeper) - best), 0, 1))
    return best * (local + total) / 2


def _with_control(
    job: ScoreJob, learned: LabelledItems, scored: LabelledItems
) -> list[tuple[str | None, LabelledItems, LabelledItems]]:
    """Return both sides, and for the control both with labels that are shuffled by documents."""
    by_control: list[tuple[str | None, LabelledItems, LabelledItems]] = [(None, learned, scored)]
    if job.controls:
        rng = stream("probe controls", job.seed)
        sides = [replace(side, labels=side.shuffled(rng)) for side in (learned, scored)]
        by_control.append(("shuffled_labels", sides[0], sides[1]))
    return by_control


def _usable(learned: LabelledItems, scored: LabelledItems) -> Int[ndarray, " concepts"]:
    """Return the concepts with enough items; of two classes the first.

    Raises:
        ExplainError: No concept has.
    """
    enough = np.ones(len(scored.names), bool)
    for side in (learned, scored):
        n = side.labels.sum(axis=0)
        enough &= (n >= MIN_ITEMS) & (len(side.labels) - n >= MIN_ITEMS)
    if not enough.any():
        raise ExplainError(
            f"labels: no concept has {MIN_ITEMS} items with it and without it in both splits; "
            f"take more items"
        )
    is_yes_or_no = learned.labels.shape[1] == 2 and bool((learned.labels.sum(axis=1) == 1).all())
    return np.flatnonzero(enough)[: 1 if is_yes_or_no else None]  # the other says the same


def _probed(
    train: Float[ndarray, "items k"],
    test: Float[ndarray, "tested k"],
    labels: Bool[ndarray, " items"],
    truth: Bool[ndarray, " tested"],
) -> float:
    from sklearn.linear_model import LogisticRegression

    spread = np.maximum(train.std(axis=0), 1e-12)
    probe = LogisticRegression(class_weight="balanced").fit(train / spread, labels)
    scores = probe.decision_function(test / spread)
    return auroc(scores[truth], scores[~truth])


def _balanced(
    labels: Bool[ndarray, " items"], most: int, rng: np.random.Generator
) -> Int[ndarray, " chosen"]:
    """Return as many items with a concept as without it."""
    sides = np.flatnonzero(labels), np.flatnonzero(~labels)
    n = min(most, *(len(side) for side in sides))
    return np.concatenate([rng.choice(side, n, replace=False) for side in sides])


def _parts(
    train: tuple[ndarray, ndarray], test: tuple[ndarray, ndarray], depth: int
) -> dict[str, float]:
    """Return accuracies and both FMS of one concept; trees split on one unit per node."""
    from sklearn.tree import DecisionTreeClassifier

    def accuracy(acts: ndarray, tested: ndarray, deep: int) -> tuple[float, int]:
        tree = DecisionTreeClassifier(max_depth=deep, random_state=0).fit(acts, train[1])
        return float((tree.predict(tested) == test[1]).mean()), int(tree.tree_.feature[0])

    best, unit = accuracy(train[0], test[0], 1)
    rest = np.arange(train[0].shape[1]) != max(unit, 0)
    without = accuracy(train[0][:, rest], test[0][:, rest], 1)[0] if rest.any() else 0.5
    deeper = [accuracy(train[0], test[0], deep)[0] for deep in range(2, depth + 1)]
    above = max(2 * best - 1, 0.0)  # a guess on even classes is right half of the time
    value = monosemanticity(best, without, deeper)
    return {
        "fms": value,
        "fms_corrected": above * value / best if best > 0 else 0.0,
        "accuracy": best,
        "without": without,
        "deepest": deeper[-1],
    }


def _row(
    job: ScoreJob, metric: str, control: str | None, values: list[float], scored: LabelledItems
) -> Row:
    mean, low, high = student_interval([np.array(values)])
    columns: Row = {"value": mean, "n": len(values), "n_tokens": len(scored.acts)}
    columns |= {"n_documents": len(np.unique(scored.doc_ids)), "control": control, "n_failures": 0}
    columns["n_failures"] = len(scored.names) - len(values)
    if not np.isnan(low):
        columns |= {"ci_low": low, "ci_high": high, "ci_method": METHOD}
    return job.row(metric, None, **columns)
