"""Effective robustness: accuracy on another domain beyond what accuracy at home foretells.

Accuracies of the two domains lie on a line on the logit scale (Taori et al. 2020, arXiv
2007.00644; Miller et al. 2021, arXiv 2107.04649). The line is fitted to the baselines; a family's
effective robustness is its mean distance above it, in logits. A family that is only better or
worse everywhere lies on the line.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from lmmono.errors import DataError
from lmmono.stats.bootstrap import bca
from lmmono.stats.intervals import jackknife_interval
from lmmono.stats.significance import FEW_SEEDS, Effect, holm, sign_flip_p
from lmmono.suites.results import Result

AT_HOME = "test"
"""Split of the task's own domain; those of others begin with `ood:`."""

MIN_SPREAD = 0.05
"""Standard deviation, in logits, that the baselines' accuracies at home must have for a line."""

MIN_POINTS = 5
"""Results of baselines that a line needs."""


@dataclass(frozen=True, slots=True)
class EffectiveRobustness:
    """How far above the baselines' line a family lies."""

    feature: str
    """The family."""
    task: str
    """Name of the task."""
    split: str
    """The other domain."""
    slope: float
    """Slope of the line, logits per logit."""
    intercept: float
    """Its value at an accuracy of one half at home."""
    at_home: float
    """Mean accuracy of the family at home."""
    elsewhere: float
    """Mean accuracy of the family on the other domain."""
    effect: Effect
    """Mean distance above the line, in logits."""
    p_holm: float
    """p after Holm's correction over the families of this task and domain."""


def effective_robustness(
    results: Sequence[Result], baselines: Sequence[str], *, seed: int = 0
) -> list[EffectiveRobustness]:
    """Return the effective robustness of every family that is no baseline, domain by domain.

    The interval is over seeds, and fits the line anew each time; p flips signs of the distances
    from one line, each less the mean distance of the baselines of the same seed.

    Args:
        results: Accuracies of splits `test` and `ood:...`; levels and shots all count as points.
        baselines: Families that make the line.
        seed: Seed of the resampling.

    Raises:
        DataError: The baselines have too few accuracies, or too much alike, for a line.
    """
    points = _points(results)
    robustness: list[EffectiveRobustness] = []
    for task, split in sorted({(task, split) for task, split, _ in points}):
        here = {f: part for (t, s, f), part in points.items() if (t, s) == (task, split)}
        line = [point for f in baselines for point in here.get(f, [])]
        spread = float(np.std([point.x for point in line])) if line else 0.0
        if len(line) < MIN_POINTS or spread < MIN_SPREAD:
            raise DataError(
                f"task {task}, {split}: want at least {MIN_POINTS} results of baselines whose "
                f"accuracy at home differs (SD over {MIN_SPREAD} logits) for a line, got "
                f"{len(line)} with SD {spread:.3f}; run the baselines with several numbers of shots"
            )
        families = [f for f in here if f not in baselines]
        distances = [_distance(here[f], line, (f, task, split), seed) for f in families]
        corrected = holm([distance.effect.p for distance in distances])
        robustness += [replace(d, p_holm=p) for d, p in zip(distances, corrected, strict=True)]
    return robustness


@dataclass(frozen=True, slots=True)
class _Point:
    """One probe on both domains, in logits."""

    seed: int
    x: float
    y: float
    at_home: float
    elsewhere: float


def _points(results: Sequence[Result]) -> dict[tuple[str, str, str], list[_Point]]:
    """Return the points by task, other domain and family."""
    home = {_probe(result): result for result in results if result.split == AT_HOME}
    points: dict[tuple[str, str, str], list[_Point]] = {}
    for away in results:
        here = home.get(_probe(away))
        if here is None or away.failure or here.failure:
            continue
        if (away.split or "").startswith("ood:"):
            x, y = logit(here.value, here.n), logit(away.value, away.n)
            point = _Point(away.seed, x, y, here.value, away.value)
            points.setdefault((away.task, str(away.split), away.feature), []).append(point)
    return points


