"""Which of two codes serves better: paired differences, their interval, and their p.

Two families are a pair where task, seed and noise draw are the same, so that what the draw does to
both cancels. Seeds of one task are repetitions of that task: they are resampled within it, and the
mean is over the tasks at hand, not over tasks that might have been. Every seed is judged on the
same test texts, so where rows say which of them are right the interval is over both; without, it is
over training sets, labels and noise alone.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from lmmono.errors import DataError, nearest
from lmmono.registry.metrics import METRICS
from lmmono.stats.significance import Effect, effect, holm, win_rate
from lmmono.stats.two_way import two_way_mean
from lmmono.suites.results import FULL, Result, grouped, paired


@dataclass(frozen=True, slots=True)
class Comparison:
    """How a family does against a baseline under one condition."""

    feature: str
    """The family."""
    baseline: str
    """What it is held against."""
    budget: str
    """Dimensions that the probe may read, the same for both."""
    task: str
    """Name of the task; `all` for all together."""
    condition: tuple[Any, ...]
    """Suite, corruption, level, probe, shots, metric, split."""
    mean: float
    """Mean of the family over tasks of the mean over seeds."""
    baseline_mean: float
    """Mean of the baseline."""
    effect: Effect
    """The family less the baseline."""
    win_rate: float
    """Share of pairs in which the family is better, ties by half."""
    p_holm: float
    """p after Holm's correction over the families under this condition."""
    n_lost: int
    """Pairs without a difference, since one of the two failed or is missing."""


def compare_families(
    results: Sequence[Result], baseline: str, *, seed: int = 0
) -> list[Comparison]:
    """Return every family against a baseline of the same budget, condition by condition.

    Where there are several tasks, each comes by itself and then `all` together. Where the baseline
    has no rows at a budget, its rows at the full one are taken.

    Raises:
        DataError: No row is of the baseline, or a family has two rows for one pair.
    """
    families = sorted({result.feature for result in results})
    if baseline not in families:
        raise DataError(f"no rows of the baseline {baseline!r}; {nearest(baseline, families)}")
    comparisons: list[Comparison] = []
    for group in grouped(results, lambda result: result.condition):
        tasks = sorted({result.task for result in group})
        for task in [*tasks, *(["all"] if len(tasks) > 1 else [])]:
            here = [result for result in group if task in (result.task, "all")]
            comparisons += _under_condition(here, baseline, task, seed)
    return comparisons


def _under_condition(
    results: Sequence[Result], baseline: str, task: str, seed: int
) -> list[Comparison]:
    by_arm: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        by_arm.setdefault((result.feature, result.budget), []).append(result)
    comparisons: list[Comparison] = []
    for (feature, budget), ours in sorted(by_arm.items()):
        theirs = by_arm.get((baseline, budget)) or by_arm.get((baseline, FULL))
        if feature == baseline or not theirs:
            continue
        pairs, n_lost = paired(ours, theirs)
        if not pairs:  # no pair has both values
            continue
        values = [np.array(of_task) for of_task in pairs.values()]
        differences = [of_task[:, 0] - of_task[:, 1] for of_task in values]
        by_text = None if n_lost else text_differences(ours, theirs)
        mean, baseline_mean = np.mean([of_task.mean(axis=0) for of_task in values], axis=0).tolist()
        metric = METRICS.get(ours[0].metric)
        sign = -1 if metric and metric.better == "lower" else 1
        comparisons.append(
            Comparison(
                feature,
                baseline,
                budget,
                task,
                ours[0].condition,
                mean,
                baseline_mean,
                effect(differences, seed=seed) if by_text is None else two_way_effect(by_text),
                win_rate(sign * np.concatenate(differences)),
                math.nan,
                n_lost,
            )
        )
    corrected = holm([comparison.effect.p for comparison in comparisons])
    return [
        replace(comparison, p_holm=p) for comparison, p in zip(comparisons, corrected, strict=True)
    ]


def text_differences(
    ours: Sequence[Result], theirs: Sequence[Result]
) -> list[Float[ndarray, "seeds texts"]] | None:
    """Return the difference on every test text, an array per task with a row per seed.

    Several rows of a seed (draws, conditions) are averaged. None where rows do not say which texts
    are right, or not of the same texts.
    """
    sides: list[dict[tuple[str, int], list[ndarray]]] = [{}, {}]
    for side, rows in zip(sides, (ours, theirs), strict=True):
        for row in rows:
            if row.items is None:
                return None
            side.setdefault((row.task, row.seed), []).append(row.items)
    if sides[0].keys() != sides[1].keys():
        return None
    tasks: dict[str, list[ndarray]] = {}
    for key in sorted(sides[0]):
        sizes = {len(items) for side in sides for items in side[key]}
        if len(sizes) > 1:
            return None
        one, other = (np.mean(side[key], axis=0) for side in sides)
        tasks.setdefault(key[0], []).append(one - other)
    if any(len({len(row) for row in rows}) > 1 for rows in tasks.values()):
        return None
    return [np.array(rows) for rows in tasks.values()]


def two_way_effect(by_task: Sequence[Float[ndarray, "seeds texts"]]) -> Effect:
    """Return a mean difference whose interval is over seeds and the test texts that they share.

    Seeds alone say how sure a difference is on these texts; of two equal codes 40 of 100 such
    intervals leave 0 out.
    """
    tested = two_way_mean(by_task)
    method = "two-way over seeds and test texts, Student t"
    ends, p = (tested.ci_low, tested.ci_high), 1.0 if math.isnan(tested.p) else tested.p
    least = 1.0 if math.isnan(tested.p) else 0.0
    return Effect(tested.mean, *ends, p, least, tested.n_seeds, method)


def by_seed(values: Mapping[tuple[str, int], float]) -> list[Float[ndarray, " _"]]:
    """Return values by (task, seed) as one array per task."""
    tasks: dict[str, list[float]] = {}
    for (task, _), value in sorted(values.items()):
        tasks.setdefault(task, []).append(value)
    return [np.array(of_task) for of_task in tasks.values()]
