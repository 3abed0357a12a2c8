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
from scipy.stats import bootstrap, permutation_test
from scipy.stats import t as student_t

from lmmono.errors import DataError, nearest
from lmmono.registry.metrics import METRICS
from lmmono.suites.robustness_rows import FULL, Result

LEVEL = 0.95
"""Coverage that the intervals aim at."""

N_RESAMPLES = 9_999
"""Resamples of the bootstrap; up to one more sign patterns are all enumerated (13 pairs)."""

FEW_SEEDS = 20
"""With fewer seeds of a task the interval is Student's t: the bootstrap's is too short there."""


@dataclass(frozen=True, slots=True)
class Effect:
    """A mean difference with its interval and p."""

    value: float
    """Mean over tasks of the mean over seeds."""
    ci_low: float
    """Lower end of the 95 % interval; NaN where there is none."""
    ci_high: float
    """Upper end."""
    p: float
    """Two-sided, of flipping the signs of differences."""
    least_p: float
    """The least p that so many seeds can give; above 0.05, no result can be significant."""
    n_seeds: int
    """Differences, over all tasks."""
    n_tasks: int
    """Tasks."""
    ci_method: str
    """How the interval was made."""

    def __str__(self) -> str:
        return f"{self.value:+.4f} [{self.ci_low:+.4f}, {self.ci_high:+.4f}], p = {self.p:.3g}"


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


def effect(by_task: Sequence[Float[ndarray, " _"]], *, seed: int = 0) -> Effect:
    """Return the mean difference with its interval over seeds within tasks, and sign-flip p.

    The interval is Student's t below `FEW_SEEDS` seeds of a task, and the BCa bootstrap above. p
    flips the signs of single differences, all 2^n ways where these are at most 10,000 and as many
    random ways otherwise. Tasks of a single seed are resampled themselves.

    Args:
        by_task: Differences of each task, one per seed.
        seed: Seed of the resampling.
    """
    assert by_task and all(len(each) for each in by_task)
    n, weights = sum(map(len, by_task)), [len(by_task) * len(each) for each in by_task]
    shares = np.concatenate([d / w for d, w in zip(by_task, weights, strict=True)])
    groups = by_task if min(map(len, by_task)) > 1 else [shares * n]
    low, high, method = _interval(groups, seed)
    return Effect(
        float(shares.sum()),
        low,
        high,
        sign_flip_p(shares, seed=seed),
        min(1.0, 2.0 ** (1 - n)),
        n,
        len(by_task),
        method,
    )


def _interval(groups: Sequence[Float[ndarray, " _"]], seed: int) -> tuple[float, float, str]:
    """Return both ends and the method; groups are resampled apart and count alike."""
    n = min(map(len, groups))
    if n < 2:
        return math.nan, math.nan, "none: one seed"
    if n < FEW_SEEDS:
        return *student_interval(groups), f"Student t over seeds within tasks ({n} of a task)"
    return *bca_interval(groups, seed), "BCa bootstrap over seeds within tasks"


def bca_interval(groups: Sequence[Float[ndarray, " _"]], seed: int = 0) -> tuple[float, float]:
    """Return scipy's BCa interval of the mean of group means; groups are resampled apart."""
    if all(np.ptp(group) == 0 for group in groups):
        mean = float(np.mean([group[0] for group in groups]))
        return mean, mean
    made = bootstrap(
        tuple(groups),
        _mean_of_means,
        n_resamples=N_RESAMPLES,
        vectorized=True,
        confidence_level=LEVEL,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(made.low), float(made.high)


def _mean_of_means(*groups: Float[ndarray, "..."], axis: int = -1) -> Float[ndarray, "..."]:
    return np.asarray(sum(group.mean(axis=axis) for group in groups) / len(groups))


def student_interval(groups: Sequence[Float[ndarray, " _"]]) -> tuple[float, float]:
    """Return the interval of the mean of group means: Student's t, Satterthwaite's freedom."""
    mean = float(np.mean([group.mean() for group in groups]))
    parts = np.array([group.var(ddof=1) / len(group) for group in groups]) / len(groups) ** 2
    weight = (parts**2 / np.array([len(group) - 1 for group in groups])).sum()
    freedom = max(parts.sum() ** 2 / max(weight, 1e-300), 1.0)
    half = float(student_t.ppf((1 + LEVEL) / 2, freedom) * np.sqrt(parts.sum()))
    return mean - half, mean + half


def sign_flip_p(shares: Float[ndarray, " pairs"], *, seed: int = 0) -> float:
    """Return the two-sided p of a sum whose terms are as likely positive as negative.

    >>> sign_flip_p(np.array([1.0, 2.0, 3.0]))  # 2 of the 8 sign patterns sum to 6 or -6
    0.25
    """
    if len(shares) < 2 or not shares.any():
        return 1.0
    made = permutation_test(
        (shares,),
        np.sum,
        permutation_type="samples",
        vectorized=True,
        n_resamples=N_RESAMPLES,
        batch=2_000,
        rng=np.random.default_rng(seed),
    )
    return float(made.pvalue)


def holm(p: Sequence[float]) -> list[float]:
    """Return p corrected for testing all at once (Holm 1979); NaN stays and does not count.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted((i for i in range(len(p)) if not math.isnan(p[i])), key=lambda i: p[i])
    corrected, largest = list(p), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p[i]))
        corrected[i] = largest
    return corrected


def win_rate(differences: Float[ndarray, " pairs"]) -> float:
    """Return the share of differences above 0, ties by half.

    >>> win_rate(np.array([0.2, 0.0, -0.1, 0.3]))
    0.625
    """
    return float(np.mean((np.sign(differences) + 1) / 2))


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