def _probe(result: Result) -> tuple[Any, ...]:
    """Return what tells one probe from another: all but the split."""
    about = (result.suite, result.feature, result.budget, result.probe, result.n_shots)
    return *about, result.corruption, result.level, *result.key


def logit(accuracy: float, n: int | None) -> float:
    """Return ln((k + 1/2) / (n - k + 1/2)) of k = accuracy n right ones; finite at 0 and 1.

    Args:
        accuracy: Share of items that are right.
        n: Items; 1,000 where it is not known.

    >>> logit(0.5, 10), logit(1.0, 10) > 0
    (0.0, True)
    """
    n = n or 1_000
    right = accuracy * n
    return float(np.log((right + 0.5) / (n - right + 0.5)))


def _distance(
    ours: Sequence[_Point], line: Sequence[_Point], names: tuple[str, str, str], seed: int
) -> EffectiveRobustness:
    """Return one family's distance from the line."""
    seeds = sorted({point.seed for point in ours} & {point.seed for point in line})
    sums = np.array([_sums(ours, line, seed_of) for seed_of in seeds])
    slope, intercept, value = fitted(sums.sum(axis=0)).tolist()
    low, high, method = _interval(sums, seed)
    # on average over a seed's probes, above the line less the baselines of that seed above it
    n, sx, sy, m, tx, ty = sums[:, [0, 1, 2, 5, 6, 7]].T
    gaps = (ty - slope * tx) / m - (sy - slope * sx) / n
    p = sign_flip_p(gaps, seed=seed)
    least = min(1.0, 2.0 ** (1 - len(seeds)))
    return EffectiveRobustness(
        *names,
        slope,
        intercept,
        float(np.mean([point.at_home for point in ours])),
        float(np.mean([point.elsewhere for point in ours])),
        Effect(value, low, high, p, least, len(seeds), method),
        p,
    )


def _sums(ours: Sequence[_Point], line: Sequence[_Point], seed: int) -> list[float]:
    """Return what a line and a distance are made of: n, x, y, xx, xy of the line; n, x, y."""
    x, y = (np.array([getattr(p, k) for p in line if p.seed == seed]) for k in ("x", "y"))
    xy = [(point.x, point.y) for point in ours if point.seed == seed]
    line_sums = [len(x), x.sum(), y.sum(), (x * x).sum(), (x * y).sum()]
    return [float(value) for value in (*line_sums, len(xy), *np.sum(xy, axis=0))]


def fitted(sums: Float[ndarray, "*draws 8"]) -> Float[ndarray, "*draws 3"]:
    """Return slope and intercept of the least-squares line, and the mean distance above it."""
    n, sx, sy, sxx, sxy, m, tx, ty = np.moveaxis(sums, -1, 0)
    # seeds that all have one accuracy have no slope; then the distance is from their mean
    spread = n * sxx - sx**2
    slope = np.where(spread > 1e-9, (n * sxy - sx * sy) / np.maximum(spread, 1e-9), 0.0)
    intercept = (sy - slope * sx) / n
    return np.stack([slope, intercept, ty / m - slope * tx / m - intercept], axis=-1)


def _interval(sums: Float[ndarray, "seeds 8"], seed: int) -> tuple[float, float, str]:
    """Return both ends: the line is fitted anew without, or to a resample of, the seeds."""
    n = len(sums)
    if n < 2:
        return float("nan"), float("nan"), "none: one seed"
    if n < FEW_SEEDS:
        whole = sums.sum(axis=0)
        low, high = jackknife_interval(fitted(whole)[2], fitted(whole - sums)[:, 2])
        return float(low), float(high), "jackknife over seeds, Student t"

    def above(seeds: Int[ndarray, "..."], axis: int = -1) -> Float[ndarray, "..."]:
        return np.asarray(fitted(sums[seeds].sum(axis=axis - 1))[..., 2])

    return *bca([np.arange(n)], above, seed), "BCa bootstrap over seeds"
