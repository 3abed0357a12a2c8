"""Which of two codes serves better: paired differences, their interval, and their p.

Two families are a pair where task, seed and noise draw are the same, so that what the draw does to
both cancels. Seeds of one task are repetitions of that task: they are resampled within it, and the
mean is over the tasks at hand, not over tasks that might have been. Every seed is judged on the
same test items, so the interval is over training sets, labels and noise.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from lmmono.errors import DataError, nearest
from lmmono.registry.metrics import METRICS
from lmmono.stats.significance import Effect, effect, holm, win_rate
from lmmono.suites.robustness_rows import FULL, Result


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


def paired(
    ours: Iterable[Result], theirs: Iterable[Result]
) -> tuple[dict[str, list[tuple[float, float]]], int]:
    """Return the pairs of each task, one per seed, and how many pairs were lost.

    Several draws or conditions of one seed are averaged: they share its training set.
    """
    mine, other = (_by_pair(part) for part in (ours, theirs))
    seeds: dict[tuple[str, int], list[tuple[float, float]]] = {}
    lost = 0
    for key in sorted(mine.keys() | other.keys(), key=repr):
        pair = (mine.get(key, math.nan), other.get(key, math.nan))
        if math.isnan(sum(pair)):
            lost += 1
        else:
            seeds.setdefault(key[0][:2], []).append(pair)
    found: dict[str, list[tuple[float, float]]] = {}
    for (task, _), pairs in seeds.items():
        a, b = np.mean(pairs, axis=0).tolist()
        found.setdefault(task, []).append((a, b))
    return found, lost


def _by_pair(results: Iterable[Result]) -> dict[tuple[Any, ...], float]:
    found: dict[tuple[Any, ...], float] = {}
    for each in results:
        key = (each.key, each.condition)
        if key in found:
            raise DataError(
                f"{each.feature} has two rows of task {each.task}, seed {each.seed}, "
                f"condition {each.condition}: give each family a name and a budget of its own"
            )
        found[key] = each.value
    return found


def compare_families(
    results: Sequence[Result], baseline: str, *, seed: int = 0
) -> list[Comparison]:
    """Return every family against a baseline of the same budget, condition by condition.

    Where there are several tasks, each comes by itself and then `all` together. Where the baseline
    has no rows at a budget, its rows at the full one are taken.

    Raises:
        DataError: No row is of the baseline, or a family has two rows for one pair.
    """
    families = sorted({each.feature for each in results})
    if baseline not in families:
        raise DataError(f"no rows of the baseline {baseline!r}; {nearest(baseline, families)}")
    found: list[Comparison] = []
    for mine in grouped(results, _condition):
        tasks = sorted({each.task for each in mine})
        for task in [*tasks, *(["all"] if len(tasks) > 1 else [])]:
            here = [each for each in mine if task in (each.task, "all")]
            found += _under_condition(here, baseline, task, seed)
    return found


def _condition(result: Result) -> tuple[Any, ...]:
    return result.condition


def _under_condition(
    results: Sequence[Result], baseline: str, task: str, seed: int
) -> list[Comparison]:
    by_arm: dict[tuple[str, str], list[Result]] = {}
    for each in results:
        by_arm.setdefault((each.feature, each.budget), []).append(each)
    made: list[Comparison] = []
    for (feature, budget), mine in sorted(by_arm.items()):
        theirs = by_arm.get((baseline, budget)) or by_arm.get((baseline, FULL))
        if feature != baseline and theirs:
            made += _one(mine, theirs, (baseline, task), seed)
    corrected = holm([each.effect.p for each in made])
    return [replace(each, p_holm=p) for each, p in zip(made, corrected, strict=True)]


def _one(
    mine: Sequence[Result], theirs: Sequence[Result], names: tuple[str, str], seed: int
) -> list[Comparison]:
    """Return the comparison of two arms, or none where no pair has both values."""
    pairs, lost = paired(mine, theirs)
    if not pairs:
        return []
    values = [np.array(each) for each in pairs.values()]
    differences = [each[:, 0] - each[:, 1] for each in values]
    ours, their = np.mean([each.mean(axis=0) for each in values], axis=0).tolist()
    first, (baseline, task) = mine[0], names
    known = METRICS.get(first.metric)
    sign = -1 if known and known.better == "lower" else 1
    return [
        Comparison(
            first.feature,
            baseline,
            first.budget,
            task,
            first.condition,
            ours,
            their,
            effect(differences, seed=seed),
            win_rate(sign * np.concatenate(differences)),
            math.nan,
            lost,
        )
    ]


def grouped(results: Iterable[Result], key: Callable[[Result], Any]) -> list[list[Result]]:
    """Return results in groups of equal key, in the order in which the keys first come."""
    groups: dict[Any, list[Result]] = {}
    for each in results:
        groups.setdefault(key(each), []).append(each)
    return list(groups.values())


def by_seed(values: Mapping[tuple[str, int], float]) -> list[Float[ndarray, " _"]]:
    """Return values by (task, seed) as one array per task."""
    tasks: dict[str, list[float]] = {}
    for (task, _), value in sorted(values.items()):
        tasks.setdefault(task, []).append(value)
    return [np.array(each) for each in tasks.values()]
